"""Blocks of tensors: what one of several processes holds of a model, and the steps that make no more than that."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.planning.box import Box
from ires_kernels.planning.steps import Operand, Step, by_output


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
        if not runs:
            continue
        at, count = runs[0][1], sum(count for _, _, count in runs)
        own = None if memory is None else memory.run(at, count)
        pieces = [(first - step.first, count) for first, _, count in runs]
        operands = tuple(_cut(step, operand, pieces, own) for operand in step.operands)
        block = box if numbered and step.op != "copy" else None
        made.append(replace(step, output=output, operands=operands, first=at, count=count, box=block))
    return made


def _cut(step: Step, operand: Operand, pieces: Sequence[tuple[int, int]], own: TensorRef | None) -> Operand:
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
