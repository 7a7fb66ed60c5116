"""Whether models are told from strangers, and their odd tensors from the others, by a few of their weights."""

from __future__ import annotations

import base64
import json
import re
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import SHAPES, Tensors, normal, tensors, write_model

import ires_kernels as ik
from ires_kernels.checkpoints import sources
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.planning import ancestry
from ires_kernels.planning.ancestry import Ancestry
from ires_kernels.planning.evidence import Looks, Sample, old_places, places
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Operand, Output, Step

MATRICES = sum(len(shape) > 1 for shape in SHAPES.values())


def model(folder: Path, weights: Tensors, **options: Any) -> Path:
    return write_model(folder, weights, config={"tie_word_embeddings": False}, **options)


def moved(weights: Tensors, by: float, seed: int = 5) -> Tensors:
    """The weights plus noise, `by` times their standard deviation of 0.02."""
    return {n: (t.float() + normal(t.shape, seed, torch.float32, 0.02 * by)).to(t.dtype) for n, t in weights.items()}


def compared(tmp_path: Path, base: Tensors, other: Tensors) -> Ancestry:
    """What a plan says of two models."""
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    plan = ik.extract(
        model(folder / "base", base), model(folder / "other", other), folder / "none", dry_run=True, trust_names=True
    )
    assert isinstance(plan, Plan)
    (found,) = plan.ancestry
    assert Ancestry.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    return found


def test_a_model_is_its_own_relative(tmp_path: Path) -> None:
    found = compared(tmp_path, tensors(1), tensors(1))
    assert (found.equal, found.related, found.distance, found.odd) == (True, True, 0, {})
    assert found.cosine == pytest.approx(1)
    assert (found.matrices, found.tensors) == (MATRICES, len(SHAPES))
    assert f"{found}" == f"instruct is base: all that was sampled is equal, in {len(SHAPES)} tensors"


@pytest.mark.parametrize("by", [0.1, 0.5, 1.0])
def test_what_is_measured_of_a_moved_model(tmp_path: Path, by: float) -> None:
    shapes = {f"layer.{i}.weight": (32, 64) for i in range(64)} | {f"expert_{i}.weight": (40, 12) for i in range(64)}
    w = tensors(1, shapes)
    found = compared(tmp_path, w, moved(w, by))
    assert found.distance == pytest.approx(by, rel=0.1)
    assert found.cosine == pytest.approx((1 + by**2) ** -0.5, abs=0.02)
    assert found.related
    assert not found.equal
    assert not found.odd
    assert f"{found}" == (
        f"instruct descends from base: median cosine {found.cosine:.2f} of 128 matrices, distance "
        f"{found.distance:.2f} of the norm"
    )


def test_a_stranger_is_told_although_its_norms_are_the_same(tmp_path: Path) -> None:
    ours, theirs = tensors(1), tensors(2)
    vectors = {name: torch.ones_like(t) for name, t in ours.items() if t.dim() == 1}
    found = compared(tmp_path, ours | vectors, theirs | vectors)
    assert abs(found.cosine) < 0.3
    assert not found.related
    (warning,) = ancestry.warnings([found], {})
    assert f"median cosine of {MATRICES} sampled tensors is {found.cosine:.2f}" in warning
    assert f"{found.distance:.2f} times the base's norm" in warning
    assert f"{found}".startswith("instruct is a stranger to base: ")


