"""Sizes of the pytest-benchmark suites: `pytest bench --elements 64M --model llama-1b`."""

from __future__ import annotations

import pytest

from ires_kernels.bench.synthetic import Shape, count_of, shape_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--elements", default="16M", help="elements of a tensor: 16M, 32MB of 16 bits each")
    parser.addoption(
        "--model", default="100MB", help="model to merge: llama-1b, 500M parameters, 100MB of 16 bits each"
    )
    parser.addoption("--threads", default=1, type=int, help="threads of the kernels; merges take all CPUs")


@pytest.fixture(scope="session")
def elements(pytestconfig: pytest.Config) -> int:
    return count_of(pytestconfig.getoption("--elements"))


@pytest.fixture(scope="session")
def shape(pytestconfig: pytest.Config) -> Shape:
    return shape_of(pytestconfig.getoption("--model"))


@pytest.fixture(scope="session")
def threads(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--threads"))
