"""What is asked of a backend, and what it counts. Plain values, that need no torch to be loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from ires_kernels.formats import Format

# Threads one call may use; None: as many as torch uses. Set it to 1 in a worker that is itself one of many.
threads: ContextVar[int | None] = ContextVar("threads", default=None)


@dataclass(slots=True)
class Tally:
    """Counts of what one or more calls did to the numbers; calls add to it, and ``+=`` joins two.

    D is the scaled update of an element in the compute type: ``a1*r1 + a2*r2 + …`` for add, the same with
    ``x - y`` of each pair for add_difference, ``a - b`` for subtract, whose target counts as 0.

    >>> tally = ik.Tally()
    >>> _ = ik.add(torch.ones(1000).bfloat16(), torch.full((1000,), 0.001), tally=tally)
    >>> tally.updates, tally.lost, tally.effective_alpha(1.0)  # to nearest, each update is lost
    (1000, 1000, 0.0)
    """

    elements: int = 0
    updates: int = 0  # D is neither 0 nor NaN
    lost: int = 0  # of those, the stored value equals the target's
    nan_in: int = 0  # an operand is NaN
    inf_in: int = 0  # no operand is NaN, one is infinite
    nan_out: int = 0
    overflow: int = 0  # operands finite, result beyond what rounding to nearest keeps finite in the stored type
    dot: float = 0.0  # sum of (stored - target) * D over the elements where all of it is finite
    norm2: float = 0.0  # sum of D * D over the same elements
    noise: float = 0.0  # of results that are stored as codes with scales: sum of (stored - result)^2

    def __iadd__(self, other: Tally) -> Tally:
        for name in Tally.__slots__:  # and not those of a class that has more
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def effective_alpha(self, alpha: float) -> float:
        """The alpha that survived rounding when `alpha` was asked of every call; NaN where nothing was updated."""
        return alpha * self.dot / self.norm2 if self.norm2 else math.nan


class Call(NamedTuple):
    """One launch: the same operation on every item of a list. Items may differ in shape, strides and dtypes.

    `inputs[i]` is (a, b) for subtract, (t, r1, …, rk) for add, (t,) for scale and (t, x1, y1, …, xk, yk) for
    add_difference.
    `outs[i]` may be exactly one of the tensors in `inputs[i]`; otherwise it shares no memory with any operand.
    """

    op: str
    outs: list[Tensor]
    inputs: list[tuple[Tensor, ...]]
    factors: tuple[float, ...]  # add: one per residual; add_difference: one per pair; scale: (s,); subtract: ()
    stochastic: bool
    seed: int
    streams: list[int]  # one per item
    offset: int  # flat index of every item's first element in the tensor it is a piece of
    tally: Tally | None


class Coded(NamedTuple):
    """Numbers of a quantized weight, from the flat index `first` on; parts are those of `decoding.decode`."""

    format: Format
    full: tuple[int, ...]
    first: int
    parts: Mapping[str, memoryview]
