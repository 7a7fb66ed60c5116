"""What `inspect` says of quantized weights: the format and the shape of the numbers of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import write_model

import ires_kernels as ik
from ires_kernels.cli import main

A, E = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A weight in blocks of float8, experts of gpt-oss, a norm, and a weight without its scale."""
    tensors = {
        f"{A}.weight": torch.zeros(200, 300, dtype=torch.float8_e4m3fn),
        f"{A}.weight_scale_inv": torch.ones(2, 3),
        f"{A}.input_scale": torch.ones(()),
        f"{E}.down_proj_blocks": torch.zeros(4, 80, 2, 16, dtype=torch.uint8),
        f"{E}.down_proj_scales": torch.zeros(4, 80, 2, dtype=torch.uint8),
        "model.norm.weight": torch.zeros(300, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(10, 300, dtype=torch.float8_e4m3fn),
    }
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
    return write_model(tmp_path / "model", tensors, config={"quantization_config": settings})


def test_numbers_are_counted_and_not_codes(model: Path) -> None:
    found = ik.inspect(model)
    plain = {"BF16": 300, "F8_E4M3": 3000}
    assert found["parameters_by_dtype"] == {
        "fp8-block": 60000,
        "mxfp4-transposed": 20480,
        **dict(reversed(plain.items())),
    }
    assert found["parameters"] == 60000 + 20480 + 3000 + 300
    assert found["formats"] == {"fp8-block 128 × 128": 1, "mxfp4-transposed": 1}
    why = "lm_head.weight has F8_E4M3 codes, and there is no scale of them in any file"
    assert found["not_decoded"] == {"lm_head.weight": why}


def test_each_tensor_has_its_weight_format_and_shape(model: Path) -> None:
    entries = {entry.pop("name"): entry for entry in ik.inspect(model)["all_tensors"]}
    settings = {"rows": 128, "columns": 128, "scale": "F32"}
    said = {"weight": f"{A}.weight", "format": "fp8-block 128 × 128", "settings": settings, "numbers": [200, 300]}
    where = {"file": "model.safetensors"}
    assert entries[f"{A}.weight"] == {"dtype": "F8_E4M3", "shape": [200, 300], **where, **said}
    assert entries[f"{A}.input_scale"] == {"dtype": "F32", "shape": [], **where, "weight": f"{A}.weight"}
    assert entries[f"{E}.down_proj_blocks"]["numbers"] == [4, 64, 80]
    assert entries["model.norm.weight"] == {"dtype": "BF16", "shape": [300], **where}
    assert entries["lm_head.weight"] == {"dtype": "F8_E4M3", "shape": [10, 300], **where, "weight": "lm_head.weight"}


def test_the_command_line_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{model}", "--tensors"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "format fp8-block 128 × 128: 1 weight" in lines
    assert "format mxfp4-transposed: 1 weight" in lines
    assert any(line.startswith("not decoded 1 weight, such as lm_head.weight: ") for line in lines)
    codes = f"F8_E4M3 [200, 300] {A}.weight model.safetensors fp8-block 128 × 128 codes of {A}.weight [200, 300]"
    assert codes in lines
    assert f"F32 [2, 3] {A}.weight_scale_inv model.safetensors of {A}.weight" in lines
