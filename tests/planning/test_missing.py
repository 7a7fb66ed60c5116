"""Tensors that only some of the models have: each refusal names its own cause, and what is left out is never silent."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Tensors, normal, read_model, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.cli import main
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.records.report import Report

H, V, LAYERS, EXPERTS = 8, 32, 2, 4
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def model(seed: int) -> Tensors:
    """A tiny language model with experts; seeds 1 and 2 are near each other."""
    shapes = {EMBEDDING: (V, H), HEAD: (V, H), "model.norm.weight": (H,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (H, H) for x in "qkv"}
        shapes |= {f"{layer}.mlp.experts.{e}.{x}_proj.weight": (H, H) for e in range(EXPERTS) for x in ("gate", "up")}
        shapes |= {f"{layer}.input_layernorm.weight": (H,)}
    return {
        name: normal(shape, i) + normal(shape, 1000 * seed + i, scale=1e-3)
        for i, (name, shape) in enumerate(shapes.items())
    }


def write(root: Path, target: Tensors, instruct: Tensors, base: Tensors, **config: Any) -> tuple[Path, Path, Path]:
    settings = {"tie_word_embeddings": False, **config}
    folders = zip(("target", "instruct", "base"), (target, instruct, base), strict=True)
    one, two, three = (write_model(root / role, made, config=settings) for role, made in folders)
    return one, two, three


def half(tensors: Tensors) -> Tensors:
    """Others of the same kind: of what is the same in instruct and base nothing would be lost."""
    return {name: t / 2 for name, t in tensors.items()}


def merge(paths: tuple[Path, Path, Path], out: str = "out", **options: Any) -> Report:
    report = ik.apply(paths[0], paths[1:], out=paths[0].parent / out, sync=False, **options)
    assert isinstance(report, Report)
    return report


def refused(paths: tuple[Path, Path, Path], **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        merge(paths, **options)
    assert not (paths[0].parent / "out").exists()
    return f"{caught.value}"


def renamed(tensors: Tensors, *rules: tuple[str, str]) -> Tensors:
    found = {}
    for name, t in tensors.items():
        for old, new in rules:
            name = re.sub(old, new, name)
        found[name] = t
    return found


def few(tensors: Tensors) -> Tensors:
    """What is left of a model without attention and experts."""
    return {name: t for name, t in tensors.items() if "experts" not in name and "self_attn" not in name}


def fused(tensors: Tensors) -> Tensors:
    """One tensor for q, k and v, and one for all experts of a layer."""
    found = few(tensors)
    for i in range(LAYERS):
        at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp.experts"
        found[f"{at}.qkv_proj.weight"] = torch.cat([tensors[f"{at}.{x}_proj.weight"] for x in "qkv"])
        experts = [torch.cat([tensors[f"{mlp}.{e}.{x}_proj.weight"] for x in ("gate", "up")]) for e in range(EXPERTS)]
        found[f"{mlp}.gate_up_proj"] = torch.stack(experts)
    return found


# --- other layouts, which are no tensors that are missing


LAYOUTS: dict[str, tuple[Callable[[Tensors], Tensors], list[str]]] = {
    "inner prefix": (
        lambda t: renamed(t, ("^model", "model.language_model")),
        ["`model.` is `model.language_model.` in {}: 26 tensors"],
    ),
    "turned prefix": (
        lambda t: renamed(t, (r"^model\.", "language_model.model."), ("^lm_head", "language_model.lm_head")),
        ["no prefix is `language_model.` in {}: 27 tensors"],
    ),
    "no prefix": (lambda t: renamed(t, (r"^model\.", "")), ["`model.` is no prefix in {}: 26 tensors"]),
    "fused": (
        fused,
        [
            "`model.layers.*.self_attn.q_proj.weight`, `model.layers.*.self_attn.k_proj.weight` and "
            "`model.layers.*.self_attn.v_proj.weight` are `model.layers.*.self_attn.qkv_proj.weight` in {}, one behind "
            "the other: 6 tensors",
            "`model.layers.*.mlp.experts.*.gate_proj.weight` and `model.layers.*.mlp.experts.*.up_proj.weight` are "
            "`model.layers.*.mlp.experts.gate_up_proj` in {}, stacked by expert: 16 tensors",
        ],
    ),
    "other names": (
        lambda t: renamed(t, (r"input_layernorm\.weight", "input_layernorm.gamma")),
        ["`weight` is `gamma` in {}: 2 tensors"],
    ),
}


def merged(made: dict[str, Tensors], layout: Callable[[Tensors], Tensors]) -> Tensors:
    """The merge of models in one layout, in another."""
    plain = {
        n: (t.float() + (made["instruct"][n].float() - made["base"][n].float())).bfloat16()
        for n, t in made["target"].items()
    }
    return layout(plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("role", ["target", "instruct", "base", "instruct and base"])
def test_another_layout_is_matched_in_whichever_model_it_is(tmp_path: Path, layout: str, role: str) -> None:
    change, says = LAYOUTS[layout]
    made = {"target": model(3), "instruct": model(2), "base": model(1)}
    changed = {r: change(t) if r in role else t for r, t in made.items()}
    paths = write(tmp_path, changed["target"], changed["instruct"], changed["base"])
    plan = ik.apply(paths[0], paths[1:], out=tmp_path / "out", dry_run=True)
    if role != "target":
        lines = {line.partition("layout")[2].strip() for line in f"{plan}".splitlines() if line.startswith("layout")}
        assert lines == {line.format(role) for line in says}
    merge(paths)
    wanted, found = merged(made, change if role == "target" else dict), read_model(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], t) for name, t in wanted.items())
    assert ik.verify(tmp_path / "out")
    layouts = json.loads((tmp_path / "out" / "ires.json").read_bytes())["layout"]
    assert layouts.keys() == ({"instruct", "base"} if role == "target" else set(role.split(" and ")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_extract_matches_another_layout(tmp_path: Path, layout: str) -> None:
    """And its residual, in that of instruct, finds its place in a target of the other."""
    change, _ = LAYOUTS[layout]
    made = {"target": model(3), "instruct": model(2), "base": model(1)}
    paths = write(tmp_path, made["target"], change(made["instruct"]), made["base"])
    ik.extract(paths[2], paths[1], tmp_path / "residual", sync=False)
    assert ik.verify(tmp_path / "residual")
    ik.apply(paths[0], tmp_path / "residual", out=tmp_path / "out", sync=False)
    wanted, found = merged(made, dict), read_model(tmp_path / "out")
    assert all(torch.equal(found[name], t) for name, t in wanted.items())


# --- causes


def tower(seed: int) -> Tensors:
    return {f"visual.blocks.{i}.{x}.weight": normal((H, H), seed + i) for i in range(3) for x in ("attn", "mlp")}


def skip_of(text: str) -> str:
    found = re.search(r"--skip ('[^']*'|\S+)", text)
    assert found is not None
    return shlex.split(found[1])[0]


@pytest.mark.parametrize("lacking", ["target", "instruct", "base"])
def test_a_tower_that_one_model_lacks(tmp_path: Path, lacking: str) -> None:
    """The advised --skip merges all the rest."""
    made = {role: model(seed) | tower(seed) for role, seed in (("target", 3), ("instruct", 2), ("base", 1))}
    made[lacking] = model({"target": 3, "instruct": 2, "base": 1}[lacking])
    paths = write(tmp_path, made["target"], made["instruct"], made["base"])
    text = refused(paths)
    others = " and ".join(role for role in ("target", "instruct", "base") if role != lacking)
    assert (
        f"a part that not all models have: 'visual' (6 tensors, 768 bytes) is in {others} and not in {lacking}" in text
    )
    assert "belong together" not in text
    merge(paths, skip=skip_of(text))
    own, found = read_model(paths[0]), read_model(tmp_path / "out")
    assert {n for n in own if torch.equal(own[n], found[n])} == {n for n in own if n.startswith("visual")}


def test_further_tokens_and_truly_missing_tensors(tmp_path: Path) -> None:
    behind = {f"model.layers.{LAYERS}.{x}.weight": normal((H, H), 1) for x in ("eh_proj", "shared_head")}
    few = model(2)
    del few["model.layers.1.self_attn.k_proj.weight"]
    paths = write(tmp_path, model(3), few | behind, model(1) | half(behind), num_hidden_layers=LAYERS)
    text = refused(paths)
    assert (
        "'model.layers.2' (2 tensors, 256 bytes) is in instruct and base and not in target: "
        "multi-token prediction, behind the 2 of num_hidden_layers"
    ) in text
    assert "'model.layers.1.self_attn.k_proj.weight' is in target and base and not in instruct" in text
    assert "download or save" in text
    assert "--allow-missing" in text
    skips = [shlex.split(found)[0] for found in re.findall(r"--skip ('[^']*'|\S+)", text)]
    report = merge(paths, skip=skips)
    assert report.copied == {"model.layers.1.self_attn.k_proj.weight": f"skipped by {skips[0]!r}"}
    assert report.tensors == len(model(1)) - 1


def test_the_advised_pattern_finds_nothing_else(tmp_path: Path) -> None:
    """One layer of many, and then all of them: a pattern with numbers in place of a number only where all are meant."""
    for lacking in (["1"], ["0", "1"]):
        root = tmp_path / "".join(lacking)
        few = {n: t for n, t in model(2).items() if "mlp" not in n or n.split(".")[2] not in lacking}
        paths = write(root, model(3), few, model(1))
        text = refused(paths)
        assert ("\\d+" in skip_of(text)) == (len(lacking) == 2)
        copied = merge(paths, skip=skip_of(text)).copied
        assert copied.keys() == {n for n in model(1) if "mlp" in n and n.split(".")[2] in lacking}


def test_refusals_in_json_name_all_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write(tmp_path, few(model(3)), model(2), model(1))
    command = ["apply", f"{paths[0]}", "--instruct", f"{paths[1]}", "--base", f"{paths[2]}", "-o", f"{tmp_path / 'x'}"]
    assert main([*command, "--json"]) == 2
    out, err = capsys.readouterr()
    table = json.loads(out)
    assert err == f"ires: {table['error']}\n"
    assert {name for problem in table["problems"] for name in problem["tensors"]} == {
        name for name in model(1) if "experts" in name or "self_attn" in name
    }


def test_thousands_of_odd_names_are_explained_in_a_moment(tmp_path: Path) -> None:
    """With as many prefixes, parts and kinds of names as there are tensors."""
    inputs = {}
    for role, head in (("target", "a"), ("instruct", "b"), ("base", "c")):
        names = [f"{head}{i}.x.weight" for i in range(1500)] + [f"{head}.{i}.k{i}.weight" for i in range(1500)]
        inputs[role] = write_model(tmp_path / role, {name: torch.zeros(1) for name in names})
    started = time.process_time()  # of this process alone, however busy the machine is
    text = refused((inputs["target"], inputs["instruct"], inputs["base"]))
    assert time.process_time() - started < 30
    assert len(text) < 10_000


def test_many_missing_tensors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {name: t for name, t in model(2).items() if not name.endswith("up_proj.weight")}
    paths = write(tmp_path, model(3), few, model(1))
    text = refused(paths)
    assert (
        "8 tensors model.layers.*.mlp.experts.*.up_proj.weight are in target and base and not in instruct" not in text
    )
    assert "'model.layers.*.mlp.experts.*.up_proj' " in text or "8 tensors" in text
    assert len(text.splitlines()) == 3
    report = merge(paths, allow_missing=True)
    lines = [line for line in f"{report}".splitlines() if line.startswith("missing")]
    assert len(lines) == 1
    assert (
        "8 tensors model.layers.*.mlp.experts.*.up_proj.weight are in target and base and not in instruct" in lines[0]
    )
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(LAYERS) for e in range(EXPERTS)]
    assert sorted(report.to_dict()["missing"]) == [f"{n!r} is in target and base and not in instruct" for n in names]
    arguments = [
        "apply",
        f"{paths[0]}",
        "--instruct",
        f"{paths[1]}",
        "--base",
        f"{paths[2]}",
        "-o",
        f"{tmp_path / 'x'}",
    ]
    assert main([*arguments, "--allow-missing", "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["missing"]) == 8


# --- what loaders do not read


BUFFERS: dict[str, torch.Tensor] = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
    "visual.rotary_pos_emb.inv_freq": torch.rand(4),
    "embeddings.position_ids": torch.arange(4)[None],
    "h.0.attn.bias": torch.ones(1, 1, 4, 4),
    "h.0.attn.masked_bias": torch.tensor(-1e9),
    "swin.relative_position_index": torch.arange(4),
    "bn.num_batches_tracked": torch.tensor(3),
    "decoder.version": torch.tensor([3.0]),
    "layers.0._extra_state": torch.zeros(5, dtype=torch.uint8),
}


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("holders", [("target",), ("instruct",), ("base",), ("instruct", "base"), ("target", "base")])
def test_buffers_that_loaders_compute_again_are_no_problem(tmp_path: Path, name: str, holders: tuple[str, ...]) -> None:
    made = {
        role: model(seed) | ({name: BUFFERS[name]} if role in holders else {})
        for role, seed in (("target", 3), ("instruct", 2), ("base", 1))
    }
    paths = write(tmp_path, made["target"], made["instruct"], made["base"])
    report = merge(paths)
    assert report.tensors == len(model(1))
    found = read_model(tmp_path / "out")
    if "target" in holders:
        assert torch.equal(found[name], BUFFERS[name])
    else:
        assert found.keys() == model(1).keys()
        assert f"{name!r}"[1:-1].rpartition(".")[2] in f"{report}"
        assert "left out" in " ".join(report.notes)
    ik.extract(paths[2], paths[1], tmp_path / "residual", sync=False)


@pytest.mark.parametrize(
    ("name", "t"),
    [
        ("h.0.attn.bias", torch.rand(8)),
        ("h.0.attn.c_attn.bias", torch.rand(1, 1, 4, 4)),
        ("gate.e_score_correction_bias", torch.rand(4)),
        ("bn.running_mean", torch.rand(4)),
        ("x.rotary_emb.inv_freq.weight", torch.rand(4)),
        ("mixer.A_log", torch.rand(4)),
    ],
)
def test_trained_tensors_of_like_names_are_missed(tmp_path: Path, name: str, t: torch.Tensor) -> None:
    paths = write(tmp_path, model(3), model(2) | {name: t}, model(1) | half({name: t}))
    assert f"{name!r} is in instruct and base and not in target" in refused(paths)


# --- how much is left out


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


@pytest.mark.parametrize("how", ["pair", "residual", "in place"])
def test_a_warning_says_how_much_went_in(tmp_path: Path, how: str) -> None:
    """Elements and norm of the residual against a sum in float64; alpha changes nothing in its shares."""
    more = {"extra.weight": (10, 10)}
    base = model(1) | {n: normal(shape, 5) for n, shape in more.items()}
    instruct = model(2) | {n: base[n] + normal(shape, 6, scale=1e-3) for n, shape in more.items()}
    paths = write(tmp_path, model(3), instruct, base)
    options: dict[str, Any] = {"allow_missing": True, "sync": False, "alpha": 0.5}
    given: Any = paths[1:]
    if how == "residual":
        ik.extract(paths[2], paths[1], tmp_path / "residual", sync=False)
        given = tmp_path / "residual"
    if how == "in place":
        report = ik.apply(paths[0], given, in_place=True, **options)
    else:
        report = ik.apply(paths[0], given, out=tmp_path / "out", **options)
    inside = sum(t.numel() for t in model(1).values())
    difference = {n: instruct[n].double() - base[n].double() for n in base}
    part = norm([difference[n] for n in model(1)]) / norm(list(difference.values()))
    wanted = (
        f"of the residual {len(model(1))} of {len(model(1)) + 1} tensors went in, {inside / (inside + 100):.2%} of its "
        f"elements and {part:.2%} of its norm"
    )
    assert report.warnings[-1] == wanted  # type: ignore[union-attr]
    assert f"warning           {wanted}" in f"{report}"


def test_the_norm_of_several_residuals_is_that_of_their_sum(tmp_path: Path) -> None:
    base = model(1) | {"extra.weight": normal((10, 10), 5)}
    instruct = model(2) | {"extra.weight": base["extra.weight"] + normal((10, 10), 6, scale=1e-3)}
    paths = write(tmp_path, model(3), instruct, base)
    for name in ("r1", "r2"):
        ik.extract(paths[2], paths[1], tmp_path / name, sync=False)
    report = ik.apply(
        paths[0], [tmp_path / "r1", tmp_path / "r2"], alpha=[1.0, -0.25], out=tmp_path / "out", sync=False,
        allow_missing=True,
    )  # fmt: skip
    difference = {n: instruct[n].double() - base[n].double() for n in base}
    part = norm([difference[n] for n in model(1)]) / norm(list(difference.values()))
    assert f"{part:.2%} of its norm" in report.warnings[-1]  # type: ignore[union-attr]


def test_more_than_a_tenth_wants_another_word(tmp_path: Path) -> None:
    paths = write(tmp_path, few(model(3)), model(2), model(1))
    text = refused(paths, allow_missing=True)
    assert "--allow-missing would leave out too much: of the residual 5 of 27 tensors went in, 27.57% of its" in text
    assert "--allow-missing=any" in text
    report = merge(paths, allow_missing="any")
    assert report.warnings[-1].startswith("of the residual 5 of 27 tensors went in, 27.57% of its elements and ")
    ik.extract(paths[2], paths[1], tmp_path / "residual", sync=False)
    with pytest.raises(CheckpointError, match="would leave out too much"):
        ik.load(paths[0], tmp_path / "residual", allow_missing=True)
    with pytest.raises(CheckpointError, match="would leave out too much"):
        ik.extract(write_model(tmp_path / "b", few(model(1))), paths[1], tmp_path / "x", allow_missing=True)
    with pytest.warns(UserWarning, match=r"27\.57% of its elements"):
        ik.load(paths[0], tmp_path / "residual", allow_missing="any")
    assert ik.verify(tmp_path / "out")


def test_the_tenth_is_one_of_elements(tmp_path: Path) -> None:
    count = sum(t.numel() for t in model(1).values())
    for extra, fits in ((count // 9 - 1, True), (count // 9 + 1, False)):
        root = tmp_path / f"{extra}"
        more = {"extra.weight": normal((extra,), 1)}
        paths = write(root, model(3), model(2) | more, model(1) | half(more))
        if fits:
            merge(paths, allow_missing=True)
        else:
            assert "leave out too much" in refused(paths, allow_missing=True)


def test_only_these_values_allow(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match='wanted True, False or "any"'):
        ik.extract(tmp_path / "a", tmp_path / "b", tmp_path / "c", allow_missing="some")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The option takes no separate value, so a residual may follow it."""
    paths = write(
        tmp_path, model(3), model(2) | {"x.weight": normal((4,), 1)}, model(1) | {"x.weight": normal((4,), 2)}
    )
    residual = tmp_path / "residual"
    assert main(["extract", f"{paths[2]}", f"{paths[1]}", "-o", f"{residual}", "--no-sync"]) == 0
    assert main(["apply", f"{paths[0]}", "--allow-missing", f"{residual}", "-o", f"{tmp_path / 'a'}", "--no-sync"]) == 0
    out = capsys.readouterr().out
    assert "of the residual 27 of 28 tensors went in" in out
    assert main(["apply", f"{paths[0]}", "--allow-missing=any", f"{residual}", "-o", f"{tmp_path / 'b'}"]) == 0
    capsys.readouterr()
    little = write_model(tmp_path / "little", few(model(3)))
    arguments = ["apply", f"{little}", f"{residual}", "-o", f"{tmp_path / 'c'}", "--no-sync"]
    assert main([*arguments, "--allow-missing"]) == 2
    assert "--allow-missing=any" in capsys.readouterr().err
    assert main([*arguments, "--allow-missing=any"]) == 0


