"""Scales that would make NaN of numbers, and groups that lead out of them, are found before a number is made."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ires_kernels.backends.companions import fault
from ires_kernels.formats import Format

BLOCK = Format("fp8-block", (("rows", 128), ("columns", 128), ("scale", "F32")))
GROUPS = Format("pack-quantized", (("bits", 4), ("rows", 1), ("columns", 32), ("scale", "BF16")))
MIDDLE = Format("gptq", (("bits", 4), ("rows", 1), ("columns", 32), ("scale", "F16"), ("zeros", "middle")))


def raw(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().view(torch.uint8).numpy()).cast("B")


def scales(dtype: torch.dtype, *, at: int = 5, value: float = 1.0) -> memoryview:
    made = torch.ones(12, dtype=dtype)
    made[at] = value
    return raw(made)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -0.0])
@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_a_scale_is_a_finite_number_but_0(value: float, name: str, dtype: torch.dtype) -> None:
    form = Format("fp8-block", (("rows", 128), ("columns", 128), ("scale", name)))
    assert fault(form, (512, 300), {"scale": scales(dtype)}) == ""
    wanted = f"its scale is {value:g} at its element 5, wanted finite numbers but 0"
    assert fault(form, (512, 300), {"scale": scales(dtype, value=value)}) == wanted


def test_exponents_of_255_are_none() -> None:
    form = Format("mxfp8", (("rows", 1), ("columns", 32), ("scale", "F8_E8M0")))
    assert fault(form, (256, 32), {"scale": raw(torch.arange(255).to(torch.uint8))}) == ""
    got = fault(form, (256, 32), {"scale": raw(torch.arange(256).to(torch.uint8))})
    assert got == "its scale is 255, which is NaN, at its element 255, wanted finite numbers but 0"


def test_a_block_of_nvfp4_may_have_the_scale_0_and_the_whole_weight_may_not() -> None:
    form = Format("nvfp4", (("rows", 1), ("columns", 16), ("scale", "F8_E4M3"), ("global", "multiply")))
    block = torch.tensor([0, 1, 0x7E], dtype=torch.uint8)
    assert fault(form, (1, 48), {"scale": raw(block), "global": raw(torch.ones(1))}) == ""
    wanted = "its scale of the whole weight is 0 at its element 0, wanted finite numbers but 0"
    assert fault(form, (1, 48), {"scale": raw(block), "global": raw(torch.zeros(1))}) == wanted
    block[1] = 0x7F
    wanted = "its scale is nan at its element 1, wanted finite numbers"
    assert fault(form, (1, 48), {"scale": raw(block), "global": raw(torch.ones(1))}) == wanted


def test_a_fault_is_found_in_a_long_scale() -> None:
    values = torch.ones(5_000_000)
    values[4_999_999] = math.nan
    assert "at its element 4999999," in fault(BLOCK, (640_000_000, 128), {"scale": raw(values)})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_shape_beside_a_weight_is_that_of_its_other_tensors(dtype: torch.dtype) -> None:
    parts = {"scale": scales(torch.bfloat16), "shape": raw(torch.tensor([4, 96], dtype=dtype))}
    assert fault(GROUPS, (4, 96), parts) == ""
    parts["shape"] = raw(torch.tensor([4, 95], dtype=dtype))
    assert fault(GROUPS, (4, 96), parts) == "its weight_shape says [4, 95], and its other tensors [4, 96]"


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        ([0, 2, 1, 0], ""),
        ([-1, -1, -1, -1], ""),
        ([0, 2, 3, 0], "its g_idx is 3 at its element 2, wanted groups from 0 to 2"),
        ([0, -1, 1, 0], "its g_idx is -1 at its element 1, wanted groups from 0 to 2"),
    ],
)
def test_groups_are_those_that_have_a_scale(groups: list[int], wanted: str) -> None:
    order = torch.tensor(groups, dtype=torch.int32).repeat(24)
    assert fault(GROUPS, (4, 96), {"scale": scales(torch.bfloat16), "g_idx": raw(order)}) == wanted


def test_zero_points_of_a_symmetric_quantizer_are_the_middle_or_one_less() -> None:
    parts = {"scale": raw(torch.ones(3, 8, dtype=torch.float16))}
    for stored in (0x77777777, -0x77777778):  # 7 and 8 in every nibble
        parts["zero_point"] = raw(torch.full((3, 1), stored, dtype=torch.int32))
        assert fault(MIDDLE, (8, 96), parts) == ""
    parts["zero_point"] = raw(torch.full((3, 1), 0x77377777, dtype=torch.int32))
    parts["g_idx"] = raw(torch.arange(96, dtype=torch.int32) // 32)
    wanted = "its qzeros hold 3 for row 5, wanted 8 or one less: the settings say that it is symmetric (sym)"
    assert fault(MIDDLE, (8, 96), parts) == wanted
