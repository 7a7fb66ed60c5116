"""All weights of three models in one pass, tile by tile: how what the target and instruct have learnt fits together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ires_kernels.backends import fit_loops
from ires_kernels.backends.fit import Fit
from ires_kernels.checkpoints.checkpoint import FileId
from ires_kernels.planning.steps import Operand, Output, Step
from ires_kernels.streaming import stream
from ires_kernels.streaming.asked import Progress
from ires_kernels.streaming.failures import failed_read
from ires_kernels.streaming.tiles import Portion, Slot, buffer_sizes, cut, memory, tiles


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


def of_tile(step: Step, count: int, buffers: Sequence[memoryview]) -> Fit:
    """What `fits` finds at the alpha of a step in a tile of it, whose operands a merge has in memory as numbers."""
    is_coded = step.output.encoding is not None
    return _fit("F32" if is_coded else step.dtype, _dtypes(step)[:3], count, buffers, () if is_coded else step.factors)


class _Fitting:
    """The processor: it computes sums, and has no results. Where the C++ loops take all of it, torch is not loaded."""

    def __init__(self, steps: Sequence[Step], alphas: tuple[float, ...], coded: set[str]) -> None:
        operands = [operand for step in steps for operand in step.operands]
        dtypes = {operand.dtype for operand in operands} | {step.dtype for step in steps}
        self.in_loops = fit_loops.available(dtypes)
        self.reads = self.in_loops and not any(operand.is_decoded for operand in operands)
        self.tile, self.copy = tiles.get().in_pieces if self.reads else tiles.get().elements, tiles.get().copied
        self.room = 0
        self.alphas = alphas
        self.coded = coded
        self.sizes = [*buffer_sizes(steps, self.tile)[:-1], 0]
        self.found: dict[str, dict[int, Fit]] = {}
        """By label, and by the first element of a tile: added up in that order, whichever thread came first."""

    def loads(self, *_: object) -> int:
        return self.tile if self.reads else 0

    def slots(self) -> list[Slot]:
        return [_FittingSlot(self)]

    def release(self, slots: Iterable[Slot]) -> None:
        """They go with their memory."""

    def add(self, step: Step, first: int, found: Fit) -> None:
        """Keep what one tile has."""
        self.found.setdefault(step.name, {})[first] = found

    def alphas_of(self, step: Step) -> tuple[float, ...]:
        """What rounding leaves is not known where codes are stored."""
        return () if step.name in self.coded else self.alphas


class _FittingSlot:
    decodes = False

    def __init__(self, asked: _Fitting) -> None:
        self.buffers = cut(memory(sum(asked.sizes)), asked.sizes)
        self._asked = asked

    def load(self, portions: Sequence[Portion]) -> list[list[memoryview]]:
        """Files are read where they are counted: of what was seen no more than sums are left."""
        for step, first, count, _, operands, _ in portions:
            runs = [[(piece.fd, piece.offset, piece.nbytes) for piece in pieces] for pieces in operands]
            try:
                found = fit_loops.of_files(count, step.dtype, _dtypes(step), runs, self._asked.alphas_of(step))
            except fit_loops.Unread as failed:
                raise failed_read(step, operands[failed.operand][failed.run].path, failed.error, failed.at) from None
            self._asked.add(step, first, found)
        return [[memoryview(b"")] * len(portion.reads) for portion in portions]

    def start(self, step: Step, first: int, count: int, *_: object) -> None:
        self._asked.add(step, first, _fit(step.dtype, _dtypes(step), count, self.buffers, self._asked.alphas_of(step)))

    def measure(self, step: Step, *_: object) -> None:
        raise AssertionError(f"{step.name} is stored, by what only looks")

    def wait(self) -> None:
        """`start` has done it all."""


def _dtypes(step: Step) -> list[str]:
    return [operand.dtype for operand in step.operands]


def _fit(
    dtype: str, dtypes: Sequence[str], count: int, buffers: Sequence[memoryview], alphas: tuple[float, ...]
) -> Fit:
    """Of numbers in memory: target, which is stored as `dtype`, instruct and base."""
    if fit_loops.available({dtype, *dtypes}):
        return fit_loops.of_memory(count, dtype, dtypes, buffers[:3], alphas)
    # Of a backend that was asked for, or of float64.
    import torch

    from ires_kernels.backends.fitting import fit
    from ires_kernels.streaming.cpu import TORCH_DTYPES

    t, x, y = (
        torch.frombuffer(buffer, dtype=TORCH_DTYPES[each], count=count)
        for buffer, each in zip(buffers, dtypes, strict=False)
    )
    return fit(t, x, y, alphas, TORCH_DTYPES[dtype])
