"""Norms of the tensors of a residual that is stored, or of one that is computed and not kept."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch

from ires_kernels.backends.call import Tally
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Operand, Output, Step
from ires_kernels.streaming import stream
from ires_kernels.streaming.cpu import TORCH_DTYPES
from ires_kernels.streaming.reader import all_file_ids
from ires_kernels.streaming.tiles import ReadOnly


def of_plan(plan: Plan) -> dict[str, float]:
    """Of what a plan would write, by name."""
    squares = _Squares()
    stream.run(plan.steps, all_file_ids(plan.inputs), plan.rules, squares.add, hashed=(), counted=False)
    return squares.norms(plan.steps)


def of_residual(residual: Checkpoint) -> dict[str, float]:
    """Of the tensors of a residual, by name."""
    steps = [
        Step(Output(name, ref.dtype, ref.shape, ref.path.name), "copy", (Operand("residual", (ref,)),))
        for name, ref in residual.tensors.items()
    ]
    squares = _Squares()
    stream.run(steps, residual.file_ids, Rules(), squares.add, hashed=(), processors=ReadOnly)
    return squares.norms(steps)


class _Squares:
    """Sums of squares by tensor and place, so that they do not depend on which thread comes first."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, float]] = {}
        self._lock = threading.Lock()

    def add(self, step: Step, start: int, data: memoryview, _: Tally) -> None:
        values = torch.frombuffer(data, dtype=TORCH_DTYPES[step.dtype]).double()
        total = float(torch.dot(values, values))
        with self._lock:
            self._sums.setdefault(step.name, {})[start] = total

    def norms(self, steps: Sequence[Step]) -> dict[str, float]:
        """By name, in the order of the steps."""
        sums = self._sums
        return {step.name: math.sqrt(math.fsum(sums.get(step.name, {}).values())) for step in steps}
