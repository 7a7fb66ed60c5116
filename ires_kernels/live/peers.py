"""The processes that hold one module together, and how each of them learns what all have to know."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PeerError(RuntimeError):
    """Another process that holds a part of the same module has failed, and so nothing was done in this one."""


class Peers:
    """Processes that do the same at the same time. As a context manager it tells the others how this one fails.

    Only what it takes to plan goes between them, and whether each has succeeded: some kilobytes, and no weights. A
    process that fails between two exchanges takes part in the next one with its error, so that nobody waits for it. One
    that is killed leaves the others to what torch.distributed does then: they fail, or wait until its timeout is over.
    """

    def __init__(self, groups: Sequence[ProcessGroup] = (), rank: int = 0) -> None:
        """`groups`: of this process, which in this order reach all others; none where it is alone."""
        self._groups = groups
        self.rank = rank
        self.ranks: tuple[int, ...] = (rank,)
        """Of all of them, in order."""
        self._ended = False
        if groups:
            self.ranks = tuple(sorted(self._all(None)))

    @property
    def are_several(self) -> bool:
        return bool(self._groups)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that speaks for all."""
        return self.rank == self.ranks[0]

    def exchange(self, topic: str, said: Any) -> dict[int, Any]:
        """What each of them has said, by its rank. Raises PeerError where one has failed, or is elsewhere."""
        found = self._all((topic, said))
        for rank, (its, words) in found.items():
            if its == _FAILED:
                raise PeerError(f"rank {rank} has failed, and so nothing was changed here: {words}")
        for rank, (its, _) in found.items():
            if its != topic:
                raise PeerError(f"rank {rank} is at {its!r}, and rank {self.rank} at {topic!r}: call it in all alike.")
        return {rank: words for rank, (_, words) in found.items()}

    def end(self) -> None:
        """Make sure that all of them have done their part; afterwards each is on its own."""
        self.exchange("the end", None)
        self._ended = True

    def _all(self, said: Any) -> dict[int, Any]:
        """Group by group: after the first, all in it know it of each other, and tell that to those of the second."""
        known = {self.rank: said}
        if self._groups:
            import torch.distributed as dist

            ended, self._ended = self._ended, True  # if one of them is gone, nobody listens any more
            for group in self._groups:
                each: list[Any] = [None] * dist.get_world_size(group)
                dist.all_gather_object(each, known, group=group)
                for table in each:
                    known |= table
            self._ended = ended
        return known

    def __enter__(self) -> Peers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._ended and not isinstance(error, PeerError):
            self._all((_FAILED, f"{type(error).__name__}: {error}"))


_FAILED = "failed"
