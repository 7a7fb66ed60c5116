"""Pinned host memory for a GPU: a ring of pieces that runs borrow, and that stays when they are over.

Pinning costs 1.2 s a GiB (on an H100 machine), as much as reading 20 GB there, so a GPU has no more than PIECES of
it, whatever its threads. A piece that was borrowed is pinned when its memory is first asked for, by who asks: the first
thread of a run reads while the others pin. Threads that find no piece wait for one, so more of them bring nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from torch import Tensor

from ires_kernels.files.plain import size
from ires_kernels.streaming.failures import ComputeError

PIECE = 8 << 20
"""Bytes of a piece: at 26 GB/s 3,000 tiles a second, each with a third of a millisecond for its calls."""
PIECES = 16
"""At most, 128 MiB of them: two each for eight threads."""


class Piece:
    """Borrowed memory, for one tile at a time."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._memory: Tensor | None = None

    @property
    def memory(self) -> Tensor:
        """The bytes, pinned by now. Raises ComputeError where there is no room for them."""
        if self._memory is None:
            try:
                self._memory = self._ring.pin(self._ring.piece)
            except RuntimeError as error:
                reason = f"{error}".partition("\n")[0].rstrip(".")
                raise ComputeError(
                    f"no {size(self._ring.piece)} of host memory could be pinned for a tile: {reason}. Fewer "
                    "--threads need less."
                ) from error
        return self._memory

    @property
    def is_pinned(self) -> bool:
        return self._memory is not None

    def free(self) -> None:
        """Unpin the memory; the piece may be used again."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._ring.unpin(memory)


class Ring:
    """All the pieces: those that are borrowed, and the rest."""

    def __init__(
        self, pin: Callable[[int], Tensor], unpin: Callable[[Tensor], None], piece: int = PIECE, pieces: int = PIECES
    ) -> None:
        self.pin = pin
        self.unpin = unpin
        self.piece = piece
        self._idle = [Piece(self) for _ in range(pieces)]
        self._changed = threading.Condition()

    def borrow(self, most: int) -> list[Piece]:
        """One to `most` pieces, pinned ones first; waits until there is one. Who has some must not ask for more."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle)
            self._idle.sort(key=lambda piece: not piece.is_pinned)
            borrowed, self._idle = self._idle[:most], self._idle[most:]
        return borrowed

    def take_back(self, pieces: Iterable[Piece]) -> None:
        """Nothing uses them any more; their memory stays pinned."""
        with self._changed:
            self._idle += pieces
            self._changed.notify_all()

    def free(self) -> int:
        """Unpin what is not borrowed; returns how many bytes that were."""
        with self._changed:
            pinned = [piece for piece in self._idle if piece.is_pinned]
            for piece in pinned:
                piece.free()
        return len(pinned) * self.piece
