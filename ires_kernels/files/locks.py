"""The lock of a folder that is being worked on: a file that only its owner can open, held with flock."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from ires_kernels.files import trust
from ires_kernels.files.opening import CheckpointError, open_file
from ires_kernels.files.ownership import StoreError, is_same, open_own, private_mode

_JUST_ENDED = "another process has just ended there. Give the command again."
_NONE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""What flock says where a file system has no locks."""


def lock(path: Path, *, make: bool = False, wanted: bool = True) -> int:
    """Open and lock a file that marks a folder as being worked on; its descriptor holds the lock.

    make    make it; it must not be there
    wanted  False: do without the lock, where the user says that no other process works there

    Raises StoreError when another process holds it, OSError where there are no locks.
    """
    try:
        if make:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, private_mode(0o660))
        else:
            fd = open_own(path, write=True)
    except FileExistsError:
        raise StoreError(f"{path.parent}: another process has just taken it. Wait for it to end.") from None
    except FileNotFoundError:
        raise StoreError(f"{path.parent}: {_JUST_ENDED}") from None
    try:
        if wanted:
            _take(fd, path)
        if not is_same(fd, path):
            raise StoreError(f"{path.parent}: {_JUST_ENDED}")
    except BaseException as error:
        if make and isinstance(error, OSError):  # there are no locks, so no other process holds it
            os.unlink(path)
        os.close(fd)
        raise
    return fd


def holder(path: Path) -> str:
    """Which process holds the lock, in words; nothing where none does, or where there is no such file of ours."""
    try:
        fd = open_file(path, flags=os.O_NOFOLLOW)
    except (FileNotFoundError, PermissionError, CheckpointError):
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(fd) or "another process"
    except OSError as error:
        if error.errno not in _NONE:
            raise
    finally:
        os.close(fd)
    return ""


def _take(fd: int, path: Path) -> None:
    try:
        for _ in range(20):  # `holder` of another process may look at it just now
            with suppress(BlockingIOError):
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.01)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = _holder(fd)
        raise StoreError(
            f"{path.parent}: another process is writing it{who and f', {who}'}. Wait for it to end."
        ) from None
    except OSError as error:
        if error.errno not in _NONE:
            raise
        text = (
            f"{error.strerror}: this file system has no locks (flock). Where no other process writes there, --no-lock "
            "(in Python lock=False) goes on without"
        )
        raise OSError(error.errno, text, f"{path}") from None


def _holder(fd: int) -> str:
    """The process that holds the lock of an open file, as far as this can be known."""
    status = os.fstat(fd)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1:2] == ["FLOCK"] and fields[5] == wanted and int(fields[4]) > 0:
                process = Path("/proc", fields[4])
                name = (process / "comm").read_text(errors="replace").strip()
                return f"process {fields[4]} ({name}) of {trust.user_name(process.stat().st_uid)}"
    return ""
