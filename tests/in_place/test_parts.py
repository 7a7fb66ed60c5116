"""Tensors that change in part: some rows are added to, some come from instruct, the target's own are not touched."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_of_parts
import pytest
from selection import tiles
from small_models import read_model, same, triple
from updated import Cut, apply, copy, cut_off, files_of, manifest, visible

import ires_kernels as ik
from ires_kernels.checkpoints import sources
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files import journal
from ires_kernels.in_place import cuts
from ires_kernels.in_place.cuts import Sizes
from ires_kernels.planning import deeds
from ires_kernels.planning.findings import Findings
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Operand, Step

OPTIONS: dict[str, Any] = {"alpha": 0.3, "rounding": "stochastic", "skip": "layers.1"}


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And many windows and tiles in every part."""
    monkeypatch.setattr(deeds, "apply_steps", made_of_parts.steps_of_parts)
    monkeypatch.setattr(cuts, "SIZES", Sizes(window=64 * 4, unit=64, gap=16))
    with tiles(elements=32, copied=32):
        yield


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("undo", ["ring", "all", "none"])
@pytest.mark.parametrize("what", ["pair", "residual"])
def test_the_bytes_of_a_new_folder(
    tmp_path: Path, models: tuple[Path, Path, Path], what: str, undo: str, threads: int
) -> None:
    base, instruct, target = models
    residual: Any = (instruct, base)
    if what == "residual":
        residual = tmp_path / "residual"
        ik.extract(base, instruct, residual, sync=False)
    out = ik.apply(target, residual, out=tmp_path / "out", sync=False, **OPTIONS)
    assert not isinstance(out, Plan)
    before = files_of(target)
    report = apply(target, residual, undo=undo, threads=threads, **OPTIONS)
    assert visible(target) == visible(tmp_path / "out")
    assert visible(target) != before
    assert report.numbers() == out.numbers() == manifest(target)["report"]
    assert report.copied == {name: why for name, why in out.copied.items() if name in report.copied}
    tables = [manifest(folder)["tensors"] for folder in (target, tmp_path / "out")]
    changed = [name for name, entry in tables[0].items() if entry["xxh3_128"]]
    assert [tables[0][name]["xxh3_128"] for name in changed] == [tables[1][name]["xxh3_128"] for name in changed]
    assert len(changed) == 5
    assert "nothing was done" in f"{apply(target, residual, undo=undo, **OPTIONS)}"
    for file in (tmp_path / "residual" if what == "residual" else base).glob("*.safetensors"):
        os.utime(file)  # what was read of it tells
    assert "nothing was done" in f"{apply(target, residual, undo=undo, **OPTIONS)}"
    assert ik.verify(target, hashes_only=True).ok
    if undo == "all":
        ik.rollback(target)
        assert files_of(target) == before