def test_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    target, instruct = model(3), model(2)
    for i in range(LAYERS):
        for e in range(EXPERTS):
            for x in ("gate", "up"):
                target[f"model.layers.{i}.mlp.experts.{e}.{x}_proj.weight"][0, 0] = math.nan
    instruct["model.norm.weight"][0] = math.inf
    report = merge(write(tmp_path, target, instruct, model(1)))
    nan, inf = (next(w for w in report.warnings if w.startswith(word)) for word in ("NaN", "infinities"))
    assert nan.startswith("NaN in the inputs of 16 tensors: model.layers.0.mlp.experts.0.gate_proj.weight, ")
    assert nan.endswith(" and 6 more")
    assert inf == "infinities in the inputs of 1 tensor: model.norm.weight"


# --- vocabularies and second copies


@pytest.mark.parametrize(
    ("rows", "layout"),
    [
        (["transformer.wte.weight"], "gpt2"),
        (["gpt_neox.embed_in.weight", "embed_out.weight"], "neox"),
        (["tok_embeddings.weight", "output.weight"], "mistral"),
        (["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"], "bert"),
    ],
)
def test_other_padding_is_no_difference_whatever_names_a_model_has(
    tmp_path: Path, rows: list[str], layout: str
) -> None:
    def made(count: int, seed: int) -> Tensors:
        shapes = {n: (count,) if n.endswith("bias") else (count, H) for n in rows}
        return {n: normal(shape, seed) for n, shape in shapes.items()} | {f"{layout}.w.weight": normal((H, H), seed)}

    for target, others in ((V, V + 8), (V + 8, V)):
        root = tmp_path / f"{target}"
        t, i, b = models = made(target, 3), made(others, 2), made(others, 1)
        report = merge(write(root, *models))
        assert report.notes == (
            f"{', '.join(sorted(rows))}: of {target} rows {V} are added to" + ", 8 stay as they are" * (target > V),
        )
        found = read_model(root / "out")
        for name in rows:
            wanted = (t[name][:V].double() + i[name][:V].double() - b[name][:V].double()).to(t[name].dtype)
            assert torch.equal(found[name], torch.cat([wanted, t[name][V:]]))


