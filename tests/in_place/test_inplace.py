"""Updating a model in place: the bytes of a new folder, wherever it is interrupted, and nothing touched if refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SHAPES, normal, read_model, snapshot, triple, write_model

import ires_kernels as ik
from ires_kernels import merge
from ires_kernels.checkpoints.header import CheckpointError, build_header
from ires_kernels.cli import main
from ires_kernels.files import hidden, journal, store, trust
from ires_kernels.files.inplace import Workplace
from ires_kernels.files.store import StoreError
from ires_kernels.in_place import begun, cuts, run
from ires_kernels.in_place.cuts import Sizes
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.records import operation, repetition
from ires_kernels.records.report import Report
from ires_kernels.streaming import reader, windows

SIDE = {
    "instruct": {"tokenizer.json": "{}", "chat_template.jinja": "{{ chat }}", "generation_config.json": '{"eos": 1}'},
    "target": {
        "tokenizer.json": "{ }",
        "vocab.json": "old",
        "README.md": "mine",
        "generation_config.json": '{"eos": 1}',
    },
}


@pytest.fixture
def small() -> Iterator[None]:
    """Many windows in tensors of a few hundred elements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "WINDOW", 32)
        patch.setattr(cuts, "SIZES", Sizes(window=64 * 4, unit=64, gap=16))
        yield


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, instruct and target, with side files, two shards and something that is not merged."""
    base, instruct, target = triple(tmp_path, shards=2)
    for role, folder in (("instruct", instruct), ("target", target)):
        for name, text in SIDE[role].items():
            (folder / name).write_text(text)
    return base, instruct, target


def copy(target: Path, name: str) -> Path:
    shutil.copytree(target, target.with_name(name))
    return target.with_name(name)


def apply(target: Path, residual: Any, **options: Any) -> Report:
    report = ik.apply(target, residual, in_place=True, **options)
    assert isinstance(report, Report)
    return report


def visible(folder: Path) -> dict[str, bytes]:
    """What everybody sees, but for the manifest; of an index, which a new folder writes anew, what it says."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "ires.json"}
    return {
        name: json.dumps(json.loads(raw), sort_keys=True).encode() if name.endswith(".index.json") else raw
        for name, raw in files.items()
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything that is not hidden."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def manifest(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "ires.json").read_text())
    return table


def same_but_for_times(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Manifests of the same update of copies of a model, whose paths and times differ."""
    for table in (one, other):
        table["id"] = table["signature"] = ""
        table["in_place"]["files"] = {name: stamp["size"] for name, stamp in table["in_place"]["files"].items()}
        table["in_place"]["undo"] = ""
        for entry in table["inputs"].values():
            entry["path"] = ""
            entry["files"] = {}
    return one == other


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


# --- interrupted


class Cut(BaseException):
    """The end of a process, as far as Python lets one simulate it."""


def cut_off(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int) -> None:
    """Let everything from the given call of a function on do nothing but fail, as after the death of the process."""
    real, calls = getattr(module, name), iter(range(10**6))
    state = {"dead": False}

    def replacement(*arguments: Any, **options: Any) -> Any:
        state["dead"] = state["dead"] or next(calls) == number
        if state["dead"]:
            raise Cut
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, replacement)


STRIDES = {"pwrite": 13, "fdatasync": 11, "fsync": 3, "rename": 1, "unlink": 1, "preadv": 19}
"""Calls of which every so many-th is cut off."""


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("undo", ["ring", "all"])
@pytest.mark.parametrize("call", STRIDES)
def test_cut_off_at_any_call_and_gone_on_with(models: tuple[Path, Path, Path], call: str, undo: str) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), alpha=0.1, skip="embed")
    whole = copy(target, "whole")
    options: dict[str, Any] = {"alpha": 0.3, "rounding": "stochastic", "skip": "norm", "threads": 2, "undo": undo}
    apply(whole, (instruct, base), **options)
    before, wanted = files_of(target), visible(whole)
    states = set()
    for number in range(0, 10**6, STRIDES[call]):
        other = copy(target, f"cut{number}")
        with pytest.MonkeyPatch.context() as patch:
            cut_off(patch, os, call, number)
            try:
                apply(other, (instruct, base), **options)
                break
            except Cut:
                pass
        found = ik.status(other)
        states.add(found.state)
        if found.state == "unfinished":
            with pytest.raises(CheckpointError, match="an update in place of this model still runs or was interrupted"):
                ik.inspect(other)
            report = ik.resume(other)
        else:
            report = apply(other, (instruct, base), **options)
        assert visible(other) == wanted, number
        assert same_but_for_times(manifest(other), manifest(whole)), number
        again = snapshot(other)
        assert "nothing was done" in f"{apply(other, (instruct, base), **options)}"
        assert snapshot(other) == again
        assert report.numbers() == manifest(other)["report"]
        if undo == "all":
            ik.rollback(other)
            assert files_of(other) == before
        shutil.rmtree(other)
    else:
        pytest.fail("the calls never end")
    assert "unfinished" in states or call == "unlink", "which comes when all is done"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "rename", "unlink"])
def test_a_rollback_that_is_cut_off(models: tuple[Path, Path, Path], call: str) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), alpha=0.1, skip="embed")
    whole = copy(target, "whole")
    apply(whole, (instruct, base), undo="all", sync=False)
    before = files_of(target)
    for number in range(10**6):
        other = copy(whole, f"cut{number}")
        with pytest.MonkeyPatch.context() as patch:
            cut_off(patch, os, call, number)
            try:
                ik.rollback(other)
                break
            except Cut:
                pass
        found = ik.status(other)
        if found.state == "rolling back":
            with pytest.raises(StoreError, match="is being rolled back"):
                ik.resume(other)
            with pytest.raises(StoreError, match="unfinished"):
                apply(other, (instruct, base), undo="all")
            ik.rollback(other)
        elif found.state == "unfinished":  # before it was clear that it is a rollback
            ik.resume(other)
            ik.rollback(other)
        elif found.state == "finished" or list(other.glob(".ires-un*")):
            ik.rollback(other)
        assert files_of(other) == before
        assert [path.name for path in other.iterdir() if path.name.startswith(".ires")] == [".ires-replaced-1"]
        shutil.rmtree(other)
    else:
        pytest.fail("the calls never end")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("undo", ["ring", "none"])
def test_an_interrupt_stops_where_the_run_can_go_on(
    tmp_path: Path, models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, undo: str
) -> None:
    base, instruct, target = models
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    read = reader.read_into

    def slowly(*arguments: Any) -> None:
        time.sleep(0.003)
        read(*arguments)

    monkeypatch.setattr(reader, "read_into", slowly)
    ends = 0

    def interrupt(done: int, todo: int) -> None:
        if done < todo:
            raise KeyboardInterrupt

    for _ in range(100):
        try:
            apply(target, (instruct, base), undo=undo, progress=interrupt)
            break
        except KeyboardInterrupt:
            ends += 1
            found = ik.status(target)
            assert found.state == "unfinished"
            assert f"`ires resume {target}`, or the same command, goes on." in found.next
    assert ends > 2
    assert visible(target) == visible(tmp_path / "out")


@pytest.mark.usefixtures("small")
def test_without_undo_a_failure_in_the_middle_is_final(
    tmp_path: Path, models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    writes, write = iter(range(1000)), journal.Journal.write

    def failing(*arguments: Any) -> None:
        if next(writes) == 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "a disk")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "write", failing)
        with pytest.raises(OSError, match="Input/output error"):
            apply(target, (instruct, base), undo="none")
    assert any("must be copied again" in line for line in ik.status(target).next)
    with pytest.raises(
        StoreError,
        match=r"--no-undo kept no old bytes: it is part old and part new. Delete .* and copy the model again",
    ):
        ik.resume(target)
    with pytest.raises(StoreError, match=r"cannot be rolled back: .* --no-undo kept no old bytes"):
        ik.rollback(target)
    with pytest.raises(CheckpointError, match="an update in place of this model still runs or was interrupted"):
        ik.apply(target, (instruct, base), out=tmp_path / "out")


@pytest.mark.usefixtures("small")
def test_a_ring_can_be_taken_back_only_at_its_beginning(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    before = visible(target)
    for number, possible in ((1, True), (60, False)):
        writes, write = iter(range(1000)), journal.Journal.write

        def failing(*arguments: Any, writes: Any = writes, number: int = number, write: Any = write) -> None:
            if next(writes) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO), "a disk")
            write(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(journal.Journal, "write", failing)
            with pytest.raises(OSError, match="Input/output error"):
                apply(target, (instruct, base), threads=1)
        if possible:
            assert "is what it was before" in ik.rollback(target)
            assert visible(target) == before
        else:
            with pytest.raises(StoreError, match=r"cannot be rolled back: .* `ires resume .*` finishes it"):
                ik.rollback(target)
            ik.resume(target)
            assert ik.verify(target)


def unfinished(models: tuple[Path, Path, Path], **options: Any) -> Path:
    """A target whose update ended in the middle."""
    base, instruct, target = models
    with pytest.MonkeyPatch.context() as patch:
        cut_off(patch, journal.Journal, "write", 20)
        with pytest.raises(Cut):
            apply(target, (instruct, base), threads=1, **options)
    assert ik.status(target).state == "unfinished"
    return target


@pytest.mark.usefixtures("small")
def test_another_command_does_not_take_up_what_is_unfinished(models: tuple[Path, Path, Path]) -> None:
    base, instruct, _ = models
    target = unfinished(models, alpha=0.5)
    before = snapshot(target)
    for options in ({"alpha": 0.6}, {"alpha": 0.5, "tag": "x"}, {"alpha": 0.5, "rounding": "stochastic"}):
        with pytest.raises(StoreError, match=r"another update in place is unfinished: apply .* `ires resume"):
            apply(target, (instruct, base), **options)
    with pytest.raises(StoreError, match="another update in place is unfinished"):
        apply(target, (base, instruct), alpha=0.5)
    with pytest.raises(CheckpointError, match="an update in place of this model still runs or was interrupted"):
        ik.extract(base, target, target.with_name("r"))
    assert snapshot(target) == before
    apply(target, (instruct, base), alpha=0.5)
    assert ik.verify(target)


@pytest.mark.usefixtures("small")
def test_what_other_code_cut_into_other_windows(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = unfinished(models)
    before, windows_of = snapshot(target), cuts.windows
    with monkeypatch.context() as patch:
        patch.setattr(cuts, "windows", lambda steps, sizes: windows_of(steps, replace(sizes, window=sizes.window // 2)))
        with pytest.raises(StoreError, match="cuts the update into other pieces"):
            ik.resume(target)
    assert snapshot(target) == before
    ik.resume(target)
    assert ik.verify(target)


def test_an_update_remembers_how_it_is_cut(models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = models
    ik.apply(target, (instruct, base), out=target.with_name("out"), sync=False)
    with monkeypatch.context() as patch:
        patch.setattr(cuts, "SIZES", Sizes(window=64 * 4, unit=64, gap=16))
        unfinished(models, sync=False)
    many = len(json.loads((target / ".ires-unfinished" / "operation.json").read_bytes().partition(b"\n")[2])["windows"])
    assert many > 20
    ik.resume(target)
    assert visible(target) == visible(target.with_name("out"))


@pytest.mark.usefixtures("small")
def test_inputs_that_changed_meanwhile(models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, _ = models
    target = unfinished(models)
    (instruct / "tokenizer.json").write_text("{  }")  # it was copied before anything began
    file = sorted(instruct.glob("*.safetensors"))[0]
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    file.write_bytes(raw[:start] + bytes(40) + raw[start + 40 :])
    with pytest.raises(StoreError, match=r"not the file of the instruct that this was begun with: its tensor"):
        ik.resume(target)
    file.write_bytes(raw + b" ")
    with pytest.raises(CheckpointError, match="bytes too many at the end"):
        ik.resume(target)
    file.write_bytes(raw)
    with monkeypatch.context() as patch:
        patch.setattr(operation, "VERSION", "99")
        with pytest.raises(CheckpointError, match=r"was begun by ires_kernels .*, and this is 99"):
            ik.resume(target)
    for path in [*base.iterdir(), *instruct.iterdir()]:
        os.utime(path)
    ik.resume(target)  # the same bytes with other times
    assert (target / "tokenizer.json").read_text() == SIDE["instruct"]["tokenizer.json"]
    assert ik.verify(target)


@pytest.mark.usefixtures("small")
def test_without_syncs_a_restart_of_the_machine_is_final(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = unfinished(models, sync=False)
    with monkeypatch.context() as patch:
        patch.setattr(begun, "boot_id", lambda: "another")
        for again in (ik.resume, ik.rollback):
            with pytest.raises(StoreError, match="the machine was restarted in the middle of an update with --no-sync"):
                again(target)
    ik.resume(target)
    assert ik.verify(target)


@pytest.mark.usefixtures("small")
def test_a_second_process_is_refused(models: tuple[Path, Path, Path]) -> None:
    base, instruct, _ = models
    target = unfinished(models)
    place = Workplace.take(target)
    assert ik.status(target).state == "running"
    for again in (ik.resume, ik.rollback, lambda path: apply(path, (instruct, base))):
        with pytest.raises(StoreError, match="another process is writing it"):
            again(target)
    place.close()
    ik.resume(target)


def test_two_at_once(models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = models
    seen = []

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(run, "carry_on", carry_on)
        with pytest.raises(StoreError, match="another process is writing it") as caught:
            apply(target, (instruct, base))
        seen.append(caught)
        return carry_on(*arguments, **options)

    carry_on = run.carry_on
    monkeypatch.setattr(run, "carry_on", meanwhile)
    apply(target, (instruct, base))
    assert seen
    assert ik.verify(target)


def test_what_had_not_begun_is_begun_anew(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    work = target / ".ires-unfinished"
    token = trust.sign(*hidden.TOKEN)
    for content in ({}, {".ires-lock": ""}, {".ires-lock": token, "journal": "x", "operation.tmp": "{"}):
        work.mkdir()
        for name, text in content.items():
            (work / name).write_text(text)
        assert ik.status(target).state == "none"
        assert ik.inspect(target)["kind"] == "model"
        other = copy(target, "other")
        apply(other, (instruct, base))
        shutil.rmtree(other)
        assert ik.rollback(target) == f"{target}: nothing had been changed."
        assert not work.exists()


def test_what_is_not_ours_is_left_alone(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    work = target / ".ires-unfinished"
    work.mkdir()
    (work / "thesis.txt").write_text("mine")
    before = snapshot(target)
    with pytest.raises(StoreError, match="is in the way, and nothing that an update in place left"):
        apply(target, (instruct, base))
    assert snapshot(target) == before
    (work / ".ires-lock").write_text("")
    with pytest.raises(StoreError, match=r"is not the state of a merge that you began here \(no valid signature\)"):
        apply(target, (instruct, base))
    (work / ".ires-lock").write_text(trust.sign(*hidden.TOKEN))
    with pytest.raises(StoreError, match=r"holds thesis.txt. Move that to where it belongs"):
        apply(target, (instruct, base))
    assert (work / "thesis.txt").read_text() == "mine"


# --- again, and back


def test_the_same_again_changes_nothing_and_a_tag_makes_it_another(
    tmp_path: Path, models: tuple[Path, Path, Path]
) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), alpha=0.5)
    before = snapshot(target)
    report = apply(target, (instruct, base), alpha=0.5)
    assert len(report.notes) == 1
    assert "applied before. To apply it once more on purpose, give it another --tag." in report.notes[0]
    assert report.strengths[0].effective_alpha
    assert snapshot(target) == before
    ik.apply(target, (instruct, base), out=tmp_path / "twice", alpha=0.5, sync=False)
    apply(target, (instruct, base), alpha=0.5, tag="once more")
    assert {n: b for n, b in visible(target).items() if n.endswith("safetensors")} == {
        n: b for n, b in visible(tmp_path / "twice").items() if n.endswith("safetensors")
    }
    for tag in ("", "once more"):  # also what was applied before the last
        assert "nothing was done" in f"{apply(target, (instruct, base), alpha=0.5, tag=tag)}"
    assert [entry["recipe"] for entry in manifest(target)["in_place"]["history"]] != []


def test_a_copy_knows_what_was_applied_and_another_model_does_not(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    original = copy(target, "original")
    apply(target, (instruct, base))
    other = copy(target, "copied")
    for path in other.iterdir():
        os.utime(path)
    assert "nothing was done" in f"{apply(other, (instruct, base))}"
    for path in original.glob("*.safetensors"):
        shutil.copy(path, other / path.name)
    report = apply(other, (instruct, base))
    assert not [note for note in report.notes if "nothing was done" in note]
    assert visible(other) == visible(target)
    assert manifest(other)["in_place"]["history"] == []


def test_undo_can_be_stacked_and_is_refused_for_what_changed(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    states = [visible(target)]
    for alpha in (0.5, -0.25):
        apply(target, (instruct, base), alpha=alpha, undo="all")
        states.append(visible(target))
    assert {path.name for path in target.glob(".ires*")} == {".ires-undo-1", ".ires-undo-2"}
    file = next(target.glob("*.safetensors"))
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(StoreError, match=r"was written since its update in place, .* and cannot be rolled back"):
        ik.rollback(target)
    file.write_bytes(raw)
    for state in reversed(states[:-1]):
        ik.rollback(target)
        assert visible(target) == state
    assert not list(target.glob(".ires*"))
    assert not (target / "ires.json").exists()
    with pytest.raises(
        StoreError, match="nothing is unfinished there, and no update in place was kept to be taken back"
    ):
        ik.rollback(target)
    with pytest.raises(StoreError, match="nothing is unfinished there: no update in place, and no new folder"):
        ik.resume(target)


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


def test_other_weights_of_the_target_are_named(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    (target / "pytorch_model.bin").write_bytes(b"old")
    report = apply(target, (instruct, base))
    assert "pytorch_model.bin beside the weights of the target are not updated" in report.warnings


def test_only_the_last_update_can_be_taken_back(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), skip="norm", undo="all")
    assert "takes the update back" in f"{ik.status(target)}"
    apply(target, (instruct, base), tag="2")
    assert "is of an earlier update, and cannot take back anything: delete it" in f"{ik.status(target)}"
    before = snapshot(target)
    with pytest.raises(StoreError, match=r"and that is not the last that was applied here: it cannot be taken back"):
        ik.rollback(target)
    (target / "ires.json").unlink()
    with pytest.raises(StoreError, match=r"and that is not the last that was applied here: it cannot be taken back"):
        ik.rollback(target)
    assert snapshot(target).items() <= before.items()


def test_a_rollback_spares_what_shares_its_bytes(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), undo="all")
    hard_link(target)
    before = snapshot(target)
    with pytest.raises(StoreError, match="has 2 hard links"):
        ik.rollback(target)
    assert snapshot(target) == before


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("undo", ["ring", "all"])
def test_taking_back_what_was_interrupted_keeps_what_was_before(models: tuple[Path, Path, Path], undo: str) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), alpha=0.5)
    before = files_of(target)
    with pytest.MonkeyPatch.context() as patch:
        cut_off(patch, journal.Journal, "write", 1)
        with pytest.raises(Cut):
            apply(target, (instruct, base), threads=1, undo=undo)
    ik.rollback(target)
    assert files_of(target) == before
    assert "nothing was done" in f"{apply(target, (instruct, base), alpha=0.5)}"


def test_what_was_edited_after_an_update_is_kept(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    before = files_of(target)
    apply(target, (instruct, base), undo="all")
    (target / "chat_template.jinja").write_text("mine")
    (target / "vocab.json").write_text("mine as well")
    said = ik.rollback(target)
    kept = target / ".ires-replaced-1"
    assert files_of(target) == before
    assert files_of(kept) == {"chat_template.jinja": b"mine", "vocab.json": b"mine as well"}
    assert f"What you had edited since is in {kept}." in said


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


@pytest.mark.parametrize("how", ["touch", "seed", "file"])
def test_the_same_again_in_another_guise(tmp_path: Path, how: str) -> None:
    base, instruct, target = triple(tmp_path)
    ik.extract(base, instruct, tmp_path / "r", sync=False)
    for residual in ((instruct, base), tmp_path / "r"):
        other = copy(target, f"other{isinstance(residual, tuple)}")
        apply(other, residual)
        before = files_of(other)
        if how == "touch":
            for path in [*instruct.iterdir(), *base.iterdir(), *(tmp_path / "r").iterdir()]:
                os.utime(path)
        again = other / "model.safetensors" if how == "file" else other
        assert "nothing was done" in f"{apply(again, residual, seed=5 if how == 'seed' else 0)}"
        assert files_of(other) == before


def test_another_model_of_the_same_shape_is_no_repetition(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), alpha=0.5)
    before = visible(target)
    for path in instruct.glob("*.safetensors"):
        raw = path.read_bytes()
        path.write_bytes(raw[:-2] + bytes(2))
    apply(target, (instruct, base), alpha=0.5)
    assert visible(target) != before
    for path in instruct.glob("*.safetensors"):
        os.utime(path)
    assert "nothing was done" in f"{apply(target, (instruct, base), alpha=0.5)}"
    apply(target, (instruct, base), alpha=0.5, skip="norm", tag="not all of it is read")
    for path in instruct.glob("*.safetensors"):
        os.utime(path)
    report = apply(target, (instruct, base), alpha=0.5, skip="norm", tag="not all of it is read")
    assert "nothing was done" in f"{report}"
    table = manifest(target)
    del table["in_place"], table["inputs"]["instruct"]["read"]  # as nobody writes it
    table = trust.signed("manifest", table | {"in_place": manifest(target)["in_place"]})
    (target / "ires.json").write_text(json.dumps(table))
    with pytest.raises(StoreError, match=r"this looks like .*, which was applied before, but the files of the other"):
        apply(target, (instruct, base), alpha=0.5, skip="norm", tag="not all of it is read")


def save_again(path: Path, *, backwards: bool = False, **metadata: str) -> None:
    """The same tensors of bfloat16, as another program writes them."""
    tensors = sorted(load_file(path).items(), reverse=backwards)
    header = build_header(((name, "BF16", tuple(t.shape)) for name, t in tensors), {"format": "pt", **metadata})
    path.write_bytes(header + b"".join(t.view(torch.int16).numpy().tobytes() for _, t in tensors))


@pytest.mark.parametrize("how", ["metadata", "order", "a tensor that was skipped"])
def test_a_model_that_was_written_again_is_not_rolled_back(tmp_path: Path, how: str) -> None:
    base, instruct, target = triple(tmp_path)
    skip = "norm" if "skipped" in how else ()
    apply(target, (instruct, base), skip=skip, undo="all")
    path = target / "model.safetensors"
    if how == "metadata":
        save_again(path, note="saved again")
    elif how == "order":
        save_again(path, backwards=True)
    else:
        tensors = load_file(path)
        tensors["model.norm.weight"].fill_(9)
        save_file(tensors, path, metadata={"format": "pt"})
    before = snapshot(target)
    with pytest.raises(StoreError, match="was written since its update in place"):
        ik.rollback(target)
    assert snapshot(target) == before


def test_a_model_that_was_written_again_is_not_updated_twice(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    apply(target, (instruct, base))
    save_again(target / "model.safetensors", backwards=True, note="saved again")
    save_again(instruct / "model.safetensors", note="this one too")
    before = files_of(target)
    assert "nothing was done" in f"{apply(target, (instruct, base))}"
    assert "nothing was done" in f"{apply(target, (instruct, base), dtype='bf16')}"
    assert files_of(target) == before


def test_another_process_between_the_check_and_the_lock(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    begin = Workplace.begin

    def late(*arguments: Any, **options: Any) -> Workplace:
        monkeypatch.setattr(Workplace, "begin", begin)
        apply(target, (instruct, base))
        return begin(*arguments, **options)

    monkeypatch.setattr(Workplace, "begin", late)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        apply(target, (instruct, base))
    assert "nothing was done" in f"{apply(target, (instruct, base))}"
    assert not (target / ".ires-unfinished").exists()


@pytest.mark.usefixtures("small")
def test_a_dry_run_does_not_go_on(models: tuple[Path, Path, Path]) -> None:
    base, instruct, _ = models
    target = unfinished(models)
    before = snapshot(target)
    with pytest.raises(StoreError, match="this very update is unfinished, and without --dry-run would be gone on with"):
        apply(target, (instruct, base), dry_run=True)
    for options in ({"undo": "all"}, {"sha256": True}, {"sync": False}):
        with pytest.raises(StoreError, match="another update in place is unfinished"):
            apply(target, (instruct, base), **options)
    assert snapshot(target) == before


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


def test_an_undo_outlives_a_restart(models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = models
    before = visible(target)
    apply(target, (instruct, base), undo="all", sync=False)
    monkeypatch.setattr(begun, "boot_id", lambda: "another")
    ik.rollback(target)
    assert visible(target) == before


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("undo", ["ring", "all"])
@pytest.mark.parametrize("phase", ["installing", "finished"])
def test_a_restart_is_noticed_until_the_end(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, undo: str, phase: str
) -> None:
    base, instruct, target = models
    before = visible(target)
    with monkeypatch.context() as patch:
        cut_off(patch, Workplace, "install" if phase == "installing" else "move_out", 0)
        with pytest.raises(Cut):
            apply(target, (instruct, base), sync=False, undo=undo)
    assert (target / f".ires-unfinished/{phase}.json").exists()
    left = snapshot(target)
    monkeypatch.setattr(begun, "boot_id", lambda: "another")
    way = "ires rollback" if undo == "all" else "copy the model again"
    with pytest.raises(StoreError, match=f"the machine was restarted in the middle of an update .*{way}"):
        ik.resume(target)
    assert snapshot(target) == left
    if undo == "all":
        ik.rollback(target)
        assert visible(target) == before


def test_what_was_not_synced_is_doubted_after_a_restart(
    tmp_path: Path, models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    other, out = copy(target, "other"), tmp_path / "out"

    def damage(folder: Path) -> None:
        """As the page cache is lost: the size and time of the file are there, its bytes are not."""
        path = sorted(folder.glob("*.safetensors"))[-1]
        times = path.stat()
        with open(path, "r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(bytes(8))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def again(sync: bool) -> list[str]:
        reports = [apply(folder, (instruct, base), sync=sync) for folder in (target, other)]
        report = ik.apply(base, (instruct, base), out=out, sync=sync)
        return [f"{report}" for report in (*reports, report)]

    again(sync=False)
    synced: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(store, "fsync_file", synced.append)
        assert all("nothing was done" in text for text in again(sync=True))
    single = target / "alone.safetensors"
    shutil.copy(next(base.glob("*.safetensors")), single)
    sources = [tmp_path / role / next(base.glob("*.safetensors")).name for role in ("instruct", "base")]
    apply(single, tuple(sources), sync=False, allow_missing=True)
    with monkeypatch.context() as patch:
        also: list[Path] = []
        patch.setattr(store, "fsync_file", also.append)
        assert "nothing was done" in f"{apply(single, tuple(sources), allow_missing=True)}"
    assert set(also) == {single, target / "alone.safetensors.ires.json"}
    for path in also:
        path.unlink()
    wanted = [path for folder in (target, other, out) for path in folder.rglob("*") if path.is_file()]
    assert set(synced) == set(wanted)
    monkeypatch.setattr(repetition, "boot_id", lambda: "another")
    assert all("nothing was done" in text for text in again(sync=False))
    damage(out)
    damage(other)
    with pytest.raises(StoreError, match="was written with --no-sync before the machine was restarted, and is"):
        ik.apply(base, (instruct, base), out=out)
    with pytest.raises(StoreError, match="was updated with --no-sync before the machine was restarted, and is"):
        apply(other, (instruct, base))
    assert "nothing was done" in f"{apply(target, (instruct, base))}"


@pytest.mark.parametrize("name", ["journal", "log"])
def test_a_damaged_undo_leaves_the_model_alone(models: tuple[Path, Path, Path], name: str) -> None:
    base, instruct, target = models
    apply(target, (instruct, base), undo="all")
    (target / ".ires-undo-1" / name).unlink()
    with pytest.raises(StoreError, match="is gone, and nobody knows"):
        ik.rollback(target)
    assert ik.status(target).state == "finished"
    assert ik.verify(target)


@pytest.mark.usefixtures("small")
def test_without_undo_a_failure_before_the_first_write_is_none(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models

    read = reader.read_into

    def broken(*arguments: Any) -> None:
        if threading.current_thread().name.startswith("ires-"):  # of the engine
            raise OSError(errno.EIO, os.strerror(errno.EIO), "a disk")
        read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_into", broken)
        with pytest.raises(OSError, match="Input/output error"):
            apply(target, (instruct, base), undo="none")
    ik.resume(target)
    assert ik.verify(target)


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


def test_a_config_that_does_not_fit_the_weights(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    with pytest.raises(CheckpointError, match=r"config.json of the target says another dtype than BF16"):
        apply(target, (instruct, base), dtype="bf16")


@pytest.mark.root
def test_a_bind_mount(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    file = next(target.glob("*.safetensors"))
    shutil.copy(file, tmp_path / "elsewhere")
    subprocess.run(["mount", "--bind", f"{tmp_path}/elsewhere", f"{file}"], check=True)
    try:
        with pytest.raises(StoreError, match="is a mount point"):
            apply(target, (instruct, base))
    finally:
        subprocess.run(["umount", f"{file}"], check=True)


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


# --- a single file


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


# --- refused before the first byte


def link(target: Path) -> Path:
    file = next(target.glob("*.safetensors"))
    file.rename(target.parent / file.name)
    file.symlink_to(target.parent / file.name)
    return target


def hard_link(target: Path) -> Path:
    file = next(target.glob("*.safetensors"))
    os.link(file, target.parent / "another.safetensors")
    return target


def read_only(target: Path) -> Path:
    next(target.glob("*.safetensors")).chmod(0o444)
    return target


def folder_link(target: Path) -> Path:
    target.with_name("link").symlink_to(target)
    return target.with_name("link")


def linked_config(target: Path) -> Path:
    (target / "config.json").rename(target.parent / "config.json")
    (target / "config.json").symlink_to(target.parent / "config.json")
    return target


def in_a_cache(target: Path) -> Path:
    snapshots = target.parent / "models--x--y" / "snapshots"
    snapshots.mkdir(parents=True)
    return target.rename(snapshots / "abc")


def in_the_cache_by_setting(target: Path) -> Path:
    return target.rename(Path(os.environ["HF_HUB_CACHE"]) / "m")


REFUSED = [
    (link, "is a symbolic link to"),
    (hard_link, "has 2 hard links, so other models change with it"),
    (read_only, "is read-only. `chmod u"),
    (folder_link, "is a symbolic link to .*target. Give that path"),
    (linked_config, "config.json: is a symbolic link"),
    (in_a_cache, "lies in the Hugging Face cache"),
    (in_the_cache_by_setting, "lies in the Hugging Face cache"),
]


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[make.__name__ for make, _ in REFUSED])
def test_targets_that_are_refused(
    tmp_path: Path, models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, make: Any, text: str
) -> None:
    base, instruct, target = models
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", f"{tmp_path / 'cache'}")
    target = make(target)
    before = snapshot(tmp_path)
    for options in ({}, {"dry_run": True}, {"undo": "none", "sync": False}):
        with pytest.raises(StoreError, match=text):
            apply(target, (instruct, base), follow_links=True, **options)
        assert snapshot(tmp_path) == before
    assert main(["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}", "--in-place"]) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_the_journal(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    base, instruct, target = models
    before = snapshot(target)

    def full(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"journal") as caught:
        apply(target, (instruct, base))
    assert caught.value.errno == code
    assert snapshot(target) == before
    assert not (target / ".ires-unfinished").exists()
    assert main(["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}", "--in-place"]) == 3
    assert f"{target} is as it was, or finished" in capsys.readouterr().err


def test_no_permission_for_the_folder(models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = models
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != target)
    with pytest.raises(StoreError, match="no permission to make files in it, which the journal needs"):
        apply(target, (instruct, base))


def test_arguments_that_do_not_go_together(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    with pytest.raises(ArgumentError, match="give either out, a new folder, or in_place=True"):
        ik.apply(target, (instruct, base))
    with pytest.raises(ArgumentError, match="give either out, a new folder, or in_place=True"):
        ik.apply(target, (instruct, base), out="x", in_place=True)
    with pytest.raises(ArgumentError, match="undo is 'some', wanted one of ring, all, none"):
        ik.apply(target, (instruct, base), in_place=True, undo="some")
    arguments = ["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}"]
    for more in ([], ["--in-place", "-o", "x"], ["-o", "x", "--no-undo"], ["-o", "x", "--tag", "y"],
                 ["--in-place", "--no-undo", "--keep-undo"]):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            main([*arguments, *more])
        assert caught.value.code == 2


# --- the command line, and other loaders


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


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("how", ["in place", "new folder"])
def test_signals_stop_in_order(tmp_path: Path, number: signal.Signals, how: str) -> None:
    """A real process, slowed down so that the signal meets it at work."""
    base, instruct, target = triple(tmp_path, shards=3)
    where = ["--in-place"] if how == "in place" else ["-o", f"{tmp_path}/out", "--threads", "1"]
    program = f"""
        import os, sys, threading, time
        from ires_kernels.streaming import reader, windows
        from ires_kernels.in_place import cuts
        from ires_kernels.cli import main
        windows.WINDOW = 32
        cuts.SIZES = cuts.Sizes(window=256, unit=64, gap=16)
        read = reader.read_into
        def slowly(*arguments):
            if threading.current_thread().name.startswith("ires-"):  # of the engine
                os.write(1, b"reading\\n")
                time.sleep(0.01)
            read(*arguments)
        reader.read_into = slowly
        sys.exit(main({["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}", *where]!r}))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        seen = [process.stdout.readline() for _ in range(120)]
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert seen == ["reading\n"] * 120, err
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number), err
    assert err.startswith("ires: interrupted." if number == signal.SIGINT else f"ires: stopped by {number.name}."), err
    path = target if how == "in place" else tmp_path / "out"
    assert f"`ires resume {path}`, or the same command, goes on." in err
    assert ik.status(path).state == "unfinished"
    ik.resume(path)
    assert ik.verify(path, inputs={} if how == "in place" else None)
    assert set(read_model(path)) == set(SHAPES)


@pytest.mark.usefixtures("small")
def test_nothing_loads_what_is_unfinished(models: tuple[Path, Path, Path]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    target = unfinished(models)
    for loader in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises((OSError, ValueError)):
            loader.from_pretrained(target)
    assert not list(target.glob("**/[!.]*.safetensors")) or list(target.glob(".ires-unfinished/model/*.safetensors"))
    assert not list(target.glob("*.safetensors"))
    assert not (target / "config.json").exists()


# --- more than the ring, in a new folder


def test_a_new_folder_goes_on_where_it_was(
    tmp_path: Path, models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    ik.apply(target, (instruct, base), out=tmp_path / "whole", alpha=0.3)
    write = store.NewFile.write
    seen: list[str] = []

    def failing(self: Any, *arguments: Any) -> None:
        if self.path.name.startswith("model-00002"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), f"{self.path}")
        seen.append(self.path.name)
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store.NewFile, "write", failing)
        with pytest.raises(OSError, match="Input/output error"):
            ik.apply(target, (instruct, base), out=tmp_path / "out", alpha=0.3, threads=1)
    assert seen
    found = ik.status(tmp_path / "out")
    assert (found.state, "1 files complete" in found.what) == ("unfinished", True)
    first = tmp_path / "out.partial" / "model-00001-of-00002.safetensors"
    stamp = first.stat()
    with pytest.raises(StoreError, match="holds 1 complete files of another operation"):
        ik.apply(target, (instruct, base), out=tmp_path / "out", alpha=0.5)
    assert first.stat() == stamp
    ik.resume(tmp_path / "out")
    assert (tmp_path / "out" / first.name).stat().st_ino == stamp.st_ino, "it was not written again"
    assert snapshot_content(tmp_path / "out") == snapshot_content(tmp_path / "whole")
    before = snapshot(tmp_path / "out")
    again = ik.apply(target, (instruct, base), out=tmp_path / "out", alpha=0.3)
    assert "nothing was done: this is the output of the same command" in f"{again}"
    assert snapshot(tmp_path / "out") == before
    with pytest.raises(StoreError, match="is not empty"):
        ik.apply(target, (instruct, base), out=tmp_path / "out", alpha=0.5)
    (instruct / "tokenizer.json").write_text("{   }")
    with pytest.raises(StoreError, match="is not empty"):
        ik.apply(target, (instruct, base), out=tmp_path / "out", alpha=0.3)


def snapshot_content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_unfinished_new_folder_can_be_taken_back(
    tmp_path: Path, models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, _ = models
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(merge.guards, "check_unchanged", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ik.extract(base, instruct, tmp_path / "r")
    assert ik.status(tmp_path / "r").state == "unfinished"
    assert ik.rollback(tmp_path / "r") == f"{tmp_path}/r.partial: was removed."
    assert snapshot(tmp_path) == before


def test_the_folders_beside_a_model(tmp_path: Path) -> None:
    assert hidden.work_folder(tmp_path) == tmp_path / ".ires-unfinished"
    assert hidden.work_folder(tmp_path / "m.safetensors") == tmp_path / ".m.safetensors.ires-unfinished"
    (tmp_path / ".ires-undo-x").mkdir()
    for number in (2, 10, 1):
        (tmp_path / f".ires-undo-{number}").mkdir()
        (tmp_path / f".ires-undo-{number}/finished.json").write_bytes(trust.seal(hidden.SEAL, b"{\n}"))
    (tmp_path / ".ires-undo-11").mkdir()  # empty
    assert [path.name for path in hidden.undo_folders(tmp_path)] == [".ires-undo-1", ".ires-undo-2", ".ires-undo-10"]
    assert hidden.undo_folders(tmp_path / "m.safetensors") == []


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
