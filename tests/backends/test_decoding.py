"""The C++ loops give the numbers of quantized weights that their definition in torch gives, on each instruction set."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from oracle import assert_same, sample
from selection import COMPILED, use
from torch import Tensor

import ires_kernels as ik
from ires_kernels.backends import coded, decoding, native, reference
from ires_kernels.backends.call import Call, Coded
from ires_kernels.formats import Format, matrices, row_bytes, span

pytestmark = pytest.mark.skipif(not native.isas(), reason="the extension was not built")

SCALES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E8M0": 1, "F8_E4M3": 1}
COUNTS = ("elements", "updates", "lost", "nan_in", "inf_in", "nan_out", "overflow")
WIDE = ("F32", "F16", "BF16", "F8_E8M0")
NATIVE = [each for each in COMPILED if each.startswith("native")]


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


def part(
    format: Format, full: tuple[int, ...], parts: Mapping[str, memoryview], first: int, count: int
) -> Mapping[str, memoryview]:
    """The parts with the codes of a run alone."""
    begin, size = span(format, full, first, count)
    return {**parts, "codes": parts["codes"][begin : begin + size]}


def check(format: Format, full: tuple[int, ...], parts: Mapping[str, memoryview], first: int, count: int) -> None:
    parts = part(format, full, parts, first, count)
    wanted, got = torch.empty(count), torch.full((count,), 7.0)
    decoding.define(format, full, first, count, parts, wanted)
    assert coded.layout(format, full) is not None
    decoding.decode(format, full, first, count, parts, got)
    assert_same(got, wanted, f"{format} of {full} from {first} on")


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


@pytest.mark.parametrize("backend", NATIVE)
def test_runs_anywhere_in_a_tensor(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(backend, monkeypatch)
    for format, full in CASES:
        parts, count = stored(format, full), math.prod(full)
        for first, size in ((0, count), (1, count - 1), (7, 1), (count // 3, count // 3), (255, 3), (count - 65, 65)):
            check(format, full, parts, first, size)


@pytest.mark.parametrize("backend", NATIVE)
def test_every_code_with_every_scale(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 bits and fewer: 2^−127, subnormal numbers, infinities and NaN are among them."""
    use(backend, monkeypatch)
    eight, four = np.arange(256, dtype=np.uint8), np.arange(0, 256, 17, dtype=np.uint8)
    for scale in ("BF16", "F8_E8M0"):
        every = np.arange(256 ** SCALES[scale], dtype=f"u{SCALES[scale]}")
        whole = {"codes": raw(np.tile(eight, len(every))), "scale": raw(every)}
        full = (len(every), 256)
        check(form("fp8-channel", 1, 256, scale), full, whole, 0, math.prod(full))
        narrow = {"codes": raw(np.tile(four, len(every))), "scale": raw(every)}
        full = (len(every), 32)
        check(form("mxfp4", 1, 32, scale), full, narrow, 0, math.prod(full))
    scales = {"codes": raw(np.tile(four[:8], 512)), "scale": raw(np.repeat(eight, 2))}
    for how in ("divide", "multiply"):
        for shared in (1e-38, 0.7, 2688.0, 3e38):
            parts = {**scales, "global": raw(np.float32([shared]))}
            check(form("nvfp4", 1, 16, "F8_E4M3", **{"global": how}), (256, 32), parts, 0, 8192)


@pytest.mark.parametrize("backend", NATIVE)
def test_scales_at_the_ends_of_float32(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(backend, monkeypatch)
    bits = [e << 23 | f for e in (0, 1, 2, 118, 127, 245, 246, 247, 248, 254, 255) for f in (0, 1, 0x2AAAAA, 0x7FFFFF)]
    scales = np.array([*bits, *(b | 1 << 31 for b in bits)], dtype=np.uint32)
    codes = raw(np.tile(np.arange(256, dtype=np.uint8), len(scales)))
    for name in ("fp8-channel", "int8-channel"):
        full = (len(scales), 256)
        check(form(name, 1, 256, "F32"), full, {"codes": codes, "scale": raw(scales)}, 0, math.prod(full))


@pytest.mark.parametrize("backend", ["reference", *NATIVE])
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_operations_decode_their_operands(backend: str, stochastic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bits, and the counts, of decoding first; of any two formats, from anywhere on."""
    use(backend, monkeypatch)
    few = [case for case in CASES if math.prod(case[1]) > 6000]
    for i, ((format, full), (other, whole)) in enumerate(zip(few, few[3:] + few[:3], strict=True)):
        parts, others, count, first = stored(format, full), stored(other, whole), 5001, 11 * i
        coded = {1: Coded(format, full, first, part(format, full, parts, first, count))}
        coded[2] = Coded(other, whole, 5, part(other, whole, others, 5, count))
        numbers = [torch.empty(count) for _ in range(2)]
        for out, each in zip(numbers, coded.values(), strict=True):
            decoding.define(each.format, each.full, each.first, count, each.parts, out)
        t, tallies, outs = sample(torch.bfloat16, count, i), [ik.Tally(), ik.Tally()], []
        for operands, tally in zip((numbers, [torch.empty(count) for _ in range(2)]), tallies, strict=True):
            outs.append(torch.empty_like(t))
            call = Call("add_difference", [outs[-1]], [(t, *operands)], (0.3,), stochastic, 7, [9], 2, tally)
            reference.run(call) if operands is numbers else decoding.run(call, coded)
        assert_same(outs[1], outs[0], f"{format}, {other}")
        assert [getattr(tallies[1], name) for name in COUNTS] == [getattr(tallies[0], name) for name in COUNTS]


def test_threads_share_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IRES_BACKEND", raising=False)
    monkeypatch.setattr(native, "thread_count", lambda: 3)
    for format, full in (
        (form("fp8-block", 128, 128, "F32"), (2000, 1000)),
        (form("mxfp4-transposed", 1, 32, "F8_E8M0"), (2, 512, 300)),
    ):
        check(format, full, stored(format, full), 100, math.prod(full) - 100)


def test_memory_that_is_not_there_is_not_read() -> None:
    """Whatever shapes say: the loops look at how many bytes each part has."""
    format, full = form("pack-quantized", 1, 32, "BF16", bits=4, zero_point="packed", ordered=1), (130, 250)
    whole = stored(format, full)
    out = torch.empty(130 * 250)
    assert native.decode(format, full, 0, len(out), whole, out)
    for part in whole:
        with pytest.raises(ValueError, match=r"bytes, wanted \d+"):
            native.decode(format, full, 0, len(out), {**whole, part: whole[part][:-4]}, out)
    order = np.frombuffer(whole["g_idx"], np.int32).copy()
    order[7] = 8
    with pytest.raises(ValueError, match="group index 8 of 8"):
        native.decode(format, full, 0, len(out), {**whole, "g_idx": raw(order)}, out)
    with pytest.raises(ValueError, match="numbers that the tensor has not"):
        native.decode(format, full, 1, len(out), whole, out)
