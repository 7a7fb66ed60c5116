"""Blocks of tensors: what one of several processes holds of a model, and the steps that make no more than that."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.planning.evidence import Run
from ires_kernels.planning.steps import Operand, Step, by_output


class Box(NamedTuple):
    """A block of a tensor: in each dimension from which index on, and how many."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    first: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.size == self.shape

    def runs(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Its elements as runs of the whole tensor's, in their order, each as long as can be.

        Each is the flat index of its first element in the whole tensor, and in the block, and how many it has. With
        `begin` and `end` those of them, and parts, whose elements lie between these in the whole tensor.
        """
        if not self.numel:
            return
        cut = max((dim for dim, size in enumerate(self.size) if size != self.shape[dim]), default=0)
        count = math.prod(self.size[cut:])
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        start = sum(first * stride for first, stride in zip(self.first, strides, strict=True))

        def place(number: int) -> int:
            """Where a run begins in the whole tensor."""
            found = start
            for dim in reversed(range(cut)):
                number, index = divmod(number, self.size[dim])
                found += index * strides[dim]
            return found

        numbers = range(self.numel // count)
        for number in numbers[max(0, bisect_right(numbers, begin, key=place) - 1) :]:
            here = place(number)
            low, high = max(here, begin), here + count if end is None else min(here + count, end)
            if end is not None and here >= end:
                return
            if low < high:
                yield low, number * count + low - here, high - low


def within(
    steps: Iterable[Step],
    boxes: Mapping[str, Box],
    memory: Mapping[str, TensorRef] | None = None,
    *,
    numbered: bool = False,
) -> Iterator[list[Step]]:
    """The steps that make blocks of tensors, one output after the other, with the bits that the whole ones would have.

    steps     of whole tensors
    boxes     by the names of outputs. Without one a tensor is made whole; of an empty one nothing is made
    memory    of the outputs that are elements of the target which are changed where they are: where that has the block
    numbered  whether random bits are drawn by the number of an element in the whole tensor

    Raises CheckpointError for what needs other elements of the target than those in the block.
    """
    for output, parts in by_output(steps).items():
        box = boxes.get(output.name)
        if box is None:
            yield parts
        elif box.numel:
            yield _within(parts, box, (memory or {}).get(output.name), numbered)


def _within(steps: Sequence[Step], box: Box, memory: TensorRef | None, numbered: bool) -> list[Step]:
    output = replace(steps[0].output, shape=box.size)
    made: list[Step] = []
    for step in steps:
        runs = [*box.runs(step.first, step.first + step.count)]
        for group in [[run] for run in runs] if numbered and step.op != "copy" else [runs] if runs else []:
            (begin, at, _), count = group[0], sum(count for _, _, count in group)
            own = None if memory is None else memory.run(at, count)
            pieces = [(first - step.first, length) for first, _, length in group]
            operands = tuple(_cut(step, operand, pieces, own) for operand in step.operands)
            shift = begin - at if numbered else 0
            made.append(replace(step, output=output, operands=operands, first=at, count=count, shift=shift))
    return made


def _cut(step: Step, operand: Operand, pieces: Sequence[Run], own: TensorRef | None) -> Operand:
    """These elements of an operand, out of memory where it is the target's."""
    if own is not None and operand.role == "target":
        at = step.first
        for ref in operand.refs:
            if (ref.tensor, ref.first) != (step.name, at):
                raise CheckpointError(
                    f"{brief(step.name)} would be made of elements of {brief(ref.tensor)} that lie in other processes: "
                    "a sharded module is changed where it is only. Apply to the files of the model, and load those."
                )
            at += ref.numel
        return Operand(operand.role, (own,))
    ends = list(accumulate(ref.numel for ref in operand.refs))
    refs: list[Ref] = []
    for begin, count in pieces:
        number = bisect_right(ends, begin)
        while count:
            ref = operand.refs[number]
            first = begin - (ends[number] - ref.numel)
            taken = min(count, ref.numel - first)
            refs.append(ref.run(first, taken))
            begin, count, number = begin + taken, count - taken, number + 1
    return Operand(operand.role, tuple(refs))


def shared_out(weights: Sequence[int], parts: int) -> list[list[int]]:
    """The indexes of what weighs so much, in so many parts: the heaviest first, each into the lightest part so far."""
    loads, found = [0] * parts, [[] for _ in range(parts)]  # type: list[int], list[list[int]]
    for index in sorted(range(len(weights)), key=lambda index: (-weights[index], index)):
        lightest = loads.index(min(loads))
        loads[lightest] += weights[index]
        found[lightest].append(index)
    return found
