"""The scales of a quantized target that is updated in place: new ones are found and kept before anything changes.

Whether the scale of a block serves is known when all new numbers of the block are, and these are made of what a later
window overwrites. So a first pass reads all of these weights, and the file `scales` of the hidden folder gets the old
scales and the new ones of each, in the order of the steps. From then on it is the source of both: codes that are still
old are decoded by the old ones, whatever the target has by then, and new codes and the target's scales follow from the
new ones. The record of the update has its digest. Behind the scales it says, as JSON, how many of them are new, and
what the other inputs were, by hashes: they are read again with the codes.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from ires_kernels.checking import guards
from ires_kernels.checkpoints.checkpoint import FileId, TensorRef
from ires_kernels.checkpoints.quantized import QuantizedRef, Ref
from ires_kernels.checkpoints.sources import Files
from ires_kernels.files import interrupts, transfer
from ires_kernels.files.inplace import SCALES, Workplace
from ires_kernels.files.ownership import StoreError, open_own, private_mode
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Operand, Step
from ires_kernels.records.operation import Operation
from ires_kernels.records.provenance import has_hash, hash_file
from ires_kernels.streaming.options import Options
from ires_kernels.streaming.outcome import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from ires_kernels.streaming.encoded import Scales


class Layout:
    """Where the file has the scales of which weight."""

    def __init__(self, steps: Iterable[Step], path: Path) -> None:
        self.path = path
        every = list(steps)
        self.steps = [step for step in every if step.output.encoding is not None and not step.is_scale]
        """Those that make codes."""
        self.weights = [step.output.encoding.weight for step in self.steps if step.output.encoding is not None]
        sizes = [scale_of(weight).nbytes for weight in self.weights]
        ends = list(accumulate((2 * size for size in sizes), initial=0))
        self.size = ends[-1]
        """Of all scales together, old and new."""
        self.rest = sum(step.nbytes + (step.nbytes if step.is_scale else step.read_bytes) for step in every)
        """Bytes that the second pass reads and writes."""
        self._starts = {weight.codes.name: start for weight, start in zip(self.weights, ends, strict=False)}

    def old(self, weight: QuantizedRef) -> TensorRef:
        """The scales that the target had."""
        scale = scale_of(weight)
        return TensorRef(scale.name, scale.dtype, scale.shape, self.path, self._starts[weight.codes.name], scale.nbytes)

    def new(self, weight: QuantizedRef) -> TensorRef:
        """Those that it gets."""
        old = self.old(weight)
        return replace(old, offset=old.offset + old.nbytes)


def scale_of(weight: QuantizedRef) -> TensorRef:
    """The tensor of its scales."""
    return dict(weight.parts)["scale"]


def reserve(layout: Layout) -> None:
    """Take the room for all scales. Raises OSError where there is none."""
    if not layout.steps:
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with transfer.named(layout.path):
        fd = os.open(layout.path, flags, private_mode(0o660))
        try:
            transfer.allocate(fd, layout.size, layout.path)
        finally:
            os.close(fd)


def find(place: Workplace, plan: Plan, layout: Layout, options: Options) -> tuple[str, int]:
    """The first pass: find and keep all scales. Returns the digest of the file ("": none change), and bytes read."""
    if not layout.steps:
        return "", 0
    from ires_kernels.streaming import encoded, measuring

    known, lock = guards.file_ids(plan), threading.Lock()
    fd = open_own(layout.path, write=True)
    try:
        _copy_old(fd, layout, known)
        counts = {weight.codes.name: (0, 0) for weight in layout.weights}

        def found(weight: QuantizedRef, largest: Tensor) -> None:
            before = _read(fd, layout.old(weight))
            scales = encoded.new_scales(weight, largest, before)
            with lock:
                counts[weight.codes.name] = (scales.blocks, scales.new)
            if scales.new:
                transfer.write_all(fd, scales.stored, layout.new(weight).offset, layout.path)

        others = plan.inputs.keys() - plan.roles_of_target()
        progress = options.part(0, layout.rest).progress
        outcome, read = measuring.measure(
            layout.steps, known, found,
            hashed=others, processors=options.processors, threads=options.threads, progress=progress,
        )  # fmt: skip
        outcome.scales.update(counts)
        transfer.write_all(fd, json.dumps(outcome.to_dict()).encode(), layout.size, layout.path)
        if place.sync:
            with transfer.named(layout.path):
                os.fsync(fd)
    finally:
        os.close(fd)
    return hash_file(layout.path), read


def _copy_old(fd: int, layout: Layout, known: dict[Path, FileId]) -> None:
    """Both copies are the old ones at first: a weight without elements is not measured."""
    files = Files(known, (scale_of(weight).path for weight in layout.weights))
    try:
        for weight in layout.weights:
            interrupts.check()
            scale = scale_of(weight)
            view = memoryview(bytearray(scale.nbytes))
            files.open(scale.path).read_into(view, scale.offset)
            files.release(scale.path)
            for ref in (layout.old(weight), layout.new(weight)):
                transfer.write_all(fd, view, ref.offset, layout.path)
    finally:
        files.close()


def _read(fd: int, ref: TensorRef) -> memoryview:
    view = memoryview(bytearray(ref.nbytes))
    transfer.read_into(fd, view, ref.offset, ref.path)
    return view


@dataclass(frozen=True)
class Kept:
    """The scales that an update goes on with."""

    layout: Layout
    learnt: Outcome
    """Hashes of what the first pass read of the other inputs, and how many scales are new."""

    def of(self, weight: QuantizedRef) -> Scales:
        """The new ones of a weight, for the engine."""
        from ires_kernels.streaming.encoded import Scales

        blocks, new = self.learnt.scales[weight.codes.name]
        fd = open_own(self.layout.path)
        try:
            return Scales(_read(fd, self.layout.new(weight)), new, blocks)
        finally:
            os.close(fd)


def kept(place: Workplace, operation: Operation, steps: Sequence[Step]) -> Kept | None:
    """What a first pass has kept; None where no codes change. Raises StoreError where it is not what it was."""
    layout = Layout(steps, place.work / SCALES)
    if not layout.steps:
        return None
    if not has_hash(layout.path, operation.scales):
        raise StoreError(
            f"{layout.path}: is gone or was changed, and it has the scales that the update goes on with. "
            f"`ires rollback {place.target}` takes it back where that is possible."
        )
    fd = open_own(layout.path)
    try:
        size = os.fstat(fd).st_size - layout.size
        view = memoryview(bytearray(size))
        transfer.read_into(fd, view, layout.size, layout.path)
    finally:
        os.close(fd)
    return Kept(layout, Outcome.from_dict(json.loads(bytes(view))))


def with_kept(steps: Iterable[Step], kept: Kept | None) -> tuple[Step, ...]:
    """The steps with their scales from where they are kept: old ones to decode by, and new ones to be copied."""
    return tuple(_with_kept(step, kept.layout) if kept else step for step in steps)


def _with_kept(step: Step, layout: Layout) -> Step:
    encoding = step.output.encoding
    if encoding is None:
        return step
    weight = encoding.weight
    if step.is_scale:
        output = replace(step.output, encoding=None)
        return Step(output, "copy", (Operand("scales", (layout.new(weight),)),))

    def decoded_by_old(ref: Ref) -> Ref:
        if not isinstance(ref, QuantizedRef) or not is_at(ref.codes, weight.codes):
            return ref
        parts = ((part, layout.old(weight) if part == "scale" else each) for part, each in ref.parts)
        return replace(ref, parts=tuple(parts))

    operands = (replace(operand, refs=tuple(map(decoded_by_old, operand.refs))) for operand in step.operands)
    return replace(step, operands=tuple(operands))


def is_at(one: TensorRef, other: TensorRef) -> bool:
    """Whether these are the same bytes."""
    return (one.path, one.offset, one.nbytes) == (other.path, other.offset, other.nbytes)
