"""All weights of three models in one pass, tile by tile: how what the target and instruct have learnt fits together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ires_kernels.backends.fit import Fit
from ires_kernels.backends.fitting import fit
from ires_kernels.checkpoints.checkpoint import FileId
from ires_kernels.planning.steps import Operand, Output, Step
from ires_kernels.streaming import stream
from ires_kernels.streaming.cpu import TORCH_DTYPES
from ires_kernels.streaming.stream import Progress
from ires_kernels.streaming.tiles import Slot, buffer_sizes, cut, memory, tiles


def fits(
    steps: Iterable[Step],
    file_ids: Mapping[Path, FileId],
    alphas: tuple[float, ...],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Fit], int]:
    """What `fit` finds in each tensor that target + alpha * (instruct - base) changes, by name; and bytes read.

    Raises what `stream.run` does.
    """
    merged = [step for step in steps if step.op == "add_difference" and not step.is_scale]
    coded = {step.label for step in merged if step.output.encoding is not None}
    wanted = [_looked_at(step) for step in merged]
    processor = _Fitting(wanted, alphas, coded)
    read = stream.look(wanted, file_ids, lambda *_: processor, threads=threads, progress=progress)
    found: dict[str, Fit] = {}
    for step in merged:
        total = found.setdefault(step.name, Fit())
        for _, part in sorted(processor.found.get(step.label, {}).items()):
            total += part
    return found, read


def _looked_at(step: Step) -> Step:
    """The same operands, as a tensor of their own: of one that is stored as codes its numbers."""
    dtype = step.dtype if step.output.encoding is None else "F32"
    return Step(Output(step.label, dtype, (step.count,), step.file), step.op, _in_order(step), step.factors)


def _in_order(step: Step) -> tuple[Operand, ...]:
    by_role = {operand.role: operand for operand in step.operands}
    return by_role["target"], by_role["instruct"], by_role["base"]


class _Fitting:
    """The processor: it computes sums, and has no results."""

    def __init__(self, steps: Sequence[Step], alphas: tuple[float, ...], coded: set[str]) -> None:
        self.tile, self.copy = tiles.get().elements, tiles.get().copied
        self.room = 0
        self.alphas = alphas
        self.coded = coded
        self.sizes = [*buffer_sizes(steps, self.tile)[:-1], 0]
        self.found: dict[str, dict[int, Fit]] = {}
        """By label, and by the first element of a tile: added up in that order, whichever thread came first."""

    def slots(self) -> list[Slot]:
        return [_FittingSlot(self)]

    def release(self, slots: Iterable[Slot]) -> None:
        """They go with their memory."""


class _FittingSlot:
    load = None
    decodes = False

    def __init__(self, asked: _Fitting) -> None:
        self.buffers = cut(memory(sum(asked.sizes)), asked.sizes)
        self._asked = asked

    def start(self, step: Step, first: int, count: int, *_: object) -> None:
        operands: list[Tensor] = [
            torch.frombuffer(buffer, dtype=TORCH_DTYPES[operand.dtype], count=count)
            for buffer, operand in zip(self.buffers, step.operands, strict=False)
        ]
        t, x, y = operands
        asked, coded = self._asked, step.name in self._asked.coded
        asked.found.setdefault(step.name, {})[first] = fit(t, x, y, asked.alphas, TORCH_DTYPES[step.dtype], coded=coded)

    def measure(self, step: Step, *_: object) -> None:
        raise AssertionError(f"{step.name} is stored, by what only looks")

    def wait(self) -> None:
        """`start` has done it all."""
