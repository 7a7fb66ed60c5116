"""Blocks of tensors: their runs, and the steps that make them, against slices of the numbers of elements."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.planning.box import Box
from ires_kernels.planning.boxes import within
from ires_kernels.planning.dealing import dealt
from ires_kernels.planning.steps import Operand, Output, Step

torch = pytest.importorskip("torch")


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """Blocks of tensors of up to four dimensions, empty ones among them."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    first = tuple(draw(st.integers(0, size)) for size in shape)
    left = [size - begin for size, begin in zip(shape, first, strict=True)]
    return Box(shape, first, tuple(draw(st.integers(0, size)) for size in left))


def elements(box: Box) -> list[int]:
    """The flat indexes of its elements in the whole tensor."""
    whole = torch.arange(math.prod(box.shape)).view(box.shape)
    return whole[tuple(slice(f, f + n) for f, n in zip(box.first, box.size, strict=True))].flatten().tolist()  # type: ignore[no-any-return]


@given(boxes(), st.data())
def test_runs_are_the_elements_of_a_slice(box: Box, data: st.DataObject) -> None:
    wanted = elements(box)
    runs = [*box.runs()]
    assert [first + i for first, _, count in runs for i in range(count)] == wanted
    assert [at + i for _, at, count in runs for i in range(count)] == [*range(box.numel)]
    begin = data.draw(st.integers(0, math.prod(box.shape)))
    end = data.draw(st.integers(begin, math.prod(box.shape)))
    some = [(first + i, at + i) for first, at, count in box.runs(begin, end) for i in range(count)]
    assert some == [(index, at) for at, index in enumerate(wanted) if begin <= index < end]


def test_runs_are_as_long_as_can_be() -> None:
    assert [*Box((4, 6), (1, 0), (2, 6)).runs()] == [(6, 0, 12)]
    assert [*Box((4, 6), (1, 2), (2, 3)).runs()] == [(8, 0, 3), (14, 3, 3)]
    assert [*Box((2, 4, 6), (0, 1, 0), (2, 2, 6)).runs()] == [(6, 0, 12), (30, 12, 12)]
    assert [*Box((), (), ()).runs()] == [(0, 0, 1)]
    assert [*Box((3, 2), (3, 0), (0, 2)).runs()] == []


def ref(name: str, count: int) -> TensorRef:
    return TensorRef(name, "F32", (count,), Path("model"), 0, 4 * count)


@given(boxes(), st.data())
def test_steps_of_a_block(box: Box, data: st.DataObject) -> None:
    numel = math.prod(box.shape)
    cuts = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=3))})
    output = Output("made", "F32", box.shape)
    target, parts = ref("made", numel), [ref(f"part {number}", numel) for number in range(2)]
    steps = []
    for begin, end in pairwise(cuts):
        middle = data.draw(st.integers(begin, end))
        runs = [part.run(a, b - a) for part, a, b in zip(parts, (begin, middle), (middle, end), strict=True) if a < b]
        operands = Operand("target", (target.run(begin, end - begin),)), Operand("residual", tuple(runs))
        steps.append(Step(output, "add", operands, (1.0,), 7, "", begin, end - begin))
    numbered = data.draw(st.booleans())
    memory = {"made": ref("made", box.numel)} if data.draw(st.booleans()) else None
    made = [step for each in within(steps, {"made": box}, memory, numbered=numbered) for step in each]
    wanted = elements(box)
    assert [step.first + i for step in made for i in range(step.count)] == [*range(box.numel)]
    for step in made:
        assert step.shape == box.size
        here = wanted[step.first : step.first + step.count]
        own, added = ([r.first + i for r in o.refs for i in range(r.numel)] for o in step.operands)
        assert added == here
        assert own == (here if memory is None else [*range(step.first, step.first + step.count)])
        if numbered:
            assert [step.number(step.first + i) for i in range(step.count)] == here
            assert step.box is not None
            pieces = [*step.box.pieces(step.first, step.count)]
            assert [number + i for _, count, number in pieces for i in range(count)] == here
            assert [at + i for at, count, _ in pieces for i in range(count)] == [*range(step.count)]


def test_other_elements_of_the_target_are_not_here() -> None:
    rows = Operand("target", (ref("made", 4).run(2, 2), ref("made", 4).run(0, 2)))
    step = Step(Output("made", "F32", (2, 2)), "add", (rows, Operand("residual", (ref("r", 4),))), (1.0,))
    with pytest.raises(CheckpointError, match="lie in other processes"):
        list(within([step], {"made": Box((2, 2), (0, 0), (1, 2))}, {"made": ref("made", 2)}))


@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 6))
def test_what_is_dealt_is_balanced(weights: list[int], parts: int) -> None:
    found = dealt(weights, parts)
    assert sorted(index for part in found for index in part) == [*range(len(weights))]
    loads = [sum(weights[index] for index in part) for part in found]
    assert max(loads) - min(loads) <= max(weights, default=0)
