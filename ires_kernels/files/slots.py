"""Where an update in place keeps old bytes, and the files that it changes. Bytes only: journal.py says when."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import xxhash

from ires_kernels.files import interrupts
from ires_kernels.files.ownership import is_same
from ires_kernels.files.transfer import named, read_into, write_all

_MAGIC = b"iresundo"
_HEAD = struct.Struct("<8sQQQ")  # magic, number of the window, offset in its file, bytes
_BLOCK = 4096  # of a slot's head, so that what it holds is aligned
_CHUNK = 1 << 20
MOST_OPEN = 16
"""Files that stay open though nobody is using them."""


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
    """The files that are changed in place, by name; none of them may get another size meanwhile, or be another.

    They are opened when they are needed, and no more than MOST_OPEN of them stay open that nobody is using: a process
    may open a thousand files or fewer. What was written to a file is durable before it is closed on the way, since only
    who has it open is sure to learn that it could not be written.

    open_file  opens the file of a name for reading and writing
    """

    def __init__(self, names: Iterable[str], open_file: Callable[[str], int], *, sync: bool) -> None:
        self._open_file = open_file
        self._sync = sync
        self._lock = threading.Lock()
        self._fds: dict[str, int] = {}  # open ones, the last used one last
        self._users: Counter[str] = Counter()
        self._written: set[str] = set()  # and not durable
        self._known: dict[str, os.stat_result] = {}
        try:
            for name in names:
                with self._using(name):
                    pass
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close them as they are; nobody may be using one."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def read(self, file: str, view: memoryview, offset: int) -> None:
        """Fill `view`."""
        with self._using(file) as fd:
            read_into(fd, view, offset, Path(file))

    def write(self, file: str, data: memoryview, offset: int) -> None:
        """Write, having looked at the size: this write may make it what it was, with zeros for what was cut."""
        with self._using(file) as fd:
            self._check_size(file, fd)
            try:
                write_all(fd, data, offset, Path(file))
            finally:
                self._written.add(file)

    def make_durable(self, names: Iterable[str] | None = None) -> None:
        """fdatasync some files, or all of them."""
        if self._sync:
            for name in self._known if names is None else names:
                with self._using(name) as fd, named(Path(name)):
                    self._written.discard(name)  # whoever is writing now adds it again
                    os.fdatasync(fd)

    def check(self, folder: Path) -> None:
        """Raise OSError where a file has another size than when it was opened, or is not in `folder` now."""
        for name in self._known:
            with self._using(name) as fd:
                self._check_size(name, fd)
                if not is_same(fd, folder / name):
                    raise _replaced(f"{folder / name}")

    @contextmanager
    def _using(self, name: str) -> Iterator[int]:
        with self._lock:
            if name not in self._fds:
                self._make_room()
                self._open(name)
            self._fds[name] = fd = self._fds.pop(name)
            self._users[name] += 1
        try:
            yield fd
        finally:
            with self._lock:
                self._users[name] -= 1

    def _open(self, name: str) -> None:
        self._fds[name] = fd = self._open_file(name)
        status = os.fstat(fd)
        known = self._known.setdefault(name, status)
        if (status.st_dev, status.st_ino) != (known.st_dev, known.st_ino):
            raise _replaced(name)

    def _make_room(self) -> None:
        """Close what was used longest ago, if there is enough that nobody is using."""
        idle = [name for name in self._fds if not self._users[name]]
        if len(idle) >= MOST_OPEN:
            name = idle[0]
            if self._sync and name in self._written:
                self._written.discard(name)
                with named(Path(name)):
                    os.fdatasync(self._fds[name])
            os.close(self._fds.pop(name))

    def _check_size(self, file: str, fd: int) -> None:
        size, known = os.fstat(fd).st_size, self._known[file].st_size
        if size != known:
            text = f"somebody has cut or lengthened it while it was changed, to {size} bytes from {known}"
            raise OSError(errno.EIO, text, file)


def _replaced(path: str) -> OSError:
    return OSError(errno.EIO, "somebody has moved or replaced it while it was changed", path)


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