BERT = "bert.embeddings.word_embeddings.weight"
DECODER, BIAS, SECOND_BIAS = "cls.predictions.decoder.weight", "cls.predictions.bias", "cls.predictions.decoder.bias"


def bert(seed: int, twice: bool) -> Tensors:
    made = {BERT: normal((V, H), seed), BIAS: normal((V,), seed + 50), "bert.w.weight": normal((H, H), seed)}
    return made | ({DECODER: made[BERT].clone(), SECOND_BIAS: made[BIAS].clone()} if twice else {})


@pytest.mark.parametrize("holders", range(8))
def test_second_copies_of_an_encoder_are_told_by_their_bytes(tmp_path: Path, holders: int) -> None:
    """Whichever of the three models stores them: as if all stored them, or none."""
    made = [bert(seed, bool(holders >> i & 1)) for i, seed in enumerate((3, 2, 1))]
    paths = write(tmp_path, made[0], made[1], made[2], tie_word_embeddings=True)
    merge(paths)
    found = read_model(tmp_path / "out")
    assert found.keys() == made[0].keys()
    for name in found:
        original = {DECODER: BERT, SECOND_BIAS: BIAS}.get(name, name)
        t, i, b = (each[original].float() for each in made)
        assert torch.equal(found[name], (t + (i - b)).bfloat16()), name
    ik.extract(paths[2], paths[1], tmp_path / "residual", sync=False)
    ik.apply(paths[0], tmp_path / "residual", out=tmp_path / "two", sync=False)
    two = read_model(tmp_path / "two")
    assert all(torch.equal(two[name], found[name]) for name in found)


