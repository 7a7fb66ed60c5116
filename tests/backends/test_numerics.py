"""docs/numerics.md, held by every backend: conversions, one rounding per step, one store, and the identities."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import NARROW, STORAGE, assert_same, expected, sample, short

import ires_kernels as ik

pytestmark = pytest.mark.usefixtures("backend")

PAIRS = list(itertools.product(STORAGE, STORAGE))
TRIPLES = list(itertools.product(STORAGE, STORAGE, STORAGE))
SOME_TRIPLES = random.Random(0).sample(TRIPLES, 36)


def mix(dtypes: tuple[torch.dtype, ...]) -> str:
    return "-".join(map(short, dtypes))


# Conversions


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("dtype", NARROW, ids=short)
def test_every_pattern_of_a_narrow_type_widens_exactly(dtype: torch.dtype, wide: torch.dtype) -> None:
    every = oracle.from_codes(np.arange(256**dtype.itemsize), dtype)
    got = ik.scale(every, 1.0, dtype=wide)
    assert_same(got, torch.from_numpy(oracle.values(dtype)).to(wide))
    assert_same(got, every.to(wide), "torch")


@pytest.mark.parametrize("dtype", NARROW, ids=short)
def test_every_finite_pattern_survives_a_round_trip(dtype: torch.dtype) -> None:
    every = oracle.from_codes(np.arange(256**dtype.itemsize), dtype)
    for rounding in ("nearest", "stochastic"):
        for wide in (torch.float32, torch.float64):
            assert_same(
                ik.scale(ik.scale(every, 1.0, dtype=wide), 1.0, dtype=dtype, rounding=rounding), every, rounding
            )


@pytest.mark.parametrize("dtype", NARROW, ids=short)
def test_float32_narrows_as_torch_does(dtype: torch.dtype) -> None:
    """Every exponent with the significands at which something can happen, and random patterns."""
    edges = {0, 1, 2**23 - 1, 0x2AAAAA, 0x555555}
    for bit in range(23):
        edges |= {1 << bit, (1 << bit) - 1, (1 << bit) + 1, 2**23 - (1 << bit), 3 << max(bit - 1, 0)}
    significands = np.array(sorted(x % 2**23 for x in edges))
    patterns = (np.arange(512)[:, None] * 2**23 + significands).reshape(-1)
    patterns = np.concatenate([patterns, np.random.default_rng(1).integers(0, 2**32, 100_000)])
    x = oracle.from_codes(patterns, torch.float32)
    # torch releases disagree on what float8_e4m3fn does beyond its largest value; the contract saturates
    wanted = (x.clamp(-448, 448) if dtype == torch.float8_e4m3fn else x).to(dtype)
    assert_same(ik.scale(x, 1.0, dtype=dtype), wanted)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("dtype", NARROW, ids=short)
def test_ties_go_to_even_and_all_else_to_the_nearer(dtype: torch.dtype, wide: torch.dtype) -> None:
    """The middle between every two values, and the numbers on either side of it. In float64 those would be rounded to
    the middle first, and then the wrong way, by a detour through float32.
    """
    real = np.float32 if wide == torch.float32 else np.float64
    table = oracle.magnitudes(dtype)
    beyond = 2 * table[-1] - table[-2]
    middle = ((table + np.append(table[1:], beyond)) / 2).astype(real)
    pattern = np.arange(len(table))
    up = pattern + 1
    if dtype == torch.float8_e4m3fn:
        up[-1] = pattern[-1]
    sign = 1 << (8 * dtype.itemsize - 1)
    for point, rounded in (
        (np.nextafter(middle, real(0)), pattern),
        (middle, np.where(pattern % 2 == 0, pattern, up)),
        (np.nextafter(middle, real(np.inf)), up),
    ):
        assert_same(ik.scale(torch.from_numpy(point), 1.0, dtype=dtype), oracle.from_codes(rounded, dtype))
        assert_same(ik.scale(torch.from_numpy(point), -1.0, dtype=dtype), oracle.from_codes(rounded + sign, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=short)
def test_float64_is_rounded_once(dtype: torch.dtype) -> None:
    x = sample(torch.float64, 20_000, seed=3)
    assert_same(ik.scale(x, 1.0, dtype=dtype), oracle.store(x.numpy(), dtype, None))


@given(st.floats(width=64), st.sampled_from([torch.float32, *NARROW]))
def test_the_nearest_value_is_nearest_in_exact_arithmetic(x: float, dtype: torch.dtype) -> None:
    """No stored value is closer than the one chosen, in rational numbers and without any table."""
    got = float(ik.scale(torch.tensor(x, dtype=torch.float64), 1.0, dtype=dtype).double())
    if math.isnan(x):
        assert math.isnan(got)
        return
    largest = float(torch.finfo(dtype).max)
    if math.isinf(got):
        assert dtype != torch.float8_e4m3fn
        assert abs(Fraction(x) if math.isfinite(x) else Fraction(10) ** 400) >= Fraction(largest) * (
            1 + Fraction(torch.finfo(dtype).eps) / 2 / (2 - Fraction(torch.finfo(dtype).eps))
        )
        return
    assert math.copysign(1, got) == math.copysign(1, x)
    if abs(got) == largest:
        return
    bits = int(oracle.codes(torch.tensor(got, dtype=torch.float64).to(dtype))[0])
    for neighbour in (bits - 1, bits + 1):
        if neighbour & (2 ** (8 * dtype.itemsize - 1) - 1) != 2 ** (8 * dtype.itemsize - 1) - 1 and neighbour >= 0:
            other = float(oracle.from_codes(np.array([neighbour]), dtype).double())
            if math.isfinite(other):
                near, far = abs(Fraction(x) - Fraction(got)), abs(Fraction(x) - Fraction(other))
                assert near < far or (near == far and bits % 2 == 0)


# Operations


@pytest.mark.parametrize("pair", PAIRS, ids=mix)
def test_one_rounding_per_step(pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Values against the independent implementation, for every pair of types, special values among them."""
    t, r = sample(pair[0], 6000, seed=1), sample(pair[1], 6000, seed=2)
    for out in STORAGE:
        assert_same(ik.subtract(t, r, dtype=out), expected("subtract", [t, r], (), out), f"subtract to {out}")
    assert_same(ik.add(t, r, 0.7), expected("add", [t, r], (0.7,), t.dtype), "add")
    assert_same(ik.scale(t, -1 / 3, dtype=r.dtype), expected("scale", [t], (-1 / 3,), r.dtype), "scale")
    wanted = expected("add_difference", [t, r, t], (1.3,), t.dtype)
    assert_same(ik.add_difference(t, r, t, 1.3), wanted, "add_difference")


