"""The table of storage types agrees with torch, with csrc, and with its own formulas."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ires_kernels.dtypes import FLOATS, NUMBERS, STORAGE, Dtype, Number

PRESENT = [dtype for dtype in STORAGE.values() if dtype.torch and hasattr(torch, dtype.torch)]


@pytest.mark.parametrize("dtype", PRESENT, ids=lambda dtype: dtype.name)
def test_torch_has_the_same_width_and_kind(dtype: Dtype) -> None:
    found: torch.dtype = getattr(torch, dtype.torch)
    assert found.itemsize * 8 == dtype.bits
    assert found.is_floating_point == (dtype.kind == "float")
    assert found.is_complex == (dtype.kind == "complex")


@pytest.mark.parametrize("number", NUMBERS.values(), ids=lambda number: number.name)
def test_numbers_have_the_codes_that_torch_has(number: Number) -> None:
    dtype: torch.dtype = getattr(torch, number.torch)
    integer = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[number.bits]
    largest, above, nan = torch.tensor([number.largest, number.infinity, number.nan], dtype=integer).view(dtype)
    assert largest.double() == torch.finfo(dtype).max
    assert above.double().isinf() or number.infinity == number.largest
    assert nan.double().isnan()
    assert torch.tensor(1.0, dtype=dtype).view(integer) == number.bias << number.fraction
    assert torch.finfo(dtype).eps == 2.0**-number.fraction


def test_limits() -> None:
    assert {number.name: (number.limit, number.limit_overflows) for number in NUMBERS.values()} == {
        "F64": (float("inf"), True),
        "F32": (2.0**128 - 2.0**103, True),
        "F16": (65520.0, True),
        "BF16": (2.0**128 - 2.0**119, True),
        "F8_E4M3": (464.0, False),  # halfway from 448 to what would be next, a tie that goes to 448
        "F8_E5M2": (61440.0, True),
    }


def test_numbers_are_those_of_csrc() -> None:
    text = (Path(__file__).parent.parent / "csrc" / "arith.h").read_text()
    enum = re.search(r"enum class DType : int \{([^}]*)\}", text)
    assert enum
    names = [name.strip().upper() for name in enum[1].split(",")]
    assert [number.name.removeprefix("F8_") for number in NUMBERS.values()] == names
    assert [number.csrc for number in NUMBERS.values()] == list(range(len(names)))
    assert list(FLOATS.values()) == [8, 4, 2, 2, 1, 1]
