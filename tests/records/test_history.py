"""Updates in place on top of others: said before and after, with what they were and what they add up to."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_models import normal, triple, write_model

import ires_kernels as ik
from ires_kernels.in_place import finish


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base, instruct, _ = triple(tmp_path)
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def update(residual: Any, alpha: Any, **options: Any) -> Any:
    return ik.apply("target", residual, in_place=True, alpha=alpha, sync=False, **options)


def said(warnings: Sequence[str]) -> list[str]:
    return [line for line in warnings if "on top of" in line or "in all" in line]


def test_the_first_says_nothing() -> None:
    assert said(update("residual", 1.0).warnings) == []
    assert "on top of" not in f"{ik.status('target')}"
    assert said(ik.apply("target", "residual", out="new", sync=False).warnings) == []


def test_the_same_residual_twice_is_the_sum_of_both(root: Path) -> None:
    first = update("residual", 1.0)
    lines = [
        f"on top of 1 earlier update: {first.id} (residual {root / 'residual'}, alpha 1)",
        f"residual {root / 'residual'} is in this model with alpha 1.5 in all: 1 + 0.5",
    ]
    assert said(update("residual", 0.5, dry_run=True).warnings) == lines
    report = update("residual", 0.5)
    assert said(report.warnings) == lines
    assert all(line in f"{report}" for line in lines)
    assert all(line in f"{ik.status('target')}" for line in lines)
    assert said(update("residual", -1.5).warnings)[1].endswith("with alpha 0 in all: 1 + 0.5 + -1.5")


def test_it_is_the_same_residual_in_another_place(root: Path) -> None:
    """A copy has the same digest; a pair of models the same files."""
    shutil.copytree("residual", "copy")
    update("residual", 1.0)
    (_, line) = said(update("copy", 0.25).warnings)
    assert line == f"residual {root / 'copy'} is in this model with alpha 1.25 in all: 1 + 0.25"
    assert len(said(update(("instruct", "base"), 0.5).warnings)) == 2  # not known to be the same as its residual
    shown = said(update(("instruct", "base"), 0.25, alphas=[("mlp", 0.5)]).warnings)
    pair = f"instruct {root / 'instruct'} - base {root / 'base'}"
    assert shown[0].startswith("on top of 3 earlier updates: ")
    assert f"({pair}, alpha 0.5)" in shown[0]
    assert shown[2] == (
        f"{pair} is in this model with alpha 0.75 in all: 0.5 + 0.25, but for tensors that had factors of their own"
    )


def test_another_residual_is_another(root: Path) -> None:
    tensors = ik.load("target", "residual", alpha=0)
    other = {name: (t.float() + normal(t.shape, 3, t.float().dtype, 1e-3)).to(t.dtype) for name, t in tensors.items()}
    write_model(root / "other", other, config={"tie_word_embeddings": False})
    ik.extract("base", "other", "residual-2", sync=False)
    update("residual", 1.0)
    (line,) = said(update("residual-2", 0.5).warnings)
    assert line.startswith("on top of 1 earlier update: ")
    several = said(update(["residual", "residual-2"], [0.5, 0.25]).warnings)
    assert [line.rpartition(" with ")[2] for line in several[1:]] == [
        "alpha 1.5 in all: 1 + 0.5",
        "alpha 0.75 in all: 0.5 + 0.25",
    ]


def test_a_long_history_is_cut() -> None:
    reports = [update("residual", 0.5, tag=f"{number}") for number in range(8)]
    line, total = said(reports[-1].warnings)
    assert line.startswith("on top of 7 earlier updates: ")
    assert line.endswith("and 2 before these")
    assert line.count("alpha 0.5") == 5
    assert total.endswith("with alpha 4 in all: " + " + ".join(["0.5"] * 8))


def test_said_after_an_interruption_too(monkeypatch: pytest.MonkeyPatch) -> None:
    update("residual", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(finish, "_write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            update("residual", 0.5)
    assert said(ik.resume("target").warnings)[1].endswith("with alpha 1.5 in all: 1 + 0.5")


def test_what_was_taken_back_is_not_there() -> None:
    update("residual", 1.0, undo="all")
    ik.rollback("target")
    assert said(update("residual", 0.5).warnings) == []
