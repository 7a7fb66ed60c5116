"""Merges in which models are quantized: decoded on any side, and stored in the format of the target or as floats."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import DECODED, ENCODED, FORMATS, numbers
from safetensors.torch import save_file
from selection import tiles
from small_models import Tensors, normal, read_model, same, snapshot, write_model

import ires_kernels as ik
from ires_kernels.backends import encoding
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files.new_file import NewFile

SHAPES = {
    "model.embed_tokens.weight": (40, 64),
    "model.layers.0.mlp.up_proj.weight": (72, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
    "model.layers.0.norm.weight": (64,),
    "lm_head.weight": (40, 64),
}
QUANTIZED = [name for name in SHAPES if "proj" in name]


def models(root: Path, *formats: str | None, shards: int = 1, scale: float = 1e-3) -> list[Path]:
    """Folders target, instruct and base, each in a format or in bfloat16; the last two are near each other."""
    base = {name: normal(shape, i, torch.float32) for i, (name, shape) in enumerate(SHAPES.items())}
    paths = []
    for seed, role in enumerate(("target", "instruct", "base")):
        format = formats[seed] if seed < len(formats) else None
        paths.append(write(root / role, near(base, seed, scale), format, shards=shards))
    return paths


def near(base: Tensors, seed: int, scale: float) -> Tensors:
    noise = {name: normal(t.shape, 100 * seed + i, torch.float32, scale) for i, (name, t) in enumerate(base.items())}
    return {name: (t + noise[name]).bfloat16() for name, t in base.items()}


def write(folder: Path, tensors: Tensors, format: str | None, **options: Any) -> Path:
    config: dict[str, Any] = {"model_type": "llama", "torch_dtype": "bfloat16"}
    stored = dict(tensors)
    if format is not None:
        make, settings = FORMATS[format]
        stored = {}
        for name, tensor in tensors.items():
            stored |= make(name, tensor) if name in QUANTIZED else {name: tensor}
        config["quantization_config"] = settings
    return write_model(folder, stored, config=config, **options)


def merged(target: Tensors, instruct: Tensors, base: Tensors, dtype: torch.dtype, alpha: float = 1.0) -> Tensors:
    """In float32, each operation rounded once, and the result as well."""
    return {n: (t.float() + alpha * (instruct[n].float() - base[n].float())).to(dtype) for n, t in target.items()}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sides", [(0, 1, 0), (1, 1, 1)])
def test_what_is_quantized_is_decoded_on_every_side(tmp_path: Path, format: str, sides: tuple[int, ...]) -> None:
    paths = models(tmp_path, *(format if side else None for side in sides))
    dtype = "bf16" if sides[0] else None
    report = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", dtype=dtype, alpha=0.5, sync=False)
    found, wanted = read_model(tmp_path / "out"), merged(*map(numbers, paths), torch.bfloat16, 0.5)  # type: ignore[call-arg]
    assert found.keys() == SHAPES.keys()
    assert all(same(found[name], wanted[name]) for name in wanted)
    assert report.tensors == len(SHAPES)  # type: ignore[union-attr]
    assert not report.warnings
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    assert ik.verify(tmp_path / "out")
    loaded = ik.load(paths[0], (paths[1], paths[2]), dtype=dtype, alpha=0.5)
    assert all(same(loaded[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("format", FORMATS)
def test_a_residual_of_quantized_models_is_one_of_numbers(tmp_path: Path, format: str) -> None:
    target, instruct, base = models(tmp_path, None, format, format)
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    found, one, two = read_model(tmp_path / "residual"), numbers(instruct), numbers(base)
    assert found.keys() == SHAPES.keys()
    assert all(same(found[name], one[name].float() - two[name].float()) for name in SHAPES)
    coded = write(tmp_path / "coded", read_model(target), "fp8-block")
    for own in (target, coded):
        out = tmp_path / f"of {own.name}"
        ik.apply(own, tmp_path / "residual", out=out, sync=False)
        ik.apply(own, (instruct, base), out=tmp_path / f"{out} again", sync=False)
        one, two = read_model(out), read_model(tmp_path / f"{out} again")
        assert one.keys() == read_model(own).keys()
        assert all(same(one[name], two[name]) for name in one)


@pytest.mark.parametrize("format", ENCODED)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_residual_of_zero_leaves_every_byte_of_a_quantized_target(tmp_path: Path, format: str, rounding: str) -> None:
    """All 256 codes are among them, NaN and -0 as well."""
    target, instruct, _ = models(tmp_path, format)
    stored = read_model(target)
    for name in QUANTIZED:
        stored[name].view(torch.uint8).reshape(-1)[:256] = torch.arange(256).to(torch.uint8)
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    report = ik.apply(target, (instruct, instruct), out=tmp_path / "out", sync=False, rounding=rounding)
    before, after = read_model(target), read_model(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same(before[n], after[n]) for n in before if n not in SHAPES or "proj" in n)
    assert json.loads((target / "config.json").read_text()) == json.loads((tmp_path / "out/config.json").read_text())
    assert report.counts.updates == 0  # type: ignore[union-attr]
    assert ik.verify(tmp_path / "out")


@pytest.mark.parametrize("format", ENCODED)
def test_a_quantized_target_keeps_its_format(tmp_path: Path, format: str) -> None:
    """Each number is within half a step of its code of what the merge gives."""
    paths = models(tmp_path, format, format, shards=3, scale=4e-3)
    report = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False)
    before, after = read_model(paths[0]), read_model(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    wanted, found = merged(*map(numbers, paths), torch.float32), numbers(tmp_path / "out")  # type: ignore[call-arg]
    largest = {n: wanted[n].abs().amax() for n in QUANTIZED}
    for name in QUANTIZED:
        step = largest[name] / 127 if format == "int8-channel" else wanted[name].abs() / 16 + largest[name] / 2**8
        assert ((found[name] - wanted[name]).abs() <= step).all()
        assert not torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    for name in SHAPES.keys() - QUANTIZED:
        assert same(found[name], wanted[name].bfloat16())
    assert ik.verify(tmp_path / "out")
    assert report.tensors == len(SHAPES)  # type: ignore[union-attr]
    loaded = ik.load(paths[0], (paths[1], paths[2]))
    assert all(same(loaded[name], after[name]) for name in after)


def test_only_blocks_that_have_grown_get_new_scales(tmp_path: Path) -> None:
    """A hundredfold weight in one block: that block has a new scale, and all others the bytes that they had."""
    target, instruct, base = models(tmp_path, "fp8-block")
    name = QUANTIZED[0]
    changed = read_model(base)
    changed[name][20, 20] = 3.0
    instruct = write(tmp_path / "other", changed, None)
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    before, after = read_model(target), read_model(tmp_path / "out")
    scale = f"{name}_scale_inv"
    assert torch.equal(before[scale] != after[scale], torch.arange(20).reshape(5, 4) == 5)
    same_codes = before[name].view(torch.uint8) == after[name].view(torch.uint8)
    outside = torch.ones(72, 64, dtype=torch.bool)
    outside[16:32, 16:32] = False
    assert same_codes[outside].all()
    wanted = numbers(target)[name][20, 20] + (changed[name][20, 20].float() - read_model(base)[name][20, 20].float())
    assert after[scale][1, 1] == wanted / 448
    assert after[name].float()[20, 20] == 448
    assert all(same(before[n], after[n]) for n in before if n not in (name, scale) and "proj" in n)


@pytest.mark.parametrize("format", ["fp8-block", "fp8-tensor", "mxfp8", "int8-channel"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_tiles_and_threads_change_no_byte(tmp_path: Path, format: str, rounding: str) -> None:
    """Blocks lie across tiles, and several threads need the scales of one weight."""
    paths = models(tmp_path, format, "fp8-block", shards=2, scale=4e-3)
    made = {}
    for size, threads in ((1 << 19, 1), (80, 3), (1000, 2)):
        with tiles(elements=size, copied=96):
            out = tmp_path / f"{size}"
            report = ik.apply(
                paths[0], (paths[1], paths[2]), out=out, sync=False, rounding=rounding, threads=threads, seed=3
            )
        made[size] = read_model(out), report
    (wanted, first), *others = made.values()
    assert first.requantized.new_scales > 0 or format == "mxfp8"  # type: ignore[union-attr]
    for found, report in others:
        assert all(same(found[name], wanted[name]) for name in wanted)
        assert report.counts.lost == first.counts.lost  # type: ignore[union-attr]
        assert report.requantized.noise == pytest.approx(first.requantized.noise, rel=1e-9)  # type: ignore[union-attr]


def test_a_disk_that_fails_while_scales_are_found_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = models(tmp_path, "fp8-block", shards=2)
    measure = encoding.measure_results

    def broken(*arguments: Any) -> None:
        measure(*arguments)
        raise OSError(errno.EIO, os.strerror(errno.EIO), "a file")

    monkeypatch.setattr(encoding, "measure_results", broken)
    with pytest.raises(OSError, match=r"tensor 'model.layers.0.mlp.(up|down)_proj.weight(_scale_inv)?'"):
        ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False, threads=3)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False)
    assert ik.verify(tmp_path / "out")


def test_settings_by_their_older_name_are_no_difference(tmp_path: Path) -> None:
    paths = models(tmp_path, None, "int8-channel", "int8-channel")
    for path in paths[1:]:
        config = json.loads((path / "config.json").read_text())
        config["compression_config"] = config.pop("quantization_config")
        (path / "config.json").write_text(json.dumps(config))
    report = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False)
    assert not report.warnings
    assert report.tensors == len(SHAPES)  # type: ignore[union-attr]


def test_stochastic_rounding_reaches_codes(tmp_path: Path) -> None:
    paths = models(tmp_path, "fp8-block", None, None, scale=1e-4)
    ways = {}
    for rounding, seed in (("nearest", 0), ("stochastic", 1), ("stochastic", 2)):
        out = tmp_path / f"{rounding}{seed}"
        report = ik.apply(paths[0], (paths[1], paths[2]), out=out, sync=False, rounding=rounding, seed=seed)
        ways[rounding, seed] = read_model(out), report
        assert ik.verify(out)
    codes = [each[QUANTIZED[0]].view(torch.uint8) for each, _ in ways.values()]
    assert not any(torch.equal(codes[i], codes[i - 1]) for i in range(3))


@pytest.mark.parametrize("format", DECODED)
def test_what_cannot_be_encoded_asks_for_a_dtype(tmp_path: Path, format: str) -> None:
    paths = models(tmp_path, format)
    with pytest.raises(CheckpointError, match="--dtype bf16") as caught:
        ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False)
    assert f"is {format}" in f"{caught.value}"
    assert not (tmp_path / "out").exists()
    ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False, skip="proj")
    before, after = read_model(paths[0]), read_model(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same(before[n], after[n]) for n in before if "proj" in n)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("format", FORMATS)
def test_skipping_any_part_of_a_weight_keeps_all_of_it(tmp_path: Path, format: str) -> None:
    paths = models(tmp_path, format)
    before = read_model(paths[0])
    for number, part in enumerate(name for name in before if name.startswith("model.layers.0.mlp.up")):
        out = tmp_path / f"out{number}"
        skip = [f"^{part.replace('.', '[.]')}$", "down_proj"]
        report = ik.apply(paths[0], (paths[1], paths[2]), out=out, sync=False, skip=skip)
        after = read_model(out)
        assert after.keys() == before.keys()
        changed = {name for name in before if not same(before[name], after[name])}
        assert changed == SHAPES.keys() - QUANTIZED
        assert report.copied.keys() == before.keys() - changed  # type: ignore[union-attr]


@pytest.mark.parametrize("sides", [(0, 1, 0), (0, 1, 1)])
def test_sources_of_an_update_in_place_may_be_quantized(tmp_path: Path, sides: tuple[int, ...]) -> None:
    paths = models(tmp_path, *("fp8-block" if side else None for side in sides))
    before, wanted = read_model(paths[0]), merged(*map(numbers, paths), torch.bfloat16)  # type: ignore[call-arg]
    report = ik.apply(paths[0], (paths[1], paths[2]), in_place=True, sync=False, undo="all")
    found = read_model(paths[0])
    assert all(same(found[name], wanted[name]) for name in wanted)
    assert report.tensors == len(SHAPES)  # type: ignore[union-attr]
    again = ik.apply(paths[0], (paths[1], paths[2]), in_place=True, sync=False)
    assert again.tensors == report.tensors  # type: ignore[union-attr]
    found = read_model(paths[0])
    assert all(same(found[name], wanted[name]) for name in wanted), "the same again changes nothing"
    ik.rollback(paths[0])
    assert all(same(read_model(paths[0])[name], before[name]) for name in before)


def test_the_report_tells_of_the_noise_of_new_codes(tmp_path: Path) -> None:
    """As numpy counts it: of the numbers that were there, those that the merge gives, and those that are stored."""
    paths = models(tmp_path, "fp8-block", None, None, scale=1e-4)
    report = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False)
    found = report.requantized  # type: ignore[union-attr]
    target, instruct, base = map(numbers, paths)
    wanted = merged(target, instruct, base, torch.float32)
    stored = numbers(tmp_path / "out")
    ratios, noise, norm, dot = {}, 0.0, 0.0, 0.0
    for name in QUANTIZED:
        update = (instruct[name].float() - base[name].float()).double()
        off = (stored[name] - wanted[name]).double().square().sum().item()
        ratios[name] = (off / update.square().sum().item()) ** 0.5
        noise, norm = noise + off, norm + update.square().sum().item()
        dot += ((stored[name].double() - target[name].double()) * update).sum().item()
    assert found is not None
    assert found.noise == pytest.approx((noise / norm) ** 0.5)
    assert found.most == pytest.approx(max(ratios.values()))
    assert found.worst == max(ratios, key=lambda name: ratios[name])
    assert (found.tensors, found.scales, found.new_scales, found.loud) == (2, 5 * 4 + 4 * 6, 0, 2)
    assert any("--dtype bf16" in text and "--rounding stochastic" in text for text in report.warnings)  # type: ignore[union-attr]
    assert "stored as codes" in f"{report}"
    manifest = json.loads((tmp_path / "out" / "ires.json").read_text())
    assert manifest["report"]["requantized"]["worst"] == found.worst
    again = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False)
    assert again.requantized == found  # type: ignore[union-attr]
    plain = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "plain", sync=False, dtype="bf16")
    assert plain.requantized is None  # type: ignore[union-attr]


@pytest.mark.parametrize("format", ["fp8-block", "nvfp4", "mxfp8"])
def test_a_scale_that_is_no_number_is_refused_before_anything_is_written(tmp_path: Path, format: str) -> None:
    paths = models(tmp_path, None, format)
    stored = read_model(paths[1])
    name = next(name for name in stored if re.search(r"weight_scale(_inv)?$", name))
    stored[name].view(torch.uint8).reshape(-1)[-4:] = 0xFF
    write_model(tmp_path / "broken", stored, config=json.loads((paths[1] / "config.json").read_text()))
    with pytest.raises(CheckpointError, match="--skip") as caught:
        ik.apply(paths[0], (tmp_path / "broken", paths[2]), out=tmp_path / "out", sync=False)
    weight = name.partition("_scale")[0]
    assert f"{weight!r} of instruct: its scale is" in f"{caught.value}"
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(CheckpointError, match="its scale is"):
        ik.load(paths[0], (tmp_path / "broken", paths[2]))
    before = snapshot(paths[0])
    with pytest.raises(CheckpointError, match="its scale is"):
        ik.apply(paths[0], (tmp_path / "broken", paths[2]), in_place=True, sync=False)
    assert snapshot(paths[0]) == before
    ik.apply(paths[0], (tmp_path / "broken", paths[2]), out=tmp_path / "out", sync=False, skip=re.escape(weight))


def test_the_plan_says_what_is_decoded(tmp_path: Path) -> None:
    paths = models(tmp_path, "fp8-block", "mxfp8")
    plan = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", dry_run=True)
    assert "+ 1 * (instruct - base), fp8-block 16 × 16/mxfp8/BF16 → codes of fp8-block 16 × 16" in f"{plan}"
    assert "+ 1 * (instruct - base), fp8-block 16 × 16/mxfp8/BF16 → scales of fp8-block" in f"{plan}"
    assert "matched" not in f"{plan}"
    assert [each.matrices for each in plan.ancestry] == [4, 4]  # type: ignore[union-attr]
    table = {each["name"]: each["inputs"] for each in plan.to_dict()["tensors"]}
    assert table[QUANTIZED[0]]["instruct"]["format"] == "mxfp8"
    other = write(tmp_path / "other", read_model(paths[2]), "fp8-block")
    plan_of_other = ik.apply(paths[0], (paths[1], other), out=tmp_path / "out", dry_run=True)
    assert plan_of_other.id != plan.id  # type: ignore[union-attr]


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_codes_and_scales_in_other_files_are_written_by_whoever_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Interrupted after some files, with codes in one and their scales in another: the same bytes in the end."""
    paths = models(tmp_path, "fp8-block", None, None, shards=7, scale=4e-3)
    whole = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "whole", sync=False)
    places = json.loads((paths[0] / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(places[name] != places[f"{name}_scale_inv"] for name in QUANTIZED)
    finish, finished = NewFile.finish, []

    def give_up(file: NewFile) -> None:
        finish(file)
        finished.append(file)
        if len(finished) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(NewFile, "finish", give_up)
    with pytest.raises(KeyboardInterrupt):
        ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False, threads=1)
    assert not (tmp_path / "out").exists()
    report = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False)
    wanted, found = read_model(tmp_path / "whole"), read_model(tmp_path / "out")
    assert all(same(found[name], wanted[name]) for name in wanted)
    assert report.requantized == whole.requantized  # type: ignore[union-attr]
    assert ik.verify(tmp_path / "out")


