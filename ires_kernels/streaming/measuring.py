"""The largest numbers of weights that are to get new codes, by block: one pass over all of them, and nothing made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ires_kernels.backends import encoding
from ires_kernels.backends.call import Coded
from ires_kernels.checkpoints.checkpoint import FileId
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Output, Step
from ires_kernels.streaming import stream
from ires_kernels.streaming.asked import Progress
from ires_kernels.streaming.outcome import Outcome
from ires_kernels.streaming.tiles import Processors, Slot

Found = Callable[[QuantizedRef, Tensor], None]
"""Takes a weight and the largest |value| of each of its blocks. Called by several threads, once for each weight."""


def measure(
    steps: Sequence[Step],
    file_ids: Mapping[Path, FileId],
    found: Found,
    *,
    hashed: Container[str],
    processors: Processors,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Outcome, int]:
    """Tell `found` of the weights of which `steps` make the codes; not of those without elements.

    Returns the hashes of the inputs of the roles `hashed`, and bytes read. Raises what `stream.run` does.
    """
    outcome = Outcome()
    numbers = [_numbers_of(step) for step in steps]
    read = stream.look(
        numbers,
        file_ids,
        lambda *_: _Measuring(steps, processors, found),
        hashed=hashed,
        threads=threads,
        progress=progress,
        outcome=outcome,
    )
    return outcome, read


def _numbers_of(step: Step) -> Step:
    """The same operands, for numbers in place of codes: of such nobody looks for scales."""
    return Step(Output(step.label, "F32", (step.count,), step.file), step.op, step.operands, step.factors)


class _Largest:
    """What is known of a weight under way."""

    def __init__(self, step: Step, weight: QuantizedRef) -> None:
        self.step = step
        self.weight = weight
        self.left = step.count
        self.lock = threading.Lock()
        self.values: Tensor | None = None


class _Measuring:
    """The processor: what computes the merge computes the numbers, and looks for the largest of them."""

    def __init__(self, steps: Sequence[Step], processors: Processors, found: Found) -> None:
        self.inner = processors(steps, Rules(), False)
        self.tile, self.copy, self.room = self.inner.tile, self.inner.copy, 0
        self.found = found
        coded = ((step, step.output.encoding) for step in steps)
        self.weights = {step.label: _Largest(step, encoding.weight) for step, encoding in coded if encoding}

    def loads(self, *_: object) -> int:
        return 0

    def slots(self) -> list[Slot]:
        return [_MeasuringSlot(self, slot) for slot in self.inner.slots()]

    def release(self, slots: Iterable[Slot]) -> None:
        self.inner.release([slot.inner for slot in slots if isinstance(slot, _MeasuringSlot)])


class _MeasuringSlot:
    load = None

    def __init__(self, asked: _Measuring, inner: Slot) -> None:
        self.inner = inner
        self.buffers, self.decodes = inner.buffers, inner.decodes
        self._asked = asked

    def start(self, step: Step, first: int, count: int, _: object, coded: Mapping[int, Coded], *_more: object) -> None:
        each = self._asked.weights[step.name]
        with each.lock:
            if each.values is None:
                each.values = torch.zeros(encoding.block_count(each.weight.format, each.weight.full))
            self.inner.measure(each.step, first, count, coded, each.values)
            each.left -= count
            if not each.left:
                largest, each.values = each.values, None
                self._asked.found(each.weight, largest)

    def measure(self, step: Step, *_: object) -> None:
        raise AssertionError(f"{step.name} is stored, by what only looks")

    def wait(self) -> None:
        self.inner.wait()
