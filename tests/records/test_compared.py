"""A merge that compares on its way tells what `ires compare` tells of the same models, however it is carried out."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import FORMATS
from selection import tiles
from small_models import normal, read_model, snapshot, triple, write_model
from updated import unfinished

import ires_kernels as ik
from ires_kernels.backends.fit import Fit
from ires_kernels.cli import main
from ires_kernels.files import new_file
from ires_kernels.files.ownership import StoreError
from ires_kernels.in_place import cuts
from ires_kernels.in_place.cuts import Sizes
from ires_kernels.merging.planned import planned_again
from ires_kernels.new_folder import on_ray
from ires_kernels.new_folder.workers import Joined
from ires_kernels.planning import workers
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.records.fit import FitReport
from ires_kernels.records.report import Report
from ires_kernels.records.workers import WorkerReport
from ires_kernels.streaming.options import Options

Models = tuple[Path, Path, Path]


def compared(models: Models, **options: Any) -> FitReport:
    base, instruct, target = models
    return ik.compare(target, (instruct, base), **options)


def merged(models: Models, **options: Any) -> Report:
    base, instruct, target = models
    report = ik.apply(target, (instruct, base), compare=True, **options)
    assert isinstance(report, Report)
    return report


def check(report: Any, wanted: FitReport, *, rel: float = 1e-12) -> None:
    """Counts are the same, and sums but for the order in which they are added up."""
    assert isinstance(report, Report)
    assert report.fit is not None
    assert report.fit.tensors.keys() == wanted.tensors.keys()
    assert report.fit.not_compared == wanted.not_compared
    for name, fit in wanted.tensors.items():
        found = report.fit.tensors[name]
        assert_equal(found, fit, rel)
    kept = json.loads((report.out / "ires.json").read_text())["report"]["compare"]
    for key, all_of_it in (("total", wanted.total), ("matrices", wanted.matrix_total)):
        for name, number in wanted.numbers(all_of_it).items():
            if name != "ulps":
                assert kept[key][name] == (None if number is None else pytest.approx(number, rel=1e-5))


def assert_equal(found: Fit, wanted: Fit, rel: float) -> None:
    for counts in ("elements", "both", "conflicts", "within"):
        assert getattr(found, counts) == getattr(wanted, counts)
    for sums in ("base", "drift", "update", "exact"):
        assert getattr(found, sums) == pytest.approx(getattr(wanted, sums), rel=rel)
    size = rel * (wanted.drift * wanted.update) ** 0.5
    assert found.cross == pytest.approx(wanted.cross, abs=size)
    assert found.moved == pytest.approx(wanted.moved, rel=rel, abs=rel * wanted.update)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_new_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    models = triple(tmp_path, shards=2, dtype=dtype)
    with tiles(elements=96):  # several of most tensors
        report = merged(models, out=tmp_path / "out", alpha=0.3, threads=3)
    check(report, compared(models, alpha=0.3))
    ik.apply(models[2], models[1::-1], out=tmp_path / "other", alpha=0.3)
    made, wanted = read_model(tmp_path / "out"), read_model(tmp_path / "other")
    assert all(torch.equal(made[name], tensor) for name, tensor in wanted.items())


def test_large_tensors_of_blocks(tmp_path: Path) -> None:
    """The loops of 16 bits add up blocks of their own, which lie in tiles as they do in what compare reads."""
    folders = []
    for seed, role in enumerate(("base", "instruct", "target")):
        weight = normal((512, 1024), 1, torch.float32) + normal((512, 1024), 5 + seed, torch.float32, 1e-3)
        folders.append(write_model(tmp_path / role, {"a.weight": weight.bfloat16()}))
    base, instruct, target = folders
    with tiles(elements=1 << 15):
        report = merged((base, instruct, target), out=tmp_path / "out", alpha=0.7)
    check(report, compared((base, instruct, target), alpha=0.7))


def test_in_place_and_what_goes_on_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = triple(tmp_path)
    wanted = compared(models, alpha=0.3)
    monkeypatch.setattr(cuts, "SIZES", Sizes(window=256, unit=64, gap=16))
    with tiles(elements=32):
        target = unfinished(models, compare=True, alpha=0.3)
        check(ik.resume(target), wanted)
    again = ik.apply(target, models[1::-1], in_place=True, alpha=0.3)
    assert isinstance(again, Report)
    assert again.compared is not None
    assert again.compared.total.cosine == pytest.approx(wanted.total.cosine, rel=1e-5)
    assert "instruct is within an ulp of base" in dict(again.rows())["compared"]


def test_an_update_that_began_without_it_ends_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = triple(tmp_path)
    monkeypatch.setattr(cuts, "SIZES", Sizes(window=256, unit=64, gap=16))
    with tiles(elements=32):
        unfinished(models, alpha=0.3)
        report = merged(models, in_place=True, alpha=0.3)
    assert report.fit is report.compared is None
    assert "not compared: all of it, or a part, was merged before" in report.notes[-1]


def test_a_new_folder_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was counted before, if that was; a part of it is not told as if it were all."""
    models = triple(tmp_path, shards=2)
    write = new_file.NewFile.write

    def failing(self: Any, *arguments: Any) -> None:
        if self.path.name.startswith("model-00002"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), f"{self.path}")
        write(self, *arguments)

    def interrupted(out: Path, **options: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(new_file.NewFile, "write", failing)
            with pytest.raises(OSError, match="Input/output error"):
                ik.apply(models[2], models[1::-1], out=out, threads=1, **options)

    interrupted(tmp_path / "one", compare=True)
    check(ik.resume(tmp_path / "one"), compared(models))
    interrupted(tmp_path / "two")
    report = merged(models, out=tmp_path / "two")
    assert report.fit is None
    assert "merged before, by a run without compare (--compare)" in report.notes[-1]
    assert "compare" not in json.loads((tmp_path / "two/ires.json").read_text())["report"]


@pytest.mark.parametrize("shards", [3, 1])
def test_workers_add_up_what_each_has_counted(tmp_path: Path, shards: int) -> None:
    models = triple(tmp_path, shards=shards)
    base, instruct, target = models
    options: dict[str, Any] = {"out": tmp_path / "out", "alpha": 0.3}
    first = ik.apply(target, (instruct, base), compare=True, workers=(1, 2), **options)
    assert isinstance(first, WorkerReport)
    with pytest.raises(StoreError, match=r"was begun with --compare\. Do the same\."):
        ik.apply(target, (instruct, base), workers=(0, 2), **options)
    check(merged(models, workers=(0, 2), **options), compared(models, alpha=0.3))


def test_the_last_files_of_workers_that_have_died(tmp_path: Path) -> None:
    models = triple(tmp_path, shards=3)
    merged_by = [models[2], models[1::-1]]
    assert isinstance(ik.apply(*merged_by, out=tmp_path / "out", compare=True, workers=(1, 2)), WorkerReport)
    check(ik.resume(tmp_path / "out"), compared(models))


def test_tasks_of_a_cluster_count_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray runs them: from what the folder has of the command."""
    base, instruct, target = models = triple(tmp_path, shards=3)
    plan = ik.apply(target, (instruct, base), out=tmp_path / "out", dry_run=True)
    assert isinstance(plan, Plan)
    monkeypatch.setattr(on_ray, "_joined", {})
    joined = Joined.of(plan, tmp_path / "out", Options.of("cpu", 1, None, compare=True), sha256=False)
    with joined.folder() as folder:
        for task in on_ray._tasks(joined, folder, workers.items(plan, 4), "cpu", 1):
            assert not isinstance(on_ray.write_item(task, planned_again), on_ray.Failure)
    check(ik.finish(tmp_path / "out"), compared(models))


def quantized(folder: Path, format: str) -> Models:
    make, settings = FORMATS[format]
    found = []
    for seed, role in enumerate(("base", "instruct", "target")):
        weight = normal((64, 96), 1, torch.float32) + normal((64, 96), 5 + seed, torch.float32, 0.005)
        tensors = {"norm.weight": 1 + normal((96,), seed), **make("mlp.up_proj.weight", weight.bfloat16())}
        found.append(write_model(folder / role, tensors, config={"quantization_config": settings}))
    return found[0], found[1], found[2]


@pytest.mark.parametrize(
    ("format", "dtype", "in_place"),
    [("fp8-block", None, False), ("fp8-block", None, True), ("pack-quantized", "bf16", False)],
)
def test_quantized_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, dtype: str | None, in_place: bool
) -> None:
    """Their numbers are compared, and codes are what they are without it."""
    models = quantized(tmp_path / "models", format)
    base, instruct, target = models
    wanted = compared(models, dtype=dtype)
    assert wanted.numbers(wanted.total)["effective_alpha"] is not None  # of the norm at least
    monkeypatch.setattr(cuts, "SIZES", Sizes(window=256, unit=64, gap=16))
    with tiles(elements=64):
        ik.apply(target, (instruct, base), out=tmp_path / "other", dtype=dtype)
        report = merged(models, dtype=dtype, **({"in_place": True} if in_place else {"out": tmp_path / "out"}))
    check(report, wanted)
    made, others = read_model(report.out), read_model(tmp_path / "other")
    assert made.keys() == others.keys()
    assert all(torch.equal(made[name].view(torch.uint8), others[name].view(torch.uint8)) for name in made)


def test_other_vocabularies(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    tensors = {name: torch.cat([t, t[:3]]) if t.shape[0] == 40 else t for name, t in read_model(target).items()}
    grown = write_model(tmp_path / "grown", tensors, config=json.loads((target / "config.json").read_text()))
    models = base, instruct, grown
    check(merged(models, out=tmp_path / "out", skip="norm"), compared(models, skip="norm"))


def test_alphas_of_their_own_and_random_rounding_leave_alpha_to_the_report(tmp_path: Path) -> None:
    models = triple(tmp_path)
    for name, options in (("a", {"alphas": {"mlp": 0.3}}), ("b", {"rounding": "stochastic"})):
        report = merged(models, out=tmp_path / name, **options)
        assert report.fit is not None
        assert report.fit.numbers(report.fit.total)["effective_alpha"] is None
        assert report.fit.total.cosine == pytest.approx(compared(models).total.cosine)
        assert not any("rounding to nearest leaves" in text for text in report.warnings)


def test_drift_is_warned_of(tmp_path: Path) -> None:
    base, instruct, _ = triple(tmp_path)
    far = {name: (t.float() + 0.3 * t.float().roll(1)).bfloat16() for name, t in read_model(base).items()}
    models = base, instruct, write_model(tmp_path / "far", far)
    report = merged(models, out=tmp_path / "out")
    (said,) = [text for text in report.warnings if "examples/continual" in text]
    assert said in compared(models).warnings
    assert said in (tmp_path / "out/README.md").read_text()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, instruct, target = triple(tmp_path)
    asked = ["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}", "--alpha", "0.3"]
    assert main([*asked, "-o", f"{tmp_path / 'out'}", "--compare"]) == 0
    text = capsys.readouterr().out
    table = compared((base, instruct, target), alpha=0.3).section()
    assert text.rstrip("\n").endswith(f"\n\n{table}")
    assert "compared" in text
    assert "\n- compared: drift" in (tmp_path / "out/README.md").read_text()
    assert main([*asked, "-o", f"{tmp_path / 'json'}", "--compare", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["compare"]
    assert found["total"]["ulps"] == compared((base, instruct, target), alpha=0.3).figures()["total"]["ulps"]
    assert set(found["kinds"]) == {"lm_head", "mlp", "model.embed_tokens", "model.norm", "norm"}
    assert main([*asked, "-o", f"{tmp_path / 'without'}"]) == 0
    assert "compare" not in capsys.readouterr().out.partition("output")[2]
    assert main([*asked, "-o", f"{tmp_path / 'without'}", "--compare"]) == 0
    assert "was merged before, by a run without compare" in capsys.readouterr().out


def of_a_residual(base: Path, instruct: Path, target: Path) -> None:
    ik.extract(base, instruct, base.parent / "residual")
    ik.apply(target, base.parent / "residual", out=base.parent / "out", compare=True)


def of_two_pairs(base: Path, instruct: Path, target: Path) -> None:
    ik.apply(target, [(instruct, base), (instruct, base)], in_place=True, compare=True)


def of_a_recipe(base: Path, instruct: Path, target: Path) -> None:
    recipe = base.parent / "recipe.yml"
    pair = f"{{instruct: {instruct}, base: {base}}}"
    recipe.write_text(f"{{target: {target}, pairs: [{pair}, {pair}]}}")
    ik.merge(recipe, out=base.parent / "out", compare=True)


def of_a_blend(base: Path, instruct: Path, target: Path) -> None:
    recipe = base.parent / "recipe.yml"
    models = ", ".join(f"{{model: {path}, parameters: {{weight: 0.5}}}}" for path in (target, instruct))
    recipe.write_text(f"{{merge_method: linear, models: [{models}], dtype: bfloat16}}")
    ik.merge(recipe, out=base.parent / "out", compare=True)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (of_a_residual, "needs what base holds.* Give the two models that it was made of"),
        (of_two_pairs, "and not instruct-1, base-1, instruct-2, base-2. Leave it out"),
        (of_a_recipe, "takes one pair of models"),
        (of_a_blend, "takes one pair of models, and not model-2"),
    ],
)
def test_what_is_no_pair_is_refused(tmp_path: Path, asked: Callable[..., None], why: str) -> None:
    models = triple(tmp_path)
    before = snapshot(tmp_path / "target")
    with pytest.raises(ArgumentError, match=why):
        asked(*models)
    assert not (tmp_path / "out").exists()
    assert snapshot(tmp_path / "target") == before


def test_a_recipe_of_a_pair(tmp_path: Path) -> None:
    base, instruct, target = models = triple(tmp_path)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"{{target: {target}, pairs: [{{instruct: {instruct}, base: {base}, alpha: 0.3}}]}}")
    check(ik.merge(recipe, out=tmp_path / "out", compare=True), compared(models, alpha=0.3))
    check(ik.merge(tmp_path / "out/ires.json", out=tmp_path / "again", compare=True), compared(models, alpha=0.3))
