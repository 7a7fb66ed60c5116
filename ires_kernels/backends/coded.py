"""Formats of quantized weights in the terms of csrc/coded.h: what the C++ loops are told of one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ires_kernels.formats import Format, matrices, row_bytes, span

if TYPE_CHECKING:
    from torch import Tensor

# The numbers are those of the enumerations in csrc/coded.h.
_CODES = {"F8_E4M3": 0, "F8_E5M2": 1, "I8": 2, "U8": 3, "nibbles": 4}
_SCALES = {"F32": 0, "F16": 1, "BF16": 2, "F8_E4M3": 3, "F8_E8M0": 4}
_ZEROS = {"": 0, "I8": 1, "packed 4": 2, "packed 8": 3}
_SECOND = {"": 0, "multiply": 1, "divide": 2}

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_INT4 = tuple(float(code - 8) for code in range(16))


Part = TypeVar("Part", memoryview, "Tensor")
"""Bytes, of the host or of a device."""


class Layout(NamedTuple):
    """The arguments of `coded` in csrc/module.cpp, in its order."""

    codes: int
    high_first: bool
    transposed: bool
    table: tuple[float, ...]
    """What the 16 nibbles stand for, or ()."""
    shape: tuple[int, int, int, int]
    """Of what is stored: matrices, rows, columns, and the bytes of a row."""
    block: tuple[int, int]
    scale: int
    zero: int
    second: int


@lru_cache(maxsize=4096)
def layout(format: Format, full: tuple[int, ...]) -> Layout | None:
    """The layout of weights of this shape, or None where the loops have no such format."""
    many, height, width = matrices(full)
    if format.number("rows", 1) >= many * height:
        many, height = 1, many * height
    stride = row_bytes(format, full)
    transposed = format.name == "mxfp4-transposed"
    if transposed:
        height, width, stride = width, height, height // 2
    table: tuple[float, ...] = ()
    match format.name:
        case "fp8-tensor" | "fp8-channel" | "fp8-block" | "mxfp8":
            codes = _CODES["F8_E4M3"]
        case "int8-tensor" | "int8-channel" | "int8-block":
            codes = _CODES["I8"]
        case "pack-quantized" if format.bits == 8:
            codes = _CODES["U8"]
        case "pack-quantized" if format.bits == 4:
            codes, table = _CODES["nibbles"], _INT4
        case "mxfp4" | "mxfp4-transposed" | "nvfp4":
            lift = 2.0 ** format.number("lift")
            codes, table = _CODES["nibbles"], tuple(value * lift for value in _E2M1)
        case _:
            return None
    zero = format.word("zero_point")
    return Layout(
        codes,
        False,
        transposed,
        table,
        (many, height, width, stride),
        (format.number("rows", 1), format.number("columns", 1)),
        _SCALES[format.word("scale")],
        _ZEROS[f"packed {format.bits}" if zero == "packed" else zero],
        _SECOND[format.word("global")],
    )


def nibbles_high_first(table: tuple[float, ...], width: int, size: int) -> Layout:
    """The layout of a row of so many nibbles, of which those in the high bits come first, in blocks of `size`."""
    shape = 1, 1, width, -(-width // 2)
    return Layout(_CODES["nibbles"], True, False, table, shape, (1, size), _SCALES["F32"], 0, 0)


def groups(kind: str, shape: tuple[int, int], size: int) -> Layout:
    """The layout of a matrix of codes, nibbles, low ones first, or I8 or U8 less 128, in groups of `size` columns."""
    nibbles = kind == "nibbles"
    table = tuple(map(float, range(16))) if nibbles else ()
    whole = 1, *shape, shape[1] // 2 if nibbles else shape[1]
    return Layout(_CODES[kind], False, False, table, whole, (1, size), _SCALES["F32"], _ZEROS["I8"], 0)


def encoded(format: Format, full: tuple[int, ...]) -> Layout | None:
    """The layout of weights of this shape whose codes the loops make, or None."""
    return layout(format, full) if format.is_encoded else None


def stored(
    format: Format, full: tuple[int, ...], first: int, count: int, parts: Mapping[str, Part]
) -> tuple[Part, int, Part | None, Part | None, Part | None, Part | None]:
    """The parts in the order of `coded` in csrc/module.cpp, and where the bytes of codes begin in their tensor."""
    begin = span(format, full, first, count)[0]
    scale, zero, shared, order = (parts.get(part) for part in ("scale", "zero_point", "global", "g_idx"))
    return parts["codes"], begin, scale, zero, shared, order


def fits(layout: Layout, parts: Mapping[str, Part]) -> bool:
    """Whether the loops take a second scale like this one: one number, or one for each matrix."""
    shared = parts.get("global")
    return shared is None or shared.nbytes in (4, 4 * layout.shape[0])
