"""Durable bytes: a new folder that appears under its name only when all of it is on the disk.

The folder is written as ``OUT.partial`` beside OUT and renamed last. The order is what survives a power cut: every file
is fsynced before it gets its name, then the folder, then the name of that changes, then the parent folder is fsynced.
All files get their full size before the first byte of data, so a full disk is known at once.

In OUT.partial a file is called ``.ires-NAME.tmp`` until it is complete and durable. A record of its size and time, and
of what was learnt while it was written, is made durable as ``.ires-NAME.done`` before that; so a file under its own
name, which is what its record says, is never written again by the run that takes up an interrupted one. The lock file
says whose folder it is: it holds the identity of the operation and is held with flock while a process works. Lock and
records go last, after the renaming; to be killed between the two leaves a complete OUT with stray hidden files.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from ires_kernels import interrupts
from ires_kernels.opening import open_file

MARKER = ".ires-lock"
"""The lock file: a line with the identity of the operation, then what `NewFolder` was given to keep there."""
_SUFFIX = ".partial"
_HIDDEN, _TEMPORARY, _RECORD = ".ires-", ".tmp", ".done"


NO_THREAD = (
    "the system starts no more threads, and an update in place needs one beside the computation: raise the limit on "
    "processes (`ulimit -u`), or that of the container (pids.max)"
)
"""What an OSError says then."""
_JUST_ENDED = "another process has just ended there. Give the command again."
_CHUNK = 1 << 20  # bytes at a time of a side file


class Hasher(Protocol):
    """Of hashlib, xxhash and the like."""

    def update(self, data: bytes, /) -> None: ...


class StoreError(ValueError):
    """An output folder that cannot be used, and why."""


class LostError(StoreError):
    """A model that is part old and part new, and nobody knows which part is."""


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
    return os.path.exists(folder / MARKER) and os.path.realpath(folder).endswith(_SUFFIX)


class NewFile:
    """A file of a NewFolder, made with its full size and the bytes it begins with; threads write the rest."""

    def __init__(self, path: Path, head: bytes, size: int, record: Callable[[], bytes], *, sync: bool) -> None:
        self.path = path
        self._temporary = _hidden(path, _TEMPORARY)
        self._record = record
        self._sync = sync
        self._left = size
        self._lock = threading.Lock()
        with named(path):
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            allocate(self._fd, size, path)
            write_all(self._fd, head, 0, path)
            self._left -= len(head)
        except BaseException:
            self.abandon()
            raise

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes nobody has written yet; whoever writes the last ones makes the file durable and names it."""
        write_all(self._fd, data, offset, self.path)
        with self._lock:
            self._left -= len(data)
            last = self._left == 0
        if last:
            self.finish()

    def finish(self) -> None:
        """Make the file durable, then what is to be recorded of it, and give it its name."""
        if self._fd < 0:
            return
        assert self._left == 0, f"{self.path.name}: {self._left} bytes were not written"
        with named(self.path):
            if self._sync:
                os.fsync(self._fd)
            stamp = _stamp(os.fstat(self._fd))
            self.abandon()
            write_file(_hidden(self.path, _RECORD), [stamp, self._record()], sync=self._sync)
            os.rename(self._temporary, self.path)

    def abandon(self) -> None:
        """Close as it is."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class NewFolder:
    """A context in which the files of `out` are made; `commit` ends it.

    identity  one line of words: what an earlier run with the same line, or with its first word alone, has completed is
              kept; with the same first word it is done again, with another it is refused
    keep      bytes for the lock file, for whoever finds the unfinished folder

    Leaving without `commit` keeps what is complete, or removes everything where nothing is, or where an error of the
    inputs, a ValueError, makes it worthless. Raises StoreError for a folder that is in use or somebody else's.
    """

    def __init__(self, out: Path, identity: str, keep: bytes, *, sync: bool = True) -> None:
        self.out = out
        self.partial = partial_path(out)
        self.finished: dict[str, bytes] = {}
        """Files that need not be made, by name, and what was recorded of them."""
        self._identity = identity.encode()
        self._keep = keep
        self._sync = sync
        self._lock = -1
        self._files: list[NewFile] = []
        self._renamed = False

    def __enter__(self) -> NewFolder:
        with named(self.partial):
            try:
                os.mkdir(self.partial)
                mode = os.O_CREAT | os.O_EXCL
            except FileExistsError:
                # Never made anew: the process that holds it may be about to give the folder its name.
                mode = 0 if self.partial.is_symlink() or not _is_empty(self.partial) else os.O_CREAT | os.O_EXCL
                if mode == 0 and (self.partial.is_symlink() or not is_unfinished(self.partial)):
                    raise StoreError(
                        f"{self.partial}: is in the way: the output is written there until it is complete, and this is "
                        "nothing that an interrupted run left. Move it or delete it."
                    ) from None
            self._lock = lock(self.partial / MARKER, mode)
            try:
                self._take_over()
            except StoreError:
                os.close(self._lock)
                raise
            except BaseException as error:
                self._leave(error)
                raise
        return self

    def _take_over(self) -> None:
        """Keep what an interrupted run of the same operation has completed, and nothing else."""
        names = set(os.listdir(self.partial))
        complete = [name for name in sorted(names) if _hidden(Path(name), _RECORD).name in names]
        identity = os.pread(self._lock, 4096, 0).partition(b"\n")[0]
        name_of_mine = self._identity.split()[0]
        if complete and identity.split()[:1] != [name_of_mine]:
            raise StoreError(
                f"{self.partial}: holds {len(complete)} complete files of another operation. "
                f"Finish that one with `ires resume {self.out}`, or remove it with `ires rollback {self.out}`."
            )
        if identity in (self._identity, name_of_mine):
            for name in complete:
                stamp, _, record = _hidden(self.partial / name, _RECORD).read_bytes().partition(b"\n")
                if stamp + b"\n" == _stamp(os.stat(self.partial / name)):  # else somebody has changed it since
                    self.finished[name] = record
        self._empty()
        if identity != self._identity:
            os.ftruncate(self._lock, 0)
            write_all(self._lock, self._identity + b"\n" + self._keep, 0, self.partial / MARKER)
            if self._sync:
                os.fsync(self._lock)

    def _empty(self) -> None:
        """Remove all but the lock, and the complete files with their records."""
        kept = {MARKER, *self.finished, *(_hidden(Path(name), _RECORD).name for name in self.finished)}
        with os.scandir(self.partial) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                elif entry.name not in kept:
                    os.unlink(entry.path)

    def create(self, name: str, head: bytes, size: int, record: Callable[[], bytes] = bytes) -> NewFile:
        """A file of `size` bytes that begins with `head`. Raises OSError where there is no room for all of it.

        `record` is called when all of it was written; its bytes come back in `finished` if the run is interrupted.
        """
        file = NewFile(self.partial / name, head, size, record, sync=self._sync)
        self._files.append(file)
        return file

    def add(self, name: str, chunks: Iterable[bytes]) -> None:
        """A whole file from its bytes. `name` may have folders in it."""
        path = self.partial / name
        with named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, chunks, sync=self._sync)

    def finish_files(self) -> None:
        """Every file that was created is written, and gets its name."""
        for file in self._files:
            file.finish()

    def commit(self) -> None:
        """Give the folder its name. What was not durable before is when this returns."""
        self.finish_files()
        with named(self.partial):
            if self._sync:
                for folder, _, _ in os.walk(self.partial, topdown=False):
                    fsync_folder(folder)
        with named(self.out):
            os.rename(self.partial, self.out)
            self._renamed = True
            if self._sync:
                fsync_folder(self.out.parent, self._lock)
            tidy(self.out)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        for file in self._files:
            file.abandon()
        if not self._renamed:
            with suppress(OSError):  # the error that brought us here matters more; the next run removes the rest
                if isinstance(error, ValueError):
                    self.finished = {}
                else:
                    names = set(os.listdir(self.partial))
                    self.finished = {n: b"" for n in names if _hidden(Path(n), _RECORD).name in names}
                self._empty()
                if not self.finished:
                    os.unlink(self.partial / MARKER)
                    os.rmdir(self.partial)
        os.close(self._lock)


def read_kept(out: Path) -> bytes:
    """What the unfinished output `out` was given to keep in its lock file."""
    path = partial_path(out) / MARKER
    with named(path):
        return path.read_bytes().partition(b"\n")[2]


def discard(out: Path) -> None:
    """Remove the unfinished output `out`. Raises StoreError when a process is writing it."""
    partial = partial_path(out)
    with named(partial):
        fd = lock(partial / MARKER)
        try:
            for name in sorted(os.listdir(partial), key=MARKER.__eq__):
                path = partial / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            partial.rmdir()
            fsync_folder(partial.parent, fd)
        finally:
            os.close(fd)


def tidy(out: Path) -> None:
    """Remove from the complete folder `out` what only its writing needed, the lock last."""
    for name in sorted(os.listdir(out), key=MARKER.__eq__):
        if name == MARKER or (name.startswith(_HIDDEN) and name.endswith(_RECORD)):
            os.unlink(out / name)


def lock(path: Path, mode: int = 0) -> int:
    """Open and lock a file that marks a folder as being worked on; its descriptor holds the lock.

    `mode`: flags for opening, to make it. Raises StoreError when another process holds it.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | mode, 0o666)
    except FileExistsError:
        raise StoreError(f"{path.parent}: another process has just taken it. Wait for it to end.") from None
    except FileNotFoundError:
        raise StoreError(f"{path.parent}: {_JUST_ENDED}") from None
    try:
        for _ in range(20):  # `is_locked` of another process may look at it just now
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine, there = os.fstat(fd), os.stat(path, follow_symlinks=False)
        if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
            raise StoreError(f"{path.parent}: {_JUST_ENDED}")
    except BaseException as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            raise StoreError(f"{path.parent}: another process is writing it. Wait for it to end.") from None
        if isinstance(error, FileNotFoundError):
            raise StoreError(f"{path.parent}: {_JUST_ENDED}") from None
        raise
    return fd


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put the path into an OSError that has none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, f"{path}") from error


