"""An update in place gives the files that a new folder would have, whatever the target, the names and the options."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import normal, read_model, snapshot, triple, write_model
from updated import Cut, apply, copy, cut_off, manifest, visible

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.cli import main
from ires_kernels.files import journal
from ires_kernels.files.ownership import StoreError

CASES: dict[str, dict[str, Any]] = {
    "nearest": {"alpha": 0.7},
    "stochastic": {"alpha": 0.3, "rounding": "stochastic", "seed": 9, "alphas": [("layers", -1.5)]},
    "some": {"alpha": 1.0, "skip": "norm"},
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("undo", ["ring", "all", "none"])
@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_a_new_folder(
    tmp_path: Path, models: tuple[Path, Path, Path], case: str, undo: str
) -> None:
    base, instruct, target = models
    for threads in (1, 3):
        ik.apply(target, (instruct, base), out=tmp_path / f"out{threads}", threads=threads, sync=False, **CASES[case])
        other = copy(target, f"other{threads}")
        inodes = {path.name: path.stat().st_ino for path in other.glob("*.safetensors")}
        report = apply(other, (instruct, base), threads=threads, undo=undo, **CASES[case])
        assert visible(other) == visible(tmp_path / f"out{threads}")
        assert {path.name: path.stat().st_ino for path in other.glob("*.safetensors")} == inodes, "the same files"
        kept = {"ring": ".ires-replaced-1", "none": ".ires-replaced-1", "all": ".ires-undo-1"}[undo]
        assert {path.name for path in other.iterdir() if path.name.startswith(".")} == {kept}
        one, two = manifest(other), manifest(tmp_path / f"out{threads}")
        assert one["report"] == two["report"] == report.numbers()
        merged = {name: entry for name, entry in two["tensors"].items() if "copied" not in entry}
        assert {name: one["tensors"][name]["xxh3_128"] for name in merged} == {
            name: entry["xxh3_128"] for name, entry in merged.items()
        }
        assert all(one["tensors"][name]["xxh3_128"] is None for name in two["tensors"] if name not in merged)
        assert ik.verify(other)
        assert ik.verify(other, inputs={"target": target})
    assert (tmp_path / "out1" / "ires.json").read_bytes() == (tmp_path / "out3" / "ires.json").read_bytes()


def test_what_was_replaced_is_kept(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    report = apply(target, (instruct, base))
    kept = target / ".ires-replaced-1"
    assert {path.name: path.read_text() for path in kept.iterdir()} == {"tokenizer.json": "{ }", "vocab.json": "old"}
    assert f"{kept}" in f"{report}"
    assert not (target / "vocab.json").exists(), "it belongs to the other tokenizer"
    assert (target / "README.md").read_text() == "mine"
    assert manifest(target)["files"].keys() == {"tokenizer.json", "chat_template.jinja"}, "what has changed"


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_residuals_in_place(tmp_path: Path, models: tuple[Path, Path, Path], dtype: str) -> None:
    base, instruct, target = models
    ik.extract(base, instruct, tmp_path / "r", dtype=dtype, sync=False)
    ik.apply(target, [tmp_path / "r", tmp_path / "r"], out=tmp_path / "out", alpha=[0.5, -0.25], sync=False)
    apply(target, [tmp_path / "r", tmp_path / "r"], alpha=[0.5, -0.25])
    assert visible(target) == visible(tmp_path / "out")


def test_a_damaged_residual_is_found_before_anything_changes(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    ik.extract(base, instruct, tmp_path / "r", sync=False)
    raw = bytearray((tmp_path / "r" / "residual-00002-of-00002.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "r" / "residual-00002-of-00002.safetensors").write_bytes(raw)
    before = snapshot(target)
    with pytest.raises(CheckpointError, match=r"tensor '.*' is damaged: its xxh3_128 is "):
        apply(target, tmp_path / "r")
    assert snapshot(target) == before


def test_the_target_as_an_input(models: tuple[Path, Path, Path]) -> None:
    """base + (instruct - base) where base is changed: P1."""
    _, instruct, target = models
    original = copy(target, "original")
    apply(target, (instruct, target))
    assert ik.verify(target, inputs={"target": original}), "which is the base as well"
    for name, t in read_model(instruct).items():
        assert torch.equal(read_model(target)[name].view(torch.int16), t.view(torch.int16)), name
    before = snapshot(target)
    assert "nothing was done" in f"{apply(target, (instruct, target))}"
    assert snapshot(target) == before


def test_templates_in_a_folder_of_their_own_come_and_go(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    (instruct / "additional_chat_templates").mkdir()
    (instruct / "additional_chat_templates" / "rag.jinja").write_text("x")
    before = visible(target)
    apply(target, (instruct, base), undo="all")
    assert (target / "additional_chat_templates" / "rag.jinja").read_text() == "x"
    ik.rollback(target)
    assert visible(target) == before
    assert not (target / "additional_chat_templates").exists()


def test_side_files_that_are_links(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    (target / "tokenizer.json").rename(tmp_path / "shared.json")
    (target / "tokenizer.json").symlink_to("../shared.json")
    apply(target, (instruct, base), undo="all", follow_links=True)
    assert not (target / "tokenizer.json").is_symlink()
    ik.rollback(target)
    assert (target / "tokenizer.json").read_text() == "{ }"
    apply(target, (instruct, base), undo="ring", follow_links=True)
    assert (target / ".ires-replaced-1" / "tokenizer.json").is_symlink()
    assert (tmp_path / "shared.json").read_text() == "{ }"


def test_new_files_are_as_accessible_as_the_old_ones(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    (target / "tokenizer.json").chmod(0o640)
    old = os.umask(0o077)
    try:
        apply(target, (instruct, base))
    finally:
        os.umask(old)
    assert (target / "tokenizer.json").stat().st_mode & 0o777 == 0o640


def test_the_target_gives_side_files_as_an_input(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    base, _, target = models
    (target / "chat_template.jinja").write_text("{{ mine }}")
    before = visible(target)
    apply(target, (target, base), alpha=0.5)
    changed = {name for name, raw in visible(target).items() if before.get(name) != raw}
    assert all(name.endswith(".safetensors") for name in changed)
    assert manifest(target)["inputs"]["instruct"]["path"] == f"{target}"
    (tmp_path / "link").symlink_to(target)
    assert "nothing was done" in f"{apply(target, (tmp_path / 'link', base), alpha=0.5)}"


def test_names_of_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plain", "with space", "zeile\nzwei", os.fsdecode(b"no-utf8-\xff"), "journal", "log", "m[1]*"):
        root = tmp_path / name
        root.mkdir()
        base, instruct, target = triple(root)
        apply(target, (instruct, base), undo="all")
        ik.rollback(target)
        file = target / name
        (target / "model.safetensors").rename(file)
        if "utf8" in name:
            with pytest.raises(StoreError, match="its name is not UTF-8"):
                apply(file, (instruct, base))
            continue
        with pytest.MonkeyPatch.context() as patch:
            cut_off(patch, journal.Journal, "write", 0)
            with pytest.raises(Cut):
                apply(file, (instruct, base))
        assert ik.status(target) == ik.status(file)  # who looks for the model is told where it is
        ik.resume(file)
        assert ik.verify(file)
        for tag in "ab":
            apply(file, (instruct, base), undo="all", tag=tag)
        ik.rollback(file)
        monkeypatch.chdir(target)
        for command in ("status", "rollback", "resume"):
            assert main([command, "."]) == 2


def test_alpha_0_changes_nothing(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    before = snapshot(target)
    assert apply(target, (instruct, base), alpha=0.0).tensors == 0
    assert snapshot(target) == before


def test_sums_are_those_of_sha256sum(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False, sha256=True)
    apply(target, (instruct, base), sha256=True)
    for folder in (tmp_path / "out", target):
        subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
        assert len((folder / "SHA256SUMS").read_text().splitlines()) == 2
        assert ik.verify(folder, hashes_only=True)
        table = manifest(folder)
        table["sha256"][next(iter(table["sha256"]))] = "0" * 64
        (folder / "ires.json").write_text(json.dumps(table))
        assert "has the sha256" in f"{ik.verify(folder, hashes_only=True)}"
    apply(target, (instruct, base), tag="again")
    assert not (target / "SHA256SUMS").exists(), "they would be wrong now"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("undo", ["ring", "all", "none"])
def test_a_single_file(tmp_path: Path, undo: str) -> None:
    base, instruct, target = triple(tmp_path)
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    file = target / "model.safetensors"
    before, config = file.read_bytes(), (target / "config.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        if undo != "none":
            cut_off(patch, journal.Journal, "write", 20)
            with pytest.raises(Cut):
                apply(file, (instruct / "model.safetensors", base), undo=undo)
            assert not file.exists()
            with pytest.raises(CheckpointError, match="an update in place of this model"):
                ik.inspect(file)
    if undo == "none":
        apply(file, (instruct / "model.safetensors", base), undo=undo, sha256=True)
        subprocess.run(["sha256sum", "-c", "--quiet", "model.safetensors.sha256"], cwd=target, check=True)
    else:
        ik.resume(file)
    assert file.read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (target / "config.json").read_bytes() == config
    assert ik.verify(file)
    assert "nothing was done" in f"{apply(file, (instruct / 'model.safetensors', base), undo=undo)}"
    if undo == "all":
        ik.rollback(file)
        assert file.read_bytes() == before
        assert {path.name for path in target.iterdir()} == {"model.safetensors", "config.json"}


@pytest.mark.usefixtures("small")
def test_the_command_line(
    tmp_path: Path, models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = models[2]
    monkeypatch.chdir(tmp_path)
    arguments = ["apply", "target", "--instruct", "instruct", "--base", "base", "--in-place", "--keep-undo"]
    before = visible(target)
    assert main(["status", "target"]) == 0
    assert "target: none: nothing is unfinished, and no merge made it" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        cut_off(patch, journal.Journal, "write", 20)
        with pytest.raises(Cut):
            main(arguments)
    assert main(["status", "target", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "unfinished"
    assert main([*arguments, "--alpha", "0.5"]) == 2
    assert "`ires resume target` finishes it" in capsys.readouterr().err
    assert main(["resume", "target", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["operation"] == "apply"
    assert main(arguments) == 0
    assert "nothing was done" in capsys.readouterr().out
    assert main(["verify", "target"]) == 0
    assert main(["rollback", "target"]) == 0
    assert "target: is what it was before apply" in capsys.readouterr().out
    assert visible(target) == before
    assert main(["rollback", "target"]) == 2
    assert main(["resume", "target"]) == 2


def test_tensors_that_stay_keep_their_known_hash(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), alpha=0.5)
    hashes = {name: entry["xxh3_128"] for name, entry in manifest(target)["tensors"].items()}
    apply(target, (instruct, base), alpha=0.5, skip="norm", tag="2")
    for name, entry in manifest(target)["tensors"].items():
        assert (entry["xxh3_128"] == hashes[name]) == ("norm" in name), name
    assert manifest(target)["digest"]
    assert ik.verify(target).unread == 0


def test_empty_tensors_and_scalars_in_place(tmp_path: Path) -> None:
    made = []
    for seed, role in enumerate(("t", "i", "b")):
        tensors = {"none": normal((0, 4), seed), "one": normal((), seed), "some": normal((70,), seed)}
        made.append(write_model(tmp_path / role, tensors))
    ik.apply(made[0], (made[1], made[2]), out=tmp_path / "out", sync=False)
    apply(made[0], (made[1], made[2]))
    assert visible(made[0]) == visible(tmp_path / "out")
