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
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import xxhash

from ires_kernels.files import interrupts
from ires_kernels.files.ownership import is_same, open_own, private_mode
from ires_kernels.files.store import NO_THREAD, allocate, named, read_into, write_all

AHEAD = 2
"""Windows that are saved before the first of them must be new; slots of a ring."""

_MAGIC = b"iresundo"
_HEAD = struct.Struct("<8sQQQ")  # magic, number of the window, offset in its file, bytes
_BLOCK = 4096  # of a slot's head, so that what it holds is aligned
_CHUNK = 1 << 20
_RECORD = struct.Struct("<I16s")  # length and xxh3_128 of a record of the log
_BEGUN, _ENDED = b"", b"ended"  # without undo, in the log around the records of a run


class Extent(NamedTuple):
    """Bytes [start, stop) of the file `file`."""

    file: str
    start: int
    stop: int


class JournalError(ValueError):
    """Why nobody knows any more which bytes are new."""


class UndoGone(JournalError):
    """Why old bytes cannot be brought back; the update can still be finished."""


class Journal:
    """The journal in `folder` of an update of `files`, open for reading and writing, by name.

    slots     0: no undo; AHEAD: a ring; as many as windows: all old bytes are kept
    log_size  bytes that the log has at least; zeros after its records
    new       make it, with all the space that it will need; otherwise it is the one that was made before

    Raises OSError where there is no space, JournalError for a journal or log that is not what it was.
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, int],
        windows: Sequence[Extent],
        slots: int,
        log_size: int,
        *,
        sync: bool,
        new: bool,
    ) -> None:
        self.windows = windows
        self.records: list[bytes] = []
        """Of the windows that are new, in order."""
        self._files = files
        self._sizes = {name: os.fstat(fd).st_size for name, fd in files.items()}
        self._path, self._log_path = folder / "journal", folder / "log"
        self._slots = slots
        self._sync = sync
        sizes = [_BLOCK + -(-(window.stop - window.start) // _BLOCK) * _BLOCK for window in windows]
        if slots < len(windows):
            sizes = [max(sizes, default=0)] * slots
        self._offsets = [0, *accumulate(sizes)]
        self._log_end = 0
        self._begun = self._ended = False
        self._saved = 0  # windows whose old bytes are safe, or need not be
        self._written: dict[int, bytes] = {}  # records of windows that are written, and not in the log
        self._closing = self._failed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._first = threading.Lock()  # without undo, before the first write
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._fd = self._open(self._path, self._offsets[-1] if slots else 0, new)
        try:
            self._log = self._open(self._log_path, log_size, new)
        except BaseException:
            os.close(self._fd)
            raise

    @staticmethod
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

    def recover(self) -> None:
        """Read the log, and put back the old bytes of every window that has no record.

        Raises JournalError where there is no undo and the run before did not end in order.
        """
        self._read_log()
        # What was read may be nowhere but in memory, where the run before was killed; and slots are used again by it.
        with named(self._log_path):
            raw = memoryview(bytearray(self._log_end))
            read_into(self._log, raw, 0, self._log_path)
            write_all(self._log, raw, 0, self._log_path)
            if self._sync:
                os.fdatasync(self._log)
        done = len(self.records)
        if not self._slots:
            self._check_ended()
            return
        self._put_back(self._held(range(done, len(self.windows))))

    def _check_ended(self) -> None:
        """Without undo: refuse what a run left that did not end in order."""
        if self._begun and not self._ended:
            raise JournalError(
                "it was interrupted in the middle of a window, and --no-undo kept no old bytes: "
                "it is part old and part new"
            )

    def check_restorable(self, *, ended: bool) -> None:
        """Raise UndoGone where old bytes are gone: of a window that is new, or once the run has `ended`, of any."""
        self._read_log()
        if not self._slots and self._begun:
            self._check_ended()
            raise UndoGone("--no-undo kept no old bytes")
        new = len(self.windows) if ended else len(self.records)
        held = self._held(range(new))
        if len(held) < new:
            raise UndoGone(
                f"{new} of its {len(self.windows)} windows are new, and the old bytes of {len(held)} of them are still "
                "there (--keep-undo keeps all)"
            )

    def restore(self) -> None:
        """Put back the old bytes of all windows, having called `check_restorable`."""
        self._put_back(self._held(range(len(self.windows))))

    def start(self) -> None:
        """Begin to save; from now on `wait` and `complete`, then `close`. Raises OSError where no thread starts."""
        self._begun = False
        self._saved = len(self.records) if self._slots else len(self.windows)
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
        if not self._slots and not self._begun:
            with self._first:
                if not self._begun:
                    self._append(_BEGUN)
                    self._begun = True
        self._write(file, data, offset)

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
            for fd in (self._fd, self._log):
                os.close(fd)

    def _run(self) -> None:
        try:
            settled = len(self.records)
            for number in range(settled, len(self.windows)):
                if number - settled >= AHEAD:
                    if not self._settle(settled):
                        break
                    settled += 1
                if self._slots and not self._closing:
                    self._save(number)
                    with self._changed:
                        self._saved = number + 1
                        self._changed.notify_all()
            while settled < len(self.windows) and self._settle(settled):
                settled += 1
            if not self._slots and self._begun and not self._failed:
                for name in self._files:
                    self._fdatasync(name)
                self._append(_ENDED)
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
        if self._slots:
            self._fdatasync(self.windows[number].file)
        self._append(record)
        self.records.append(record)
        return True

    def _write(self, file: str, data: memoryview, offset: int) -> None:
        self._check_size(file)  # before this write may make it as long as it was, with zeros for what was cut
        write_all(self._files[file], data, offset, Path(file))

    def check_files(self, folder: Path) -> None:
        """Raise OSError where a file has another size than when the journal was opened, or is not in `folder` now."""
        for name, fd in self._files.items():
            self._check_size(name)
            if not is_same(fd, folder / name):
                raise OSError(errno.EIO, "somebody has moved or replaced it while it was changed", f"{folder / name}")

    def _check_size(self, file: str) -> None:
        size = os.fstat(self._files[file]).st_size
        if size != self._sizes[file]:
            text = f"somebody has cut or lengthened it while it was changed, to {size} bytes from {self._sizes[file]}"
            raise OSError(errno.EIO, text, file)

    def _save(self, number: int) -> None:
        window = self.windows[number]
        offset = self._offsets[number % self._slots]
        length = window.stop - window.start
        head = _HEAD.pack(_MAGIC, number, window.start, length)
        hasher = xxhash.xxh3_128(head + window.file.encode())
        buffer = memoryview(bytearray(min(_CHUNK, length)))
        for done in range(0, length, _CHUNK):
            part = buffer[: length - done]
            read_into(self._files[window.file], part, window.start + done, Path(window.file))
            hasher.update(part)
            write_all(self._fd, part, offset + _BLOCK + done, self._path)
        write_all(self._fd, head + hasher.digest(), offset, self._path)
        if self._sync:
            with named(self._path):
                os.fdatasync(self._fd)

    def _held(self, numbers: Iterable[int]) -> dict[int, int]:
        """Those of the windows whose old bytes are in a slot, and where these begin."""
        held = {}
        for number in numbers if self._slots else ():
            window = self.windows[number]
            length = window.stop - window.start
            offset = self._offsets[number % self._slots]
            raw = bytes(self._read(_HEAD.size + 16, offset))
            if raw[: _HEAD.size] != _HEAD.pack(_MAGIC, number, window.start, length):
                continue
            hasher = xxhash.xxh3_128(raw[: _HEAD.size] + window.file.encode())
            for done in range(0, length, _CHUNK):
                hasher.update(self._read(min(_CHUNK, length - done), offset + _BLOCK + done))
            if hasher.digest() == raw[_HEAD.size :]:  # else the run ended while it was saved, before it was changed
                held[number] = offset + _BLOCK
        return held

    def _read(self, count: int, offset: int) -> memoryview:
        view = memoryview(bytearray(count))
        read_into(self._fd, view, offset, self._path)
        return view

    def _put_back(self, held: Mapping[int, int]) -> None:
        for number, offset in held.items():
            interrupts.check()
            window = self.windows[number]
            length = window.stop - window.start
            for done in range(0, length, _CHUNK):
                old = self._read(min(_CHUNK, length - done), offset + done)
                self._write(window.file, old, window.start + done)
        for name in {self.windows[number].file for number in held}:
            self._fdatasync(name)

    def _read_log(self) -> None:
        payloads, self._log_end = _payloads(self._log)
        self._begun = bool(payloads)
        self._ended = payloads[-1:] == [_ENDED]
        self.records[:] = [payload for payload in payloads if payload not in (_BEGUN, _ENDED)]

    def _append(self, payload: bytes) -> None:
        record = _RECORD.pack(len(payload), xxhash.xxh3_128_digest(payload)) + payload
        write_all(self._log, record, self._log_end, self._log_path)
        self._log_end += len(record)
        if self._sync and (self._slots or payload in (_BEGUN, _ENDED)):
            with named(self._log_path):
                os.fdatasync(self._log)

    def _fdatasync(self, name: str) -> None:
        if self._sync:
            with named(Path(name)):
                os.fdatasync(self._files[name])


def count_records(folder: Path) -> int:
    """How many windows of the update in `folder` are new."""
    try:
        fd = open_own(folder / "log")
    except FileNotFoundError:
        return 0
    try:
        return sum(payload not in (_BEGUN, _ENDED) for payload in _payloads(fd)[0])
    finally:
        os.close(fd)


def is_broken_off(folder: Path) -> bool:
    """Whether the last run of an update without undo, in `folder`, has written and did not end in order."""
    try:
        fd = os.open(folder / "log", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        payloads, _ = _payloads(fd)
    finally:
        os.close(fd)
    return bool(payloads) and payloads[-1] != _ENDED


def _payloads(fd: int) -> tuple[list[bytes], int]:
    """What a log holds, and where it ends; a torn record at the end is what is done again."""
    raw = b""
    while part := os.pread(fd, _CHUNK, len(raw)):
        raw += part
    payloads, at = [], 0
    while len(raw) - at >= _RECORD.size:
        length, digest = _RECORD.unpack_from(raw, at)
        payload = raw[at + _RECORD.size : at + _RECORD.size + length]
        if len(payload) < length or xxhash.xxh3_128_digest(payload) != digest:
            break
        payloads.append(payload)
        at += _RECORD.size + length
    return payloads, at
