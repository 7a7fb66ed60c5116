"""Reading what is elsewhere ahead of who needs it, so that they wait for bytes and not for answers.

A request is as fast as a store lets one be, some 25 to 100 MB/s, and its first byte comes after 50 ms; so it takes many
of them at once, each of some megabytes. What a run reads of a file is known before: it is cut into pieces in the order
in which the steps take it, and as one is read, those behind it are asked for. A piece is dropped when all of it was
read. Whatever else is read comes from a request of its own, or from pieces that `will_need` asked for.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from itertools import pairwise
from pathlib import Path
from threading import RLock, get_ident
from time import monotonic
from typing import Any

from ires_kernels.checkpoints import objects
from ires_kernels.checkpoints.addresses import Unreachable
from ires_kernels.checkpoints.checkpoint import FileId
from ires_kernels.checkpoints.standins import Far

PIECE = 12 << 20
"""Bytes of a request: at 25 MB/s and 50 ms away, .48 s of .53 s are spent with bytes on their way."""
AT_ONCE = 32
"""Requests for pieces that are on their way, of all files of a run together."""
MOST = 48 * PIECE
"""Bytes that are on their way or were not read yet: so many that no request waits for who reads."""
_LATELY = 5.0
"""Seconds for which a place where a thread has read counts as one where it reads."""
_SMALL = 1 << 18
"""Bytes for which, where a piece was dropped already, only they are asked for again."""


class Window:
    """How much the files of a run may have asked for ahead, and where they are read."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.near = 0
        """Bytes that were asked for and are not all read."""
        self.under_way = 0
        """Requests."""
        self._places: dict[object, tuple[int, float]] = {}  # of each file, how many, and when

    @property
    def room(self) -> int:
        return MOST - self.near

    def share(self, file: object, places: int) -> int:
        """Bytes that a file may ask for ahead of each of the places where it is read."""
        now = monotonic()
        self._places[file] = places, now
        lately = [count for count, at in list(self._places.values()) if now - at < _LATELY]
        return AT_ONCE * PIECE // max(1, sum(lately))

    def ask(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        self.under_way += 1
        future = objects.begin(work)
        future.add_done_callback(self._has_come)
        return future

    def _has_come(self, _: object) -> None:
        with self.lock:
            self.under_way -= 1


class RemoteFile:
    """A file that is elsewhere, for as long as a run reads it."""

    def __init__(self, path: Path, far: Far, window: Window, reads: Iterable[tuple[int, int]] = ()) -> None:
        """`reads`: what will be read of it, (offset, bytes), in that order."""
        self.path = path
        self._far = far
        self._window = window
        self._pieces = _cut(reads)
        self._starts = sorted((start, number) for number, (start, _) in enumerate(self._pieces))
        self._near: dict[int, Future[Any]] = {}
        self._left: dict[int, int] = {}  # bytes of a piece that are not read
        self._done: set[int] = set()
        self._at: dict[int, tuple[int, float]] = {}  # by thread, the piece that it reads, and when
        self._closed = False

    def stamp(self) -> FileId:
        """What it was when it was first asked for; reading finds out whether it still is."""
        return FileId.far(self._far.size, self._far.tag)

    def read_into(self, view: memoryview, offset: int) -> None:
        view = view.cast("B") if view.ndim != 1 or view.format != "B" else view
        if offset + len(view) > self._far.size:
            raise Unreachable(self._far.object.where, f"the file ends at byte {self._far.size}")
        while len(view):
            number = self._piece(offset)
            start, stop = (offset, offset + len(view)) if number is None else self._pieces[number]
            stop = min(stop, offset + len(view))
            if number is None or (number in self._done and stop - offset < _SMALL):
                stop = min(stop, self._next(offset))
                data = memoryview(self._result(objects.begin(self._far.object.read(offset, stop))))
                start = offset
            else:
                piece = self._ask(number)
                self._ask_ahead(number)
                data = memoryview(self._result(piece))
                self._read_of(number, stop - offset)
            view[: stop - offset] = data[offset - start : stop - start]
            view, offset = view[stop - offset :], stop

    def read_views(self, views: Sequence[memoryview], offset: int) -> None:
        for view in views:
            self.read_into(view, offset)
            offset += len(view)

    def reads(self, *_: int) -> None:
        """They have to come here first."""

    def will_need(self, offset: int, size: int) -> None:
        with self._window.lock:
            if self._piece(offset) is not None or self._window.room < size:
                return
            self._pieces.append((offset, offset + size))
            number = len(self._pieces) - 1
            insort(self._starts, (offset, number))
        self._ask(number)

    def close(self) -> None:
        """Also ends what is on its way, and who waits for it."""
        with self._window.lock:
            self._closed = True
            waiting = list(self._near.values())
            self._window.near -= sum(self._pieces[number][1] - self._pieces[number][0] for number in self._near)
            self._near.clear()
        for each in waiting:
            each.cancel()

    def _piece(self, offset: int) -> int | None:
        """The piece that has a byte."""
        at = bisect_right(self._starts, (offset, len(self._pieces)))
        if not at:
            return None
        number = self._starts[at - 1][1]
        return number if offset < self._pieces[number][1] else None

    def _next(self, offset: int) -> int:
        """Where the next piece begins."""
        at = bisect_right(self._starts, (offset, len(self._pieces)))
        return self._starts[at][0] if at < len(self._starts) else self._far.size

    def _ask(self, number: int) -> Future[Any]:
        start, stop = self._pieces[number]
        with self._window.lock:
            if self._closed:
                raise Unreachable(self._far.object.where, "was closed meanwhile")
            if number not in self._near:
                self._near[number] = self._window.ask(self._far.object.read(start, stop))
                self._left[number] = stop - start
                self._window.near += stop - start
            return self._near[number]

    def _ask_ahead(self, number: int) -> None:
        """Have what comes behind a piece brought near, as much as is the share of this place."""
        share = self._window.share(self, self._places(number))
        for behind in range(number + 1, min(number + 1 + 2 * AT_ONCE, len(self._pieces))):  # some may be small
            start, stop = self._pieces[behind]
            share -= stop - start
            if share < 0 or self._window.room < stop - start or self._window.under_way >= AT_ONCE:
                return
            if behind not in self._done and behind not in self._near:
                self._ask(behind)

    def _places(self, number: int) -> int:
        """How many places far from each other are read; threads at tensors next to each other are at one."""
        now = monotonic()
        self._at[get_ident()] = number, now
        numbers = sorted(each for each, at in list(self._at.values()) if now - at < _LATELY)
        return 1 + sum(two - one > AT_ONCE for one, two in pairwise(numbers))

    def _read_of(self, number: int, count: int) -> None:
        with self._window.lock:
            if number not in self._near:
                return
            self._left[number] -= count
            if self._left[number] <= 0:
                del self._near[number]
                self._done.add(number)
                self._window.near -= self._pieces[number][1] - self._pieces[number][0]

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except CancelledError:
            raise Unreachable(self._far.object.where, "was closed meanwhile") from None


def _cut(reads: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pieces in the order of what is read, each of bytes that lie and are read one behind the other.

    What is read twice is in the first of them alone.
    """
    pieces: list[tuple[int, int]] = []
    known: list[tuple[int, int]] = []
    for offset, size in reads:
        stop = offset + size
        at = bisect_right(known, (offset, stop))
        if not size or (at and known[at - 1][1] > offset) or (at < len(known) and known[at][0] < stop):
            continue
        insort(known, (offset, stop))
        while offset < stop:
            if pieces and pieces[-1][1] == offset and pieces[-1][1] - pieces[-1][0] < PIECE:
                begin = pieces.pop()[0]
            else:
                begin = offset
            offset = min(stop, begin + PIECE)
            pieces.append((begin, offset))
    return pieces