@pytest.mark.parametrize("tied", [None, True, False])
@pytest.mark.parametrize("skip", [(), "lm_head"])
def test_a_tied_target_and_an_instruct_model_that_stores_its_head(tmp_path: Path, tied: bool | None, skip: Any) -> None:
    def made(seed: int, head: bool) -> Tensors:
        tensors = {n: t for n, t in model(seed).items() if n != HEAD}
        return tensors | ({HEAD: tensors[EMBEDDING].clone()} if head else {})

    settings = {} if tied is None else {"tie_word_embeddings": tied}
    target = write_model(tmp_path / "target", made(3, False), config={"tie_word_embeddings": True})
    instruct = write_model(tmp_path / "instruct", made(2, True), config=settings)
    base = write_model(tmp_path / "base", made(1, False), config={"tie_word_embeddings": True})
    report = merge((target, instruct, base), skip=skip)
    assert report.tensors == len(made(3, False))
    other = made(2, True)
    other[HEAD] = other[HEAD] + 1
    unlike = write_model(tmp_path / "unlike", other, config={"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match="One tensor cannot take the updates of two"):
        merge((target, unlike, base), out="other")


def test_a_shard_as_target_takes_what_is_its_own(tmp_path: Path) -> None:
    made = {role: write_model(tmp_path / role, model(s), shards=3) for s, role in enumerate(("b", "i", "t"), 1)}
    shard = made["t"] / "model-00002-of-00003.safetensors"
    report = ik.apply(shard, (made["i"], made["b"]), in_place=True, sync=False)
    assert any("target is shard 2 of 3" in note for note in report.notes)  # type: ignore[union-attr]
    assert report.missing == ()  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(40))
def test_odd_mixes_are_merged_or_refused(tmp_path: Path, seed: int) -> None:
    """Models that share some names, dtypes and shapes and not others: never anything but a result or a refusal."""
    draw = random.Random(seed)
    pool = [
        EMBEDDING, HEAD, "w", "model.layers.0.q.weight", "model.layers.1.q.weight", "model.layers.0.q.weight_scale",
        "model.layers.0.q.qweight", "model.layers.0.q.bias", "model.language_model.layers.0.q.weight",
        "layers.0.q.weight", "model.layers.0.experts.0.up.weight", "model.layers.0.experts.up", "visual.a.weight",
        "x.lora_A.weight", "h.0.attn.bias", "position_ids", "model.layers.0.self_attn.k_scale", DECODER, BIAS, "scale",
        "a..b", ".x", "9", "model.layers.0.q.weight.absmax", "é.weight", "a b'c.weight",
    ]  # fmt: skip
    dtypes = [torch.bfloat16] * 6 + [torch.float32, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool]
    shapes = [(8, 4)] * 6 + [(8,), (), (0,), (0, 4), (1, 1, 4, 4)]
    common = {name: (draw.choice(dtypes), draw.choice(shapes)) for name in draw.sample(pool, draw.randint(1, 9))}
    paths = []
    for role in ("target", "instruct", "base"):
        made = {n: (torch.rand(s) * 5).to(d) for n, (d, s) in common.items() if draw.random() > 0.1}
        made |= {draw.choice(pool): torch.rand(8, 4)} if draw.random() < 0.3 else {}
        config = {"tie_word_embeddings": draw.choice([True, False, None]), "num_hidden_layers": draw.choice([1, "x"])}
        paths.append(write_model(tmp_path / role, made or {"w": torch.rand(2)}, config=config))
    target, instruct, base = paths
    options: dict[str, Any] = {"allow_missing": draw.choice([False, True, "any"]), "sync": False}
    residual = tmp_path / "residual"
    with suppress(CheckpointError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ik.apply(target, (instruct, base), out=tmp_path / "out", dtype=draw.choice([None, "f32"]), **options)
        assert ik.verify(tmp_path / "out")
    with suppress(CheckpointError):
        ik.extract(base, instruct, residual, skip=draw.choice([[], ["weight"]]), **options)
        assert ik.verify(residual)
        ik.apply(target, residual, in_place=True, **options)
    for path in paths:
        ik.inspect(path)
