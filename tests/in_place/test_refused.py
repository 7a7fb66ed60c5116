"""Updates in place that are refused before the first byte, and what the refusal says."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from small_models import snapshot
from updated import apply, hard_link

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.cli import main
from ires_kernels.files.ownership import StoreError
from ires_kernels.planning.rules import ArgumentError


def test_a_config_that_does_not_fit_the_weights(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    with pytest.raises(CheckpointError, match=r"config.json of the target says another dtype than BF16"):
        apply(target, (instruct, base), dtype="bf16")


@pytest.mark.root
def test_a_bind_mount(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    file = next(target.glob("*.safetensors"))
    shutil.copy(file, tmp_path / "elsewhere")
    subprocess.run(["mount", "--bind", f"{tmp_path}/elsewhere", f"{file}"], check=True)
    try:
        with pytest.raises(StoreError, match="is a mount point"):
            apply(target, (instruct, base))
    finally:
        subprocess.run(["umount", f"{file}"], check=True)


def link(target: Path) -> Path:
    file = next(target.glob("*.safetensors"))
    file.rename(target.parent / file.name)
    file.symlink_to(target.parent / file.name)
    return target


def read_only(target: Path) -> Path:
    next(target.glob("*.safetensors")).chmod(0o444)
    return target


def folder_link(target: Path) -> Path:
    target.with_name("link").symlink_to(target)
    return target.with_name("link")


def linked_config(target: Path) -> Path:
    (target / "config.json").rename(target.parent / "config.json")
    (target / "config.json").symlink_to(target.parent / "config.json")
    return target


def in_a_cache(target: Path) -> Path:
    snapshots = target.parent / "models--x--y" / "snapshots"
    snapshots.mkdir(parents=True)
    return target.rename(snapshots / "abc")


def in_the_cache_by_setting(target: Path) -> Path:
    return target.rename(Path(os.environ["HF_HUB_CACHE"]) / "m")


REFUSED = [
    (link, "is a symbolic link to"),
    (hard_link, "has 2 hard links, so other models change with it"),
    (read_only, "is read-only. `chmod u"),
    (folder_link, "is a symbolic link to .*target. Give that path"),
    (linked_config, "config.json: is a symbolic link"),
    (in_a_cache, "lies in the Hugging Face cache"),
    (in_the_cache_by_setting, "lies in the Hugging Face cache"),
]


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
def test_targets_that_are_refused(
    tmp_path: Path, models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, make: Any, text: str
) -> None:
    base, instruct, target = models
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", f"{tmp_path / 'cache'}")
    target = make(target)
    before = snapshot(tmp_path)
    for options in ({}, {"dry_run": True}, {"undo": "none", "sync": False}):
        with pytest.raises(StoreError, match=text):
            apply(target, (instruct, base), follow_links=True, **options)
        assert snapshot(tmp_path) == before
    assert main(["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}", "--in-place"]) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_the_journal(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    base, instruct, target = models
    before = snapshot(target)

    def full(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"journal") as caught:
        apply(target, (instruct, base))
    assert caught.value.errno == code
    assert snapshot(target) == before
    assert not (target / ".ires-unfinished").exists()
    assert main(["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}", "--in-place"]) == 3
    assert f"{target} is as it was, or finished" in capsys.readouterr().err


def test_no_permission_for_the_folder(models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = models
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != target)
    with pytest.raises(StoreError, match="no permission to make files in it, which the journal needs"):
        apply(target, (instruct, base))


def test_arguments_that_do_not_go_together(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    with pytest.raises(ArgumentError, match="give either out, a new folder, or in_place=True"):
        ik.apply(target, (instruct, base))
    with pytest.raises(ArgumentError, match="give either out, a new folder, or in_place=True"):
        ik.apply(target, (instruct, base), out="x", in_place=True)
    with pytest.raises(ArgumentError, match="undo is 'some', wanted one of ring, all, none"):
        ik.apply(target, (instruct, base), in_place=True, undo="some")
    arguments = ["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}"]
    for more in ([], ["--in-place", "-o", "x"], ["-o", "x", "--no-undo"], ["-o", "x", "--tag", "y"],
                 ["--in-place", "--no-undo", "--keep-undo"]):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            main([*arguments, *more])
        assert caught.value.code == 2
