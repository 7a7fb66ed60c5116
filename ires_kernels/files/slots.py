"""Where an update in place keeps old bytes, and the files that it changes. Bytes only: journal.py says when."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import xxhash

from ires_kernels.files import interrupts
from ires_kernels.files.ownership import is_same
from ires_kernels.files.store import named, read_into, write_all

_MAGIC = b"iresundo"
_HEAD = struct.Struct("<8sQQQ")  # magic, number of the window, offset in its file, bytes
_BLOCK = 4096  # of a slot's head, so that what it holds is aligned
_CHUNK = 1 << 20


class Extent(NamedTuple):
    """Bytes [start, stop) of the file `file`."""

    file: str
    start: int
    stop: int

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Begin and length of pieces of it, counted from its start."""
        length = self.stop - self.start
        return ((done, min(_CHUNK, length - done)) for done in range(0, length, _CHUNK))


class Targets:
    """Open files that are changed in place, by name; none of them may get another size meanwhile."""

    def __init__(self, files: Mapping[str, int], *, sync: bool) -> None:
        self._files = files
        self._sizes = {name: os.fstat(fd).st_size for name, fd in files.items()}
        self._sync = sync

    def read(self, file: str, view: memoryview, offset: int) -> None:
        """Fill `view`."""
        read_into(self._files[file], view, offset, Path(file))

    def write(self, file: str, data: memoryview, offset: int) -> None:
        """Write, having looked at the size: this write may make it what it was, with zeros for what was cut."""
        self._check_size(file)
        write_all(self._files[file], data, offset, Path(file))

    def make_durable(self, names: Iterable[str] | None = None) -> None:
        """fdatasync some files, or all of them."""
        if self._sync:
            for name in self._files if names is None else names:
                with named(Path(name)):
                    os.fdatasync(self._files[name])

    def check(self, folder: Path) -> None:
        """Raise OSError where a file has another size than when it was opened, or is not in `folder` now."""
        for name, fd in self._files.items():
            self._check_size(name)
            if not is_same(fd, folder / name):
                raise OSError(errno.EIO, "somebody has moved or replaced it while it was changed", f"{folder / name}")

    def _check_size(self, file: str) -> None:
        size = os.fstat(self._files[file]).st_size
        if size != self._sizes[file]:
            text = f"somebody has cut or lengthened it while it was changed, to {size} bytes from {self._sizes[file]}"
            raise OSError(errno.EIO, text, file)


class Slots:
    """Room for the old bytes of `count` windows at a time: window k goes to slot k % count, after a head with its hash.

    They take `size` bytes, which the file has that is given to `open`.
    """

    def __init__(self, windows: Sequence[Extent], count: int) -> None:
        self.count = count
        self._fd, self._path = -1, Path()
        self._windows = windows
        sizes = [_BLOCK + -(-(window.stop - window.start) // _BLOCK) * _BLOCK for window in windows]
        if count < len(windows):
            sizes = [max(sizes, default=0)] * count
        self._offsets = [0, *accumulate(sizes)]
        self.size = self._offsets[-1] if count else 0

    def open(self, fd: int, path: Path) -> None:
        """Use this file, which is open."""
        self._fd, self._path = fd, path

    def save(self, number: int, targets: Targets, *, sync: bool) -> None:
        """Keep the old bytes of a window."""
        window = self._windows[number]
        offset = self._offsets[number % self.count]
        head = self._head(number)
        hasher = xxhash.xxh3_128(head + window.file.encode())
        buffer = memoryview(bytearray(min(_CHUNK, window.stop - window.start)))
        for done, length in window.chunks():
            part = buffer[:length]
            targets.read(window.file, part, window.start + done)
            hasher.update(part)
            write_all(self._fd, part, offset + _BLOCK + done, self._path)
        write_all(self._fd, head + hasher.digest(), offset, self._path)
        if sync:
            with named(self._path):
                os.fdatasync(self._fd)

    def held(self, numbers: Iterable[int]) -> list[int]:
        """Those of the windows whose old bytes are in a slot."""
        return [number for number in numbers if self._holds(number)] if self.count else []

    def put_back(self, numbers: Iterable[int], targets: Targets) -> None:
        """Write the old bytes of windows that are `held` where they were, durably."""
        files = set()
        for number in numbers:
            interrupts.check()
            window = self._windows[number]
            for done, length in window.chunks():
                old = self._read(length, self._offsets[number % self.count] + _BLOCK + done)
                targets.write(window.file, old, window.start + done)
            files.add(window.file)
        targets.make_durable(files)

    def _holds(self, number: int) -> bool:
        window = self._windows[number]
        offset = self._offsets[number % self.count]
        raw = bytes(self._read(_HEAD.size + 16, offset))
        if raw[: _HEAD.size] != self._head(number):
            return False
        hasher = xxhash.xxh3_128(raw[: _HEAD.size] + window.file.encode())
        for done, length in window.chunks():
            hasher.update(self._read(length, offset + _BLOCK + done))
        return hasher.digest() == raw[_HEAD.size :]  # else the run ended while it was saved, before it was changed

    def _head(self, number: int) -> bytes:
        window = self._windows[number]
        return _HEAD.pack(_MAGIC, number, window.start, window.stop - window.start)

    def _read(self, count: int, offset: int) -> memoryview:
        view = memoryview(bytearray(count))
        read_into(self._fd, view, offset, self._path)
        return view
