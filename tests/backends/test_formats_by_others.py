"""Quantized weights are the numbers that the libraries say which wrote their formats, bit for bit.

Each model lies on a disk as published ones do, in two shards, so that scales are in another file than their codes.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoded import weights
from oracle import assert_same
from small_models import write_model
from torch import Tensor

from ires_kernels.checkpoints.schemes import quantized
from ires_kernels.checkpoints.validation import open_checkpoint

F8, U8, I8, I32 = torch.float8_e4m3fn, torch.uint8, torch.int8, torch.int32
BF16, F16, F32, E8M0 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e8m0fnu
X = "model.layers.0.mlp.up_proj"
E = "model.layers.0.mlp.experts"

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries, some of which warn when they are imported


@pytest.fixture(scope="module")
def transformers_fp8() -> Any:
    return pytest.importorskip("transformers.integrations.finegrained_fp8", exc_type=ImportError)


@pytest.fixture(scope="module")
def compressed() -> Any:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import compressors, quantization

    return SimpleNamespace(quantization=quantization, compressors=compressors)


@pytest.fixture(scope="module")
def modelopt() -> Any:
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
    import modelopt.torch.quantization.qtensor as tensors

    return tensors


@pytest.fixture(scope="module")
def bitsandbytes() -> Any:
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional as functional

    return functional


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Any bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.int64).to(U8)


def scale(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    """Scales like those of weights, some of them far smaller."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.rand(shape, generator=generator, dtype=torch.float64) * 1e-3 + 1e-5
    if dtype == E8M0:
        return draw(*shape, seed=seed).clamp(max=254).view(E8M0)
    small = torch.rand(shape, generator=generator) < 0.1
    return torch.where(small, made * 2.0**-112 if dtype != F16 else made * 0.02, made).to(dtype)


def decoded(tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> Tensor:
    """The one quantized weight of a model."""
    rest = {"model.norm.weight": torch.ones(4, dtype=BF16)}
    folder = write_model(tmp_path / "model", {**tensors, **rest}, shards=2, config=config)
    (weight,) = weights(folder).values()
    return weight


def block(method: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **settings}}


# transformers


@pytest.mark.parametrize("dtype", [F32, BF16, E8M0, U8])
@pytest.mark.parametrize(("side", "full"), [(128, (256, 384)), (32, (64, 96)), (128, (3, 256, 128))])
def test_fp8_blocks_are_those_of_transformers(
    tmp_path: Path, transformers_fp8: Any, dtype: torch.dtype, side: int, full: tuple[int, ...]
) -> None:
    grid = (*full[:-2], full[-2] // side, full[-1] // side)
    scales = scale(*grid, dtype=E8M0 if dtype == U8 else dtype)
    codes = draw(*full).view(F8)
    dequantize = transformers_fp8.Fp8Dequantize(None)
    wanted = dequantize._dequantize_one(codes, scales.view(U8) if dtype == U8 else scales, torch.float32)
    name = f"{X}.weight" if len(full) == 2 else f"{E}.down_proj"
    tensors = {name: codes, f"{name}_scale_inv": scales.view(U8) if dtype == U8 else scales}
    assert_same(decoded(tmp_path, tensors, block("fp8", weight_block_size=[side, side])), wanted)


def test_every_code_with_every_exponent_is_that_of_transformers(tmp_path: Path, transformers_fp8: Any) -> None:
    codes = torch.arange(256).to(U8).repeat(255, 1).view(F8)
    scales = torch.arange(255).to(U8)[:, None].repeat(1, 8)
    wanted = transformers_fp8.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    got = decoded(tmp_path, {f"{X}.weight": codes, f"{X}.weight_scale_inv": scales}, block("mxfp8"))
    assert_same(got, wanted)
    assert got[0, 0x38] == 2.0**-127  # the smallest scale times 1
    assert got[0, 1] == 2.0**-136  # times 2^-9


def test_experts_of_deepseek_v4_are_those_of_transformers(tmp_path: Path, transformers_fp8: Any) -> None:
    codes, scales = draw(64, 48).view(I8), scale(64, 3, dtype=E8M0)
    wanted = transformers_fp8.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    config = {**block("fp8", weight_block_size=[128, 128]), "expert_dtype": "fp4"}
    assert_same(decoded(tmp_path, {f"{E}.0.w1.weight": codes, f"{E}.0.w1.scale": scales}, config), wanted)


def test_experts_of_gpt_oss_are_those_of_transformers(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", exc_type=ImportError)
    blocks = torch.arange(256).to(U8).view(1, 1, 16, 16).repeat(5, 51, 1, 1)
    scales = torch.arange(255).to(U8).view(5, 51, 1).repeat(1, 1, 16)
    wanted = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    got = decoded(tmp_path, {f"{E}.down_proj_blocks": blocks, f"{E}.down_proj_scales": scales}, block("mxfp4"))
    assert got.shape == (5, 512, 51)
    assert_same(got, wanted)


# compressed-tensors


def by_compressed_tensors(
    tmp_path: Path, compressed: Any, form: str, compressor: str, tensors: dict[str, Tensor], **arguments: Any
) -> None:
    """What compressed-tensors makes of a module, in the dtype that it does it in, is what we make of the file."""
    scheme = compressed.quantization.QuantizationScheme(
        targets=["Linear"], weights=compressed.quantization.QuantizationArgs(**arguments)
    )
    wanted = getattr(compressed.compressors, compressor).decompress(dict(tensors), scheme)["weight"]
    weights = {key: value for key, value in arguments.items() if key not in ("scale_dtype", "zp_dtype")}
    config = block("compressed-tensors", format=form, config_groups={"group_0": {"weights": weights}}, version="0.20.0")
    got = decoded(tmp_path, {f"{X}.{name}": tensor for name, tensor in tensors.items()}, config)
    assert_same(got.to(wanted.dtype), wanted)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((1,), {"strategy": "tensor"}),
        ((150, 1), {"strategy": "channel"}),
        ((2, 3), {"strategy": "block", "block_structure": [128, 128]}),
    ],
)
def test_fp8_of_compressed_tensors(
    tmp_path: Path, compressed: Any, dtype: torch.dtype, shape: tuple[int, ...], arguments: dict[str, Any]
) -> None:
    tensors = {"weight": draw(150, 384).view(F8), "weight_scale": scale(*shape, dtype=dtype)}
    arguments = {"num_bits": 8, "type": "float", **arguments}
    by_compressed_tensors(tmp_path, compressed, "float-quantized", "FloatQuantizationCompressor", tensors, **arguments)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "strategy"), [((1,), "tensor"), ((50, 1), "channel")])
