"""The same update in place again changes nothing, whoever moved or wrote the model meanwhile; with a tag it does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from small_models import snapshot, triple
from updated import apply, copy, files_of, manifest, save_again, visible

import ires_kernels as ik
from ires_kernels.files import trust
from ires_kernels.files.ownership import StoreError


def test_the_same_again_changes_nothing_and_a_tag_makes_it_another(
    tmp_path: Path, models: tuple[Path, Path, Path]
) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), alpha=0.5)
    before = snapshot(target)
    report = apply(target, (instruct, base), alpha=0.5)
    assert len(report.notes) == 1
    assert "applied before. To apply it once more on purpose, give it another --tag." in report.notes[0]
    assert report.strengths[0].effective_alpha
    assert snapshot(target) == before
    ik.apply(target, (instruct, base), out=tmp_path / "twice", alpha=0.5, sync=False)
    apply(target, (instruct, base), alpha=0.5, tag="once more")
    assert {n: b for n, b in visible(target).items() if n.endswith("safetensors")} == {
        n: b for n, b in visible(tmp_path / "twice").items() if n.endswith("safetensors")
    }
    for tag in ("", "once more"):  # also what was applied before the last
        assert "nothing was done" in f"{apply(target, (instruct, base), alpha=0.5, tag=tag)}"
    assert [entry["recipe"] for entry in manifest(target)["in_place"]["history"]] != []


def test_a_copy_knows_what_was_applied_and_another_model_does_not(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    original = copy(target, "original")
    apply(target, (instruct, base))
    other = copy(target, "copied")
    for path in other.iterdir():
        os.utime(path)
    assert "nothing was done" in f"{apply(other, (instruct, base))}"
    for path in original.glob("*.safetensors"):
        shutil.copy(path, other / path.name)
    report = apply(other, (instruct, base))
    assert not [note for note in report.notes if "nothing was done" in note]
    assert visible(other) == visible(target)
    assert manifest(other)["in_place"]["history"] == []


def test_other_weights_of_the_target_are_named(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    (target / "pytorch_model.bin").write_bytes(b"old")
    report = apply(target, (instruct, base))
    assert "pytorch_model.bin beside the weights of the target are not updated" in report.warnings


@pytest.mark.parametrize("how", ["touch", "seed", "file"])
def test_the_same_again_in_another_guise(tmp_path: Path, how: str) -> None:
    base, instruct, target = triple(tmp_path)
    ik.extract(base, instruct, tmp_path / "r", sync=False)
    for residual in ((instruct, base), tmp_path / "r"):
        other = copy(target, f"other{isinstance(residual, tuple)}")
        apply(other, residual)
        before = files_of(other)
        if how == "touch":
            for path in [*instruct.iterdir(), *base.iterdir(), *(tmp_path / "r").iterdir()]:
                os.utime(path)
        again = other / "model.safetensors" if how == "file" else other
        assert "nothing was done" in f"{apply(again, residual, seed=5 if how == 'seed' else 0)}"
        assert files_of(other) == before


def test_another_model_of_the_same_shape_is_no_repetition(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), alpha=0.5)
    before = visible(target)
    for path in instruct.glob("*.safetensors"):
        raw = path.read_bytes()
        path.write_bytes(raw[:-2] + bytes(2))
    apply(target, (instruct, base), alpha=0.5)
    assert visible(target) != before
    for path in instruct.glob("*.safetensors"):
        os.utime(path)
    assert "nothing was done" in f"{apply(target, (instruct, base), alpha=0.5)}"
    apply(target, (instruct, base), alpha=0.5, skip="norm", tag="not all of it is read")
    for path in instruct.glob("*.safetensors"):
        os.utime(path)
    report = apply(target, (instruct, base), alpha=0.5, skip="norm", tag="not all of it is read")
    assert "nothing was done" in f"{report}"
    table = manifest(target)
    del table["in_place"], table["inputs"]["instruct"]["read"]  # as nobody writes it
    table = trust.signed("manifest", table | {"in_place": manifest(target)["in_place"]})
    (target / "ires.json").write_text(json.dumps(table))
    with pytest.raises(StoreError, match=r"this looks like .*, which was applied before, but the files of the other"):
        apply(target, (instruct, base), alpha=0.5, skip="norm", tag="not all of it is read")


def test_a_model_that_was_written_again_is_not_updated_twice(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    apply(target, (instruct, base))
    save_again(target / "model.safetensors", backwards=True, note="saved again")
    save_again(instruct / "model.safetensors", note="this one too")
    before = files_of(target)
    assert "nothing was done" in f"{apply(target, (instruct, base))}"
    assert "nothing was done" in f"{apply(target, (instruct, base), dtype='bf16')}"
    assert files_of(target) == before
