"""Paths as the kernel understands them: what comes after a link and `..` is beside what the link leads to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_models import read_model, triple

import ires_kernels as ik
from ires_kernels.cli import main
from ires_kernels.files import new_folder


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, instruct and target, each by way of a link; and a file of another model where the text alone leads."""
    triple(tmp_path / "deep" / "models")
    (tmp_path / "deep" / "er").mkdir()
    (tmp_path / "link").symlink_to("deep/er")
    (tmp_path / "models").mkdir()
    base, instruct, target = (tmp_path / "link" / ".." / "models" / name for name in ("base", "instruct", "target"))
    return base, instruct, target


def test_an_update_is_taken_back_by_the_path_that_it_was_given(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    ik.apply(target, (instruct, base), in_place=True, undo="all")
    ik.rollback(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_new_folder_is_gone_on_with_and_verified(
    models: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    out = tmp_path / "link" / ".." / "out"

    def cut(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(new_folder.NewFolder, "add", cut)
        with pytest.raises(KeyboardInterrupt):
            ik.apply(target, (instruct, base), out=out)
    ik.resume(out)
    assert os.listdir(tmp_path / "deep" / "out")
    assert ik.verify(out)
    recorded = json.loads((out / "ires.json").read_bytes())["inputs"]["base"]["path"]
    assert os.path.samefile(recorded, base)


def test_the_model_that_is_mapped(models: tuple[Path, Path, Path]) -> None:
    _, _, target = models
    with ik.mapped(target) as tensors:
        assert list(tensors) == list(read_model(target))


@pytest.mark.parametrize("command", ["inspect", "status", "verify", "resume", "rollback"])
@pytest.mark.parametrize("path", ["", "/", "..", "/proc"])
def test_paths_that_are_no_model(command: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, path]) == 2
    assert "unexpected" not in capsys.readouterr().err
