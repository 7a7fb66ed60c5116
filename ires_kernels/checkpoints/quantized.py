"""Quantized tensors as the numbers that they stand for: codes, and what they are scaled by."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from ires_kernels import formats
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.formats import Format as Format


@dataclass(frozen=True, slots=True)
class QuantizedRef:
    """A quantized tensor, or a run of its elements, with the face of a `TensorRef` that holds float32 numbers."""

    name: str
    """Of the weight, as models that are not quantized have it."""
    shape: tuple[int, ...]
    """Of the numbers; of a run (count,)."""
    format: Format
    parts: tuple[tuple[str, TensorRef], ...]
    """What is stored of the whole tensor, by its part: "codes" first, then "scale" and what else `formats` names."""
    full: tuple[int, ...]
    """The shape of the whole tensor's numbers."""
    first: int = 0
    """Flat index of the first element, in the whole tensor."""
    dtype: str = "F32"
    """Of the numbers."""
    whole: str = ""
    """Of a run of elements, the name of the tensor that has them."""

    @property
    def tensor(self) -> str:
        """The name of the tensor that it is, or that it is a run of."""
        return self.whole or self.name

    @property
    def codes(self) -> TensorRef:
        """The tensor of codes."""
        return self.parts[0][1]

    @property
    def path(self) -> Path:
        """The file that holds the codes."""
        return self.codes.path

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that its share of what is stored takes, rounded up."""
        stored = sum(ref.nbytes for _, ref in self.parts)
        return -(-stored * self.numel // (math.prod(self.full) or 1))

    def span(self, first: int, count: int) -> tuple[int, int]:
        """Which bytes of the codes its elements from `first` on need: where they begin in that tensor, and how many."""
        return formats.span(self.format, self.full, self.first + first, count)

    def run(self, first: int, count: int) -> QuantizedRef:
        """Its elements from the flat index `first` on, under a name that says which; itself where it is all of them.

        Raises ValueError for elements that it does not have.
        """
        stop = first + count
        if not 0 <= first < stop <= self.numel:
            raise ValueError(f"{self.name!r} has {self.numel} elements, and no run [{first}:{stop}]")
        if count == self.numel:
            return self
        tensor, first = self.tensor, self.first + first
        return replace(self, name=f"{tensor}[{first}:{first + count}]", shape=(count,), first=first, whole=tensor)


Ref = TensorRef | QuantizedRef
"""What an operand is read from."""
