"""Codes that a merge makes: the very ones that were there for numbers that did not change, the nearest for others."""

from __future__ import annotations

import math

import pytest
import torch
from selection import use
from torch import Tensor

import ires_kernels as ik
from ires_kernels.backends import decoding, encoding, weight
from ires_kernels.backends.call import Call, Coded
from ires_kernels.formats import Format

pytestmark = pytest.mark.usefixtures("backend")

COUNTS = ("elements", "updates", "lost", "nan_in", "inf_in", "nan_out", "overflow", "dot", "norm2", "noise")
F8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def form(name: str, rows: int, columns: int, scale: str) -> Format:
    return Format(name, (("rows", rows), ("columns", columns), ("scale", scale)))


def raw(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).reshape(-1).numpy())


def decoded(format: Format, full: tuple[int, ...], codes: Tensor, scale: memoryview) -> Tensor:
    out = torch.empty(math.prod(full))
    decoding.decode(format, full, 0, len(out), {"codes": raw(codes), "scale": scale}, out)
    return out


def encoded(format: Format, full: tuple[int, ...], values: Tensor, scale: memoryview, **options: object) -> Tensor:
    out = torch.empty(len(values), dtype=torch.uint8)
    for first in range(0, len(values), 1000):
        piece = slice(first, first + 1000)
        encoding.encode(format, full, first, values[piece], scale, out[piece], **options)  # type: ignore[arg-type]
    return out


SHAPES = {
    "fp8-block": ((3, 130, 200), 64, 128),
    "fp8-channel": ((40, 100), 1, 100),
    "fp8-tensor": ((40, 100), 40, 100),
    "mxfp8": ((40, 96), 1, 32),
    "int8-channel": ((40, 100), 1, 100),
    "int8-tensor": ((2, 40, 100), 80, 100),
}


@pytest.mark.parametrize("scale", ["F32", "BF16", "F16", "F8_E8M0"])
@pytest.mark.parametrize("name", SHAPES)
def test_unchanged_numbers_get_their_codes_back(name: str, scale: str) -> None:
    full, rows, columns = SHAPES[name]
    format = form(name, rows, columns, scale)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (math.prod(full),), generator=generator).to(torch.uint8)
    if name.startswith("int8"):
        codes = torch.where(codes == 128, 0, codes)
    else:
        codes = torch.where(codes & 127 == 127, 0, codes)
    count = encoding.block_count(format, full)
    if scale == "F8_E8M0":
        scales = raw(torch.randint(100, 130, (count,), generator=generator).to(torch.uint8))
    else:
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[scale]
        scales = raw((torch.rand(count, generator=generator) + 0.01).to(dtype))
    values = decoded(format, full, codes, scales)
    largest = torch.zeros(count)
    for first in range(0, len(values), 999):
        encoding.measure(format, full, first, values[first : first + 999], largest)
    kept, renewed = encoding.new_scales(format, largest, scales)
    assert renewed is None
    assert bytes(kept) == bytes(scales)
    assert torch.equal(encoded(format, full, values, scales), codes)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, "F32"), (torch.bfloat16, "BF16")])
def test_only_a_block_that_has_grown_out_of_its_scale_gets_a_new_one(dtype: torch.dtype, scale: str) -> None:
    format, full = form("fp8-block", 4, 8, scale), (8, 16)
    values = torch.ones(full)
    values[0, 0] = 464 * 0.5
    values[0, 8] = 465 * 0.5
    values[4, 0] = -1000
    scales = raw(torch.tensor([0.5, 0.5, 0.75, 0.75], dtype=dtype))
    largest = torch.zeros(4)
    encoding.measure(format, full, 0, values.reshape(-1), largest)
    assert largest.tolist() == [232, 232.5, 1000, 1]
    new, renewed = encoding.new_scales(format, largest, scales)
    assert renewed is not None
    assert renewed.tolist() == [False, True, True, False]
    found = torch.frombuffer(bytearray(new), dtype=dtype)
    wanted = torch.tensor([0.5, 232.5 / 448, 1000 / 448, 0.75]).to(dtype)
    assert torch.equal(found, wanted)
    codes = encoded(format, full, values.reshape(-1), new)
    back = decoded(format, full, codes, new).reshape(full)
    assert back[0, 0] == 224
    assert back[4, 0] == -448 * found[2].float()
    assert torch.equal(codes.view(F8).float().reshape(full)[1, 8:], (torch.ones(8) / found[1].float()).to(F8).float())


