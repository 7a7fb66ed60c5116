"""What is done to one window of a tensor: the memory it needs, and the arithmetic, here on the CPU."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ires_kernels.backends.call import Tally
from ires_kernels.dtypes import FLOATS, STORAGE
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Step
from ires_kernels.tensors import ops

WINDOW = 1 << 19
"""Elements that a thread works on at a time. Results do not depend on it."""
COPY = 1 << 19
"""Bytes at a time of a tensor that is copied."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    dtype.name: getattr(torch, dtype.torch) for dtype in STORAGE.values() if dtype.torch and hasattr(torch, dtype.torch)
}
"""What this torch has of the dtypes of safetensors."""

Bytes = TypeVar("Bytes", memoryview, Tensor)


class ComputeError(RuntimeError):
    """A processor failed on the way, as a GPU may that has no memory left."""


class Slot(Protocol):
    """The memory of one window. A thread fills it, starts it, waits for it, and may then fill it again."""

    @property
    def buffers(self) -> list[memoryview]:
        """In host memory: one for each input and one, the last, for the result."""

    def start(self, step: Step, first: int, count: int, out: Tensor | None) -> None:
        """Make `count` elements from flat index `first` on, out of the first bytes of the buffers.

        The result goes into `out`, a piece of a tensor where the processor computes, or else into the last buffer.
        With `out` the step may be a copy; it and `count` are in bytes then.
        """

    def wait(self) -> Tally | None:
        """Return when what was started is done, and no memory is in use any more, with what was counted of it."""


class Processor(Protocol):
    """What computes: the CPU, or a GPU."""

    @property
    def window(self) -> int:
        """Elements at a time."""

    @property
    def copy(self) -> int:
        """Bytes at a time of a tensor that is copied."""

    def slots(self) -> Sequence[Slot]:
        """Memory for a thread, called in it: so many windows it has under way at a time."""

    def release(self, slots: Iterable[Slot]) -> None:
        """The thread does not use them any more, and nothing is under way in them."""


Processors = Callable[[Sequence[Step], Rules, bool], Processor]
"""Makes the processor for a run from its steps, its rules, and whether to count."""


class Cpu:
    """A thread computes one window at a time, in buffers that stay in its cache from the read to the write."""

    def __init__(self, steps: Sequence[Step], rules: Rules, counted: bool) -> None:
        self.window = WINDOW
        self.copy = COPY
        self.rules = rules
        self.counted = counted
        self.sizes = buffer_sizes(steps, WINDOW)
        self.zeros = zeros(steps, WINDOW, torch.device("cpu"))

    def slots(self) -> list[Slot]:
        return [_CpuSlot(self)]

    def release(self, slots: Iterable[Slot]) -> None:
        """They go with their memory."""


class _CpuSlot:
    def __init__(self, cpu: Cpu) -> None:
        memory = memoryview(mmap.mmap(-1, sum(cpu.sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.buffers = cut(memory, cpu.sizes)
        self._cpu = cpu
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._tally: Tally | None = None

    def start(self, step: Step, first: int, count: int, out: Tensor | None) -> None:
        if step.op == "copy":
            assert out is not None
            out.copy_(torch.frombuffer(self.buffers[0], dtype=torch.uint8, count=count))
            return
        operands = [self._tensor(slot, ref.dtype, count) for slot, ref in enumerate(step.inputs)]
        if step.op == "convert":
            operands.append(self._cpu.zeros[step.inputs[0].dtype][:count])
        self._tally = Tally() if self._cpu.counted else None
        if out is None:
            out = self._tensor(-1, step.dtype, count)
        compute(step, operands, out, first, self._cpu.rules, self._tally)

    def _tensor(self, slot: int, dtype: str, count: int) -> Tensor:
        """The first elements of a buffer as a tensor."""
        window = self._cpu.window
        whole = self._tensors.get((slot, dtype))
        if whole is None:
            whole = torch.frombuffer(self.buffers[slot], dtype=TORCH_DTYPES[dtype], count=window)
            self._tensors[slot, dtype] = whole
        return whole if count == window else whole[:count]

    def wait(self) -> Tally | None:
        tally, self._tally = self._tally, None  # `start` has done it all
        return tally


def compute(step: Step, operands: Sequence[Tensor], out: Tensor, first: int, rules: Rules, tally: Tally | None) -> None:
    """The arithmetic of a step on a window from flat index `first` on, on any device."""
    options: dict[str, Any] = {
        "out": out,
        "rounding": rules.rounding,
        "seed": rules.seed,
        "stream": step.stream,
        "offset": first,
        "tally": tally,
    }
    t, *others = operands
    if step.op == "add_difference":
        ops.add_difference(t, others[0], others[1], step.factors[0], **options)
    elif step.op == "add":
        ops.add(t, others, step.factors, **options)
    else:  # "convert" is minus 0: it leaves every value as it is, -0 as well, and counts what the new dtype overflows
        ops.subtract(t, others[0], **options)


def buffer_sizes(steps: Iterable[Step], window: int) -> list[int]:
    """Bytes that a window needs for each input, and last for the result."""
    inputs, result = [COPY], 0
    for step in steps:
        if step.op != "copy":
            widths = [FLOATS[ref.dtype] * window for ref in step.inputs]
            inputs = [max(pair) for pair in zip_longest(inputs, widths, fillvalue=0)]
            result = max(result, FLOATS[step.dtype] * window)
    return [*inputs, result]


def zeros(steps: Iterable[Step], window: int, device: torch.device) -> dict[str, Tensor]:
    """What is subtracted from the tensors that change their dtype, by dtype."""
    dtypes = {step.inputs[0].dtype for step in steps if step.op == "convert"}
    return {dtype: torch.zeros(window, dtype=TORCH_DTYPES[dtype], device=device) for dtype in dtypes}


def cut(memory: Bytes, sizes: Sequence[int]) -> list[Bytes]:
    """Consecutive pieces of these sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [memory[end - length : end] for end, length in zip(ends, sizes, strict=True)]
