"""Merges of operands that are made of runs, from the folder to what is known of it later."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_of_parts
import pytest
from small_models import normal, read_model, triple, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.files.new_folder import NewFolder
from ires_kernels.files.ownership import StoreError
from ires_kernels.planning import deeds
from ires_kernels.planning.matching import Match, Matcher
from ires_kernels.planning.plan import Plan
from ires_kernels.records.report import Report

EMBED = "model.embed_tokens.weight"
WHOLE = Matcher.of

pytestmark = pytest.mark.filterwarnings("ignore:.* look unrelated")  # as the rows that are merged here do


def backwards(matcher: Matcher, role: str, ref: Ref, whole: Any = Matcher.of) -> tuple[Match, ...]:
    """The rows of all others in reverse order."""
    (match,) = whole(matcher, role, ref)
    if len(ref.shape) < 2:
        return (match,)
    row = ref.numel // ref.shape[0]
    runs = {
        other: refs if other == role else tuple(refs[0].run(r * row, row) for r in reversed(range(ref.shape[0])))
        for other, refs in match.refs.items()
    }
    return (match._replace(refs=runs),)


@pytest.fixture(params=["backwards", "in parts"])
def runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "backwards":
        monkeypatch.setattr(Matcher, "of", backwards)
    else:
        monkeypatch.setattr(deeds, "apply_steps", made_of_parts.steps_of_parts)
    return f"{request.param}"


def touch(file: Path) -> None:
    """The same bytes and times, but for the one that nobody can set."""
    times = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("what", ["pair", "residual"])
def test_what_is_known_of_the_output(tmp_path: Path, runs: str, what: str) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    residual: Any = (instruct, base)
    if what == "residual":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Matcher, "of", WHOLE)
            ik.extract(base, instruct, tmp_path / "residual", sync=False)
        residual = tmp_path / "residual"
    out = tmp_path / "out"
    options: Any = {"rounding": "stochastic", "seed": 5}
    plan = ik.apply(target, residual, out=out, dry_run=True, **options)
    assert isinstance(plan, Plan)
    (report, loaded) = ik.apply(target, residual, out=out, **options), ik.load(target, residual, **options)
    assert isinstance(report, Report)
    assert (report.tensors, report.copied) == (7, {})
    found = read_model(out)
    assert all(loaded[name].equal(tensor) for name, tensor in found.items())
    table = json.loads((out / "ires.json").read_bytes())
    for name, entry in table["tensors"].items():
        assert entry["inputs"].keys() == plan.inputs.keys(), name
    verified = ik.verify(out)
    assert verified.ok, f"{verified}"
    again = ik.apply(target, residual, out=out, **options)
    assert isinstance(again, Report)
    assert again.seconds == 0
    other = plan.inputs["residual" if what == "residual" else "base"].shards[0].path
    touch(other)
    by_hashes = ik.apply(target, residual, out=out, **options)
    assert isinstance(by_hashes, Report)
    assert by_hashes.seconds == 0
    assert ik.verify(out).ok
    content = bytearray(other.read_bytes())
    for place in range(len(content) // 2, len(content), 32):
        content[place] ^= 1
    other.write_bytes(content)
    changed = ik.verify(out)
    assert not changed.ok
    wanted = f"{16 if runs == 'in parts' else 40} runs of {EMBED}"
    assert any(wanted in line and "is not the one that was merged: it has" in line for line in changed.problems)


def test_the_plan_does_not_list_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = {"w.weight": normal((4096, 2), 1)}
    folders = [write_model(tmp_path / role, big) for role in ("target", "instruct", "base")]
    monkeypatch.setattr(Matcher, "of", backwards)
    plan = ik.apply(folders[0], (folders[1], folders[2]), out=tmp_path / "out", dry_run=True)
    assert isinstance(plan, Plan)
    assert plan.matched() == [("w.weight", role, "4096 runs of w.weight") for role in ("instruct", "base")]
    assert "matched    w.weight with 4096 runs of w.weight of instruct\n" in f"{plan}"
    assert len(f"{plan}") < 2000
    (table,) = plan.to_dict()["tensors"]
    assert len(json.dumps(table)) < 8000
    entry = table["inputs"]["base"]
    assert (entry["name"], entry["runs"], len(entry["first_runs"])) == ("4096 runs of w.weight", 4096, 16)
    assert entry["first_runs"][0]["name"] == "w.weight[8190:8192]"
    monkeypatch.setattr(Matcher, "of", WHOLE)
    straight = ik.apply(folders[0], (folders[1], folders[2]), out=tmp_path / "out", dry_run=True)
    assert isinstance(straight, Plan)
    assert straight.id != plan.id


@pytest.mark.parametrize("how", ["new folder", "in place", "load"])
def test_damage_of_a_residual_outside_of_the_runs_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A residual is what its manifest says, or it is refused: its tensors are hashed whole."""
    base, instruct, target = triple(tmp_path)
    residual = tmp_path / "residual"
    ik.extract(base, instruct, residual, sync=False)

    def first_rows(ref: TensorRef, found: Any) -> list[Any]:
        steps = made_of_parts.steps_of_parts(ref, found)
        return steps if len(steps) == 1 else [steps[0], replace(steps[1], count=ref.numel - steps[1].first, operands=(
            replace(steps[1].operands[0], refs=(ref.run(steps[1].first, ref.numel - steps[1].first),)),
            replace(steps[1].operands[1], refs=(steps[1].operands[1].refs[0].run(0, 16),) * (ref.shape[0] - 2)),
        ))]  # fmt: skip

    monkeypatch.setattr(deeds, "apply_steps", first_rows)
    ik.load(target, residual)
    checkpoint = ik.apply(target, residual, out=tmp_path / "out", dry_run=True)
    assert isinstance(checkpoint, Plan)
    ref = checkpoint.inputs["residual"].tensors[EMBED]
    content = bytearray(ref.path.read_bytes())
    content[ref.offset + ref.nbytes - 1] ^= 1  # of the last row, which nobody reads
    ref.path.write_bytes(content)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    options: Any = {"in_place": True} if how == "in place" else {"out": tmp_path / "out"} if how == "new folder" else {}
    with pytest.raises(CheckpointError, match=f"tensor '{EMBED}' is damaged: its xxh3_128 is"):
        (ik.apply if options else ik.load)(target, residual, **options)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("runs")
def test_going_on_with_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(NewFolder, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            ik.apply(target, (instruct, base), out=out)
    assert ik.status(out).state == "unfinished"
    file = base / "model-00001-of-00002.safetensors"
    old = file.read_bytes()
    times = file.stat()
    file.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises((StoreError, CheckpointError), match="is not the file of the base"):
        ik.resume(out)
    file.write_bytes(old)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    ik.resume(out)
    assert ik.verify(out).ok
