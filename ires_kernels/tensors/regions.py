"""Memory that is not torch's own: which addresses the operations must not write, or must not use any more, and why.

Whoever hands out tensors over such memory registers it here; `checks` asks before anything runs. This module knows
neither tensors nor files, only addresses.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Protocol


class Region(Protocol):
    """Memory from the address `start` up to `stop`."""

    start: int
    stop: int

    def problem(self, address: int, written: bool) -> str | None:
        """Why the tensor at `address` cannot be an operand, or cannot be written; to follow the name of an argument."""

    def note(self, address: int) -> str | None:
        """Why the tensor at `address` has a dtype that nobody would expect of it; to follow a complaint about that."""

    def populate(self, address: int, nbytes: int, written: bool) -> None:
        """Have the memory there, for reading or writing. Raises OSError where that cannot be."""


_PIECE = 8 << 20
"""Bytes that a thread populates at a time."""


# Starts and regions, in order. Replaced as a whole, so that whoever looks at it needs no lock.
_known: tuple[tuple[int, ...], tuple[Region, ...]] = ((), ())
_changing = threading.RLock()


def add(region: Region) -> None:
    """Register memory that overlaps no other."""
    _replace(lambda regions: [*regions, region])


def remove(region: Region) -> None:
    """Forget it. Before the memory is unmapped, for its addresses may come back as something else."""
    _replace(lambda regions: [other for other in regions if other is not region])


def problem(address: int, written: bool) -> str | None:
    """`Region.problem` of the memory at an address; None where nobody registered any."""
    region = _find(address)
    return region.problem(address, written) if region else None


def note(address: int) -> str | None:
    """`Region.note` of the memory at an address."""
    region = _find(address)
    return region.note(address) if region else None


def populate(ranges: Iterable[tuple[int, int, bool]], threads: int = 1) -> None:
    """Have the memory there that an operation is about to use: (address, bytes, written) of each operand.

    One system call in place of a fault every 64 KiB, or every 4 KiB that are written: .86 of the time of bfloat16
    `add_difference_` on 3 × 256 MB of page cache, two threads. From the disk it is as fast as faults are.
    """
    found = [(region, *each) for each in ranges if (region := _find(each[0])) is not None]
    pieces = deque(
        (region, address + start, min(_PIECE, nbytes - start), written)
        for region, address, nbytes, written in found
        for start in range(0, nbytes, _PIECE)
    )
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while pieces and not errors:
                with suppress(IndexError):  # another thread was faster
                    region, address, nbytes, written = pieces.popleft()
                    region.populate(address, nbytes, written)
        except BaseException as error:
            errors.append(error)

    others = []
    with suppress(RuntimeError):  # the system starts no more
        for _ in range(min(threads, len(pieces) // 2) - 1):
            other = threading.Thread(target=work)
            other.start()
            others.append(other)
    work()
    for other in others:
        other.join()
    if errors:
        raise errors[0]


def is_any() -> bool:
    """Whether anybody registered any memory."""
    return bool(_known[0])


def _find(address: int) -> Region | None:
    starts, found = _known
    if not starts:
        return None
    i = bisect_right(starts, address) - 1
    return found[i] if i >= 0 and address < found[i].stop else None


def _replace(change: Callable[[tuple[Region, ...]], list[Region]]) -> None:
    global _known
    with _changing:
        while True:  # the garbage collector may run a finalizer that calls `remove` in the middle of this
            before = _known
            found = sorted(change(before[1]), key=lambda region: region.start)
            after = tuple(region.start for region in found), tuple(found)
            if _known is before:
                _known = after
                return
