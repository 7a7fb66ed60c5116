"""The counts of a Tally in plain torch, for processors whose kernels do not count, and without waiting for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ires_kernels.backends import Tally

# The smallest magnitude that rounding to nearest does not keep finite: half a step beyond the largest finite value.
_OVERFLOW = {
    torch.float64: math.inf,
    torch.float32: 2.0**128 - 2.0**103,
    torch.float16: 65520.0,
    torch.bfloat16: 2.0**128 - 2.0**119,
    torch.float8_e5m2: 61440.0,
}
_E4M3_LARGEST = 464.0  # halfway from 448 to what would be next, a tie that goes to 448


class Counts:
    """Adds up on a device what docs/numerics.md says is counted; nothing here waits, but for `tally`.

    The integers are those of every backend. The two sums are added up in float64 and in another order.
    """

    def __init__(self, device: torch.device) -> None:
        self._elements = 0
        self._counts = torch.zeros(6, dtype=torch.int64, device=device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, op: str, operands: Sequence[Tensor], factors: Sequence[float], stored: Tensor) -> None:
        """Count one call: "subtract", "add" or "add_difference" of flat tensors, and what it stored."""
        wide = torch.float64 in {stored.dtype, *(x.dtype for x in operands)}
        c = torch.float64 if wide else torch.float32
        values = [x.to(c) for x in operands]
        update, result = _update_and_result(op, values, [torch.tensor(factor, dtype=c) for factor in factors])
        before = values[0] if op != "subtract" else torch.zeros_like(result)
        after = stored.to(c)

        nan_in = values[0].isnan()
        finite_in = values[0].isfinite()
        for x in values[1:]:
            nan_in |= x.isnan()
            finite_in &= x.isfinite()
        updated = (update != 0) & ~update.isnan()
        lost = updated & (after == before)
        overflow = finite_in & _overflows(result, stored.dtype)
        inf_in = ~(nan_in | finite_in)
        counted = (updated, lost, nan_in, inf_in, after.isnan(), overflow)
        self._counts += torch.stack([mask.sum() for mask in counted])

        measured = finite_in & update.isfinite() & after.isfinite()
        asked = torch.where(measured, update, 0).double()
        moved = torch.where(measured, after.double() - before.double(), 0)
        self._sums += torch.stack([torch.dot(moved, asked), torch.dot(asked, asked)])
        self._elements += stored.numel()

    def tally(self) -> Tally:
        """All of it, once the device is there."""
        return Tally(self._elements, *map(int, self._counts.tolist()), *self._sums.tolist())


def _update_and_result(op: str, values: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """D, and the value before the store, each step one operation."""
    if op == "subtract":
        difference = values[0] - values[1]
        return difference, difference
    if op == "add_difference":
        update = factors[0] * (values[1] - values[2])
        return update, values[0] + update
    scaled = [factor * residual for factor, residual in zip(factors, values[1:], strict=True)]
    update, result = scaled[0], values[0] + scaled[0]
    for each in scaled[1:]:
        update = update + each
        result = result + each
    return update, result


def _overflows(value: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float8_e4m3fn:
        return value.abs() > _E4M3_LARGEST
    # A float32 is beyond the range of float32 only as infinity, and the limit is no float32.
    return value.abs() >= (math.inf if value.dtype == dtype else _OVERFLOW[dtype])
