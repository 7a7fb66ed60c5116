"""A new folder that appears under its name only when all of it is on the disk.

The folder is written as ``OUT.partial`` beside OUT, where unfinished.py says what is in it, and renamed last. The order
is what survives a power cut: every file is fsynced before it gets its name, then the folder, then the name of that
changes, then the parent folder is fsynced. All files get their full size before the first byte of data, so a full disk
is known at once. Lock and records go last, after the renaming; to be killed between the two leaves a complete OUT with
stray hidden files.

OUT.partial is closed to others (mode 700) until it gets the mode that OUT is to have.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from ires_kernels.files import trust
from ires_kernels.files.durable import HIDDEN, fsync_folder, hidden_path, remove_from, write_file
from ires_kernels.files.locks import lock
from ires_kernels.files.new_file import NewFile, Reserved, identity_of, meddled, stamp_of
from ires_kernels.files.ownership import (
    Access,
    Foreign,
    StoreError,
    check_owner,
    is_same,
    make_private,
    open_folder,
    open_own,
    private_mode,
    set_mode,
)
from ires_kernels.files.transfer import allocate, named, write_all
from ires_kernels.files.unfinished import (
    MARKER,
    TEMPORARY,
    content_of_lock,
    is_unused,
    partial_path,
    read_lock,
    read_signed_record,
    records_in,
    tidy,
)


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
        if stamp + b"\n" != stamp_of(status):
            return None
        self._identities[name] = identity_of(status, self._sync)
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
            fd = os.open(hidden_path(path, self._attempt + TEMPORARY), flags, self.access.file)
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
            self._identities[name] = identity_of(os.lstat(path), self._sync)

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
                if identity_of(os.lstat(self.partial / name), self._sync) != identity:
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
        probe = self.partial / f"{HIDDEN}mode"
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


def _make_folders(path: Path, top: Path, mode: int) -> None:
    """Make the folders between `top` and `path`, and `path`, where they are not there."""
    if path != top and not path.is_dir():
        _make_folders(path.parent, top, mode)
        os.mkdir(path, mode)
