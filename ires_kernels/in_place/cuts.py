"""An update in place: which bytes of the target change, in which order, cut into windows; and what forbids it.

Pure, like plan.py: the same Plan gives the same windows, so an interrupted update is taken up where it was. A window is
what is saved, computed, written and made durable at a time (journal.py). It begins and ends where the processors'
tiles do, so none of these has a part in two of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from ires_kernels.checkpoints.checkpoint import FileId, TensorRef
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.dtypes import FLOATS
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Step


@dataclass(frozen=True)
class Sizes:
    """How windows are cut. An update remembers them: who goes on with it cuts as who began it."""

    window: int = 64 << 20
    """Most bytes of a window."""
    unit: int = 1 << 21
    """Elements of a tensor, from its first one on, that stay together; a multiple of every processor's tile."""
    gap: int = 1 << 20
    """Most bytes that a window has between tensors that change: they are saved for nothing."""


SIZES = Sizes()
"""Where nothing else is asked for."""
_DTYPE = "Leave --dtype out, or write a new folder with -o OUT."
_PARTS = "Write a new folder with -o OUT."
_ALIAS = "Give a copy of that model, or write a new folder with -o OUT."


class Segment(NamedTuple):
    """Elements [first, first + length) of the tensor that `step` makes."""

    step: Step
    first: int
    length: int

    @property
    def stop(self) -> int:
        """Byte after the last one, in the tensor."""
        return (self.first + self.length) * FLOATS[self.step.dtype]

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends here."""
        return self.stop == self.step.nbytes


class Window(NamedTuple):
    """Bytes [start, stop) of the target's file `file`, and what changes there."""

    file: str
    start: int
    stop: int
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes change."""
        return sum(segment.length * FLOATS[segment.step.dtype] for segment in self.segments)


def changes(plan: Plan) -> tuple[Step, ...]:
    """The steps whose results differ from the target, with file and offset of the tensor in the target itself.

    Raises CheckpointError for what cannot be done in place.
    """
    for step in plan.steps:
        if not step.is_whole:  # a window of the journal begins and ends where all parts of all tensors do
            raise CheckpointError(f"cannot apply in place: {brief(step.name)} is made of parts. {_PARTS}")
        if step.dtype != step.inputs[0].dtype:
            raise CheckpointError(
                f"cannot apply in place: {brief(step.name)} is {step.inputs[0].dtype} in {step.inputs[0].path} "
                f"and would become {step.dtype}, which takes other bytes. {_DTYPE}"
            )
    for name, content in plan.documents:
        if name == "config.json" and json.loads(content) != plan.inputs["target"].config:
            raise CheckpointError(
                f"cannot apply in place: {name} of the target says another dtype than {plan.rules.dtype}, though its "
                f"weights are that. {_DTYPE}"
            )
    merged = [step for step in plan.steps if not step.reason]
    _check_aliases(plan, merged)
    refs = [plan.inputs["target"].tensors[step.name] for step in merged]
    return tuple(
        replace(step, output=replace(step.output, file=ref.path.name, offset=ref.offset))
        for step, ref in zip(merged, refs, strict=True)
    )


def windows(steps: Iterable[Step], sizes: Sizes = SIZES) -> tuple[Window, ...]:
    """Cut what `changes` gave into windows, in the order of the steps."""
    extents: list[tuple[str, int, int]] = []
    groups: list[list[Segment]] = []
    for step in steps:
        width = FLOATS[step.dtype]
        for first in range(0, step.nbytes // width, sizes.unit):
            segment = Segment(step, first, min(sizes.unit, step.nbytes // width - first))
            start, stop = step.offset + first * width, step.offset + segment.stop
            file, begin, end = extents[-1] if extents else ("", 0, 0)
            if file == step.file and 0 <= start - end <= sizes.gap and stop - begin <= sizes.window:
                extents[-1] = file, begin, stop
                last = groups[-1][-1]
                if last.step is step:
                    groups[-1][-1] = last._replace(length=last.length + segment.length)
                else:
                    groups[-1].append(segment)
            else:
                extents.append((step.file, start, stop))
                groups.append([segment])
    return tuple(Window(*extent, tuple(group)) for extent, group in zip(extents, groups, strict=True))


def _check_aliases(plan: Plan, merged: Iterable[Step]) -> None:
    """An input may be the target itself, whose elements are read before they are written, and no other way round."""
    ids = (each for checkpoint in plan.inputs.values() for each in checkpoint.file_ids.items())
    files = {path: _file(file_id) for path, file_id in ids}
    own = {files[shard.path]: shard.path for shard in plan.inputs["target"].shards}
    others = {role: checkpoint for role, checkpoint in plan.inputs.items() if role not in plan.roles_of_target()}
    for role, checkpoint in others.items():
        for shard in checkpoint.shards:
            if files[shard.path] in own:
                raise CheckpointError(
                    f"cannot apply in place: {shard.path} of {role} is the target's own file "
                    f"{own[files[shard.path]]} under another name. {_ALIAS}"
                )
    for step in merged:
        target = plan.inputs["target"].tensors[step.name]
        for operand in step.operands:
            same = [(files[ref.path], ref.offset) for ref in operand.refs if isinstance(ref, TensorRef)] == [
                (files[target.path], target.offset)
            ]
            if not same and any(files[path] in own for path in operand.paths):
                raise CheckpointError(
                    f"cannot apply in place: {brief(step.name)} needs {brief(operand.text)} of {operand.role}, "
                    f"which is the target and would be overwritten. {_ALIAS}"
                )


def _file(file_id: FileId) -> tuple[int, int]:
    return file_id.dev, file_id.ino
