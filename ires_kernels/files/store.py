"""Durable bytes: a new folder that appears under its name only when all of it is on the disk.

The folder is written as ``OUT.partial`` beside OUT and renamed last. The order is what survives a power cut: every file
is fsynced before it gets its name, then the folder, then the name of that changes, then the parent folder is fsynced.
All files get their full size before the first byte of data, so a full disk is known at once.

In OUT.partial a file is called ``.ires-NAME.tmp`` until it is complete and durable. A record of its size and time, and
of what was learnt while it was written, is made durable as ``.ires-NAME.done`` before that; so a file under its own
name, which is what its record says, is never written again by the run that takes up an interrupted one. The lock file
says whose folder it is: it holds the identity of the operation and is held with flock while a process works. Lock and
records go last, after the renaming; to be killed between the two leaves a complete OUT with stray hidden files.

OUT.partial is closed to others (mode 700) until it gets the mode that OUT is to have. What is found there is taken up
only if it is ours: folder, lock and files by their owner, and what the lock and the records say by its signature.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn, Protocol

from ires_kernels.files import interrupts, trust
from ires_kernels.files.locks import lock
from ires_kernels.files.opening import MAX_MANIFEST, open_file, read_open
from ires_kernels.files.ownership import (
    Access,
    Foreign,
    check_owner,
    is_same,
    make_private,
    open_folder,
    open_own,
    private_mode,
    set_mode,
    unproved,
)
from ires_kernels.files.ownership import StoreError as StoreError

MARKER = ".ires-lock"
"""The lock file: lines with the identity of the operation and the signature, then what was given to keep there."""
FINISHING = ".ires-finishing"
"""The lock of who finishes a folder that several processes have filled; see shared.py."""
_SUFFIX = ".partial"
_HIDDEN, _TEMPORARY, _RECORD, _PART = ".ires-", ".tmp", ".done", ".part"
WORKING = ".ires-working-"
"""What the names of notes begin with, of how far one of several processes is."""


NO_THREAD = (
    "the system starts no more threads, and an update in place needs one beside the computation: raise the limit on "
    "processes (`ulimit -u`), or that of the container (pids.max)"
)
"""What an OSError says then."""
_CHUNK = 1 << 20  # bytes at a time of a side file


class Hasher(Protocol):
    """Of hashlib, xxhash and the like."""

    def update(self, data: bytes | memoryview, /) -> None: ...


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
    if out.exists() and not _is_replaceable(out):
        raise StoreError(
            f"{out}: belongs to another user, in a folder where only they can replace it. Give another name."
        )
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


class Reserved(NamedTuple):
    """A file of a NewFolder that has its full size, and the bytes that it begins with."""

    size: int
    written: int
    """Bytes at its beginning."""
    dev: int
    ino: int


class NewFile:
    """A file of a NewFolder that is reserved, of which threads write the rest.

    It is open from the first of their writes to the last only: a process may open some thousand files or fewer, and a
    model may have more.
    """

    def __init__(
        self,
        path: Path,
        made: Reserved,
        record: Callable[[], bytes],
        *,
        operation: bytes = b"",
        attempt: str = "",
        sync: bool,
    ) -> None:
        """`attempt`: what the hidden names have in them besides, where other processes may make the same file."""
        self.path = path
        self.identity: tuple[int, ...] = ()
        """Of the complete file."""
        self._temporary = hidden_path(path, attempt + _TEMPORARY)
        self._attempt = attempt
        self._operation = operation
        self._record = record
        self._sync = sync
        self._made = made
        self._left = made.size - made.written
        self._lock = threading.Lock()
        self._fd = -1
        self._finished = False

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes nobody has written yet; whoever writes the last ones makes the file durable and names it."""
        self._open()
        self._check()  # before this write may make it as long as it was, with zeros for what was cut
        write_all(self._fd, data, offset, self.path)
        with self._lock:
            self._left -= len(data)
            last = self._left == 0
        if last:
            self.finish()

    def finish(self) -> None:
        """Make the file durable, then what is to be recorded of it, and give it its name."""
        if self._finished:
            return
        assert self._left == 0, f"{self.path.name}: {self._left} bytes were not written"
        self._open()
        with named(self.path):
            if self._sync:
                os.fsync(self._fd)
            self._check()
            if not is_same(self._fd, self._temporary):
                raise meddled(self._temporary)
            status = os.fstat(self._fd)
            self.identity = _identity(status, self._sync)
            self.abandon()
            self._conclude(status)
            self._finished = True

    def _conclude(self, status: os.stat_result) -> None:
        """All bytes are there, and durable."""
        self._write_record(self._attempt + _RECORD, _stamp(status) + self._record())
        os.rename(self._temporary, self.path)

    def _write_record(self, suffix: str, content: bytes) -> None:
        path = hidden_path(self.path, suffix)
        content = signed_record(self._operation, self.path.name, content)
        write_file(path, [content], sync=self._sync, mode=private_mode(0o660))

    def _open(self) -> None:
        """Open the file that was made, where it is not open."""
        with self._lock, named(self.path):
            if self._fd < 0:
                fd = os.open(self._temporary, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) != (self._made.dev, self._made.ino):
                    os.close(fd)
                    raise meddled(self._temporary)
                self._fd = fd

    def _check(self) -> None:
        if os.fstat(self._fd).st_size != self._made.size:
            raise meddled(self._temporary)

    def abandon(self) -> None:
        """Close as it is."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class NewFolder:
    """A context in which the files of `out` are made, under a lock; `commit` ends it.

    identity  one line of words: what an earlier run with the same line, or with its first word alone, has completed is
              kept; with the same first word it is done again, with another it is refused
    keep      bytes for the lock file, for whoever finds the unfinished folder
    accept    called before the files of an earlier run are kept, with what that one gave to keep and with `finished`;
              raises StoreError to leave all as it is
    access    what others may do with it at most
    locked    False: without the lock, where the user says that no other process writes there

    Leaving without `commit` keeps what is complete, or removes everything where nothing is, or where an error of the
    inputs, a ValueError, makes it worthless. Raises StoreError for a folder that is in use or somebody else's.
    """

    def __init__(
        self,
        out: Path,
        identity: str,
        keep: bytes,
        *,
        accept: Callable[[bytes, Mapping[str, bytes]], None] | None = None,
        sync: bool = True,
        locked: bool = True,
        access: Access | None = None,
    ) -> None:
        self.out = out
        self.partial = partial_path(out)
        self.access = access or Access()
        self.finished: dict[str, bytes] = {}
        """Files that need not be made, by name, and what was recorded of them."""
        self._identity = identity.encode()
        self._attempt = ""
        """What hidden names have in them, where other processes may make the same files."""
        self._sync = sync
        self._reserved: dict[str, Reserved] = {}
        self._files: list[NewFile] = []
        self._keep = keep
        self._accept = accept
        self._locked = locked
        self._at = self._lock = -1
        self._identities: dict[str, tuple[int, ...]] = {}
        """Of the complete files, by name."""
        self._records: dict[str, str] = {}
        """Which file of the folder is the record of a complete one."""
        self._locks = {MARKER}
        self._renamed = self._stays = False

    @property
    def _operation(self) -> bytes:
        """Which one it is, as records say it."""
        return self._identity.split()[0]

    def __enter__(self) -> NewFolder:
        content = content_of_lock(self._identity, self._keep)  # before anything is there: it may lack a key
        with named(self.partial):
            made = self._open()
            try:
                self._lock = self._take(made)
            except OSError:
                if made:
                    os.rmdir(self.partial)
                raise
            finally:
                if self._lock < 0:
                    os.close(self._at)
            try:
                if self._sync:
                    fsync_folder(self.partial)
                self._take_over(content)
            except StoreError:
                self._close()
                raise
            except BaseException as error:
                self._leave(error)
                raise
        return self

    def _take(self, made: bool, /) -> int:
        """Take the lock of the folder, in which nothing is yet if it was just `made`."""
        return lock(self.partial / MARKER, make=made, wanted=self._locked)

    def _open(self) -> bool:
        """Make the folder, or open what is there; returns whether nothing is in it yet."""
        self._make()
        try:
            self._at = open_folder(self.partial)
        except (NotADirectoryError, PermissionError):
            whose = trust.stranger(os.lstat(self.partial))
            if whose:
                raise Foreign(f"{self.partial}: is in the way, and {whose}. Give the output another name.") from None
            self._refuse()
        try:
            names = os.listdir(self._at)
            check_owner(self._at, self.partial, unsigned=is_unused(names))
            make_private(self._at)
            if names and MARKER not in names:
                self._refuse()
        except BaseException:
            os.close(self._at)
            raise
        # Never made anew where something is: the process that holds it may be about to give the folder its name.
        return not names

    def _make(self) -> None:
        with suppress(FileExistsError):
            os.mkdir(self.partial, private_mode(0o770))

    def _refuse(self) -> NoReturn:
        raise StoreError(
            f"{self.partial}: is in the way: the output is written there until it is complete, and this is "
            "nothing that an interrupted run left. Move it or delete it."
        )

    def _take_over(self, content: bytes) -> None:
        """Keep what an interrupted run of the same operation has completed, and nothing else."""
        names = set(os.listdir(self._at))
        identity = kept = b""
        if not is_unused(names):
            identity, kept = read_lock(self._lock, self.partial)
        complete = records_in(names)
        name_of_mine = self._operation
        if complete and identity.split()[:1] != [name_of_mine]:
            raise StoreError(
                f"{self.partial}: holds {len(complete)} complete files of another operation. "
                f"Finish that one with `ires resume {self.out}`, or remove it with `ires rollback {self.out}`."
            )
        if identity in (self._identity, name_of_mine):
            self._look(complete)
        if self.finished and self._accept is not None:
            self._accept(kept, self.finished)
        self._empty()
        if identity != self._identity or not self.finished:  # nothing is left of what an earlier run was begun with
            write_all(self._lock, content, 0, self.partial / MARKER)
            os.ftruncate(self._lock, len(content))
            if self._sync:
                os.fsync(self._lock)

    def _look(self, records: Mapping[str, Iterable[str]]) -> None:
        """Find out which files are complete; `records` are those that there may be of each."""
        for name, each in records.items():
            for hidden in each:
                record = self._read_record(name, hidden)
                if record is not None:
                    self.finished[name], self._records[name] = record, hidden

    def _read_record(self, name: str, hidden: str) -> bytes | None:
        """What was recorded of a complete file; None where somebody has changed it since, or it is not ours."""
        path = self.partial / name
        content = read_signed_record(self.partial / hidden, self._operation, name)
        try:
            fd = open_own(path)
        except (FileNotFoundError, Foreign):
            return None
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        stamp, _, record = (content or b"").partition(b"\n")
        if stamp + b"\n" != _stamp(status):
            return None
        self._identities[name] = _identity(status, self._sync)
        return record

    def _empty(self) -> None:
        """Remove all but the lock, and the complete files with their records."""
        kept = {*self._locks, *self.finished, *self._records.values()}
        for name in set(os.listdir(self._at)) - kept:
            remove_from(self._at, name)

    def reserve(self, name: str, head: bytes, size: int) -> None:
        """Make a file of `size` bytes that begins with `head`. Raises OSError where there is no room for all of it."""
        path = self.partial / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with named(path):
            fd = os.open(hidden_path(path, self._attempt + _TEMPORARY), flags, self.access.file)
            try:
                allocate(fd, size, path)
                write_all(fd, head, 0, path)
                status = os.fstat(fd)
            finally:
                os.close(fd)
        self._reserved[name] = Reserved(size, len(head), status.st_dev, status.st_ino)

    def add(self, name: str, chunks: Iterable[bytes], mode: int | None = None) -> None:
        """A whole file from its bytes, with this mode at most. `name` may have folders in it."""
        path = self.partial / name
        with named(path):
            _make_folders(path.parent, self.partial, self.access.folder)
            write_file(path, chunks, sync=self._sync, mode=self.access.file if mode is None else mode)
            self._identities[name] = _identity(os.lstat(path), self._sync)

    def file(self, name: str, record: Callable[[], bytes] = bytes) -> NewFile:
        """One of the files that are reserved, to be written.

        `record` is called when all of it was written; its bytes come back in `finished` if the run is interrupted.
        """
        made = self._reserved[name]
        path, operation = self.partial / name, self._operation
        file = NewFile(path, made, record, operation=operation, attempt=self._attempt, sync=self._sync)
        self._files.append(file)
        return file

    def finish_files(self) -> None:
        """Every file that was taken to be written is written, and gets its name."""
        for file in self._files:
            file.finish()
            self._identities[file.path.name] = file.identity

    def abandon_files(self) -> None:
        """Close as they are those that are not finished."""
        for file in self._files:
            file.abandon()

    def _check_files(self) -> None:
        """Raise OSError where a file is no longer the one that was written."""
        for name, identity in self._identities.items():
            with named(self.partial / name):
                if _identity(os.lstat(self.partial / name), self._sync) != identity:
                    raise meddled(self.partial / name)

    def commit(self) -> None:
        """Give the folder its name. What was not durable before is when this returns."""
        self.finish_files()
        self._check_files()
        with named(self.partial):
            set_mode(self._at, self._mode())
            if self._sync:
                for folder, _, _ in os.walk(self.partial, topdown=False):
                    fsync_folder(folder)
        with named(self.out):
            if not is_same(self._at, self.partial):
                raise StoreError(f"{self.partial}: was moved or replaced while it was written. Give the command again.")
            os.rename(self.partial, self.out)
            self._renamed = True
            if self._sync:
                fsync_folder(self.out.parent, self._lock)
            tidy(self.out)

    def _mode(self) -> int:
        """Of the finished folder: what the umask, or an ACL of the parent, leaves of what it may be."""
        probe = self.partial / f"{_HIDDEN}mode"
        os.mkdir(probe, self.access.folder)
        mode = os.stat(probe).st_mode
        os.rmdir(probe)
        if self.out.is_dir():  # it was made empty before: no wider than that
            mode &= os.stat(self.out).st_mode
        return stat.S_IMODE(mode)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        self.abandon_files()
        if not self._renamed and not self._stays:
            with suppress(OSError):  # the error that brought us here matters more; the next run removes the rest
                if isinstance(error, ValueError):
                    self.finished, self._records = {}, {}
                else:
                    records = records_in(os.listdir(self._at))
                    self.finished = dict.fromkeys(records, b"")
                    self._records.update({name: each[0] for name, each in records.items() if name not in self._records})
                self._empty()
                if not self.finished:
                    os.unlink(MARKER, dir_fd=self._at)
                    os.rmdir(self.partial)
        self._close()

    def _close(self) -> None:
        os.close(self._lock)
        os.close(self._at)


def read_kept(out: Path) -> bytes:
    """What the unfinished output `out` was given to keep in its lock file. Raises Foreign where that is not ours."""
    partial = partial_path(out)
    with _ours(partial) as at, named(partial):
        fd = open_own(partial / MARKER)
        try:
            return read_lock(fd, partial)[1]
        except Foreign:
            if not is_unused(os.listdir(at)):
                raise
            raise StoreError(
                f"{partial}: was left by a merge that ended before it began. Give the command again; or "
                f"`ires rollback {out}` removes it."
            ) from None
        finally:
            os.close(fd)


def discard(out: Path, *, locked: bool = True) -> None:
    """Remove the unfinished output `out`. Raises StoreError when a process is writing it, or when it is not ours."""
    partial = partial_path(out)
    with _ours(partial) as at, named(partial):
        fd = lock(partial / MARKER, wanted=locked)
        try:
            names = os.listdir(at)
            if not is_unused(names):
                read_lock(fd, partial)
            for name in sorted(names, key=MARKER.__eq__):
                remove_from(at, name)
            fsync_folder(partial, fd, needed=False)
        finally:
            os.close(fd)
        partial.rmdir()  # not before: on NFS what is open keeps a name in it
        fsync_folder(partial.parent, needed=False)


def tidy(out: Path) -> None:
    """Remove from the complete folder `out` what only its writing needed, the lock last; nothing of a stranger's."""
    try:
        fd = open_own(out / MARKER)
    except (FileNotFoundError, Foreign):
        return
    try:
        read_lock(fd, out)
    except Foreign:
        return
    finally:
        os.close(fd)
    for name in sorted(os.listdir(out), key=MARKER.__eq__):
        ours = name.endswith((_RECORD, _TEMPORARY, _PART)) or name.startswith(WORKING)
        if name in (MARKER, FINISHING) or (name.startswith(_HIDDEN) and ours):
            with suppress(FileNotFoundError):  # another process does the same
                os.unlink(out / name)