@pytest.mark.parametrize("triple", SOME_TRIPLES, ids=mix)
def test_three_operands_of_three_types(triple: tuple[torch.dtype, ...]) -> None:
    three_operands(triple, 3000, STORAGE[:4])


@pytest.mark.slow
@pytest.mark.parametrize("triple", TRIPLES, ids=mix)
def test_three_operands_of_all_types(triple: tuple[torch.dtype, ...]) -> None:
    three_operands(triple, 5000, STORAGE)


def three_operands(triple: tuple[torch.dtype, ...], count: int, outs: list[torch.dtype]) -> None:
    t, x, y = (sample(dtype, count, seed) for seed, dtype in enumerate(triple))
    for out in (t.dtype, *outs):
        wanted = expected("add_difference", [t, x, y], (0.3,), out)
        assert_same(ik.add_difference(t, x, y, 0.3, dtype=out), wanted, f"add_difference to {out}")
        wanted = expected("add", [t, x, y], (0.5, -2.0), out)
        assert_same(ik.add(t, [x, y], [0.5, -2.0], dtype=out), wanted, f"add to {out}")


@pytest.mark.parametrize("dtype", STORAGE, ids=short)
def test_special_values_meet_each_other(dtype: torch.dtype) -> None:
    """Every special value with every other: 0 - 0, inf - inf, overflow, gradual underflow."""
    points = oracle.specials(dtype)
    a, b = points.repeat(len(points))[:200_000], points.repeat_interleave(len(points))[:200_000]
    assert_same(ik.subtract(a, b, dtype=dtype), expected("subtract", [a, b], (), dtype), "subtract")
    assert_same(ik.add(a, b, 0.5), expected("add", [a, b], (0.5,), dtype), "add")
    assert_same(
        ik.add_difference(a, b, a, -1.0), expected("add_difference", [a, b, a], (-1.0,), dtype), "add_difference"
    )


