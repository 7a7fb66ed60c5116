"""Readers of quantized weights: codes and what belongs to them become float32 numbers in the memory of a tile."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch

from ires_kernels.backends.call import Coded
from ires_kernels.backends.decoding import decode
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.quantized import QuantizedRef, Ref
from ires_kernels.checkpoints.sources import Source
from ires_kernels.formats import ACROSS, matrices
from ires_kernels.streaming.pieces import Reader


class Stored:
    """What was read of a weight besides the codes of one tile. Readers of its runs share it: they may be thousands."""

    def __init__(self, ref: QuantizedRef) -> None:
        self.lock = threading.Lock()
        self.parts: dict[str, memoryview] = {}
        self.matrix: tuple[int, memoryview] = (-1, memoryview(b""))
        _, height, width = matrices(ref.full)
        self.across = height * width if ref.format.name in ACROSS else 0
        """Elements of a matrix, where its codes lie all over it."""


class Decoded:
    """The numbers of one weight, or of a run of its elements.

    Scales and the like are small, and read once; so is a matrix whose codes lie all over it. The digest is of these
    parts, whole and in their order, and behind them of the codes, from the first byte that holds one to the last.
    """

    def __init__(self, ref: QuantizedRef, sources: Mapping[Path, Source], stored: Stored | None = None) -> None:
        """`stored`: of the weight, where other runs of it are read as well."""
        self.ref = ref
        self._codes = sources[ref.path]
        self._sources = sources
        self._stored = stored or Stored(ref)
        self._across = self._stored.across

    def read_into(self, buffer: memoryview, first: int, count: int) -> Sequence[memoryview]:
        out = torch.frombuffer(buffer, dtype=torch.float32, count=count)
        seen = self._seen(first)
        if self._across:
            return [*seen, *self._read_matrices(out, first, count)]
        low, done, begin, end = self._codes_of(first, count)
        read = self._read(low, end - low)
        self._decode(first, count, read[begin - low :], out)
        return [*seen, read[done - low :]]

    def codes_into(self, buffer: memoryview, first: int, count: int) -> tuple[Sequence[memoryview], Coded] | None:
        if self._across:
            return None
        low, done, begin, end = self._codes_of(first, count)
        read = buffer[: end - low]  # a number takes as many bytes as its code and what fills up a row at the most
        self._codes.read_into(read, self.ref.codes.offset + low)
        return [*self._seen(first), read[done - low :]], self._coded(first, read[begin - low :])

    def part(self, name: str) -> memoryview:
        """All bytes of a part other than the codes."""
        with self._stored.lock:
            if name not in self._stored.parts:
                ref = dict(self.ref.parts)[name]
                view = memoryview(bytearray(ref.nbytes))
                self._sources[ref.path].read_into(view, ref.offset)
                self._stored.parts[name] = view
            return self._stored.parts[name]

    def _seen(self, first: int) -> list[memoryview]:
        parts = [self.part(name) for name, _ in self.ref.parts[1:]]
        return parts if first == 0 else []

    def _codes_of(self, first: int, count: int) -> tuple[int, int, int, int]:
        """Where some codes are: what is read begins, what is hashed of it begins, the codes begin; and they end."""
        begin, size = self.ref.span(first, count)
        # Two runs may share a byte; and what fills up a row of codes is a part of no run.
        done = sum(self.ref.span(first - 1, 1)) if first else begin
        return min(begin, done), done, begin, begin + size

    def _coded(self, first: int, codes: memoryview) -> Coded:
        parts = {"codes": codes, **{name: self.part(name) for name, _ in self.ref.parts[1:]}}
        return Coded(self.ref.format, self.ref.full, self.ref.first + first, parts)

    def _decode(self, first: int, count: int, codes: memoryview, out: torch.Tensor) -> None:
        format, full, at, parts = self._coded(first, codes)
        decode(format, full, at, count, parts, out)

    def _read(self, begin: int, size: int) -> memoryview:
        view = memoryview(bytearray(size))
        self._codes.read_into(view, self.ref.codes.offset + begin)
        return view

    def _read_matrices(self, out: torch.Tensor, first: int, count: int) -> list[memoryview]:
        """Of each matrix the elements that are wanted; with its first one of them goes what is hashed of it."""
        seen, at = [], first
        while at < first + count:
            number = (self.ref.first + at) // self._across
            end = min(first + count, (number + 1) * self._across - self.ref.first)
            with self._stored.lock:
                if self._stored.matrix[0] != number:
                    self._stored.matrix = number, self._read(*self.ref.span(at, 1))
                codes = self._stored.matrix[1]
            self._decode(at, end - at, codes, out[at - first : end - first])
            if at == 0 or (self.ref.first + at) % self._across == 0:
                seen.append(codes)
            at = end
        return seen

    def reads(self, first: int, count: int) -> None:
        """Reading is not all that it takes."""


class Several:
    """Weights that follow each other, quantized or not, as one operand."""

    def __init__(self, readers: Sequence[Reader], counts: Sequence[int]) -> None:
        self._readers = readers
        self._ends = list(accumulate(counts))

    def read_into(self, buffer: memoryview, first: int, count: int) -> Sequence[memoryview]:
        seen: list[memoryview] = []
        at = first
        while at < first + count:
            number = bisect_right(self._ends, at)
            begin = self._ends[number - 1] if number else 0
            end = min(self._ends[number], first + count)
            seen += self._readers[number].read_into(buffer[4 * (at - first) :], at - begin, end - at)
            at = end
        return seen

    def codes_into(self, buffer: memoryview, first: int, count: int) -> tuple[Sequence[memoryview], Coded] | None:
        number = bisect_right(self._ends, first)
        if first + count > self._ends[number]:
            return None
        begin = self._ends[number - 1] if number else 0
        return self._readers[number].codes_into(buffer, first - begin, count)

    def reads(self, first: int, count: int) -> None:
        """Reading is not all that it takes."""


def stored(ref: Ref) -> list[TensorRef]:
    """The bytes that the digest of a weight, or of a run of it, is of: whole parts, then codes."""
    if isinstance(ref, TensorRef):
        return [_bytes(ref, 0, ref.nbytes)]
    parts = [_bytes(part, 0, part.nbytes) for _, part in ref.parts[1:]]
    return [*parts, _bytes(ref.codes, *ref.span(0, ref.numel))]


def _bytes(ref: TensorRef, begin: int, size: int) -> TensorRef:
    return TensorRef(ref.name, "U8", (size,), ref.path, ref.offset + begin, size, ref.tensor, begin)
