"""Stochastic rounding: whose random bits an element gets, what they decide, and that on average nothing is lost."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import NARROW, STORAGE, assert_same, expected, sample, short

import ires_kernels as ik
from ires_kernels.backends.reference import random_words

backends = pytest.mark.usefixtures("backend")
SOURCES = [torch.float32, torch.float64]


# Random words


def test_known_answers() -> None:
    """The vectors that the authors of Philox publish with their library (Random123, kat_vectors, philox4x32 10)."""
    ones = 2**64 - 1
    assert random_words(0, 0, 0, 4).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    # a counter of all ones is beyond any 64-bit index, so this one is for the oracle that the rest is held to
    assert oracle.rounds([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    counter, key = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert oracle.rounds(counter, key) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    last = random_words(ones, ones, ones, 1).tolist()
    assert last == [oracle.rounds([0xFFFFFFFF, 0x3FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF], [0xFFFFFFFF] * 2)[3]]


@given(*[st.integers(0, 2**64 - 1)] * 3, st.integers(0, 40))
def test_words_of_the_reference(seed: int, stream: int, start: int, count: int) -> None:
    wanted = [oracle.philox(seed, stream, (start + i) % 2**64) for i in range(count)]
    assert random_words(seed, stream, start, count).tolist() == wanted


@backends
@pytest.mark.parametrize("source", SOURCES, ids=short)
def test_words_can_be_read_off_the_results(source: torch.dtype) -> None:
    """A value k/16 of the way up moves if and only if the top four bits of its word are 16 - k or more."""
    seed, stream, offset, count = 0x0123456789ABCDEF, 0xFEDCBA9876543210, 2**33 - 5, 64
    top = np.zeros(count, dtype=int)
    for k in range(1, 16):
        x = torch.full((count,), 1 + k / 16 * 2.0**-7, dtype=source)
        got = ik.scale(x, 1.0, dtype=torch.bfloat16, rounding="stochastic", seed=seed, stream=stream, offset=offset)
        top += (got > 1).numpy()
    assert top.tolist() == [int(word) >> 28 for word in oracle.words(seed, stream, offset, count)]


@backends
def test_seeds_streams_and_places_differ() -> None:
    x = torch.full((4096,), 1 / 3)

    def rounded(**options: int) -> torch.Tensor:
        return ik.scale(x, 1.0, dtype=torch.bfloat16, rounding="stochastic", **options)

    runs = [rounded()] + [
        rounded(**{name: value}) for name in ("seed", "stream", "offset") for value in (1, 2**32, 2**63)
    ]
    assert_same(rounded(seed=0, stream=0, offset=0), runs[0])
    ups = [run.float() > 1 / 3 for run in runs]
    share = 1 / 3  # 1/3 is a third or two thirds of a step above its lower neighbour
    for one, two in itertools.combinations(ups, 2):
        agree = (one == two).double().mean().item()
        assert agree == pytest.approx(share**2 + (1 - share) ** 2, abs=5 * math.sqrt(0.25 / 4096))


# What the words decide


@backends
@pytest.mark.parametrize("source", SOURCES, ids=short)
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=short)
def test_neighbours_are_chosen_by_definition(dtype: torch.dtype, source: torch.dtype) -> None:
    x = sample(source, 4000, seed=4)
    for seed in (1, 2**40 + 3):
        got = ik.scale(x, 1.0, dtype=dtype, rounding="stochastic", seed=seed, stream=2, offset=1)
        wanted = expected("scale", [x], (1.0,), dtype, rounding="stochastic", seed=seed, stream=2, offset=1)
        assert_same(got, wanted)


@backends
@pytest.mark.parametrize("dtype", STORAGE, ids=short)
def test_operations_round_their_result_and_only_that(dtype: torch.dtype) -> None:
    t, x, y = sample(dtype, 1500, 0), sample(torch.bfloat16, 1500, 1), sample(torch.float32, 1500, 2)
    options = {"rounding": "stochastic", "seed": 3, "stream": 4, "offset": 5}
    for name, operands, factors in (
        ("subtract", [t, x], ()),
        ("add", [t, x], (0.3,)),
        ("add", [t, x, y], (0.3, -0.7)),
        ("scale", [t], (0.3,)),
        ("add_difference", [t, x, y], (0.3,)),
    ):
        wanted = expected(name, operands, factors, dtype, **options)
        if name == "add":
            got = ik.add(t, operands[1:], factors, dtype=dtype, **options)
        else:
            got = getattr(ik, name)(*operands, *factors, dtype=dtype, **options)
        assert_same(got, wanted, name)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=short)
def test_results_are_one_of_the_two_neighbours_in_the_right_proportion(dtype: torch.dtype) -> None:
    """The share that goes up, at normal, subnormal and the smallest values, is right within 5 standard errors."""
    count = 4096
    table = oracle.magnitudes(dtype) if dtype in NARROW else None
    for place in (0, 1, 2, 5, 100):
        if table is None:
            bits = np.array([place, place + 1], dtype=np.uint32)
            low, high = bits.view(np.float32).astype(np.float64)
        else:
            low, high = table[place], table[place + 1]
        for part in (1 / 16, 1 / 2, 11 / 16):
            x = torch.full((count,), low + part * (high - low), dtype=torch.float64)
            got = ik.scale(x, 1.0, dtype=dtype, rounding="stochastic", seed=place).double()
            assert set(got.tolist()) == {low, high}
            share = (got == high).double().mean().item()
            assert share == pytest.approx(part, abs=5 * math.sqrt(part * (1 - part) / count))


@backends
@pytest.mark.parametrize("dtype", STORAGE, ids=short)
def test_values_that_fit_never_move(dtype: torch.dtype) -> None:
    x = oracle.specials(dtype)
    for wide in SOURCES:
        if wide.itemsize >= dtype.itemsize:
            widened = ik.scale(x, 1.0, dtype=wide)
            for seed in range(8):
                assert_same(ik.scale(widened, 1.0, dtype=dtype, rounding="stochastic", seed=seed), x)


@backends
@pytest.mark.parametrize("source", SOURCES, ids=short)
@pytest.mark.parametrize("dtype", NARROW, ids=short)
def test_finite_values_stay_finite(dtype: torch.dtype, source: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    beyond = torch.finfo(source).max
    x = torch.tensor(
        [largest, np.nextafter(np.float32(largest), np.float32(np.inf)), beyond, 1.0001 * largest], dtype=source
    )
    x = x.repeat(500)
    got = ik.scale(x, 1.0, dtype=dtype, rounding="stochastic")
    assert_same(got, torch.full_like(got.float(), largest).to(dtype))
    assert_same(ik.scale(x, -1.0, dtype=dtype, rounding="stochastic"), torch.full_like(got.float(), -largest).to(dtype))


@backends
def test_nothing_is_rounded_where_nothing_is_narrowed() -> None:
    for dtype in SOURCES:
        t, r = sample(dtype, 3000, 0), sample(dtype, 3000, 1)
        assert_same(ik.add(t, r, 0.3, rounding="stochastic"), ik.add(t, r, 0.3))


# Averages


@backends
@pytest.mark.parametrize("dtype", NARROW, ids=short)
def test_no_operation_is_biased(dtype: torch.dtype) -> None:
    """Over many seeds the mean error of each element, and of all, is 0 within 5 standard errors, known exactly."""
    generator = torch.Generator().manual_seed(1)
    t, x, y = (torch.randn(500, generator=generator).to(dtype) for _ in range(3))
    seeds = range(100)
    for name, operands, factors in (
        ("subtract", [x, y], ()),
        ("add", [t, x], (0.3,)),
        ("scale", [t], (1 / 3,)),
        ("add_difference", [t, x, y], (0.3,)),
    ):
        exact = oracle.compute(name, operands, factors, dtype).astype(np.float64)
        _, low, high = oracle.neighbours(np.abs(exact), dtype)
        part = (np.abs(exact) - low) / (high - low)
        variance = part * (1 - part) * (high - low) ** 2
        options = {"dtype": dtype, "rounding": "stochastic"}
        total = sum(getattr(ik, name)(*operands, *factors, seed=seed, **options).double().numpy() for seed in seeds)
        error = total - len(seeds) * exact
        assert (variance > 0).mean() > 0.5
        assert abs(error.sum()) <= 5 * math.sqrt(len(seeds) * variance.sum())
        assert (np.abs(error) <= 5 * np.sqrt(len(seeds) * variance)).all()


@pytest.mark.parametrize(
    ("std", "alpha", "nearest"),
    [(2e-5, 0.3, 0.097), (2e-5, 0.7, 0.902), (1e-4, 0.3, 0.226), (4e-4, 0.3, 0.305)],
)
@backends
def test_stochastic_rounding_keeps_the_alpha_that_nearest_loses(std: float, alpha: float, nearest: float) -> None:
    """The table of docs/numerics.md: updates of a bfloat16 pair, put on another bfloat16 model of the family."""
    count = 1 << 17
    generator = torch.Generator().manual_seed(0)

    def normal(std: float) -> torch.Tensor:
        return torch.randn(count, generator=generator) * std

    origin = normal(0.02)
    base, target = origin.bfloat16(), (origin + normal(std)).bfloat16()
    instruct = (base + normal(std)).bfloat16()
    for rounding, wanted in (("nearest", nearest), ("stochastic", alpha)):
        tally = ik.Tally()
        ik.add_difference(target, instruct, base, alpha, rounding=rounding, tally=tally)
        assert tally.effective_alpha(alpha) == pytest.approx(wanted, abs=0.012)


@backends
@settings(max_examples=30)
@given(st.sampled_from(NARROW), st.floats(-400, 400, width=32), st.integers(0, 2**64 - 1))
def test_the_result_is_a_neighbour(dtype: torch.dtype, x: float, seed: int) -> None:
    _, low, high = oracle.neighbours(np.array([abs(x)]), dtype)
    got = ik.scale(torch.full((30,), x), 1.0, dtype=dtype, rounding="stochastic", seed=seed).double()
    assert set(got.abs().tolist()) <= {low[0], high[0]}
    assert (torch.signbit(got) == (math.copysign(1, x) < 0)).all()