@pytest.mark.parametrize("shards", [7, 1])
def test_each_file_can_be_written_alone(tmp_path: Path, shards: int) -> None:
    """As by workers on several machines: who writes scales computes the codes that another one writes for that."""
    paths = models(tmp_path, "fp8-block", None, None, shards=shards, scale=4e-3)
    report = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "whole", sync=False)
    for rank in range(7):
        again = ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", workers=(rank, 7))
    assert again.requantized == report.requantized  # type: ignore[union-attr]
    wanted, found = read_model(tmp_path / "whole"), read_model(tmp_path / "out")
    assert all(same(found[name], wanted[name]) for name in wanted)
    assert ik.verify(tmp_path / "out")


EXPERTS = "model.layers.0.mlp.experts."


def experts(seed: int) -> Tensors:
    shapes = {f"{EXPERTS}{e}.{n}_proj.weight": (96, 64) if n == "down" else (64, 96) for e in range(4)
              for n in ("gate", "up", "down")}  # fmt: skip
    shapes["model.embed_tokens.weight"] = (40, 96)
    return near({n: normal(shape, i, torch.float32) for i, (n, shape) in enumerate(shapes.items())}, seed, 2e-3)


def fused(t: Tensors) -> Tensors:
    """Experts as one tensor, in the layout that newer libraries save."""
    each = [torch.cat([t[f"{EXPERTS}{e}.{n}_proj.weight"] for n in ("gate", "up")]) for e in range(4)]
    down = [t[f"{EXPERTS}{e}.down_proj.weight"] for e in range(4)]
    rest = {n: x for n, x in t.items() if EXPERTS not in n}
    return {f"{EXPERTS}gate_up_proj": torch.stack(each), f"{EXPERTS}down_proj": torch.stack(down), **rest}


