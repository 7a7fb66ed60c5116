"""Whose a file or folder is, asked by its descriptor before it is taken up; and who may get at what we make.

In a folder that others can write to, any name may be there before us, and what lies under it may be theirs, a link out
of the folder, or a pipe. So what we make is made exclusively, and what we find is opened without following links, and
is ours only if its owner is who we are. With a key that users share (trust.py) its signature decides instead.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ires_kernels.files import trust
from ires_kernels.files.opening import CheckpointError, open_file
from ires_kernels.files.plain import Refused


class StoreError(Refused):
    """A folder that cannot be used or written, and why."""


class Foreign(StoreError):
    """State of a merge that nothing proves to be ours: it is not followed, and nothing of it is deleted."""


def unproved(path: object) -> Foreign:
    """The error for state whose signature is not there, or not right."""
    return Foreign(
        f"{path}: is not the state of a merge that you began here (no valid signature). If the folder came from "
        "elsewhere, delete it. If you began it where the key was another, name that one: --key PATH, or "
        f"{trust.VARIABLE}=PATH. If it was begun by ires_kernels 0.1.0, which signed nothing, go on with that version."
    )


def private_mode(mode: int) -> int:
    """Of what is unfinished: ours alone, or that of a group which shares the key."""
    return mode & (0o7770 if trust.is_shared() else 0o7700)


def check_owner(fd: int, path: Path, *, unsigned: bool = False) -> None:
    """Refuse with Foreign a file or folder of another user, unless a key was named that its signature has to prove.

    unsigned  nothing in it is signed
    """
    status = os.fstat(fd)
    whose = trust.stranger(status)
    if whose and (unsigned or not trust.is_explicit()) and trust.stranger(status, _shown_owner(fd, path)):
        raise Foreign(
            f"{path}: {whose}, and you are {trust.user_name(os.geteuid())}: it is not taken up. Have it removed by who "
            f"owns it, or work in another folder. Users who share a key ({trust.VARIABLE}, --key) go on with what "
            "others of them began."
        )


def make_private(fd: int) -> None:
    """Close a folder of ours that we have found to others."""
    status = os.fstat(fd)
    mode = private_mode(stat.S_IMODE(status.st_mode))
    if mode != stat.S_IMODE(status.st_mode):
        set_mode(fd, mode)


def set_mode(fd: int, mode: int) -> None:
    """Change the mode, where that is ours to change and the file system has modes."""
    try:
        os.fchmod(fd, mode)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def open_own(path: Path, *, write: bool = False) -> int:
    """Open a file of ours. Raises Foreign for what is not ours or no regular file, OSError as os.open does."""
    try:
        fd = open_file(path, flags=os.O_NOFOLLOW | (os.O_RDWR if write else 0))
    except CheckpointError as error:
        raise Foreign(f"{error}") from None
    except PermissionError:
        whose = trust.stranger(os.lstat(path))
        if not whose:
            raise
        raise Foreign(f"{path}: {whose}, and is closed to you.") from None
    try:
        check_owner(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_folder(path: str | Path, *, dir_fd: int | None = None) -> int:
    """Open a folder, which is no link to one."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, dir_fd=dir_fd)


def is_same(fd: int, path: Path) -> bool:
    """Whether an open file or folder still has this name."""
    try:
        mine, there = os.fstat(fd), os.lstat(path)
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def is_bare(name: object) -> bool:
    """Whether this names a file in a folder, and nothing outside of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def is_inner(name: object) -> bool:
    """Whether this names a file in a folder or below it."""
    return isinstance(name, str) and all(map(is_bare, name.split("/")))


class Access:
    """The most that group and others may do with what is made of other files: no more than with these.

    changed  the model that it is a new version of: it is not wider than that in any way
    read     what else it is made of: who cannot read this, cannot read it
    """

    def __init__(self, changed: Iterable[Path] = (), read: Iterable[Path] = ()) -> None:
        self.file, self.folder = 0o666, 0o777
        changed = list(changed)
        for path in [*changed, *read]:
            mode = os.stat(path).st_mode
            self._close(stat.S_IMODE(mode), 1 if stat.S_ISDIR(mode) else 4)
            if path in changed and stat.S_ISDIR(mode):
                self.folder &= mode | ~0o022
            elif path in changed:
                self.file &= mode | ~0o022

    def of(self, source: Path) -> int:
        """Mode of a file that is a copy of `source`."""
        narrow = Access(read=[source])
        return self.file & narrow.file

    def _close(self, mode: int, needed: int) -> None:
        for shift in (3, 0):
            if not mode >> shift & needed:
                self.file &= ~(7 << shift)
                self.folder &= ~(7 << shift)


def _shown_owner(fd: int, path: Path) -> int | None:
    """Who owns, as it is shown here, what we make beside `path`: on NFS with root_squash that is not who we are."""
    folder = path if stat.S_ISDIR(os.fstat(fd).st_mode) else path.parent
    probe = folder / f".ires-probe-{secrets.token_hex(8)}"
    try:
        made = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return None
        raise
    try:
        return os.fstat(made).st_uid
    finally:
        os.close(made)
        with suppress(OSError):
            os.unlink(probe)
