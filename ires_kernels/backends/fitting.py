"""The sums of a Fit in plain torch, which is the definition of what the C++ loops count."""

from __future__ import annotations

import torch
from torch import Tensor

from ires_kernels.backends import fit_loops, native, reference
from ires_kernels.backends.choice import choose
from ires_kernels.backends.fit import STEPS, Fit
from ires_kernels.dtypes import NUMBERS

_NAMES = {getattr(torch, number.torch): name for name, number in NUMBERS.items()}
_BITS = {getattr(torch, number.torch): number.bits for number in NUMBERS.values()}
_CODES = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def fit(target: Tensor, instruct: Tensor, base: Tensor, alphas: tuple[float, ...], dtype: torch.dtype) -> Fit:
    """Compare contiguous tensors of one size, whose target is stored as `dtype`, for so many alphas, 8 at most.

    alphas  none where the target is stored as codes: what rounding leaves of an update is not looked at
    """
    operands = (target, instruct, base)
    if choose(target.device) is native and torch.float64 not in {dtype, *(each.dtype for each in operands)}:
        dtypes, addresses = [_NAMES[each.dtype] for each in operands], [each.data_ptr() for each in operands]
        return fit_loops.of_memory(target.numel(), _NAMES[dtype], dtypes, addresses, alphas)
    found = definition(*operands, alphas, dtype)
    found.exact = found.update if alphas else 0.0
    return found


@reference.subnormals_kept()
def definition(target: Tensor, instruct: Tensor, base: Tensor, alphas: tuple[float, ...], dtype: torch.dtype) -> Fit:
    """All of a Fit but `exact`."""
    total = Fit(moved=[0.0] * len(alphas))
    for start in range(0, target.numel(), reference.PIECE):
        piece = slice(start, start + reference.PIECE)
        total += _piece(target[piece], instruct[piece], base[piece], alphas, dtype)
    return total


def _piece(target: Tensor, instruct: Tensor, base: Tensor, alphas: tuple[float, ...], dtype: torch.dtype) -> Fit:
    compute = torch.float64 if torch.float64 in {dtype, target.dtype, instruct.dtype, base.dtype} else torch.float32
    t, x, y = (values.to(compute) for values in (target, instruct, base))
    measured = t.isfinite() & x.isfinite() & y.isfinite()
    t, x, y = (values[measured] for values in (t, x, y))
    drift, update = t - y, x - y
    steps = (_place(x, dtype) - _place(y, dtype)).abs()
    wide, d, u = y.double(), drift.double(), update.double()
    moved = []
    for alpha in alphas:
        stored = reference.round_to(t + torch.tensor(alpha, dtype=compute) * update, dtype, None).to(compute)
        moved.append(float(torch.dot(torch.where(stored.isfinite(), stored - t, 0.0).double(), u)))
    both = (drift != 0) & (update != 0)
    return Fit(
        elements=t.numel(),
        both=int(both.sum()),
        conflicts=int((both & ((drift < 0) != (update < 0))).sum()),
        within=[int(((steps >= 0) & (steps <= 2**k - 1)).sum()) for k in range(STEPS)],
        base=float(torch.dot(wide, wide)),
        drift=float(torch.dot(d, d)),
        update=float(torch.dot(u, u)),
        cross=float(torch.dot(d, u)),
        moved=moved,
    )


def _place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the values come, rounded, among those of the type: 0 for both zeros, whatever is the next is 1 more."""
    bits = _BITS[dtype]
    codes = reference.round_to(values, dtype, None).view(_CODES[bits]).to(torch.int64)
    size = codes & ((1 << (bits - 1)) - 1)
    return torch.where((codes >> (bits - 1) & 1) == 1, -size, size)
