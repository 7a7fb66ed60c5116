"""Sums of residuals that are saved: computed as they would be added, rounded once, and known for what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from quantized_models import FORMATS, numbers
from safetensors.torch import save_file
from small_models import normal, read_model, same, tensors, triple, write_model
from torch import Tensor

import ires_kernels as ik
from ires_kernels.backends import reference
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.records import card

Table = dict[str, Tensor]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Models base, instruct, target, code (another descendant of base); residuals of instruct and code."""
    triple(tmp_path, shards=3, files={"tokenizer_config.json": "{}"})
    config = {"model_type": "llama", "tie_word_embeddings": False}
    code = {name: (t.float() + 1e-3).bfloat16() for name, t in read_model(tmp_path / "base").items()}
    write_model(tmp_path / "code", code, shards=2, config=config, files={"tokenizer_config.json": "{}"})
    ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / "residual")
    ik.extract(tmp_path / "base", tmp_path / "code", tmp_path / "second", dtype="bf16")
    return tmp_path


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not same(found[name], tensor)] == []


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "residual.json").read_text())
    return found


def test_a_sum_of_residuals(models: Path) -> None:
    one, two = read_model(models / "residual"), read_model(models / "second")
    sum_ = 0.7 * ik.Residual.open(models / "residual") - 0.2 * ik.Residual.open(models / "second")
    report: Any = sum_.save(models / "sum")
    f, g = torch.tensor(0.7), torch.tensor(-0.2)
    assert_same(read_model(models / "sum"), {name: f * one[name] + g * two[name].float() for name in one})
    assert report.counts.elements == sum(t.numel() for t in one.values())
    assert [strength.factors for strength in report.strengths] == [(0.7, -0.2)]
    assert sorted(path.name for path in (models / "sum").iterdir()) == sorted(
        path.name for path in (models / "residual").iterdir()
    )

    told = manifest(models / "sum")
    assert told["operation"] == "extract"
    assert told["rules"]["alpha"] == [0.7, -0.2]
    for role, folder, instruct in (("residual-1", "residual", "instruct"), ("residual-2", "second", "code")):
        assert told["inputs"][role]["path"] == f"{models / folder}"
        assert told["inputs"][role]["digest"] == manifest(models / folder)["digest"]
        made_of = told["inputs"][role]["made_of"]
        assert made_of["instruct"]["digest"] == manifest(models / folder)["inputs"]["instruct"]["digest"]
        assert f"{models / instruct}" not in json.dumps(made_of)
    assert told["sketch"] == manifest(models / "residual")["sketch"]
    assert told["tied"] is False
    assert ik.verify(models / "sum")
    assert (models / "sum" / "residual.json").stat().st_mtime_ns == (
        sum_.save(models / "sum") and (models / "sum" / "residual.json").stat().st_mtime_ns
    )


def test_it_is_a_residual_like_others(models: Path) -> None:
    sum_ = 0.5 * ik.Residual.open(models / "residual") + 2 * ik.Residual.open(models / "second")
    sum_.save(models / "sum")
    saved = ik.Residual.open(models / "sum")
    report: Any = ik.apply(models / "target", saved, out=models / "out")
    target, residual = read_model(models / "target"), read_model(models / "sum")
    assert_same(read_model(models / "out"), {name: ik.add(t, residual[name]) for name, t in target.items()})
    assert report.ancestry[0].cosine > 0.9  # the base is known by the samples of the first residual's
    assert saved.norms() == {name: pytest.approx(norm, rel=1e-6) for name, norm in sum_.norms().items()}
    (0.5 * saved).save(models / "again")
    halves = {name: t * 0.5 for name, t in residual.items()}
    assert_same(read_model(models / "again"), halves)
    within = manifest(models / "again")["inputs"]["residual"]["made_of"]["residual-2"]["made_of"]
    assert within["instruct"]["digest"] == manifest(models / "second")["inputs"]["instruct"]["digest"]


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16", "rounding": "stochastic", "seed": 5}, {"dtype": "f64"}])
def test_a_sum_of_pairs(models: Path, options: dict[str, Any]) -> None:
    base = models / "base"
    sum_ = 0.7 * ik.Residual.of(models / "instruct", base) - 0.2 * ik.Residual.of(models / "code", base)
    sum_.save(models / "sum", **options)
    i, c, b = (read_model(models / name) for name in ("instruct", "code", "base"))
    out = {"bf16": torch.bfloat16, "f64": torch.float64}.get(options.get("dtype", ""), torch.float32)
    zero = {name: torch.full(t.shape, -0.0) for name, t in b.items()}
    rounding = {key: options[key] for key in ("rounding", "seed") if key in options}
    wanted = {}
    for name, of in zero.items():
        extra = {**rounding, "stream": xxhash.xxh3_64_intdigest(name.encode())} if rounding else {}
        wanted[name] = ik.add_difference(of, [i[name], c[name]], b[name], [0.7, -0.2], dtype=out, **extra)
    assert_same(read_model(models / "sum"), wanted)
    assert ik.verify(models / "sum")
    assert manifest(models / "sum")["inputs"].keys() == {"instruct-1", "base-1", "instruct-2", "base-2"}
    assert manifest(models / "sum")["sketch"] == manifest(models / "residual")["sketch"]


