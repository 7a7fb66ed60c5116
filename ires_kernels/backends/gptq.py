"""Weights of GPTQ by the C++ loops: a column of words, turned, is a row of codes that follow each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ires_kernels.backends import native
from ires_kernels.formats import matrices

if TYPE_CHECKING:
    from ires_kernels.backends.decoding import Weight


def decode(weight: Weight, first: int, count: int, out: Tensor) -> bool:
    """`decoding.decode` of codes of 4 and 8 bits; False for all else."""
    bits, (many, height, width) = weight.format.bits, matrices(weight.full)
    if weight.format.name != "gptq" or bits not in (4, 8) or many != 1:
        return False
    size = weight.format.number("columns")
    rows = torch.arange(first // width, -(-(first + count) // width))
    groups = torch.arange(-(-width // size))
    words = weight.parts["codes"].view(torch.int32).view(-1, height)[:, rows[0] : rows[-1] + 1].T.contiguous()
    scales = weight.scale(groups[:, None] * height + rows).T.contiguous()
    zeros = _zeros(weight, rows, len(groups)).to(torch.int8).contiguous()
    order = weight.parts.get("g_idx")
    if order is not None and torch.equal(order.view(torch.int32), torch.arange(width, dtype=torch.int32) // size):
        order = None
    parts = [None if part is None else part.view(torch.uint8).numpy().data for part in (words, scales, zeros, order)]
    native.decode_groups(bits, (len(rows), width), size, parts, first % width, count, out)
    return True


def _zeros(weight: Weight, rows: Tensor, groups: int) -> Tensor:
    """Of some rows and all groups; of bytes less 128, as their codes are taken."""
    bits, kind = weight.format.bits, weight.format.word("zeros")
    middle, taken = 1 << bits - 1, 128 if bits == 8 else 0
    if kind == "middle":
        return torch.full((len(rows), groups), middle - taken)
    stored = weight.parts["zero_point"].view(torch.int32).view(-1, weight.grid.height * bits // 32)
    zero = stored[:, rows * bits // 32] >> (rows * bits % 32).to(torch.int32) & 2 * middle - 1
    zero = zero + 1 & 2 * middle - 1 if kind == "v1" else zero
    return zero.T - taken
