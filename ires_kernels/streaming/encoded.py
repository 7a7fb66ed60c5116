"""New numbers of a weight that stays quantized: their scales, which follow from all of them, and their codes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ires_kernels.backends import counting, decoding, encoding
from ires_kernels.backends.call import Tally
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Step
from ires_kernels.streaming.decoded import Decoded
from ires_kernels.streaming.pieces import Reader
from ires_kernels.streaming.tiles import ComputeError, Slot


class Scales(NamedTuple):
    """The scales of a weight that gets new numbers."""

    stored: memoryview
    """Their bytes."""
    renewed: Tensor | None
    """Which of them are new, by block; None where none is."""
    blocks: int


class Coder:
    """The scales of one weight, for the steps of a run that make its codes and its scales.

    Whether a scale still serves is known when all numbers of its block are. So whichever step comes first computes all
    of the weight for that, and nothing is kept of it but the scales; the step of the codes computes it once more.
    """

    def __init__(self, weight: QuantizedRef) -> None:
        self.weight = weight
        self.found: Scales | None = None
        self._lock = threading.Lock()

    def scales(
        self, step: Step, readers: Sequence[Reader], slot: Slot, tile: int, is_stopped: Callable[[], bool]
    ) -> Scales:
        """The scales, for one of the steps; others that need them wait. Raises ComputeError when the run is stopped."""
        with self._lock:
            if self.found is None:
                self.found = self._measured(step, readers, slot, tile, is_stopped)
            return self.found

    def _measured(
        self, step: Step, readers: Sequence[Reader], slot: Slot, tile: int, is_stopped: Callable[[], bool]
    ) -> Scales:
        weight, own = self.weight, readers[0]
        assert isinstance(own, Decoded)
        blocks = encoding.block_count(weight.format, weight.full)
        largest = torch.zeros(blocks)
        for first in range(0, weight.numel, tile):
            if is_stopped():
                raise ComputeError("another tensor failed")
            count = min(tile, weight.numel - first)
            for reader, buffer in zip(readers, slot.buffers, strict=False):
                reader.read_into(buffer, first, count)
            slot.measure(step, first, count, largest)
        return Scales(*encoding.new_scales(weight.format, largest, own.part("scale")), blocks)


class Coding(NamedTuple):
    """What a tile of new codes needs besides its operands."""

    scales: Scales
    before: memoryview
    """The codes of its elements until now."""


def store(
    step: Step,
    operands: Sequence[Tensor],
    values: Tensor,
    first: int,
    coding: Coding,
    out: Tensor,
    rules: Rules,
    tally: Tally | None,
) -> None:
    """Make codes of the values of a tile, the result of its step, in the bytes `out`; counts what is stored by them.

    A number that is what it was keeps its code, as long as its block keeps its scale.
    """
    assert step.output.encoding is not None
    weight, count = step.output.encoding.weight, len(values)
    scales, renewed, _ = coding.scales
    random = (rules.seed, step.stream) if rules.rounding == "stochastic" else None
    encoding.encode(weight.format, weight.full, first, values, scales, out, random)
    before = operands[0]
    same = (values == before) | (values.isnan() & before.isnan())
    if renewed is not None:
        same &= ~encoding.of_elements(weight.format, weight.full, first, count, renewed)
    torch.where(same, torch.frombuffer(coding.before, dtype=torch.uint8), out, out=out)
    if tally is not None:
        stored = torch.empty_like(values)
        parts = {"codes": out.numpy().data, "scale": scales}
        decoding.decode(weight.format, weight.full, first, count, parts, stored)
        tally += counting.tally(count, counting.count(step.op, operands, step.factors, stored))
        off = stored.double() - values.double()
        tally.noise += float(torch.where(off.isfinite(), off, 0.0).square().sum())
