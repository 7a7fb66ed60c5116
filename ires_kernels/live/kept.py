"""Bits of tensors from before they were changed, run by run: as a copy until the new ones are there, then packed."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

import xxhash

from ires_kernels.backends import packing
from ires_kernels.dtypes import STORAGE
from ires_kernels.streaming.stream import default_threads

Item = TypeVar("Item")
_CHUNK = 16 << 20
"""Bytes of records that lie together at least."""


class Run:
    """Old bytes of a tensor, from some byte of it on."""

    __slots__ = ("_digest", "_packed", "address", "dtype", "size")

    def __init__(self, dtype: str, address: int, size: int) -> None:
        self.dtype = dtype
        self.address = address
        """Where they are, or what is packed of them."""
        self.size = ctypes.c_int64(size)
        """How many bytes are there. Who copies them elsewhere than here adds to it, by its address."""
        self._packed = self._digest = 0

    @property
    def nbytes(self) -> int:
        """How many are held."""
        return self._packed or self.size.value

    @property
    def copied(self) -> int:
        """The address of the bytes themselves, which are read once, before they are packed."""
        assert not self._packed, "read again after it was changed"
        return self.address

    def pack(self, new: int, room: int, shelf: Shelf) -> None:
        """Hold what was done to these bytes instead of them, as the new ones are at the address `new`."""
        size = packing.pack(self.dtype, self.address, new, self._count, room)
        at = shelf.put(room, size)
        self._digest = _digest(new, self.size.value)
        self.address, self._packed = at, size

    def fits(self, new: int) -> bool:
        """Whether the bytes at `new` are those which it was packed by, or it does not matter."""
        return not self._packed or _digest(new, self.size.value) == self._digest

    def restore(self, to: int) -> None:
        """Put the bytes where they were; if they are packed, those that it was packed by are there."""
        if self._packed:
            packing.unpack(self.dtype, self.address, to, self._count)
        else:
            ctypes.memmove(to, self.address, self.size.value)

    @property
    def _count(self) -> int:
        return self.size.value * 8 // STORAGE[self.dtype].bits


def _digest(address: int, size: int) -> int:
    return xxhash.xxh3_64_intdigest((ctypes.c_char * size).from_address(address))


class Rooms:
    """Memory for runs that are under way: few at a time, so the same is used again and again."""

    def __init__(self) -> None:
        self._all: dict[int, mmap.mmap] = {}
        self._spare: list[int] = []

    def take(self, size: int) -> int:
        """The address of so many bytes. Raises OSError."""
        while True:
            try:
                address = self._spare.pop()
            except IndexError:
                break
            if len(self._all[address]) >= size:
                return address
            del self._all[address]  # a larger one takes its place
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = _address(memory)
        self._all[address] = memory
        return address

    def give(self, address: int) -> None:
        """It is in use no more."""
        self._spare.append(address)

    def clear(self) -> None:
        """Let go of those that are not in use."""
        while self._spare:
            del self._all[self._spare.pop()]


class Shelf:
    """Where records lie, one behind the other."""

    def __init__(self) -> None:
        self._chunks: list[mmap.mmap] = []
        self._at = self._left = 0
        self._lock = threading.Lock()

    def put(self, record: int, size: int) -> int:
        """Copy a record here; returns its address. Raises OSError where there is no room."""
        with self._lock:
            if size > self._left:
                chunk = mmap.mmap(-1, max(size, _CHUNK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self._chunks.append(chunk)
                self._at, self._left = _address(chunk), len(chunk)
            at = self._at
            used = -(-size // 8) * 8
            self._at, self._left = at + used, self._left - used
        ctypes.memmove(at, record, size)
        return at


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def for_each(items: Iterable[Item], work: Callable[[Item], None]) -> None:
    """Do some work, which does not fail, on each item: by threads, as many as the system starts."""
    left = iter([*items])
    lock = threading.Lock()

    def take() -> None:
        while True:
            with lock:
                item = next(left, None)
            if item is None:
                return
            work(item)

    ended = []
    for _ in range(default_threads() - 1):
        event = threading.Event()
        try:
            threading.Thread(target=_told, args=(take, event), name="ires-undo").start()
        except RuntimeError:  # the system starts no more of them
            break
        ended.append(event)
    take()
    for event in ended:
        event.wait()


def _told(work: Callable[[], None], ended: threading.Event) -> None:
    try:
        work()
    finally:
        ended.set()
