"""The log of an update in place: a record of each window that is new, in order, and whether the last run has ended.

A record is its length, its hash and its bytes. What is torn at the end of a log is what is done again.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import xxhash

from ires_kernels.files.ownership import open_own
from ires_kernels.files.transfer import named, read_into, write_all

_CHUNK = 1 << 20
_RECORD = struct.Struct("<I16s")  # length and xxh3_128 of a record
_BEGUN, _ENDED = b"", b"ended"  # without undo, around the records of a run


class Log:
    """An open log. `synced` says whether every record is made durable, and not only where a run begins and ends."""

    def __init__(self, fd: int, path: Path, *, sync: bool, synced: bool) -> None:
        self.records: list[bytes] = []
        """Of the windows that are new."""
        self.begun = self.ended = False
        """Whether a run without undo has written, and said at its end that it ended in order."""
        self._fd, self._path = fd, path
        self._sync, self._synced = sync, synced
        self._end = 0

    def read(self) -> None:
        """Learn what it holds."""
        payloads, self._end = _payloads(self._fd)
        self.begun, self.ended = bool(payloads), payloads[-1:] == [_ENDED]
        self.records[:] = [payload for payload in payloads if payload not in (_BEGUN, _ENDED)]

    def keep(self) -> None:
        """Make durable what was read: it may be nowhere but in memory, where the run before was killed."""
        with named(self._path):
            raw = memoryview(bytearray(self._end))
            read_into(self._fd, raw, 0, self._path)
            write_all(self._fd, raw, 0, self._path)
            if self._sync:
                os.fdatasync(self._fd)

    def add(self, record: bytes) -> None:
        """One more window is new."""
        self._append(record, sync=self._synced)
        self.records.append(record)

    def begin(self) -> None:
        """From now on the run writes."""
        self._append(_BEGUN, sync=True)
        self.begun = True

    def end(self) -> None:
        """All that the run has written is in the records."""
        self._append(_ENDED, sync=True)

    def _append(self, payload: bytes, *, sync: bool) -> None:
        record = _RECORD.pack(len(payload), xxhash.xxh3_128_digest(payload)) + payload
        write_all(self._fd, record, self._end, self._path)
        self._end += len(record)
        if self._sync and sync:
            with named(self._path):
                os.fdatasync(self._fd)


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
    """What a log holds, and where it ends."""
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
