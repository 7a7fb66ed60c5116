"""Quantized weights of every format that has kernels: any codes, any scales."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ires_kernels.formats import Format, matrices, row_bytes, span

SCALES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E8M0": 1, "F8_E4M3": 1}
WIDE = ("F32", "F16", "BF16", "F8_E8M0")


def form(name: str, rows: int, columns: int, scale: str, **others: int | str) -> Format:
    return Format(name, (("rows", rows), ("columns", columns), ("scale", scale), *others.items()))


def raw(values: np.ndarray | Tensor) -> memoryview:
    array = values.contiguous().view(torch.uint8).numpy() if isinstance(values, Tensor) else values
    return memoryview(np.ascontiguousarray(array)).cast("B")


def any_bytes(count: int) -> memoryview:
    return raw(np.random.default_rng(count).integers(0, 256, count, np.uint8))


def stored(format: Format, full: tuple[int, ...]) -> dict[str, memoryview]:
    """Any codes, any scales, and what else the format wants."""
    many, height, width = matrices(full)
    rows, columns, scale = format.number("rows", 1), format.number("columns", 1), format.word("scale")
    if format.name == "mxfp4-transposed":
        height, width = width, height
    if rows >= many * height:
        many, height = 1, many * height
    lines, across = many * -(-height // rows), -(-width // columns)
    codes = many * height * width // 2 if format.name == "mxfp4-transposed" else many * height * row_bytes(format, full)
    parts = {"codes": any_bytes(codes), "scale": any_bytes(lines * across * SCALES[scale])}
    if format.word("zero_point") == "I8":
        parts["zero_point"] = any_bytes(lines * across)
    elif format.word("zero_point") == "packed":
        parts["zero_point"] = any_bytes(-(-lines * format.bits // 32) * across * 4)
    if format.word("global"):
        parts["global"] = raw(np.linspace(0.3, 3000, format.number("globals", 1), dtype=np.float32))
    if format.number("ordered"):
        parts["g_idx"] = raw(np.random.default_rng(0).integers(0, across, width, np.int32))
    return parts


def of_run(
    format: Format, full: tuple[int, ...], parts: Mapping[str, memoryview], first: int, count: int
) -> Mapping[str, memoryview]:
    """The parts with the codes of a run alone."""
    begin, size = span(format, full, first, count)
    return {**parts, "codes": parts["codes"][begin : begin + size]}


CASES = [
    *((form("fp8-block", 128, 128, scale), (3, 130, 256)) for scale in WIDE),
    *((form("fp8-block", 32, 32, scale), (70, 250)) for scale in WIDE),
    *((form("fp8-tensor", 3 * 50, 77, scale), (3, 50, 77)) for scale in WIDE),
    *((form("fp8-channel", 1, 77, scale), (150, 77)) for scale in WIDE),
    (form("mxfp8", 1, 32, "F8_E8M0"), (2, 40, 96)),
    (form("int8-channel", 1, 77, "F32"), (150, 77)),
    (form("int8-channel", 1, 77, "BF16", zero_point="I8"), (150, 77)),
    (form("int8-tensor", 150, 77, "F32", zero_point="I8"), (150, 77)),
    *(
        (form("pack-quantized", 1, columns, scale, bits=bits, **zero), (130, 253))
        for bits, columns, scale in ((4, 32, "BF16"), (4, 253, "F32"), (8, 32, "F16"), (8, 128, "BF16"))
        for zero in ({}, {"zero_point": "packed"}, {"zero_point": "I8"}, {"zero_point": "packed", "ordered": 1})
    ),
    (form("pack-quantized", 1, 7, "F32", bits=4), (20, 45)),
    *((form("mxfp4", 1, 32, scale), (3, 50, 160)) for scale in WIDE),
    (form("mxfp4", 1, 32, "F8_E8M0", lift=2), (50, 160)),
    (form("mxfp4-transposed", 1, 32, "F8_E8M0"), (3, 128, 37)),
    (form("mxfp4-transposed", 1, 32, "F8_E8M0"), (1, 80, 100)),
    *(
        (form("nvfp4", 1, 16, "F8_E4M3", **{"global": how, "globals": many}), (3, 50, 160))
        for how in ("divide", "multiply")
        for many in (1, 3)
    ),
]
