"""The C++ loops give the numbers of quantized weights that their definition in torch gives, on each instruction set."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from coded_weights import CASES, SCALES, any_bytes, form, of_run, raw, stored
from oracle import assert_same, sample
from selection import COMPILED, use

import ires_kernels as ik
from ires_kernels.backends import coded, decoding, definition, native, reference
from ires_kernels.backends.call import Call, Coded
from ires_kernels.formats import Format

pytestmark = pytest.mark.skipif(not native.isas(), reason="the extension was not built")

COUNTS = ("elements", "updates", "lost", "nan_in", "inf_in", "nan_out", "overflow")
NATIVE = [each for each in COMPILED if each.startswith("native")]


def check(format: Format, full: tuple[int, ...], parts: Mapping[str, memoryview], first: int, count: int) -> None:
    parts = of_run(format, full, parts, first, count)
    wanted, got = torch.empty(count), torch.full((count,), 7.0)
    definition.define(format, full, first, count, parts, wanted)
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
            definition.define(each.format, each.full, each.first, count, each.parts, out)
        t, tallies, outs = sample(torch.bfloat16, count, i), [ik.Tally(), ik.Tally()], []
        for operands, tally in zip((numbers, [torch.empty(count) for _ in range(2)]), tallies, strict=True):
            outs.append(torch.empty_like(t))
            call = Call("add_difference", [outs[-1]], [(t, *operands)], (0.3,), stochastic, 7, [9], 2, tally)
            reference.run(call) if operands is numbers else decoding.run(call, coded)
        assert_same(outs[1], outs[0], f"{format}, {other}")
        assert [getattr(tallies[1], name) for name in COUNTS] == [getattr(tallies[0], name) for name in COUNTS]


SHAPES = {
    "fp8-block": (form("fp8-block", 128, 128, "F32"), (70, 384)),
    "fp8-block 32": (form("fp8-block", 32, 32, "BF16"), (70, 384)),
    "fp8-block 128, ragged": (form("fp8-block", 128, 128, "F32"), (70, 363)),
    "fp8-channel": (form("fp8-channel", 1, 5000, "F32"), (7, 5000)),
    "fp8-tensor": (form("fp8-tensor", 2 * 35, 384, "F32"), (2, 35, 384)),
    "mxfp8": (form("mxfp8", 1, 32, "F8_E8M0"), (70, 384)),
}
CODES, B, F = None, torch.bfloat16, torch.float32  # what an operand is


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scales", ["ordinary", "any"])
def test_e4m3_goes_from_codes_to_results(backend: str, name: str, scales: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In registers where the cells of operands meet whole vectors and scales are not huge: the same bits and counts."""
    use(backend, monkeypatch)
    format, full = SHAPES[name]
    generator = torch.Generator().manual_seed(1)
    each = []
    for i in range(3):
        parts = dict(stored(format, full))
        parts["codes"] = raw(torch.randint(0, 256, (math.prod(full),), generator=generator).to(torch.uint8))
        if i == 2:  # sums without NaN, and many updates that are 0
            parts["codes"] = raw(np.where(np.arange(math.prod(full)) % 7 == 0, 0, np.asarray(each[1]["codes"])))
        if scales == "ordinary":
            few = torch.rand(len(parts["scale"]) // SCALES[format.word("scale")], generator=generator) + 0.5
            kinds = {"F32": few, "BF16": few.bfloat16(), "F8_E8M0": torch.randint(120, 130, few.shape).to(torch.uint8)}
            parts["scale"] = raw(kinds[format.word("scale")])
        each.append(parts)
    ops = (
        ("add_difference", B, (B, CODES, CODES), (0.3,)),
        ("add_difference", B, (B, CODES, B), (0.3,)),
        ("add_difference", F, (F, CODES, CODES), (0.3,)),
        ("add_difference", F, (CODES, CODES, CODES), (1.0,)),
        ("subtract", F, (CODES, CODES), ()),
    )
    for (op, out, kinds, factors), (first, count) in zip(
        [each for each in ops for _ in range(3)], [(0, 5000), (64, 4992), (11, 5001)] * len(ops), strict=True
    ):
        stochastic = out == B and first == 0
        coded, numbers = {}, []
        for place, kind in enumerate(kinds):
            if kind is None:
                run = of_run(format, full, each[place], first, count)
                coded[place] = Coded(format, full, first, run)
                numbers.append(torch.empty(count))
                definition.define(format, full, first, count, run, numbers[-1])
            else:
                numbers.append(sample(kind, count, place + first))
        for random in {False, stochastic}:
            found = []
            for decoded in (False, True):
                inputs = tuple(
                    torch.empty(count) if decoded and place in coded else x for place, x in enumerate(numbers)
                )
                result, tally = torch.empty(count, dtype=out), ik.Tally()
                call = Call(op, [result], [inputs], factors, random, 7, [9], 4 * first, tally)
                decoding.run(call, coded) if decoded else reference.run(call)
                silent = torch.empty(count, dtype=out)
                if decoded:
                    decoding.run(call._replace(outs=[silent], tally=None), coded)
                    assert_same(silent, result)
                found.append((result, tally))
            assert_same(found[1][0], found[0][0], f"{op} of {kinds} from {first} on")
            got, wanted = ([getattr(tally, each) for each in COUNTS] for _, tally in found)
            assert got == wanted
            sums = [(tally.dot, tally.norm2) for _, tally in found]
            assert sums[1] == pytest.approx(sums[0], rel=1e-5)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", ["nested", "4bit", "int8"])
def test_bitsandbytes_by_the_loops_of_other_formats(backend: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From anywhere on, with subnormal scales as well; nothing of it is left to torch."""
    use(backend, monkeypatch)
    full, count, random = (37, 129), 37 * 129, np.random.default_rng(1)

    def floats(size: int) -> memoryview:
        return raw(np.where(np.arange(size) % 3, random.normal(size=size), 1e-40).astype(np.float32))

    if kind == "int8":
        format = form("bnb-int8", 1, 129, "F32")
        parts = {"codes": any_bytes(count), "scale": floats(37)}
    else:
        format = Format("bnb-4bit", (("columns", 64), ("nested", 4), ("offset", (0.03).hex())))
        blocks = -(-count // 64)
        parts = {"codes": any_bytes(-(-count // 2)), "quant_map": floats(16), "absmax": floats(blocks)}
        if kind == "nested":
            more = {"nested_absmax": floats(-(-blocks // 4)), "nested_quant_map": floats(256)}
            parts = {**parts, "absmax": any_bytes(blocks), **more}
    define = definition.define
    monkeypatch.setattr(decoding, "define", None)
    for first, size in ((0, count), (1, 500), (63, 2), (64, 64), (65, 777), (1001, count - 1001), (count - 1, 1)):
        run = of_run(format, full, parts, first, size)
        wanted, got = torch.empty(2, size)
        define(format, full, first, size, run, wanted)
        decoding.decode(format, full, first, size, run, got)
        assert_same(got, wanted, f"{kind} from {first} on")


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("groups", [5, 1])
@pytest.mark.parametrize(
    ("name", "bits", "zeros"),
    [*(("gptq", bits, zeros) for bits in (4, 8) for zeros in ("v1", "v2", "middle")), ("awq", 4, "")],
)
def test_gptq_and_awq_by_the_loops_of_other_formats(
    backend: str, groups: int, name: str, bits: int, zeros: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From anywhere on, with groups in order and in none, and one for all; nothing of it is left to torch."""
    use(backend, monkeypatch)
    height, width, size = 24, 160, 160 // groups
    format = form(name, 1, size, "F16", bits=bits, zeros=zeros)
    count, full, random = height * width, (height, width), np.random.default_rng(1)
    parts = {
        "codes": any_bytes(count * bits // 8),
        "scale": raw(random.normal(size=groups * height).astype(np.float16)),
        "zero_point": any_bytes(groups * height * bits // 8),
    }
    define = definition.define
    monkeypatch.setattr(decoding, "define", None)
    orders = (None, np.arange(width) // size, random.integers(0, groups, width))
    for order in orders if name == "gptq" else orders[:1]:
        own = parts if order is None else {**parts, "g_idx": raw(order.astype(np.int32))}
        for first, some in ((0, count), (1, 500), (159, 2), (160, 160), (333, 777), (count - 1, 1)):
            wanted, got = torch.empty(2, some)
            define(format, full, first, some, own, wanted)
            decoding.decode(format, full, first, some, own, got)
            assert_same(got, wanted, f"{bits} bits, {zeros}, from {first} on")


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