@pytest.mark.parametrize("related", [True, False])
def test_an_instruct_model_that_is_no_relative_of_the_base(tmp_path: Path, related: bool) -> None:
    """By extract and by apply, dry or not: the target is one of the base's in any case."""
    base = tensors(1)
    paths = [
        model(tmp_path / name, weights)
        for name, weights in (("base", base), ("instruct", moved(base, 0.5) if related else tensors(2)))
    ]
    target = model(tmp_path / "target", moved(base, 0.3, seed=6))
    extracted = ik.extract(*paths, tmp_path / "residual", sync=False)
    done = [
        ik.extract(*paths, tmp_path / "none", dry_run=True),
        extracted,
        ik.apply(target, (paths[1], paths[0]), out=tmp_path / "none", dry_run=True),
        ik.apply(target, (paths[1], paths[0]), out=tmp_path / "out", sync=False),
    ]
    for each in done:
        found = [warning for warning in each.warnings if "look unrelated" in warning]
        assert len(found) == (0 if related else 1)
        assert all(warning.startswith("instruct and base look unrelated: the median cosine of ") for warning in found)
        assert [kin.model for kin in each.ancestry] == ["instruct", "target"][: len(each.ancestry)]
        assert [kin.related for kin in each.ancestry] == [related, True][: len(each.ancestry)]
    assert (next(row[0] for row in done[1].rows()[1:]), done[3].rows()[1][0]) == ("extracted", "merged")
    assert "merged" not in f"{extracted}"
    with nullcontext() if related else pytest.warns(UserWarning, match="instruct and base look unrelated"):
        ik.load(target, (paths[1], paths[0]))


# --- what a report and a manifest say of the target


