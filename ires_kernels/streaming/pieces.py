"""How the elements of an operand get into the memory of a tile: one piece of a file, or many, or what is made of them.

A reader belongs to an operand of a step under way; the threads that work on its tiles share it.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.sources import LocalFile
from ires_kernels.planning.steps import Operand


class Read(NamedTuple):
    """Bytes of a file that is open."""

    fd: int
    offset: int
    nbytes: int
    path: Path


class Reader(Protocol):
    """What an operand is read with. Elements are numbers of the operand's dtype; of a copy they are bytes."""

    def read_into(self, buffer: memoryview, first: int, count: int) -> Sequence[memoryview]:
        """Put the elements from `first` on into the first bytes of the buffer.

        Returns the bytes that its digest is of, in their order: the elements themselves, or what they were made of.
        """

    def reads(self, first: int, count: int) -> list[Read] | None:
        """Where the bytes of these elements are, one after the other, for what reads them itself.

        None where reading is not all that it takes.
        """


def reader(operand: Operand, sources: Mapping[Path, LocalFile], width: int) -> Reader:
    """The reader of an operand whose elements take `width` bytes, out of its files, which are open.

    Raises TypeError for an operand that nothing here makes numbers of.
    """
    refs = [ref for ref in operand.refs if isinstance(ref, TensorRef)]
    if len(refs) < len(operand.refs):
        raise TypeError(f"nothing here decodes {operand.text!r} ({operand.role})")
    if len(refs) == 1:
        return _One(sources[refs[0].path], refs[0].offset, width)
    return _Many(refs, sources, width)


class _One:
    """Elements that follow each other in one file."""

    def __init__(self, source: LocalFile, offset: int, width: int) -> None:
        self._source = source
        self._offset = offset
        self._width = width

    def read_into(self, buffer: memoryview, first: int, count: int) -> Sequence[memoryview]:
        view = buffer[: count * self._width]
        self._source.read_into(view, self._offset + first * self._width)
        return (view,)

    def reads(self, first: int, count: int) -> list[Read]:
        source, width = self._source, self._width
        return [Read(source.fd, self._offset + first * width, count * width, source.path)]


class _Piece(NamedTuple):
    """Bytes of a file that belong to a place in a tile."""

    source: int
    offset: int
    at: int
    nbytes: int


class _Many:
    """Elements in runs that lie anywhere. Those of a tile that follow each other in a file are read with one call.

    The rows of a permuted matrix are such runs: of 8 kB each, 128 in a tile of the CPU.
    """

    def __init__(self, refs: Iterable[TensorRef], sources: Mapping[Path, LocalFile], width: int) -> None:
        refs = [ref for ref in refs if ref.nbytes]
        numbers = {path: number for number, path in enumerate(sources)}
        self._sources = list(sources.values())
        self._places = [(numbers[ref.path], ref.offset) for ref in refs]
        self._ends = list(accumulate(ref.nbytes for ref in refs))
        self._width = width

    def read_into(self, buffer: memoryview, first: int, count: int) -> Sequence[memoryview]:
        view = buffer[: count * self._width]
        pieces = sorted(self._pieces(first, count))
        begin = 0
        for i, (source, offset, _, nbytes) in enumerate(pieces, 1):
            if i == len(pieces) or i - begin == _MOST_VIEWS or pieces[i][:2] != (source, offset + nbytes):
                views = [view[at : at + size] for _, _, at, size in pieces[begin:i]]
                self._sources[source].read_views(views, pieces[begin].offset)
                begin = i
        return (view,)

    def reads(self, first: int, count: int) -> list[Read]:
        sources = self._sources
        return [
            Read(sources[number].fd, offset, nbytes, sources[number].path)
            for number, offset, _, nbytes in self._pieces(first, count)
        ]

    def _pieces(self, first: int, count: int) -> Iterator[_Piece]:
        """What makes up some elements, in their order."""
        start, stop = first * self._width, (first + count) * self._width
        at = start
        number = bisect_right(self._ends, start)
        while at < stop:
            source, offset = self._places[number]
            begin = self._ends[number - 1] if number else 0
            end = min(self._ends[number], stop)
            yield _Piece(source, offset + at - begin, at - start, end - at)
            at = end
            number += 1


_MOST_VIEWS = min(os.sysconf("SC_IOV_MAX"), 1024)
"""Of one call."""
