"""Quantized weights are found by their tensors, and confirmed by the settings; what is not whole is refused by name."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import write_model

from ires_kernels.backends import decoding, definition
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.schemes import Quantized, quantized
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.dtypes import STORAGE

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
    "MiniMax-M2": (
        {f"{X}.weight": (F8, (256, 300)), f"{X}.weight_scale_inv": (F32, (2, 3))},
        block("fp8", fmt="float8_e4m3fn", weight_block_size=[128, 128]),
        f"{X}.weight", "fp8-block 128 × 128", (256, 300),
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
    "FBGEMM experts": (
        {f"{E}.gate_up_proj": (F8, (3, 48, 96)), f"{E}.gate_up_proj_scale": (F32, (3, 1, 96))},
        block("fbgemm_fp8"), f"{E}.gate_up_proj", "fp8-block 48 × 1", (3, 48, 96),
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


def refusal(tmp_path: Path, shapes: Shapes, config: dict[str, Any] | None = None) -> str:
    got = found(tmp_path, shapes, config)
    assert got.weights == {}
    (reason,) = got.refused.values()
    return reason


W: Shapes = {f"{X}.weight": (F8, (576, 256))}
SCALED: Shapes = {**W, f"{X}.weight_scale_inv": (F32, (5, 2))}
PACKED: Shapes = {f"{X}.weight_packed": (I32, (48, 12)), f"{X}.weight_scale": (BF16, (48, 3))}
GPTQ_TENSORS = FORMATS["GPTQ"][0]
AWQ_TENSORS = FORMATS["AWQ"][0]
INT8 = groups("int-quantized", num_bits=8, type="int", strategy="channel")
BNB: Shapes = {f"{X}.weight": (U8, (48, 1)), f"{X}.weight.absmax": (F32, (2,)), f"{X}.weight.quant_map": (F32, (16,))}


@pytest.mark.parametrize(
    ("shapes", "config", "why"),
    [
        (W, FP8, f"{X}.weight has F8_E4M3 codes, and there is no scale of them in any file"),
        ({**W, f"{X}.weight_scale_inv": (F32, (5, 3))}, FP8,
         f"{X}.weight_scale_inv has the shape [5, 3] for the weight [576, 256], and by quantization_config in "
         "config.json blocks of 128 × 128 share a scale"),
        ({**W, f"{X}.weight_scale_inv": (F32, (9, 4))}, FP8,
         f"{X}.weight_scale_inv has the shape [9, 4] for the weight [576, 256], and by quantization_config in "
         "config.json blocks of 128 × 128 share a scale"),
        ({**W, f"{X}.weight_scale_inv": (F32, (1,))}, FP8,
         f"{X}.weight_scale_inv has the shape [1] for the weight [576, 256], and by quantization_config in "
         "config.json blocks of 128 × 128 share a scale"),
        ({f"{X}.weight": (F8, (192, 256)), f"{X}.weight_scale_inv": (F32, (2, 2))}, None,
         f"{X}.weight_scale_inv has 2 blocks for 192 rows or columns, and no settings say the sides of a block: wanted "
         "weight_block_size in the quantization_config of config.json"),
        ({"a.qkv_proj.weight": (F8, (96, 64)), "a.qkv_proj.weight_scale": (F32, (3, 1))}, block("fp8"),
         "a.qkv_proj.weight_scale has the shape [3, 1] for the weight [96, 64], and no settings say the sides of a "
         "block: wanted weight_block_size in the quantization_config of config.json"),
        ({**W, f"{X}.weight_scale_inv": (F32, (5, 2, 2))}, None,
         f"{X}.weight_scale_inv has the shape [5, 2, 2] for the weight [576, 256]"),
        ({**W, f"{X}.weight_scale_inv": (I32, (5, 2))}, FP8,
         f"{X}.weight_scale_inv is I32 [5, 2], wanted F32 or F16 or BF16 or F8_E8M0 or U8"),
        ({**SCALED, f"{X}.weight_scale": (F32, (5, 2))}, FP8,
         f"{X}.weight has the scales {X}.weight_scale_inv and {X}.weight_scale, wanted one"),
        ({**W, f"{X}.scale": (F32, ())}, None, f"{X}.scale is F32, wanted F8_E8M0, or another name: not decoded"),
        ({f"{X}.weight": (torch.float8_e5m2, (4, 4)), f"{X}.weight_scale": (F32, ())}, None,
         f"{X}.weight has F8_E5M2 codes with a scale of F32, {X}.weight_scale: not decoded"),
        (SCALED, INT8, "its tensors have the format fp8, and quantization_config in config.json says "
                       "int8 of 8 bits in blocks of 1 × all"),
        (FORMATS["compressed-tensors mxfp4"][0], block("quark"),
         "its tensors have the format mxfp4, and quantization_config in config.json says fp8"),
        (SCALED, {**FP8, "compression_config": INT8["quantization_config"]}, ""),
        (SCALED, block("hqq"), "quantization_config in config.json has the quant_method 'hqq', which is not decoded"),
        (SCALED, {"text_config": block("auto-round")},
         "text_config.quantization_config in config.json has the quant_method 'auto-round', which is not decoded"),
        (SCALED, block("fp8", fmt="e5m2"),
         "quantization_config in config.json has the fmt 'e5m2', which is not decoded"),
        (SCALED, groups("marlin-24"),
         "quantization_config in config.json has the format 'marlin-24', which is not decoded"),
        (SCALED, block("compressed-tensors", sparsity_config={"format": "sparse-24-bitmask"}),
         "quantization_config in config.json has the format 'sparse-24-bitmask', which is not decoded"),
        (SCALED, block("compressed-tensors", transform_config={"config_groups": {"R1": {}}}),
         "quantization_config in config.json has a transform_config: the weights are rotated, and are not those of a "
         "model that is not"),
        ({**SCALED, f"{X}.pre_quant_scale": (BF16, (256,))}, FP8,
         f"{X}.pre_quant_scale changes the weight besides its scale: not decoded"),
        (PACKED, None, f"there is no {X}.weight_shape in any file, which tells the columns of the weight"),
        ({f"{X}.weight_packed": (I32, (48, 12))}, None,
         f"{X}.weight_packed has I32 codes, and there is no {X}.weight_scale in any file"),
        ({**PACKED, f"{X}.weight": (BF16, (48, 96))},
         groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
         f"both {X}.weight and {X}.weight_packed are in the model, wanted one of them"),
        ({**PACKED, f"{X}.weight_zero_point": (I32, (48, 3))},
         groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
         f"{X}.weight_zero_point is I32 [48, 3], wanted I8 or I32 [6, 3]"),
        (PACKED, groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=64),
         f"there is no {X}.weight_shape in any file, which tells the columns of the weight"),
        ({f"{X}.weight_packed": (U8, (48, 48)), f"{X}.weight_scale": (F8, (48, 6))}, None,
         f"{X}.weight_packed has a scale of F8_E4M3 for each block, and 0 for all of it, wanted one: "
         f"{X}.weight_scale_2 or {X}.weight_global_scale"),
        ({f"{X}.weight_packed": (U8, (48, 48)), f"{X}.weight_scale": (F32, (48, 3))}, None,
         f"{X}.weight_packed has U8 codes with a scale of F32, {X}.weight_scale: not decoded"),
        ({f"{E}.down_proj": (U8, (3, 48, 96)), f"{E}.down_proj_weight_scale": (F8, (3, 6, 96)),
          f"{E}.down_proj_weight_scale_2": (F32, ())}, None,
         f"{E}.down_proj_weight_scale has the shape [3, 6, 96] for codes of the shape [3, 48, 96], wanted "
         "[3, 48, 192/16], which is that of a weight packed along its rows: not decoded"),
        ({f"{E}.down_proj_blocks": (U8, (3, 80, 2, 16)), f"{E}.down_proj_scales": (U8, (3, 80, 3))}, block("mxfp4"),
         f"{E}.down_proj_scales is U8 [3, 80, 3], wanted F8_E8M0 or U8 [3, 80, 2]"),
        (GPTQ_TENSORS, None,
         f"{X}.qweight has GPTQ codes, and there is no quantization_config in a config.json: wanted one that says "
         "2, 3, 4 or 8 bits"),
        (GPTQ_TENSORS, AWQ,
         "its tensors have the format gptq, and quantization_config in config.json says awq of 4 bits in blocks of 1 × "
         "32"),
        (PACKED, FP8,
         "its tensors have the format pack-quantized, and quantization_config in config.json says fp8 of 8 bits in "
         "blocks of 128 × 128"),
        ({f"{X}.weight": (F8, (256, 300)), f"{X}.weight_scale_inv": (F32, (2, 3))}, block("mxfp4"),
         "its tensors have the format fp8, and quantization_config in config.json says mxfp4 of 4 bits"),
        (GPTQ_TENSORS, block("gptq", bits=4, group_size=64),
         f"{X}.scales has 3 groups for 96 columns, and by quantization_config in config.json groups have 64"),
        (GPTQ_TENSORS, block("gptq", bits=4, group_size=32, checkpoint_format="marlin"),
         "quantization_config in config.json has the checkpoint_format 'marlin', which is not decoded"),
        ({name: each for name, each in GPTQ_TENSORS.items() if "qzeros" not in name}, GPTQ,
         f"{X}.qweight has I32 codes, and there is no {X}.qzeros in any file"),
        (AWQ_TENSORS, block("awq", bits=4, version="gemv"),
         "quantization_config in config.json has the AWQ version 'gemv', of which only gemm is decoded"),
        (BNB, None, f"{X}.weight has U8 codes, and there is no {X}.weight.quant_state.bitsandbytes__nf4 in any file"),
        ({**BNB, f"{X}.weight.quant_state.bitsandbytes__nf4": (U8, (9,))}, None,
         f"{X}.weight.quant_state.bitsandbytes__nf4 is not a JSON object"),
    ],
)  # fmt: skip
def test_what_is_not_whole_or_not_decoded_is_refused_by_name(
    tmp_path: Path, shapes: Shapes, config: dict[str, Any] | None, why: str
) -> None:
    if not why:
        assert found(tmp_path, shapes, config).refused == {}
    else:
        assert refusal(tmp_path, shapes, config) == why


def test_of_a_shard_alone_the_scale_is_elsewhere(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", bytes_of(SCALED), config=FP8, shards=2)
    got = quantized(open_checkpoint(folder / "model-00001-of-00002.safetensors"))
    why = f"{X}.weight_scale_inv, which belongs to it, is in another shard. Give the model's folder"
    assert got.refused == {f"{X}.weight": why}


def test_float8_without_a_scale_is_a_number_where_no_settings_say_otherwise(tmp_path: Path) -> None:
    got = found(tmp_path, {**W, "model.layers.0.scale": (F32, ()), "model.position": (U8, (4,))})
    assert (got.weights, got.refused, got.parts) == ({}, {}, {})


def test_settings_of_other_files_count(tmp_path: Path) -> None:
    table = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    files = {"hf_quant_config.json": json.dumps(table)}
    got = found(tmp_path, SCALED, files=files)
    said = "quantization in hf_quant_config.json says nvfp4"
    assert got.refused == {f"{X}.weight": f"its tensors have the format fp8, and {said}"}


STATE = f"{X}.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ('{"blocksize": 64, "shape": [48, 2]}', ""),
        ("[" * 60_000, f"{STATE} is not a JSON object"),
        ('{"blocksize": 64, "shape": [48, -2]}', f"{STATE} says no shape and blocksize"),
        ('{"blocksize": 0, "shape": [48, 2]}', f"{STATE} says no shape and blocksize"),
        (f'{{"blocksize": {1 << 70}, "shape": [48, 2]}}', f"{STATE} says no shape and blocksize"),
        ('{"blocksize": 64, "shape": [48, 4]}', f"{X}.weight has 48 bytes, wanted 96 for [48, 4]"),
        ('{"blocksize": 32, "shape": [48, 2]}', f"{X}.weight.absmax is F32 [2], wanted F32 [3]"),
    ],
)
def test_what_bitsandbytes_says_of_a_weight_has_to_fit(tmp_path: Path, state: str, why: str) -> None:
    text = torch.frombuffer(bytearray(state.encode()), dtype=U8)
    got = quantized(open_checkpoint(write_model(tmp_path / "model", {**bytes_of(BNB), STATE: text})))
    assert got.refused == ({f"{X}.weight": why} if why else {})
    assert got.parts.keys() >= {f"{X}.weight", STATE}


def test_one_of_several_formats_is_enough(tmp_path: Path) -> None:
    weights = [{"num_bits": 8, "type": "float", "strategy": "channel"},
               {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}]  # fmt: skip
    several = {f"group_{i}": {"weights": each} for i, each in enumerate(weights)}
    config = block("compressed-tensors", format="mixed-precision", config_groups=several)
    channel: Shapes = {"a.weight": (F8, (48, 96)), "a.weight_scale": (BF16, (48, 1))}
    got = found(tmp_path, {**channel, **PACKED}, config)
    assert {name: str(ref.format) for name, ref in got.weights.items()} == {
        "a.weight": "fp8-channel", f"{X}.weight": "pack-quantized 4 bits in groups of 32"
    }  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4, None])
def test_bits_of_less_than_a_word_are_those_that_settings_say(tmp_path: Path, bits: int | None) -> None:
    stored = {f"{X}.weight_packed": torch.zeros(48, 1, dtype=I32), f"{X}.weight_scale": torch.ones(48, 1, dtype=BF16)}
    stored[f"{X}.weight_shape"] = torch.tensor([48, 8])
    config = groups("pack-quantized", num_bits=bits, type="int", strategy="channel") if bits else None
    got = quantized(open_checkpoint(write_model(tmp_path / "model", stored, config=config)))
    assert [ref.format.bits for ref in got.weights.values()] == ([bits] if bits else [])
    if not bits:
        assert "has one word for 8 columns, and nothing tells the bits of each" in f"{got.refused}"


def test_old_exponents_of_compressed_tensors_are_lifted(tmp_path: Path) -> None:
    shapes, config, name, _, _ = FORMATS["compressed-tensors mxfp4"]
    assert config is not None
    config["quantization_config"] |= {"version": "0.13.0"}
    assert found(tmp_path, shapes, config).weights[name].format.number("lift") == 2


def test_settings_of_any_shape_end_in_no_other_way(tmp_path: Path) -> None:
    """What is in config.json comes from others: nothing in it ends the search but a reason."""
    odd: list[Any] = [
        None,
        1,
        -1,
        1 << 70,
        "x",
        "0x0",
        [],
        [0, 0],
        [1 << 70, 1 << 70],
        [128, "a"],
        {},
        {"a": 1},
        True,
        1.5,
        [[1]],
        {"b": {"c": []}},
    ]
    keys = ("weight_block_size", "config_groups", "format", "fmt", "version", "bits", "group_size", "quant_algo",
            "sparsity_config", "transform_config", "checkpoint_format", "quantized_layers", "expert_dtype")  # fmt: skip
    methods = ("fp8", "compressed-tensors", "modelopt", "gptq", "awq", "bitsandbytes", "", None, 3, [1], {"a": 1})
    draw = random.Random(0)
    shapes = {**SCALED, **{f"p.{name}": each for name, each in PACKED.items()}}
    shapes |= {f"m.{name}": each for name, each in GPTQ_TENSORS.items()}
    folder = write_model(tmp_path / "model", bytes_of(shapes), config={})
    for _ in range(150):
        settings = {key: draw.choice(odd) for key in draw.sample(keys, 5)}
        inner = {
            key: draw.choice([*odd, "group", "int", "float"]) for key in ("num_bits", "type", "strategy", "group_size")
        }
        if draw.random() < 0.5:
            settings["config_groups"] = {"g": draw.choice([{"weights": inner}, {"weights": 1}, 1, {"format": 2}])}
        if draw.random() < 0.9:
            settings["quant_method"] = draw.choice(methods)
        (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
        got = quantized(open_checkpoint(folder))
        assert len(got.weights) + len(got.refused) == 3
        for weight in got.weights.values():
            assert all(isinstance(each, str) or abs(each) < 1 << 31 for _, each in weight.format.settings)


SHAPES = [
    (),
    (1,),
    (3,),
    (48,),
    (96,),
    (0, 4),
    (48, 1),
    (1, 48),
    (48, 3),
    (3, 48),
    (48, 96),
    (12, 48),
    (1, 1),
    (3, 1, 1),
]
DTYPES = ["F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "F32", "BF16", "F8_E8M0", "I64", "F4"]


@pytest.mark.parametrize("which", FORMATS)
def test_whatever_is_taken_for_a_weight_has_all_that_decoding_reads(which: str) -> None:
    """Each tensor of a format is lost, or gets another dtype or shape; what is left is refused, or can be decoded."""
    shapes, config, _, _, _ = FORMATS[which]
    blocks = {"settings": config["quantization_config"]} if config else {}
    known = {getattr(torch, dtype.torch): dtype.name for dtype in STORAGE.values() if hasattr(torch, dtype.torch)}
    right = {name: (known[dtype], shape) for name, (dtype, shape) in shapes.items()}
    for name, (dtype, shape) in right.items():
        others = [(dtype, other) for other in SHAPES] + [(other, shape) for other in DTYPES]
        for changed in ({}, *({name: other} for other in others)):
            stored = {**{key: each for key, each in right.items() if key != name}, **changed}
            refs = {
                key: TensorRef(
                    key, dtype, shape, Path("/model.safetensors"), 0, math.prod(shape) * STORAGE[dtype].bits // 8
                )
                for key, (dtype, shape) in stored.items()
            }
            model = Checkpoint(Path("/"), "model", (), refs, None, {}, None, None, blocks=blocks)
            try:
                got = quantized(model)
            except FileNotFoundError:  # what tells the shape of such a weight is in the file
                continue
            for weight in got.weights.values():
                parts = {part: memoryview(bytearray(ref.nbytes)) for part, ref in weight.parts}
                begin, size = weight.span(0, weight.numel)
                assert begin == 0
                assert size <= weight.codes.nbytes
                parts["codes"] = parts["codes"][:size]
                definition.define(weight.format, weight.full, 0, weight.numel, parts, torch.empty(weight.numel))
                decoding.decode(weight.format, weight.full, 0, weight.numel, parts, torch.empty(weight.numel))


def test_of_two_spellings_of_a_model_each_has_its_own_settings(tmp_path: Path) -> None:
    """Mistral's files lie beside those for transformers, in which the weights may be plain."""
    files = {"params.json": json.dumps({"dim": 16, "quantization": {"qformat_weight": "fp8_e4m3"}})}
    plain: Shapes = {f"{X}.weight": (BF16, (48, 96))}
    folder = write_model(tmp_path / "model", bytes_of(plain), config={"model_type": "mistral"}, files=files)
    save_file(bytes_of(FORMATS["Mistral"][0]), folder / "consolidated.safetensors")
    model = open_checkpoint(folder)
    assert (model.quantization, model.beside) == ("", ("consolidated.safetensors",))
    other = open_checkpoint(folder / "consolidated.safetensors")
    assert other.quantization == "quantization in params.json"
    assert {f"{weight.format}" for weight in quantized(other).weights.values()} == {"fp8-tensor"}
