"""What samples of values tell: where they are taken, what is read, and when two tensors are called alike."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_models import normal

from ires_kernels.checkpoints import sources
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.dtypes import FLOATS, NUMBERS
from ires_kernels.planning import evidence
from ires_kernels.planning.evidence import Likeness, Looks, Sample, likeness, places, through


def model(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir()
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


def taken(t: torch.Tensor, shape: tuple[int, ...] | None = None) -> list[float]:
    """What a tensor has at the places of its shape, or of another, by torch."""
    flat = t.flatten().double()
    return torch.cat([flat[first : first + count] for first, count in places(shape or tuple(t.shape))]).tolist()


def compared(source: torch.Tensor, target: torch.Tensor) -> Likeness:
    return likeness(taken(source), taken(target, tuple(source.shape)))


def moved(t: torch.Tensor, by: float = 0.2, seed: int = 1) -> torch.Tensor:
    """Trained further."""
    noise = normal(t.shape, seed, t.dtype, 1.0)
    return t + noise * (t.float().std() * by).to(t.dtype)


# --- places


@given(st.lists(st.integers(0, 40), max_size=4) | st.lists(st.integers(1, 5000), min_size=1, max_size=3))
@settings(max_examples=400, deadline=None)
def test_places_lie_in_the_tensor_and_apart(shape: list[int]) -> None:
    numel, found = math.prod(shape), places(tuple(shape))
    if numel <= 256:
        assert found == (((0, numel),) if numel else ())
        return
    assert [count for _, count in found] == [64] * 4
    starts = [first for first, _ in found]
    assert all(a + 64 <= b for a, b in zip(starts, [*starts[1:], numel], strict=True))
    assert starts[0] >= 0


def test_places_are_what_they_have_always_been() -> None:
    """Golden: at other places old residuals would look like strangers."""
    assert places((4096, 4096)) == ((1646592, 64), (10490864, 64), (13707232, 64), (15883216, 64))
    assert places((32, 16)) == ((16, 64), (320, 64), (384, 64), (448, 64))
    assert places((8, 512, 1024)) == ((492544, 64), (2656496, 64), (3474912, 64), (4098768, 64))
    assert places((1000,)) == ((61, 64), (626, 64), (813, 64), (936, 64))
    assert places(()) == ((0, 1),)
    assert evidence.old_places(1024) == ((126, 16), (378, 16), (630, 16), (882, 16))


@pytest.mark.parametrize("rows", [64, 512, 768, 1024, 2560, 4096, 8192, 16384])
@pytest.mark.parametrize("head", [8, 16, 32, 64, 72, 80, 96, 128, 192, 256])
def test_every_place_changes_with_the_rotary_order(rows: int, head: int) -> None:
    if rows % head:
        return
    order = torch.arange(rows).view(rows // head, 2, head // 2).transpose(1, 2).flatten()
    assert all(order[first // 64] != first // 64 for first, _ in places((rows, 64)))


@pytest.mark.parametrize("head", [16, 128, 1024, 4096])
@pytest.mark.parametrize("queries", range(1, 9))
def test_each_part_of_a_fused_weight_has_a_place(queries: int, head: int) -> None:
    rows = head * (queries + 2)
    found = [first // 64 for first, _ in places((rows, 64))]
    for start, stop in ((0, queries), (queries, queries + 1), (queries + 1, queries + 2)):
        assert any(start * head <= row < stop * head for row in found)


def test_experts_and_both_halves_of_their_rows_are_sampled() -> None:
    found = [divmod(first, 512 * 1024) for first, _ in places((8, 512, 1024))]
    assert [expert for expert, _ in found] == [0, 5, 6, 7]
    assert {rest // 1024 // 256 for _, rest in found} == {0, 1}


# --- values


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_are_those_of_torch(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, NUMBERS[dtype].torch)
    for name, shape in {"big": (40, 300), "small": (5, 7), "scalar": ()}.items():
        t = normal(shape, 1, torch.float64, 3.0).to(kind)
        checkpoint = model(tmp_path / name, {"w": t})
        with Looks({"base": checkpoint}) as looks:
            sample = looks.of("base", checkpoint.tensors["w"])
        assert sample is not None
        assert list(sample.values) == taken(t.to(torch.float64))
        assert Sample.from_text(sample.to_text(shape), shape) == sample


def test_each_tensor_is_read_once_and_little_of_it(tmp_path: Path) -> None:
    w = {f"layer.{i}": normal((64, 512), i) for i in range(20)} | {"n": torch.arange(9)}
    base, target = model(tmp_path / "base", w), model(tmp_path / "target", w)
    with Looks({"base": base, "target": target}) as looks:
        for _ in range(3):
            for name in w:
                found = looks.compare("base", base.tensors[name], "target", target.tensors[name])
                assert (found is None) == (name == "n")
                assert found is None or (found.equal and found.agrees)
        assert looks.bytes_read == 2 * 20 * 256 * 2


@pytest.mark.parametrize("slow", [False, True])
def test_what_comes_next_is_asked_for_where_a_disk_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    w = {f"layer.{i:03}": normal((64, 128), i) for i in range(300)}
    base = model(tmp_path / "base", w)
    read, asked = sources.LocalFile.read_into, set[tuple[int, int]]()

    def read_into(self: sources.LocalFile, view: memoryview, offset: int) -> None:
        if slow and (offset, len(view)) not in asked:
            time.sleep(0.001)
        read(self, view, offset)

    monkeypatch.setattr(evidence, "_SLOW", 0.001 if slow else 10.0)
    monkeypatch.setattr(sources.LocalFile, "read_into", read_into)
    monkeypatch.setattr(sources.LocalFile, "will_need", lambda _, offset, size: asked.add((offset, size)))
    with Looks({"base": base}) as looks:
        samples = {name: looks.of("base", ref) for name, ref in base.tensors.items()}
    waited_for = (0, 257)  # and for none between
    others = [ref for i, ref in enumerate(base.tensors.values()) if i not in waited_for]
    wanted = {(ref.offset + 2 * first, 2 * count) for ref in others for first, count in places(ref.shape)}
    assert asked == (wanted if slow else set())
    assert all(sample is not None and list(sample.values) == taken(w[name]) for name, sample in samples.items())


def test_what_changed_since_is_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base", {"w": normal((64, 64), 1)})
    os.utime(tmp_path / "base" / "model.safetensors", ns=(1, 1))
    with Looks({"base": base}) as looks, pytest.raises(CheckpointError, match="changed after it was validated"):
        looks.of("base", base.tensors["w"])


def test_runs_of_a_tensor_and_other_places_can_be_read(tmp_path: Path) -> None:
    w = normal((64, 512), 1)
    base = model(tmp_path / "base", {"w": w})
    flat = w.flatten().double()
    with Looks({"base": base}) as looks:
        part = looks.at("base", base.tensors["w"].run(512, 20000), ((5, 2), (19000, 3), (0, 1)))
        assert part is not None
        assert list(part.values) == [*flat[517:519].tolist(), *flat[19512:19515].tolist(), float(flat[512])]
        near = looks.at("base", base.tensors["w"], ((7, 2), (1, 3)))
        assert near is not None
        assert list(near.values) == [*flat[7:9].tolist(), *flat[1:4].tolist()]


# --- what a residual remembers


def residual(base: Checkpoint, **manifest: object) -> Checkpoint:
    """What stands in for a residual of a base: its tensors, which nobody reads, and what its manifest says."""
    return replace(base, kind="residual", manifest=replace(Manifest(), **manifest))  # type: ignore[arg-type]


def test_a_sketch_serves_as_the_base_does(tmp_path: Path) -> None:
    w = {"w": normal((300, 100), 1), "n": normal((300,), 2), "x": normal((20, 20), 3)}
    base, target = model(tmp_path / "base", w), model(tmp_path / "target", {n: moved(t) for n, t in w.items()})
    with Looks({"base": base, "target": target}) as looks:
        sketch = {
            name: found.to_text(ref.shape) for name, ref in base.tensors.items() if (found := looks.of("base", ref))
        }
        wanted = {name: looks.compare("base", base.tensors[name], "target", target.tensors[name]) for name in w}
    with Looks({"residual": residual(base, sketch=sketch), "target": target}) as looks:
        got = {name: looks.compare("residual", base.tensors[name], "target", target.tensors[name]) for name in w}
    assert got == wanted
    assert all(found is not None and found.agrees for found in got.values())


@pytest.mark.parametrize(
    "text", ["", "BF16", "BF16 20x20", "BF16 20x20 AAAA", "BF16 400 AAAA", "I8 20x20 AAAA", "BF16 20x20 ?", "x y z w"]
)
def test_what_is_no_sketch_says_nothing(tmp_path: Path, text: str) -> None:
    base = model(tmp_path / "base", {"x": normal((20, 20), 3)})
    for manifest in ({"sketch": {"x": text}}, {"ancestry": {"x": text}}, {"ancestry": 7}, {"ancestry": {"x": 7}}):
        with Looks({"residual": residual(base, **manifest), "target": base}) as looks:
            assert looks.compare("residual", base.tensors["x"], "target", base.tensors["x"]) is None


def test_pieces_of_a_source_are_looked_up_where_the_target_has_them(tmp_path: Path) -> None:
    q, k, v = normal((512, 64), 1), normal((128, 64), 2), normal((128, 64), 3)
    base = model(tmp_path / "base", {"qkv": torch.cat([q, k, v])})
    target = model(tmp_path / "target", {"q": moved(q), "k": moved(k), "v": v, "other": moved(v).flip(0)})
    with Looks({"base": base, "target": target}) as looks:
        sample = looks.of("base", base.tensors["qkv"])
        assert sample is not None
        for name, first, wanted in (("q", 0, True), ("k", 512, True), ("v", 640, True), ("other", 640, False)):
            ref = target.tensors[name]
            values, runs = through(sample, [(first * 64, ref.numel, 0)])
            assert values
            found = looks.at("target", ref, runs)
            assert found is not None
            assert likeness(values, found.values).agrees is wanted
    rows = torch.randperm(768, generator=torch.Generator().manual_seed(0)).tolist()
    values, runs = through(sample, [(row * 64, 64, place * 64) for place, row in enumerate(rows)])
    flat = torch.cat([q, k, v])[rows].flatten().double()
    assert values == [float(x) for first, count in runs for x in flat[first : first + count]]
    assert sorted(values) == sorted(sample.values)


# --- verdicts


def test_figures_are_those_of_torch() -> None:
    one, two = normal((64, 64), 1, torch.float64), moved(normal((64, 64), 1, torch.float64), 0.7) + 0.01
    s, t = (torch.tensor(taken(x), dtype=torch.float64) for x in (one, two))
    found = likeness(s.tolist(), t.tolist())
    assert found.count == 256
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(s, t, dim=0)), rel=1e-13)
    assert found.correlation == pytest.approx(float(torch.corrcoef(torch.stack([s, t]))[0, 1]), rel=1e-12)
    assert found.distance == pytest.approx(float((s - t).norm() / s.norm()), rel=1e-13)
    assert found.weakest == pytest.approx(min(torch.cosine_similarity(s.view(4, 64), t.view(4, 64)).tolist()))
    assert not found.equal


@pytest.mark.parametrize("by", [0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(96, 64), (300,), (4, 32, 64), (8, 8), (1, 100)])
def test_relatives_are_alike(by: float, shape: tuple[int, ...]) -> None:
    for seed in range(30):
        base = normal(shape, seed, torch.float32)
        assert compared(base, moved(base, by, seed + 1000)).agrees is True


@pytest.mark.parametrize("shape", [(96, 64), (300,), (4, 32, 64), (8, 8), (1, 100)])
def test_strangers_are_not(shape: tuple[int, ...]) -> None:
    for seed in range(30):
        for scale in (0.001, 0.02, 5.0):
            found = compared(normal(shape, seed), normal(shape, seed + 1000, scale=scale))
            assert found.agrees is False
            assert found.weakest < 0.5 or math.isnan(found.weakest)


def test_values_that_say_nothing() -> None:
    zero, some = [0.0] * 256, normal((256,), 1).tolist()
    assert evidence.agrees(zero, some) is None
    assert evidence.agrees(some, zero) is None
    assert likeness(zero, zero).equal
    assert evidence.agrees(some[:63], some[:63]) is None, "too few"
    assert evidence.agrees([math.nan, *some[1:]], some) is None
    assert evidence.agrees([math.inf, *some[1:]], some) is None
    assert evidence.agrees([1e300] * 64, [1e300] * 64) is None, "the norm overflows"
    assert evidence.agrees([1.0] * 256, [1.0] * 256) is None, "constant"
    assert evidence.agrees([1.0] * 256, [3.0] * 256) is False, "constant, and another"
    assert evidence.agrees([], []) is None
    with pytest.raises(ValueError, match="256 values of the source, 63 of the target"):
        evidence.agrees(some, some[:63])


def test_norms_around_one_are_no_evidence_unless_they_correlate() -> None:
    """Another norm of the same layer is as near, so nearness alone must not decide for either."""
    one, two = (1 + 0.1 * normal((256,), seed, torch.float32, 1.0) for seed in (1, 2))
    assert compared(one, two).cosine > 0.98
    assert compared(one, two).agrees is None
    assert compared(one, one + 0.02 * normal((256,), 3, torch.float32, 1.0)).agrees is True
    rounded = torch.ones(256).bfloat16() + (torch.arange(256) % 5 == 0).bfloat16() * 2**-7
    assert compared(rounded, rounded.flip(0)).agrees is None, "one step of bfloat16"


def test_rows_in_another_order_are_no_relatives() -> None:
    w = normal((256, 64), 1)
    turned = {
        "[up; gate]": w.roll(128, 0),
        "rotary": w.view(8, 2, 16, 64).transpose(1, 2).reshape(256, 64),
        "transposed": normal((64, 64), 1).T,
    }
    for name, t in turned.items():
        assert compared(w[: t.shape[0]], moved(t)).agrees is False, name
    partly = w.clone()
    partly[224:] = w[224:].flip(0)
    found = compared(w, moved(partly))
    assert found.agrees is True
    assert found.weakest < 0.4


def test_rows_of_noise_have_no_say_of_their_own() -> None:
    w = normal((256, 64), 1)
    w[200:] = normal((56, 64), 2) * 1e-4
    target = w.clone()
    target[200:] = normal((56, 64), 3) * 1e-4
    assert compared(w, moved(target, 0.01)).weakest > 0.9