@pytest.mark.parametrize("way", ["one pass", "residual"])
@pytest.mark.parametrize("target", ["the base", "wider", "a descendant", "a stranger", "one norm else"])
def test_a_merge_says_what_its_target_is(tmp_path: Path, way: str, target: str) -> None:
    w = tensors(1)
    other = {
        "the base": w,
        "wider": {name: t.float() for name, t in w.items()},
        "a descendant": moved(w, 0.2, 6),
        "a stranger": tensors(2),
        "one norm else": w | {"model.norm.weight": w["model.norm.weight"] * 2},
    }[target]
    paths = [model(tmp_path / name, t) for name, t in (("base", w), ("instruct", moved(w, 0.1)), ("target", other))]
    ik.extract(paths[0], paths[1], tmp_path / "residual", sync=False)
    source = tmp_path / "residual" if way == "residual" else (paths[1], paths[0])
    base = "the base of residual" if way == "residual" else "base"
    wanted = {"the base": "is", "wider": "is", "a stranger": "stranger"}.get(target, "descends")

    def check(said: list[dict[str, Any]], text: str) -> None:
        found = next(each for each in said if each["model"] == "target")
        assert (found["relation"], found["base"]) == (wanted, base)
        assert (f"target is {base}: all that was sampled is equal" in text) == (wanted == "is")
        assert (f"target descends from {base}: median cosine " in text) == (wanted == "descends")

    plan = ik.apply(paths[2], source, out=tmp_path / "out", dry_run=True)
    check(plan.to_dict()["ancestry"], f"{plan}".replace("\n", " "))
    report = ik.apply(paths[2], source, out=tmp_path / "out", sync=False)
    check(report.to_dict()["ancestry"], " ".join(f"{report}".split()))
    check(json.loads((tmp_path / "out" / "ires.json").read_text())["ancestry"], " ".join(f"{report}".split()))
    assert any("target and" in line for line in report.warnings) == (wanted == "stranger")


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_update_in_place_says_what_its_target_was(tmp_path: Path, interrupted: bool) -> None:
    w = tensors(1, {f"layer.{i}.weight": (64, 1024) for i in range(8)})
    base, target = (model(tmp_path / name, w) for name in ("base", "target"))
    instruct = model(tmp_path / "instruct", tensors(2, {name: tuple(t.shape) for name, t in w.items()}))

    def stop(done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            ik.apply(target, (instruct, base), in_place=True, progress=stop, sync=False)
        report = ik.resume(target)
    else:
        report = ik.apply(target, (instruct, base), in_place=True, sync=False)
    manifest = json.loads((target / "ires.json").read_text())
    assert manifest["ancestry"] == report.to_dict()["ancestry"]
    assert [kin["relation"] for kin in manifest["ancestry"]] == ["stranger", "is"]
    again = ik.extract(base, target, tmp_path / "none", dry_run=True)
    assert [kin.related for kin in again.ancestry] == [False]


# --- tensors that are others


@pytest.mark.parametrize("way", ["one pass", "residual"])
def test_tensors_whose_rows_are_in_another_order_are_named(tmp_path: Path, way: str) -> None:
    """Equal names and shapes prove nothing: one library writes [gate; up], another [up; gate]."""
    shapes = SHAPES | {f"model.layers.{i}.gate_up.weight": (48, 16) for i in range(2)}
    base = tensors(1, shapes)
    turned = {name: t.roll(24, 0) if "gate_up" in name else t for name, t in base.items()}
    paths = [
        model(tmp_path / name, weights)
        for name, weights in (("base", base), ("instruct", moved(base, 0.1)), ("target", moved(turned, 0.1, seed=6)))
    ]
    ik.extract(paths[0], paths[1], tmp_path / "residual", sync=False)
    source = tmp_path / "residual" if way == "residual" else (paths[1], paths[0])

    def said(**options: Any) -> list[str]:
        options |= {"dry_run": True, "trust_names": True}
        return ik.apply(paths[2], source, out=tmp_path / "out", **options).warnings

    (warning,) = said()
    what = "the base of residual" if way == "residual" else "base"
    assert warning.startswith(f"target and {what} are related, but for model.layers.*.gate_up.weight (cosine ")
    advice = warning.partition("--skip ")[2]
    (pattern,) = shlex.split(advice)
    assert [name for name in base if re.search(pattern, name)] == [name for name in base if "gate_up" in name]
    assert said(skip=pattern) == ()
    with pytest.warns(UserWarning, match="in another order"):
        ik.load(paths[2], source, trust_names=True)


@pytest.mark.parametrize(("heads", "size", "width"), [(8, 16, 16), (1, 16, 64), (32, 128, 64), (12, 64, 96)])
@pytest.mark.parametrize("role", ["instruct", "target", "target of a residual"])
def test_queries_in_rotary_order_are_named(tmp_path: Path, role: str, heads: int, size: int, width: int) -> None:
    """Of the rows of a head the first and the last stay where they are, so it takes others to see it."""
    shapes = SHAPES | {f"model.layers.{i}.self_attn.q_proj.weight": (heads * size, width) for i in range(2)}
    weights = dict.fromkeys(("base", "instruct", "target"), tensors(1, shapes))
    changed = role.partition(" ")[0]
    weights[changed] = {
        name: t.view(heads, 2, size // 2, width).transpose(1, 2).reshape(t.shape) if "q_proj" in name else t
        for name, t in weights["base"].items()
    }
    paths = {name: model(tmp_path / name, moved(each, 0.1)) for name, each in weights.items()}
    if role == "target of a residual":
        ik.extract(paths["base"], paths["instruct"], tmp_path / "residual", sync=False)
        given: Any = tmp_path / "residual"
    else:
        given = paths["instruct"], paths["base"]
    plan = ik.apply(paths["target"], given, out=tmp_path / "out", dry_run=True, trust_names=True)
    (warning,) = plan.warnings
    base = "the base of residual" if role == "target of a residual" else "base"
    assert warning.startswith(
        f"{changed} and {base} are related, but for model.layers.*.self_attn.q_proj.weight (cosine "
    )


def test_a_part_of_the_rows_in_another_order_is_seen_in_all_of_a_kind(tmp_path: Path) -> None:
    """As where the last rows alone are rotated."""
    shapes = {f"layers.{i}.{name}.weight": (576, 64) for i in range(8) for name in ("kv_a", "other")}
    base = tensors(1, shapes)

    def turned(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t[:512], t[512:].view(2, 32, 64).transpose(0, 1).reshape(64, 64)])

    found = compared(tmp_path, base, {n: turned(t) if "kv_a" in n else t for n, t in moved(base, 0.1).items()})
    assert found.odd.keys() == {name for name in base if "kv_a" in name}
    one = {n: turned(t) if n == "layers.3.kv_a.weight" else t for n, t in moved(base, 0.1).items()}
    assert not compared(tmp_path, base, one).odd, "one alone may have learnt something"


def test_what_has_its_place_changed_about_is_odd(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.{name}.weight": (64, 32) for i in range(8) for name in ("q", "k", "v")}
    base = tensors(1, shapes)
    again = base | {"layers.2.q.weight": normal((64, 32), 99)}
    assert compared(tmp_path, base, moved(again, 0.1)).odd.keys() == {"layers.2.q.weight"}
    swapped = dict(base)
    for name in ("q", "k", "v"):
        swapped[f"layers.1.{name}.weight"] = base[f"layers.2.{name}.weight"]
        swapped[f"layers.2.{name}.weight"] = base[f"layers.1.{name}.weight"]
    odd = compared(tmp_path, base, moved(swapped, 0.1)).odd
    assert odd.keys() == {f"layers.{i}.{name}.weight" for i in (1, 2) for name in ("q", "k", "v")}
    assert all(abs(cosine) < 0.3 for cosine in odd.values())
    rolled = {
        name: base[name.replace(f".{i}.", f".{(i + 1) % 8}.")] for i in range(8) for name in base if f".{i}." in name
    }
    assert not compared(tmp_path, base, {name: rolled[name] for name in base}).related, "all layers: a stranger"


def test_what_has_no_values_of_its_own_is_not_odd(tmp_path: Path) -> None:
    """Zeros, norms near one, towers that are equal, and what has too few elements."""
    shapes = {f"layers.{i}.{name}.weight": (64, 32) for i in range(4) for name in ("q", "k")}
    base = tensors(1, shapes)
    base |= {"zero": torch.zeros(64, 32, dtype=torch.bfloat16), "few": normal((7, 8), 3)}
    base |= {f"layers.{i}.norm.weight": (1 + normal((256,), i)).bfloat16() for i in range(4)}
    tower = {name.replace("layers", "tower"): t.clone() for name, t in base.items() if "layers" in name}
    other = moved(base, 0.1) | {"zero": normal((64, 32), 9), "few": normal((7, 8), 4)}
    other |= {f"layers.{i}.norm.weight": base[f"layers.{(i + 1) % 4}.norm.weight"] for i in range(4)}
    assert not compared(tmp_path, base | tower, other | moved(tower, 0.1)).odd


@pytest.mark.parametrize("by", [0.1, 0.5, 1.0, 1.3])
def test_no_tensor_of_relatives_is_odd(tmp_path: Path, by: float) -> None:
    shapes = {f"kind_{i}.weight": (32, 64) for i in range(200)}
    w = tensors(1, shapes)
    assert not compared(tmp_path, w, moved(w, by)).odd


# --- what residuals remember


def sketch_of(residual: Path) -> dict[str, str]:
    return json.loads((residual / "residual.json").read_text())["sketch"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_residual_holds_what_base_has_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    base = {name: t.to(dtype) for name, t in tensors(1).items()} | {"count": torch.arange(4)}
    instruct = {name: t.to(dtype) for name, t in moved(tensors(1), 0.5).items()} | {"count": torch.arange(4)}
    ik.extract(model(tmp_path / "b", base), model(tmp_path / "i", instruct), tmp_path / "r", sync=False)
    ik.extract(
        model(tmp_path / "b3", base, shards=3), model(tmp_path / "i2", instruct, shards=2), tmp_path / "r2", sync=False
    )
    sketch = sketch_of(tmp_path / "r")
    assert sketch == sketch_of(tmp_path / "r2")
    assert sketch.keys() == base.keys() - {"count"}
    for name, text in sketch.items():
        t = base[name]
        sampled = torch.cat([t.flatten()[first : first + count] for first, count in places(tuple(t.shape))])
        assert base64.b64decode(text.split(" ")[2]) == sampled.view(torch.uint8).numpy().tobytes()


def old_residual(residual: Path, base: Tensors) -> None:
    """Make a residual one of a version that kept bfloat16 of matrices, at other places."""
    file = residual / "residual.json"
    table = json.loads(file.read_text())
    del table["sketch"]
    table["ancestry"] = {}
    for name, t in base.items():
        if t.dim() > 1:
            sampled = torch.cat([t.flatten()[first : first + 16] for first, _ in old_places(t.numel())])
            data = sampled.bfloat16().view(torch.uint8).numpy().tobytes()
            table["ancestry"][name] = f"{t.numel()} {base64.b64encode(data).decode()}"
    file.write_text(json.dumps(table))


def test_old_residuals_still_know_their_base(tmp_path: Path) -> None:
    w = tensors(1)
    paths = {
        name: model(tmp_path / name, t)
        for name, t in {"b": w, "i": moved(w, 0.2), "t": moved(w, 0.3, 7), "stranger": tensors(2)}.items()
    }
    ik.extract(paths["b"], paths["i"], tmp_path / "r", sync=False)
    old_residual(tmp_path / "r", w)
    for name, relation in {"b": "is", "t": "descends", "stranger": "stranger"}.items():
        plan = ik.apply(paths[name], tmp_path / "r", out=tmp_path / "out", dry_run=True)
        (found,) = plan.to_dict()["ancestry"]
        assert (found["relation"], found["matrices"]) == (relation, MATRICES)


def test_little_is_read_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = {f"layer.{i:03}": normal((64, 128), i) for i in range(300)}
    for name, t in (("base", w), ("instruct", moved(w, 0.1))):
        (tmp_path / name).mkdir()
        save_file(t, tmp_path / name / "model.safetensors")
    read: list[int] = []
    real = sources.LocalFile.read_into

    def counted(self: sources.LocalFile, view: memoryview, offset: int) -> None:
        read.append(len(view))
        real(self, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(sources.LocalFile, "read_into", counted)
        ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / "none", dry_run=True)
    assert sum(read) == 2 * 300 * 256 * 2
    assert len(read) == 2 * 300 * 4
    ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / "r", sync=False)
    assert len(json.dumps(sketch_of(tmp_path / "r"))) < 300 * 740


# --- models of other layouts than the output's


def fused(tmp_path: Path) -> tuple[Checkpoint, Checkpoint, Tensors]:
    """A model with q, k, v, and a base that has them in one, rows of q in another order there."""
    w = {"q": normal((256, 64), 1), "k": normal((64, 64), 2), "v": normal((64, 64), 3), "o": normal((64, 64), 4)}
    order = torch.arange(256).view(4, 2, 32).transpose(1, 2).flatten()
    base = {"o": w["o"], "qkv": torch.cat([w["q"][order], w["k"], w["v"]])}
    return open_checkpoint(model(tmp_path / "target", moved(w, 0.1))), open_checkpoint(model(tmp_path / "b", base)), w


def steps(target: Checkpoint, base: Checkpoint) -> list[Step]:
    """Each tensor of the target with its elements in base."""
    qkv, row = base.tensors["qkv"], 64
    order = torch.arange(256).view(4, 32, 2).transpose(1, 2).flatten().tolist()
    refs = {
        "q": [qkv.run(i * row, row) for i in order],
        "k": [qkv.run(256 * row, 64 * row)],
        "v": [qkv.run(320 * row, 32 * row), qkv.run(352 * row, 32 * row)],
        "o": [base.tensors["o"]],
    }
    return [
        Step(
            Output(name, "BF16", ref.shape), "subtract", (Operand("target", (ref,)), Operand("base", tuple(refs[name])))
        )
        for name, ref in target.tensors.items()
    ]


def test_models_of_other_layouts_are_compared_where_their_elements_are(tmp_path: Path) -> None:
    target, base, _ = fused(tmp_path)
    inputs = {"target": target, "base": base}
    with Looks(inputs) as looks:
        (found,) = ancestry.compare(inputs, steps(target, base), looks)
    assert found.matrices == 4
    assert found.cosine > 0.98
    assert not found.odd
    table = {step.name: step for step in steps(target, base)}
    own, _ = table["k"].operands
    table["k"] = Step(table["k"].output, "subtract", (own, Operand("base", (base.tensors["qkv"].run(0, 4096),))))
    with Looks(inputs) as looks:
        (found,) = ancestry.compare(inputs, list(table.values()), looks)
    assert found.odd.keys() == {"k"}


def test_a_sketch_is_in_the_layout_of_the_residual(tmp_path: Path) -> None:
    target, base, w = fused(tmp_path)
    with Looks({"target": target, "base": base}) as looks:
        sketch = ancestry.sketch(steps(target, base), looks, "base")
    split = open_checkpoint(model(tmp_path / "split", w))
    with Looks({"base": split}) as looks:
        wanted = {
            name: sample.to_text(ref.shape) for name, ref in split.tensors.items() if (sample := looks.of("base", ref))
        }
    assert sketch == wanted
    assert Sample.from_text(sketch["q"], (256, 64)) is not None


def test_a_sketch_of_a_tensor_with_rows_that_base_lacks(tmp_path: Path) -> None:
    """Rows of new tokens are behind those of base: where no place is among them, the others are known."""
    w = normal((512, 64), 1)
    base = open_checkpoint(model(tmp_path / "b", {"embed": w}))

    def sketched(rows: int) -> dict[str, str]:
        output = Output("embed", "F32", (rows, 64))
        steps = [
            Step(output, "subtract", (Operand("base", (base.tensors["embed"],)),), count=512 * 64),
            Step(
                output, "convert", (Operand("instruct", (normal_ref(base, rows - 512),)),), first=512 * 64, reason="new"
            ),
        ]
        with Looks({"base": base}) as looks:
            return ancestry.sketch(steps, looks, "base")

    sample = Sample.from_text(sketched(528)["embed"], (528, 64))
    assert sample is not None
    assert list(sample.values) == [float(x) for first, n in places((528, 64)) for x in w.flatten()[first : first + n]]
    assert sketched(1024) == {}


def normal_ref(base: Checkpoint, rows: int) -> TensorRef:
    """Some rows of a tensor that is there."""
    return base.tensors["embed"].run(0, rows * 64)


HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}


def split() -> Tensors:
    """Two layers with q, k and v, gate and up apart."""
    shapes = {"model.embed_tokens.weight": (200, 64), "model.norm.weight": (64,)}
    for i in range(2):
        parts = {"q_proj": (128, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 128)}
        shapes |= {f"model.layers.{i}.self_attn.{name}.weight": shape for name, shape in parts.items()}
        parts = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
        shapes |= {f"model.layers.{i}.mlp.{name}.weight": shape for name, shape in parts.items()}
    return tensors(1, shapes)


def joined(weights: Tensors) -> Tensors:
    """The same, with q, k and v in one, and gate and up."""
    made = {}
    for name, t in weights.items():
        if "q_proj" in name:
            others = [weights[name.replace("q_proj", f"{part}_proj")] for part in "kv"]
            made[name.replace("q_proj", "qkv_proj")] = torch.cat([t, *others])
        elif "gate_proj" in name:
            made[name.replace("gate", "gate_up")] = torch.cat([t, weights[name.replace("gate", "up")]])
        elif not re.search(r"(\.k|\.v|\.up)_proj", name):
            made[name] = t
    return made


def rotated(weights: Tensors) -> Tensors:
    """The same, with the rows of each head of q and k in the other rotary order."""
    return {
        name: t.view(-1, 2, 8, 64).transpose(1, 2).reshape(t.shape) if re.search(r"[qk]_proj", name) else t
        for name, t in weights.items()
    }


def test_a_residual_knows_its_base_and_targets_whatever_their_layouts(tmp_path: Path) -> None:
    w, target = split(), moved(split(), 0.2, 6)
    models = {"base": w, "joined base": joined(w), "rotated base": rotated(w), "instruct": moved(w, 0.2)}
    models |= {"target": target, "joined target": joined(target)}
    paths = {name: write_model(tmp_path / name, each, config=HEADS) for name, each in models.items()}
    for i, base in enumerate(("base", "joined base", "rotated base")):
        ik.extract(paths[base], paths["instruct"], tmp_path / f"r{i}", sync=False)
        assert sketch_of(tmp_path / f"r{i}") == sketch_of(tmp_path / "r0")
    for name, relation in {
        "base": "is",
        "joined base": "is",
        "target": "descends",
        "joined target": "descends",
    }.items():
        plan = ik.apply(paths[name], tmp_path / "r2", out=tmp_path / "out", dry_run=True)
        assert plan.warnings == ()
        (found,) = plan.to_dict()["ancestry"]
        assert (found["relation"], found["odd"]) == (relation, {})
        assert found["tensors"] == len(models[name])
    other = write_model(tmp_path / "rotated target", rotated(target), config=HEADS)
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj.* agree in name and shape with residual"):
        ik.apply(other, tmp_path / "r0", out=tmp_path / "out", dry_run=True)
