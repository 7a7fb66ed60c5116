"""A quantized weight as it is stored: the bytes of its parts, and where in them codes and scales of elements are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ires_kernels.formats import Format, matrices, span

Parts = Mapping[str, memoryview]
_SCALES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
_ALL = slice(None)


class Grid(NamedTuple):
    """The blocks of one matrix, or of all of them as one."""

    height: int
    """Rows of a matrix."""
    width: int
    rows: int
    """Sides of a block."""
    columns: int

    @classmethod
    def of(cls, format: Format, full: tuple[int, ...]) -> Grid:
        many, height, width = matrices(full)
        rows, columns = format.number("rows", 1), format.number("columns", 1)
        return cls(many * height if rows >= many * height else height, width, rows, columns)

    def block(self, row: Tensor, column: Tensor) -> Tensor:
        """The flat index of the block in which an element lies, by its row among those of all matrices."""
        down, across = -(-self.height // self.rows), -(-self.width // self.columns)
        line = row // self.height * down + row % self.height // self.rows
        return line * across + column // self.columns


class Weight(NamedTuple):
    """What an element's number is made of."""

    format: Format
    full: tuple[int, ...]
    base: int
    """Where the bytes of the codes begin in their tensor."""
    parts: Mapping[str, Tensor]
    """The bytes of each."""
    grid: Grid

    @classmethod
    def of(cls, format: Format, full: tuple[int, ...], first: int, count: int, parts: Parts) -> Weight:
        """A weight of which there are the codes of this run."""
        base = span(format, full, first, count)[0]
        stored = {part: as_bytes(view) for part, view in parts.items()}
        return cls(format, full, base, stored, Grid.of(format, full))

    def place(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Row, counted through all matrices, and column of elements by their flat index."""
        return index // self.grid.width, index % self.grid.width

    def scale(self, block: Tensor) -> Tensor:
        return self.floats("scale", block, self.format.word("scale"))

    def floats(self, part: str, at: Tensor | slice = _ALL, dtype: str = "F32") -> Tensor:
        """Elements of a part, in float32."""
        return floats(self.parts[part], dtype, at)

    def bits(self, position: Tensor) -> Tensor:
        """The codes at these positions in bits, in a little-endian stream of codes that do not straddle bytes."""
        width = self.format.bits
        return self.parts["codes"][position // 8 - self.base].long() >> position % 8 & (1 << width) - 1


def fields(words: Tensor, bit: Tensor, bits: int) -> Tensor:
    """Codes at these bits of each row of 32-bit words, a little-endian stream; a code may lie in two of them."""
    word, shift = bit // 32, (bit % 32).to(torch.int32)
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        return words[:, word] >> shift & mask
    after = (word + 1).clamp(max=words.shape[1] - 1)
    return ((words[:, after].long() << 32 | words[:, word].long() & 0xFFFFFFFF) >> shift & mask).to(torch.int32)


def as_bytes(view: memoryview) -> Tensor:
    """The bytes of a part; torch wants memory that it could write."""
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)


def floats(stored: Tensor, dtype: str, at: Tensor | slice = _ALL) -> Tensor:
    """The elements of a dtype in the bytes `stored`, as float32, exactly; all of them, or those `at` some places."""
    if dtype == "F8_E4M3":
        return E4M3[stored[at].long()]
    if dtype == "F8_E8M0":
        code = stored[at].to(torch.int32)
        bits = (code << 23).masked_fill(code == 0, 1 << 22).masked_fill(code == 255, 0x7FC00000)
        return bits.view(torch.float32)
    return stored.view(_SCALES[dtype])[at].float()
