"""What goes wrong in work on a tile, and which tensor it was."""

from __future__ import annotations

import os
from pathlib import Path

from ires_kernels.checkpoints.addresses import Changed
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files.transfer import shrunk
from ires_kernels.planning.steps import Step


class ComputeError(RuntimeError):
    """A processor failed on the way, as a GPU may that has no memory left."""


class ReadError(Exception):
    """An input of a tile could not be read: `reason`, in work on `step`."""

    def __init__(self, step: Step, reason: OSError) -> None:
        super().__init__(step, reason)
        self.step = step
        self.reason = reason


def failed_read(step: Step, path: Path, error: int, at: int) -> ReadError:
    """What to raise of a read of `path` that failed with `error`, an errno, or 0 at the end of the file."""
    return ReadError(step, OSError(error, os.strerror(error), f"{path}") if error else shrunk(path, at))


def with_tensor(error: BaseException, step: Step | None) -> BaseException:
    """The error with the tensor in it that was worked on."""
    if isinstance(error, ReadError):
        return with_tensor(error.reason, error.step)
    if step is None or isinstance(error, (CheckpointError, Changed)) or not isinstance(error, Exception):
        return error
    if isinstance(error, OSError):
        new: Exception = OSError(error.errno, f"{error.strerror} (tensor {step.name!r})", error.filename)
    else:
        kind = ComputeError if isinstance(error, RuntimeError) else RuntimeError
        new = kind(f"tensor {step.name!r} of {step.operands[0].paths[0]}: {error}")
    new.__cause__ = error
    return new
