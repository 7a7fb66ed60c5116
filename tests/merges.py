"""Merges into new folders as tests run them, and their tensors bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import Tensors
from torch import Tensor

import ires_kernels as ik
from ires_kernels.checkpoints import sources
from ires_kernels.records.report import Report


def bits(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert (found[name].dtype, found[name].shape) == (t.dtype, t.shape), name
        assert bits(found[name]) == bits(t), name


def merge(*args: Any, **options: Any) -> Report:
    report = ik.apply(*args, **{"sync": False, **options})
    assert isinstance(report, Report)
    return report


def before_window(monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], object]) -> None:
    """Do something before the window with this number is read."""
    read, calls = sources.read_into, iter(range(10**6))

    def read_into(*arguments: Any) -> None:
        if threading.current_thread().name.startswith("ires-") and next(calls) == at:  # of the engine
            action()
        read(*arguments)

    monkeypatch.setattr(sources, "read_into", read_into)
