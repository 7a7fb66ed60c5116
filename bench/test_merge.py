"""pytest-benchmark suite of whole merges on a generated triple; see test_kernels.py for when to use it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from ires_kernels.bench import mappings, merges
from ires_kernels.bench.measure import Ways
from ires_kernels.bench.synthetic import Shape, Triple, write_triple
from ires_kernels.streaming.stream import default_threads

ROUNDS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triple")


@pytest.fixture(scope="module")
def triple(shape: Shape, folder: Path) -> Triple:
    return write_triple(folder, shape)


@pytest.fixture(scope="module")
def merging(triple: Triple, folder: Path) -> Iterator[Ways]:
    merges.verify(triple, folder)
    with merges.contenders(triple, folder) as ways:
        yield ways


@pytest.fixture(scope="module")
def mapping(triple: Triple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    folder, threads = tmp_path_factory.mktemp("mapped"), default_threads()
    mappings.verify(triple, folder, threads)
    with mappings.contenders(triple, folder, threads) as ways:
        yield ways


@pytest.mark.parametrize("name", merges.JOBS)
def test_merge(name: str, merging: Ways, triple: Triple, folder: Path, benchmark: BenchmarkFixture) -> None:
    run(name, merging, benchmark, f"merges of {triple.models}", folder / "out")


@pytest.mark.parametrize("name", mappings.JOBS)
def test_mapped(name: str, mapping: Ways, triple: Triple, folder: Path, benchmark: BenchmarkFixture) -> None:
    run(name, mapping, benchmark, f"mapped {triple.models}", folder / "out")


def run(name: str, ways: Ways, benchmark: BenchmarkFixture, group: str, out: Path) -> None:
    if name not in ways:
        pytest.skip(f"nothing to run {name} with")
    benchmark.group = group

    def remove() -> None:
        shutil.rmtree(out, ignore_errors=True)

    benchmark.pedantic(ways[name], setup=remove, rounds=ROUNDS)
    remove()
