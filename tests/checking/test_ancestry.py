"""Whether models are told from strangers by a few of their weights."""

from __future__ import annotations

import base64
import json
import os
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
from ires_kernels.checking import ancestry
from ires_kernels.checkpoints import sources
from ires_kernels.checkpoints.checkpoint import Checkpoint, open_checkpoint
from ires_kernels.checkpoints.header import CheckpointError


def model(folder: Path, weights: Tensors, **options: Any) -> Checkpoint:
    return open_checkpoint(write_model(folder, weights, config={"tie_word_embeddings": False}, **options))


def moved(weights: Tensors, by: float, seed: int = 5) -> Tensors:
    """The weights plus noise, `by` times their standard deviation of 0.02."""
    return {n: (t.float() + normal(t.shape, seed, torch.float32, 0.02 * by)).to(t.dtype) for n, t in weights.items()}


def test_a_model_is_its_own_relative(tmp_path: Path) -> None:
    base = model(tmp_path / "base", tensors(1))
    found = ancestry.compare(base, ancestry.sketch(base))
    assert found is not None
    assert found.cosine == pytest.approx(1)
    assert found.distance == 0
    assert found.tensors == sum(len(shape) > 1 for shape in SHAPES.values())
    assert found.related


@pytest.mark.parametrize("by", [0.1, 0.5, 1.0])
def test_what_is_measured_of_a_moved_model(tmp_path: Path, by: float) -> None:
    shapes = {f"layer.{i}.weight": (32, 64) for i in range(64)}
    base, target = model(tmp_path / "base", w := tensors(1, shapes)), model(tmp_path / "target", moved(w, by))
    found = ancestry.compare(target, ancestry.sketch(base))
    assert found is not None
    assert found.distance == pytest.approx(by, rel=0.1)
    assert found.cosine == pytest.approx((1 + by**2) ** -0.5, abs=0.04)
    assert found.related


def test_a_stranger_is_told_although_its_norms_are_the_same(tmp_path: Path) -> None:
    ours, theirs = tensors(1), tensors(2)
    vectors = {name: torch.ones_like(t) for name, t in ours.items() if t.dim() == 1}
    base, target = model(tmp_path / "base", ours | vectors), model(tmp_path / "target", theirs | vectors)
    found = ancestry.compare(target, ancestry.sketch(base))
    assert found is not None
    assert abs(found.cosine) < ancestry.THRESHOLD
    assert not found.related
    assert f"{found.cosine:.2f}" in found.warning("target", "base")
    assert f"{found.distance:.2f}" in found.warning("target", "base")


@pytest.mark.parametrize("related", [True, False])
def test_an_instruct_model_that_is_no_relative_of_the_base(tmp_path: Path, related: bool) -> None:
    """By extract and by apply, dry or not: the target is one of the base's in any case."""
    base = tensors(1)
    paths = [
        write_model(tmp_path / name, weights, config={"tie_word_embeddings": False})
        for name, weights in (("base", base), ("instruct", moved(base, 0.5) if related else tensors(2)))
    ]
    target = write_model(tmp_path / "target", moved(base, 0.3, seed=6), config={"tie_word_embeddings": False})
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
    assert (next(row[0] for row in done[1].rows()[1:]), done[3].rows()[1][0]) == ("extracted", "merged")
    assert "merged" not in f"{extracted}"
    with nullcontext() if related else pytest.warns(UserWarning, match="instruct and base look unrelated"):
        ik.load(target, (paths[1], paths[0]))


