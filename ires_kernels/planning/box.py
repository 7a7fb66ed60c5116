"""A block of a tensor, and where its elements are in the whole one."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from operator import mul
from typing import NamedTuple


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
    def is_run(self) -> bool:
        """Whether its elements follow each other in the whole tensor."""
        return _Runs.of(self).length == self.numel

    def place(self, index: int) -> int:
        """The flat index in the whole tensor of the element that has this one in the block."""
        runs = _Runs.of(self)
        return runs.begin(index // runs.length) + index % runs.length

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Elements of the block as runs of the whole tensor: where each is among them, how many, its index there."""
        runs, at = _Runs.of(self), 0
        while at < count:
            number, inside = divmod(first + at, runs.length)
            size = min(runs.length - inside, count - at)
            yield at, size, runs.begin(number) + inside
            at += size

    def runs(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Its elements as runs of the whole tensor's, in their order, each as long as can be.

        Each is the flat index of its first element in the whole tensor, and in the block, and how many it has. With
        `begin` and `end` those of them, and parts, whose elements lie between these in the whole tensor.
        """
        if not self.numel:
            return
        runs = _Runs.of(self)
        numbers = range(self.numel // runs.length)
        for number in numbers[max(0, bisect_right(numbers, begin, key=runs.begin) - 1) :]:
            here = runs.begin(number)
            if end is not None and here >= end:
                return
            low, high = max(here, begin), here + runs.length if end is None else min(here + runs.length, end)
            if low < high:
                yield low, number * runs.length + low - here, high - low


class _Runs(NamedTuple):
    """The runs of a block that has elements: all of one length."""

    length: int
    start: int
    """Where the first one begins in the whole tensor."""
    dims: tuple[tuple[int, int], ...]
    """How many there are in each dimension, and how far from each other; the last one first."""

    @classmethod
    def of(cls, box: Box) -> _Runs:
        strides = [1]
        for size in reversed(box.shape[1:]):
            strides.insert(0, strides[0] * size)
        cut = max((dim for dim, size in enumerate(box.size) if size != box.shape[dim]), default=0)
        start = sum(map(mul, box.first, strides))
        dims = tuple(zip(box.size[:cut], strides[:cut], strict=True))[::-1]
        return cls(math.prod(box.size[cut:]), start, dims)

    def begin(self, number: int) -> int:
        """Where a run begins in the whole tensor."""
        found = self.start
        for size, stride in self.dims:
            number, index = divmod(number, size)
            found += index * stride
        return found
