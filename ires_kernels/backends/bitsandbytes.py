"""The numbers of weights of bitsandbytes: in torch, which defines them, and by C++ loops in terms of other formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ires_kernels.backends import native
from ires_kernels.backends.reference import subnormals_kept
from ires_kernels.formats import Format

if TYPE_CHECKING:
    from ires_kernels.backends.weight import Weight

_INT8 = torch.tensor(0.007874015718698502)
"""1 / 127 as bitsandbytes multiplies by it."""


def four_bits(weight: Weight, index: Tensor) -> Tensor:
    """Codes that follow each other through the whole weight, two in a byte, and so do their blocks."""
    first, count = int(index[0]), len(index)
    pairs = weight.parts["codes"][first // 2 - weight.base : (first + count + 1) // 2 - weight.base]
    codes = torch.stack((pairs >> 4, pairs & 15), 1).view(-1)[first % 2 :][:count]
    block, lengths = _blocks(first, count, weight.format.number("columns"))
    return weight.floats("quant_map", codes.int()) * _absmax(weight, block).repeat_interleave(lengths)


def int8(weight: Weight, index: Tensor) -> Tensor:
    """A scale for each row, and one factor for all."""
    first, count = int(index[0]), len(index)
    codes = weight.parts["codes"][first - weight.base :][:count].view(torch.int8)
    rows, lengths = _blocks(first, count, weight.grid.width)
    return codes.float() * weight.scale(rows).repeat_interleave(lengths) * _INT8


@subnormals_kept()
def decode(weight: Weight, first: int, count: int, out: Tensor) -> bool:
    """`decoding.decode` by the loops; False where they do not know the format."""
    if weight.format.name == "bnb-int8":
        scaled = Format("int8-channel", (("rows", 1), ("columns", weight.grid.width), ("scale", "F32")))
        parts = {name: weight.parts[name].numpy().data for name in ("codes", "scale")}
        if weight.format.word("scale") != "F32" or not native.decode(scaled, weight.full, first, count, parts, out):
            return False
        out.mul_(_INT8)
        return True
    size = weight.format.number("columns")
    if weight.format.name != "bnb-4bit" or size % 2:
        return False
    # As a row of its own, which begins with the block of the first element.
    block, _ = _blocks(first, count, size)
    table = tuple(weight.floats("quant_map").tolist())
    codes, scales = (part.numpy().data for part in (weight.parts["codes"], _absmax(weight, block).view(torch.uint8)))
    native.decode_row(codes, table, size, scales, first % size, count, out)
    return True


def _absmax(weight: Weight, block: Tensor) -> Tensor:
    """The scales of some blocks, which may be stored as codes themselves."""
    if "nested_absmax" not in weight.parts:
        return weight.floats("absmax", block)
    code, outer = weight.parts["absmax"][block].long(), block // weight.format.number("nested")
    inner = weight.floats("nested_quant_map", code) * weight.floats("nested_absmax", outer)
    return inner + torch.tensor(float.fromhex(weight.format.word("offset")))


def _blocks(first: int, count: int, size: int) -> tuple[Tensor, Tensor]:
    """The blocks of this size in which elements that follow each other lie, and how many of them in each."""
    block = torch.arange(first // size, (first + count - 1) // size + 1)
    lengths = torch.full_like(block, size)
    lengths[0] -= first % size
    lengths[-1] -= (int(block[-1]) + 1) * size - (first + count)
    return block, lengths
