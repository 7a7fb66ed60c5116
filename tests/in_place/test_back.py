"""A finished update in place is taken back while its old bytes are there, unless that would lose something."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_models import snapshot, triple
from updated import Cut, apply, cut_off, files_of, hard_link, save_again, visible

import ires_kernels as ik
from ires_kernels.files import journal
from ires_kernels.files.ownership import StoreError


def test_undo_can_be_stacked_and_is_refused_for_what_changed(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    states = [visible(target)]
    for alpha in (0.5, -0.25):
        apply(target, (instruct, base), alpha=alpha, undo="all")
        states.append(visible(target))
    assert {path.name for path in target.glob(".ires*")} == {".ires-undo-1", ".ires-undo-2"}
    file = next(target.glob("*.safetensors"))
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(StoreError, match=r"was written since its update in place, .* and cannot be rolled back"):
        ik.rollback(target)
    file.write_bytes(raw)
    for state in reversed(states[:-1]):
        ik.rollback(target)
        assert visible(target) == state
    assert not list(target.glob(".ires*"))
    assert not (target / "ires.json").exists()
    with pytest.raises(
        StoreError, match="nothing is unfinished there, and no update in place was kept to be taken back"
    ):
        ik.rollback(target)
    with pytest.raises(StoreError, match="nothing is unfinished there: no update in place, and no new folder"):
        ik.resume(target)


def test_only_the_last_update_can_be_taken_back(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), skip="norm", undo="all")
    assert "takes the update back" in f"{ik.status(target)}"
    apply(target, (instruct, base), tag="2")
    assert "is of an earlier update, and cannot take back anything: delete it" in f"{ik.status(target)}"
    before = snapshot(target)
    with pytest.raises(StoreError, match=r"and that is not the last that was applied here: it cannot be taken back"):
        ik.rollback(target)
    (target / "ires.json").unlink()
    with pytest.raises(StoreError, match=r"and that is not the last that was applied here: it cannot be taken back"):
        ik.rollback(target)
    assert snapshot(target).items() <= before.items()


def test_a_rollback_spares_what_shares_its_bytes(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), undo="all")
    hard_link(target)
    before = snapshot(target)
    with pytest.raises(StoreError, match="has 2 hard links"):
        ik.rollback(target)
    assert snapshot(target) == before


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("undo", ["ring", "all"])
def test_taking_back_what_was_interrupted_keeps_what_was_before(models: tuple[Path, Path, Path], undo: str) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), alpha=0.5)
    before = files_of(target)
    with pytest.MonkeyPatch.context() as patch:
        cut_off(patch, journal.Journal, "write", 1)
        with pytest.raises(Cut):
            apply(target, (instruct, base), threads=1, undo=undo)
    ik.rollback(target)
    assert files_of(target) == before
    assert "nothing was done" in f"{apply(target, (instruct, base), alpha=0.5)}"


def test_what_was_edited_after_an_update_is_kept(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    before = files_of(target)
    apply(target, (instruct, base), undo="all")
    (target / "chat_template.jinja").write_text("mine")
    (target / "vocab.json").write_text("mine as well")
    said = ik.rollback(target)
    kept = target / ".ires-replaced-1"
    assert files_of(target) == before
    assert files_of(kept) == {"chat_template.jinja": b"mine", "vocab.json": b"mine as well"}
    assert f"What you had edited since is in {kept}." in said


@pytest.mark.parametrize("how", ["metadata", "order", "a tensor that was skipped"])
def test_a_model_that_was_written_again_is_not_rolled_back(tmp_path: Path, how: str) -> None:
    base, instruct, target = triple(tmp_path)
    skip = "norm" if "skipped" in how else ()
    apply(target, (instruct, base), skip=skip, undo="all")
    path = target / "model.safetensors"
    if how == "metadata":
        save_again(path, note="saved again")
    elif how == "order":
        save_again(path, backwards=True)
    else:
        tensors = load_file(path)
        tensors["model.norm.weight"].fill_(9)
        save_file(tensors, path, metadata={"format": "pt"})
    before = snapshot(target)
    with pytest.raises(StoreError, match="was written since its update in place"):
        ik.rollback(target)
    assert snapshot(target) == before


@pytest.mark.parametrize("name", ["journal", "log"])
def test_a_damaged_undo_leaves_the_model_alone(models: tuple[Path, Path, Path], name: str) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), undo="all")
    (target / ".ires-undo-1" / name).unlink()
    with pytest.raises(StoreError, match="is gone, and nobody knows"):
        ik.rollback(target)
    assert ik.status(target).state == "finished"
    assert ik.verify(target)