def test_int8_of_compressed_tensors(
    tmp_path: Path, compressed: Any, dtype: torch.dtype, symmetric: bool, shape: tuple[int, ...], strategy: str
) -> None:
    tensors = {"weight": draw(50, 77).view(I8), "weight_scale": scale(*shape, dtype=dtype)}
    if not symmetric:
        tensors["weight_zero_point"] = draw(*shape, seed=1).view(I8)
    arguments = {"num_bits": 8, "type": "int", "strategy": strategy, "symmetric": symmetric}
    by_compressed_tensors(tmp_path, compressed, "int-quantized", "IntQuantizationCompressor", tensors, **arguments)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "groups"), [(96, 3), (83, 1)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_packed_integers_of_compressed_tensors(
    tmp_path: Path, compressed: Any, bits: int, symmetric: bool, width: int, groups: int, dtype: torch.dtype
) -> None:
    words = -(-width * bits // 32)
    tensors = {
        "weight_packed": draw(50, 4 * words).view(I32),
        "weight_scale": scale(50, groups, dtype=dtype),
        "weight_shape": torch.tensor([50, width]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = draw(-(-50 * bits // 32), 4 * groups, seed=1).view(I32)
    strategy = {"strategy": "group", "group_size": 32} if groups > 1 else {"strategy": "channel"}
    arguments = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    by_compressed_tensors(tmp_path, compressed, "pack-quantized", "PackedQuantizationCompressor", tensors, **arguments)


def test_nvfp4_of_compressed_tensors(tmp_path: Path, compressed: Any) -> None:
    scales = draw(60, 6) & 0x7F
    tensors = {
        "weight_packed": draw(60, 48),
        "weight_scale": torch.where(scales == 0x7F, 1, scales).to(U8).view(F8),
        "weight_global_scale": torch.tensor([2688 / 0.0731]),
    }
    arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    by_compressed_tensors(tmp_path, compressed, "nvfp4-pack-quantized", "NVFP4PackedCompressor", tensors, **arguments)


@pytest.mark.parametrize(("form", "compressor"), [("mxfp4-pack-quantized", "MXFP4PackedCompressor"),
                                                  ("mxfp8-quantized", "MXFP8QuantizationCompressor")])  # fmt: skip
def test_microscales_of_compressed_tensors(tmp_path: Path, compressed: Any, form: str, compressor: str) -> None:
    four = form.startswith("mxfp4")
    exponents = torch.arange(255).to(U8)[:, None].repeat(1, 16 if four else 8)
    codes = torch.arange(256).to(U8).repeat(255, 1)
    tensors = {"weight_packed": codes} if four else {"weight": codes.view(F8)}
    tensors["weight_scale"] = exponents
    arguments = {"num_bits": 4 if four else 8, "type": "float", "strategy": "group", "group_size": 32}
    by_compressed_tensors(tmp_path, compressed, form, compressor, tensors, **arguments)


PRESETS = [
    *(("W4A16", "pack-quantized 4 bits in groups of 128"), ("W4A16_ASYM", "pack-quantized 4 bits in groups of 128")),
    *(("W8A16", "pack-quantized 8 bits in groups of 128"), ("INT8", "int8-channel"), ("FP8", "fp8-tensor")),
    *(
        ("FP8_DYNAMIC", "fp8-channel"),
        ("NVFP4", "nvfp4"),
        ("NVFP4A16", "nvfp4"),
        ("MXFP4", "mxfp4"),
        ("MXFP8", "mxfp8"),
    ),
]


@pytest.mark.parametrize(("preset", "form"), PRESETS)
def test_whole_models_that_compressed_tensors_wrote(tmp_path: Path, compressed: Any, preset: str, form: str) -> None:
    """Names, shapes and settings are those of the library, and so are the numbers that it makes of its own model."""
    transformers = pytest.importorskip("transformers")
    q = compressed.quantization
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    scheme = q.preset_name_to_scheme(preset, ["Linear"])
    settings = q.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="frozen")
    q.apply_quantization_config(model, settings)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            calibrate(module, module.quantization_scheme.weights, q.utils.calculate_qparams)
    compressor = compressed.compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    compressor.update_config(tmp_path / "model")

    found = quantized(open_checkpoint(tmp_path / "model"))
    assert {f"{weight.format}" for weight in found.weights.values()} == {form}
    compressor.decompress_model(model)
    wanted = model.state_dict()
    got = weights(tmp_path / "model")
    assert len(got) == 7
    for name, weight in got.items():
        assert_same(weight.to(wanted[name].dtype), wanted[name])


def calibrate(module: Any, arguments: Any, parameters: Any) -> None:
    """Scales of a layer by the smallest and largest of its weights, as the library makes them of these."""
    weight, strategy = module.weight.data, arguments.strategy
    if strategy == "tensor":
        low, high = weight.min()[None], weight.max()[None]
    else:
        across = weight.view(len(weight), -1, arguments.group_size or weight.shape[1])
        low, high = across.amin(-1), across.amax(-1)
    shared = None
    if strategy == "tensor_group":
        shared = module.weight_global_scale.data = (2688 / weight.abs().max().float())[None]
    scale, zero = parameters(low, high, arguments, global_scale=shared)
    module.weight_scale.data = scale.to(module.weight_scale.dtype)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)


# ModelOpt


def test_fp8_blocks_of_modelopt(tmp_path: Path, modelopt: Any) -> None:
    codes, scales = draw(150, 300).view(F8), scale(2, 3)
    made = modelopt.FP8QTensor(torch.Size((150, 300)), F32, codes)
    wanted = made.dequantize(scale=scales, block_sizes={-1: 128, -2: 128})
    tensors = {f"{X}.weight": codes, f"{X}.weight_scale": scales.view(2, 1, 3, 1)}
    assert_same(decoded(tmp_path, tensors, block("modelopt", quant_algo="FP8_PB_WO")), wanted)


def test_nvfp4_of_modelopt(tmp_path: Path, modelopt: Any) -> None:
    codes, second = draw(60, 48), torch.tensor(0.0731 / 2688)
    scales = draw(60, 6) & 0x7F
    scales = torch.where(scales == 0x7F, 1, scales).to(U8).view(F8)
    made = modelopt.NVFP4QTensor(torch.Size((60, 96)), F32, codes)
    wanted = made.dequantize(scale=scales, double_scale=second, block_sizes={-1: 16})
    tensors = {f"{X}.weight": codes, f"{X}.weight_scale": scales, f"{X}.weight_scale_2": second}
    got = decoded(tmp_path, tensors, block("modelopt", quant_algo="NVFP4"))
    assert torch.equal(got, wanted)  # of code 8, which is -0, ModelOpt makes +0


def test_microscales_of_modelopt(tmp_path: Path, modelopt: Any) -> None:
    codes = torch.arange(256).to(U8).repeat(255, 1).view(F8)
    scales = torch.arange(255).to(U8)[:, None].repeat(1, 8)
    made = modelopt.MXFP8QTensor(torch.Size((255, 256)), F32, codes)
    tensors = {f"{X}.weight": codes, f"{X}.weight_scale": scales}
    assert_same(decoded(tmp_path, tensors, block("modelopt", quant_algo="MXFP8")), made.dequantize(scale=scales))


# bitsandbytes


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [U8, BF16])
def test_4_bits_of_bitsandbytes(
    tmp_path: Path, bitsandbytes: Any, kind: str, nested: bool, storage: torch.dtype
) -> None:
    weight = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    # Of rows that are no whole number of blocks, its CPU kernel takes other blocks than it wrote.
    codes, state = bitsandbytes.quantize_4bit(
        weight, quant_type=kind, compress_statistics=nested, blocksize=64, quant_storage=storage
    )
    tensors = {
        f"{X}.weight": codes,
        **{f"{X}.weight.{part}": each for part, each in state.as_dict(packed=True).items()},
    }
    got = decoded(tmp_path, tensors, block("bitsandbytes", load_in_4bit=True))
    assert_same(got, bitsandbytes.dequantize_4bit(codes, state))


def test_int8_of_bitsandbytes(tmp_path: Path, bitsandbytes: Any) -> None:
    codes, scales = draw(50, 96).view(I8), scale(50)
    tensors = {f"{X}.weight": codes, f"{X}.SCB": scales, f"{X}.weight_format": torch.tensor(0, dtype=U8)}
    got = decoded(tmp_path, tensors, block("bitsandbytes", load_in_8bit=True))
    assert_same(got, bitsandbytes.int8_vectorwise_dequant(codes, scales))