@pytest.mark.parametrize("format", ["fp8-block", "nvfp4"])  # the loops decode one on the way, and not the other
def test_a_sum_of_pairs_of_codes(tmp_path: Path, format: str) -> None:
    """Codes are those of the operand whose they are, though nothing is there that a sum is added to."""
    make, settings = FORMATS[format]
    name = "model.layers.0.mlp.up_proj.weight"
    for seed, role in enumerate(("chat", "code", "base")):
        stored = make(name, normal((64, 64), 7, torch.float32) + normal((64, 64), seed, torch.float32, 0.1))
        write_model(tmp_path / role, stored, config={"model_type": "llama", "quantization_config": settings})
    chat, code, base = (numbers(tmp_path / role)[name] for role in ("chat", "code", "base"))
    pairs = [ik.Residual.of(tmp_path / role, tmp_path / "base") for role in ("chat", "code")]
    (0.75 * pairs[0] - 0.3 * pairs[1]).save(tmp_path / "sum")
    f, g = torch.tensor(0.75), torch.tensor(-0.3)
    assert_same(read_model(tmp_path / "sum"), {name: f * (chat - base) + g * (code - base)})


def test_a_scaled_pair(models: Path) -> None:
    pair = ik.Residual.of(models / "instruct", models / "base")
    (-2 * pair).save(models / "scaled")
    assert_same(read_model(models / "scaled"), {n: t * -2 for n, t in read_model(models / "residual").items()})
    assert ik.verify(models / "scaled")
    assert manifest(models / "scaled")["inputs"].keys() == {"base", "instruct"}
    moved = {"base": models / "base", "instruct": models / "instruct"}
    assert ik.verify(models / "scaled", inputs=moved)


