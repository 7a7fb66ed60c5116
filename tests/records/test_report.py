"""What a report says of each group of tensors, and that the documents explain every line of it."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from small_models import normal, triple, write_model

import ires_kernels as ik
from ires_kernels.backends.call import Tally
from ires_kernels.checkpoints.manifest import Compared, Requantized, Strength
from ires_kernels.planning.absences import Absence
from ires_kernels.planning.ancestry import Ancestry
from ires_kernels.planning.plan import Plan
from ires_kernels.records.report import Report

DOCUMENT = Path(__file__).parent.parent.parent / "docs/merging.md"


def rows(report: object, title: str) -> list[str]:
    assert isinstance(report, Report)
    return [text for label, text in report.rows() if label == title]


def test_each_group_of_alphas(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, dtype=torch.float32)
    alphas = [("mlp", 0.3), (r"norm|\bfinal\b", 0.3), ("layers", 0.2)]
    report = ik.apply(target, (instruct, base), out=tmp_path / "out", alphas=alphas[:2])
    assert isinstance(report, Report)
    assert [(s.pattern, s.factors, s.tensors) for s in report.strengths] == [
        ("", (1.0,), 2),
        ("mlp", (0.3,), 2),
        (r"norm|\bfinal\b", (0.3,), 3),
    ]
    assert rows(report, "alpha 1") == ["effective 1 in 2 other tensors"]
    assert rows(report, "alpha 0.3") == [
        "effective 0.3 in 2 tensors that match 'mlp'",
        "effective 0.3 in 3 tensors that match 'norm|\\\\bfinal\\\\b'",
    ]
    kept = json.loads((tmp_path / "out/ires.json").read_text())["report"]["strengths"]
    assert [(each["pattern"], each["tensors"]) for each in kept] == [("", 2), ("mlp", 2), (r"norm|\bfinal\b", 3)]
    again = ik.apply(target, (instruct, base), out=tmp_path / "out", alphas=alphas[:2])
    assert isinstance(again, Report)
    assert again.strengths == report.strengths, "as the manifest has them"
    for entry in kept:
        del entry["pattern"], entry["tensors"]
    assert rows(ik.apply(target, (instruct, base), out=tmp_path / "all"), "alpha 1") == ["effective 1 in 7 tensors"]


def test_a_group_of_an_older_manifest_is_told_without_its_tensors() -> None:
    report = full()
    assert rows(replace(report, strengths=(Strength((0.5,), 7, 1.0),)), "alpha 0.5") == ["effective 0.5"]


def gentle(folder: Path) -> tuple[Path, Path, Path]:
    """Models whose residual is half of what a bfloat16 weight holds: much of it is lost to rounding."""
    base = {"a.weight": normal((256, 64), 1), "b.weight": normal((64, 64), 2)}
    instruct = {name: t.float() + normal(t.shape, 3, torch.float32, 1e-5) for name, t in base.items()}
    return (
        write_model(folder / "base", {name: t.float() for name, t in base.items()}),
        write_model(folder / "instruct", instruct),
        write_model(folder / "target", base),
    )


def test_a_hint_where_an_alpha_is_not_what_was_asked(tmp_path: Path) -> None:
    base, instruct, target = gentle(tmp_path)
    nearest = ik.apply(target, (instruct, base), out=tmp_path / "nearest", alpha=0.5, trust_names=True)
    (hint,) = rows(nearest, "hint")
    assert re.fullmatch(
        r"rounding to nearest leaves \d+\.\d% of alpha 0.5 in 2 tensors: --rounding stochastic keeps it on average, "
        "and --dtype f32 keeps all of it",
        hint,
    )
    assert nearest.to_dict()["hints"] == [hint]
    exact = ik.apply(target, (instruct, base), out=tmp_path / "f32", alpha=0.5, dtype="f32", trust_names=True)
    assert rows(exact, "hint") == []
    # The way out of it, which is tried.
    random = ik.apply(
        target, (instruct, base), out=tmp_path / "random", alpha=0.5, rounding="stochastic", trust_names=True
    )
    assert isinstance(random, Report)
    assert abs((random.strengths[0].realised or 0) - 1) < 0.5
    two = ik.apply(target, (instruct, base), in_place=True, alpha=0.5, alphas={"b": 0.25}, trust_names=True)
    (hint,) = rows(two, "hint")
    assert "alpha 0.25 in 1 tensor that matches 'b'" in hint
    assert hint.endswith("a new folder with --dtype f32 keeps all of it. So with 1 more")


def full() -> Report:
    """A report with everything that one can have."""
    return Report(
        "apply", "id", Path("out"), 1.0, 10, 20, 3, Tally(9, 8, 7, 6, 5, 4, 3), 3,
        (Strength((1.0,), 9, 0.5, 2), Strength((1.0, 2.0), 9, 0.5, 1, "mlp")), {"a": "only in the target"},
        {"b": "a copy"}, (Absence("c", ("target",), ("base",)),), {"config.json": "target"}, ("notes.txt",),
        (Ancestry("instruct", "base", 1.0, 0.1, 2, 3, False, {}),), ("careful",), ("a note",), ("a hint",),
        requantized=Requantized(1, 2, 1, 0.1, 0, "a", 0.1), compared=Compared(),
    )  # fmt: skip


def test_the_documents_explain_every_line() -> None:
    titles = {title for operation in ("apply", "extract") for title, _ in replace(full(), operation=operation).rows()}
    source = inspect.getsource(Report.rows)
    written = set(re.findall(r'\("([a-zA-Z ,]+)", ', source)) | set(re.findall(r'_grouped\("([a-z ]+)"', source))
    assert len(written) > 15
    assert written <= titles, "what a full report has not is not asked about below"
    section = DOCUMENT.read_text().partition("## The report, line by line")[2].partition("\n## ")[0]
    explained = set(re.findall(r"^\| (.+?) \|", section, re.MULTILINE))
    generic = {"alpha 1": "alpha A", "alphas 1, 2": "alphas A, B", "from target": "from ROLE"}
    for title in titles:
        wanted = generic.get(title, title)
        assert any(wanted in (cell, *cell.split(", ")) for cell in explained), wanted


def test_the_documents_explain_every_line_of_a_plan() -> None:
    source = inspect.getsource(Plan.rows)
    written = {*re.findall(r'\("([a-z ]+)", ', source)} | {"target", "instruct", "base", "residual", "N tensors"}
    assert len(written) > 15
    section = DOCUMENT.read_text().partition("prints the plan")[2].partition("\n## ")[0]
    explained = {cell for row in re.findall(r"^\| (.+?) \|", section, re.MULTILINE) for cell in row.split(", ")}
    explained |= {*re.findall(r"`([a-z ]+)`", section)}
    assert written <= explained


def test_a_plan_says_which_pattern_decides(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    plan = ik.apply(target, (instruct, base), out=tmp_path / "out", alphas={"mlp": 0.3}, dry_run=True)
    assert "2 tensors  + 0.3 * (instruct - base), BF16 → BF16, by 'mlp'" in re.sub(" {2,}", "  ", f"{plan}")
    assert "5 tensors  + 1 * (instruct - base), BF16 → BF16\n" in re.sub(" {2,}", "  ", f"{plan}")