def test_what_is_kept_is_neither_saved_nor_written(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    monkeypatch.setattr(cuts, "SIZES", Sizes(window=64 * 4, unit=64, gap=0))
    old = {name: tensor.clone() for name, tensor in read_model(target).items()}
    written: dict[str, set[int]] = {}
    write = journal.Journal.write

    def watched(self: journal.Journal, file: str, data: memoryview, offset: int) -> None:
        there = written.setdefault(file, set())
        assert there.isdisjoint(range(offset, offset + len(data))), "each byte is written once"
        there.update(range(offset, offset + len(data)))
        write(self, file, data, offset)

    monkeypatch.setattr(journal.Journal, "write", watched)
    plan = ik.apply(target, (instruct, base), in_place=True, dry_run=True)
    assert isinstance(plan, Plan)
    report = apply(target, (instruct, base), undo="all")
    assert report.bytes_written == plan.bytes_written == sum(map(len, written.values()))
    steps = cuts.changes(plan)
    kept = {(s.file, b) for s in steps if s.is_own for b in range(s.offset + s.start, s.offset + s.start + s.nbytes)}
    assert len(kept) == 3 * made_of_parts.KEPT * 16 * 2 * 4
    assert not [(file, byte) for file, byte in kept if byte in written[file]]
    saved = sum(window.stop - window.start for window in cuts.windows(steps, cuts.SIZES))
    assert saved == report.bytes_written
    new, theirs = read_model(target), read_model(instruct)
    own = slice(0, made_of_parts.KEPT)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        copied = next(step.first // 16 for step in steps if step.name == name and step.op == "copy" and not step.is_own)
        assert same(new[name][own], old[name][own])
        assert same(new[name][copied], theirs[name][copied])
        assert not same(new[name][made_of_parts.KEPT], old[name][made_of_parts.KEPT])


@pytest.mark.parametrize("undo", ["ring", "all"])
@pytest.mark.parametrize(("call", "stride"), [("pwrite", 23), ("fdatasync", 13), ("preadv", 61)])
def test_cut_off_at_any_call_and_gone_on_with(
    models: tuple[Path, Path, Path], call: str, stride: int, undo: str
) -> None:
    base, instruct, target = models
    whole = copy(target, "whole")
    options: dict[str, Any] = {**OPTIONS, "threads": 2, "undo": undo}
    apply(whole, (instruct, base), **options)
    before, wanted, recorded = files_of(target), visible(whole), manifest(whole)
    states = []
    for number in range(0, 10**6, stride):
        other = copy(target, f"cut{number}")
        with pytest.MonkeyPatch.context() as patch:
            cut_off(patch, os, call, number)
            try:
                apply(other, (instruct, base), **options)
                break
            except Cut:
                pass
        states.append(ik.status(other).state)
        report = ik.resume(other) if states[-1] == "unfinished" else apply(other, (instruct, base), **options)
        assert visible(other) == wanted, number
        table = manifest(other)
        assert table["tensors"] == recorded["tensors"]
        assert report.numbers() == table["report"] == recorded["report"]
        if undo == "all":
            ik.rollback(other)
            assert files_of(other) == before
        shutil.rmtree(other)
    assert states.count("unfinished") > 2


@pytest.mark.parametrize("threads", [1, 2])
def test_interrupted_again_and_again(
    models: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Every run stops at the next window, and what it has learnt of the parts before is known to the next one."""
    base, instruct, target = models
    out = ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False, **OPTIONS)
    assert not isinstance(out, Plan)
    read = sources.read_into

    def slowly(*arguments: Any) -> None:
        time.sleep(0.003)
        read(*arguments)

    monkeypatch.setattr(sources, "read_into", slowly)
    ends = 0

    def interrupt(done: int, todo: int) -> None:
        if ends < 8 and done < todo:
            raise KeyboardInterrupt

    for _ in range(20):
        try:
            report = apply(target, (instruct, base), sync=False, threads=threads, progress=interrupt, **OPTIONS)
            break
        except KeyboardInterrupt:
            ends += 1
    assert ends > 2
    assert visible(target) == visible(tmp_path / "out")
    assert report.numbers() == out.numbers()


def test_what_cannot_be_done_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' needs '16 runs of lm_head.weight' of base, which is"):
        apply(target, (instruct, target), skip="embed|layers")  # rows that are overwritten by then

    def from_elsewhere(ref: TensorRef, found: Findings) -> list[Step]:
        first, *others = made_of_parts.steps_of_parts(ref, found)
        if not others:
            return [first]
        there = Operand("target", (ref.run(ref.numel - first.count, first.count),))
        return [replace(first, operands=(there,)), *others]

    monkeypatch.setattr(deeds, "apply_steps", from_elsewhere)
    with pytest.raises(
        CheckpointError, match=r"needs 'lm_head.weight\[608:640\]' of target, which is the target and.*Write a"
    ):
        apply(target, (instruct, base), skip="embed|layers")

    def in_pieces(ref: TensorRef, found: Findings) -> list[Step]:
        """What there is, said in several runs, is what there is."""
        steps = made_of_parts.steps_of_parts(ref, found)
        return [replace(s, operands=tuple(map(halved, s.operands))) if len(steps) > 1 else s for s in steps]

    def halved(operand: Operand) -> Operand:
        (ref, *others), half = operand.refs, operand.refs[0].numel // 2
        return replace(operand, refs=(ref.run(0, half), ref.run(half, ref.numel - half), *others))

    monkeypatch.setattr(deeds, "apply_steps", made_of_parts.steps_of_parts)
    wanted, plans = apply(copy(target, "one"), (instruct, base), **OPTIONS), []
    for steps in (made_of_parts.steps_of_parts, in_pieces):
        monkeypatch.setattr(deeds, "apply_steps", steps)
        plans.append(ik.apply(target, (instruct, base), in_place=True, dry_run=True, **OPTIONS))
    assert all(isinstance(plan, Plan) for plan in plans)
    assert plans[0].bytes_written == plans[1].bytes_written
    assert apply(copy(target, "two"), (instruct, base), **OPTIONS).numbers() == wanted.numbers()
    assert visible(tmp_path / "two") == visible(tmp_path / "one")

    def grown(ref: TensorRef, found: Findings) -> list[Step]:
        own = made_of_parts.steps_of_parts(ref, found)
        if len(own) == 1:
            return own
        more = replace(own[0].output, shape=(ref.shape[0] + 1, *ref.shape[1:]))
        new = replace(own[2], output=more, first=ref.numel)
        return [*(replace(step, output=more) for step in own), new]

    monkeypatch.setattr(deeds, "apply_steps", grown)
    with pytest.raises(CheckpointError, match=r"is \[40, 16\] in .* and would become \[41, 16\], which takes"):
        apply(target, (instruct, base), skip="embed|layers")
    out = ik.apply(target, (instruct, base), out=tmp_path / "out", skip="embed|layers")
    assert not isinstance(out, Plan)
    assert read_model(tmp_path / "out")["lm_head.weight"].shape == (41, 16)
