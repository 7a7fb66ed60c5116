"""What the documents show is what happens: tables by the scripts that printed them, recipes by running them."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from small_models import triple

from ires_kernels.cli import main

ROOT = Path(__file__).parent.parent


def test_the_table_of_roundings(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(f"{ROOT / 'examples/rounding.py'}")
    printed = capsys.readouterr().out
    assert printed in (ROOT / "docs/merging.md").read_text()


def recipes() -> dict[str, str]:
    """The shell blocks of the cookbook by their headings."""
    text = (ROOT / "docs/cookbook.md").read_text()
    return dict(re.findall(r"^## (.+?)\n.*?^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("title", recipes())
def test_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, title: str) -> None:
    """Recipes begin in a folder that has the models that they name."""
    triple(tmp_path)
    monkeypatch.chdir(tmp_path)
    for line in recipes()[title].replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["ires"]:
            assert main(words[1:]) == 0, line
