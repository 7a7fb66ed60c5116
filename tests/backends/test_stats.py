"""What a Tally counts, against the definitions spelled out element by element."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from oracle import STORAGE, expected, sample, short
from torch import Tensor

import ires_kernels as ik
from ires_kernels.backends.call import threads

backends = pytest.mark.usefixtures("backend")

# The least magnitude that rounding to nearest does not keep finite. float8_e4m3fn: what is strictly beyond saturates.
LIMITS = {
    torch.float64: math.inf,
    torch.float32: 2.0**128 - 2.0**103,
    torch.float16: 65520.0,
    torch.bfloat16: 2.0**128 - 2.0**119,
    torch.float8_e4m3fn: float(np.nextafter(464.0, np.inf)),
    torch.float8_e5m2: 61440.0,
}


@np.errstate(all="ignore")
def counted(op: str, inputs: list[Tensor], factors: tuple[float, ...], out: Tensor) -> ik.Tally:
    real = oracle.compute_type(out.dtype, inputs)
    x = [oracle.widen(t).astype(real) for t in inputs]
    f = [real(factor) for factor in factors]
    if op == "subtract":
        updates, targets = x[0] - x[1], np.zeros_like(x[0])
    elif op == "add_difference":
        updates, targets = f[0] * (x[1] - x[2]), x[0]
    else:
        updates, targets = f[0] * x[1], x[0]
        for factor, residual in zip(f[1:], x[2:], strict=True):
            updates = updates + factor * residual
    values = oracle.compute(op, inputs, factors, out.dtype)
    stored = oracle.widen(out).astype(real)
    tally = ik.Tally(elements=len(stored))
    for i, (d, t, v, s) in enumerate(
        zip(updates.tolist(), targets.tolist(), values.tolist(), stored.tolist(), strict=True)
    ):
        operands = [float(column[i]) for column in x]
        finite = all(map(math.isfinite, operands))
        nan = any(map(math.isnan, operands))
        update = d != 0 and not math.isnan(d)
        tally.updates += update
        tally.lost += update and s == t
        tally.nan_in += nan
        tally.inf_in += not nan and not finite
        tally.nan_out += math.isnan(s)
        tally.overflow += finite and abs(v) >= LIMITS[out.dtype]
        if finite and math.isfinite(d) and math.isfinite(s):
            tally.dot += (s - t) * d
            tally.norm2 += d * d
    return tally


def assert_tally(got: ik.Tally, wanted: ik.Tally, what: str) -> None:
    for name in ("elements", "updates", "lost", "nan_in", "inf_in", "nan_out", "overflow"):
        assert getattr(got, name) == getattr(wanted, name), f"{what}: {name}"
    for name in ("dot", "norm2"):
        a, b = getattr(got, name), getattr(wanted, name)
        assert a == pytest.approx(b, rel=1e-9, nan_ok=True), f"{what}: {name}"


@backends
@pytest.mark.parametrize("other", STORAGE, ids=short)
@pytest.mark.parametrize("dtype", STORAGE, ids=short)
def test_counts_of_every_operation(dtype: torch.dtype, other: torch.dtype) -> None:
    t, x, y = sample(dtype, 2500, 1), sample(other, 2500, 2), sample(dtype, 2500, 3)
    for op, inputs, factors in (
        ("subtract", [t, x], ()),
        ("add", [t, x], (0.3,)),
        ("add", [t, x, y], (0.3, -0.7)),
        ("add_difference", [t, x, y], (0.3,)),
    ):
        for out in {dtype, other, torch.float32}:
            tally = ik.Tally()
            if op == "add":
                result = ik.add(t, inputs[1:], factors, dtype=out, tally=tally)
            else:
                result = getattr(ik, op)(*inputs, *factors, dtype=out, tally=tally)
            assert_tally(tally, counted(op, inputs, factors, result), f"{op} to {out}")


@backends
@pytest.mark.parametrize("dtype", STORAGE, ids=short)
def test_counting_changes_no_bit(dtype: torch.dtype) -> None:
    t, x, y = (sample(dtype, 3000, seed) for seed in range(3))
    for rounding in ("nearest", "stochastic"):
        tally = ik.Tally()
        got = ik.add_difference(t, x, y, 0.3, rounding=rounding, tally=tally)
        oracle.assert_same(got, expected("add_difference", [t, x, y], (0.3,), dtype, rounding=rounding))
        assert_tally(tally, counted("add_difference", [t, x, y], (0.3,), got), rounding)


@backends
@pytest.mark.parametrize("dtype", [*STORAGE[1:]], ids=short)
def test_overflow_begins_where_nearest_rounding_leaves_the_finite(dtype: torch.dtype) -> None:
    limit = LIMITS[dtype]
    inside = float(np.nextafter(limit, 0.0))
    x = torch.tensor([limit, inside, -limit, -inside], dtype=torch.float64)
    tally = ik.Tally()
    zero = torch.zeros(4)
    got = ik.add(x, zero, dtype=dtype, tally=tally)
    assert tally.overflow == 2
    if dtype != torch.float8_e4m3fn:
        assert got.double().isinf().tolist() == [True, False, True, False]
    tally = ik.Tally()
    assert ik.add(x, zero, dtype=dtype, rounding="stochastic", tally=tally).double().isfinite().all()
    assert tally.overflow == 2  # of the value, whatever the rounding then makes of it


@backends
def test_overflow_of_the_arithmetic_counts_and_of_infinite_operands_does_not() -> None:
    big = torch.tensor([3e38, -3e38, math.inf, math.nan])
    tally = ik.Tally()
    ik.add(big, big, tally=tally)
    assert (tally.overflow, tally.inf_in, tally.nan_in, tally.nan_out) == (2, 1, 1, 1)
    tally = ik.Tally()
    ik.subtract(torch.tensor([math.inf]), torch.tensor([math.inf]), tally=tally)
    assert (tally.inf_in, tally.nan_in, tally.nan_out, tally.updates) == (1, 0, 1, 0)
    double = torch.full((3,), 1.7e308, dtype=torch.float64)
    tally = ik.Tally()
    ik.add(double, double, tally=tally)
    assert tally.overflow == 3


@backends
def test_lost_updates() -> None:
    """In bfloat16 a quarter of a step is lost, three quarters are not; a zero update is neither."""
    t = torch.ones(4, dtype=torch.bfloat16)
    r = torch.tensor([0.25, 0.75, 0.0, -0.0]) * 2.0**-7
    tally = ik.Tally()
    ik.add(t, r, tally=tally)
    assert (tally.elements, tally.updates, tally.lost) == (4, 2, 1)
    assert tally.norm2 == (0.25**2 + 0.75**2) * 2.0**-14
    assert tally.dot == 0.75 * 2.0**-14
    assert tally.effective_alpha(0.5) == 0.5 * 0.75 / (0.25**2 + 0.75**2)


@backends
def test_a_tally_adds_up_over_calls_lists_and_pieces() -> None:
    t, x, y = (sample(torch.bfloat16, 5000, seed) for seed in range(3))
    whole, pieces, listed, joined = (ik.Tally() for _ in range(4))
    ik.add_difference(t, x, y, 0.3, tally=whole)
    cuts = [slice(0, 1), slice(1, 1), slice(1, 777), slice(777, 5000)]
    for cut in cuts:
        ik.add_difference(t[cut], x[cut], y[cut], 0.3, tally=pieces)
        part = ik.Tally()
        ik.add_difference(t[cut], x[cut], y[cut], 0.3, tally=part)
        joined += part
    ik.add_difference(*([a[cut] for cut in cuts] for a in (t, x, y)), 0.3, tally=listed)
    for other in (pieces, listed, joined):
        assert_tally(other, whole, "")


@backends
def test_a_tally_of_several_pairs_is_that_of_their_residuals() -> None:
    t, x1, y1, x2, y2 = (sample(torch.bfloat16, 5000, seed) for seed in range(5))
    pairs, residuals = ik.Tally(), ik.Tally()
    ik.add_difference(t, [x1, x2], [y1, y2], [0.3, -0.7], tally=pairs)
    ik.add(t, [ik.subtract(x1, y1), ik.subtract(x2, y2)], [0.3, -0.7], tally=residuals)
    assert (pairs.updates, pairs.lost, pairs.nan_out) == (residuals.updates, residuals.lost, residuals.nan_out)
    assert (pairs.dot, pairs.norm2) == pytest.approx((residuals.dot, residuals.norm2))


@backends
def test_a_tally_of_many_threads_and_of_views() -> None:
    n = 3 * 200_000
    t, r = sample(torch.bfloat16, n, 0), sample(torch.float32, n, 1)
    tallies = []
    for count in (1, 3):
        token = threads.set(count)
        try:
            flat, strided = ik.Tally(), ik.Tally()
            ik.add(t, r, 0.3, tally=flat)
            ik.add(t.view(3, -1).t(), r.view(3, -1).t(), 0.3, tally=strided)
        finally:
            threads.reset(token)
        tallies += [flat, strided]
    for other in tallies[1:]:
        assert_tally(other, tallies[0], "")


def test_effective_alpha_of_nothing_is_not_a_number() -> None:
    tally = ik.Tally()
    ik.add(torch.ones(3), torch.zeros(3), tally=tally)
    assert math.isnan(tally.effective_alpha(1.0))
    assert math.isnan(ik.Tally().effective_alpha(1.0))


@backends
def test_inf_minus_inf_of_finite_operands_is_a_nan_and_no_overflow() -> None:
    t, r = torch.zeros(2, dtype=torch.bfloat16), torch.tensor([3e38, -3e38], dtype=torch.bfloat16)
    tally = ik.Tally()
    ik.add(t, [r, r], [2.0, -2.0], tally=tally)
    assert (tally.overflow, tally.nan_out, tally.nan_in, tally.inf_in) == (0, 2, 0, 0)
