"""What the documents show is what happens: tables by the scripts that printed them, recipes by running them."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from small_models import triple

import ires_kernels as ik
from ires_kernels.cli import main

ROOT = Path(__file__).parent.parent


def test_the_table_of_roundings(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(f"{ROOT / 'examples/rounding.py'}")
    printed = capsys.readouterr().out
    assert printed in (ROOT / "docs/merging.md").read_text()


def test_all_names(capsys: pytest.CaptureFixture[str]) -> None:
    """Where this fails: python docs/api.py > docs/api.md"""
    runpy.run_path(f"{ROOT / 'docs/api.py'}", run_name="__main__")
    assert capsys.readouterr().out == (ROOT / "docs/api.md").read_text()


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


def test_the_files_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    target.rename(tmp_path / "served")
    ik.extract(base, instruct, tmp_path / "RESIDUAL")
    monkeypatch.chdir(tmp_path)
    block = re.search(r"^```sh\n(.*?)^```", (ROOT / "docs/serving.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block
    copy, *commands = (shlex.split(line, comments=True) for line in block[1].splitlines())
    assert (copy[0], *copy[-2:]) == ("cp", "served/", "next/")
    shutil.copytree("served", "next")
    assert [words[1] for words in commands] == ["apply", "verify"]
    for words in commands:
        assert main(words[1:]) == 0


@pytest.mark.parametrize("number", [0, 1])
def test_the_recipes_of_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/merging.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    triple(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yml").write_text(blocks[number])
    assert main(["merge", "recipe.yml", "-o", "out", "--quiet"]) == 0
    assert main(["verify", "out", "--quiet"]) == 0


def test_links() -> None:
    """What a document points to is there, its heading too."""
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("examples/*/*.md")):
        for path, _, heading in re.findall(r"\]\((?!\w+:)([^)#\s]*)(#([^)\s]*))?\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), (page.name, path)
            if heading:
                headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}, (
                    page.name,
                    heading,
                )
