"""Merges into new folders as tests run them, and their tensors bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from small_models import Tensors
from torch import Tensor

import ires_kernels as ik
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
