"""Files as memory: mmap with what Python's own module lacks, which is to change a mapping where it stands.

Python's mmap object also keeps a descriptor for as long as it lives; these keep none, so that a model of a thousand
files can be open. The memory is unmapped when the last user of `Pages.buffer` is gone.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path

_POPULATE = {False: 22, True: 23}  # of madvise, for reading and for writing; since Linux 5.14
_LOST = {errno.EFAULT, 133}  # and EHWPOISON; other errors come from a kernel that does not know this advice
_MS_SYNC = 4
_NORESERVE = 0x4000  # private pages that nobody writes need no swap
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Pages:
    """All of the file that `fd` is open on: `size` bytes, which must not be more than it has.

    shared  what is written goes to the file. Otherwise it goes to private memory of this process, page by page, and
            never to the file: nothing that has the address can harm it, and nothing crashes
    gone    called just before the memory is unmapped
    """

    def __init__(self, fd: int, size: int, path: Path, *, shared: bool, gone: Callable[[], None]) -> None:
        self.path = path
        self.size = size
        self._identity = _identity(fd)
        self.start: int = _map(None, size, shared, fd, path)
        self.buffer = (ctypes.c_char * size).from_address(self.start)
        """What tensors are made over; they hold it, and it holds the memory."""
        finalizer = weakref.finalize(self.buffer, _unmap, self.start, size, gone)
        finalizer.atexit = False  # tensors may outlive it then

    def detach(self) -> None:
        """Let what is written from now on stay in this process. The addresses, and what is read there, stay.

        What was written before is in the page cache, and `os.fsync` of the file makes it durable.
        """
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _identity(fd) != self._identity:
                raise OSError(errno.ESTALE, "is no longer the file that was mapped", f"{self.path}")
            _map(self.start, self.size, False, fd, self.path)
        finally:
            os.close(fd)

    def forbid(self) -> None:
        """Let every access end the process: the last resort where `detach` is impossible."""
        _libc.mprotect(self.start, self.size, 0)

    def sync(self) -> None:
        """Write what has changed to the disk. Raises OSError where that fails."""
        if _libc.msync(self.start, self.size, _MS_SYNC):
            raise _error(self.path)


def populate(address: int, nbytes: int, written: bool, path: Path) -> None:
    """Have all pages of memory that is mapped from a file, for reading or writing, so that no fault stops its user.

    Raises OSError where the file has become shorter, or the disk is full or fails, of which a fault tells by SIGBUS.
    """
    start = address & -mmap.PAGESIZE
    if _libc.madvise(start, address + nbytes - start, _POPULATE[written]) and ctypes.get_errno() in _LOST:
        text = "cannot be read or written where it is mapped: it was cut, or the disk is full or fails"
        raise OSError(errno.EIO, text, f"{path}")


def _map(start: int | None, size: int, shared: bool, fd: int, path: Path) -> int:
    flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | _NORESERVE
    if start is not None:
        flags |= 0x10  # MAP_FIXED: in place of what is there, at once
    address = _libc.mmap(start, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot be mapped into memory: {os.strerror(number)}", f"{path}")
    return int(address)


def _unmap(start: int, size: int, gone: Callable[[], None]) -> None:
    gone()
    _libc.munmap(start, size)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _error(path: Path) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), f"{path}")
