"""The counts of a Tally in plain torch, for devices whose kernels do not count, and without waiting for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ires_kernels import dtypes
from ires_kernels.backends.call import Tally

_FORMATS: dict[torch.dtype, dtypes.Number] = {getattr(torch, each.torch): each for each in dtypes.NUMBERS.values()}

NUMBERS = 8
"""How many numbers `count` makes."""


def count(op: str, operands: Sequence[Tensor], factors: Sequence[float], stored: Tensor) -> Tensor:
    """Count one call: "subtract", "add" or "add_difference" of tensors of one shape, and what it stored.

    Returns float64[NUMBERS] on the device of `stored`, for `tally`; nothing here waits. The integers are those of every
    backend, and exact up to 2^53 elements. The two sums are added up in float64 and in another order.
    """
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

    measured = finite_in & update.isfinite() & after.isfinite()
    asked = torch.where(measured, update, 0).double().reshape(-1)
    moved = torch.where(measured, after.double() - before.double(), 0).reshape(-1)
    sums = (torch.dot(moved, asked), torch.dot(asked, asked))
    return torch.stack([*(mask.sum().double() for mask in counted), *sums])


def tally(elements: int, numbers: Tensor) -> Tally:
    """What `count` made of a call on so many elements, when it is there."""
    values = numbers.tolist()
    return Tally(elements, *map(int, values[:-2]), *values[-2:])


def _update_and_result(op: str, values: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """D, and the value before the store, each step one operation."""
    if op == "subtract":
        difference = values[0] - values[1]
        return difference, difference
    residuals = values[1:]
    if op == "add_difference":
        residuals = [x - y for x, y in zip(values[1::2], values[2::2], strict=True)]
    scaled = [factor * residual for factor, residual in zip(factors, residuals, strict=True)]
    update, result = scaled[0], values[0] + scaled[0]
    for each in scaled[1:]:
        update = update + each
        result = result + each
    return update, result


def _overflows(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Where rounding to nearest gives no finite number, or in a type without infinity another than the next one."""
    if value.dtype == dtype:  # the limit is no number of its own type: only infinity is beyond it
        return value.isinf()
    number = _FORMATS[dtype]
    return value.abs() >= number.limit if number.limit_overflows else value.abs() > number.limit
