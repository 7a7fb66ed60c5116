"""Weights of GPTQ and AWQ by the C++ loops, with what lies along the other dimension turned.

A column of GPTQ's words is then a row of codes that follow each other; of AWQ's words each nibble is a byte of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ires_kernels.backends import native
from ires_kernels.formats import matrices

if TYPE_CHECKING:
    from ires_kernels.backends.weight import Weight

AWQ_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
"""In which nibble of its word each of eight columns lies."""


def decode(weight: Weight, first: int, count: int, out: Tensor) -> bool:
    """`decoding.decode` of GPTQ of 4 and 8 bits, and AWQ of 4; False for all else."""
    bits, (many, height, width) = weight.format.bits, matrices(weight.full)
    if (weight.format.name, bits) not in (("gptq", 4), ("gptq", 8), ("awq", 4)) or many != 1:
        return False
    size = weight.format.number("columns")
    rows = torch.arange(first // width, -(-(first + count) // width))
    groups = torch.arange(-(-width // size))
    start = 0
    if weight.format.name == "awq":
        start = int(rows[0]) % 8
        rows = torch.arange(int(rows[0]) - start, -(-int(rows[-1] + 1) // 8) * 8)
        codes = _unpacked(
            weight.parts["codes"].view(torch.int32).view(width, height // 8)[:, rows[0] // 8 : rows[-1] // 8 + 1]
        )
    else:
        codes = weight.parts["codes"].view(torch.int32).view(-1, height)[:, rows[0] : rows[-1] + 1].T.contiguous()
    scales = weight.scale(groups[:, None] * height + rows).T.contiguous()
    zeros = _zeros(weight, rows, len(groups)).to(torch.int8).contiguous()
    order = weight.parts.get("g_idx")
    if order is not None and torch.equal(order.view(torch.int32), torch.arange(width, dtype=torch.int32) // size):
        order = None
    stored = (codes, scales, zeros, order)
    # Flat first: a matrix of one column may have any stride along its rows, and torch does not see that it is bytes.
    parts = [None if part is None else part.reshape(-1).view(torch.uint8).numpy().data for part in stored]
    what = "nibbles" if weight.format.name == "gptq" and bits == 4 else "U8" if bits == 8 else "I8"
    native.decode_groups(what, (len(rows), width), size, parts, start * width + first % width, count, out)
    return True


def _unpacked(words: Tensor) -> Tensor:
    """The codes of AWQ's words, a byte each, by the rows of numbers that the nibbles of a word are of."""
    codes = torch.empty(words.shape[1], 8, words.shape[0], dtype=torch.uint8)
    for row, nibble in enumerate(AWQ_NIBBLE):
        codes[:, row] = (words.T >> 4 * nibble & 15).to(torch.uint8)
    return codes


def _zeros(weight: Weight, rows: Tensor, groups: int) -> Tensor:
    """Of some rows and all groups; of bytes less 128, as their codes are taken."""
    bits, kind = weight.format.bits, weight.format.word("zeros")
    middle, taken = 1 << bits - 1, 128 if bits == 8 else 0
    if kind == "middle":
        return torch.full((len(rows), groups), middle - taken)
    stored = weight.parts["zero_point"].view(torch.int32).view(-1, weight.grid.height * bits // 32)
    place = rows * bits
    if weight.format.name == "awq":
        place = rows // 8 * 32 + torch.tensor(AWQ_NIBBLE)[rows % 8] * 4
    zero = stored[:, place // 32] >> (place % 32).to(torch.int32) & 2 * middle - 1
    zero = zero + 1 & 2 * middle - 1 if kind == "v1" else zero
    return zero.T - taken
