"""Bits of tensors from before they were changed, run by run: as a copy until the new ones are there, then packed."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import TypeVar

from ires_kernels.backends import packing
from ires_kernels.dtypes import STORAGE
from ires_kernels.streaming.stream import default_threads

Item = TypeVar("Item")
_CHUNK = 16 << 20
"""Bytes of records that lie together at least."""


class Run:
    """Old bytes of a tensor, from some byte of it on."""

    __slots__ = ("_counts", "address", "dtype", "is_packed")

    def __init__(self, dtype: str, address: int, size: int, *, packed: bool = False) -> None:
        self.dtype = dtype
        self.address = address
        """Where they are, or the record of them."""
        self.is_packed = packed
        # Of how many bytes this is, and how many the record has. Who fills the room at the address adds to them.
        self._counts = (ctypes.c_int64 * 2)(size, 0)

    @property
    def counts(self) -> int:
        """The address of how many bytes this is of, and behind that of how many the record has, of 64 bits each."""
        return ctypes.addressof(self._counts)

    @property
    def size(self) -> int:
        """Of how many old bytes this is, up to now."""
        return self._counts[0]

    @property
    def nbytes(self) -> int:
        """How many it takes to hold them."""
        return self._counts[1] if self.is_packed else self._counts[0]

    @property
    def copied(self) -> int:
        """The address of the bytes themselves, which are read once, before they are changed."""
        assert not self.is_packed, "read again after it was changed"
        return self.address

    def copy(self, old: int, size: int) -> None:
        """Fill its room with bytes that will be changed."""
        ctypes.memmove(self.address, old, size)
        self._counts[0] = size

    def pack(self, new: int, room: int) -> None:
        """Hold in other room what was done to these bytes instead of them, as the new ones are at the address `new`."""
        self._counts[1] = packing.pack(self.dtype, self.address, new, self._count, room)
        self.address, self.is_packed = room, True

    def move(self, shelf: Shelf) -> None:
        """Have the record there."""
        self.address = shelf.put(self.address, self.nbytes)

    def fits(self, new: int) -> bool:
        """Whether the bytes at `new` are those which it was packed by, or it does not matter."""
        return not self.is_packed or packing.fits(self.dtype, self.address, new, self._count)

    def restore(self, to: int) -> None:
        """Put the bytes where they were; if they are packed, those that it was packed by are there."""
        if self.is_packed:
            packing.unpack(self.dtype, self.address, to, self._count)
        else:
            ctypes.memmove(to, self.address, self.size)

    @property
    def _count(self) -> int:
        return self.size * 8 // STORAGE[self.dtype].bits


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
        weakref.finalize(self, _leave, self._chunks)

    def put(self, record: int, size: int) -> int:
        """Copy a record here; returns its address. Raises OSError where there is no room."""
        with self._lock:
            if size > self._left:
                chunk = _chunk(size)
                self._chunks.append(chunk)
                self._at, self._left = _address(chunk), len(chunk)
            at = self._at
            used = -(-size // 8) * 8
            self._at, self._left = at + used, self._left - used
        ctypes.memmove(at, record, size)
        return at


_spare: list[mmap.mmap] = []
"""Chunks of the shelf that nobody needs any more and had most. The system may take their pages whenever it needs them
(MADV_FREE): until then the next one, as of a sweep over alpha, has pages that are not fresh."""


def _chunk(size: int) -> mmap.mmap:
    """Memory for records. Raises OSError."""
    try:
        spare = _spare.pop() if size <= _CHUNK else None
    except IndexError:
        spare = None
    if spare is not None and len(spare) >= size:
        return spare
    return mmap.mmap(-1, max(size, _CHUNK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _leave(chunks: list[mmap.mmap]) -> None:
    """For the next one, unless more are there."""
    if hasattr(mmap, "MADV_FREE") and len(chunks) > len(_spare):
        for chunk in chunks:
            chunk.madvise(mmap.MADV_FREE)
        _spare[:] = chunks


def forget() -> None:
    """Let go of memory that is there for the next one."""
    _spare.clear()


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
