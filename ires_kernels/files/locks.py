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


class InUse(StoreError):
    """A folder in which another process is at work."""


_JUST_ENDED = "another process has just ended there. Give the command again."
_PATIENCE = 10.0
"""Seconds that a process waits for another one that begins, or looks, before it takes it for one that works there."""
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
        raise InUse(f"{path.parent}: another process has just taken it. Wait for it to end.") from None
    except FileNotFoundError:
        raise InUse(f"{path.parent}: {_JUST_ENDED}") from None
    try:
        if wanted:
            _take(fd, path)
        if not is_same(fd, path):
            raise InUse(f"{path.parent}: {_JUST_ENDED}")
    except BaseException as error:
        if make and isinstance(error, OSError):  # there are no locks, so no other process holds it
            os.unlink(path)
        os.close(fd)
        raise
    return fd


def lock_with_others(path: Path, *, wanted: bool = True) -> tuple[int, bool]:
    """Open the lock of a folder that several processes fill, or make it, and hold it together with them.

    Returns its descriptor, and whether it is held alone: then others wait for `hold_together`. Raises as `lock` does.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fd = open_own(path, write=True)
        except FileNotFoundError:
            with suppress(FileExistsError):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(path, flags, private_mode(0o660)))
            continue
        try:
            if not wanted:
                return fd, False
            alone = _try(fd, fcntl.LOCK_EX, path)
            if (alone or _try(fd, fcntl.LOCK_SH, path)) and is_same(fd, path):
                return fd, alone
            who = _holder(fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() > end:
            raise _busy(path, who)
        time.sleep(0.05)


def hold_together(fd: int, path: Path) -> None:
    """Let others hold a lock as well that is held alone."""
    end = time.monotonic() + _PATIENCE
    while not _try(fd, fcntl.LOCK_SH, path):  # another process may have been faster in between
        if time.monotonic() > end:
            raise _busy(path, _holder(fd))
        time.sleep(0.05)


def is_held_alone(fd: int, path: Path) -> bool:
    """Take a lock alone that is held together with others, if there are none; else it is lost."""
    return _try(fd, fcntl.LOCK_EX, path)


def holders(path: Path) -> list[str]:
    """The processes that hold a lock together, in words; of other machines nothing is known but that there are some."""
    try:
        fd = open_own(path, write=True)
    except (FileNotFoundError, PermissionError, StoreError):
        return []
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holders(fd) or ["processes of other machines"]
    except OSError as error:
        if error.errno not in _NONE:
            raise
    finally:
        os.close(fd)
    return []


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
        raise _busy(path, _holder(fd)) from None
    except OSError as error:
        raise _told(error, path) from None


def _try(fd: int, kind: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _told(error, path) from None
    return True


def _busy(path: Path, who: str) -> InUse:
    return InUse(f"{path.parent}: another process is writing it{who and f', {who}'}. Wait for it to end.")


def _told(error: OSError, path: Path) -> OSError:
    """The error of a file system, and the way out where it is that it has no locks."""
    if error.errno not in _NONE:
        return error
    text = (
        f"{error.strerror}: this file system has no locks (flock). Where no other process writes there, --no-lock "
        "(in Python lock=False) goes on without"
    )
    return OSError(error.errno, text, f"{path}")


def _holder(fd: int) -> str:
    """The process that holds the lock of an open file, as far as this can be known."""
    return next(iter(_holders(fd)), "")


def _holders(fd: int) -> list[str]:
    status = os.fstat(fd)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    found = []
    with suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if fields[1:2] == ["FLOCK"] and fields[5] == wanted and int(fields[4]) > 0:
                process = Path("/proc", fields[4])
                name = (process / "comm").read_text(errors="replace").strip()
                found.append(f"process {fields[4]} ({name}) of {trust.user_name(process.stat().st_uid)}")
    return found
