"""Whole files and folders: written, replaced and removed by name, and on the disk when a function here returns."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ires_kernels.files.transfer import named

HIDDEN = ".ires-"
"""What hidden names begin with."""


def hidden_path(path: Path, suffix: str) -> Path:
    return path.with_name(f"{HIDDEN}{path.name}{suffix}")


def write_file(path: Path, chunks: Iterable[bytes], *, sync: bool, mode: int = 0o666) -> None:
    """A new file from its bytes."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with named(path), open(os.open(path, flags, mode), "wb") as file:
        file.writelines(chunks)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, or put another one in its place with the same mode: all of it, durably, or nothing."""
    new = hidden_path(path, ".new")
    new.unlink(missing_ok=True)
    try:
        write_file(new, [content], sync=True)
        with named(path), suppress(FileNotFoundError):
            os.chmod(new, stat.S_IMODE(os.stat(path, follow_symlinks=False).st_mode))
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    fsync_folder(path.parent)


def remove_from(folder: int, name: str) -> None:
    """Remove a file, or a folder and all that is in it, from an open folder: whatever has the name of that by now."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=folder)
        return
    for _, folders, names, place in os.fwalk(name, topdown=False, dir_fd=folder):
        for inner in folders:
            if stat.S_ISLNK(os.stat(inner, dir_fd=place, follow_symlinks=False).st_mode):
                os.unlink(inner, dir_fd=place)
            else:
                os.rmdir(inner, dir_fd=place)
        for inner in names:
            os.unlink(inner, dir_fd=place)
    os.rmdir(name, dir_fd=folder)


def fsync_file(path: Path) -> None:
    """Make the bytes and times of a file durable."""
    with named(path), open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_all(path: Path) -> None:
    """Make durable a file, or a folder and every file in it, and its name."""
    for folder, _, names in os.walk(path):
        for name in names:
            if stat.S_ISREG(os.lstat(os.path.join(folder, name)).st_mode):
                fsync_file(Path(folder, name))
        fsync_folder(folder)
    if not path.is_dir():
        fsync_file(path)
    fsync_folder(path.parent)


def fsync_folder(path: str | os.PathLike[str], witness: int = -1, *, needed: bool = True) -> None:
    """Make durable which names the folder has.

    witness  descriptor of a file beside it: on XFS fsync of a folder is silent when the file system has just gone down,
             and that of a file is not
    needed   raise OSError where the file system cannot do this
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if not needed:
            return
        text = (
            f"{error.strerror}: this file system cannot make the names in a folder durable (fsync). --no-sync (in "
            "Python sync=False) does without; a power cut may then ruin the output"
        )
        raise OSError(error.errno, text, os.fspath(path)) from None
    finally:
        os.close(fd)
    if witness >= 0:
        os.fsync(witness)


def boot_id() -> str:
    """What changes whenever the machine starts: bytes that were not synced are trusted only until then."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
