"""How the elements of an operand get into the memory of a tile: one piece of a file, or many, or what is made of them.

A reader belongs to an operand of a step under way; the threads that work on its tiles share it.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.checkpoints.sources import Read, Source
from ires_kernels.planning.steps import Operand

if TYPE_CHECKING:
    from ires_kernels.backends.call import Coded


class Reader(Protocol):
    """What an operand is read with. Elements are numbers of the operand's dtype; of a copy they are bytes."""

    def read_into(self, buffer: memoryview, first: int, count: int) -> Sequence[memoryview]:
        """Put the elements from `first` on into the first bytes of the buffer.

        Returns the bytes that its digest is of, in their order: the elements themselves, or what they were made of.
        """

    def codes_into(self, buffer: memoryview, first: int, count: int) -> tuple[Sequence[memoryview], Coded] | None:
        """Put the codes of the elements there instead, for what decodes them itself, and say what they stand for.

        None, and nothing done, where they have none, or where these are not in one run.
        """

    def reads(self, first: int, count: int) -> list[Read] | None:
        """Where the bytes of these elements are, one after the other, for what reads them itself, now.

        None where reading is not all that it takes. Of no elements each place where some are.
        """


class Taken(NamedTuple):
    """The operands of a tile, in their buffers."""

    seen: list[Sequence[memoryview]]
    """Of each, the bytes that its digest is of."""
    coded: dict[int, Coded]
    """What there is in the buffers, by operand, where that is codes."""


def take(
    readers: Sequence[Reader], buffers: Sequence[memoryview], first: int, count: int, *, codes: bool = False
) -> Taken:
    """Put the elements of all operands into their buffers; with `codes` as such, where these stand for them."""
    taken = Taken([], {})
    for place, (each, buffer) in enumerate(zip(readers, buffers, strict=False)):
        found = each.codes_into(buffer, first, count) if codes else None
        if found is not None:
            seen, taken.coded[place] = found
        else:
            seen = each.read_into(buffer, first, count)
        taken.seen.append(seen)
    return taken


def reader(operand: Operand, sources: Mapping[Path, Source], width: int) -> Reader:
    """The reader of an operand whose elements take `width` bytes, out of its files, which are open."""
    refs = [ref for ref in operand.refs if isinstance(ref, TensorRef)]
    if operand.is_decoded:
        return _decoded(operand, sources)
    if len(refs) == 1:
        return _One(sources[refs[0].path], refs[0].offset, width)
    return _Many(refs, sources, width)


def _decoded(operand: Operand, sources: Mapping[Path, Source]) -> Reader:
    """The reader of weights of which some are quantized. What makes numbers of them is loaded here, with torch."""
    from ires_kernels.streaming.decoded import Decoded, Several, Stored

    stored: dict[str, Stored] = {}
    each: list[Reader] = []
    for ref in operand.refs:
        if isinstance(ref, QuantizedRef):
            if ref.tensor not in stored:
                stored[ref.tensor] = Stored(ref)
            each.append(Decoded(ref, sources, stored[ref.tensor]))
        else:
            each.append(_One(sources[ref.path], ref.offset, 4))
    return each[0] if len(each) == 1 else Several(each, [ref.numel for ref in operand.refs])


class _One:
    """Elements that follow each other in one file."""

    def __init__(self, source: Source, offset: int, width: int) -> None:
        self._source = source
        self._offset = offset
        self._width = width

    def read_into(self, buffer: memoryview, first: int, count: int) -> Sequence[memoryview]:
        view = buffer[: count * self._width]
        self._source.read_into(view, self._offset + first * self._width)
        return (view,)

    def codes_into(self, *_: object) -> None:
        """They are no codes."""

    def reads(self, first: int, count: int) -> list[Read] | None:
        return self._source.reads(self._offset + first * self._width, count * self._width)


class _Many:
    """Elements in runs that lie anywhere. Those of a tile that follow each other in a file are read with one call.

    The rows of a permuted matrix are such runs: of 8 kB each, 128 in a tile of the CPU. With them an operand is read at
    three quarters of the speed of one run, from the page cache; with a call for each row at a third.
    """

    def __init__(self, refs: Iterable[TensorRef], sources: Mapping[Path, Source], width: int) -> None:
        refs = [ref for ref in refs if ref.nbytes]
        numbers = {path: number for number, path in enumerate(sources)}
        self._sources = list(sources.values())
        self._ends = list(accumulate([ref.nbytes for ref in refs]))
        # Which source, from where on there, from where on in the operand, and how many bytes.
        self._runs = [
            (numbers[ref.path], ref.offset, end - ref.nbytes, ref.nbytes)
            for ref, end in zip(refs, self._ends, strict=True)
        ]
        self._width = width

    def read_into(self, buffer: memoryview, first: int, count: int) -> Sequence[memoryview]:
        start, whole = first * self._width, buffer[: count * self._width]
        runs = sorted(self._cut(first, count))
        views: list[memoryview] = []
        at = here = end = -1
        for source, offset, begin, nbytes in runs:
            if offset != end or source != here or len(views) == _MOST_VIEWS:
                if views:
                    self._sources[here].read_views(views, at)
                views, at, here, end = [], offset, source, offset
            views.append(whole[begin - start : begin - start + nbytes])
            end += nbytes
        if views:
            self._sources[here].read_views(views, at)
        return (whole,)

    def codes_into(self, *_: object) -> None:
        """They are no codes."""

    def reads(self, first: int, count: int) -> list[Read] | None:
        cut = [(source, offset, nbytes) for source, offset, _, nbytes in self._cut(first, count)]
        found: list[Read] = []
        for number, offset, nbytes in cut or [(number, 0, 0) for number in range(len(self._sources))]:
            reads = self._sources[number].reads(offset, nbytes)
            if reads is None:
                return None
            found += reads
        return found

    def _cut(self, first: int, count: int) -> list[tuple[int, int, int, int]]:
        """The runs that make up some elements, in their order, the first and the last of them cut to these."""
        start, stop = first * self._width, (first + count) * self._width
        if start == stop:
            return []
        runs = self._runs[bisect_right(self._ends, start) : bisect_left(self._ends, stop) + 1]
        source, offset, begin, nbytes = runs[0]
        runs[0] = source, offset + start - begin, start, begin + nbytes - start
        source, offset, begin, nbytes = runs[-1]
        runs[-1] = source, offset, begin, stop - begin
        return runs


_MOST_VIEWS = min(os.sysconf("SC_IOV_MAX"), 1024)
"""Of one call."""
