"""The hidden folder of a model that is updated in place: its lock, how far the update got, and how it ends.

Names and bytes only. While an update is unfinished everything that a loader looks for (weights, index, config.json) is
in the hidden folder TARGET/.ires-unfinished, so that nothing takes a half-updated model for one; renaming moves no
bytes. For a target that is a single file it is .NAME.ires-unfinished beside it. The same folder holds the lock, the
journal, the scales of a quantized model (scales), the model's files (model/), the new side files until they are
installed (new/), the ones they replace (old/), and what says how far it got:

    operation.json   the weights may be part old, part new. Before it exists nothing was touched
    installing.json  the weights are new; the side files are being replaced
    finished.json    all is new; what is left to do is to move the model's files back
    withdraw.json    the weights' old bytes are being put back; the side files had not been replaced
    rollback.json    the weights' old bytes, and then the side files, are being put back
    restored.json    all is old again; what is left to do is to remove the rest

The folder is closed to others. Which of them are ours, hidden.py knows; which models may be updated, movable.py; and
moving.py moves files into it and back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from ires_kernels.files import trust
from ires_kernels.files.durable import fsync_folder, remove_from, write_file
from ires_kernels.files.hidden import (
    FOLDERS,
    REPLACED,
    TOKEN,
    UNDO,
    beside,
    folder_of,
    numbered,
    open_hidden,
    phase_of,
    read_own,
    undo_folders,
    why_not_ours,
    work_folder,
)
from ires_kernels.files.locks import lock
from ires_kernels.files.ownership import Foreign, StoreError, is_same, make_private, open_folder, private_mode
from ires_kernels.files.transfer import allocate, named
from ires_kernels.files.unfinished import MARKER

SCALES = "scales"
"""What is in the hidden folder before anything has begun, of an update that looks for new scales first."""


class LostError(StoreError):
    """A model that is part old and part new, and nobody knows which part is."""


class Workplace:
    """The hidden folder of an update, locked by this process. Make one with `begin` or `take`; `close` unlocks it."""

    def __init__(self, target: Path, lock: int, at: int, *, sync: bool = True) -> None:
        self.target = target
        self.folder = folder_of(target)
        self.work = work_folder(target)
        self.model = self.work / "model"
        """Where the model's files are meanwhile."""
        self.sync = sync
        self._lock, self._at = lock, at

    @classmethod
    def begin(cls, target: Path, *, sync: bool = True, locked: bool = True) -> Workplace:
        """Make the folder. Raises StoreError when an update is under way or unfinished, or what is there is not ours.

        locked  False: without the lock, where the user says that no other process works there
        """
        work = work_folder(target)
        token = trust.sign(*TOKEN).encode()  # before anything is there: it may lack a key
        with named(work):
            try:
                os.mkdir(work, private_mode(0o770))
            except FileExistsError:
                place = cls.take(target, locked=locked)
                if place.phase() is not None:
                    place.close()
                    raise StoreError(
                        f"{target}: an update in place is unfinished. `ires resume {target}` finishes it, "
                        f"`ires rollback {target}` takes it back where that is possible."
                    ) from None
                place.remove()  # nothing had begun
                return cls.begin(target, sync=sync, locked=locked)
            try:
                if sync:
                    fsync_folder(work)  # where that cannot be done, it is said before anything else
                fd = lock(work / MARKER, make=True, wanted=locked)
            except OSError:
                os.rmdir(work)
                raise
            try:
                at = open_folder(work)
                os.pwrite(fd, token, 0)
                if sync:
                    os.fsync(fd)
                return cls(target, fd, at, sync=sync)
            except BaseException:
                os.close(fd)
                raise

    @classmethod
    def take(cls, target: Path, *, locked: bool = True) -> Workplace:
        """The folder that an interrupted update left. Raises StoreError when it is in use, or is not ours."""
        work = work_folder(target)
        if not os.path.lexists(work):
            raise StoreError(f"{target}: nothing is unfinished there: no update in place, and no new folder.")
        with named(work):
            at = open_hidden(work)
            try:
                strange = why_not_ours(work)
                if strange:
                    raise Foreign(strange)
                make_private(at)
                fd = lock(work / MARKER, make=MARKER not in os.listdir(at), wanted=locked)
                try:
                    strange = why_not_ours(work)  # again, as it may be another process's by now
                    if strange:
                        raise Foreign(strange)
                    return cls(target, fd, at)
                except BaseException:
                    os.close(fd)
                    raise
            except BaseException:
                os.close(at)
                raise

    def close(self) -> None:
        """Unlock."""
        for fd in (self._lock, self._at):
            if fd >= 0:
                os.close(fd)
        self._lock = self._at = -1

    def phase(self) -> str | None:
        """One of PHASES; None before the first."""
        return phase_of(self.work)

    def read(self) -> bytes:
        """What `write` wrote."""
        path = self.work / f"{self.phase()}.json"
        with named(path):
            return read_own(path)

    def write(self, content: bytes) -> None:
        """Make the update one that has begun: `content` is what it takes to go on with it."""
        path = self.work / "operation.json"
        temporary = path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        # Always synced: without it nobody knows what the folder is.
        write_file(temporary, [content], sync=True, mode=private_mode(0o660))
        with self.here():
            self.model.mkdir(exist_ok=True)
            os.rename(temporary, path)
            fsync_folder(self.work, needed=self.sync)
            fsync_folder(self.folder, needed=self.sync)

    def advance(self, phase: str) -> None:
        """Go on to another phase."""
        with self.here():
            self.make_durable(self.work, self.folder)
            os.rename(self.work / f"{self.phase()}.json", self.work / f"{phase}.json")
            self.make_durable(self.work)

    def reserve(self, size: int) -> None:
        """Take room that `release` gives back. Raises OSError where there is none."""
        path = self.work / "reserve"
        with named(path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, private_mode(0o660))
            try:
                allocate(fd, size, path)
            finally:
                os.close(fd)

    def release(self) -> None:
        """Give the room back."""
        (self.work / "reserve").unlink(missing_ok=True)

    def left_over(self) -> list[str]:
        """Those of old/ and edited/ that have files, which are not to be lost."""
        tops = [self.work / "old", self.work / "edited"]
        return [top.name for top in tops if any(names for _, _, names in os.walk(top))]

    def keep(self) -> Path:
        """End the update, but keep all that taking it back needs; returns where."""
        kept = self._next(UNDO)
        with self.here():
            (self.work / SCALES).unlink(missing_ok=True)
            os.rename(self.work, kept)
            self.make_durable(self.folder)
        self.close()
        return kept

    def remove(self, *, drop: Sequence[str] = ()) -> Path | None:
        """End the update, and keep only what is `left_over`, `drop` apart; returns where that is."""
        kept = None
        with self.here():
            for name in drop:
                (self.work / "old" / name).unlink(missing_ok=True)
            for top in self.left_over():
                kept = self._next(REPLACED)
                os.rename(self.work / top, kept)
                self.make_durable(self.folder)
            phase = self.phase()
            names = set(os.listdir(self._at))
            model = os.listdir(self.model) if "model" in names else []
            known = {"journal", "log", "reserve", SCALES, "operation.tmp", MARKER, *FOLDERS}
            strange = [*(names - known - {f"{phase}.json"}), *model]
            if strange:
                raise StoreError(f"{self.work}: holds {', '.join(sorted(strange))}. Move that to where it belongs.")
            for name in names - {MARKER, f"{phase}.json"}:
                remove_from(self._at, name)
            self.make_durable(self.work)
            if phase is not None:
                os.unlink(f"{phase}.json", dir_fd=self._at)
            os.unlink(MARKER, dir_fd=self._at)
            empty = _remove_empty(self.work)
            self.make_durable(self.folder)
        self.close()
        if not empty:  # perhaps of the lock alone: on NFS what is open keeps a name until it is closed
            with suppress(OSError):
                _remove_empty(self.work)
        return kept

    @contextmanager
    def here(self) -> Iterator[None]:
        """While files are moved: the hidden folder is the one that we have locked."""
        with named(self.work):
            if not is_same(self._at, self.work):
                raise StoreError(f"{self.work}: was moved or replaced while it was in use. Put it back, then go on.")
            yield

    def _next(self, kind: str) -> Path:
        """A name for what is kept: after our own, and past a stranger's, which may have any number."""
        ours = undo_folders(self.target)
        last = max((number for number, path in numbered(self.target, kind) if path in ours), default=0)
        names = (beside(self.target, f"{kind}-{number}") for number in count(last + 1))
        return next(name for name in names if not os.path.lexists(name))

    def make_durable(self, *folders: Path) -> None:
        """fsync folders whose names have changed, unless nothing is to be synced."""
        if self.sync:
            for folder in folders:
                fsync_folder(folder, self._lock)


def take_undo(target: Path, *, locked: bool = True) -> Workplace:
    """Make the last undo that was kept the unfinished update that it was."""
    kept = undo_folders(target)[-1]
    work = work_folder(target)
    if os.path.lexists(work):
        raise StoreError(f"{work}: is in the way. Move it away or delete it.")
    with named(kept):
        os.rename(kept, work)
        fsync_folder(folder_of(target), needed=False)
    return Workplace.take(target, locked=locked)


def _remove_empty(folder: Path) -> bool:
    """Remove a folder; False where another process has just begun in it."""
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False
    return True
