"""Codes of quantized weights are told from numbers however they are called, and a quantized module is one thing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Tensors, normal, read_model, tensors, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.cli import main
from ires_kernels.planning.quantized import parts

F8, U8, I8, I16, I32, I64 = torch.float8_e4m3fn, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64
BF16, F16, F32, E8M0 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e8m0fnu
X = "model.layers.0.mlp.up_proj"
E = "model.layers.0.mlp.experts"

FORMATS: dict[str, dict[str, torch.dtype]] = {
    "DeepSeek": {f"{X}.weight": F8, f"{X}.weight_scale_inv": F32},
    "DeepSeek-V4": {f"{X}.weight": I8, f"{X}.scale": E8M0},
    "Mistral": {f"{X}.weight": F8, f"{X}.qscale_weight": BF16, f"{X}.qscale_act": BF16},
    "Mistral for transformers": {f"{X}.weight": F8, f"{X}.weight_scale_inv": BF16, f"{X}.activation_scale": BF16},
    "compressed-tensors fp8": {f"{X}.weight": F8, f"{X}.weight_scale": BF16, f"{X}.input_scale": BF16},
    "compressed-tensors int8": {f"{X}.weight": I8, f"{X}.weight_scale": BF16, f"{X}.weight_zero_point": I8},
    "compressed-tensors packed": {
        f"{X}.weight_packed": I32, f"{X}.weight_scale": BF16, f"{X}.weight_shape": I64, f"{X}.weight_zero_point": I32,
        f"{X}.weight_g_idx": I32,
    },
    "compressed-tensors nvfp4": {f"{X}.weight_packed": U8, f"{X}.weight_scale": F8, f"{X}.weight_global_scale": F32},
    "ModelOpt nvfp4": {f"{X}.weight": U8, f"{X}.weight_scale": F8, f"{X}.weight_scale_2": F32, f"{X}.input_scale": F32},
    "ModelOpt fused experts": {f"{E}.gate_up_proj": F8, f"{E}.gate_up_proj_weight_scale": F32},
    "fused experts": {f"{E}.down_proj": F8, f"{E}.down_proj_scale_inv": F32, f"{E}.down_proj_activation_scale": F32},
    "ModelOpt not exported": {
        f"{X}.weight": F8, f"{X}.weight_quantizer._scale": F32, f"{X}.weight_quantizer._amax": BF16,
        f"{X}.input_quantizer._amax": F32,
    },
    "ComfyUI": {f"{X}.weight": F8, f"{X}.scale_weight": F32, f"{X}.scale_input": F32},
    "MXFP8": {f"{X}.weight": F8, f"{X}.weight_scale": U8},
    "gpt-oss": {f"{E}.gate_up_proj_blocks": U8, f"{E}.gate_up_proj_scales": U8},
    "bitsandbytes int8": {f"{X}.weight": I8, f"{X}.SCB": F32, f"{X}.weight_format": U8},
    "bitsandbytes nf4": {
        f"{X}.weight": U8, f"{X}.weight.absmax": U8, f"{X}.weight.quant_map": F32, f"{X}.weight.nested_absmax": F32,
        f"{X}.weight.quant_state.bitsandbytes__nf4": U8,
    },
    "bitsandbytes nf4 in bfloat16": {f"{X}.weight": BF16, f"{X}.weight.absmax": F32, f"{X}.weight.quant_map": F32},
    "GPTQ": {f"{X}.qweight": I32, f"{X}.qzeros": I32, f"{X}.scales": F16, f"{X}.g_idx": I32},
    "AWQ": {f"{X}.qweight": I32, f"{X}.qzeros": I32, f"{X}.scales": F16},
    "AQLM": {f"{X}.codes": I16, f"{X}.codebooks": F16, f"{X}.scales": F16},
    "VPTQ": {f"{X}.indices": I16, f"{X}.centroids.weight": F16, f"{X}.weight_scale": F16},
    "HQQ": {f"{X}.W_q": U8, f"{X}.scale": F16, f"{X}.zero": F16},
    "quanto": {
        f"{X}.weight._data": F8, f"{X}.weight._scale": BF16, f"{X}.input_scale": BF16, f"{X}.output_scale": BF16,
    },
    "quanto int4": {f"{X}.weight._data._data": U8, f"{X}.weight._scale": BF16, f"{X}.weight._shift": BF16},
    "torchao": {f"{X}._weight_qdata": F8, f"{X}._weight_scale": F32, f"{X}._weight_zero_point": F32},
    "FBGEMM": {f"{X}.weight": F8, f"{X}.weight_scale": F32, f"{X}.input_scale_ub": F32},
    "a scale after the module's name": {f"{X}.weight": F8, f"{X}_scale": F32},
    "a scale after the weight's name": {f"{X}.weight": F8, f"{X}.weight.scale_of_tomorrow": F32},
}  # fmt: skip


def codes(dtypes: dict[str, torch.dtype], seed: int) -> Tensors:
    """Bytes of codes, and floats for scales, of shapes that fit no codes; other ones for every seed."""
    made = {}
    for i, (name, dtype) in enumerate(dtypes.items()):
        generator = torch.Generator().manual_seed(100 * seed + i)
        if dtype in (BF16, F16, F32):
            shape = (4, 4) if name.endswith((".weight", ".bias")) else (3, 4)
            made[name] = torch.rand(shape, generator=generator).to(dtype) + 0.5
        else:
            rows = 3 if name.endswith("scale") else 4
            raw = torch.randint(1, 100, (rows, 4 * dtype.itemsize), generator=generator).to(U8)
            made[name] = raw.view(dtype)
    return made


def models(root: Path, *quantized: dict[str, torch.dtype], **options: Any) -> list[Path]:
    """Folders target, instruct and base, of which so many first ones are quantized in part; the others in bfloat16."""
    paths = []
    for seed, role in enumerate(("target", "instruct", "base")):
        wanted = quantized[seed] if seed < len(quantized) else {f"{X}.weight": BF16}
        paths.append(write_model(root / role, {**tensors(seed + 1), **codes(wanted, seed)}, **options))
    return paths


def refused(target: Path, instruct: Path, base: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        ik.apply(target, (instruct, base), out=target.parent / "out", sync=False, **options)
    with pytest.raises(CheckpointError):
        ik.extract(base, instruct, target.parent / "out", sync=False, **options)
    assert not (target.parent / "out").exists()
    return f"{caught.value}"


@pytest.mark.parametrize("name", FORMATS)
def test_no_format_is_taken_for_numbers_and_skipping_any_part_skips_all(tmp_path: Path, name: str) -> None:
    wanted = FORMATS[name]
    paths = models(tmp_path, wanted, wanted, wanted)
    text = refused(*paths)
    assert "codes" in text or "packed quantized weights" in text
    assert "Arithmetic on codes is meaningless" in text
    assert parts(open_checkpoint(paths[0])).keys() == wanted.keys()
    own = read_model(paths[0])
    for part in wanted:
        out = tmp_path / "out" / part
        out.parent.mkdir(exist_ok=True)
        report = ik.apply(paths[0], (paths[1], paths[2]), out=out, sync=False, skip=f"^{part.replace('.', '[.]')}$")
        found = read_model(out)
        changed = {n for n in own if not torch.equal(own[n].view(U8), found[n].view(U8))}
        assert changed == {*tensors(1)}, f"skipping {part}"
        assert report.copied.keys() == wanted.keys()  # type: ignore[union-attr]
    ik.extract(paths[2], paths[1], tmp_path / "residual", sync=False, skip=next(iter(wanted)).replace(".", "[.]"))
    assert read_model(tmp_path / "residual").keys() == tensors(1).keys()


@pytest.mark.parametrize(
    "name", [name for name, wanted in FORMATS.items() if any(part.startswith(X) for part in wanted)]
)
@pytest.mark.parametrize("role", [0, 1])
def test_one_quantized_model_among_others_is_refused_for_that(tmp_path: Path, name: str, role: int) -> None:
    """Also where missing tensors are allowed: neither its scales nor the weights of the others go in alone."""
    wanted = FORMATS[name]
    paths = models(tmp_path, *([{f"{X}.weight": BF16}] * role), wanted)
    for options in ({}, {"allow_missing": True}):
        with pytest.raises(CheckpointError) as caught:
            ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False, **options)
        text = f"{caught.value}"
        assert "Arithmetic on codes is meaningless" in text
        assert "--allow-missing" not in text
        assert f"of {('target', 'instruct')[role]} (" in text
    ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False, skip="up_proj")
    own, found = read_model(paths[0]), read_model(tmp_path / "out")
    assert {n for n in own if not torch.equal(own[n].view(U8), found[n].view(U8))} == {*tensors(1)}


@pytest.mark.parametrize(
    ("file", "table", "says"),
    [
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config in config.json"),
        ("config.json", {"compression_config": {"format": "x"}}, "compression_config in config.json"),
        (
            "config.json",
            {"text_config": {"quantization_config": {"a": 1}}},
            "text_config.quantization_config in config",
        ),
        ("params.json", {"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization in params.json"),
        ("params.json", {"quantization_config": {"a": 1}}, "quantization_config in params.json"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}, "quantization in hf_quant_config.json"),
        ("quantize_config.json", {"bits": 8}, "by quantize_config.json"),
    ],
)
@pytest.mark.parametrize("dtype", [F8, U8, I32])
def test_what_the_settings_call_quantized_is_no_number(
    tmp_path: Path, file: str, table: dict[str, Any], says: str, dtype: torch.dtype
) -> None:
    wanted = {f"{X}.weight": dtype}
    paths = models(tmp_path, wanted, wanted, wanted)
    for path in paths:
        (path / file).write_text(json.dumps(table))
    assert says in refused(*paths)
    single = [path / "model.safetensors" for path in paths]
    with pytest.raises(CheckpointError, match="codes, by"):
        ik.apply(single[0], (single[1], single[2]), in_place=True, sync=False)


def test_a_scale_in_another_shard_counts_also_for_a_shard_alone(tmp_path: Path) -> None:
    wanted = {f"{X}.weight": F8}
    paths = []
    for seed, role in enumerate(("target", "instruct", "base")):
        made = {**codes(wanted, seed), **tensors(seed), **codes({f"{X}.weight_scale_inv": F32}, seed)}
        paths.append(write_model(tmp_path / role, made, shards=3))
    assert "F8_E4M3 codes whose scale is" in refused(*paths)
    shards = [path / "model-00001-of-00003.safetensors" for path in paths]
    assert f"{X}.weight_scale_inv" not in open_checkpoint(shards[0]).tensors
    with pytest.raises(CheckpointError, match="F8_E4M3 codes whose scale is"):
        ik.apply(shards[0], (shards[1], shards[2]), in_place=True, sync=False)


def test_scales_of_what_goes_in_and_out_go_with_the_codes(tmp_path: Path) -> None:
    wanted = {f"{X}.weight": F8, f"{X}.weight_scale": F32, "model.layers.0.self_attn.k_scale": F32}
    paths = models(tmp_path, wanted, wanted, wanted)
    report = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False, skip="up_proj")
    assert report.copied.keys() == wanted.keys()  # type: ignore[union-attr]
    assert set(report.copied.values()) == {  # type: ignore[union-attr]
        "skipped by 'up_proj'", "skipped by 'up_proj', with its quantized module",
    }  # fmt: skip


def test_scales_of_a_cache_are_no_weights(tmp_path: Path) -> None:
    """Where only the cache is quantized: its scales are refused, or kept, and all else is merged."""
    wanted = {"model.layers.0.self_attn.k_scale": F32}
    paths = models(tmp_path, wanted, wanted, wanted)
    for path in paths:
        (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"kv_cache_quant_algo": "FP8"}}))
    assert "a scale of quantized values, by quantization in hf_quant_config.json" in refused(*paths)
    report = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False, skip="k_scale")
    assert report.copied.keys() == wanted.keys()  # type: ignore[union-attr]


def test_a_bias_of_a_quantized_module_is_a_number(tmp_path: Path) -> None:
    wanted = {f"{X}.weight": F8, f"{X}.weight_scale": F32, f"{X}.bias": BF16}
    paths = models(tmp_path, wanted, wanted, wanted)
    ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False, skip="up_proj.weight")
    t, i, b = (read_model(path)[f"{X}.bias"].float() for path in paths)
    assert torch.equal(read_model(tmp_path / "out")[f"{X}.bias"], (t + (i - b)).bfloat16())


def test_another_dtype_does_not_touch_scales(tmp_path: Path) -> None:
    wanted = FORMATS["DeepSeek"]
    paths = models(tmp_path, wanted, wanted, wanted)
    with pytest.raises(CheckpointError, match="cannot become BF16"):
        ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False, skip="up_proj", dtype="bf16")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_honest_float8_is_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    """The product writes such models and residuals itself; words that only look like scales change nothing."""
    paths = []
    for seed, role in enumerate(("target", "instruct", "base")):
        made = {
            "model.a.weight": normal((4, 4), seed).to(dtype),
            "model.norm.scale": torch.full((4,), 1.0 + seed / 8).bfloat16(),
            "logit_scale": torch.tensor(1.0 + seed / 4),
            "projection": normal((4, 4), 7 + seed).to(dtype),
            "position_ids": torch.arange(4),
            "model.a.num_blocks": torch.tensor(4),
        }
        paths.append(write_model(tmp_path / role, made))
    report = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False)
    assert report.tensors == 4  # type: ignore[union-attr]
    assert "quantized" not in f"{report}"
    t, i, b = (read_model(path) for path in paths)
    found = read_model(tmp_path / "out")
    for name in ("model.a.weight", "projection"):
        wanted = t[name].float() + (i[name].float() - b[name].float())
        assert torch.equal(found[name].float(), wanted.to(dtype).float())
    assert math.isclose(found["logit_scale"].item(), 1.0 + 1 / 4 - 2 / 4)


def test_inspect_names_the_quantized_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models(tmp_path, FORMATS["quanto"])[0]
    found = ik.inspect(path)["quantized"]
    assert found.keys() == FORMATS["quanto"].keys()
    assert main(["inspect", f"{path}"]) == 0
    assert f"4 tensors: F8_E4M3 codes whose scale is {X}.weight._scale" in capsys.readouterr().out


def test_many_modules_are_one_line(tmp_path: Path) -> None:
    wanted = {f"model.layers.{i}.mlp.experts.{j}.up.{part}": dtype for i in range(4) for j in range(8)
              for part, dtype in (("weight", F8), ("weight_scale_inv", F32))}  # fmt: skip
    paths = models(tmp_path, wanted, wanted, wanted)
    text = refused(*paths)
    assert len(text.splitlines()) == 3
    assert "32 tensors model.layers.*.mlp.experts.*.up.weight of target" in text
    assert "codes whose scale is model.layers.*.mlp.experts.*.up.weight_scale_inv" in text
