"""An unfinished folder that several processes fill at the same time, on one machine or many.

None of them is first, none waits for another, and each may die, or be started twice. The folder is that of
unfinished.py, with the same lock, which they hold together, and the same records; so one process may go on with it as
well. Their files have the names of the attempt in them:

    .ires-NAME.ATTEMPT.tmp   a file that one process writes; when it is durable and recorded it gets its name
    .ires-NAME.ATTEMPT.done  its record. Whoever is last to rename has the file, and there is a record of each attempt
    .ires-NAME.tmp           a file that several processes write, each its own ranges; it has its full size at once
    .ires-NAME.ATTEMPT-START-STOP.part
                             the record of a range that is durable. With all ranges the file gets its name
    .ires-working-RANK       how far a process is, for people

Two attempts at the same bytes write the same ones. What nobody needs any more goes when the folder is finished.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ires_kernels.files.durable import fsync_folder, hidden_path, write_file
from ires_kernels.files.locks import InUse, hold_together, is_held_alone, lock_with_others
from ires_kernels.files.new_file import NewFile, Reserved, meddled
from ires_kernels.files.new_folder import NewFolder
from ires_kernels.files.ownership import Access, Foreign, StoreError, is_same, open_own, private_mode
from ires_kernels.files.ranges import Range, Together, hash_of_ends
from ires_kernels.files.transfer import named, write_all
from ires_kernels.files.unfinished import (
    MARKER,
    PART,
    TEMPORARY,
    WORKING,
    content_of_lock,
    is_unused,
    read_lock,
    read_signed_record,
    records_in,
)

_ATTEMPT = re.compile(r"\.ires-.+(\.[\w-]+-\d+-[0-9a-f]{8})(?:-(\d+)-(\d+))?\.(tmp|part)")


class SharedFolder(NewFolder):
    """A context in which a process makes some of the files of `out`, while others make the others.

    The arguments are those of NewFolder; `accept` is called with what another process gave to keep. Leaving removes
    what this process has not completed, and the folder where nothing else is in it.
    """

    def __init__(
        self,
        out: Path,
        identity: str,
        keep: bytes,
        *,
        accept: Callable[[bytes, Mapping[str, bytes]], None],
        locked: bool = True,
        access: Access | None = None,
    ) -> None:
        super().__init__(out, identity, keep, accept=accept, locked=locked, access=access)
        host = re.sub(r"\W", "", socket.gethostname().partition(".")[0], flags=re.ASCII)[:20] or "host"
        self._attempt = f".{host}-{os.getpid()}-{secrets.token_hex(4)}"

    def __enter__(self) -> SharedFolder:
        content = content_of_lock(self._identity, self._keep)
        with named(self.partial):
            for last in (False, False, True):
                self._open()
                try:
                    self._join(content)
                    fsync_folder(self.partial)
                    break
                except BaseException as error:
                    self._close()
                    if last or not isinstance(error, FileNotFoundError):  # it was finished, or removed, just now
                        raise
        return self

    def _join(self, content: bytes) -> None:
        """Take the lock with the others, and begin the folder where nobody has."""
        marker = self.partial / MARKER
        for _ in range(200):
            self._lock, alone = lock_with_others(marker, wanted=self._locked)
            begun = self._begun()
            if begun == self._identity or (begun and not alone) or not self._is_empty():
                break
            if alone:
                write_all(self._lock, content, 0, marker)
                os.ftruncate(self._lock, len(content))
                os.fsync(self._lock)
                break
            if not self._locked:  # two may do so at once, for the same operation with the same right
                temporary = hidden_path(marker, f"{self._attempt}{TEMPORARY}")
                write_file(temporary, [content], sync=True, mode=private_mode(0o660))
                os.rename(temporary, marker)
            os.close(self._lock)
            self._lock = -1
            time.sleep(0.05)
        else:
            raise InUse(f"{self.partial}: another process is about to begin there. Wait for it to end.")
        identity, kept = read_lock(self._lock, self.partial)
        if identity != self._identity:
            raise StoreError(
                f"{self.partial}: holds the files of another operation. Finish that one with `ires resume {self.out}`, "
                f"or remove it with `ires rollback {self.out}`; or give the output another name."
            )
        if alone:
            self._sweep()
            hold_together(self._lock, marker)
        if kept != self._keep and self._accept is not None:
            self._accept(kept, {})

    def _begun(self) -> bytes | None:
        """For which operation the folder was begun, if it was."""
        try:
            return read_lock(self._lock, self.partial)[0]
        except Foreign:
            return None

    def _is_empty(self) -> bool:
        return is_unused(name for name in os.listdir(self._at) if not _ATTEMPT.fullmatch(name))

    def _sweep(self) -> None:
        """Remove what processes that have died were writing, as no other is at work."""
        for name in os.listdir(self._at):
            found = _ATTEMPT.fullmatch(name)
            if found and found[4] == "tmp":
                os.unlink(name, dir_fd=self._at)

    def complete(self) -> dict[str, bytes]:
        """Look which files are complete, and what was recorded of each."""
        self.finished = {}
        self._look(records_in(os.listdir(self._at)))
        return self.finished

    def share(self, name: str, head: bytes, size: int) -> None:
        """Have a file of `size` bytes, beginning with `head`, of which several processes write ranges."""
        path = self.partial / name
        shared = hidden_path(path, TEMPORARY)
        with named(path):
            if not os.path.lexists(shared):
                self.reserve(name, head, size)
                mine = hidden_path(path, f"{self._attempt}{TEMPORARY}")
                try:
                    os.link(mine, shared)  # not rename, which would replace what another process has begun
                    os.unlink(mine)
                except FileExistsError:
                    os.unlink(mine)
                except OSError:  # a file system without links
                    os.unlink(mine) if os.path.lexists(shared) else os.rename(mine, shared)
            fd = open_own(shared)
            try:
                status = os.fstat(fd)
                if status.st_size != size or os.pread(fd, len(head), 0) != head:
                    raise meddled(shared)
            finally:
                os.close(fd)
        self._reserved[name] = Reserved(size, len(head), status.st_dev, status.st_ino)

    def range_of(self, name: str, start: int, stop: int, record: Callable[[], bytes]) -> NewFile:
        """The bytes [start, stop) of a file that is shared, to be written; they are recorded as a file's are."""
        made = self._reserved[name]
        file = Range(self.partial / name, made, record, start, stop, operation=self._operation, attempt=self._attempt)
        self._files.append(file)
        return file

    def parts(self, name: str) -> list[bytes]:
        """What was recorded of the ranges of a file that is shared."""
        return [record for _, _, record in self._parts(name)]

    def _parts(self, name: str) -> list[tuple[Path, list[str], bytes]]:
        """Of each range the record's path, what it says of the range, and what was recorded."""
        path = self.partial / name
        try:
            fd = open_own(hidden_path(path, TEMPORARY))
        except (FileNotFoundError, Foreign):
            return []
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        found = []
        begin = hidden_path(path, ".").name
        for hidden in sorted(os.listdir(self._at)):
            if hidden.startswith(begin) and _ATTEMPT.fullmatch(hidden) and hidden.endswith(PART):
                content = read_signed_record(self.partial / hidden, self._operation, name)
                stamp, _, record = (content or b"").partition(b"\n")
                about = stamp.decode().split()
                if about[:2] == [f"{status.st_size}", f"{status.st_ino}"]:
                    found.append((self.partial / hidden, about, record))
        return found

    def conclude(self, name: str, record: bytes) -> bool:
        """Give a shared file its name, as all of its ranges are recorded; False where another process did.

        Raises OSError where bytes at the end of a range are not those that were written.
        """
        path = self.partial / name
        shared = hidden_path(path, TEMPORARY)
        parts = self._parts(name)
        try:
            fd = open_own(shared, write=True)
        except FileNotFoundError:
            return False
        try:
            status = os.fstat(fd)
            for hidden, (_, _, start, stop, ends), _ in parts:
                if hash_of_ends(fd, int(start), int(stop), shared) != ends:
                    os.unlink(hidden)
                    text = (
                        f"bytes [{start}, {stop}) are not those that were written: two machines have undone each "
                        "other's writes, or somebody else wrote there. The same command makes them again"
                    )
                    raise OSError(errno.EIO, text, f"{shared}")
        finally:
            os.close(fd)
        made = Reserved(status.st_size, status.st_size, status.st_dev, status.st_ino)
        file = Together(path, made, lambda: record, operation=self._operation, attempt=self._attempt, sync=True)
        try:
            file.finish()
        except OSError:
            if os.path.lexists(shared):
                raise
            return False
        for hidden, _, _ in parts:
            hidden.unlink(missing_ok=True)
        return True

    def note(self, rank: str, content: bytes) -> None:
        """Say how far this process is. What cannot be said is not."""
        path = self.partial / f"{WORKING}{rank}"
        temporary = hidden_path(path, f"{self._attempt}{TEMPORARY}")
        with suppress(OSError):
            write_file(temporary, [content], sync=False, mode=private_mode(0o660))
            os.rename(temporary, path)

    def give_up(self) -> None:
        """Remove what this process was to write and has not completed; it may be reserved anew."""
        self.abandon_files()
        self._files.clear()
        with suppress(OSError):
            for name in os.listdir(self._at):
                if name.endswith(f"{self._attempt}{TEMPORARY}"):
                    os.unlink(name, dir_fd=self._at)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_up()
        with suppress(OSError):  # who finishes removes the rest
            if self._locked and is_same(self._at, self.partial) and is_held_alone(self._lock, self.partial / MARKER):
                self._remove_if_nothing_is_in_it()
        self._close()

    def _remove_if_nothing_is_in_it(self) -> None:
        names = os.listdir(self._at)
        if not records_in(names) and not any(name.endswith(PART) for name in names):
            self.finished, self._records = {}, {}
            self._empty()
            os.unlink(MARKER, dir_fd=self._at)
            os.rmdir(self.partial)

    def _close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        os.close(self._at)
