"""Durable bytes: a new folder that appears under its name only when all of it is on the disk.

The folder is written as ``OUT.partial`` beside OUT and renamed last. The order is what survives a power cut: every file
is fsynced, then the folder, then the name changes, then the parent folder is fsynced. All files get their full size
before the first byte of data, so a full disk is known at once. A lock file in OUT.partial marks it as ours, and is held
with flock while a process works on it: so what a killed process left is told from what is in use, or foreign. It goes
last, after the renaming; to be killed between the two leaves a complete OUT with a stray hidden file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

MARKER = ".ires-lock"
"""The lock file."""
_SUFFIX = ".partial"


class StoreError(ValueError):
    """An output folder that cannot be used, and why."""


def check_destination(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse with StoreError to write the folder `out` where something is, or into one of the inputs."""
    if out.name in ("", "..") or out.suffix == ".safetensors":
        raise StoreError(f"{out}: the output is a new folder. Give it a name of its own.")
    if out.is_symlink():
        raise StoreError(f"{out}: is a symbolic link. Give the name of a new folder.")
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out}: is a file. Give the name of a new folder.")
    if out.exists() and os.listdir(out):
        raise StoreError(f"{out}: is not empty. Give the name of a new folder, or delete this one first.")
    if os.path.ismount(out):
        raise StoreError(f"{out}: is a mount point, which cannot be replaced. Give a new folder inside of it.")
    if not out.parent.is_dir():
        raise StoreError(f"{out}: its parent {out.parent} is not a folder. Create that one first.")
    place = Path(os.path.realpath(out))
    for path in inputs:
        real = Path(os.path.realpath(path))
        if place == real or real in place.parents:
            raise StoreError(f"{out}: lies in the input {path}. Give a folder outside of the inputs.")
        partial = partial_path(place)
        if partial == real or partial in real.parents:
            raise StoreError(f"{out}: the input {path} has the name that the unfinished output would get. Rename it.")


def is_unfinished(folder: Path) -> bool:
    """Whether `folder` is the remains of a run that never finished, or one under way."""
    return folder.name.endswith(_SUFFIX) and (folder / MARKER).exists()


class NewFile:
    """A file of a NewFolder, made with its full size and the bytes it begins with; threads write the rest."""

    def __init__(self, path: Path, head: bytes, size: int, *, sync: bool) -> None:
        self.path = path
        self._sync = sync
        self._left = size
        self._lock = threading.Lock()
        with _named(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _allocate(self._fd, size, path)
            self.write(head, 0)
        except BaseException:
            self.abandon()
            raise

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes nobody has written yet; whoever writes the last ones makes the file durable and closes it."""
        length = len(data)
        try:
            done = os.pwrite(self._fd, data, offset)
            while done < length:
                done += os.pwrite(self._fd, data[done:], offset + done)
            with self._lock:
                self._left -= length
                last = self._left == 0
            if last:
                if self._sync:
                    os.fsync(self._fd)
                self.abandon()
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{self.path}") from error

    def finished(self) -> bool:
        """Whether all of it was written."""
        return self._left == 0

    def abandon(self) -> None:
        """Close without another fsync."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class NewFolder:
    """A context in which the files of `out` are made; `commit` ends it, and leaving without removes everything."""

    def __init__(self, out: Path, *, sync: bool = True) -> None:
        self.out = out
        self.partial = partial_path(out)
        self._sync = sync
        self._lock = -1
        self._files: list[NewFile] = []
        self._renamed = False

    def __enter__(self) -> NewFolder:
        marker = self.partial / MARKER
        with _named(self.partial):
            try:
                os.mkdir(self.partial)
                mode = os.O_CREAT | os.O_EXCL
            except FileExistsError:
                mode = 0  # never made anew: the process that holds it may be about to give the folder its name
                if self.partial.is_symlink() or not is_unfinished(self.partial):
                    raise StoreError(
                        f"{self.partial}: is in the way: the output is written there until it is complete, and this is "
                        "nothing that an interrupted run left. Move it or delete it."
                    ) from None
            self._lock = os.open(marker, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | mode, 0o666)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine, there = os.fstat(self._lock), os.stat(marker, follow_symlinks=False)
                if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
                    raise FileNotFoundError(errno.ENOENT, "another process has just finished with it; try again")
                self._empty()
            except BaseException as error:
                os.close(self._lock)
                if isinstance(error, BlockingIOError):
                    raise StoreError(f"{self.partial}: another process is writing it. Wait for it to end.") from None
                raise
        return self

    def _empty(self) -> None:
        with os.scandir(self.partial) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                elif entry.name != MARKER:
                    os.unlink(entry.path)

    def create(self, name: str, head: bytes, size: int) -> NewFile:
        """A file of `size` bytes that begins with `head`. Raises OSError where there is no room for all of it."""
        file = NewFile(self.partial / name, head, size, sync=self._sync)
        self._files.append(file)
        return file

    def add(self, name: str, chunks: Iterable[bytes]) -> None:
        """A whole file from its bytes. `name` may have one folder in it."""
        path = self.partial / name
        with _named(path):
            path.parent.mkdir(exist_ok=True)
            with open(path, "xb") as file:
                file.writelines(chunks)
                file.flush()
                if self._sync:
                    os.fsync(file.fileno())

    def commit(self) -> None:
        """Give the folder its name. What was not durable before is when this returns."""
        unfinished = [file.path.name for file in self._files if not file.finished()]
        assert not unfinished, unfinished
        with _named(self.partial):
            if self._sync:
                for folder, _, _ in os.walk(self.partial, topdown=False):
                    _fsync_folder(folder)
        with _named(self.out):
            os.rename(self.partial, self.out)
            self._renamed = True
            if self._sync:
                _fsync_folder(self.out.parent)
            os.unlink(self.out / MARKER)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.abandon()
        if not self._renamed:
            with suppress(OSError):  # the error that brought us here matters more; the next run removes the rest
                self._empty()
                os.unlink(self.partial / MARKER)
                os.rmdir(self.partial)
        os.close(self._lock)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the path into an OSError that has none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, f"{path}") from error


def partial_path(out: Path) -> Path:
    """Where `out` is written until it is complete."""
    return out.with_name(out.name + _SUFFIX)


def _allocate(fd: int, size: int, path: Path) -> None:
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


def _fsync_folder(path: str | os.PathLike[str]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
