"""pytest-benchmark suite of the tensor operations: one group a case, the memory loop and torch's ways among them.

For statements about speed use `python -m ires_kernels.bench`, where contenders take turns. This suite runs them one
after the other and is for watching one kernel over time: `pytest bench --benchmark-autosave --benchmark-compare`.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ires_kernels.bench.contenders import CHUNKED, EAGER
from ires_kernels.bench.kernels import CASES, MEMORY, Case, contenders, make, ours, verify

CHUNK = 1 << 16


@pytest.mark.parametrize("name", [MEMORY, *ours(), EAGER, CHUNKED])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_kernel(case: Case, name: str, elements: int, threads: int, benchmark: BenchmarkFixture) -> None:
    verify(case, [threads])
    out, operands = make(case, elements)
    ways = contenders(case, out, operands, threads, CHUNK)
    if name not in ways:
        pytest.skip(f"{name} does not do {case.name} here")
    benchmark.group = f"{case.name}, threads {threads}"
    benchmark.extra_info |= {"bytes": case.bytes_per_element * elements, "torch": torch.__version__}
    benchmark.pedantic(ways[name], rounds=10, warmup_rounds=1)
