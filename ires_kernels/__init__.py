"""Exact, in-place, memory-speed arithmetic for checkpoints of large language models.

Tensors: `subtract`, `add`, `scale`, `add_difference`, and their in-place forms with a trailing underscore.
Checkpoints: `extract`, `apply`, `load`, `inspect`, `verify`; after an interruption `status`, `resume`, `rollback`.
Between the two: `mapped`, the tensors of a checkpoint as the pages of its files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ires_kernels.backends import BackendStatus, Tally, backends
from ires_kernels.tensors.ops import add, add_, add_difference, add_difference_, scale, scale_, subtract

if TYPE_CHECKING:
    from ires_kernels.memory.mapping import mapped
    from ires_kernels.merge import apply, extract, inspect, load, resume, rollback, status, verify

    __version__: str

__all__ = [
    "BackendStatus",
    "Tally",
    "add",
    "add_",
    "add_difference",
    "add_difference_",
    "apply",
    "backends",
    "extract",
    "inspect",
    "load",
    "mapped",
    "resume",
    "rollback",
    "scale",
    "scale_",
    "status",
    "subtract",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load on first use what tensor arithmetic alone does not need: the checkpoint functions and the version."""
    if name in {"apply", "extract", "inspect", "load", "resume", "rollback", "status", "verify"}:
        from ires_kernels import merge

        return getattr(merge, name)
    if name == "mapped":
        from ires_kernels.memory.mapping import mapped

        return mapped
    if name == "__version__":
        from importlib.metadata import version

        return version("ires_kernels")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
