"""What is computed against what is stored: a writer that compares, and tells of the first difference of a tensor."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.sources import Files
from ires_kernels.dtypes import FLOATS, STORAGE
from ires_kernels.files.plain import several
from ires_kernels.planning.steps import Step
from ires_kernels.streaming.cpu import TORCH_DTYPES


@dataclass(slots=True)
class Mismatch:
    """A tensor whose stored elements are not what the inputs give."""

    tensor: str
    file: str
    count: int
    """Elements that differ."""
    index: list[int]
    """Of the first one."""
    got: str
    wanted: str

    def __str__(self) -> str:
        differ = f"{several(self.count, 'element')} differ{'s' * (self.count == 1)}"
        where = f"{self.tensor} in {self.file}: {differ}, the first at {self.index}"
        return f"{where}: got {self.got}, wanted {self.wanted}"


class Comparer:
    """Compares what is recomputed with what the output holds; `compare` is called by several threads."""

    def __init__(self, out: Checkpoint) -> None:
        self.found: dict[str, Mismatch] = {}
        self.other_nan: set[str] = set()
        self._out = out
        refs = out.tensors.values()
        self._files = Files(out.file_ids, (), reads=lambda: ((ref.path, ref.offset, ref.nbytes) for ref in refs))
        self._mine = threading.local()
        self._lock = threading.Lock()

    def close(self) -> None:
        self._files.close()

    def compare(self, step: Step, start: int, wanted: memoryview, _: object) -> None:
        ref = self._out.tensors[step.name]
        buffer = getattr(self._mine, "buffer", memoryview(b""))
        if len(buffer) < len(wanted):
            buffer = self._mine.buffer = memoryview(bytearray(len(wanted)))
        got = buffer[: len(wanted)]
        with self._lock:
            source = self._files.hold(ref.path)
        source.read_into(got, ref.offset + start)
        with self._lock:
            self._files.release(ref.path)
        if not torch.equal(torch.frombuffer(got, dtype=torch.uint8), torch.frombuffer(wanted, dtype=torch.uint8)):
            self._record(step, start, got, wanted)

    def _record(self, step: Step, start: int, got: memoryview, wanted: memoryview) -> None:
        width = max(1, STORAGE[step.dtype].bits // 8)
        as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
        bits = [torch.frombuffer(view, dtype=as_bits) for view in (got, wanted)]
        differs = bits[0] != bits[1]
        values = bits
        if step.dtype in FLOATS:
            values = [each.view(TORCH_DTYPES[step.dtype]) for each in bits]
            if step.op != "copy":
                differs &= ~(_is_nan(values[0]) & _is_nan(values[1]))
        count = int(differs.sum())
        first = int(differs.to(torch.uint8).argmax())
        texts = [
            f"{value[first].item()} (0x{view[first * width : (first + 1) * width][::-1].hex()})"
            for value, view in zip(values, (got, wanted), strict=True)
        ]
        with self._lock:
            if not count:
                self.other_nan.add(step.name)
                return
            flat = start // width + first
            index = _unravel(flat, step.shape)
            mismatch = self.found.get(step.name)
            if mismatch is None:
                self.found[step.name] = Mismatch(step.name, step.file, count, index, *texts)
                return
            mismatch.count += count
            if index < mismatch.index:
                mismatch.index, mismatch.got, mismatch.wanted = index, *texts


def _is_nan(values: Tensor) -> Tensor:
    return values.to(torch.float64).isnan()


def _unravel(flat: int, shape: tuple[int, ...]) -> list[int]:
    """Row-major index of an element."""
    index: list[int] = []
    for length in reversed(shape):
        flat, rest = divmod(flat, length)
        index.insert(0, rest)
    return index
