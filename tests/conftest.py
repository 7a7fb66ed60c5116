"""Fixtures that run a test once per backend, and per instruction set of the native one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from ires_kernels.backends import native

# The same examples in every run; the environment a backend fixture sets may serve all examples of a test.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")

# Small tensors gain nothing from torch's threads, and lose much on a machine that is busy with something else. Tests of
# threads ask for them.
torch.set_num_threads(1)

COMPILED = [f"native-{isa}" for isa in native.isas()]
# The Triton kernels join in where Triton interprets them, in a process of their own (test_triton_interpreter.py).
if os.environ.get("TRITON_INTERPRET") == "1":
    COMPILED.append("triton")


def use(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make calls go to a backend such as "reference" or "native-v3"."""
    name, _, isa = backend.partition("-")
    monkeypatch.setenv("IRES_BACKEND", name)
    monkeypatch.setenv("IRES_ISA", isa)


@pytest.fixture(params=["reference", *COMPILED])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend there is, one test each."""
    use(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend that is held against the reference."""
    use(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def many_gigabytes() -> Iterator[None]:
    """For tests that fill a GPU: afterwards the memory goes back to it, because another process may want it."""
    yield
    torch.cuda.empty_cache()