def partial_path(out: Path) -> Path:
    """Where `out` is written until it is complete."""
    if out.name in ("", ".."):  # of a path such as "."
        out = Path(os.path.abspath(out))
    return out.with_name(out.name + _SUFFIX)


def write_all(fd: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    """pwrite until all is written. Raises OSError with `path` in it."""
    length = len(data)
    with named(path):
        done = os.pwrite(fd, data, offset)
        while done < length:
            done += os.pwrite(fd, data[done:], offset + done)


def read_into(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from the file. Raises OSError with `path` in it, also where the file ends too early."""
    with named(path):
        done = os.preadv(fd, [view], offset)
        while done < len(view):
            count = os.preadv(fd, [view[done:]], offset + done)
            if not count:
                raise OSError(errno.EIO, f"the file ends at byte {offset + done}: it shrank while it was read")
            done += count


def write_file(path: Path, chunks: Iterable[bytes], *, sync: bool) -> None:
    """A new file from its bytes."""
    with named(path), open(path, "xb") as file:
        file.writelines(chunks)
        file.flush()
        if sync:
            os.fsync(file.fileno())


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


def fsync_folder(path: str | os.PathLike[str], witness: int = -1) -> None:
    """Make durable which names the folder has.

    witness  descriptor of a file beside it: on XFS fsync of a folder is silent when the file system has just gone down,
             and that of a file is not
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    if witness >= 0:
        os.fsync(witness)


def boot_id() -> str:
    """What changes whenever the machine starts: bytes that were not synced are trusted only until then."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stamp(status: os.stat_result) -> bytes:
    return f"{status.st_size} {status.st_mtime_ns}\n".encode()


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f"{_HIDDEN}{path.name}{suffix}")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not os.listdir(folder)