@pytest.mark.parametrize("scale", ["F32", "F8_E8M0"])
def test_scales_that_are_powers_of_two_stay_such_numbers(scale: str) -> None:
    format, full = form("mxfp8", 1, 32, scale), (2, 64)
    codes = torch.tensor([127, 120, 126, 127], dtype=torch.uint8)
    scales = raw(codes if scale == "F8_E8M0" else torch.tensor([1.0, 2.0**-7, 0.5, 1.0]))
    values = torch.zeros(4, 32)
    values[0, 0], values[1, 1], values[2, 2] = 448 * 4, 449 * 2.0**-6, 224
    largest = torch.zeros(4)
    encoding.measure(format, full, 0, values.reshape(-1), largest)
    new, renewed = encoding.new_scales(format, largest, scales)
    assert renewed is not None
    assert renewed.tolist() == [True, True, False, False]
    stored = torch.frombuffer(bytearray(new), dtype=torch.uint8 if scale == "F8_E8M0" else torch.float32)
    assert stored.tolist() == ([129, 122, 126, 127] if scale == "F8_E8M0" else [4, 2.0**-5, 0.5, 1])


@pytest.mark.parametrize(("before", "wanted"), [([0.01, 0.01], 65504.0), ([0.5, 0.25], 32768.0)])
def test_scales_of_float16_stay_finite(before: list[float], wanted: float) -> None:
    format, stored = form("fp8-channel", 1, 64, "F16"), torch.tensor(before, dtype=torch.float16)
    new, renewed = encoding.new_scales(format, torch.tensor([6e7, 1.0]), raw(stored))
    assert renewed is not None
    assert renewed.tolist() == [True, False]
    assert weight.floats(torch.frombuffer(new, dtype=torch.uint8), "F16").tolist() == [wanted, float(stored[1])]
    codes = torch.empty(128, dtype=torch.uint8)
    encoding.encode(format, (2, 64), 0, torch.full((128,), 6e7), new, codes)
    assert codes.view(torch.float8_e4m3fn).float().tolist() == [448.0] * 128


def test_integers_are_rounded_to_even_and_end_at_127() -> None:
    format, full = form("int8-channel", 1, 6, "F32"), (1, 6)
    values = torch.tensor([0.5, 1.5, -2.5, 1000.0, -1000.0, math.nan])
    codes = encoded(format, full, values, raw(torch.tensor([1.0])))
    assert codes.view(torch.int8).tolist() == [0, 2, -2, 127, -128, 0]


@pytest.mark.parametrize("name", ["fp8-block", "int8-channel"])
def test_random_rounding_is_right_on_the_average_and_keeps_codes(name: str) -> None:
    full = (64, 256)
    format = form(name, 1, 256, "F32")
    scales = raw(torch.full((64,), 0.5))
    values = torch.full((64 * 256,), 8.1 * 0.5)  # between 8 and 9, of either kind of codes
    codes = encoded(format, full, values, scales, random=(3, 5))
    assert torch.equal(codes, encoded(format, full, values, scales, random=(3, 5)))
    found = decoded(format, full, codes, scales) / 0.5
    assert set(found.tolist()) == {8, 9}
    assert found.mean().item() == pytest.approx(8.1, abs=0.02)
    exact = torch.full((64 * 256,), 4.0)
    assert set(encoded(format, full, exact, scales, random=(3, 5)).tolist()) == {0x50 if name == "fp8-block" else 8}


def test_what_is_no_number_and_what_is_too_large_changes_no_scale() -> None:
    format, full = form("fp8-tensor", 1, 4, "F32"), (1, 4)
    values = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    largest = torch.zeros(1)
    encoding.measure(format, full, 0, values, largest)
    assert largest.item() == 1
    codes = encoded(format, full, values, raw(torch.tensor([1.0])))
    assert codes.tolist() == [0x7E, 0xFE, 0x7F, 0x38]


