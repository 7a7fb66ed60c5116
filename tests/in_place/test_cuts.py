"""The windows of an update in place cover what changes, once, in order, and never cut a processor's tile."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import normal, triple, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.dtypes import FLOATS
from ires_kernels.in_place import cuts
from ires_kernels.in_place.cuts import SIZES, Sizes
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Op, Operand, Output, Step
from ires_kernels.streaming import tiles


def test_a_unit_is_whole_windows_of_every_processor() -> None:
    assert SIZES.unit % tiles.TILES.elements == 0
    assert SIZES.unit % tiles.TILES.on_gpu == 0
    assert SIZES.unit // 2 % tiles.TILES.copied == 0, "of four bits an element"
    assert SIZES.unit * max(FLOATS.values()) <= SIZES.window


@st.composite
def layouts(draw: st.DrawFn) -> list[Step]:
    """Tensors of one or two files, with gaps between them, as `changes` gives them: whole ones, and some in parts."""
    steps: list[Step] = []
    for file in draw(st.lists(st.sampled_from("ab"), max_size=2, unique=True)):
        offset = draw(st.integers(8, 99))
        for number in range(draw(st.integers(1, 6))):
            dtype = draw(st.sampled_from(sorted(FLOATS)))
            elements = draw(st.one_of(st.integers(0, 40), st.integers(0, 400)))
            nbytes = elements * FLOATS[dtype]
            ref = TensorRef(f"t{file}{number}", dtype, (elements,), Path(file), offset, nbytes)
            output = Output(ref.name, dtype, ref.shape, file, offset)
            places = draw(st.sets(st.integers(1, elements - 1), max_size=4)) if elements > 1 else set()
            parts = []
            for first, stop in itertools.pairwise([0, *sorted(places), elements]):
                own = Operand("target", (ref.run(first, stop - first) if stop > first else ref,))
                deed = draw(st.sampled_from(["add", "copy", "kept"])) if places else "add"
                operand = Operand("instruct", own.refs) if deed == "copy" else own
                op: Op = "add" if deed == "add" else "copy"
                factors = (1.0,) if deed == "add" else ()
                parts.append(Step(output, op, (operand,), factors, first=first, count=stop - first))
            steps += parts if not all(part.is_own for part in parts) else []
            offset += nbytes + draw(st.sampled_from([0, 0, 3, 60]))
    return steps


def places(steps: list[Step]) -> list[tuple[str, int]]:
    return [(step.name, byte) for step in steps for byte in range(step.start, step.start + step.nbytes)]


@given(layouts())
def test_windows_cover_what_changes_once_and_in_order(steps: list[Step]) -> None:
    cut = cuts.windows(steps, Sizes(window=16 * 8, unit=16, gap=10))
    seen: list[tuple[Step, int, int]] = []
    for window in cut:
        assert 0 < window.stop - window.start <= 128
        changed = [segment for segment in window.segments if not segment.step.is_own]
        assert window.start == changed[0].step.offset + changed[0].start
        assert window.stop == changed[-1].step.offset + changed[-1].stop
        for step, start, stop in window.segments:
            assert step.file == window.file
            if step.is_own:
                assert (start, stop) == (step.start, step.start + step.nbytes)
                continue
            unit = 16 * FLOATS[step.dtype]
            assert (start - step.start) % unit == 0, "where a processor's tile begins"
            assert stop == step.start + step.nbytes or (stop - step.start) % unit == 0
            assert window.start <= step.offset + start < step.offset + stop <= window.stop
        seen += window.segments
        assert window.nbytes == sum(stop - start for _, start, stop in window.segments)
        last = window.segments[-1]
        assert last.is_last == (last.stop == last.step.output.numel * FLOATS[last.step.dtype])
        if last.step.is_own:
            assert last.step in steps
    assert [(step.name, byte) for step, start, stop in seen for byte in range(start, stop)] == places(steps)
    for one, two in itertools.pairwise(cut):
        if one.file == two.file:
            assert one.stop <= two.start
            step, start, stop = next(segment for segment in two.segments if not segment.step.is_own)
            fits = step.offset + min(start + 16 * FLOATS[step.dtype], stop)
            assert two.start - one.stop > 10 or fits - one.start > 128, "they could have been one"


def planned(*arguments: Any, **options: Any) -> Plan:
    plan = ik.apply(*arguments, in_place=True, dry_run=True, **options)
    assert isinstance(plan, Plan)
    return plan


def test_only_what_is_merged_changes(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    plan = planned(target, (instruct, base), skip="norm|layers.1")
    steps = cuts.changes(plan)
    assert [step.name for step in steps] == [step.name for step in plan.steps if not step.reason]
    for step in steps:
        ref = plan.inputs["target"].tensors[step.name]
        assert (step.file, step.offset, step.nbytes) == (ref.path.name, ref.offset, ref.nbytes)
    assert plan.bytes_written == sum(step.nbytes for step in steps)
    assert plan.bytes_read == 3 * plan.bytes_written
    assert f"{plan}".endswith("in place")


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"is BF16 in .* and would become F32, which takes other bytes. Leave --dt"
    ):
        planned(target, (instruct, base), dtype="f32")
    planned(target, (instruct, base), dtype="bf16")


def test_the_target_may_be_an_input_and_nothing_else_of_it(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    planned(target, (instruct, target))
    planned(target, (target, base))
    (tmp_path / "alias").mkdir()
    for path in target.iterdir():
        (tmp_path / "alias" / path.name).symlink_to(path)
    with pytest.raises(
        CheckpointError, match=r"alias/model.safetensors of base is the target's own file .* another name"
    ):
        planned(target, (instruct, tmp_path / "alias"), follow_links=True)


def test_a_head_that_is_an_embedding_of_the_target_is_refused(tmp_path: Path) -> None:
    """Its update would be read after the embedding was overwritten."""
    embed, head = normal((8, 4), 1), normal((8, 4), 2)
    tied = write_model(tmp_path / "tied", {"model.embed_tokens.weight": embed}, config={"tie_word_embeddings": True})
    untied = {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    target = write_model(tmp_path / "untied", untied, config={"tie_word_embeddings": False})
    plan = planned(target, (target, tied))
    refs = {step.name: step for step in plan.steps}
    step = refs["lm_head.weight"]
    own, _, base = step.operands
    broken = replace(step, operands=(own, refs["model.embed_tokens.weight"].operands[1], base))
    with pytest.raises(
        CheckpointError, match=r"'lm_head.weight' needs 'model.embed_tokens.weight' of instruct, which is"
    ):
        cuts.changes(replace(plan, steps=(refs["model.embed_tokens.weight"], broken)))