def test_an_interrupted_one_goes_on(models: Path) -> None:
    sum_ = ik.Residual.open(models / "residual") + ik.Residual.open(models / "second")
    pairs = 3 * ik.Residual.of(models / "instruct", models / "base")

    def give_up(done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    for number, each in enumerate((sum_, pairs)):
        each.save(models / f"wanted {number}")
        with pytest.raises(KeyboardInterrupt):
            each.save(models / f"sum {number}", progress=give_up, threads=1)
        assert not (models / f"sum {number}").exists()
        ik.resume(models / f"sum {number}")
        assert_same(read_model(models / f"sum {number}"), read_model(models / f"wanted {number}"))


def test_patterns_and_dry_run(models: Path) -> None:
    sum_ = ik.Residual.open(models / "residual") + ik.Residual.open(models / "second")
    plan: Any = sum_.save(models / "sum", skip="lm_head", dry_run=True)
    assert "lm_head.weight" not in {step.name for step in plan.steps}
    assert not (models / "sum").exists()
    assert "residual-2" in f"{plan}"
    with pytest.raises(CheckpointError, match="'lm_haed' matches no tensor"):
        sum_.save(models / "sum", skip="lm_haed")
    with pytest.raises(CheckpointError, match="skip leaves out all"):
        sum_.save(models / "sum", skip=".")
    for options in ({"vocabulary": "rows"}, {"allow_missing": True}, {"renames": "a=b"}):
        with pytest.raises(ArgumentError, match="are for models"):
            sum_.save(models / "sum", **options)
    with pytest.raises(TypeError, match="alpha"):
        sum_.save(models / "sum", alpha=3)


def test_what_is_no_sum(models: Path) -> None:
    one, pair = ik.Residual.open(models / "residual"), ik.Residual.of(models / "code", models / "base")
    with pytest.raises(ArgumentError, match="not mixed with pairs"):
        (one + pair).save(models / "sum")
    ik.extract(models / "base", models / "code", models / "part", skip="lm_head")
    with pytest.raises(CheckpointError, match=r"part: 'lm_head.weight' is missing"):
        (one + ik.Residual.open(models / "part")).save(models / "sum")
    (one + ik.Residual.open(models / "part")).save(models / "sum", skip="lm_head")
    assert "lm_head.weight" not in read_model(models / "sum")
    wide = {name: torch.zeros(*t.shape[:-1], 8) for name, t in read_model(models / "base").items()}
    for name in ("wide", "wider"):
        write_model(models / name, {n: t + (name == "wider") for n, t in wide.items()}, config={"model_type": "llama"})
    with pytest.raises(CheckpointError, match=r"of shape \[40, 8\], in .*of shape \[40, 16\]"):
        (pair + ik.Residual.of(models / "wider", models / "wide")).save(models / "sum 2")


def test_sums_that_cancel_and_strangers_are_warned_of(models: Path) -> None:
    one = ik.Residual.open(models / "residual")
    report: Any = (one - one).save(models / "nothing")
    assert any("the sum is 0" in line for line in report.warnings)
    strange = tensors(77)
    write_model(models / "stranger", strange, config={"model_type": "llama"})
    write_model(models / "its", {n: (t.float() + 1e-3).bfloat16() for n, t in strange.items()}, config={})
    ik.extract(models / "stranger", models / "its", models / "foreign")
    for sum_ in (
        one + ik.Residual.open(models / "foreign"),
        ik.Residual.of(models / "instruct", models / "base") + ik.Residual.of(models / "its", models / "stranger"),
    ):
        plan: Any = sum_.save(models / "sum", dry_run=True)
        assert [line for line in plan.warnings if "look unrelated: the median cosine of" in line]
    plan = (one + ik.Residual.open(models / "second")).save(models / "sum", dry_run=True)
    assert not [line for line in plan.warnings if "unrelated" in line]


def test_rows_of_new_tokens_have_no_multiples(models: Path) -> None:
    told = manifest(models / "second")
    told["by_token"] = {"lm_head.weight": {"base": 30, "own": [[30, 10]]}}
    (models / "second" / "residual.json").write_text(json.dumps(told))
    sum_ = ik.Residual.open(models / "residual") + ik.Residual.open(models / "second")
    with pytest.raises(CheckpointError, match="rows of tokens that its base does not have"):
        sum_.save(models / "sum")
    sum_.save(models / "sum", skip="lm_head")
    assert "by_token" not in manifest(models / "sum")


def test_a_shard_of_a_residual_becomes_a_whole_one(models: Path) -> None:
    file = models / "residual-00002-of-00009.safetensors"
    save_file(read_model(models / "residual"), file)
    sum_ = 2 * ik.Residual.open(file) + ik.Residual.open(models / "second")
    sum_.save(models / "sum")
    assert sorted(path.name for path in (models / "sum").glob("*.safetensors")) == ["residual.safetensors"]
    assert sorted(ik.Residual.open(models / "sum").names) == sorted(ik.Residual.open(models / "residual").names)


def test_damage_is_found(models: Path) -> None:
    file = next((models / "second").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 64
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match="is damaged"):
        (ik.Residual.open(models / "residual") + ik.Residual.open(models / "second")).save(models / "sum")
    assert not (models / "sum").exists()


def test_ids_on_the_hub_are_found_in_sums_of_sums() -> None:
    table = {"residual-1": {"made_of": {"instruct": {"hub": {"id": "org/a"}}}}, "residual-2": {"hub": {"id": "org/r"}}}
    assert sorted(card._ids_in(table)) == ["org/a", "org/r"]
    deep: dict[str, Any] = {"hub": {"id": "org/deep"}}
    for _ in range(5000):
        deep = {"made_of": {"residual": deep}}
    assert list(card._ids_in({"residual": deep})) == ["org/deep"]


def test_reference_backend_gives_the_same(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sum_ = 0.7 * ik.Residual.open(models / "residual") - 0.2 * ik.Residual.open(models / "second")
    sum_.save(models / "sum")
    monkeypatch.setenv("IRES_BACKEND", "reference")
    assert reference.status().available
    sum_.save(models / "other")
    assert_same(read_model(models / "other"), read_model(models / "sum"))