def test_products_and_sums_are_not_fused() -> None:
    """1 + eps squared is 1 + 2 eps + eps^2: a fused multiply-add would keep the last term."""
    eps = 2.0**-12
    t = torch.tensor([-(1 + 2 * eps)])
    r = torch.tensor([1 + eps])
    assert ik.add(t, r, 1 + eps).item() == 0.0
    assert ik.add_difference(t, r, torch.zeros(1), 1 + eps).item() == 0.0
    eps = 2.0**-27
    t, r = torch.tensor([-(1 + 2 * eps)], dtype=torch.float64), torch.tensor([1 + eps], dtype=torch.float64)
    assert ik.add(t, r, 1 + eps).item() == 0.0


def test_residuals_are_added_in_order() -> None:
    """(1 + 2^-24) + 2^-24 is 1 in float32, while 2^-24 + 2^-24 would have counted; the store comes once, at the end."""
    tiny = torch.tensor([2.0**-24])
    assert ik.add(torch.ones(1), [tiny, tiny]).item() == 1.0
    assert ik.add(torch.ones(1), [torch.ones(1), tiny, -torch.ones(1)]).item() == 1.0
    # in bfloat16 the sum of two halves of a step is a whole one, if nothing is stored in between
    half = torch.tensor([2.0**-8], dtype=torch.bfloat16)
    assert ik.add(torch.ones(1, dtype=torch.bfloat16), [half, half]).item() == 1 + 2.0**-7


def test_many_residuals() -> None:
    t = sample(torch.bfloat16, 2000, seed=0)
    residuals = [sample(STORAGE[i % 6 if i % 6 else 1], 2000, seed=i) for i in range(1, 12)]
    alphas = [1 / (i + 1) * (-1) ** i for i in range(len(residuals))]
    wanted = expected("add", [t, *residuals], tuple(alphas), t.dtype)
    assert_same(ik.add(t, residuals, alphas), wanted)
    assert_same(ik.add_(t.clone(), residuals, alphas), wanted)


def test_factors_are_rounded_once_to_the_compute_type() -> None:
    alpha = 1 + 2.0**-24 + 2.0**-50  # above the middle: float32 rounds it up, by way of float32(…) only once
    t = torch.zeros(3)
    assert ik.add(t, torch.ones(3), alpha)[0].item() == 1 + 2.0**-23
    assert ik.add(t.double(), torch.ones(3), alpha)[0].item() == alpha
    assert ik.add(t, torch.ones(3), alpha, dtype=torch.float64)[0].item() == alpha
    assert ik.scale(torch.ones(3), 1 + 2.0**-24)[0].item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_factor_may_be_negative_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([2.0, -2.0, 0.0, -0.0], dtype=dtype).repeat(25)
    assert_same(ik.scale(x, -0.0), x * -0.0)
    assert_same(ik.add(torch.full_like(x, -0.0), x, -0.0), torch.full_like(x, -0.0) + x * -0.0)


