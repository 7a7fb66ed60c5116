"""How two updates of one base fit together: the definition beside the compiled loops, and numbers made by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from selection import use
from torch import Tensor

from ires_kernels.backends import fitting, native
from ires_kernels.backends.fit import Fit

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
ALPHAS = (1.0, 0.3, -2.0, 1e30, 0.0)
SUMS = ("base", "drift", "update", "cross")


def operand(dtype: torch.dtype, seed: int) -> Tensor:
    """Values of every magnitude, and some that are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-40, 38, (2000,), generator=generator, dtype=torch.float64)
    values = torch.randn(2000, generator=generator, dtype=torch.float64) * scale
    values[::50] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 448.0, -65504.0, 1e-45]).repeat(5).double()
    return values[torch.randperm(2000, generator=generator)].to(dtype)


def same(found: Fit, wanted: Fit, within: float = 1e-9) -> None:
    """Integers are equal, and sums but for the order in which they were added up, or within what is given."""
    for name in ("elements", "both", "conflicts", "within"):
        assert getattr(found, name) == getattr(wanted, name), name
    scale = [wanted.base, wanted.drift, wanted.update, math.sqrt(wanted.drift * wanted.update)]
    for name, size in zip(SUMS, scale, strict=True):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=within, abs=within * size), name
    assert len(found.moved) == len(wanted.moved)
    for got, moved in zip(found.moved, wanted.moved, strict=True):
        assert got == pytest.approx(moved, rel=within, abs=within * wanted.update)


@pytest.mark.parametrize("isa", native.isas())
def test_loops_count_what_the_definition_counts(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(f"native-{isa}", monkeypatch)
    operands = [*((k, k, k) for k in range(len(TYPES))), (0, 2, 1), (3, 4, 0)]
    for (i, dtype), others in itertools.product(enumerate(TYPES), operands):
        t, x, y = (operand(TYPES[other], 10 * i + k) for k, other in enumerate(others))
        y = torch.where(torch.rand(len(y)) < 0.5, y.float(), x.float()).to(y.dtype)  # much is equal, as in models
        same(fitting.fit(t, x, y, ALPHAS, dtype), fitting.definition(t, x, y, ALPHAS, dtype), within=1e-6)
    for count in (0, 1, 3, 15, 16, 17, 31, 33, 1023, 1024, 1025, 2049):
        t, x, y = (torch.randn(count + 1)[1:].bfloat16() for _ in range(3))
        t, x, y = (values[:count] for values in (t, x, y))
        wanted = fitting.definition(t, x, y, (0.5,), torch.bfloat16)
        same(fitting.fit(t, x, y, (0.5,), torch.bfloat16), wanted, within=1e-6)


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *((torch.bfloat16, size) for size in (1, 1e-8, 1e-17, 1e-21, 1e-37, 1e19)),
        (torch.float16, 1),
        (torch.float16, 2e5),
    ],
)
def test_blocks(isa: str, dtype: torch.dtype, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of models; and where squares of float32 underflow or overflow, or are none, the sums of float64."""
    use(f"native-{isa}", monkeypatch)
    generator = torch.Generator().manual_seed(4)
    y, u, d = (torch.randn(3, 40_000, generator=generator) * torch.tensor([[0.02], [2e-4], [4e-4]])).mul(size)
    t, x, y = ((y + each).to(dtype) for each in (d, u, torch.zeros(())))
    x[:6000] = y[:6000]
    t[4000:8000] = y[4000:8000]
    y[9000:12_000] = 0
    t[17_000], x[20_000], y[23_000], t[26_000] = math.nan, math.inf, -math.inf, 3e38
    alphas = (1.0, 0.3, -2.0)
    for values in ((t, x, y), (t[:16_999], x[:16_999], y[:16_999])):
        same(fitting.fit(*values, alphas, t.dtype), fitting.definition(*values, alphas, t.dtype), within=1e-6)


@pytest.mark.parametrize("backend", ["reference", *(["native"] if native.isas() else [])])
def test_numbers(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(backend, monkeypatch)
    y = torch.tensor([1.0, 1.0, 1.0, 1.0, -0.0, 2.0, math.nan, 1.0])
    x = torch.tensor([1.0, 1.0078125, 0.5, 2.0, 0.0, 2.0, 1.0, math.inf])
    t = torch.tensor([2.0, 0.5, 0.75, 3.0, 0.0, 2.0, 1.0, 1.0])
    for dtype in (torch.bfloat16, torch.float64):
        found = fitting.fit(t.to(dtype), x.to(dtype), y.to(dtype), (1.0,), torch.bfloat16)
        assert (found.elements, found.both, found.conflicts) == (6, 3, 1)
        assert found.within[:2] == [3, 4]
        assert found.within[7] == 4  # 1 → .5 and 1 → 2 are 128 steps
        assert found.base == 8.0
        assert found.drift == 1 + 0.25 + 0.0625 + 4
        assert found.update == 0.0078125**2 + 0.25 + 1
        assert found.cross == -0.5 * 0.0078125 + 0.25 * 0.5 + 2.0
        assert found.moved == [0.0078125**2 + 0.25 + 1]  # .5 + 1/128, .75 - .5 and 3 + 1 are numbers of bf16
    assert sum(count for _, count in found.histogram()) == 6
    assert found.histogram()[-1] == ("128+", 2)


def test_rounding_takes_away_what_is_small() -> None:
    y = torch.ones(1000).bfloat16()
    t = torch.full((1000,), 2.0).bfloat16()
    found = fitting.fit(t, y + 0.0078125, y, (1.0, 4.0), torch.bfloat16)
    assert found.effective((1.0, 4.0)) == [0.0, 4.0]
    assert fitting.fit(t, y + 1, y, (), torch.bfloat16).effective((1.0,)) == [None]
    nothing = Fit()
    nothing += Fit()
    assert nothing.cosine is nothing.relative_drift is nothing.conflict_share is nothing.small_share is None
