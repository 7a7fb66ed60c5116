"""What is done to one tile of a tensor, whatever does it: the memory it needs, and its steps.

What reads, hashes and copies needs no more than this, and no torch."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from ires_kernels.backends.call import Tally
from ires_kernels.checkpoints.sources import Read
from ires_kernels.dtypes import FLOATS
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Step

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ires_kernels.backends.call import Coded
    from ires_kernels.streaming.encoded import Coding


@dataclass(frozen=True)
class Tiles:
    """How much a thread does at a time. Results do not depend on it, and what was interrupted goes on with others."""

    elements: int = 1 << 19
    """Of a tensor, on the CPU."""
    on_gpu: int = 1 << 21
    """Elements at most on a GPU: more than on the CPU, as each tile costs a fixed number of launches."""
    copied: int = 1 << 19
    """Bytes of a tensor that is copied."""
    in_pieces: int = 1 << 22
    """Elements of a tensor that one call reads and computes or counts, piece by piece, on the CPU."""


TILES = Tiles()
tiles: ContextVar[Tiles] = ContextVar("tiles", default=TILES)
"""Of the runs that begin in this context."""

Bytes = TypeVar("Bytes", memoryview, "Tensor")


class Portion(NamedTuple):
    """What a tile has of one step: `size` elements from flat index `first` on go into `out`; bytes of a copy.

    Without `out` they are only looked at.
    """

    step: Step
    first: int
    size: int
    out: Tensor | None
    reads: list[list[Read]]
    """By operand, what is read for it, one after the other."""
    seen: Sequence[bool]
    """Of which operands the bytes are wanted that were read."""


Load = Callable[[Sequence[Portion]], list[list[memoryview]]]
"""Reads the portions of a tile, which have one operation and its factors, and starts to compute them.

Returns the bytes that were read of each, or no bytes where they are not wanted. Raises ReadError.
"""


class Slot(Protocol):
    """The memory of one tile. A thread fills it, starts it, waits for it, and may then fill it again."""

    @property
    def buffers(self) -> list[memoryview]:
        """In host memory: one for each operand and one, the last, for the result."""

    @property
    def decodes(self) -> bool:
        """Whether buffers may hold codes in place of numbers."""

    def start(
        self,
        step: Step,
        first: int,
        count: int,
        out: Tensor | None,
        coded: Mapping[int, Coded],
        coding: Coding | None = None,
    ) -> None:
        """Make `count` elements from flat index `first` on, out of the first bytes of the buffers.

        The result goes into `out`, a piece of a tensor where the processor computes, or else into the last buffer.
        With `out` the step may be a copy; it and `count` are in bytes then. `coded` says which buffers hold codes, and
        of what. With `coding` the result is codes.
        """

    def measure(self, step: Step, first: int, count: int, coded: Mapping[int, Coded], largest: Tensor) -> None:
        """Take the same elements into account in the largest of each block that is to be encoded, and make nothing."""

    @property
    def load(self) -> Load | None:
        """Takes the place of filling the buffers and of `start` of what the processor `loads`."""

    def wait(self) -> Tally | None:
        """Return when what was started is done, and no memory is in use any more, with what was counted of it."""


class Processor(Protocol):
    """What computes: the CPU, or a GPU."""

    @property
    def tile(self) -> int:
        """Elements at a time."""

    @property
    def copy(self) -> int:
        """Bytes at a time of a tensor that is copied."""

    @property
    def room(self) -> int:
        """Bytes that the portions which a slot loads at a time may take, `packed`; 0 where it loads one at a time."""

    def loads(self, step: Step, out: Tensor | None, reads: Sequence[Sequence[Read]], seen: Sequence[bool]) -> int:
        """Elements of a step that a slot loads at a time, bytes of a copy; 0 where it does not load such.

        Its result goes into `out`, or it is only looked at. `reads` are places by operand where some of it is, without
        elements, and of which the bytes are wanted that were read says `seen`.
        """

    def slots(self) -> Sequence[Slot]:
        """Memory for a thread, called in it: so many tiles it has under way at a time."""

    def release(self, slots: Iterable[Slot]) -> None:
        """The thread does not use them any more, and nothing is under way in them."""


Processors = Callable[[Sequence[Step], Rules, bool], Processor]
"""Makes the processor for a run from its steps, its rules, and whether to count."""


def on_cpu(steps: Sequence[Step], rules: Rules, counted: bool) -> Processor:
    """The CPU. Its arithmetic is loaded here, so that what computes nothing starts without torch."""
    from ires_kernels.streaming.cpu import Cpu

    return Cpu(steps, rules, counted)


def processors_on(device: str | torch.device, *, idle: bool = False) -> Processors:
    """What computes on a device, which is known to be there and to have a backend. Raises ArgumentError.

    idle  perhaps nothing will be computed: the CPU is taken at its word, and torch is loaded when it has work
    """
    if idle and device == "cpu" and not os.environ.get("IRES_BACKEND"):
        return on_cpu
    from ires_kernels.streaming import device as devices

    return devices.processors(devices.resolve(device))


class ReadOnly:
    """For steps that copy and are not kept in memory: a thread reads their bytes, and nothing is computed."""

    def __init__(self, *_: object) -> None:
        self.tile = self.copy = tiles.get().copied
        self.room = 0

    def loads(self, *_: object) -> int:
        return 0

    def slots(self) -> list[Slot]:
        return [_ReadOnlySlot(self.copy)]

    def release(self, slots: Iterable[Slot]) -> None:
        """They go with their memory."""


class _ReadOnlySlot:
    load = None
    decodes = False

    def __init__(self, nbytes: int) -> None:
        self.buffers = [memory(nbytes)]

    def start(self, step: Step, *_: object) -> None:
        raise AssertionError(f"{step.op} of {step.name} is to be computed, by what only reads")

    measure = start

    def wait(self) -> None:
        """Nothing was started."""


def memory(nbytes: int) -> memoryview:
    """Memory of this process alone, that takes room where it is written."""
    return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def buffer_sizes(steps: Iterable[Step], tile: int) -> list[int]:
    """Bytes that a tile needs for each operand, and last for the result."""
    inputs, result = [tiles.get().copied], 0
    for step in steps:
        if step.op != "copy":
            widths = [FLOATS[operand.dtype] * tile for operand in step.operands]
            inputs = [max(pair) for pair in zip_longest(inputs, widths, fillvalue=0)]
            result = max(result, (1 if step.output.encoding else FLOATS[step.dtype]) * tile)
    return [*inputs, result]


def packed(sizes: Iterable[int]) -> int:
    """Bytes of pieces of these sizes one after the other, each of which begins at a multiple of 16 bytes."""
    return sum(-(-nbytes // 16) * 16 for nbytes in sizes)


def cut(memory: Bytes, sizes: Sequence[int]) -> list[Bytes]:
    """Consecutive pieces of these sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [memory[end - length : end] for end, length in zip(ends, sizes, strict=True)]
