"""What a backend is, which ones exist, and which one a call gets.

A backend is a module with two functions, ``run(call)`` and ``status(device)``. It receives operands that have passed
every check, so it holds arithmetic only. All backends give the same bits; `reference` is the readable definition of
them. CPU tensors go to native or else to reference, GPU tensors to native if it was built for them or else to triton.
"""

from __future__ import annotations

import importlib
import math
import os
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

# Fastest first, on every device: reference is for the CPU alone, where triton is only ever interpreted.
NAMES = ("native", "reference", "triton")

# Threads one call may use; None: as many as torch uses. Set it to 1 in a worker that is itself one of many.
threads: ContextVar[int | None] = ContextVar("threads", default=None)


def thread_count() -> int:
    """How many threads a call made here and now may use."""
    return threads.get() or torch.get_num_threads()


class BackendStatus(NamedTuple):
    """Whether a backend can run on a kind of device here, and what it is or why it cannot."""

    available: bool
    detail: str


@dataclass(slots=True)
class Tally:
    """Counts of what one or more calls did to the numbers; calls add to it, and ``+=`` joins two.

    D is the scaled update of an element in the compute type: ``alpha * (x - y)`` for add_difference,
    ``a1*r1 + a2*r2 + …`` for add, ``a - b`` for subtract, whose target counts as 0.
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

    def __iadd__(self, other: Tally) -> Tally:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def effective_alpha(self, alpha: float) -> float:
        """The alpha that survived rounding when `alpha` was asked of every call; NaN where nothing was updated."""
        return alpha * self.dot / self.norm2 if self.norm2 else math.nan


class Call(NamedTuple):
    """One launch: the same operation on every item of a list. Items may differ in shape, strides and dtypes.

    `inputs[i]` is (a, b) for subtract, (t, r1, …, rk) for add, (t,) for scale and (t, x, y) for add_difference.
    `outs[i]` may be exactly one of the tensors in `inputs[i]`; otherwise it shares no memory with any operand.
    """

    op: str
    outs: list[Tensor]
    inputs: list[tuple[Tensor, ...]]
    factors: tuple[float, ...]  # add: one per residual; scale: (s,); add_difference: (alpha,); subtract: ()
    stochastic: bool
    seed: int
    streams: list[int]  # one per item
    offset: int  # flat index of every item's first element in the tensor it is a piece of
    tally: Tally | None


class Backend(Protocol):
    """What every module in this package provides."""

    def run(self, call: Call) -> None: ...

    def status(self, device: str) -> BackendStatus: ...  # torch's name for the kind: "cpu", "cuda", "xpu"


@cache
def _load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"{__name__}.{name}"))


@cache
def _fastest(kind: str) -> Backend | None:
    return next((backend for backend in map(_load, NAMES) if backend.status(kind).available), None)


def backends() -> dict[str, BackendStatus]:
    """Every backend this version has: whether it can run here, and what it is or why not, for the CPU and for GPUs."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ("cpu", accelerator.type if accelerator else "cuda")
    table = {name: {kind: _load(name).status(kind) for kind in kinds} for name in NAMES}
    return {
        name: BackendStatus(
            any(s.available for s in row.values()), "; ".join(f"{k}: {s.detail}" for k, s in row.items())
        )
        for name, row in table.items()
    }


def choose(device: torch.device) -> Backend:
    """The backend for tensors on `device`: the one IRES_BACKEND names, else the fastest one available."""
    kind = device.type
    forced = os.environ.get("IRES_BACKEND")
    if not forced:
        backend = _fastest(kind)
        if backend is None:
            raise RuntimeError(
                f"no backend for tensors on {device}: {_inventory(kind)}; "
                "make one of these available, or move the tensors to the CPU"
            )
        return backend
    if forced not in NAMES:
        raise RuntimeError(f"IRES_BACKEND={forced}: no such backend; there is {_inventory(kind)}")
    status = _load(forced).status(kind)
    if not status.available:
        raise RuntimeError(
            f"IRES_BACKEND={forced}: not available for {kind} tensors: {status.detail}; there is {_inventory(kind)}"
        )
    return _load(forced)


def _inventory(kind: str) -> str:
    found = {name: _load(name).status(kind) for name in NAMES}.items()
    return ", ".join(f"{name} ({'' if s.available else 'not available: '}{s.detail})" for name, s in found)
