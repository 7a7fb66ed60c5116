"""Odd tensors in files, from the first byte to the last: what is merged, what is copied, and what the report says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_models import normal, read_model, write_model
from torch import Tensor

import ires_kernels as ik


def bits(t: Tensor) -> bytes:
    return t.reshape(-1).view(torch.uint8).numpy().tobytes()


def merged(folder: Path, target: dict[str, Tensor], instruct: dict[str, Tensor], base: dict[str, Tensor], **options):  # type: ignore[no-untyped-def]
    """The output of a one-pass merge, and its report."""
    paths = [write_model(folder / name, model) for name, model in zip("tib", (target, instruct, base), strict=True)]
    report = ik.apply(paths[0], (paths[1], paths[2]), out=folder / "out", sync=False, **options)
    return read_model(folder / "out"), report


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64],
    ids=str,
)
def test_what_has_no_fractions_is_copied_from_the_target(tmp_path: Path, dtype: torch.dtype) -> None:
    """Where base and instruct agree; the target's own values may be others."""
    weight, theirs = normal((4, 3), 1), torch.tensor([1, 0, 1]).to(dtype)
    own = torch.tensor([0, 1, 1]).to(dtype)
    found, report = merged(
        tmp_path,
        {"w": weight, "kept": own},
        {"w": weight, "kept": theirs},
        {"w": torch.zeros_like(weight), "kept": theirs},
    )
    assert bits(found["kept"]) == bits(own)
    assert found["kept"].dtype == dtype
    assert torch.equal(found["w"], weight + weight)
    assert "kept" in report.copied


def test_scalars_and_tensors_without_elements(tmp_path: Path) -> None:
    target = {
        "empty": torch.zeros(3, 0),
        "flat": torch.zeros(0).bfloat16(),
        "scalar": torch.tensor(2.0),
        "w": torch.ones(5),
    }
    instruct = {**target, "scalar": torch.tensor(1.5), "w": torch.full((5,), 3.0)}
    base = {**target, "scalar": torch.tensor(1.0), "w": torch.ones(5)}
    found, _ = merged(tmp_path, target, instruct, base, alpha=0.5)
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "empty": (3, 0),
        "flat": (0,),
        "scalar": (),
        "w": (5,),
    }
    assert (found["scalar"].item(), found["w"].tolist()) == (2.25, [2.0] * 5)


def test_alpha_0_gives_the_target_back(tmp_path: Path) -> None:
    """Even where instruct - base is NaN."""
    target = {"w": torch.tensor([1.0, -0.0, math.nan, math.inf])}
    instruct, base = {"w": torch.tensor([math.nan, math.inf, 1.0, 2.0])}, {"w": torch.zeros(4)}
    found, _ = merged(tmp_path, target, instruct, base, alpha=0)
    assert bits(found["w"]) == bits(target["w"])


def test_nan_and_infinity_stay_where_they_are_and_are_counted(tmp_path: Path) -> None:
    target = {"w": torch.tensor([math.nan, math.inf, -math.inf, 1.0, 6e4])}
    instruct, base = {"w": torch.tensor([1.0, 1.0, 1.0, math.nan, 6e4])}, {"w": torch.zeros(5)}
    found, report = merged(tmp_path, target, instruct, base, dtype="f16")
    assert found["w"][1:3].tolist() == [math.inf, -math.inf]
    assert found["w"][[0, 3]].isnan().all()
    assert found["w"][4] == math.inf
    assert (report.counts.nan_in, report.counts.inf_in, report.counts.nan_out, report.overflow) == (2, 2, 2, 1)
    for word in ("NaN", "overflow"):
        assert word in str(report)


def test_what_only_the_target_has_is_kept_and_named(tmp_path: Path) -> None:
    weight, extra = normal((4, 3), 1), normal((2, 2), 2)
    found, report = merged(tmp_path, {"w": weight, "head.extra": extra}, {"w": weight}, {"w": weight})
    assert bits(found["head.extra"]) == bits(extra)
    assert report.copied == {"head.extra": "only in the target"}
    assert "copied            1 tensor, only in the target" in str(report)
