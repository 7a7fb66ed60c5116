"""Quantized models of real architectures: merged, loaded by transformers, and what transformers decodes itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import E8M0, Maker, ct, fp8, gpt_oss, int4, int8, mxfp4, numbers, nvfp4
from small_models import Tensors, normal, read_model, same, write_model

import ires_kernels as ik

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")
IDS = torch.arange(3, 27).view(2, 12)
COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 32, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
DEEPSEEK = COMMON | {
    "num_key_value_heads": 4, "moe_intermediate_size": 128, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 128, "kv_lora_rank": 96, "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "n_group": 1, "topk_group": 1,
}  # fmt: skip
GPT_OSS = COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
LINEAR = r"proj(_with_mqa)?\.weight$"

FAMILIES: dict[str, tuple[str, dict[str, Any], str, Maker, dict[str, Any]]] = {
    "DeepSeek-V3": ("DeepseekV3Config", DEEPSEEK, LINEAR, fp8(128, 128, "weight_scale_inv"), BLOCKS),
    "DeepSeek-V3.1": (
        "DeepseekV3Config", DEEPSEEK, LINEAR, fp8(128, 128, "weight_scale_inv", E8M0), BLOCKS | {"scale_fmt": "ue8m0"},
    ),
    "Qwen3": ("Qwen3Config", COMMON, LINEAR, fp8(128, 128, "weight_scale_inv", torch.bfloat16), BLOCKS),
    "gpt-oss": (
        "GptOssConfig", GPT_OSS, r"experts\.(gate_up|down)_proj$", gpt_oss,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]},
    ),
    "float-quantized": (
        "LlamaConfig", COMMON, LINEAR, fp8(1, 0, "weight_scale", torch.bfloat16),
        ct("float-quantized", "channel", 8, "float"),
    ),
    "int-quantized": ("LlamaConfig", COMMON, LINEAR, int8, ct("int-quantized", "channel", 8, "int")),
    "pack-quantized": (
        "LlamaConfig", COMMON, LINEAR, int4, ct("pack-quantized", "group", 4, "int", group_size=32),
    ),
    "nvfp4-pack-quantized": (
        "LlamaConfig", COMMON, LINEAR, nvfp4, ct("nvfp4-pack-quantized", "tensor_group", 4, "float", group_size=16),
    ),
    "mxfp4-pack-quantized": (
        "LlamaConfig", COMMON, LINEAR, mxfp4, ct("mxfp4-pack-quantized", "group", 4, "float", group_size=32),
    ),
}  # fmt: skip
ENCODED = ["DeepSeek-V3", "DeepSeek-V3.1", "Qwen3", "float-quantized", "int-quantized"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain(family: str, folder: Path) -> Path:
    """A model in bfloat16, as transformers saves it."""
    kind, settings, *_ = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def another(source: Path, folder: Path, seed: int) -> Path:
    """A relative of a model."""
    found = {
        name: (tensor.float() + normal(tensor.shape, 50 * seed + i, torch.float32, 2e-3)).to(tensor.dtype)
        for i, (name, tensor) in enumerate(read_model(source).items())
    }
    return write_model(folder, found, config=json.loads((source / "config.json").read_text()))


def quantized(family: str, source: Path, folder: Path) -> Path:
    _, _, which, make, settings = FAMILIES[family]
    stored: Tensors = {}
    for name, tensor in read_model(source).items():
        stored |= make(name, tensor) if re.search(which, name) else {name: tensor}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": settings}
    return write_model(folder, stored, config=config)


def load(folder: Path, dtype: Any = "auto") -> Any:
    """By transformers, decoded where it is quantized: there is no GPU here."""
    config = json.loads((folder / "config.json").read_text())
    method = config.get("quantization_config", {}).get("quant_method")
    how = {
        "fp8": lambda: transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128)),
        "mxfp4": lambda: transformers.Mxfp4Config(dequantize=True),
        "compressed-tensors": lambda: transformers.CompressedTensorsConfig(run_compressed=False),
        None: lambda: None,
    }[method]()
    options = {} if how is None else {"quantization_config": how}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(input_ids=IDS).logits


def written(like: Path, tensors: Tensors, folder: Path) -> Path:
    config = json.loads((like / "config.json").read_text())
    config.pop("quantization_config", None)
    return write_model(folder, {name: tensor.contiguous() for name, tensor in tensors.items()}, config=config)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_decodes_the_same_numbers(tmp_path: Path, family: str) -> None:
    base = quantized(family, plain(family, tmp_path / "plain"), tmp_path / "base")
    rounded = {name: tensor.bfloat16() for name, tensor in numbers(base).items()}
    assert torch.equal(logits(base), logits(written(base, rounded, tmp_path / "rounded")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_of_quantized_models_is_that_of_their_numbers(tmp_path: Path, family: str) -> None:
    """Where scales are powers of two no operation but the last one rounds: it is the merge in float64 as well."""
    origin = plain(family, tmp_path / "plain")
    target = another(origin, tmp_path / "target", 1)
    instruct = quantized(family, another(origin, tmp_path / "other", 2), tmp_path / "instruct")
    base = quantized(family, origin, tmp_path / "base")
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    t, i, b = (numbers(path) for path in (target, instruct, base))
    found = read_model(tmp_path / "out")
    assert found.keys() == t.keys()
    once = {n: (t[n].double() + (i[n].double() - b[n].double())).to(t[n].dtype) for n in t}
    each = {n: (t[n].float() + (i[n].float() - b[n].float())).to(t[n].dtype) for n in t}
    assert all(same(found[name], each[name]) for name in t)
    if family in ("DeepSeek-V3.1", "gpt-oss", "mxfp4-pack-quantized"):
        assert all(same(found[name], once[name]) for name in t)
    wanted = written(target, each, tmp_path / "wanted")
    assert torch.equal(logits(tmp_path / "out"), logits(wanted))


@pytest.mark.parametrize("family", ENCODED)
def test_a_quantized_target_loads_as_what_was_stored(tmp_path: Path, family: str) -> None:
    origin = plain(family, tmp_path / "plain")
    target = quantized(family, another(origin, tmp_path / "other", 1), tmp_path / "target")
    instruct = another(origin, tmp_path / "instruct", 2)
    ik.apply(target, (instruct, origin), out=tmp_path / "out", sync=False)
    rounded = {name: tensor.bfloat16() for name, tensor in numbers(tmp_path / "out").items()}
    found = logits(tmp_path / "out")
    assert torch.equal(found, logits(written(target, rounded, tmp_path / "rounded")))
    ik.apply(target, (instruct, origin), out=tmp_path / "plain out", sync=False, dtype="bf16")
    changed = shutil.copytree(target, tmp_path / "changed")
    ik.apply(changed, (instruct, origin), in_place=True, sync=False)
    assert (changed / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert not torch.equal(logits(target), found)
    assert (logits(tmp_path / "plain out") - found).abs().max() < (logits(target) - found).abs().max() * 2


def test_gpt_oss_as_a_target_becomes_bfloat16(tmp_path: Path) -> None:
    origin = plain("gpt-oss", tmp_path / "plain")
    target = quantized("gpt-oss", another(origin, tmp_path / "other", 1), tmp_path / "target")
    instruct = another(origin, tmp_path / "instruct", 2)
    ik.apply(target, (instruct, origin), out=tmp_path / "out", sync=False, dtype="bf16")
    t, i, b = (numbers(path) for path in (target, instruct, origin))
    wanted = {n: (t[n].float() + (i[n].float() - b[n].float())).bfloat16() for n in t}
    assert torch.equal(logits(tmp_path / "out"), logits(written(target, wanted, tmp_path / "wanted")))
