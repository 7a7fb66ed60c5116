"""What a merge consists of: outputs, the steps that make them, and what these compute with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import xxhash

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.quantized import QuantizedRef, Ref
from ires_kernels.dtypes import STORAGE
from ires_kernels.planning.box import Box

Op = Literal["add", "add_difference", "subtract", "convert", "copy"]

_NO_NAME = "\udfff"
"""What the keys of operands begin with that are no whole tensors: a header holds no lone surrogate, so no name does."""
_SHOWN = 3
"""Tensors of an operand that are named to people."""


class Encoding(NamedTuple):
    """How the numbers of a weight become what is stored of it."""

    weight: QuantizedRef
    """The target's, in whose format the new numbers are stored, with its scales where they still serve."""
    part: Literal["codes", "scale"]

    @property
    def scales(self) -> tuple[TensorRef, ...]:
        """What is made anew where the new numbers are too large for what is there."""
        return tuple(ref for part, ref in self.weight.parts if part == "scale")


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that is made, and its place: from the byte `offset` of the file `file` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0
    encoding: Encoding | None = None
    """Of a part of a quantized weight that gets new numbers."""

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Operand:
    """What a step computes with: tensors of one model, or runs of their elements, one after the other.

    A whole tensor is the usual one. A part of a fused tensor is a run; a fused tensor of a model that has its parts is
    several tensors; and rows in another order are as many runs. Raises ValueError for runs of several dtypes, or none.
    """

    role: str
    """Whose it is."""
    refs: tuple[Ref, ...]
    """In the order of the elements."""
    count: int = field(init=False, compare=False, repr=False)
    """Number of elements."""
    nbytes: int = field(init=False, compare=False, repr=False)
    """What is read for them."""
    paths: tuple[Path, ...] = field(init=False, compare=False, repr=False)
    """The files that they are in."""
    key: str = field(init=False, compare=False, repr=False)
    """What the digest of its bytes is known by: the name of a whole tensor; else no tensor has such a name."""
    is_decoded: bool = field(init=False, compare=False, repr=False)
    """Whether its numbers are made of codes, all of them or some."""

    def __post_init__(self) -> None:
        if len({ref.dtype for ref in self.refs}) != 1:
            listed = ", ".join(f"{ref.dtype} {ref.name!r}" for ref in self.refs[:10])
            raise ValueError(f"the operand {self.role} is made of {listed or 'nothing'}, wanted runs of one dtype")
        if len(self.refs) == 1 and isinstance(self.refs[0], TensorRef) and not self.refs[0].whole:
            key = self.refs[0].name
        else:
            runs = "\n".join([f"{ref.name}\t{ref.whole}" for ref in self.refs])
            key = f"{_NO_NAME}{xxhash.xxh3_128_hexdigest(runs.encode())}"
        object.__setattr__(self, "count", sum([ref.numel for ref in self.refs]))
        object.__setattr__(self, "nbytes", sum([ref.nbytes for ref in self.refs]))
        object.__setattr__(self, "paths", tuple(dict.fromkeys(path for ref in self.refs for path in _paths(ref))))
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "is_decoded", any(isinstance(ref, QuantizedRef) for ref in self.refs))

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it is stored as: dtypes, and the formats of what is quantized."""
        if not self.is_decoded:
            return (self.dtype,)
        each = (f"{ref.format}" if isinstance(ref, QuantizedRef) else ref.dtype for ref in self.refs)
        return tuple(dict.fromkeys(each))

    def is_called(self, name: str) -> bool:
        """Whether it is the whole tensor, or quantized weight, of this name."""
        return self.key == name or (self.is_decoded and len(self.refs) == 1 and self.refs[0].name == name)

    @property
    def dtype(self) -> str:
        """Of the numbers."""
        return self.refs[0].dtype

    @property
    def is_whole(self) -> bool:
        """Whether it is a tensor as it stands."""
        return not self.key.startswith(_NO_NAME)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors that it is made of."""
        return tuple(dict.fromkeys([ref.tensor for ref in self.refs]))

    @property
    def text(self) -> str:
        """What it is, for people: of many runs how many, and of which tensors."""
        if len(self.refs) == 1:
            return self.refs[0].name
        tensors = self.tensors
        more = f" and {len(tensors) - _SHOWN} more" if len(tensors) > _SHOWN else ""
        listed = ", ".join(tensors[:_SHOWN]) + more
        runs = sum([bool(ref.whole) for ref in self.refs])
        return f"{len(self.refs)} runs of {listed}" if runs else listed


def _paths(ref: Ref) -> tuple[Path, ...]:
    return tuple(part.path for _, part in ref.parts) if isinstance(ref, QuantizedRef) else (ref.path,)


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
    box: Box | None = None
    """Of which block of a whole tensor the output is, where random bits are those of an element's index there."""

    def __post_init__(self) -> None:
        if self.count < 0:
            object.__setattr__(self, "count", self.output.numel - self.first)
        for operand in self.operands:
            if operand.count != self.taken:
                got = f"{operand.count} of {operand.text!r}"
                raise ValueError(f"{self.label} takes {self.taken} elements of {operand.role}, got {got}")
            if self.op == "copy" and operand.dtype != self.dtype:
                raise ValueError(f"{self.label} is {self.dtype}, and no copy of {operand.text!r}: {operand.dtype}")

    def number(self, index: int) -> int:
        """By what an element of the output, of a flat index, has its random bits."""
        return index if self.box is None else self.box.place(index)

    @property
    def taken(self) -> int:
        """How many elements of each operand it takes: as many as it makes, but for scales, which follow from all."""
        return self.output.encoding.weight.numel if self.output.encoding and self.is_scale else self.count

    @property
    def is_scale(self) -> bool:
        """Whether it makes the scales of a weight, whose codes another step makes."""
        return self.output.encoding is not None and self.output.encoding.part == "scale"

    @property
    def is_from_zero(self) -> bool:
        """Whether nothing is there that something is added to: the sum of what is added is all."""
        each = {"add": 1, "add_difference": 2}.get(self.op, 0)
        return bool(each) and len(self.operands) == each * len(self.factors)

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
    def inputs(self) -> tuple[Ref, ...]:
        """All that is read, in the order of the operands."""
        return tuple(ref for operand in self.operands for ref in operand.refs)

    @property
    def read_bytes(self) -> int:
        """How many bytes it reads."""
        return sum(operand.nbytes for operand in self.operands)

    @property
    def is_own(self) -> bool:
        """Whether it leaves elements of the target as they are, in their place."""
        if self.op != "copy" or self.operands[0].role != "target":
            return False
        at = self.first
        for ref in self.operands[0].refs:
            if (ref.tensor, ref.first) != (self.name, at):
                return False
            at += ref.numel
        return True


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


def copied(steps: Iterable[Step]) -> dict[str, str]:
    """The tensors of which nothing is merged, and why; for some of their parts it may be another reason."""
    reasons: dict[str, dict[str, None]] = {}
    merged = set()
    for step in steps:
        reasons.setdefault(step.name, {})[step.reason] = None
        merged |= set() if step.reason else {step.name}
    return {name: "; ".join(why) for name, why in reasons.items() if name not in merged}


class Comparison(NamedTuple):
    """Two tensors that must be equal byte for byte before anything is written."""

    name: str
    roles: tuple[str, str]
    inputs: tuple[TensorRef, TensorRef]


def operands(tensors: Mapping[str, tuple[Ref, ...]]) -> tuple[Operand, ...]:
    """What was matched, by role, as it is."""
    return tuple(Operand(role, refs) for role, refs in tensors.items())