@pytest.mark.parametrize("name", SHAPES)
def test_backends_make_the_same_codes_and_measure_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ordinary values, of any bits, and of what lies at the ends; runs begin and end anywhere."""
    full, rows, columns = SHAPES[name]
    format, count = form(name, rows, columns, "F32"), math.prod(full)
    generator = torch.Generator().manual_seed(1)
    ordinary = torch.randn(count, generator=generator) * 200
    any_bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)
    values = torch.where(torch.rand(count, generator=generator) < 0.9, ordinary, any_bits)
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 448, 464, 465, -128, 127.5, 126.5, -0.5, 2.0**-10])
    values[: 4 * len(ends)] = ends.repeat(4)
    blocks = encoding.block_count(format, full)
    scales = torch.rand(blocks, generator=generator) + 0.5
    scales[:3] = torch.tensor([1.0, 2.0**-127, 0.0])[: min(3, blocks)]

    def made() -> list[Tensor]:
        largest, results = torch.zeros(blocks), []
        for first, size in ((0, count), (1, count - 1), (77, 13), (count // 2 + 1, 1031)):
            piece = values[first : first + size]
            encoding.measure(format, full, first, piece, largest)
            for random in (None, (7, 2**63)):
                out = torch.empty(len(piece), dtype=torch.uint8)
                encoding.encode(format, full, first, piece, raw(scales), out, random)
                nan = out & 127 == 127 if not name.startswith("int8") else torch.zeros_like(out, dtype=torch.bool)
                results.append(torch.where(nan, 127, out))
        return [largest, *results]

    got = made()
    monkeypatch.setenv("IRES_BACKEND", "reference")
    for each, wanted in zip(got, made(), strict=True):
        assert torch.equal(each, wanted)


def test_scales_and_blocks_that_are_not_there_are_not_read(backend: str) -> None:
    if not backend.startswith("native"):
        return
    format, full = form("fp8-block", 4, 8, "F32"), (8, 16)
    values, out = torch.ones(128), torch.empty(128, dtype=torch.uint8)
    with pytest.raises(ValueError, match="scale has 12 bytes, wanted 16"):
        encoding.encode(format, full, 0, values, raw(torch.ones(3)), out)
    with pytest.raises(ValueError, match="one number for each block"):
        encoding.measure(format, full, 0, values, torch.zeros(3))


@pytest.mark.parametrize("random", [None, (7, 2**63)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", SHAPES)
def test_merges_store_codes_in_one_go(
    monkeypatch: pytest.MonkeyPatch, backend: str, name: str, random: tuple[int, int] | None
) -> None:
    """The loops give the codes, the largest of blocks and the counts of plain torch, one step after the other."""
    full, rows, columns = SHAPES[name]
    format, first, count = form(name, rows, columns, "F32"), 77, 3333
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (3, count), generator=generator).to(torch.uint8)
    codes[1, ::3] = codes[2, ::3]  # of many elements the update is 0
    blocks = encoding.block_count(format, full)
    scale, other = (torch.rand(2, blocks, generator=generator) + 0.5) * 1e-2
    plain = torch.randn(count, generator=generator).bfloat16()
    plain[::7] = 0
    plain[-60:] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0]).repeat(10)
    coded = [Coded(format, full, first, {"codes": raw(each), "scale": raw(scale)}) for each in codes]
    calls = {
        "add_difference": ((codes, codes, codes), {0: coded[0], 1: coded[1], 2: coded[2]}),
        "add": ((codes, plain), {0: coded[0]}),
    }
    for op, (operands, decoded_ones) in calls.items():
        for now, renewed in ((scale, False), (other, True)):
            found = []
            for one in (backend, "reference"):
                use(one, monkeypatch)
                row = tuple(torch.empty(count) if x is codes else x for x in operands)
                call = Call(op, [torch.empty(count)], [row], (0.7,), False, 0, [5], first, ik.Tally())
                largest, out = torch.zeros(blocks), torch.empty(count, dtype=torch.uint8)
                to = Coded(format, full, first, {"codes": raw(codes[0]), "scale": raw(now)})
                encoding.measure_results(call._replace(tally=None), decoded_ones, format, full, largest)
                encoding.store(call, decoded_ones, to, renewed, random, out)
                silent = torch.empty_like(out)
                encoding.store(call._replace(tally=None), decoded_ones, to, renewed, random, silent)
                assert torch.equal(out, silent)
                nan = out & 127 == 127 if not name.startswith("int8") else torch.zeros_like(out, dtype=torch.bool)
                found.append((largest, torch.where(nan, 127, out), call.tally))
            assert torch.equal(found[0][0], found[1][0])
            assert torch.equal(found[0][1], found[1][1])
            got, wanted = ([getattr(tally, each) for each in COUNTS] for _, _, tally in found)
            assert got[:7] == wanted[:7]
            assert got[7:] == pytest.approx(wanted[7:], rel=1e-9)
            if not renewed:
                same = (codes[1] == codes[2]) & (codes[1] & 127 != 127) if op == "add_difference" else plain == 0
                assert torch.equal(out[same], codes[0][same])
