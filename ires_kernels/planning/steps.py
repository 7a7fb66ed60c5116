"""What a merge consists of: outputs, the steps that make them, and what these compute with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.dtypes import STORAGE

Op = Literal["add", "add_difference", "subtract", "convert", "copy"]
Decode = Literal["plain"]


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that is made, and its place: from the byte `offset` of the file `file` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


class Operand(NamedTuple):
    """One of the tensors that a step computes with."""

    role: str
    """Whose it is."""
    refs: tuple[TensorRef, ...]
    """What is read for it: tensors, or runs of their elements. One as it is; or codes and what they are scaled by."""
    decode: Decode = "plain"
    """How the processor makes numbers of that."""


@dataclass(frozen=True, slots=True)
class Step:
    """A run of the elements of an output, all of them or a part: `op` of `operands` makes it.

    Steps of one output follow each other, and random bits are those of the element in the output: it is the same
    whether one step makes it or several do.
    """

    output: Output
    op: Op
    operands: tuple[Operand, ...]
    factors: tuple[float, ...] = ()
    stream: int = 0
    """Of the random numbers: xxh3_64 of the name."""
    reason: str = ""
    """Why the tensor is not merged but copied; "convert" is a copy with another dtype."""
    first: int = 0
    """Flat index of the first element."""
    count: int = -1
    """Number of elements; -1: all that follow."""

    def __post_init__(self) -> None:
        if self.count < 0:
            object.__setattr__(self, "count", self.output.numel - self.first)
        for operand in self.operands:
            if operand.decode == "plain" and [ref.numel for ref in operand.refs] != [self.count]:
                sizes = ", ".join(f"{ref.numel} of {ref.name!r}" for ref in operand.refs) or "nothing"
                raise ValueError(f"{self.label} takes {self.count} elements of {operand.role}, got {sizes}")

    @property
    def is_whole(self) -> bool:
        """Whether it makes all of its output."""
        return self.count == self.output.numel

    @property
    def label(self) -> str:
        """The output's name, and of a part which elements it makes."""
        return self.name if self.is_whole else f"{self.name}[{self.first}:{self.first + self.count}]"

    @property
    def name(self) -> str:
        return self.output.name

    @property
    def dtype(self) -> str:
        return self.output.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        return self.output.shape

    @property
    def file(self) -> str:
        return self.output.file

    @property
    def offset(self) -> int:
        """Of the output in its file, in bytes."""
        return self.output.offset

    @property
    def start(self) -> int:
        """Where the first byte that it makes is in the output."""
        return self.first * STORAGE[self.dtype].bits // 8

    @property
    def nbytes(self) -> int:
        """How many bytes it makes."""
        return self.count * STORAGE[self.dtype].bits // 8

    @property
    def roles(self) -> tuple[str, ...]:
        """Whose each of `inputs` is."""
        return tuple(operand.role for operand in self.operands for _ in operand.refs)

    @property
    def inputs(self) -> tuple[TensorRef, ...]:
        """All that is read, in the order of the operands."""
        return tuple(ref for operand in self.operands for ref in operand.refs)


def by_output(steps: Iterable[Step]) -> dict[Output, list[Step]]:
    """The steps of each output, in their order. Raises ValueError where they do not make all of it in that order."""
    groups: dict[Output, list[Step]] = {}
    for step in steps:
        groups.setdefault(step.output, []).append(step)
    for output, parts in groups.items():
        end = 0
        for part in parts:
            if part.first != end:
                raise ValueError(f"{output.name!r}: {part.label} does not begin at element {end}")
            end += part.count
        if end != output.numel:
            raise ValueError(f"{output.name!r} has {output.numel} elements, and its steps make {end}")
    return groups


class Comparison(NamedTuple):
    """Two tensors that must be equal byte for byte before anything is written."""

    name: str
    roles: tuple[str, str]
    inputs: tuple[TensorRef, TensorRef]


def operands(tensors: Mapping[str, TensorRef]) -> tuple[Operand, ...]:
    """What was matched, by role, as it is."""
    return tuple(Operand(role, (ref,)) for role, ref in tensors.items())
