"""Whole copies of files; clones, which share blocks until one of the two is written, where the file system can."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from ires_kernels.files import interrupts
from ires_kernels.files.ownership import set_mode
from ires_kernels.files.transfer import allocate, named

_FICLONE = 0x40049409
_CHUNK = 1 << 28
_NOT_CLONED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}


def clone(source: int, copy: int) -> bool:
    """Make one open file a clone of another. False where the file system does not do that; raises OSError."""
    try:
        fcntl.ioctl(copy, _FICLONE, source)
    except OSError as error:
        if error.errno in _NOT_CLONED:
            return False
        raise
    return True


def fill(source: int, copy: int, size: int, path: Path) -> None:
    """Write `size` bytes of one open file into another, which is `path`, and which gets its room first.

    Raises OSError where there is none, or where the source is shorter.
    """
    allocate(copy, size, path)
    done = 0
    with named(path):
        while done < size:
            count = _send(source, copy, min(_CHUNK, size - done), done)
            interrupts.check()
            if not count:
                raise OSError(errno.EIO, f"the file that is copied there ends at byte {done}: it was cut")
            done += count


def take_after(copy: int, source: int) -> None:
    """Give one open file the owner, mode, times and extended attributes of another, as far as that is allowed."""
    status = os.fstat(source)
    if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        with suppress(OSError):  # only root may give files away, and not everywhere
            os.fchown(copy, status.st_uid, status.st_gid)
    set_mode(copy, stat.S_IMODE(status.st_mode))
    with suppress(OSError):  # a file system may have none, or keep some of them for itself
        for name in os.listxattr(source):
            os.setxattr(copy, name, os.getxattr(source, name))
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))


def check_room(fd: int, size: int, path: Path) -> None:
    """Refuse with OSError to go on where the file system of an open file has not so many bytes free."""
    disk = os.fstatvfs(fd)
    free = disk.f_bavail * disk.f_frsize
    if free < size:
        text = f"No space left on device: what is written takes up to {size} bytes, {free} are free. Make room"
        raise OSError(errno.ENOSPC, text, f"{path}")


def _send(source: int, copy: int, count: int, offset: int) -> int:
    """Up to `count` bytes at `offset`, without a detour through this process; returns how many."""
    os.lseek(copy, offset, os.SEEK_SET)
    return os.sendfile(copy, source, offset, count)
