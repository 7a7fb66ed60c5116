"""From checkpoints and rules to a Plan: what happens to every tensor, what the output looks like, what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from small_models import SHAPES, normal, tensors, triple, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError, parse_header
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.extraction import plan_extract
from ires_kernels.planning.inputs import open_inputs
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.steps import Step

TIED = {name: shape for name, shape in SHAPES.items() if name != "lm_head.weight"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def one_pass(base: Path, instruct: Path, target: Path, **rules: Any) -> Plan:
    return plan_apply(open_inputs({"target": target, "instruct": instruct, "base": base}), Rules.of(1, **rules))


def step(plan: Plan, name: str) -> Step:
    return next(step for step in plan.steps if step.name == name)


def refusal(*paths: Path, **rules: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        one_pass(*paths, **rules)
    return str(caught.value)


def test_every_tensor_of_one_family_is_merged(tmp_path: Path) -> None:
    plan = one_pass(*triple(tmp_path), alpha=0.7)
    assert {step.op for step in plan.steps} == {"add_difference"}
    for step in plan.steps:
        assert step.roles == ("target", "instruct", "base")
        assert [ref.path.parent.name for ref in step.inputs] == ["target", "instruct", "base"]
        assert {ref.name for ref in step.inputs} == {step.name}
        assert step.factors == (0.7,)
        assert step.stream == xxhash.xxh3_64_intdigest(step.name.encode())
    assert (plan.missing, plan.warnings, plan.comparisons, plan.not_stored) == ((), (), (), {})


@pytest.mark.parametrize("dtype", [None, "f32"])
def test_the_targets_layout_is_kept(tmp_path: Path, dtype: str | None) -> None:
    base, instruct, target = triple(tmp_path, shards=3)
    renamed = {}
    for path in sorted(target.glob("*.safetensors")):  # other shards than those of the other models, and other metadata
        renamed[path.name] = path.name.replace("model", "weights")
        path.rename(target / renamed[path.name])
    index_path = target / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] = {name: renamed[file] for name, file in index["weight_map"].items()}
    index["metadata"] = {"total_size": 1, "note": "kept"}
    index_path.write_text(json.dumps(index))
    plan = one_pass(base, instruct, target, dtype=dtype)
    opened = plan.inputs["target"]
    assert [file.name for file in plan.files] == [shard.path.name for shard in opened.shards]
    width = 4 if dtype else 2
    for file, shard in zip(plan.files, opened.shards, strict=True):
        header = parse_header(file.header, file.size, file.name)
        assert list(header.tensors) == list(shard.header.tensors)
        assert {name: info.shape for name, info in header.tensors.items()} == {
            name: info.shape for name, info in shard.header.tensors.items()
        }
        assert {info.dtype for info in header.tensors.values()} == {dtype.upper() if dtype else "BF16"}
        for name, info in header.tensors.items():
            placed = step(plan, name)
            assert (placed.file, placed.offset, placed.nbytes) == (
                file.name, header.data_start + info.begin, info.numel * width,
            )  # fmt: skip
    name, content = plan.documents[0]
    assert name == "model.safetensors.index.json"
    written = json.loads(content)
    assert written["metadata"] == {"total_size": plan_elements(plan) * width, "note": "kept"}
    assert written["weight_map"] == index["weight_map"]


def plan_elements(plan: Plan) -> int:
    return sum(step.inputs[0].numel for step in plan.steps)


@pytest.mark.parametrize(
    ("metadata", "written"),
    [({}, {"format": "pt"}), ({"format": "mlx"}, {"format": "mlx"}), ({"a": "b"}, {"format": "pt", "a": "b"})],
)
def test_file_metadata_is_kept_and_has_a_format(
    tmp_path: Path, metadata: dict[str, str], written: dict[str, str]
) -> None:
    plan = one_pass(*triple(tmp_path, metadata=metadata))
    assert parse_header(plan.files[0].header, plan.files[0].size, "").metadata == written


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float16"}),
        ({"dtype": "bfloat16", "x": [1]}, {"dtype": "float16", "x": [1]}),
        (
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}},
            {"dtype": "float16", "text_config": {"dtype": "float16"}},
        ),
        ({"hidden_size": 16}, {"hidden_size": 16}),
    ],
)
def test_another_dtype_is_written_into_the_config(
    tmp_path: Path, config: dict[str, Any], changed: dict[str, Any]
) -> None:
    paths = triple(tmp_path, config=config)
    plan = one_pass(*paths, dtype="f16")
    assert json.loads(dict(plan.documents)["config.json"]) == changed
    assert "config.json" not in {file.name for file in plan.side_files}
    kept = one_pass(*paths)
    assert not kept.documents
    assert "config.json" in {file.name for file in kept.side_files}


def test_alpha_per_tensor_and_skips(tmp_path: Path) -> None:
    plan = one_pass(
        *triple(tmp_path),
        alpha=0.5,
        alphas=[(r"layers\.0", 0.25), ("mlp", 2), (r"^model\.norm", 0)],
        skip=["embed|lm_head"],
    )
    factors = {step.name: step.factors for step in plan.steps if step.op == "add_difference"}
    assert factors == {
        "model.layers.0.mlp.weight": (0.25,),
        "model.layers.0.norm.weight": (0.25,),
        "model.layers.1.mlp.weight": (2.0,),
        "model.layers.1.norm.weight": (0.5,),
    }
    reasons = {step.name: step.reason for step in plan.steps if step.op == "copy"}
    assert reasons == {
        EMBEDDING: "skipped by 'embed|lm_head'",
        HEAD: "skipped by 'embed|lm_head'",
        "model.norm.weight": "alpha is 0",
    }


def test_alpha_0_everywhere_is_a_copy(tmp_path: Path) -> None:
    plan = one_pass(*triple(tmp_path), alpha=0)
    assert {(step.op, step.reason) for step in plan.steps} == {("copy", "alpha is 0")}


def test_copies_take_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    base, instruct, _ = triple(tmp_path)
    write_model(tmp_path / "more", {**tensors(3), "extra": normal((3,), 1), "ids": torch.arange(3)})
    plan = one_pass(base, instruct, tmp_path / "more", dtype="f32", skip="lm_head")
    assert (step(plan, HEAD).op, step(plan, HEAD).dtype, step(plan, HEAD).nbytes) == ("convert", "F32", 40 * 16 * 4)
    assert (step(plan, "extra").op, step(plan, "extra").reason) == ("convert", "only in the target")
    assert (step(plan, "ids").op, step(plan, "ids").dtype) == ("copy", "I64")


def test_names_that_only_some_models_have(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    few = {name: shape for name, shape in SHAPES.items() if "layers.1" not in name}
    more = {**SHAPES, "extra.weight": (3, 2)}
    for folder, shapes in (("few", few), ("more", more)):
        write_model(tmp_path / folder, tensors(4, shapes))
    text = refusal(base, tmp_path / "few", target)
    part = "'model.layers.1' (2 tensors, 800 bytes) is in {} and base and not in {}"
    assert part.format("target", "instruct") in text
    assert "--allow-missing" in text
    assert part.format("instruct", "target") in refusal(base, instruct, tmp_path / "few")
    assert "'extra.weight' is in instruct and not in target" in refusal(base, tmp_path / "more", target)

    plan = one_pass(base, tmp_path / "few", target, allow_missing=True)
    assert step(plan, "model.layers.1.mlp.weight").reason == "not in instruct"
    assert len(plan.missing) == 2
    plan = one_pass(base, tmp_path / "more", target, allow_missing=True)
    assert {step.op for step in plan.steps} == {"add_difference"}
    assert [f"{absence}" for absence in plan.missing] == ["'extra.weight' is in instruct and not in target"]
    plan = one_pass(base, tmp_path / "few", target, skip="layers.1")
    assert not plan.missing
    plan = one_pass(base, instruct, tmp_path / "more")
    assert step(plan, "extra.weight").reason == "only in the target"


def test_ten_problems_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    base, instruct, _ = triple(tmp_path)
    write_model(tmp_path / "other", {f"t{i:02}": normal((2,), i) for i in range(15)})
    text = refusal(base, instruct, tmp_path / "other")
    lines = text.splitlines()
    assert lines[0] == "cannot apply:"
    assert len([line for line in lines if line.startswith("  '")]) <= 10
    assert len(set(lines)) == len(lines)
    write_model(tmp_path / "many", {**tensors(1), **{f"t{i:02}": normal((2,), i) for i in range(15)}})
    write_model(tmp_path / "more", {**tensors(1), **{f"t{i:02}": normal((2,), i + 99) for i in range(15)}})
    text = refusal(tmp_path / "many", tmp_path / "more", instruct)
    assert [line.split()[0] for line in text.splitlines()[1:11]] == [f"'t{i:02}'" for i in range(10)]
    assert text.splitlines()[11] == "  and 5 more problems"


def test_shapes_must_be_equal(tmp_path: Path) -> None:
    base, instruct, _ = triple(tmp_path)
    write_model(tmp_path / "wide", tensors(5, {**SHAPES, "model.norm.weight": (1,)}))
    text = refusal(base, instruct, tmp_path / "wide")
    assert "'model.norm.weight' has shape [16] in instruct" in text
    assert f"[1] in target ({tmp_path}/wide/model.safetensors)" in text
    assert "not broadcast" in text
    write_model(tmp_path / "vocabulary", tensors(5, {**SHAPES, EMBEDDING: (42, 16), HEAD: (42, 16)}))
    plan = one_pass(base, instruct, tmp_path / "vocabulary")
    assert "of 42 rows 40 are added to, 2 stay as they are" in plan.notes[0], "they may differ in their padding"


def test_a_target_with_another_vocabulary_keeps_its_tokenizer(tmp_path: Path) -> None:
    files = {"tokenizer.json": "{}", "chat_template.jinja": "", "generation_config.json": "{}"}
    base, instruct, _ = triple(tmp_path, files=files)
    target = write_model(tmp_path / "wide", tensors(5, {**SHAPES, EMBEDDING: (42, 16), HEAD: (42, 16)}), files=files)
    plan = one_pass(base, instruct, target, skip="embed_tokens|lm_head")
    assert {file.name: file.role for file in plan.side_files} == {
        "tokenizer.json": "target",
        "chat_template.jinja": "target",
        "generation_config.json": "target",
    }
    assert "keeps its tokenizer" in plan.warnings[0]
    ik.extract(base, instruct, tmp_path / "residual", skip="embed_tokens|lm_head", sync=False)
    inputs = open_inputs({"target": target, "residual": tmp_path / "residual"})
    assert "keeps its tokenizer" in plan_apply(inputs, Rules.of(1)).warnings[0]


def test_models_without_a_name_in_common(tmp_path: Path) -> None:
    base, instruct, _ = triple(tmp_path)
    other = write_model(tmp_path / "other", {"a": normal((2,), 1), "ids": torch.arange(3)})
    text = refusal(base, instruct, other, allow_missing=True)
    assert "no tensor would be merged: the target has 'ids' …, instruct has 'lm_head.weight' …" in text
    assert "no tensor would be merged" in refusal(base, instruct, tmp_path / "target", skip="")


@pytest.mark.parametrize("option", ["skip", "alphas"])
def test_a_pattern_that_matches_nothing_is_a_typing_error(tmp_path: Path, option: str) -> None:
    value = {"skip": ["mlp", "atention"], "alphas": [("mlp", 1), ("atention", 1)]}[option]
    text = refusal(*triple(tmp_path), **{option: value})
    assert "'atention' matches no tensor" in text
    assert "'mlp'" not in text


# --- integers and codes


def test_integers_are_compared_and_copied(tmp_path: Path) -> None:
    for name in ("base", "instruct", "target"):
        write_model(tmp_path / name, {**tensors(1), "ids": torch.arange(3), "mask": torch.tensor([True])})
    plan = one_pass(*(tmp_path / name for name in ("base", "instruct", "target")))
    assert (step(plan, "ids").op, step(plan, "ids").reason) == ("copy", "I64, equal in instruct and base")
    assert [comparison.name for comparison in plan.comparisons] == ["ids", "mask"]
    plan = plan_extract(open_inputs({"base": tmp_path / "base", "instruct": tmp_path / "instruct"}), Rules.of(0))
    assert {name: reason for name, (reason, _) in plan.not_stored.items()} == {
        "ids": "I64, equal in instruct and base",
        "mask": "BOOL, equal in instruct and base",
    }
    write_model(tmp_path / "float", {**tensors(1), "ids": torch.zeros(3), "mask": torch.tensor([True])})
    text = refusal(tmp_path / "base", tmp_path / "float", tmp_path / "target")
    assert "'ids' is I64 in target, F32 in instruct, I64 in base" in text


F8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("changes", "config", "why"),
    [
        ({"a.weight": F8, "a.weight_scale_inv": torch.float32}, {}, "F8_E4M3 codes whose scale is a.weight_scale_inv"),
        ({"a.weight": F8, "a.weight_scale": torch.float32}, {}, "F8_E4M3 codes whose scale is a.weight_scale"),
        ({"a.weight": F8, "a.input_scale": torch.float32}, {}, "F8_E4M3 codes whose scale is a.input_scale"),
        ({"a.weight": F8, "a.scale": torch.float8_e8m0fnu}, {}, "F8_E4M3 codes whose scale is a.scale"),
        ({"a.weight": F8}, {"quantization_config": {"quant_method": "fp8"}}, "F8_E4M3 codes, by quantization_config"),
        ({"a.weight": torch.uint8, "a.weight.absmax": torch.float32}, {}, "U8 codes whose scale is a.weight.absmax"),
        ({"a.weight": torch.int8, "a.SCB": torch.float32}, {}, "I8 codes whose scale is a.SCB"),
        (
            {"a.qweight": torch.int32, "a.qzeros": torch.int32, "a.scales": torch.float16},
            {},
            "packed quantized weights",
        ),
        ({"a.experts_blocks": torch.uint8, "a.experts_scales": torch.uint8}, {}, "U8 codes whose scale is a.experts_s"),
    ],
)
def test_codes_of_quantized_weights_are_refused(
    tmp_path: Path, changes: dict[str, torch.dtype], config: dict[str, Any], why: str
) -> None:
    """Where they cannot be decoded: here all scales have a shape that fits nothing."""
    codes = {name: torch.zeros(4, 3 if "scale" in name else 4).to(dtype) for name, dtype in changes.items()}
    for name in ("base", "instruct", "target"):
        write_model(tmp_path / name, {**tensors(1), **codes}, config=config)
    paths = [tmp_path / name for name in ("base", "instruct", "target")]
    text = refusal(*paths)
    assert why in text
    assert "Arithmetic on codes is meaningless" in text
    assert one_pass(*paths, skip=r"^a\.").steps
    with pytest.raises(CheckpointError, match=re.escape(why)):
        plan_extract(open_inputs({"base": paths[0], "instruct": paths[1]}), Rules.of(0))


def test_a_target_of_codes_is_told_from_one_of_float8_numbers(tmp_path: Path) -> None:
    plain = {"a.weight": torch.zeros(4, 4)}
    for name in ("base", "instruct"):
        write_model(tmp_path / name, {**tensors(1), **plain})
    codes = {"a.weight": torch.zeros(4, 4).to(F8), "a.weight_scale": torch.ones(1)}
    quantized = write_model(tmp_path / "quantized", {**tensors(1), **codes})
    plan = one_pass(tmp_path / "base", tmp_path / "instruct", quantized)
    assert (step(plan, "a.weight").op, step(plan, "a.weight").dtype) == ("add_difference", "F8_E4M3")
    assert {each.name for each in plan.steps if each.output.encoding} == {"a.weight", "a.weight_scale"}
    plan = one_pass(tmp_path / "base", tmp_path / "instruct", quantized, skip=r"^a\.", dtype="f32")
    assert (step(plan, "a.weight").op, step(plan, "a.weight").dtype) == ("convert", "F32")
    assert "a.weight_scale" not in {each.name for each in plan.steps}
    bad = write_model(tmp_path / "bad", {**tensors(1), **codes, "a.weight_scale": torch.ones(3)})
    assert f"'a.weight' of target ({bad}/model.safetensors) is F8_E4M3 codes" in refusal(
        tmp_path / "base", tmp_path / "instruct", bad
    )
    assert "and cannot become F32" in refusal(tmp_path / "base", tmp_path / "instruct", bad, skip=r"^a\.", dtype="f32")
    numbers = write_model(tmp_path / "numbers", {**tensors(1), "a.weight": torch.zeros(4, 4).to(F8)})
    plan = one_pass(tmp_path / "base", tmp_path / "instruct", numbers)
    assert (step(plan, "a.weight").op, step(plan, "a.weight").dtype) == ("add_difference", "F8_E4M3")


# --- tied embeddings


def tied(folder: Path, seed: int, said: bool | None = None) -> Path:
    config = {} if said is None else {"tie_word_embeddings": said}
    return write_model(folder, tensors(seed, TIED), config=config)


def untied(folder: Path, seed: int, said: bool | None = False) -> Path:
    config = {} if said is None else {"tie_word_embeddings": said}
    return write_model(folder, tensors(seed), config=config)


def test_tied_models_need_no_head(tmp_path: Path) -> None:
    plan = one_pass(tied(tmp_path / "b", 1), tied(tmp_path / "i", 2), tied(tmp_path / "t", 3))
    assert [step.name for step in plan.steps if "head" in step.name] == []


def test_the_head_of_a_tied_model_is_its_embedding(tmp_path: Path) -> None:
    base, instruct, target = tied(tmp_path / "b", 1), tied(tmp_path / "i", 2, True), untied(tmp_path / "t", 3)
    head = step(one_pass(base, instruct, target), HEAD)
    assert [ref.name for ref in head.inputs] == [HEAD, EMBEDDING, EMBEDDING]
    head = step(one_pass(base, untied(tmp_path / "i2", 2), target), HEAD)
    assert [ref.name for ref in head.inputs] == [HEAD, HEAD, EMBEDDING]
    text = refusal(tied(tmp_path / "denied", 1, False), instruct, target)
    assert "'lm_head.weight' is in target and instruct and not in base" in text


def test_a_tied_target_cannot_take_two_updates(tmp_path: Path) -> None:
    base, instruct, target = untied(tmp_path / "b", 1), untied(tmp_path / "i", 2), tied(tmp_path / "t", 3)
    text = refusal(base, instruct, target)
    assert "'lm_head.weight' is in instruct and base and not in target, whose head is its embedding" in text
    assert "One tensor cannot take the updates of two" in text
    assert one_pass(base, instruct, target, skip="lm_head").missing == ()
    assert len(one_pass(base, instruct, target, allow_missing="any").missing) == 1
    # a second copy that loaders ignore is none
    assert one_pass(untied(tmp_path / "b2", 1, True), untied(tmp_path / "i2", 2, True), target).missing == ()


def test_a_target_that_stores_a_second_copy_of_its_head(tmp_path: Path) -> None:
    target = untied(tmp_path / "t", 3, True)
    text = refusal(untied(tmp_path / "b", 1), untied(tmp_path / "i", 2), target)
    assert "config.json of the target ties lm_head.weight to model.embed_tokens.weight" in text
    same = tied(tmp_path / "b2", 1), tied(tmp_path / "i2", 2)
    plan = one_pass(*same, target)
    head, embedding = step(plan, HEAD), step(plan, EMBEDDING)
    assert head.inputs[1:] == embedding.inputs[1:]
    assert head.stream == embedding.stream, "equal bits need equal random bits"
    assert "ties lm_head.weight" in refusal(*same, target, skip="lm_head")
    assert "ties lm_head.weight" in refusal(*same, target, alphas=[("lm_head", 0.5)])
    assert one_pass(*same, target, skip="lm_head|embed_tokens").steps


def test_tied_and_untied_pairs_make_residuals_for_both_kinds_of_targets(tmp_path: Path) -> None:
    def residual(name: str, base: Path, instruct: Path) -> Path:
        ik.extract(base, instruct, tmp_path / name, sync=False)
        return tmp_path / name

    def plan(target: Path, residual: Path) -> Plan:
        return plan_apply(open_inputs({"target": target, "residual": residual}), Rules.of(1))

    t1, t2, u1, u2 = (
        make(tmp_path / name, seed)
        for name, make, seed in (("t1", tied, 1), ("t2", tied, 2), ("u1", untied, 1), ("u2", untied, 2))
    )
    both_tied = residual("tt", t1, t2)
    assert [ref.name for ref in step(plan(u1, both_tied), HEAD).inputs] == [HEAD, EMBEDDING]
    assert HEAD not in {step.name for step in plan(t1, both_tied).steps}
    for name, base, instruct in (("tu", t1, u2), ("ut", u1, t2), ("uu", u1, u2)):
        stored = residual(name, base, instruct)
        assert HEAD in open_inputs({"residual": stored})["residual"].tensors
        assert [ref.name for ref in step(plan(u1, stored), HEAD).inputs] == [HEAD, HEAD]
        with pytest.raises(CheckpointError, match="whose head is its embedding"):
            plan(t1, stored)


# --- residuals


def test_residuals_mirror_the_instruct_model(tmp_path: Path) -> None:
    base = write_model(tmp_path / "b", tensors(1), shards=1)
    instruct = write_model(tmp_path / "i", tensors(2), shards=3)
    plan = plan_extract(open_inputs({"base": base, "instruct": instruct}), Rules.of(0, dtype="bf16"))
    assert [file.name for file in plan.files] == [f"residual-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert {(step.op, step.roles, step.dtype) for step in plan.steps} == {("subtract", ("instruct", "base"), "BF16")}
    assert [step.name for step in plan.steps] == list(plan.inputs["instruct"].tensors)
    name, index = plan.documents[0]
    assert name == "residual.safetensors.index.json"
    assert json.loads(index)["metadata"] == {"total_size": plan_elements(plan) * 2}
    plan = plan_extract(open_inputs({"base": instruct, "instruct": base}), Rules.of(0))
    assert [file.name for file in plan.files] == ["residual.safetensors"]
    assert {step.dtype for step in plan.steps} == {"F32"}
    assert not plan.documents
    first = "|".join(re.escape(name) for name in list(open_inputs({"base": instruct})["base"].shards[0].header.tensors))
    plan = plan_extract(open_inputs({"base": base, "instruct": instruct}), Rules.of(0, skip=first))
    assert [file.name for file in plan.files] == [f"residual-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_extract_lists_what_only_one_model_has(tmp_path: Path) -> None:
    base = write_model(tmp_path / "b", {**tensors(1), "old": normal((2,), 1)})
    instruct = write_model(tmp_path / "i", {**tensors(2), "new": normal((2,), 1)})
    inputs = open_inputs({"base": base, "instruct": instruct})
    with pytest.raises(CheckpointError, match="'new' is in instruct and not in base") as caught:
        plan_extract(inputs, Rules.of(0))
    assert "'old' is in base and not in instruct" in str(caught.value)
    plan = plan_extract(inputs, Rules.of(0, allow_missing=True))
    assert len(plan.missing) == 2
    assert {step.name for step in plan.steps} == {*SHAPES}
    assert plan_extract(inputs, Rules.of(0, skip="old|new")).missing == ()


def test_several_residuals(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    ik.extract(base, instruct, tmp_path / "r1", sync=False)
    ik.extract(base, instruct, tmp_path / "r2", skip="norm", sync=False)
    inputs = open_inputs({"target": target, "residual-1": tmp_path / "r1", "residual-2": tmp_path / "r2"})
    rules = Rules.of(2, alpha=[0.7, -0.2], alphas=[("lm_head", [1, 0])], allow_missing=True)
    plan = plan_apply(inputs, rules)
    assert step(plan, EMBEDDING).roles == ("target", "residual-1", "residual-2")
    assert step(plan, EMBEDDING).factors == (0.7, -0.2)
    assert step(plan, HEAD).factors == (1.0, 0.0)
    assert (step(plan, "model.norm.weight").roles, step(plan, "model.norm.weight").factors) == (
        ("target", "residual-1"),
        (0.7,),
    )
    assert len(plan.missing) == 3
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is in target and residual-1 and not in residual-2"):
        plan_apply(inputs, dataclasses.replace(rules, allow_missing=False))


# --- side files


def names_by_role(plan: Plan) -> dict[str, set[str]]:
    return {role: {file.name for file in plan.side_files if file.role == role} for role in plan.inputs}


def test_side_files_come_from_the_right_parent(tmp_path: Path) -> None:
    plain = {"README.md": "", "modeling_x.py": "", ".gitattributes": "", "ires.json": "{}", "tokenizer.json": "t"}
    base, instruct, target = triple(tmp_path)
    for folder, files in (
        (
            target,
            {
                **plain,
                "merges.txt": "",
                "chat_template.jinja": "",
                "generation_config.json": "",
                "pytorch_model.bin": "",
            },
        ),
        (
            instruct,
            {
                **plain,
                "tokenizer_config.json": "",
                "generation_config.json": "",
                "additional_chat_templates/rag.jinja": "",
            },
        ),
    ):
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    (target / "original").mkdir()
    (target / "link.json").symlink_to(target / "config.json")
    os.mkfifo(target / "pipe")
    plan = one_pass(base, instruct, target)
    assert names_by_role(plan) == {
        "target": {"README.md", "modeling_x.py", "config.json", "link.json"},
        # a tokenizer comes as a whole: no merges.txt and no template of the target
        "instruct": {
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "additional_chat_templates/rag.jinja",
        },
        "base": set(),
    }
    replaced = ("chat_template.jinja", "merges.txt")
    assert plan.not_copied == (*replaced, "original/", "pipe", "pytorch_model.bin")


@pytest.mark.parametrize("name", ["tiktoken.model", "qwen.tiktoken", "spm.model", "source.spm", "bpe.codes"])
def test_tokenizers_of_all_kinds_come_from_instruct(tmp_path: Path, name: str) -> None:
    base, instruct, target = triple(tmp_path)
    for folder in (instruct, target):
        (folder / name).write_text(folder.name)
    assert names_by_role(one_pass(base, instruct, target))["instruct"] == {name}


def test_a_dangling_tokenizer_is_an_error(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    (instruct / "tokenizer.json").symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link to .*gone, which is not there"):
        one_pass(base, instruct, target)


def test_the_target_gives_what_the_instruct_model_lacks(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    files = ["tokenizer.json", "chat_template.jinja", "generation_config.json"]
    for name in files:
        (target / name).write_text("{}")
    assert names_by_role(one_pass(base, instruct, target))["target"] == {*files, "config.json"}
    (instruct / "chat_template.jinja").write_text("x")
    assert names_by_role(one_pass(base, instruct, target))["instruct"] == {"chat_template.jinja"}
    (base / "chat_template.jinja").write_text("x")
    assert not one_pass(base, instruct, target).warnings
    (instruct / "chat_template.jinja").unlink()
    (base / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert "the wrong way round" in one_pass(base, instruct, target).warnings[0]
    extracted = plan_extract(open_inputs({"base": base, "instruct": instruct}), Rules.of(0))
    assert "the wrong way round" in extracted.warnings[0]


def test_single_files_have_no_side_files(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    plan = one_pass(*(path / "model.safetensors" for path in (base, instruct, target)))
    assert not plan.side_files
    assert [file.name for file in plan.files] == ["model.safetensors"]


# --- the plan as a value


def test_the_id_covers_what_determines_the_output_and_nothing_else(tmp_path: Path) -> None:
    paths = triple(tmp_path)
    plan = one_pass(*paths)
    assert one_pass(*paths).id == plan.id
    moved = tmp_path / "elsewhere"
    paths[2].rename(moved)
    assert one_pass(*paths[:2], moved).id == plan.id
    others = [
        one_pass(*paths[:2], moved, **rules).id
        for rules in ({"alpha": 0.5}, {"skip": "norm"}, {"dtype": "f32"}, {"seed": 1})
    ]
    os.utime(moved / "model.safetensors", ns=(1, 1))
    others.append(one_pass(*paths[:2], moved).id)
    assert len({plan.id, *others}) == 6
    assert re.fullmatch("[0-9a-f]{32}", plan.id)


def test_a_plan_prints_and_becomes_json(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, files={"tokenizer.json": "{}"})
    plan = one_pass(base, instruct, target, alpha=0.7, skip="norm", rounding="stochastic", seed=3)
    text = str(plan)
    for part in (
        plan.id, f"{target} (7 tensors)", "stochastic, seed 3", "+ 0.7 * (instruct - base), BF16 → BF16",
        "copied: skipped by 'norm'", "tokenizer.json", "ires.json",
    ):  # fmt: skip
        assert part in text
    table = json.loads(json.dumps(plan.to_dict()))
    assert table["id"] == plan.id
    assert [tensor["name"] for tensor in table["tensors"]] == [step.name for step in plan.steps]
    assert table["tensors"][0]["inputs"]["base"]["file"] == f"{base}/model.safetensors"
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.operation = "extract"  # type: ignore[misc]


# --- rules


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"alpha": float("nan")}, ArgumentError, "alpha is nan, wanted a finite number"),
        ({"alpha": float("inf")}, ArgumentError, "alpha is inf, wanted a finite number"),
        ({"alpha": 10**400}, ArgumentError, "alpha is inf"),
        ({"alpha": 1e39}, ArgumentError, "infinite in float32"),
        ({"alpha": True}, TypeError, "alpha is bool True, wanted a real number"),
        ({"alpha": 1j}, TypeError, "alpha is complex 1j, wanted a real number"),
        ({"alpha": "1"}, TypeError, "alpha is str '1', wanted a real number"),
        ({"alpha": [1, 2]}, ArgumentError, "alpha: got 2 factors for 1 residuals"),
        ({"alphas": [("a", float("nan"))]}, ArgumentError, "alpha of 'a' is nan"),
        ({"alphas": [("(", 1)]}, ArgumentError, "'(' is not a regular expression"),
        ({"skip": ["["]}, ArgumentError, "'[' is not a regular expression"),
        ({"dtype": "int8"}, ArgumentError, "dtype is 'int8', wanted one of f64, f32, f16, bf16"),
        ({"rounding": "up"}, ArgumentError, "rounding is 'up'"),
        ({"seed": -1}, ArgumentError, "seed is -1, wanted 0 <= seed < 2^64"),
        ({"seed": 1.0}, TypeError, "seed is float, wanted an integer"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        Rules.of(1, **arguments)


def test_rules_come_back_from_a_manifest() -> None:
    rules = Rules.of(2, alpha=[0.7, 2], alphas={"x": [0.1, 0.2]}, skip="y", dtype="bf16", rounding="stochastic", seed=9)
    assert Rules.from_dict(json.loads(json.dumps(rules.to_dict()))) == rules
    assert Rules.from_dict(Rules.of(0).to_dict()) == Rules.of(0)
    for damaged in ({}, {**rules.to_dict(), "more": 1}, {**rules.to_dict(), "alpha": ["x"]}):
        with pytest.raises(ArgumentError, match="the rules of the manifest"):
            Rules.from_dict(damaged)
