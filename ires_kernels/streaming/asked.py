"""What a run is asked to do, how, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ires_kernels.backends.call import Tally
from ires_kernels.backends.fit import Fit
from ires_kernels.checkpoints.checkpoint import FileId
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.checkpoints.sources import Source
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Step
from ires_kernels.streaming.outcome import Outcome
from ires_kernels.streaming.tiles import Processors

if TYPE_CHECKING:
    from torch import Tensor

    from ires_kernels.streaming.encoded import Scales

Write = Callable[[Step, int, memoryview, Tally], None]
"""Takes a step, a byte offset in its output, the result's bytes from there on, and the tally of the step up to their
end. Called by several threads. With a tensor's last bytes the outcome has what there is to know of it."""
Fitted = Callable[[Step, int, Sequence[memoryview]], Fit]
"""Takes a step that adds a difference, how many elements there are, and its operands as numbers in memory."""
Progress = Callable[[int, int], None]
"""Takes bytes done and bytes to do, read and written together. Called by the thread that started the work."""
Placed = Callable[[str, int, int], None]
"""Takes a tensor that is filled, by name, and bytes of it that have their results now: where they begin, how many."""


class Done(NamedTuple):
    """The beginning of a tensor that an earlier run has written over its target: it is hashed, and left as it is."""

    stop: int
    """The byte of the tensor that follows it."""
    tallies: Mapping[str, Tally]
    """What was counted up to there, by the labels of the steps."""


@dataclass(frozen=True)
class Asked:
    """What is to be done, and where results go."""

    steps: Sequence[Step]
    file_ids: Mapping[Path, FileId]
    rules: Rules
    write: Write
    into: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Tensors that are filled, by name: their elements and their bytes. The results of all others are written."""
    stops: Container[tuple[str, int]] | None = None
    done: Mapping[str, Done] = field(default_factory=dict)
    memory: Mapping[Path, Source] = field(default_factory=dict)
    placed: Placed | None = None
    scales: Callable[[QuantizedRef], Scales] | None = None
    written: Container[Path] = ()
    kept: bool = True
    """False: there are no results."""

    def stays(self, step: Step) -> bool:
        """Whether nothing is written: no results are kept, or it would write over the target what that has."""
        return not self.kept or (self.stops is not None and step.is_own)


@dataclass(frozen=True)
class How:
    """The options of a run."""

    processors: Processors
    threads: int
    hashed: Container[str] | None
    counted: bool
    in_order: bool = False
    fit: Fitted | None = None


@dataclass(frozen=True)
class Told:
    """Who learns of it what, and when."""

    outcome: Outcome
    progress: Progress | None = None
    failed: Callable[[], None] | None = None
