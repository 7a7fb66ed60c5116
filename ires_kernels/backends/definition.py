"""The numbers of quantized weights in plain torch, which is the definition of every one of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ires_kernels.backends import bitsandbytes, gptq
from ires_kernels.backends.reference import PIECE, subnormals_kept
from ires_kernels.backends.weight import E4M3, Parts, Weight, fields
from ires_kernels.formats import Format, matrices, row_bytes

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_AWQ_NIBBLE = torch.tensor(gptq.AWQ_NIBBLE)


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
    return E4M3[code] * scale


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


_NUMBERS: dict[str, Callable[[Weight, Tensor], Tensor]] = {
    "mxfp4-transposed": _transposed,
    "bnb-4bit": bitsandbytes.four_bits,
    "bnb-int8": bitsandbytes.int8,
}


def _signed(code: Tensor) -> Tensor:
    """A byte in two's complement."""
    return (code ^ 128) - 128
