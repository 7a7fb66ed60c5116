"""The counts that plain torch makes behind a GPU's kernels, beside those of the backends that count themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from selection import COMPILED, use
from torch import Tensor

from ires_kernels.backends import counting
from ires_kernels.backends.call import Tally
from ires_kernels.tensors import ops

STORAGE = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
CASES = [
    ("subtract", 1, ()),
    ("add", 1, (0.7,)),
    ("add", 3, (0.5, -2.0, 1e30)),
    ("add_difference", 2, (0.3,)),
    ("add_difference", 2, (-1e38,)),
]


def operand(dtype: torch.dtype, seed: int) -> Tensor:
    """Values of every magnitude, and around every limit: the largest of each type, and half a step beyond it."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-40, 39, (600,), generator=generator, dtype=torch.float64)
    values = torch.randn(600, generator=generator, dtype=torch.float64) * scale
    limits = [448, 464, 465, 57344, 61439, 61440, 65504, 65519, 65520, 2.0**127 * (2 - 2**-8), 2.0**128 - 2**104, 1e300]
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), *limits, *(-x for x in limits)]
    special *= 10
    order = torch.randperm(len(special), generator=generator)
    return torch.cat([values, torch.tensor(special, dtype=torch.float64)[order], torch.ones(64)]).to(dtype)


def run(op: str, operands: list[Tensor], factors: tuple[float, ...], dtype: torch.dtype, rounding: str) -> Tally:
    """What a backend counts, having compared what plain torch counts."""
    tally = Tally()
    t, *others = operands
    more = {"dtype": dtype, "rounding": rounding, "seed": 3, "tally": tally}
    if op == "subtract":
        stored = ops.subtract(t, *others, **more)
    elif op == "add":
        stored = ops.add(t, others, factors, **more)
    else:
        stored = ops.add_difference(t, *others, *factors, **more)
    half = t.numel() // 2
    found = Tally()
    for part in (slice(0, half), slice(half, None)):  # windows add up
        numbers = counting.count(op, [x[part] for x in operands], factors, stored[part])
        found += counting.tally(stored[part].numel(), numbers)
    for name in ("elements", "updates", "lost", "nan_in", "inf_in", "nan_out", "overflow"):
        assert getattr(found, name) == getattr(tally, name), name
    assert all(type(getattr(found, name)) is int for name in ("elements", "updates", "overflow"))
    return tally


@pytest.mark.parametrize("backend", ["reference", *COMPILED[:1]])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", STORAGE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("op", "others", "factors"), CASES)
def test_the_integers_are_those_of_the_backends(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    op: str,
    others: int,
    factors: tuple[float, ...],
    dtype: torch.dtype,
    rounding: str,
) -> None:
    use(backend, monkeypatch)
    seen = Tally()
    for number, start in enumerate(range(0, len(STORAGE), 2)):
        dtypes = itertools.islice(itertools.cycle(STORAGE), start, start + 1 + others)
        operands = [operand(each, 10 * number + i) for i, each in enumerate(dtypes)]
        seen += run(op, operands, factors, dtype, rounding)
    assert min(seen.updates, seen.lost + (op == "subtract"), seen.nan_in, seen.inf_in, seen.nan_out) > 0
    assert seen.overflow > 0 or dtype == torch.float64


def test_every_half_step_beyond_the_largest_value() -> None:
    """Where overflow begins, to the bit, from float64 and from float32."""
    for dtype, (lowest, strict) in {
        torch.float32: (2.0**128 - 2.0**103, False),
        torch.bfloat16: (2.0**128 - 2.0**119, False),
        torch.float16: (65520.0, False),
        torch.float8_e5m2: (61440.0, False),
        torch.float8_e4m3fn: (464.0, True),
    }.items():
        for wide in (torch.float64, torch.float32):
            edge = torch.tensor([lowest, -lowest], dtype=wide)
            if wide == dtype:
                continue
            points = torch.cat([edge, edge.nextafter(edge * 0), edge.nextafter(edge * 2)])
            tally = run("subtract", [points, torch.zeros_like(points)], (), dtype, "nearest")
            assert tally.overflow == (2 if strict else 4), dtype


def test_the_sums_give_the_same_effective_alpha() -> None:
    t, x, y = (torch.randn(5000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    y[7], t[9], x[11] = float("inf"), float("nan"), -float("inf")
    tally = Tally()
    stored = ops.add_difference(t, x, y, 0.3, tally=tally)
    found = counting.tally(5000, counting.count("add_difference", [t, x, y], (0.3,), stored))
    assert found.dot == pytest.approx(tally.dot, rel=1e-6)
    assert found.norm2 == pytest.approx(tally.norm2, rel=1e-6)
    assert found.effective_alpha(0.3) == pytest.approx(tally.effective_alpha(0.3), rel=1e-6)


def test_nothing_is_nothing() -> None:
    empty = torch.empty(0, dtype=torch.bfloat16)
    assert counting.tally(0, counting.count("add", [empty, empty], (1.0,), empty)) == Tally()
