"""An update in place: which bytes of the target change, in which order, cut into windows; and what forbids it.

Pure, as planning is: the same Plan gives the same windows, so an interrupted update is taken up where it was. A window
is what is saved, computed, written and made durable at a time (journal.py). It begins and ends where the processors'
tiles do, so none of these has a part in two of it.

Of a tensor that changes in part, the rest is read for its hash, and neither saved nor written. It belongs to a window
all the same, which is complete when all of it has gone by: then all is known of the tensors that end there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from ires_kernels.checkpoints.checkpoint import FileId, TensorRef
from ires_kernels.checkpoints.header import CheckpointError, brief, tensor_bytes
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.dtypes import STORAGE
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Operand, Step


@dataclass(frozen=True)
class Sizes:
    """How windows are cut. An update remembers them: who goes on with it cuts as who began it."""

    window: int = 64 << 20
    """Most bytes of a window."""
    unit: int = 1 << 21
    """Elements that a step makes, from its first one on, that stay together; a multiple of every processor's tile."""
    gap: int = 1 << 20
    """Most bytes that a window has between tensors that change: they are saved for nothing."""


SIZES = Sizes()
"""Where nothing else is asked for."""
_DTYPE = "Leave --dtype out, or write a new folder with -o OUT."
_PLAIN = "Write a new folder with -o OUT, or leave such modules as they are with --skip."
_KEPT = "Leave --dtype out, and it stays quantized; or write a new folder with -o OUT."
_OTHER = "Write a new folder with -o OUT; or keep the rows of the target, with --vocabulary target."
_ALIAS = "Give a copy of that model, or write a new folder with -o OUT."


_File = tuple[int, int]
"""Device and inode."""


class Segment(NamedTuple):
    """Bytes [start, stop) of a tensor, of those that `step` makes."""

    step: Step
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends here."""
        return self.stop == tensor_bytes(self.step.dtype, self.step.shape)


class Window(NamedTuple):
    """Bytes [start, stop) of the target's file `file`, and what changes there.

    Among the segments are those of steps that leave what there is, and these may lie before or behind it.
    """

    file: str
    start: int
    stop: int
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes go by until it is complete."""
        return sum(segment.stop - segment.start for segment in self.segments)


def changes(plan: Plan) -> tuple[Step, ...]:
    """The steps of the tensors that change, with file and offset of the tensor in the target itself.

    Raises CheckpointError for what cannot be done in place.
    """
    tensors = plan.inputs["target"].tensors
    for step in plan.steps:
        weight = next((operand.refs[0] for operand in step.operands if operand.role == "target"), None)
        if step.output.encoding is None and isinstance(weight, QuantizedRef):
            raise CheckpointError(
                f"cannot apply in place: {brief(step.name)} is {weight.format} in {weight.path}, and would become "
                f"{step.dtype}, which takes other bytes. {_KEPT if weight.format.is_encoded else _PLAIN}"
            )
        if step.dtype != tensors[step.name].dtype:
            raise CheckpointError(
                f"cannot apply in place: {brief(step.name)} is {tensors[step.name].dtype} in {tensors[step.name].path} "
                f"and would become {step.dtype}, which takes other bytes. {_DTYPE}"
            )
        if step.shape != tensors[step.name].shape:
            raise CheckpointError(
                f"cannot apply in place: {brief(step.name)} is {list(tensors[step.name].shape)} in "
                f"{tensors[step.name].path} and would become {list(step.shape)}, which takes other bytes. {_OTHER}"
            )
    for name, content in plan.documents:
        if name == "config.json" and json.loads(content) != plan.inputs["target"].config:
            raise CheckpointError(
                f"cannot apply in place: {name} of the target says another dtype than {plan.rules.dtype}, though its "
                f"weights are that. {_DTYPE}"
            )
    changed = {step.name for step in plan.steps if not step.is_own}
    steps = [step for step in plan.steps if step.name in changed]
    _check_aliases(plan, steps)
    refs = [tensors[step.name] for step in steps]
    return tuple(
        replace(step, output=replace(step.output, file=ref.path.name, offset=ref.offset))
        for step, ref in zip(steps, refs, strict=True)
    )


def windows(steps: Iterable[Step], sizes: Sizes = SIZES) -> tuple[Window, ...]:
    """Cut what `changes` gave into windows, in the order of the steps."""
    extents: list[tuple[str, int, int]] = []
    groups: list[list[Segment]] = []
    before: list[Segment] = []  # what a tensor keeps before the first of it that changes
    for step in steps:
        if step.is_own:
            kept = Segment(step, step.start, step.start + step.nbytes)
            begun = groups and groups[-1][-1].step.output == step.output
            (groups[-1] if begun else before).append(kept)
            continue
        unit, end = sizes.unit * STORAGE[step.dtype].bits // 8, step.start + step.nbytes
        for at in range(step.start, end, unit):
            segment = Segment(step, at, min(at + unit, end))
            start, stop = step.offset + at, step.offset + segment.stop
            file, first, last = extents[-1] if extents else ("", 0, 0)
            if file == step.file and 0 <= start - last <= sizes.gap and stop - first <= sizes.window:
                extents[-1] = file, first, stop
                if groups[-1][-1].step is step:
                    groups[-1][-1] = groups[-1][-1]._replace(stop=segment.stop)
                else:
                    groups[-1] += [*before, segment]
            else:
                extents.append((step.file, start, stop))
                groups.append([*before, segment])
            before = []
    return tuple(Window(*extent, tuple(group)) for extent, group in zip(extents, groups, strict=True))


def _check_aliases(plan: Plan, steps: Iterable[Step]) -> None:
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
    for step in steps:
        if step.is_scale:  # which are kept before anything is written
            continue
        target = plan.inputs["target"].tensors[step.name]
        place = target.offset + step.start
        for operand in step.operands:
            read = [(files[ref.path], ref.offset, ref.nbytes) for ref in operand.refs if isinstance(ref, TensorRef)]
            other = own.keys().isdisjoint(files[path] for path in operand.paths)
            in_place = _is_own(operand, step) if operand.is_decoded else _lies_at(read, files[target.path], place)
            if not other and not in_place:
                raise CheckpointError(
                    f"cannot apply in place: {brief(step.name)} needs {brief(operand.text)} of {operand.role}, "
                    f"which is the target and would be overwritten. {_OTHER if operand.role == 'target' else _ALIAS}"
                )


def _is_own(operand: Operand, step: Step) -> bool:
    """Whether all that is decoded is the weight whose new codes take the places of these."""
    weight = step.output.encoding and step.output.encoding.weight
    return weight is not None and all(
        isinstance(ref, QuantizedRef) and not ref.whole and ref.parts == weight.parts for ref in operand.refs
    )


def _lies_at(runs: Iterable[tuple[_File, int, int]], file: _File, offset: int) -> bool:
    """Whether runs, each of (file, offset, bytes), are what the file has from `offset` on."""
    for its, begin, nbytes in runs:
        if (its, begin) != (file, offset):
            return False
        offset += nbytes
    return True


def _file(file_id: FileId) -> _File:
    return file_id.dev, file_id.ino
