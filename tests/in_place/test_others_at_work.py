"""What else is in the folder of an update in place: other commands, other processes, files that are not ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import snapshot
from updated import apply, unfinished

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files import hidden, trust
from ires_kernels.files.inplace import Workplace
from ires_kernels.files.ownership import StoreError
from ires_kernels.in_place import run


@pytest.mark.usefixtures("small")
def test_another_command_does_not_take_up_what_is_unfinished(models: tuple[Path, Path, Path]) -> None:
    base, instruct, _ = models
    target = unfinished(models, alpha=0.5)
    before = snapshot(target)
    for options in ({"alpha": 0.6}, {"alpha": 0.5, "tag": "x"}, {"alpha": 0.5, "rounding": "stochastic"}):
        with pytest.raises(StoreError, match=r"another update in place is unfinished: apply .* `ires resume"):
            apply(target, (instruct, base), **options)
    with pytest.raises(StoreError, match="another update in place is unfinished"):
        apply(target, (base, instruct), alpha=0.5)
    with pytest.raises(CheckpointError, match="an update in place of this model still runs or was interrupted"):
        ik.extract(base, target, target.with_name("r"))
    assert snapshot(target) == before
    apply(target, (instruct, base), alpha=0.5)
    assert ik.verify(target)


@pytest.mark.usefixtures("small")
def test_a_second_process_is_refused(models: tuple[Path, Path, Path]) -> None:
    base, instruct, _ = models
    target = unfinished(models)
    place = Workplace.take(target)
    assert ik.status(target).state == "running"
    for again in (ik.resume, ik.rollback, lambda path: apply(path, (instruct, base))):
        with pytest.raises(StoreError, match="another process is writing it"):
            again(target)
    place.close()
    ik.resume(target)


def test_two_at_once(models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = models
    seen = []

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(run, "carry_on", carry_on)
        with pytest.raises(StoreError, match="another process is writing it") as caught:
            apply(target, (instruct, base))
        seen.append(caught)
        return carry_on(*arguments, **options)

    carry_on = run.carry_on
    monkeypatch.setattr(run, "carry_on", meanwhile)
    apply(target, (instruct, base))
    assert seen
    assert ik.verify(target)


def test_what_is_not_ours_is_left_alone(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    work = target / ".ires-unfinished"
    work.mkdir()
    (work / "thesis.txt").write_text("mine")
    before = snapshot(target)
    with pytest.raises(StoreError, match="is in the way, and nothing that an update in place left"):
        apply(target, (instruct, base))
    assert snapshot(target) == before
    (work / ".ires-lock").write_text("")
    with pytest.raises(StoreError, match=r"is not the state of a merge that you began here \(no valid signature\)"):
        apply(target, (instruct, base))
    (work / ".ires-lock").write_text(trust.sign(*hidden.TOKEN))
    with pytest.raises(StoreError, match=r"holds thesis.txt. Move that to where it belongs"):
        apply(target, (instruct, base))
    assert (work / "thesis.txt").read_text() == "mine"


def test_another_process_between_the_check_and_the_lock(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    begin = Workplace.begin

    def late(*arguments: Any, **options: Any) -> Workplace:
        monkeypatch.setattr(Workplace, "begin", begin)
        apply(target, (instruct, base))
        return begin(*arguments, **options)

    monkeypatch.setattr(Workplace, "begin", late)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        apply(target, (instruct, base))
    assert "nothing was done" in f"{apply(target, (instruct, base))}"
    assert not (target / ".ires-unfinished").exists()


@pytest.mark.usefixtures("small")
def test_a_dry_run_does_not_go_on(models: tuple[Path, Path, Path]) -> None:
    base, instruct, _ = models
    target = unfinished(models)
    before = snapshot(target)
    with pytest.raises(StoreError, match="this very update is unfinished, and without --dry-run would be gone on with"):
        apply(target, (instruct, base), dry_run=True)
    for options in ({"undo": "all"}, {"sha256": True}, {"sync": False}):
        with pytest.raises(StoreError, match="another update in place is unfinished"):
            apply(target, (instruct, base), **options)
    assert snapshot(target) == before


def test_the_folders_beside_a_model(tmp_path: Path) -> None:
    assert hidden.work_folder(tmp_path) == tmp_path / ".ires-unfinished"
    assert hidden.work_folder(tmp_path / "m.safetensors") == tmp_path / ".m.safetensors.ires-unfinished"
    (tmp_path / ".ires-undo-x").mkdir()
    for number in (2, 10, 1):
        (tmp_path / f".ires-undo-{number}").mkdir()
        (tmp_path / f".ires-undo-{number}/finished.json").write_bytes(trust.seal(hidden.SEAL, b"{\n}"))
    (tmp_path / ".ires-undo-11").mkdir()  # empty
    assert [path.name for path in hidden.undo_folders(tmp_path)] == [".ires-undo-1", ".ires-undo-2", ".ires-undo-10"]
    assert hidden.undo_folders(tmp_path / "m.safetensors") == []
