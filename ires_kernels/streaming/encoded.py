"""New numbers of a weight that stays quantized: their scales, which follow from all of them, and their codes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ires_kernels.backends import encoding
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.planning.steps import Step
from ires_kernels.streaming.decoded import Decoded
from ires_kernels.streaming.failures import ComputeError
from ires_kernels.streaming.pieces import Reader, take
from ires_kernels.streaming.tiles import Slot


class Scales(NamedTuple):
    """The scales of a weight that gets new numbers."""

    stored: memoryview
    """Their bytes."""
    new: int
    """How many of them are new."""
    blocks: int
    """How many there are."""


class Coding(NamedTuple):
    """What a tile of new codes needs besides its operands."""

    scales: Scales
    before: memoryview
    """The codes of its elements until now."""


class Coder:
    """The scales of one weight, for the steps of a run that make its codes and its scales.

    Whether a scale still serves is known when all numbers of its block are. So whichever step comes first computes all
    of the weight for that, and nothing is kept of it but the scales; the step of the codes computes it once more.
    """

    def __init__(self, weight: QuantizedRef, known: Callable[[QuantizedRef], Scales] | None = None) -> None:
        """`known`: gives the scales, where they were found before."""
        self.weight = weight
        self.found: Scales | None = None
        self._known = known
        self._lock = threading.Lock()

    def scales(
        self, step: Step, readers: Sequence[Reader], slot: Slot, tile: int, is_stopped: Callable[[], bool]
    ) -> Scales:
        """The scales, for one of the steps; others that need them wait. Raises ComputeError when the run is stopped."""
        with self._lock:
            if self.found is None:
                known = self._known
                self.found = known(self.weight) if known else self._measured(step, readers, slot, tile, is_stopped)
            return self.found

    def coding(self, before: memoryview) -> Coding:
        """What a tile of new codes needs, when the scales are there; `before` are the codes that it had."""
        assert self.found is not None
        return Coding(self.found, before)

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
            _, coded = take(readers, slot.buffers, first, count, codes=slot.decodes)
            slot.measure(step, first, count, coded, largest)
        return new_scales(weight, largest, own.part("scale"))


def new_scales(weight: QuantizedRef, largest: Tensor, before: memoryview) -> Scales:
    """The scales of a weight of whose blocks these are the largest |value|, and which had the scales `before`."""
    stored, renewed = encoding.new_scales(weight.format, largest, before)
    return Scales(stored, 0 if renewed is None else int(renewed.sum()), len(largest))
