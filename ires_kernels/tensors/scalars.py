"""Preconditions of what is no tensor among the arguments: factors, seeds, streams, rounding, dtypes."""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ires_kernels.dtypes import NUMBERS, number_of
from ires_kernels.tensors.names import is_sequence, kind_of

# Storage types and their widths in bytes.
STORAGE = {getattr(torch, number.torch): number.bits // 8 for number in NUMBERS.values()}
WANTED = "wanted one of " + ", ".join(str(dtype).removeprefix("torch.") for dtype in STORAGE)
_LARGEST = sys.float_info.max
F32_OVERFLOW = NUMBERS["F32"].limit  # the least magnitude that float32 rounds to infinity


class Rounding(NamedTuple):
    """How the caller wants results rounded, and with which random bits."""

    mode: str
    seed: int
    stream: int | Sequence[int]
    offset: int


def factor(value: Any, where: str) -> float:
    """A finite real number, as float."""
    if not isinstance(value, float):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            hint = "; pass its .item()" if isinstance(value, Tensor) else ""
            raise TypeError(f"{where} is {kind_of(value)}, wanted a real number{hint}")
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{where} is beyond the range of float64, wanted a finite number") from None
    if not -_LARGEST <= value <= _LARGEST:  # math.isfinite is opaque to torch.compile
        raise ValueError(f"{where} is {value}, wanted a finite number")
    return float(value)


def factors(value: Any, count: int, where: str, what: str = "residuals") -> tuple[float, ...]:
    """One factor for each of `count` residuals or pairs, from one number for all or a sequence."""
    if not is_sequence(value):
        return (factor(value, where),) * count
    if len(value) != count:
        raise ValueError(f"{where} has {len(value)} numbers for {count} {what}")
    return tuple(factor(x, f"{where}[{i}]") for i, x in enumerate(value))


def unsigned(value: Any, op: str, name: str) -> int:
    """An integer of 64 bits: a seed, a stream or an offset."""
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{op}: {name} is {kind_of(value)}, wanted an integer")
        value = operator.index(value)
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{op}: {name} is {value}, wanted an integer from 0 to 2^64 - 1")
    return int(value)


def streams(value: Any, count: int, op: str) -> list[int]:
    """One stream per item; an integer is that of the first, and the others count on from it."""
    if not is_sequence(value):
        first = unsigned(value, op, "stream")
        if count > 1 and first > (1 << 64) - count:
            raise ValueError(f"{op}: stream is {first}, and {count} tensors count on from it beyond 2^64 - 1")
        return [first + i for i in range(count)]
    if len(value) != count:
        raise ValueError(f"{op}: stream has {len(value)} integers for {count} tensors")
    return [unsigned(x, op, f"stream[{i}]") for i, x in enumerate(value)]


def stochastic(rounding: Any, op: str) -> bool:
    """Whether `rounding` is "stochastic" rather than "nearest"."""
    if rounding == "nearest":
        return False
    if rounding == "stochastic":
        return True
    raise ValueError(f'{op}: rounding is {rounding!r}, wanted "nearest" or "stochastic"')


def storage_dtype(dtype: Any, where: str) -> torch.dtype:
    """A storage type asked for with dtype=: torch's, or its name."""
    if isinstance(dtype, torch.dtype) and dtype in STORAGE:
        return dtype
    number = number_of(dtype) if isinstance(dtype, str) else None
    if number is not None:
        found: torch.dtype = getattr(torch, number.torch)
        return found
    raise TypeError(f"{where} is {dtype}, {WANTED}")


def factors_in_range(op: str, values: Iterable[float], outs: list[Tensor], inputs: list[tuple[Tensor, ...]]) -> None:
    """A factor that float32 cannot hold wants a float64 tensor in every item."""
    for value in values:
        if abs(value) >= F32_OVERFLOW:
            for out, row in zip(outs, inputs, strict=True):
                if not any(x.dtype == torch.float64 for x in (out, *row)):
                    raise ValueError(
                        f"{op}: a factor of {value} is infinite in float32, in which this is computed; "
                        "wanted less than 2^128, or a float64 tensor"
                    )