@pytest.mark.parametrize("way", ["one pass", "residual"])
def test_tensors_whose_rows_are_in_another_order_are_named(tmp_path: Path, way: str) -> None:
    """Equal names and shapes prove nothing: one library writes [gate; up], another [up; gate]."""
    shapes = SHAPES | {f"model.layers.{i}.gate_up.weight": (48, 16) for i in range(2)}
    base = tensors(1, shapes)
    turned = {name: t.roll(24, 0) if "gate_up" in name else t for name, t in base.items()}
    paths = [
        write_model(tmp_path / name, weights, config={"tie_word_embeddings": False})
        for name, weights in (("base", base), ("instruct", moved(base, 0.1)), ("target", moved(turned, 0.1, seed=6)))
    ]
    ik.extract(paths[0], paths[1], tmp_path / "residual", sync=False)
    source = tmp_path / "residual" if way == "residual" else (paths[1], paths[0])

    def said(**options: Any) -> list[str]:
        return ik.apply(paths[2], source, out=tmp_path / "out", dry_run=True, **options).warnings

    (warning,) = said()
    what = "the base of residual" if way == "residual" else "base"
    assert warning.startswith(f"target and {what} are related, but for model.layers.*.gate_up.weight (cosine ")
    advice = warning.partition("--skip ")[2]
    (pattern,) = shlex.split(advice)
    assert [name for name in base if re.search(pattern, name)] == [name for name in base if "gate_up" in name]
    assert said(skip=pattern) == ()
    with pytest.warns(UserWarning, match="in another order"):
        ik.load(paths[2], source)


@pytest.mark.parametrize("role", ["instruct", "target"])
def test_queries_in_rotary_order_are_named_where_the_base_is_there(tmp_path: Path, role: str) -> None:
    """With as many heads, the usual places are rows that stay where they are."""
    shapes = SHAPES | {f"model.layers.{i}.self_attn.q_proj.weight": (8 * 16, 16) for i in range(2)}
    weights = dict.fromkeys(("base", "instruct", "target"), tensors(1, shapes))
    weights[role] = {
        name: t.view(8, 2, 8, 16).transpose(1, 2).reshape(128, 16) if "q_proj" in name else t
        for name, t in weights["base"].items()
    }
    paths = {
        name: write_model(tmp_path / name, moved(tensors_, 0.1), config={"tie_word_embeddings": False})
        for name, tensors_ in weights.items()
    }
    plan = ik.apply(paths["target"], (paths["instruct"], paths["base"]), out=tmp_path / "out", dry_run=True)
    (warning,) = plan.warnings
    assert warning.startswith(f"{role} and base are related, but for model.layers.*.self_attn.q_proj.weight (cosine ")


@pytest.mark.parametrize("by", [0.1, 0.5, 1.0])
def test_no_tensor_of_relatives_is_odd(tmp_path: Path, by: float) -> None:
    shapes = {f"kind_{i}.weight": (32, 64) for i in range(200)}
    base, target = model(tmp_path / "base", w := tensors(1, shapes)), model(tmp_path / "target", moved(w, by))
    found = ancestry.compare(target, ancestry.sketch(base))
    assert found is not None
    assert not found.odd


def test_a_sketch_survives_json_shards_and_dtypes(tmp_path: Path) -> None:
    base = model(tmp_path / "base", w := tensors(1))
    target = moved(w, 0.5)
    sketch = json.loads(json.dumps(ancestry.sketch(base)))
    found = ancestry.compare(model(tmp_path / "target", target), sketch)
    assert found is not None
    assert ancestry.compare(model(tmp_path / "shards", target, shards=3), sketch) == found
    for dtype in (torch.float32, torch.float64):  # bfloat16 goes into these without a loss
        wide = model(tmp_path / f"{dtype}", {name: t.to(dtype) for name, t in target.items()})
        assert ancestry.compare(wide, sketch) == found
    half = ancestry.compare(model(tmp_path / "half", {name: t.half() for name, t in target.items()}), sketch)
    assert half is not None
    assert half.cosine == pytest.approx(found.cosine, abs=1e-3)


