"""Exact, in-place, memory-speed arithmetic for checkpoints of large language models.

Tensors: `subtract`, `add`, `scale`, `add_difference`, and their in-place forms with a trailing underscore.
Checkpoints: `extract`, `apply`, `merge`, `load`, `weights`, `compare`, `inspect`, `verify`; after an interruption
`status`, `resume`, `rollback`; after several workers
`finish`; for others `sha256`, `publish`.
Between the two: `mapped`, the tensors of a checkpoint as the pages of its files; `apply_`, to a module in memory.
Residuals as values, to be scaled and added up: `Residual`.

Names are loaded when they are first used, and torch with those that compute.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ires_kernels.backends.call import Tally
    from ires_kernels.backends.choice import BackendStatus, backends
    from ires_kernels.checking.verification import verify
    from ires_kernels.live.update import apply_
    from ires_kernels.memory.mapping import mapped
    from ires_kernels.merging.application import apply
    from ires_kernels.merging.comparison import compare
    from ires_kernels.merging.extraction import extract
    from ires_kernels.merging.loading import load, weights
    from ires_kernels.merging.recipes import merge
    from ires_kernels.merging.resumption import finish, resume, rollback
    from ires_kernels.publishing import publish
    from ires_kernels.records.state import status
    from ires_kernels.records.summary import inspect
    from ires_kernels.records.sums import sha256
    from ires_kernels.residual import Residual
    from ires_kernels.tensors.ops import add, add_, add_difference, add_difference_, scale, scale_, subtract

    __version__: str

__all__ = [
    "BackendStatus",
    "Residual",
    "Tally",
    "add",
    "add_",
    "add_difference",
    "add_difference_",
    "apply",
    "apply_",
    "backends",
    "compare",
    "extract",
    "finish",
    "inspect",
    "load",
    "mapped",
    "merge",
    "publish",
    "resume",
    "rollback",
    "scale",
    "scale_",
    "sha256",
    "status",
    "subtract",
    "verify",
    "weights",
]

_HOMES = {
    "backends.call": ("Tally",),
    "backends.choice": ("BackendStatus", "backends"),
    "live.update": ("apply_",),
    "memory.mapping": ("mapped",),
    "checking.verification": ("verify",),
    "merging.application": ("apply",),
    "merging.comparison": ("compare",),
    "merging.extraction": ("extract",),
    "merging.loading": ("load", "weights"),
    "merging.recipes": ("merge",),
    "merging.resumption": ("finish", "resume", "rollback"),
    "publishing": ("publish",),
    "records.state": ("status",),
    "records.sums": ("sha256",),
    "records.summary": ("inspect",),
    "residual": ("Residual",),
    "tensors.ops": ("add", "add_", "add_difference", "add_difference_", "scale", "scale_", "subtract"),
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that has it."""
    if name == "__version__":
        value: Any = import_module(f"{__name__}.version").VERSION
    else:
        home = next((module for module, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


# `backends` is a room as well. The import of a room gives its name to it, but only the first one does: so that is now,
# and from here on the name is the function's.
import_module(f"{__name__}.backends")
globals().pop("backends", None)

if "torch" in sys.modules:  # then somebody may look for torch.ops.ires_kernels who names nothing of ours
    import_module(f"{__name__}.tensors.library")
