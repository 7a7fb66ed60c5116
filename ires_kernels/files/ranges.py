"""A file of a new folder that several processes write, each its own range of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from ires_kernels.files.new_file import NewFile, Reserved, meddled
from ires_kernels.files.ownership import is_same
from ires_kernels.files.transfer import read_into
from ires_kernels.files.unfinished import PART

_END = 1 << 16
"""Bytes at both ends of a range that are read again before the file gets its name: on NFS two machines may write to
one page of a file, each its own bytes, and this is where one could have undone what the other did."""


class Range(NewFile):
    """The part of a file that one of several processes writes; it is recorded, and not renamed."""

    def __init__(
        self,
        path: Path,
        made: Reserved,
        record: Callable[[], bytes],
        start: int,
        stop: int,
        *,
        operation: bytes,
        attempt: str,
    ) -> None:
        super().__init__(path, made, record, operation=operation, sync=True)
        self._attempt = f"{attempt}-{start}-{stop}"
        self._left = stop - start
        self._start, self._stop = start, stop
        size = min(_END, stop - start)
        self._ends = {start: bytearray(size), stop - size: bytearray(size)}

    def write(self, data: bytes | memoryview, offset: int) -> None:
        for place, end in self._ends.items():
            low, high = max(offset, place), min(offset + len(data), place + len(end))
            if low < high:
                end[low - place : high - place] = data[low - offset : high - offset]
        super().write(data, offset)

    def _check(self) -> None:
        super()._check()
        if not is_same(self._fd, self._temporary):  # it has its name by now, or is gone
            raise meddled(self._temporary)

    def _conclude(self, status: os.stat_result) -> None:
        hasher = xxhash.xxh3_128()
        for place in dict.fromkeys((self._start, self._stop - min(_END, self._stop - self._start))):
            hasher.update(self._ends[place])
        about = f"{status.st_size} {status.st_ino} {self._start} {self._stop} {hasher.hexdigest()}\n"
        self._write_record(self._attempt + PART, about.encode() + self._record())


class Together(NewFile):
    """A file of which all ranges are written."""

    def __init__(
        self, path: Path, made: Reserved, record: Callable[[], bytes], *, operation: bytes, attempt: str, sync: bool
    ) -> None:
        super().__init__(path, made, record, operation=operation, sync=sync)
        self._attempt = attempt


def hash_of_ends(fd: int, start: int, stop: int, path: Path) -> str:
    """The hash of both ends of a range."""
    size = min(_END, stop - start)
    hasher = xxhash.xxh3_128()
    for place in dict.fromkeys((start, stop - size)):
        os.posix_fadvise(fd, place, size, os.POSIX_FADV_DONTNEED)  # to see what the server has, where there is one
        view = memoryview(bytearray(size))
        read_into(fd, view, place, path)
        hasher.update(view)
    return hasher.hexdigest()
