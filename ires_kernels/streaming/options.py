"""How a merge computes and shows its progress; what is computed does not depend on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ires_kernels.checkpoints.header import brief
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.streaming.asked import Progress
from ires_kernels.streaming.tiles import Processors, processors_on

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Options:
    """Made of a caller's arguments by `of`, which refuses wrong ones."""

    processors: Processors
    threads: int | None = None
    progress: Progress | None = None
    locked: bool = True
    """False: without a lock, where the user says that no other process writes there."""
    compare: bool = False
    """Whether what is read is looked at as well, for the report: how target and instruct have moved away from base."""

    @classmethod
    def of(
        cls,
        device: str | torch.device,
        threads: int | None,
        progress: Progress | None,
        lock: bool = True,
        *,
        idle: bool = False,
        compare: bool = False,
    ) -> Options:
        """Raises TypeError and ArgumentError for what cannot be used, a device that is not there among it.

        idle  nothing will be computed
        """
        if progress is not None and not callable(progress):
            kind = type(progress).__name__
            raise TypeError(f"progress is {kind} {brief(progress)}, wanted a function of two numbers")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
            raise TypeError(f"threads is {type(threads).__name__} {brief(threads)}, wanted an integer, or None")
        if threads is not None and threads < 1:
            raise ArgumentError(f"threads is {threads}, wanted 1 or more.")
        return cls(processors_on(device, idle=idle), threads, progress, lock, compare)

    def part(self, before: int, behind: int) -> Options:
        """The same for a part of the work: the progress has so many bytes before it, and so many more to do."""
        progress = self.progress
        if progress is None:
            return self
        return replace(self, progress=lambda done, todo: progress(before + done, before + todo + behind))
