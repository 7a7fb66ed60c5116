"""The undo journal of an update in place: before bytes of a file change, the old ones are on the disk elsewhere.

Bytes only. The windows of an update, each a range of one file, are numbered in the order in which they are changed:

    1  the old bytes of window k go to slot k % slots of the journal, then fdatasync(journal)
    2  the new bytes are written by whoever computes them
    3  fdatasync(file), then a record of window k goes to the log, then fdatasync(log): the slot may be used again

A thread of its own does 1 ahead of the writers and 3 behind them, with two windows at most in between. So after a crash
the windows with a record are new, every other window is old or has its old bytes in a slot, and `recover` puts those
back: as long as journal and log are the ones that were written, so missing or cut ones are refused. With as many slots
as windows no old bytes are ever overwritten, and `restore` gives back all of them. With no slots only a run that ended
in order, and said so in the log, can be gone on with.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from ires_kernels.files.log import Log
from ires_kernels.files.ownership import open_own, private_mode
from ires_kernels.files.slots import Extent, Slots, Targets
from ires_kernels.files.transfer import allocate, named

AHEAD = 2
"""Windows that are saved before the first of them must be new; slots of a ring."""
NO_THREAD = (
    "the system starts no more threads, and an update in place needs one beside the computation: raise the limit on "
    "processes (`ulimit -u`), or that of the container (pids.max)"
)
"""What an OSError says then."""


class JournalError(ValueError):
    """Why nobody knows any more which bytes are new."""


class UndoGone(JournalError):
    """Why old bytes cannot be brought back; the update can still be finished."""


class Journal:
    """The journal in `folder` of an update of the files `targets`, which the caller closes.

    slots     0: no undo; AHEAD: a ring; as many as windows: all old bytes are kept
    log_size  bytes that the log has at least; zeros after its records
    new       make it, with all the space that it will need; otherwise it is the one that was made before

    Raises OSError where there is no space, JournalError for a journal or log that is not what it was.
    """

    def __init__(
        self,
        folder: Path,
        targets: Targets,
        windows: Sequence[Extent],
        slots: int,
        log_size: int,
        *,
        sync: bool,
        new: bool,
    ) -> None:
        self.windows = windows
        self._targets = targets
        self._slots = Slots(windows, slots)
        self._sync = sync
        self._saved = 0  # windows whose old bytes are safe, or need not be
        self._written: dict[int, bytes] = {}  # records of windows that are written, and not in the log
        self._closing = self._failed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._first = threading.Lock()  # without undo, before the first write
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        journal, log = folder / "journal", folder / "log"
        self._fds = [_open(journal, self._slots.size, new)]
        try:
            self._fds.append(_open(log, log_size, new))
        except BaseException:
            os.close(self._fds[0])
            raise
        self._slots.open(self._fds[0], journal)
        self._log = Log(self._fds[1], log, sync=sync, synced=slots > 0)
        self.records = self._log.records
        """Of the windows that are new, in order."""

    def recover(self) -> None:
        """Read the log, and put back the old bytes of every window that has no record.

        Raises JournalError where there is no undo and the run before did not end in order.
        """
        self._log.read()
        self._log.keep()  # slots are used again by it
        if not self._slots.count:
            self._check_ended()
            return
        self._slots.put_back(self._slots.held(range(len(self.records), len(self.windows))), self._targets)

    def check_restorable(self, *, ended: bool) -> None:
        """Raise UndoGone where old bytes are gone: of a window that is new, or once the run has `ended`, of any."""
        self._log.read()
        if not self._slots.count and self._log.begun:
            self._check_ended()
            raise UndoGone("--no-undo kept no old bytes")
        new = len(self.windows) if ended else len(self.records)
        held = self._slots.held(range(new))
        if len(held) < new:
            raise UndoGone(
                f"{new} of its {len(self.windows)} windows are new, and the old bytes of {len(held)} of them are still "
                "there (--keep-undo keeps all)"
            )

    def restore(self) -> None:
        """Put back the old bytes of all windows, having called `check_restorable`."""
        self._slots.put_back(self._slots.held(range(len(self.windows))), self._targets)

    def check_files(self, folder: Path) -> None:
        """Raise OSError where a file has another size than when the journal was opened, or is not in `folder` now."""
        self._targets.check(folder)

    def _check_ended(self) -> None:
        """Without undo: refuse what a run left that did not end in order."""
        if self._log.begun and not self._log.ended:
            raise JournalError(
                "it was interrupted in the middle of a window, and --no-undo kept no old bytes: "
                "it is part old and part new"
            )

    def start(self) -> None:
        """Begin to save; from now on `wait` and `complete`, then `close`. Raises OSError where no thread starts."""
        self._log.begun = False
        self._saved = len(self.records) if self._slots.count else len(self.windows)
        thread = threading.Thread(target=self._run, name="ires-journal")
        try:
            thread.start()
        except RuntimeError:
            raise OSError(errno.EAGAIN, NO_THREAD) from None
        self._thread = thread

    def wait(self, number: int) -> None:
        """Return when window `number` may be written. Raises what went wrong, or InterruptedError after `stop`."""
        with self._changed:
            while self._saved <= number and self._error is None and not self._closing:
                self._changed.wait()
            if self._saved <= number or self._error is not None:
                raise self._error or InterruptedError("the update has stopped")

    def write(self, file: str, data: memoryview, offset: int) -> None:
        """Write new bytes, having waited for their window."""
        if not self._slots.count and not self._log.begun:
            with self._first:
                if not self._log.begun:
                    self._log.begin()
        self._targets.write(file, data, offset)

    def complete(self, number: int, record: bytes) -> None:
        """All of window `number` is written; `record` will be among `records`."""
        with self._changed:
            self._written[number] = record
            self._changed.notify_all()

    def stop(self) -> None:
        """The writers have failed: whoever waits is woken, and nothing more is saved."""
        self._failed = True
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def finish(self) -> None:
        """All writers have stopped: bring the log up to what was written. Raises what went wrong."""
        if self._thread is not None:
            self._wake()
            self._over.wait()
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """`finish`, and close the journal's own files."""
        try:
            self.finish()
        finally:
            for fd in self._fds:
                os.close(fd)

    def _run(self) -> None:
        try:
            settled = len(self.records)
            for number in range(settled, len(self.windows)):
                if number - settled >= AHEAD:
                    if not self._settle(settled):
                        break
                    settled += 1
                if self._slots.count and not self._closing:
                    self._slots.save(number, self._targets, sync=self._sync)
                    with self._changed:
                        self._saved = number + 1
                        self._changed.notify_all()
            while settled < len(self.windows) and self._settle(settled):
                settled += 1
            if not self._slots.count and self._log.begun and not self._failed:
                self._targets.make_durable()
                self._log.end()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._over.set()

    def _settle(self, number: int) -> bool:
        """Wait for the new bytes of a window, make them durable, and log it; False when they will not come."""
        with self._changed:
            while number not in self._written and not self._closing:
                self._changed.wait()
            if number not in self._written:
                return False
            record = self._written.pop(number)
        if self._slots.count:
            self._targets.make_durable([self.windows[number].file])
        self._log.add(record)
        return True


def _open(path: Path, size: int, new: bool) -> int:
    try:
        with named(path):
            if new:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(path, flags, private_mode(0o660))
            else:
                fd = open_own(path, write=True)
    except FileNotFoundError:
        raise JournalError(f"{path} is gone, and nobody knows which of its bytes are new") from None
    try:
        if new:
            allocate(fd, size, path)
        elif os.fstat(fd).st_size < size:
            raise JournalError(f"{path} was cut, and nobody knows which of its bytes are new")
    except BaseException:
        os.close(fd)
        raise
    return fd
