"""pytest-benchmark suite of whole merges on a generated triple; see test_kernels.py for when to use it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ires_kernels import apply, extract
from ires_kernels.bench.merges import copy, verify
from ires_kernels.bench.synthetic import Shape, Triple, write_triple

ROUNDS = 5


@pytest.fixture(scope="module")
def triple(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> Triple:
    folder = tmp_path_factory.mktemp("triple")
    written = write_triple(folder, shape)
    verify(written, folder)
    extract(written.base, written.instruct, folder / "residual", sync=False)
    return written


@pytest.mark.parametrize("job", ["cat + cp", "one pass", "one pass, fsync", "extract f32", "apply f32"])
def test_merge(job: str, triple: Triple, tmp_path: Path, benchmark: BenchmarkFixture) -> None:
    out, residual = tmp_path / "out", triple.base.with_name("residual")
    pair = (triple.instruct, triple.base)
    jobs = {
        "cat + cp": lambda: copy(triple, out),
        "one pass": lambda: apply(triple.target, pair, out=out, sync=False),
        "one pass, fsync": lambda: apply(triple.target, pair, out=out),
        "extract f32": lambda: extract(triple.base, triple.instruct, out, sync=False),
        "apply f32": lambda: apply(triple.target, residual, out=out, sync=False),
    }
    benchmark.group = f"models of {triple.nbytes / 1e9:.3g} GB"

    def remove() -> None:
        shutil.rmtree(out, ignore_errors=True)

    benchmark.pedantic(jobs[job], setup=remove, rounds=ROUNDS)
