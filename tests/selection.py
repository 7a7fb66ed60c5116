"""Which backends there are on this machine, and how the calls of a test are made to go to one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from ires_kernels.backends import native
from ires_kernels.streaming import tiles as sizes_of

COMPILED = [f"native-{isa}" for isa in native.isas()]
# The Triton kernels join in where Triton interprets them, in a process of their own (test_triton_interpreter.py).
if os.environ.get("TRITON_INTERPRET") == "1":
    COMPILED.append("triton")


def use(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make calls go to a backend such as "reference" or "native-v3"."""
    name, _, isa = backend.partition("-")
    monkeypatch.setenv("IRES_BACKEND", name)
    monkeypatch.setenv("IRES_ISA", isa)


@contextmanager
def tiles(**sizes: int) -> Iterator[None]:
    """Runs that begin in here take tiles so small that the tensors of tests have many."""
    if "elements" in sizes:
        sizes = {"in_pieces": sizes["elements"], **sizes}
    token = sizes_of.tiles.set(replace(sizes_of.TILES, **sizes))
    try:
        yield
    finally:
        sizes_of.tiles.reset(token)
