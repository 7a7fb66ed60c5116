"""The machine starts anew during an update in place or after it: what was not synced is doubted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from small_models import snapshot
from updated import Cut, apply, copy, cut_off, unfinished, visible

import ires_kernels as ik
from ires_kernels.files import durable, moving
from ires_kernels.files.ownership import StoreError
from ires_kernels.in_place import begun
from ires_kernels.records import repetition


@pytest.mark.usefixtures("small")
def test_without_syncs_a_restart_of_the_machine_is_final(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = unfinished(models, sync=False)
    with monkeypatch.context() as patch:
        patch.setattr(begun, "boot_id", lambda: "another")
        for again in (ik.resume, ik.rollback):
            with pytest.raises(StoreError, match="the machine was restarted in the middle of an update with --no-sync"):
                again(target)
    ik.resume(target)
    assert ik.verify(target)


def test_an_undo_outlives_a_restart(models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = models
    before = visible(target)
    apply(target, (instruct, base), undo="all", sync=False)
    monkeypatch.setattr(begun, "boot_id", lambda: "another")
    ik.rollback(target)
    assert visible(target) == before


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("undo", ["ring", "all"])
@pytest.mark.parametrize("phase", ["installing", "finished"])
def test_a_restart_is_noticed_until_the_end(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, undo: str, phase: str
) -> None:
    base, instruct, target = models
    before = visible(target)
    with monkeypatch.context() as patch:
        cut_off(patch, moving, "install" if phase == "installing" else "move_out", 0)
        with pytest.raises(Cut):
            apply(target, (instruct, base), sync=False, undo=undo)
    assert (target / f".ires-unfinished/{phase}.json").exists()
    left = snapshot(target)
    monkeypatch.setattr(begun, "boot_id", lambda: "another")
    way = "ires rollback" if undo == "all" else "copy the model again"
    with pytest.raises(StoreError, match=f"the machine was restarted in the middle of an update .*{way}"):
        ik.resume(target)
    assert snapshot(target) == left
    if undo == "all":
        ik.rollback(target)
        assert visible(target) == before


def test_what_was_not_synced_is_doubted_after_a_restart(
    tmp_path: Path, models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    other, out = copy(target, "other"), tmp_path / "out"

    def damage(folder: Path) -> None:
        """As the page cache is lost: the size and time of the file are there, its bytes are not."""
        path = sorted(folder.glob("*.safetensors"))[-1]
        times = path.stat()
        with open(path, "r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(bytes(8))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def again(sync: bool) -> list[str]:
        reports = [apply(folder, (instruct, base), sync=sync) for folder in (target, other)]
        report = ik.apply(base, (instruct, base), out=out, sync=sync)
        return [f"{report}" for report in (*reports, report)]

    again(sync=False)
    synced: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(durable, "fsync_file", synced.append)
        assert all("nothing was done" in text for text in again(sync=True))
    single = target / "alone.safetensors"
    shutil.copy(next(base.glob("*.safetensors")), single)
    sources = [tmp_path / role / next(base.glob("*.safetensors")).name for role in ("instruct", "base")]
    apply(single, tuple(sources), sync=False, allow_missing=True)
    with monkeypatch.context() as patch:
        also: list[Path] = []
        patch.setattr(durable, "fsync_file", also.append)
        assert "nothing was done" in f"{apply(single, tuple(sources), allow_missing=True)}"
    assert set(also) == {single, target / "alone.safetensors.ires.json"}
    for path in also:
        path.unlink()
    wanted = [path for folder in (target, other, out) for path in folder.rglob("*") if path.is_file()]
    assert set(synced) == set(wanted)
    monkeypatch.setattr(repetition, "boot_id", lambda: "another")
    assert all("nothing was done" in text for text in again(sync=False))
    damage(out)
    damage(other)
    with pytest.raises(StoreError, match="was written with --no-sync before the machine was restarted, and is"):
        ik.apply(base, (instruct, base), out=out)
    with pytest.raises(StoreError, match="was updated with --no-sync before the machine was restarted, and is"):
        apply(other, (instruct, base))
    assert "nothing was done" in f"{apply(target, (instruct, base))}"