PLACES = torch.cat([torch.arange(16) + (2 * i + 1) * (256 - 16) // 8 for i in range(4)])
"""Of 256 elements those that are sampled."""


def written(values: torch.Tensor) -> str:
    """The entry of a tensor of 256 elements in a sketch, by torch."""
    sampled = values.flatten()[PLACES].to(torch.bfloat16)
    return f"256 {base64.b64encode(sampled.view(torch.uint8).numpy().tobytes()).decode()}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_figures_are_those_of_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    one = (torch.arange(256, dtype=torch.float64).mul(0.7071).sin() * 1.003).to(dtype).view(16, 16)
    two = (one.double() * 0.9 + torch.arange(256.0).cos().view(16, 16) * 0.01).to(dtype)
    sketch = ancestry.sketch(model(tmp_path / "b", {"w": two}))
    assert sketch == {"w": written(two)}
    found = ancestry.compare(model(tmp_path / "a", {"w": one}), sketch)
    assert found is not None
    x, y = one.flatten()[PLACES].double(), two.flatten()[PLACES].to(torch.bfloat16).double()
    assert found.cosine == pytest.approx(float(x @ y / (x.norm() * y.norm())), rel=1e-14)
    assert found.distance == pytest.approx(float((x - y).norm() / y.norm()), rel=1e-14)


def test_a_sketch_rounds_as_torch_does(tmp_path: Path) -> None:
    ties = [1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256, 1 + 1 / 256 + 2**-40]  # the last is one in float32
    edges = [3.4028235e38, -3.3895314e38, 1e300, -1e300, float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 1e-40]
    values = torch.tensor([*ties, *edges, 1.0, 65280.0], dtype=torch.float64).repeat(16).view(16, 16)
    for dtype in (torch.float64, torch.float32):
        stored = values.to(dtype)
        assert ancestry.sketch(model(tmp_path / f"{dtype}", {"w": stored})) == {"w": written(stored)}


def test_the_sampled_places_follow_from_the_size_alone(tmp_path: Path) -> None:
    """A golden sample: another version must not read other places, or old residuals would look like strangers."""
    base = model(tmp_path / "base", {"a": torch.arange(1024.0).view(32, 32)})
    numel, _, _ = ancestry.sketch(base)["a"].partition(" ")
    assert numel == "1024"
    starts = [126, 378, 630, 882]
    changed = torch.zeros(1024)
    for start in starts:
        changed[start : start + 16] = torch.arange(start, start + 16)
    found = ancestry.compare(model(tmp_path / "target", {"a": changed.view(32, 32)}), ancestry.sketch(base))
    assert found is not None
    assert found.cosine == pytest.approx(1, abs=1e-4)  # the sketch is in bfloat16
    assert found.distance < 4e-3


def test_little_is_read_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file({f"layer.{i:03}": normal((16, 64), i) for i in range(1000)}, folder / "model.safetensors")
    read = 0
    real = sources.read_into

    def counted(fd: int, view: memoryview, offset: int, path: Path) -> None:
        nonlocal read
        read += len(view)
        real(fd, view, offset, path)

    monkeypatch.setattr(sources, "read_into", counted)
    sketch = ancestry.sketch(open_checkpoint(folder))
    assert len(sketch) == 256
    assert read == 256 * 64 * 2
    assert len(json.dumps(sketch)) < 70_000
    assert {min(sketch), max(sketch)} == {"layer.000", "layer.996"}, "from the whole depth"


def test_what_cannot_be_compared_is_passed_over(tmp_path: Path) -> None:
    weights = tensors(1)
    sketch = ancestry.sketch(model(tmp_path / "base", weights))
    other = {name: t for name, t in weights.items() if name != "lm_head.weight"}  # lacks one
    other["model.embed_tokens.weight"] = normal((41, 16), 9)  # has more rows in one
    other["model.layers.0.mlp.weight"] = torch.zeros(24, 16, dtype=torch.bfloat16)  # is zero in one
    found = ancestry.compare(model(tmp_path / "other", other), sketch)
    assert found is not None
    assert found.tensors == 1
    assert found.cosine == pytest.approx(1)
    strange = model(tmp_path / "strange", {"x": normal((40, 16), 1)})
    assert ancestry.compare(strange, sketch) is None


@pytest.mark.parametrize("entry", [None, 7, "", "640", "640 ?", "640 AAAA", "x AAAA", "640 AAAA AAAA", ["640", "AAAA"]])
def test_what_is_no_sketch_is_no_comparison(tmp_path: Path, entry: object) -> None:
    base = model(tmp_path / "base", tensors(1))
    assert ancestry.compare(base, entry) is None
    good = ancestry.sketch(base)
    first, *_ = good
    found = ancestry.compare(base, good | {first: entry})
    assert found is not None
    assert found.tensors == len(good) - 1


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base", tensors(1))
    os.utime(tmp_path / "base" / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed after it was validated"):
        ancestry.sketch(base)
