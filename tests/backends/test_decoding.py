"""The C++ loops give the numbers of quantized weights that their definition in torch gives, on each instruction set."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from coded_weights import CASES, SCALES, form, of_run, raw, stored
from oracle import assert_same, sample
from selection import COMPILED, use

import ires_kernels as ik
from ires_kernels.backends import coded, decoding, native, reference
from ires_kernels.backends.call import Call, Coded
from ires_kernels.formats import Format

pytestmark = pytest.mark.skipif(not native.isas(), reason="the extension was not built")

COUNTS = ("elements", "updates", "lost", "nan_in", "inf_in", "nan_out", "overflow")
NATIVE = [each for each in COMPILED if each.startswith("native")]


def check(format: Format, full: tuple[int, ...], parts: Mapping[str, memoryview], first: int, count: int) -> None:
    parts = of_run(format, full, parts, first, count)
    wanted, got = torch.empty(count), torch.full((count,), 7.0)
    decoding.define(format, full, first, count, parts, wanted)
    assert coded.layout(format, full) is not None
    decoding.decode(format, full, first, count, parts, got)
    assert_same(got, wanted, f"{format} of {full} from {first} on")


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
        coded = {1: Coded(format, full, first, of_run(format, full, parts, first, count))}
        coded[2] = Coded(other, whole, 5, of_run(other, whole, others, 5, count))
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
