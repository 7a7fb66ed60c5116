"""What must be true of the companions of codes before numbers are made with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ires_kernels.backends.weight import as_bytes, fields, floats
from ires_kernels.formats import Format, matrices

_MAY_BE_ZERO = {"nvfp4", "gptq", "awq", "bnb-4bit", "bnb-int8"}
"""Formats whose quantizers write a scale of 0 for numbers that are 0, or too small for the dtype of the scale."""
_PIECE = 1 << 22


def fault(format: Format, full: tuple[int, ...], parts: Mapping[str, memoryview]) -> str:
    """What is wrong with the parts of a weight besides its codes, which are whole; "" where nothing is.

    Scales must be finite, and not 0 where no quantizer writes that: NaN and infinity are the marks of an uncalibrated
    module, and one of them makes NaN of every number of its block.
    """
    found = {
        "scale": format.word("scale"),
        **dict.fromkeys(("global", "absmax", "quant_map", "nested_absmax", "nested_quant_map"), "F32"),
    }
    if format.word("nested"):
        found.pop("absmax")  # codes as well
    for part, dtype in found.items():
        if part in parts:
            may_be_zero = part not in ("scale", "global") or (part == "scale" and format.name in _MAY_BE_ZERO)
            wrong = _not_finite(as_bytes(parts[part]), dtype, may_be_zero)
            if wrong:
                return f"its {_NAMES.get(part, part)} {wrong}"
    if "shape" in parts:
        stated = as_bytes(parts["shape"])
        shape = stated.view(torch.int64 if len(stated) == 8 * len(full) else torch.int32).tolist()
        if shape != list(full):
            return f"its weight_shape says {shape}, and its other tensors {list(full)}"
    wrong = _group_fault(format, full, as_bytes(parts["g_idx"]).view(torch.int32)) if "g_idx" in parts else ""
    if format.word("zeros") == "middle" and not wrong:
        return _zero_fault(format, full, as_bytes(parts["zero_point"]))
    return wrong


_NAMES = {"global": "scale of the whole weight"}


def _not_finite(stored: Tensor, dtype: str, may_be_zero: bool) -> str:
    width = {"F32": 4, "F16": 2, "BF16": 2}.get(dtype, 1)
    for start in range(0, len(stored), _PIECE):
        values = floats(stored[start : start + _PIECE], dtype)
        bad = ~values.isfinite() if may_be_zero else ~values.isfinite() | (values == 0)
        if bad.any():
            at = int(bad.nonzero()[0])
            what = "is 255, which is NaN," if dtype == "F8_E8M0" else f"is {values[at].item():g}"
            wanted = "finite numbers" if may_be_zero else "finite numbers but 0"
            return f"{what} at its element {start // width + at}, wanted {wanted}"
    return ""


def _group_fault(format: Format, full: tuple[int, ...], groups: Tensor) -> str:
    """Groups must be those of the grid of scales; all of them may be −1, for groups that follow each other."""
    count = -(-matrices(full)[2] // format.number("columns", 1))
    if format.name == "pack-quantized" and bool((groups == -1).all()):
        return ""
    bad = (groups < 0) | (groups >= count)
    if bad.any():
        at = int(bad.nonzero()[0])
        return f"its g_idx is {int(groups[at])} at its element {at}, wanted groups from 0 to {count - 1}"
    return ""


def _zero_fault(format: Format, full: tuple[int, ...], stored: Tensor) -> str:
    """The zero points of a symmetric quantizer are the middle, written as it is or less one."""
    bits, (_, out, _) = format.bits, matrices(full)
    zero = fields(stored.view(torch.int32).view(-1, out * bits // 32), torch.arange(out) * bits, bits)
    odd = (zero != 1 << bits - 1) & (zero != (1 << bits - 1) - 1)
    if odd.any():
        group, at = odd.nonzero()[0].tolist()
        found = f"its qzeros hold {int(zero[group, at])} for row {at}"
        return f"{found}, wanted {1 << bits - 1} or one less: the settings say that it is symmetric (sym)"
    return ""
