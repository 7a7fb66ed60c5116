"""Integers that are packed into words are found again, as their quantizers count and shift them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoded import weights
from oracle import assert_same
from small_models import write_model
from torch import Tensor

X = "model.layers.0.mlp.up_proj"
ROWS, WIDTH, GROUP = 64, 96, 32
Values = np.ndarray[Any, np.dtype[np.int64]]


def draw(*shape: int, bits: int, seed: int) -> Values:
    return np.random.default_rng(seed).integers(0, 1 << bits, shape)


def scales(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(9).uniform(1e-4, 1e-2, shape)).to(torch.float16)


def words(values: Values, bits: int) -> Tensor:
    """Each row of values as a stream of bits, the lowest of the first value first, in 32-bit words."""
    streams = (values[..., None] >> np.arange(bits) & 1).reshape(*values.shape[:-1], -1)
    packed = np.packbits(streams.astype(np.uint8), axis=-1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32).copy())


def decoded(tmp_path: Path, tensors: dict[str, Tensor], **settings: Any) -> Tensor:
    config = {"quantization_config": settings}
    folder = write_model(tmp_path / "model", {f"{X}.{name}": t for name, t in tensors.items()}, config=config)
    return weights(folder)[f"{X}.weight"]


def wanted(q: Values, z: Values, s: Tensor, groups: Values) -> Tensor:
    """s · (q − z) for a weight of (in, out), in float64, which is exact, and then turned."""
    exact = s.double().numpy()[groups] * (q - z[groups])
    return torch.from_numpy(exact.T.copy()).float()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("variant", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("order", [True, False])
def test_gptq(tmp_path: Path, bits: int, variant: str | None, order: bool) -> None:
    q, stored = draw(WIDTH, ROWS, bits=bits, seed=1), draw(WIDTH // GROUP, ROWS, bits=bits, seed=2)
    s = scales(WIDTH // GROUP, ROWS)
    groups = np.arange(WIDTH) // GROUP
    tensors = {"qweight": words(q.T, bits).T.contiguous(), "qzeros": words(stored, bits), "scales": s}
    if order:
        groups = np.random.default_rng(3).permutation(groups)
        tensors["g_idx"] = torch.from_numpy(groups.astype(np.int32))
    z = stored if variant == "gptq_v2" else (stored + 1) % (1 << bits)
    got = decoded(
        tmp_path, tensors, quant_method="gptq", bits=bits, group_size=GROUP, sym=False, checkpoint_format=variant
    )
    assert_same(got, wanted(q, z, s, groups))


@pytest.mark.parametrize("stored", [7, 8])
def test_symmetric_gptq_is_the_same_by_whichever_version_its_zero_points_are(tmp_path: Path, stored: int) -> None:
    q, z = draw(WIDTH, ROWS, bits=4, seed=1), np.full((WIDTH // GROUP, ROWS), stored)
    s = scales(WIDTH // GROUP, ROWS)
    tensors = {"qweight": words(q.T, 4).T.contiguous(), "qzeros": words(z, 4), "scales": s}
    got = decoded(tmp_path, tensors, quant_method="gptq", bits=4, group_size=GROUP, sym=True)
    assert_same(got, wanted(q, np.full_like(z, 8), s, np.arange(WIDTH) // GROUP))


def test_gptq_with_one_group(tmp_path: Path) -> None:
    q, stored, s = draw(WIDTH, ROWS, bits=4, seed=1), draw(1, ROWS, bits=4, seed=2), scales(1, ROWS)
    tensors = {"qweight": words(q.T, 4).T.contiguous(), "qzeros": words(stored, 4), "scales": s}
    got = decoded(tmp_path, tensors, quant_method="gptq", bits=4, group_size=-1, checkpoint_format="gptq_v2")
    assert_same(got, wanted(q, stored, s, np.zeros(WIDTH, dtype=np.int64)))


def test_awq(tmp_path: Path) -> None:
    q, z = draw(WIDTH, ROWS, bits=4, seed=1), draw(WIDTH // GROUP, ROWS, bits=4, seed=2)
    s = scales(WIDTH // GROUP, ROWS)
    order = np.arange(ROWS).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].ravel()
    tensors = {"qweight": words(q[:, order], 4), "qzeros": words(z[:, order], 4), "scales": s}
    got = decoded(tmp_path, tensors, quant_method="awq", bits=4, group_size=GROUP, version="gemm")
    assert_same(got, wanted(q, z, s, np.arange(WIDTH) // GROUP))


@pytest.mark.parametrize("zeros", ["packed", "I8"])
@pytest.mark.parametrize("order", ["given", "none", "-1"])
def test_groups_of_compressed_tensors_in_an_order_of_their_own(tmp_path: Path, zeros: str, order: str) -> None:
    q, z = draw(ROWS, WIDTH, bits=4, seed=1), draw(ROWS, WIDTH // GROUP, bits=4, seed=2)
    s = scales(ROWS, WIDTH // GROUP)
    groups = np.arange(WIDTH) // GROUP
    tensors = {
        "weight_packed": words(q, 4),
        "weight_scale": s,
        "weight_shape": torch.tensor([ROWS, WIDTH]),
        "weight_zero_point": words(z.T, 4).T.contiguous()
        if zeros == "packed"
        else torch.from_numpy(z - 8).to(torch.int8),
    }
    if order == "given":
        groups = np.random.default_rng(3).permutation(groups)
        tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    elif order == "-1":
        tensors["weight_g_idx"] = torch.full((WIDTH,), -1, dtype=torch.int32)
    got = decoded(tmp_path, tensors)
    assert_same(got, wanted((q - 8).T, (z - 8).T, s.T, groups))
