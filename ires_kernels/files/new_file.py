"""One file of a new folder: it has its full size at once, threads write its bytes, and it gets its name last."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ires_kernels.files.durable import hidden_path, write_file
from ires_kernels.files.ownership import is_same, private_mode
from ires_kernels.files.transfer import named, write_all
from ires_kernels.files.unfinished import RECORD, TEMPORARY, signed_record


class Reserved(NamedTuple):
    """A file of a NewFolder that has its full size, and the bytes that it begins with."""

    size: int
    written: int
    """Bytes at its beginning."""
    dev: int
    ino: int


class NewFile:
    """A file of a NewFolder that is reserved, of which threads write the rest.

    It is open from the first of their writes to the last only: a process may open some thousand files or fewer, and a
    model may have more.
    """

    def __init__(
        self,
        path: Path,
        made: Reserved,
        record: Callable[[], bytes],
        *,
        operation: bytes = b"",
        attempt: str = "",
        sync: bool,
    ) -> None:
        """`attempt`: what the hidden names have in them besides, where other processes may make the same file."""
        self.path = path
        self.identity: tuple[int, ...] = ()
        """Of the complete file."""
        self._temporary = hidden_path(path, attempt + TEMPORARY)
        self._attempt = attempt
        self._operation = operation
        self._record = record
        self._sync = sync
        self._made = made
        self._left = made.size - made.written
        self._lock = threading.Lock()
        self._fd = -1
        self._finished = False

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes nobody has written yet; whoever writes the last ones makes the file durable and names it."""
        self._open()
        self._check()  # before this write may make it as long as it was, with zeros for what was cut
        write_all(self._fd, data, offset, self.path)
        with self._lock:
            self._left -= len(data)
            last = self._left == 0
        if last:
            self.finish()

    def finish(self) -> None:
        """Make the file durable, then what is to be recorded of it, and give it its name."""
        if self._finished:
            return
        assert self._left == 0, f"{self.path.name}: {self._left} bytes were not written"
        self._open()
        with named(self.path):
            if self._sync:
                os.fsync(self._fd)
            self._check()
            if not is_same(self._fd, self._temporary):
                raise meddled(self._temporary)
            status = os.fstat(self._fd)
            self.identity = identity_of(status, self._sync)
            self.abandon()
            self._conclude(status)
            self._finished = True

    def _conclude(self, status: os.stat_result) -> None:
        """All bytes are there, and durable."""
        self._write_record(self._attempt + RECORD, stamp_of(status) + self._record())
        os.rename(self._temporary, self.path)

    def _write_record(self, suffix: str, content: bytes) -> None:
        path = hidden_path(self.path, suffix)
        content = signed_record(self._operation, self.path.name, content)
        write_file(path, [content], sync=self._sync, mode=private_mode(0o660))

    def _open(self) -> None:
        """Open the file that was made, where it is not open."""
        with self._lock, named(self.path):
            if self._fd < 0:
                fd = os.open(self._temporary, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) != (self._made.dev, self._made.ino):
                    os.close(fd)
                    raise meddled(self._temporary)
                self._fd = fd

    def _check(self) -> None:
        if os.fstat(self._fd).st_size != self._made.size:
            raise meddled(self._temporary)

    def abandon(self) -> None:
        """Close as it is."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def meddled(path: Path) -> OSError:
    text = "somebody has cut, written or replaced it before all was complete. The same command makes it again"
    return OSError(errno.EIO, text, f"{path}")


def stamp_of(status: os.stat_result) -> bytes:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}\n".encode()


def identity_of(status: os.stat_result, sync: bool) -> tuple[int, ...]:
    """What a file of ours stays; a server may still set the time of one that was not synced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns if sync else 0