@contextmanager
def _ours(partial: Path) -> Iterator[int]:
    """An unfinished folder, open, which is a real one and ours."""
    try:
        at = open_folder(partial)
    except NotADirectoryError:
        raise unproved(partial) from None
    try:
        check_owner(at, partial, unsigned=is_unused(os.listdir(at)))
        yield at
    finally:
        os.close(at)


def content_of_lock(identity: bytes, keep: bytes) -> bytes:
    return b"\n".join([identity, trust.sign("folder", identity + b"\n" + keep).encode(), keep])


def read_lock(fd: int, folder: Path) -> tuple[bytes, bytes]:
    """Identity, and what was kept, of a lock file that we have written. Raises Foreign for any other."""
    identity, _, rest = read_open(fd, MAX_MANIFEST, folder / MARKER).partition(b"\n")
    signature, _, keep = rest.partition(b"\n")
    if not trust.is_mine("folder", identity + b"\n" + keep, signature.decode(errors="replace")):
        raise unproved(folder)
    return identity, keep


def is_unused(names: Iterable[str]) -> bool:
    """Whether an unfinished folder has nothing in it: a run ended as it began."""
    return set(names) <= {MARKER}


def records_in(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of a folder that have their names, and the records that may be theirs: one for each who has made it."""
    names = sorted(names)
    found: dict[str, list[str]] = {name: [] for name in names}
    for hidden in names:
        if hidden.startswith(_HIDDEN) and hidden.endswith(_RECORD):
            name = hidden.removeprefix(_HIDDEN).removesuffix(_RECORD)
            each = found.get(name, found.get(name.rpartition(".")[0], []))
            each.append(hidden)
    return {name: each for name, each in found.items() if each}


def signed_record(operation: bytes, name: str, content: bytes) -> bytes:
    """What `read_signed_record` gives back, of the same operation and file."""
    return trust.sign("file", _of_file(operation, name, content)).encode() + b"\n" + content


def read_signed_record(path: Path, operation: bytes, name: str) -> bytes | None:
    """What is recorded of a file of an operation; None where that is not there, or not ours."""
    try:
        fd = open_own(path)
    except (FileNotFoundError, Foreign):
        return None
    try:
        signature, _, content = read_open(fd, MAX_MANIFEST, path).partition(b"\n")
    finally:
        os.close(fd)
    signed = _of_file(operation, name, content)
    return content if trust.is_mine("file", signed, signature.decode(errors="replace")) else None


def _of_file(operation: bytes, name: str, content: bytes) -> bytes:
    """What the signature of a record says: of which operation and file it is."""
    return b"\0".join([operation, name.encode(errors="surrogateescape"), content])


def _make_folders(path: Path, top: Path, mode: int) -> None:
    """Make the folders between `top` and `path`, and `path`, where they are not there."""
    if path != top and not path.is_dir():
        _make_folders(path.parent, top, mode)
        os.mkdir(path, mode)


def _is_replaceable(path: Path) -> bool:
    """Whether a sticky folder lets us rename or replace what is in it."""
    parent, status = os.stat(path.parent), os.lstat(path)
    return not parent.st_mode & stat.S_ISVTX or os.geteuid() in (0, parent.st_uid, status.st_uid)


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
        out = Path(os.path.realpath(out))
    return out.parent / f"{out.name}{_SUFFIX}"


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
    new = path.with_name(f"{_HIDDEN}{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        write_file(new, [content], sync=True)
        with named(path), suppress(FileNotFoundError):
            os.chmod(new, stat.S_IMODE(os.stat(path, follow_symlinks=False).st_mode))
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    fsync_folder(path.parent)


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


def meddled(path: Path) -> OSError:
    text = "somebody has cut, written or replaced it before all was complete. The same command makes it again"
    return OSError(errno.EIO, text, f"{path}")


def _stamp(status: os.stat_result) -> bytes:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}\n".encode()


def _identity(status: os.stat_result, sync: bool) -> tuple[int, ...]:
    """What a file of ours stays; a server may still set the time of one that was not synced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns if sync else 0


def reserved_in(partial: Path, files: Collection[str]) -> dict[str, tuple[list[Path], bool]]:
    """Of an unfinished folder those of `files` that are there: where, and whether each is complete.

    What is not may be there several times, as each process that makes it has its own.
    """
    names = os.listdir(partial)
    found = {name: ([partial / name], True) for name in records_in(names) if name in files}
    for hidden in names:
        if hidden.startswith(_HIDDEN) and hidden.endswith(_TEMPORARY):
            name = hidden.removeprefix(_HIDDEN).removesuffix(_TEMPORARY)
            name = name if name in files else name.rpartition(".")[0]
            places, is_complete = found.setdefault(name, ([], False)) if name in files else ([], True)
            if not is_complete:
                places.append(partial / hidden)
    return found


def hidden_path(path: Path, suffix: str) -> Path:
    return path.with_name(f"{_HIDDEN}{path.name}{suffix}")
