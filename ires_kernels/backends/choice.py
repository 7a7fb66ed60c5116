"""What a backend is, which ones exist, and which one a call gets.

A backend is a module with two functions, ``run(call)`` and ``status(device)``. It receives operands that have passed
every check, so it holds arithmetic only. All backends give the same bits; `reference` is the readable definition of
them. CPU tensors go to native or else to reference, GPU tensors to native if it was built for them or else to triton.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import NamedTuple, Protocol, cast

import torch

from ires_kernels.backends.call import Call, threads

# Fastest first, on every device: reference is for the CPU alone, where triton is only ever interpreted.
NAMES = ("native", "reference", "triton")


def thread_count() -> int:
    """How many threads a call made here and now may use."""
    return threads.get() or torch.get_num_threads()


class BackendStatus(NamedTuple):
    """Whether a backend can run on a kind of device here, and what it is or why it cannot.

    >>> ik.BackendStatus(available=False, detail="cuda: for the CPU only")
    BackendStatus(available=False, detail='cuda: for the CPU only')
    """

    available: bool
    detail: str


class Backend(Protocol):
    """What every module in this package provides."""

    def run(self, call: Call) -> None: ...

    def status(self, device: str) -> BackendStatus: ...  # torch's name for the kind: "cpu", "cuda", "xpu"


@cache
def _load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"{__package__}.{name}"))


@cache
def _fastest(kind: str) -> Backend | None:
    return next((backend for backend in map(_load, NAMES) if backend.status(kind).available), None)


def backends() -> dict[str, BackendStatus]:
    """Every backend this version has: whether it can run here, and what it is or why not, for the CPU and for GPUs.

    >>> ik.backends()["reference"].available
    True
    """
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
