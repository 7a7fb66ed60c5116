"""Opening what is read: a model's folder comes from strangers, and so does every name in it.

Under any of these names may be a pipe, a socket or a device, on which a plain open or read waits for ever or never
ends; and a file may be of any size. So whatever is read is opened here: regular files only, without waiting, and what
is read as a whole not beyond a limit, which is looked at before the first byte. A name may also be a link to a file of
the reader's own, which would become part of what they merge and publish: `check_link` tells those that stay at home.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ires_kernels.files.plain import Refused

MAX_CONFIG = 1 << 24
"""Bytes of config.json and other settings; the largest that are known, with the names of 21,841 classes, have 2 MB."""
MAX_INDEX = 100_000_000
"""Bytes of an index, which names the tensors once more that the headers name; as much as the header of one file."""
MAX_MANIFEST = 500_000_000
"""Bytes of what a merge records of itself: some 500 a tensor, and in a residual 750 to 2,800 more of base, by its
dtype; the largest known models have 150,000 tensors."""

"""Files that a merge has open beside those of its target in place: with one thread, and with as many as may be."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a block device"),
)


class CheckpointError(Refused):
    """A file or folder that cannot be used, and why."""

    problems: Sequence[Mapping[str, Any]] = ()
    """Of models that do not fit together everything that is wrong, with the names of all tensors."""


def kind_of_file(mode: int) -> str:
    """What a file is by its st_mode, with an article."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a regular file")


def open_file(path: str | os.PathLike[str], *, dir_fd: int | None = None, flags: int = 0) -> int:
    """Open a regular file for reading, and return its descriptor. Never waits.

    dir_fd  the folder that a relative path is in
    flags   more of os.open, such as O_NOFOLLOW

    Raises CheckpointError for what is no regular file, and OSError, most often FileNotFoundError, as os.open does.
    """
    follow = not flags & os.O_NOFOLLOW
    # A device may do something when it is opened, so it is looked at before; and after, as it may be another by then.
    try:
        _check_regular(os.stat(path, dir_fd=dir_fd, follow_symlinks=follow).st_mode, path)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise CheckpointError(f"{os.fspath(path)}: {error.strerror}, wanted a regular file. Delete it.") from None
    flags |= os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        text = f"{error.strerror}: the limit is {limit}. Raise it (`ulimit -n`), or use fewer --threads"
        raise OSError(error.errno, text, os.fspath(path)) from None
    try:
        _check_regular(os.fstat(fd).st_mode, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_bytes(path: str | os.PathLike[str], limit: int, *, dir_fd: int | None = None, flags: int = 0) -> bytes:
    """All of a regular file of at most `limit` bytes. Arguments and errors as of `open_file`."""
    fd = open_file(path, dir_fd=dir_fd, flags=flags)
    try:
        return read_open(fd, limit, path)
    finally:
        os.close(fd)


def read_open(fd: int, limit: int, path: str | os.PathLike[str]) -> bytes:
    """All of an open file of at most `limit` bytes, from its first one on; `path` names it in errors."""
    size = os.fstat(fd).st_size
    if size > limit:
        raise CheckpointError(
            f"{os.fspath(path)}: has {size} bytes, wanted at most {limit}: it is not what its name says. "
            "Delete it, or copy or download it again."
        )
    # Not until there is no more: what says it has no size, such as a file of /proc, may have no end either.
    return read_start(fd, size, path)


def read_start(fd: int, size: int, path: str | os.PathLike[str]) -> bytes:
    """The first `size` bytes of an open file, or all of a shorter one."""
    parts: list[bytes] = []
    done = 0
    while done < size:
        try:
            part = os.pread(fd, size - done, done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        if not part:
            break
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def check_link(path: Path, folder: Path) -> os.stat_result | None:
    """Refuse a name below `folder` that leads out of it, by a link of its own or of a folder on the way.

    Returns what was found there, for whoever opens it to see that it is still that: others may put a link in its place.
    None where nothing is, or where nobody knows.

    The cache of the Hugging Face Hub keeps the files of a model beside its snapshots, whose files are links to them:
    models--X/snapshots/REVISION/NAME to models--X/blobs/HASH, and to nowhere else. `folder` itself may be a link.
    """
    home, (real, status) = Path(os.path.realpath(folder)), _look(path)
    if home in real.parents or real.parent in _blobs(home):
        return status
    raise CheckpointError(
        f"{path}: leads to {real}, outside of the model's folder, and would become part of what is written. "
        "Delete the link; or, if all of the model is your own, give --follow-links (follow_links=True)."
    )


def _look(path: Path) -> tuple[Path, os.stat_result | None]:
    """Where a path leads, and what is there: both of the same file, whatever others do meanwhile."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)  # which opens nothing, so it may be of any kind
        try:
            return Path(os.readlink(f"/proc/self/fd/{fd}")), os.fstat(fd)
        finally:
            os.close(fd)
    except OSError:  # a link to nothing, or there is no /proc
        return Path(os.path.realpath(path)), None


def _blobs(home: Path) -> list[Path]:
    """Where the Hub's cache keeps the files of the snapshot that a folder is, or is in."""
    return [
        revision.parent.parent / "blobs"
        for revision in (home, *home.parents)
        if revision.parent.name == "snapshots" and revision.parent.parent.name.startswith("models--")
    ]


def _check_regular(mode: int, path: str | os.PathLike[str]) -> None:
    if stat.S_ISLNK(mode):
        raise CheckpointError(f"{os.fspath(path)}: is a symbolic link, wanted a regular file. Delete it.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{os.fspath(path)}: is {kind_of_file(mode)}, wanted a regular file. Move it elsewhere.")
