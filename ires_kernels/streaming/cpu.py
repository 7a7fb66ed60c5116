"""The arithmetic of a tile, and the processor that does it on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ires_kernels.backends import decoding, encoding, native, packing
from ires_kernels.backends.call import Call, Coded, Tally
from ires_kernels.backends.choice import choose
from ires_kernels.checkpoints.sources import IN_MEMORY, Read
from ires_kernels.dtypes import STORAGE
from ires_kernels.files.transfer import read_into
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Step
from ires_kernels.streaming.encoded import Coding
from ires_kernels.streaming.failures import failed_read
from ires_kernels.streaming.tiles import Portion, Slot, buffer_sizes, cut, memory, tiles
from ires_kernels.tensors import ops, scalars

TORCH_DTYPES: dict[str, torch.dtype] = {
    dtype.name: getattr(torch, dtype.torch) for dtype in STORAGE.values() if dtype.torch and hasattr(torch, dtype.torch)
}
"""What this torch has of the dtypes of safetensors."""
NOTHING = "nothing"
"""Of `zeros`."""


class Cpu:
    """A thread computes one tile at a time, in buffers that stay in its cache from the read to the write."""

    def __init__(self, steps: Sequence[Step], rules: Rules, counted: bool) -> None:
        self.tile, self.copy = tiles.get().elements, tiles.get().copied
        self.room = 0
        self.rules = rules
        self.exact = replace(rules, rounding="nearest")
        self.counted = counted
        self.sizes = buffer_sizes(steps, self.tile)
        self.zeros = zeros(steps, max(self.tile, native.CONSTANT), torch.device("cpu"))
        self.fuses = not counted and choose(torch.device("cpu")) is native

    def loads(self, step: Step, out: Tensor | None, reads: Sequence[Sequence[Read]], seen: Sequence[bool]) -> int:
        """What goes from files and memory to memory of the CPU, and has no operand that is to be decoded."""
        if not self.fuses or out is None or out.device.type != "cpu" or step.output.encoding is not None:
            return 0
        if step.op == "copy":
            return 0 if any(read.fd == IN_MEMORY for each in reads for read in each) else tiles.get().in_pieces
        if any(abs(factor) >= scalars.F32_OVERFLOW for factor in step.factors):
            return 0  # which is checked where it is computed otherwise
        return self.tile if any(seen) else tiles.get().in_pieces

    def slots(self) -> list[Slot]:
        return [_CpuSlot(self)]

    def release(self, slots: Iterable[Slot]) -> None:
        """They go with their memory."""


class _CpuSlot:
    decodes = True

    def __init__(self, cpu: Cpu) -> None:
        self.buffers = cut(memory(sum(cpu.sizes)), cpu.sizes)
        self._cpu = cpu
        self._numbers: dict[int, Tensor] = {}
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._tally: Tally | None = None

    def load(self, portions: Sequence[Portion]) -> list[list[memoryview]]:
        """One call each, in which nothing of a tile is read into memory as a whole but what is wanted as bytes."""
        return [self._load_one(portion) for portion in portions]

    def _load_one(self, portion: Portion) -> list[memoryview]:
        assert portion.out is not None
        if portion.step.op == "copy":
            data, at = portion.out.numpy().data, 0
            for fd, offset, nbytes, path, *_ in portion.reads[0]:
                read_into(fd, data[at : at + nbytes], offset, path)
                at += nbytes
            return [data]
        views = [
            self.buffers[place][: sum(read.nbytes for read in reads)] if wanted else memoryview(b"")
            for place, (reads, wanted) in enumerate(zip(portion.reads, portion.seen, strict=True))
        ]
        self._fuse(portion, portion.out, views)
        return views

    def _fuse(self, portion: Portion, out: Tensor, views: Sequence[memoryview]) -> None:
        step, first, count, _, reads, _ = portion
        operands: list[native.Operand] = [
            ([(*read[:3], read.keep, read.kept, packing.number(read.packed)) for read in each], _address(view))
            for each, view in zip(reads, views, strict=True)
        ]
        dtypes = [TORCH_DTYPES[operand.dtype] for operand in step.operands]
        if step.op == "convert":
            dtypes.append(dtypes[0])
            operands.append(self._cpu.zeros[step.operands[0].dtype].data_ptr())
        elif step.is_from_zero:
            dtypes.insert(0, torch.float32)
            operands.insert(0, self._cpu.zeros[NOTHING].data_ptr())
        op = "subtract" if step.op == "convert" else step.op
        pointers = out.data_ptr(), *(0 for _ in dtypes)
        unread = native.run_fused(
            op, native.item(count, step.stream, pointers, (out.dtype, *dtypes)), tuple(operands),
            () if op == "subtract" else step.factors,
            stochastic=self._cpu.rules.rounding == "stochastic", seed=self._cpu.rules.seed, offset=first,
        )  # fmt: skip
        if unread is not None:
            operand, number, error, at = unread
            raise failed_read(step, reads[operand - step.is_from_zero][number].path, error, at)

    def start(
        self,
        step: Step,
        first: int,
        count: int,
        out: Tensor | None,
        coded: Mapping[int, Coded],
        coding: Coding | None = None,
    ) -> None:
        if step.op == "copy":
            assert out is not None
            out.copy_(torch.frombuffer(self.buffers[0], dtype=torch.uint8, count=count))
            return
        if coding is not None:
            self._store(step, first, count, coded, coding, out)
            return
        operands, coded = self._operands(step, count, coded)
        self._tally = Tally() if self._cpu.counted else None
        here = out if out is not None and out.device.type == "cpu" else self._tensor(-1, step.dtype, count)
        compute(step, operands, here, first, self._cpu.rules, self._tally, coded)
        if out is not None and out is not here:  # it is kept on a device that does not compute this
            out.copy_(here)

    def _operands(self, step: Step, count: int, coded: Mapping[int, Coded]) -> tuple[list[Tensor], Mapping[int, Coded]]:
        """What is computed with: what the buffers hold, for what is codes there memory for its numbers, and what a step
        has beside its operands; and the codes, by their places among these."""
        operands = [
            self._room(place, count) if place in coded else self._tensor(place, operand.dtype, count)
            for place, operand in enumerate(step.operands)
        ]
        if step.op == "convert":
            operands.append(self._cpu.zeros[step.operands[0].dtype][:count])
        elif step.is_from_zero:
            operands.insert(0, self._cpu.zeros[NOTHING][:count])
            coded = {place + 1: numbers for place, numbers in coded.items()}
        return operands, coded

    def measure(self, step: Step, first: int, count: int, coded: Mapping[int, Coded], largest: Tensor) -> None:
        assert step.output.encoding is not None
        weight = step.output.encoding.weight
        exact, coded = self._exact(step, first, count, coded, None)
        encoding.measure_results(exact, coded, weight.format, weight.full, largest)

    def _store(
        self, step: Step, first: int, count: int, coded: Mapping[int, Coded], coding: Coding, out: Tensor | None
    ) -> None:
        assert step.output.encoding is not None
        weight, rules, scales = step.output.encoding.weight, self._cpu.rules, coding.scales
        codes = torch.frombuffer(self.buffers[-1], dtype=torch.uint8, count=count)
        self._tally = Tally() if self._cpu.counted else None
        exact, coded = self._exact(step, first, count, coded, self._tally)
        random = (rules.seed, step.stream) if rules.rounding == "stochastic" else None
        to = Coded(weight.format, weight.full, first, {"codes": coding.before, "scale": scales.stored})
        encoding.store(exact, coded, to, bool(scales.new) or step.is_from_zero, random, codes)
        if out is not None:
            out.copy_(codes.view(out.dtype))

    def _exact(
        self, step: Step, first: int, count: int, coded: Mapping[int, Coded], tally: Tally | None
    ) -> tuple[Call, Mapping[int, Coded]]:
        """The arithmetic of a step before its results become codes; and the codes of its operands."""
        operands, coded = self._operands(step, count, coded)
        return call(step, operands, self._room(-1, count), first, self._cpu.exact, tally), coded

    def _room(self, place: int, count: int) -> Tensor:
        """Memory for the numbers of an operand that is codes, or of the result, -1. Mostly it is not used."""
        if place not in self._numbers:
            self._numbers[place] = torch.empty(self._cpu.tile)
        return self._numbers[place][:count]

    def _tensor(self, slot: int, dtype: str, count: int) -> Tensor:
        """The first elements of a buffer as a tensor."""
        tile = self._cpu.tile
        whole = self._tensors.get((slot, dtype))
        if whole is None:
            whole = torch.frombuffer(self.buffers[slot], dtype=TORCH_DTYPES[dtype], count=tile)
            self._tensors[slot, dtype] = whole
        return whole if count == tile else whole[:count]

    def wait(self) -> Tally | None:
        tally, self._tally = self._tally, None  # `start` has done it all
        return tally


def _address(view: memoryview) -> int:
    """Of memory that can be written; 0 of none."""
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr() if len(view) else 0


def compute(
    step: Step,
    operands: Sequence[Tensor],
    out: Tensor,
    first: int,
    rules: Rules,
    tally: Tally | None,
    coded: Mapping[int, Coded] | None = None,
) -> None:
    """The arithmetic of a step on a tile from flat index `first` on, on any device.

    coded  on the CPU: of which operands the numbers are decoded on the way; these tensors are memory for them
    """
    if coded:
        decoding.run(call(step, operands, out, step.number(first), rules, tally), coded)
        return
    if step.box is not None and not step.box.is_run:
        for at, count, number in step.box.pieces(first, len(out)):
            here = slice(at, at + count)
            decoding.run(call(step, [each[here] for each in operands], out[here], number, rules, tally), {})
        return
    options: dict[str, Any] = {
        "out": out,
        "rounding": rules.rounding,
        "seed": rules.seed,
        "stream": step.stream,
        "offset": step.number(first),
        "tally": tally,
    }
    t, *others = operands
    if step.op == "add_difference":
        ops.add_difference(t, *_pairs(others), step.factors, **options)
    elif step.op == "add":
        ops.add(t, others, step.factors, **options)
    else:  # "convert" is minus 0: it leaves every value as it is, -0 as well, and counts what the new dtype overflows
        ops.subtract(t, others[0], **options)


def call(step: Step, operands: Sequence[Tensor], out: Tensor, first: int, rules: Rules, tally: Tally | None) -> Call:
    """`compute` as what a backend takes."""
    op = "subtract" if step.op == "convert" else step.op
    factors = () if op == "subtract" else step.factors
    scalars.factors_in_range(op, factors, [out], [tuple(operands)])
    random = rules.rounding == "stochastic", rules.seed, [step.stream]
    return Call(op, [out], [tuple(operands)], factors, *random, first, tally)


def _pairs(others: Sequence[Tensor]) -> tuple[Any, Any]:
    """The minuends and the subtrahends of one pair, or of each of several."""
    return (others[0], others[1]) if len(others) == 2 else (others[0::2], others[1::2])


def zeros(steps: Iterable[Step], tile: int, device: torch.device) -> dict[str, Tensor]:
    """What is subtracted from the tensors that change their dtype, by dtype; and NOTHING, to which sums are added."""
    dtypes = {step.operands[0].dtype for step in steps if step.op == "convert"}
    found = {dtype: torch.zeros(tile, dtype=TORCH_DTYPES[dtype], device=device) for dtype in dtypes}
    if any(step.is_from_zero for step in steps):
        found[NOTHING] = torch.full((tile,), -0.0, device=device)  # 0 would make a 0 of the -0 that is added to it
    return found
