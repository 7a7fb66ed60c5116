"""Every kind of GPU kernel on small tensors, against the reference: few calls, for compute-sanitizer to watch.

compute_sanitizer.py runs this file under it; test_cuda.py and test_triton_gpu.py go over the same ground step by step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from oracle import assert_same, sample
from torch import Tensor

from ires_kernels.backends import native, reference, triton
from ires_kernels.backends.call import Call

DEVICE = "cuda"
BF16, F16, F32, F64, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn
TILE = 4096  # elements of a tile of most native kernels, and two blocks of Triton's
CASES: list[tuple[str, tuple[torch.dtype, ...], tuple[float, ...]]] = [
    ("add_difference", (BF16,) * 4, (0.3,)),
    ("add_difference", (F32,) * 4, (0.3,)),
    ("add", (BF16, BF16, E4M3), (0.7,)),
    ("add", (BF16, BF16, F32, F16), (0.7, -1.1)),
    ("subtract", (F32, F16, F16), ()),
    ("subtract", (E4M3, F64, BF16), ()),
    ("scale", (F16, F16), (-0.3,)),
]


@pytest.fixture(params=[native, triton], ids=["native", "triton"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    found: ModuleType = request.param
    status = found.status(DEVICE)
    if not status.available:
        pytest.skip(status.detail)
    return found


def there(x: Tensor, before: int) -> Tensor:
    """The same values and strides in an allocation that ends with them, and has `before` elements in front."""
    reach = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    memory = torch.empty((before + reach) * x.element_size(), dtype=torch.uint8, device=DEVICE)
    memory[before * x.element_size() :] = x.as_strided((reach,), (1,)).view(torch.uint8).to(DEVICE)
    return memory.view(x.dtype).as_strided(x.shape, x.stride(), before)


def compare(
    backend: ModuleType, op: str, rows: Sequence[Sequence[Tensor]], factors: tuple[float, ...], before: Sequence[int]
) -> None:
    for stochastic in (False, True):
        shifts = itertools.cycle(before)
        copies = [[there(x, next(shifts)) for x in row] for row in rows]
        wanted = [row[0].clone() for row in rows]
        for run, outs, inputs in (
            (reference.run, wanted, [tuple(row[1:]) for row in rows]),
            (backend.run, [row[0] for row in copies], [tuple(row[1:]) for row in copies]),
        ):
            run(Call(op, outs, inputs, factors, stochastic, 5, list(range(len(rows))), 3, None))
        for got, want in zip(copies, wanted, strict=True):
            assert_same(got[0].cpu(), want, f"{op} of {[x.dtype for x in got]}")


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "mix", "factors"), CASES)
def test_ends_and_alignments(
    backend: ModuleType, op: str, mix: tuple[torch.dtype, ...], factors: tuple[float, ...]
) -> None:
    for n, before in itertools.product((1, 7, TILE - 1, TILE, TILE + 1), ((0,), (1,), (0, 1, 3))):
        compare(backend, op, [[sample(dtype, n, i) for i, dtype in enumerate(mix)]], factors, before)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "mix", "factors"), CASES)
def test_lists_and_strides(
    backend: ModuleType, op: str, mix: tuple[torch.dtype, ...], factors: tuple[float, ...]
) -> None:
    sizes = (5, TILE + 3, 1, 333, 2 * TILE)
    compare(backend, op, [[sample(dtype, n, n + i) for i, dtype in enumerate(mix)] for n in sizes], factors, (0, 2))
    flat = [sample(dtype, 40 * 31, i) for i, dtype in enumerate(mix)]
    views = [x.view(40, 31)[:, 1:20] if i % 2 else x[: 19 * 40].view(19, 40).t() for i, x in enumerate(flat)]
    compare(backend, op, [views], factors, (0, 1))
