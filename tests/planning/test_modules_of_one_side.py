"""Modules that only instruct and base have: what is the same in both is no loss, and that alone passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import normal, read_model, triple, write_model

import ires_kernels as ik
from ires_kernels.cli import main
from ires_kernels.planning.evidence import places
from ires_kernels.records.report import Report


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A target without the vision tower that both of the pair have, and have alike."""
    plain = tmp_path / "plain"
    triple(plain)
    tower = {f"visual.blocks.{i}.proj.weight": normal((64, 64), 40 + i) for i in range(3)}
    tower |= {"visual.norm.bias": torch.zeros(64, dtype=torch.bfloat16)}
    for role in ("base", "instruct", "target"):
        own = {} if role == "target" else tower
        write_model(tmp_path / role, read_model(plain / role) | own, config={"model_type": "x"})
    return tmp_path


def test_equal_in_both_is_no_loss(models: Path) -> None:
    report = ik.apply(models / "target", (models / "instruct", models / "base"), out=models / "out")
    assert isinstance(report, Report)
    assert [note for note in report.notes if "nothing of it is lost" in note] == [
        "'visual' (4 tensors, 24,704 bytes) is in instruct and base alone, and the same in both: nothing of it is lost"
    ]
    plain = models / "plain"
    ik.apply(plain / "target", (plain / "instruct", plain / "base"), out=models / "other")
    assert {n: t.tolist() for n, t in read_model(models / "out").items()} == {
        n: t.tolist() for n, t in read_model(models / "other").items()
    }
    assert ik.verify(models / "out")


def test_a_difference_that_no_sample_shows(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All bytes are compared before anything is written, and the way out is one."""
    tensors = read_model(models / "instruct")
    unseen = next(i for i in range(4096) if not any(first <= i < first + n for first, n in places((64, 64))))
    tensors["visual.blocks.1.proj.weight"].view(-1)[unseen] += 1
    (models / "instruct/model.safetensors").unlink()
    write_model(models / "again", tensors)
    (models / "again/model.safetensors").rename(models / "instruct/model.safetensors")
    words = ["apply", f"{models / 'target'}", "--instruct", f"{models / 'instruct'}", "--base", f"{models / 'base'}"]
    words += ["-o", f"{models / 'out'}"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "tensors that the target has no place for differ in instruct and base" in said
    assert "'visual.blocks.1.proj.weight'" in said
    assert not (models / "out").exists()
    assert main([*words, "--skip", "^visual"]) == 0


def test_one_that_was_trained_is_a_refusal(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = read_model(models / "instruct")
    for name in tensors:
        if name.startswith("visual.blocks"):
            tensors[name] += normal((64, 64), 99, scale=0.01)
    (models / "instruct/model.safetensors").unlink()
    write_model(models / "again", tensors)
    (models / "again/model.safetensors").rename(models / "instruct/model.safetensors")
    words = ["apply", f"{models / 'target'}", "--instruct", f"{models / 'instruct'}", "--base", f"{models / 'base'}"]
    assert main([*words, "-o", f"{models / 'out'}"]) == 2
    assert "visual" in capsys.readouterr().err