@pytest.mark.parametrize("dtype", STORAGE, ids=short)
def test_overflow(dtype: torch.dtype) -> None:
    """To nearest beyond the middle of the step after the largest value is infinite; by chance never."""
    end = torch.finfo(dtype).max
    largest = torch.tensor([end, -end], dtype=dtype)
    past = 1 + 2.0**-8 if dtype == torch.bfloat16 else 2.0  # twice as much would overflow the arithmetic of bfloat16
    got = ik.scale(largest, past).double().tolist()
    assert got == ([448, -448] if dtype == torch.float8_e4m3fn else [math.inf, -math.inf])
    got = ik.scale(largest, past, rounding="stochastic").double().tolist()
    # float32 and float64 are not narrowed: there it is the arithmetic that overflows, and not the store
    assert got == ([math.inf, -math.inf] if dtype in (torch.float32, torch.float64) else [end, -end])


def test_float8_e4m3fn_has_no_infinity() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -464.0, 464.001])
    for rounding in ("nearest", "stochastic"):
        got = ik.scale(x, 1.0, dtype=torch.float8_e4m3fn, rounding=rounding)
        assert oracle.codes(got)[[0, 1, 3, 4, 5]].tolist() == [0x7E, 0xFE, 0x7E, 0xFE, 0x7E]
        assert oracle.codes(got)[2] & 0x7F == 0x7F


# Identities


def test_a_model_is_its_base_plus_its_residual() -> None:
    """base + (instruct - base) is instruct, bit for bit, where the difference is exact in float32 and not of a -0."""
    generator = np.random.default_rng(5)
    near = generator.integers(0, 2**16, 60_000)
    for other in (generator.integers(0, 2**16, 60_000), (near + generator.integers(-300, 300, near.size)) % 2**16):
        base, instruct = oracle.from_codes(near, torch.bfloat16), oracle.from_codes(other, torch.bfloat16)
        got = ik.add_difference_(base.clone(), instruct, base, 1.0)
        with np.errstate(all="ignore"):
            b, i = oracle.widen(base).astype(np.float32), oracle.widen(instruct).astype(np.float32)
            d = i - b
            # the rounding error of the difference, itself exact (Knuth, The Art of Computer Programming 2, 4.2.2)
            back = d + b
            error = (i - back) + ((back - d) - b)
        exact = torch.from_numpy(np.isfinite(d) & np.isfinite(back) & (error == 0) & ~(np.signbit(i) & (i == 0)))
        assert exact.float().mean() > 0.05
        assert_same(got[exact], instruct[exact])


def test_negative_zero_is_the_exception_to_the_identity() -> None:
    base = torch.tensor([1.5, 0.0, -0.0], dtype=torch.bfloat16)
    instruct = torch.full((3,), -0.0, dtype=torch.bfloat16)
    got = ik.add_difference_(base.clone(), instruct, base)
    assert (got == 0).all()
    assert torch.signbit(got).tolist() == [False, False, False]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("triple", SOME_TRIPLES, ids=mix)
def test_two_steps_are_one(triple: tuple[torch.dtype, ...], rounding: str) -> None:
    """A stored residual of the compute type, applied later, gives what the single pass gives."""
    t, x, y = (sample(dtype, 3000, seed) for seed, dtype in enumerate(triple))
    wide = torch.float64 if torch.float64 in triple else torch.float32
    residual = ik.subtract(x, y, dtype=wide)
    for alpha in (1.0, 0.3, -1.7):
        one = ik.add_difference_(t.clone(), x, y, alpha, rounding=rounding, seed=9)
        two = ik.add_(t.clone(), residual, alpha, rounding=rounding, seed=9)
        assert_same(two, one, f"alpha {alpha}")


@pytest.mark.parametrize("name", [name for name in ("reference", "native") if ik.backends()[name].available])
def test_subnormals_survive_a_thread_that_flushes_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRES_BACKEND", name)
    a, b = torch.tensor([1e-40, 3e-39, 1e-38]), torch.tensor([1e-41, 0.0, 1.1e-38])
    wanted = ik.subtract(a, b).view(torch.int32).tolist()
    assert 0 not in wanted
    assert torch.set_flush_denormal(True)
    try:
        found = ik.subtract(a, b)
        assert torch.full((), 2.0**-126).mul(0.5).item() == 0  # as the caller had set it
    finally:
        torch.set_flush_denormal(False)
    assert found.view(torch.int32).tolist() == wanted
