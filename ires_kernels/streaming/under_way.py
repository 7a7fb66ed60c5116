"""A tensor that threads work on: what its steps make of it, and its tiles."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Container, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from ires_kernels.backends.call import Tally
from ires_kernels.backends.fit import Fit
from ires_kernels.dtypes import FLOATS
from ires_kernels.planning.steps import Output, Step
from ires_kernels.streaming.pieces import Reader
from ires_kernels.streaming.tiles import Portion, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from ires_kernels.streaming.encoded import Coder


class Part:
    """What one step makes of a tensor that is under way."""

    def __init__(
        self,
        step: Step,
        readers: Sequence[Reader],
        tile: int,
        out: tuple[Tensor, Tensor] | None,
        hashed: Container[str] | None,
        tally: Tally,
        stays: bool,
        coder: Coder | None,
        fitted: bool,
    ) -> None:
        self.step = step
        self.readers = readers
        self.coder = coder
        self.copied = step.op == "copy" or step.is_scale
        self.is_run = step.box is None or step.box.is_run
        self.length = length(step)
        self.tile = tile
        self.tiles = -(-self.length // self.tile)
        self.overwrites = step.op in ("add", "add_difference") and not step.is_from_zero
        self.width = 1 if self.copied or coder else FLOATS[step.dtype]
        self.out: Tensor | None = None
        if out is not None:
            elements, in_bytes = out
            self.out = in_bytes[step.start :] if self.copied else elements[step.first :]
        self.wanted = wanted(step, hashed)
        self.hashers: list[xxhash.xxh3_128 | None] = []  # of what is read, where it is not the result
        self.tally = tally
        self.stays = stays
        self.fitted = fitted


class UnderWay:
    """An output under way, shared by the threads that work on its tiles."""

    def __init__(self, output: Output, parts: Sequence[Part], done: int, kept: bool, loaded: bool) -> None:
        self.output = output
        self.parts = parts
        self.done = done  # its first bytes, which an earlier run has written
        self.tiles = sum(part.tiles for part in parts)
        # The bytes of a whole copy are hashed once, as those of the result.
        self.is_copy = len(parts) == 1 and parts[0].copied
        self.is_written = all(part.out is None for part in parts)
        self.is_loaded = loaded  # the processor reads it itself
        self.hasher = xxhash.xxh3_128() if self.is_written and kept else None
        apart = not (self.is_copy and self.is_written)
        for part in parts:
            part.hashers = [xxhash.xxh3_128() if apart and wanted else None for wanted in part.wanted]
        self._ends = list(accumulate(part.tiles for part in parts))
        self.claimed = 0
        self.turn = 0  # the tile to hash next
        self.turned = threading.Condition()

    def at(self, index: int) -> tuple[Part, int]:
        """The part that a tile belongs to, and where it begins in that."""
        number = bisect_right(self._ends, index)
        part = self.parts[number]
        return part, (index - self._ends[number] + part.tiles) * part.tile

    def place(self, index: int) -> int:
        """The byte of the output where a tile begins."""
        part, first = self.at(index)
        return part.step.start + first * part.width

    def portion(self, index: int) -> Portion:
        """A tile of a tensor that stays in memory, or is only looked at."""
        part, first = self.at(index)
        step, count = part.step, min(part.tile, part.length - first)
        out = None if part.out is None else part.out[first : first + count]
        reads = [reads for reader in part.readers if (reads := reader.reads(first, count)) is not None]
        seen = [hasher is not None for hasher in part.hashers]
        return Portion(step, step.number(step.first + first), count, out, reads, seen)


class Tile(NamedTuple):
    """A tile that was started and is not ended."""

    tensor: UnderWay
    number: int
    part: Part
    first: int
    """Where it begins in the part: bytes of a copy, else elements."""
    slot: Slot
    seen: Sequence[Sequence[memoryview]]
    """By operand, what was read of it; to be hashed."""
    result: memoryview | None
    """What is made of that, and hashed as well, unless it stays in memory."""
    at: int
    """The byte of the output where it begins."""
    read: int
    written: int
    """Bytes, those of results that stay in memory among them."""
    fit: Fit | None = None


def wanted(step: Step, hashed: Container[str] | None) -> list[bool]:
    """Of which operands the hash is wanted. What scales are made of is read for the codes as well."""
    return [not step.is_scale and (hashed is None or operand.role in hashed) for operand in step.operands]


def length(step: Step) -> int:
    """Of a copy and of scales the bytes, of all else the elements."""
    return step.nbytes if step.op == "copy" or step.is_scale else step.count
