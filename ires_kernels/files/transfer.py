"""Bytes between memory and open files: all of them, or an OSError that says of which file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ires_kernels.files import interrupts
from ires_kernels.files.opening import open_file


class Hasher(Protocol):
    """Of hashlib, xxhash and the like."""

    def update(self, data: bytes | memoryview, /) -> None: ...


_CHUNK = 1 << 20  # bytes at a time of a side file


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put the path into an OSError that has none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, f"{path}") from error


def write_all(fd: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    """pwrite until all is written. Raises OSError with `path` in it."""
    length = len(data)
    with named(path):
        done = os.pwrite(fd, data, offset)
        while done < length:
            done += os.pwrite(fd, data[done:], offset + done)


def read_into(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from the file. Raises OSError with `path` in it, also where the file ends too early."""
    try:  # and `named` only after an error: entering it takes as long as reading a few bytes, as samples are
        done = os.preadv(fd, [view], offset)
        while done < len(view):
            count = os.preadv(fd, [view[done:]], offset + done)
            if not count:
                raise shrunk(path, offset + done)
            done += count
    except OSError:
        with named(path):
            raise


def read_views(fd: int, views: Sequence[memoryview], offset: int, path: Path) -> None:
    """`read_into` of several views, one after the other; no more of them than one call takes."""
    try:  # it may be one of some hundred calls for a tile, and `with` costs as much as a call that reads a row
        done = os.preadv(fd, views, offset)
    except OSError:
        with named(path):
            raise
    end = 0
    for view in views if done < sum(map(len, views)) else ():
        begin, end = end, end + len(view)
        if done < end:
            rest = max(0, done - begin)
            read_into(fd, view[rest:], offset + begin + rest, path)


def shrunk(path: Path, end: int) -> OSError:
    """The error of a file that ends before its last byte was read."""
    return OSError(errno.EIO, f"the file ends at byte {end}: it shrank while it was read", f"{path}")


def allocate(fd: int, size: int, path: Path) -> None:
    """Reserve space for all of a file, so that no later write runs out of it."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot promise
            os.ftruncate(fd, size)
            return
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, f"{path}") from error
        disk = os.fstatvfs(fd)
        free = disk.f_bavail * disk.f_frsize
        text = f"{error.strerror}: {size} bytes are needed, {free} are free. Make room, or write to another disk"
        raise OSError(error.errno, text, f"{path}") from error


def chunks(path: Path, hasher: Hasher, fd: int | None = None) -> Iterator[bytes]:
    """A file by pieces, hashed on the way. `fd`: where it is open already, and stays so."""
    with named(path), open(open_file(path) if fd is None else fd, "rb", closefd=fd is None) as file:
        while chunk := file.read(_CHUNK):
            interrupts.check()
            hasher.update(chunk)
            yield chunk
