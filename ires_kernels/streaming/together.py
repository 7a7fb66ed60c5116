"""Several devices at the same time: each has an engine and a thread of its own that looks after it.

A tensor is computed where it stays. So each device has its own tensors, and shares no queue of work with the others:
only the files, which the page cache holds once, and the number of threads.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ires_kernels.checkpoints.checkpoint import FileId
from ires_kernels.checkpoints.sources import Source
from ires_kernels.files import interrupts
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Step
from ires_kernels.streaming import stream
from ires_kernels.streaming.asked import Placed, Progress
from ires_kernels.streaming.outcome import Outcome
from ires_kernels.streaming.tiles import Processors

if TYPE_CHECKING:
    from torch import Tensor


class Part(NamedTuple):
    """What is computed on one device."""

    tensors: Mapping[str, Tensor]
    steps: Sequence[Step]
    processors: Processors


def fill(
    parts: Sequence[Part],
    file_ids: Mapping[Path, FileId],
    rules: Rules,
    *,
    hashed: Container[str],
    threads: int | None = None,
    progress: Progress | None = None,
    memory: Mapping[Path, Source] | None = None,
    placed: Placed | None = None,
) -> Outcome:
    """`stream.fill` of tensors on one device or several, `threads` of them in all and at least one for each.

    Raises the first error, when all devices have stopped. An interrupt ends all of them at their next tile.
    """

    def run(part: Part, threads: int | None, progress: Progress | None) -> Outcome:
        return stream.fill(
            part.tensors, part.steps, file_ids, rules,
            hashed=hashed, processors=part.processors, threads=threads, progress=progress, memory=memory,
            placed=placed,
        )  # fmt: skip

    if len(parts) < 2:
        return run(parts[0], threads, progress) if parts else Outcome()
    share, more = divmod(threads or stream.default_threads(), len(parts))
    group = _Group(progress, len(parts))
    for number, part in enumerate(parts):
        each = max(1, share + (number < more))
        group.start(number, lambda told, part=part, each=each: run(part, each, told))  # type: ignore[misc]
    return group.wait()


class _Stopped(Exception):
    """Another device has failed, or an interrupt has come."""


class _Group:
    """The threads of several devices, and what they have come to."""

    def __init__(self, progress: Progress | None, count: int) -> None:
        self._progress = progress
        self._done, self._todo = [0] * count, [0] * count
        self._outcomes: list[Outcome] = []
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._ended: list[threading.Event] = []

    def start(self, number: int, work: Callable[[Progress], Outcome]) -> None:
        """Begin the work of a device, which is given what to tell its progress to; here, if there are no threads."""
        event = threading.Event()
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: context.run(self._work, number, work, event), name=f"device-{number}")
        self._ended.append(event)
        try:
            thread.start()
        except RuntimeError:  # the system starts no more of them
            self._work(number, work, event)

    def wait(self) -> Outcome:
        """Return when all have ended. Raises what went wrong first."""
        with interrupts.held():
            for event in self._ended:
                while not event.wait(0.1):
                    self._look()
            self._look()
            if self._error is not None:
                raise self._error
        outcome = Outcome()
        for each in self._outcomes:
            outcome.update(each)
        return outcome

    def _work(self, number: int, work: Callable[[Progress], Outcome], event: threading.Event) -> None:
        def told(done: int, todo: int) -> None:
            self._done[number], self._todo[number] = done, todo
            if self._error is not None:
                raise _Stopped

        try:
            found = work(told)
            with self._lock:
                self._outcomes.append(found)
        except BaseException as error:
            self._fail(error)
        finally:
            event.set()

    def _look(self) -> None:
        """Show the progress of all, and take an interrupt."""
        if self._error is None:
            try:
                interrupts.check()
                if self._progress is not None:
                    self._progress(sum(self._done), sum(self._todo))
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep the first error; the others stop when they next tell their progress."""
        with self._lock:
            self._error = self._error or error
