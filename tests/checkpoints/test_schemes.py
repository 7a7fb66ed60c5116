"""Quantized weights are found by their tensors, and confirmed by the settings; what is not whole is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import write_model

from ires_kernels.checkpoints.checkpoint import open_checkpoint
from ires_kernels.checkpoints.schemes import Quantized, quantized

F8, U8, I8, I32, I64 = torch.float8_e4m3fn, torch.uint8, torch.int8, torch.int32, torch.int64
BF16, F16, F32, E8M0 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e8m0fnu
X = "model.layers.0.mlp.up_proj"
E = "model.layers.0.mlp.experts"
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def block(method: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **settings}}


def groups(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return block("compressed-tensors", format=form, version="0.20.0", config_groups={"group_0": group})


FP8 = block("fp8", fmt="e4m3", weight_block_size=[128, 128], activation_scheme="dynamic")
GPTQ = block("gptq", bits=4, group_size=32, sym=False, desc_act=True, checkpoint_format="gptq")
AWQ = block("awq", bits=4, group_size=32, version="gemm", zero_point=True)

# Of every format: what is stored, the settings, and the weight, its format and its shape.
FORMATS: dict[str, tuple[Shapes, dict[str, Any] | None, str, str, tuple[int, ...]]] = {
    "DeepSeek-V3": (
        {f"{X}.weight": (F8, (576, 256)), f"{X}.weight_scale_inv": (F32, (5, 2))},
        FP8, f"{X}.weight", "fp8-block 128 × 128", (576, 256),
    ),
    "DeepSeek-V4": (
        {f"{X}.weight": (F8, (256, 96)), f"{X}.scale": (E8M0, (2, 1))},
        FP8, f"{X}.weight", "fp8-block 128 × 128", (256, 96),
    ),
    "blocks of 32": (
        {f"{X}.weight": (F8, (64, 96)), f"{X}.weight_scale_inv": (U8, (2, 3))},
        block("fp8", weight_block_size=[32, 32]), f"{X}.weight", "fp8-block 32 × 32", (64, 96),
    ),
    "without settings": (
        {f"{X}.weight": (F8, (576, 256)), f"{X}.weight_scale_inv": (F32, (5, 2))},
        None, f"{X}.weight", "fp8-block 128 × 128", (576, 256),
    ),
    "DeepSeek-V4 experts": (
        {f"{E}.0.w1.weight": (I8, (64, 32)), f"{E}.0.w1.scale": (E8M0, (64, 2))},
        {**FP8, "expert_dtype": "fp4"}, f"{E}.0.w1.weight", "mxfp4", (64, 64),
    ),
    "fused experts": (
        {f"{E}.gate_up_proj": (F8, (3, 256, 128)), f"{E}.gate_up_proj_scale_inv": (F32, (3, 2, 1)),
         f"{E}.gate_up_proj_activation_scale": (F32, (3,))},
        FP8, f"{E}.gate_up_proj", "fp8-block 128 × 128", (3, 256, 128),
    ),
    "fused experts, one scale each": (
        {f"{E}.down_proj": (F8, (3, 48, 96)), f"{E}.down_proj_scale_inv": (BF16, (3, 1, 1))},
        block("fp8", weight_block_size=None), f"{E}.down_proj", "fp8-tensor", (3, 48, 96),
    ),
    "fused experts, gate and up": (
        {f"{E}.gate_up_proj": (F8, (3, 80, 96)), f"{E}.gate_up_proj_scale_inv": (BF16, (3, 2, 1))},
        block("fp8", weight_block_size=None), f"{E}.gate_up_proj", "fp8-block 40 × 96", (3, 80, 96),
    ),
    "Mistral for transformers": (
        {f"{X}.weight": (F8, (48, 96)), f"{X}.weight_scale_inv": (BF16, ()), f"{X}.activation_scale": (BF16, ())},
        block("fp8", weight_block_size=None, activation_scheme="static"), f"{X}.weight", "fp8-tensor", (48, 96),
    ),
    "Mistral": (
        {f"{X}.weight": (F8, (48, 96)), f"{X}.qscale_weight": (BF16, ()), f"{X}.qscale_act": (BF16, ())},
        None, f"{X}.weight", "fp8-tensor", (48, 96),
    ),
    "compressed-tensors fp8 by channel": (
        {f"{X}.weight": (F8, (48, 96)), f"{X}.weight_scale": (BF16, (48, 1)), f"{X}.input_scale": (BF16, (1,))},
        groups("float-quantized", num_bits=8, type="float", strategy="channel"), f"{X}.weight", "fp8-channel", (48, 96),
    ),
    "compressed-tensors fp8 by tensor": (
        {f"{X}.weight": (F8, (48, 96)), f"{X}.weight_scale": (BF16, (1,))},
        groups("float-quantized", num_bits=8, type="float", strategy="tensor"), f"{X}.weight", "fp8-tensor", (48, 96),
    ),
    "compressed-tensors fp8 by block": (
        {f"{X}.weight": (F8, (192, 130)), f"{X}.weight_scale": (F16, (2, 2))},
        groups("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
        f"{X}.weight", "fp8-block 128 × 128", (192, 130),
    ),
    "FBGEMM": (
        {f"{X}.weight": (F8, (48, 96)), f"{X}.weight_scale": (F32, (48, 1)), f"{X}.input_scale_ub": (F32, (1,))},
        block("fbgemm_fp8"), f"{X}.weight", "fp8-channel", (48, 96),
    ),
    "ModelOpt fp8 by channel": (
        {f"{X}.weight": (F8, (48, 96)), f"{X}.weight_scale": (F32, (48,)), f"{X}.input_scale": (F32, ())},
        block("modelopt", quant_algo="FP8_PER_CHANNEL_PER_TOKEN"), f"{X}.weight", "fp8-channel", (48, 96),
    ),
    "ModelOpt fp8 by block": (
        {f"{X}.weight": (F8, (192, 300)), f"{X}.weight_scale": (F32, (2, 1, 3, 1))},
        block("modelopt", quant_algo="FP8_PB_WO"),
        f"{X}.weight", "fp8-block 128 × 128", (192, 300),
    ),
    "MXFP8": (
        {f"{X}.weight": (F8, (48, 96)), f"{X}.weight_scale_inv": (U8, (48, 3))},
        block("mxfp8", weight_block_size=[1, 32]), f"{X}.weight", "mxfp8", (48, 96),
    ),
    "compressed-tensors int8": (
        {f"{X}.weight": (I8, (48, 96)), f"{X}.weight_scale": (BF16, (48, 1)), f"{X}.weight_zero_point": (I8, (48, 1))},
        groups("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        f"{X}.weight", "int8-channel", (48, 96),
    ),
    "compressed-tensors int4": (
        {f"{X}.weight_packed": (I32, (48, 12)), f"{X}.weight_scale": (BF16, (48, 3)), f"{X}.weight_shape": (I64, (2,)),
         f"{X}.weight_zero_point": (I32, (6, 3)), f"{X}.weight_g_idx": (I32, (96,))},
        groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
        f"{X}.weight", "pack-quantized 4 bits in groups of 32", (48, 96),
    ),
    "compressed-tensors nvfp4": (
        {f"{X}.weight_packed": (U8, (48, 48)), f"{X}.weight_scale": (F8, (48, 6)),
         f"{X}.weight_global_scale": (F32, (1,)), f"{X}.input_global_scale": (F32, (1,))},
        groups("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        f"{X}.weight", "nvfp4", (48, 96),
    ),
    "ModelOpt nvfp4": (
        {f"{X}.weight": (U8, (48, 48)), f"{X}.weight_scale": (F8, (48, 6)), f"{X}.weight_scale_2": (F32, ()),
         f"{X}.input_scale": (F32, ())},
        block("modelopt", quant_algo="NVFP4"), f"{X}.weight", "nvfp4", (48, 96),
    ),
    "ModelOpt nvfp4 experts": (
        {f"{E}.gate_up_proj": (U8, (3, 48, 48)), f"{E}.gate_up_proj_weight_scale": (F8, (3, 48, 6)),
         f"{E}.gate_up_proj_weight_scale_2": (F32, (3,))},
        block("modelopt", quant_algo="NVFP4"), f"{E}.gate_up_proj", "nvfp4", (3, 48, 96),
    ),
    "compressed-tensors mxfp4": (
        {f"{X}.weight_packed": (U8, (48, 48)), f"{X}.weight_scale": (U8, (48, 3))},
        groups("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        f"{X}.weight", "mxfp4", (48, 96),
    ),
    "gpt-oss": (
        {f"{E}.gate_up_proj_blocks": (U8, (3, 80, 2, 16)), f"{E}.gate_up_proj_scales": (U8, (3, 80, 2)),
         f"{E}.gate_up_proj_bias": (BF16, (3, 80))},
        block("mxfp4"), f"{E}.gate_up_proj", "mxfp4-transposed", (3, 64, 80),
    ),
    "GPTQ": (
        {f"{X}.qweight": (I32, (12, 48)), f"{X}.qzeros": (I32, (3, 6)), f"{X}.scales": (F16, (3, 48)),
         f"{X}.g_idx": (I32, (96,))},
        GPTQ, f"{X}.weight", "gptq 4 bits in groups of 32", (48, 96),
    ),
    "AWQ": (
        {f"{X}.qweight": (I32, (96, 6)), f"{X}.qzeros": (I32, (3, 6)), f"{X}.scales": (F16, (3, 48))},
        AWQ, f"{X}.weight", "awq 4 bits in groups of 32", (48, 96),
    ),
    "bitsandbytes int8": (
        {f"{X}.weight": (I8, (48, 96)), f"{X}.SCB": (F32, (48,)), f"{X}.weight_format": (U8, ())},
        block("bitsandbytes", load_in_8bit=True), f"{X}.weight", "bnb-int8", (48, 96),
    ),
}  # fmt: skip


def bytes_of(shapes: Shapes) -> dict[str, torch.Tensor]:
    made = {}
    for i, (name, (dtype, shape)) in enumerate(shapes.items()):
        generator = torch.Generator().manual_seed(i)
        if dtype in (BF16, F16, F32):
            made[name] = torch.rand(shape, generator=generator).to(dtype) + 0.5
        else:
            made[name] = torch.randint(1, 100, (*shape, dtype.itemsize), generator=generator).to(U8).view(dtype)[..., 0]
    return made


def found(tmp_path: Path, shapes: Shapes, config: dict[str, Any] | None = None, **options: Any) -> Quantized:
    rest: Shapes = {"model.norm.weight": (BF16, (16,))}
    folder = write_model(tmp_path / "model", bytes_of({**shapes, **rest}), config=config, **options)
    return quantized(open_checkpoint(folder))


@pytest.mark.parametrize("which", FORMATS)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_format_is_told_by_what_is_stored(tmp_path: Path, which: str, shards: int) -> None:
    shapes, config, name, form, full = FORMATS[which]
    got = found(tmp_path, shapes, config, shards=shards)
    assert got.refused == {}
    assert {name: (str(ref.format), ref.shape) for name, ref in got.weights.items()} == {name: (form, full)}
    assert got.parts == dict.fromkeys((each for each in shapes if not each.endswith("_bias")), name)
