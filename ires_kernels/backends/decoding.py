"""The numbers of quantized weights: by the C++ loops where these know a format of `ires_kernels.formats`, and in plain
torch, which is the definition of every one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ires_kernels.backends import bitsandbytes, gptq, native
from ires_kernels.backends.call import Call, Coded
from ires_kernels.backends.choice import choose
from ires_kernels.backends.reference import PIECE, subnormals_kept
from ires_kernels.formats import Format, matrices, row_bytes, span

Parts = Mapping[str, memoryview]

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
_SCALES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALL = slice(None)
_AWQ_NIBBLE = torch.tensor(gptq.AWQ_NIBBLE)


def decode(format: Format, full: tuple[int, ...], first: int, count: int, parts: Parts, out: Tensor) -> None:
    """The numbers of `count` elements from the flat index `first` on of a weight of the shape `full`, into float32.

    parts["codes"] holds the bytes that `formats.span` names for this run, and no others; the other parts are whole.
    """
    if choose(out.device) is native:
        if native.decode(format, full, first, count, parts, out):
            return
        weight = Weight.of(format, full, first, count, parts)
        if bitsandbytes.decode(weight, first, count, out) or gptq.decode(weight, first, count, out):
            return
    define(format, full, first, count, parts, out)


def decode_on_device(
    format: Format, full: tuple[int, ...], first: int, parts: Mapping[str, Tensor], out: Tensor
) -> bool:
    """`decode` on a GPU that has the parts, as bytes; False where its backend has no kernel for the format.

    On the CPU it is `decode`, for what is a device to its callers there.
    """
    if out.device.type == "cpu":
        decode(format, full, first, len(out), {name: part.numpy().data for name, part in parts.items()}, out)
        return True
    if choose(out.device) is native:
        return native.decode_on_device(format, full, first, parts, out)
    from ires_kernels.backends import triton  # which takes a while, and may not be there

    return triton.decode_on_device(format, full, first, parts, out)


def run(call: Call, coded: Mapping[int, Coded]) -> None:
    """Compute a call on one item whose operands at these places are decoded on the way, on the CPU.

    All of it is contiguous. The tensors at these places, float32, are memory for the numbers; the C++ loops leave it
    alone where they know the format, as they decode pieces that stay in the nearest cache.
    """
    fused = settle(call, coded)
    native.run_decoded(call, fused) if fused else choose(call.outs[0].device).run(call)


def settle(call: Call, coded: Mapping[int, Coded]) -> dict[int, Coded]:
    """Decode what the loops of the backend do not decode on the way; returns the rest."""
    backend = choose(call.outs[0].device)
    fused = {place: numbers for place, numbers in coded.items() if backend is native and native.fuses(numbers)}
    for place in coded.keys() - fused.keys():
        (format, full, first, parts), out = coded[place], call.inputs[0][place].view(-1)
        decode(format, full, first, len(out), parts, out)
    return fused


def define(format: Format, full: tuple[int, ...], first: int, count: int, parts: Parts, out: Tensor) -> None:
    """`decode` in plain torch."""
    weight = Weight.of(format, full, first, count, parts)
    number = _NUMBERS.get(format.name, _scaled)
    width, stop = matrices(full)[2], first + count
    with subnormals_kept():
        if format.name in ("gptq", "awq"):
            step = max(1, PIECE // width) * width
            for start in range(first // width * width, stop, step):
                rows = torch.arange(start // width, -(-min(start + step, stop) // width))
                begin, end = max(start, first), min(start + step, stop)
                out[begin - first : end - first] = _turned(weight, rows).reshape(-1)[begin - start : end - start]
            return
        for start in range(first, stop, PIECE):
            end = min(start + PIECE, stop)
            out[start - first : end - first] = number(weight, torch.arange(start, end))


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


def _scaled(weight: Weight, index: Tensor) -> Tensor:
    """A code times a scale, in formats whose rows follow each other."""
    row, column = weight.place(index)
    name = weight.format.name
    code = weight.bits(row * row_bytes(weight.format, weight.full) * 8 + column * weight.format.bits)
    block = weight.grid.block(row, column)
    if name in ("pack-quantized", "int8-tensor", "int8-channel", "int8-block"):
        return _integer(weight, code, row, column, block)
    scale = weight.scale(block)
    if name == "nvfp4":
        shared = weight.floats("global")
        all_rows = math.prod(weight.full[:-1])
        shared = shared[row // (all_rows // len(shared))]
        scale = scale / shared if weight.format.word("global") == "divide" else scale * shared
    if name in ("nvfp4", "mxfp4"):
        return _E2M1[code] * 2.0 ** weight.format.number("lift") * scale  # the first product is exact
    return _E4M3[code] * scale


def _integer(weight: Weight, code: Tensor, row: Tensor, column: Tensor, block: Tensor) -> Tensor:
    middle = 1 << weight.format.bits - 1
    value = code - middle if weight.format.name == "pack-quantized" else _signed(code)
    order = weight.parts.get("g_idx")
    if order is not None and (groups := order.view(torch.int32)).ge(0).any():
        across = -(-weight.grid.width // weight.grid.columns)
        block = row // weight.grid.rows * across + groups[column]
    if "zero_point" in weight.parts:
        value = value - _zero_point(weight, block)
    return value.float() * weight.scale(block)


def _zero_point(weight: Weight, block: Tensor) -> Tensor:
    stored = weight.parts["zero_point"]
    if weight.format.word("zero_point") == "I8":
        return _signed(stored.long()[block])
    bits, grid = weight.format.bits, weight.grid
    across = -(-grid.width // grid.columns)
    row, column = block // across, block % across
    each = 32 // bits
    words = stored.view(torch.int32)
    word = words[row // each * across + column].long()
    return (word >> row % each * bits & (1 << bits) - 1) - (1 << bits - 1)


def _transposed(weight: Weight, index: Tensor) -> Tensor:
    """MXFP4 in the matrix that is stored, (in, out), from which the numbers' (out, in) is read."""
    height, width = matrices(weight.full)[1:]
    row, column = weight.place(index)
    line = row // height * width + column
    position = line * height + row % height
    block = line * -(-height // weight.grid.columns) + row % height // weight.grid.columns
    return _E2M1[weight.bits(position * 4)] * weight.scale(block)


def _turned(weight: Weight, rows: Tensor) -> Tensor:
    """Whole rows of GPTQ and AWQ, whose words lie along the other dimension than their numbers, (in, out).

    Codes of GPTQ are a stream down each column of words, zero points of both and codes of AWQ are along each row.
    """
    height, width, bits = weight.grid.height, weight.grid.width, weight.format.bits
    columns = torch.arange(width)
    awq = weight.format.name == "awq"
    place = rows // 8 * 32 + _AWQ_NIBBLE[rows % 8] * 4 if awq else rows * bits
    words = weight.parts["codes"].view(torch.int32).view(-1, height // 8 if awq else height)
    code = fields(words, place, bits).T if awq else fields(words[:, rows].T.contiguous(), columns * bits, bits)
    order = weight.parts.get("g_idx")
    group = columns // weight.grid.columns if order is None else order.view(torch.int32).long()
    zeros = weight.format.word("zeros")
    if zeros == "middle":
        value = code - (1 << bits - 1)
    else:
        stored = weight.parts["zero_point"].view(torch.int32).view(-1, height * bits // 32)
        zero = fields(stored, place, bits)
        zero = zero + 1 & (1 << bits) - 1 if zeros == "v1" else zero
        value = code - zero.T[:, group]
    groups = torch.arange(-(-width // weight.grid.columns))
    return value.float() * weight.scale(groups[:, None] * height + rows).T[:, group]


def fields(words: Tensor, bit: Tensor, bits: int) -> Tensor:
    """Codes at these bits of each row of 32-bit words, a little-endian stream; a code may lie in two of them."""
    word, shift = bit // 32, (bit % 32).to(torch.int32)
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        return words[:, word] >> shift & mask
    after = (word + 1).clamp(max=words.shape[1] - 1)
    return ((words[:, after].long() << 32 | words[:, word].long() & 0xFFFFFFFF) >> shift & mask).to(torch.int32)


_NUMBERS: dict[str, Callable[[Weight, Tensor], Tensor]] = {
    "mxfp4-transposed": _transposed,
    "bnb-4bit": bitsandbytes.four_bits,
    "bnb-int8": bitsandbytes.int8,
}


def as_bytes(view: memoryview) -> Tensor:
    """The bytes of a part; torch wants memory that it could write."""
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)


def floats(stored: Tensor, dtype: str, at: Tensor | slice = _ALL) -> Tensor:
    """The elements of a dtype in the bytes `stored`, as float32, exactly; all of them, or those `at` some places."""
    if dtype == "F8_E4M3":
        return _E4M3[stored[at].long()]
    if dtype == "F8_E8M0":
        code = stored[at].to(torch.int32)
        bits = (code << 23).masked_fill(code == 0, 1 << 22).masked_fill(code == 255, 0x7FC00000)
        return bits.view(torch.float32)
    return stored.view(_SCALES[dtype])[at].float()


def _signed(code: Tensor) -> Tensor:
    """A byte in two's complement."""
    return (code ^ 128) - 128