@pytest.mark.parametrize("format", ["fp8-block", "mxfp4"])
def test_experts_that_are_quantized_one_by_one_and_those_that_are_fused(tmp_path: Path, format: str) -> None:
    make, settings = FORMATS[format]

    def write_experts(name: str, seed: int, *, as_codes: bool) -> Path:
        config: dict[str, Any] = {"num_experts": 4, "hidden_size": 96, "moe_intermediate_size": 64}
        if not as_codes:
            return write_model(tmp_path / name, fused(experts(seed)), config=config)
        stored: Tensors = {}
        for weight, tensor in experts(seed).items():
            stored |= make(weight, tensor) if "proj" in weight else {weight: tensor}
        return write_model(tmp_path / name, stored, config=config | {"quantization_config": settings})

    target, instruct, base = (write_experts(f"{i}", i, as_codes=i > 0) for i in range(3))
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    wanted = merged(read_model(target), fused(numbers(instruct)), fused(numbers(base)), torch.bfloat16)
    found = read_model(tmp_path / "out")
    assert all(same(found[name], wanted[name]) for name in wanted)
    assert ik.verify(tmp_path / "out")
    one, two = (write_experts(f"fused {i}", i, as_codes=False) for i in range(2))
    ik.apply(instruct, (one, two), out=tmp_path / "codes", sync=False, dtype="bf16")
    back = merged(numbers(instruct), experts(0), experts(1), torch.bfloat16)
    found = read_model(tmp_path / "codes")
    assert all(same(found[name], back[name]) for name in back)
    assert ik.verify(tmp_path / "codes")


def test_settings_that_speak_of_codes_go_with_them(tmp_path: Path) -> None:
    paths = models(tmp_path, "fp8-block")
    config = json.loads((paths[0] / "config.json").read_text())
    block = config.pop("quantization_config")
    config["text_config"] = {"dtype": "bfloat16", "quantization_config": block, "hidden_size": 64}
    config["expert_dtype"] = "fp4"
    (paths[0] / "config.json").write_text(json.dumps(config))
    (paths[0] / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    (paths[0] / "params.json").write_text(json.dumps({"dim": 64, "quantization": {"qformat_weight": "fp8_e4m3"}}))
    (paths[0] / "other.json").write_text(json.dumps({"quantization": 1}))
    ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False, dtype="f16")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found == {
        "model_type": "llama", "torch_dtype": "float16", "text_config": {"dtype": "float16", "hidden_size": 64},
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "params.json").read_text()) == {"dim": 64}
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert json.loads((tmp_path / "out" / "other.json").read_text()) == {"quantization": 1}
    assert ik.verify(tmp_path / "out")
    ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "kept", sync=False)
    for name in ("config.json", "params.json", "hf_quant_config.json"):
        assert (tmp_path / "kept" / name).read_bytes() == (paths[0] / name).read_bytes()
