"""The sums of a Fit by the C++ loops, of numbers in memory or in files, without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ires_kernels.backends.fit import Fit
from ires_kernels.dtypes import NUMBERS

try:
    from ires_kernels import _native
except ImportError:  # `native.status` says why
    _native = None  # type: ignore[assignment]


class Unread(Exception):
    """Numbers that were to be counted could not be read: of which operand, which of its runs, and from where on."""

    def __init__(self, operand: int, run: int, error: int, at: int) -> None:
        super().__init__(operand, run, error, at)
        self.operand = operand
        self.run = run
        self.error = error
        """An errno, or 0 where the file ends."""
        self.at = at


def available(dtypes: set[str]) -> bool:
    """Whether calls go here of numbers of these dtypes of safetensors, unless IRES_BACKEND asks for torch's."""
    loops = _native is not None and bool(_native.isas())
    return loops and os.environ.get("IRES_BACKEND", "") in ("", "native") and "F64" not in dtypes


def of_memory(
    count: int, dtype: str, dtypes: Sequence[str], operands: Sequence[int | memoryview], alphas: Sequence[float]
) -> Fit:
    """Count target, instruct and base: addresses of so many numbers, or views of their bytes.

    dtype  what the target is stored as
    """
    return _fit(_native.fit(count, *_types(dtype, dtypes), tuple(operands), list(alphas), _isa()))


def of_files(
    count: int,
    dtype: str,
    dtypes: Sequence[str],
    operands: Sequence[Sequence[tuple[int, int, int]]],
    alphas: Sequence[float],
) -> Fit:
    """Count numbers that lie in files that are open: runs of (descriptor, offset, bytes). Raises Unread."""
    runs = tuple(list(each) for each in operands)
    found = _native.fit_files(count, *_types(dtype, dtypes), runs, list(alphas), _isa())
    if len(found) == 4:
        raise Unread(*found)
    return _fit(found)


def _types(dtype: str, dtypes: Sequence[str]) -> tuple[int, tuple[int, ...]]:
    return NUMBERS[dtype].csrc, tuple(NUMBERS[each].csrc for each in dtypes)


def _isa() -> str:
    return os.environ.get("IRES_ISA", "")


_Found = tuple[int, int, int, list[int], float, float, float, float, list[float]]


def _fit(found: _Found) -> Fit:
    fit = Fit(*found)
    fit.exact = fit.update if fit.moved else 0.0
    return fit
