"""An update in place that is cut off, at any call or by a signal: it is hidden, and gone on with or taken back."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selection import tiles
from small_models import SHAPES, read_model, snapshot, triple
from updated import SIDE, Cut, apply, copy, cut_off, files_of, manifest, unfinished, visible

import ires_kernels as ik
from ires_kernels.checkpoints import sources
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files import hidden, journal, trust
from ires_kernels.files.ownership import StoreError
from ires_kernels.in_place import cuts
from ires_kernels.in_place.cuts import Sizes
from ires_kernels.records import operation


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
    read = sources.read_into

    def slowly(*arguments: Any) -> None:
        time.sleep(0.003)
        read(*arguments)

    monkeypatch.setattr(sources, "read_into", slowly)
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
    with tiles(elements=32):
        with monkeypatch.context() as patch:
            patch.setattr(cuts, "SIZES", Sizes(window=64 * 4, unit=64, gap=16))
            unfinished(models, sync=False)
        record = json.loads((target / ".ires-unfinished" / "operation.json").read_bytes())
        assert len(record["windows"]) > 10
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
def test_an_input_that_was_another_while_it_was_read(models: tuple[Path, Path, Path]) -> None:
    """With the first one back, nothing of the model is gone on with: a part of it was made of the other one."""
    base, instruct, target = models
    before = files_of(target)
    file = sorted(instruct.glob("*.safetensors"))[0]
    good = file.read_bytes()
    other = good[:-64] + bytes(64)
    complete = journal.Journal.complete
    for undo, way in (("all", "take the update back with `ires rollback"), ("ring", "delete .* and copy the model")):
        with pytest.MonkeyPatch.context() as patch:

            def exchange(self: journal.Journal, number: int, record: bytes) -> None:
                complete(self, number, record)
                if number == 0:
                    file.write_bytes(other)

            patch.setattr(journal.Journal, "complete", exchange)
            with pytest.raises(CheckpointError, match=r"while it was read\. Put it back as it was") as caught:
                apply(target, (instruct, base), undo=undo, threads=1)
            assert re.search(way, f"{caught.value}")
        with pytest.raises(StoreError, match=f"that this was begun with, .* Put that one back, then go on; or {way}"):
            ik.resume(target)
        file.write_bytes(good)
        with pytest.raises(StoreError, match=f"If it was another one while it was read, .*: {way}"):
            ik.resume(target)
        if undo == "all":
            assert "is what it was before" in ik.rollback(target)
            assert files_of(target) == before


def test_a_write_to_what_no_window_has_come_to(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of shards that the update has not come to the times are known; and the way out is one."""
    base, instruct, target = models
    ik.apply(target, (instruct, base), out=target.with_name("out"), sync=False)
    monkeypatch.setattr(cuts, "SIZES", Sizes(window=256, unit=64, gap=16))
    with monkeypatch.context() as patch, tiles(elements=32):
        cut_off(patch, journal.Journal, "complete", 3)
        with pytest.raises(Cut):
            apply(target, (instruct, base), threads=1)
    last = sorted((target / ".ires-unfinished").rglob("*.safetensors"))[-1]
    good = last.read_bytes()
    last.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with tiles(elements=32), pytest.raises(StoreError, match="somebody has changed it") as caught:
        ik.resume(target)
    assert "copy the model again" in f"{caught.value}"
    last.write_bytes(good)
    command = re.search(r"`(touch .*?)`", f"{caught.value}")
    assert command
    subprocess.run(command[1], shell=True, check=True)
    with tiles(elements=32):
        ik.resume(target)
    assert visible(target) == visible(target.with_name("out"))


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
        assert f"{target}: nothing was taken back" in ik.rollback(target)
        assert not work.exists()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ends", ["finished", "none"])
def test_cut_off_with_nothing_but_the_lock_left(models: tuple[Path, Path, Path], ends: str) -> None:
    """What is left does not say whether the model is old or new; the model does."""
    base, instruct, target = models
    unlink = os.unlink

    def cut(name: Any, *arguments: Any, **options: Any) -> None:
        if name == ".ires-lock":
            raise Cut
        unlink(name, *arguments, **options)

    if ends == "none":
        unfinished(models, undo="all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", cut)
        with pytest.raises(Cut):
            _ = ik.rollback(target) if ends == "none" else apply(target, (instruct, base))
    assert os.listdir(target / ".ires-unfinished") == [".ires-lock"]
    found, files = ik.status(target), files_of(target)
    assert found.state == ends
    assert f"{target / '.ires-unfinished'} is left of an update in place" in found.what
    assert found.next == (f"`ires rollback {target}` removes that.",)
    assert f"{target}: nothing was taken back" in ik.rollback(target)
    assert files_of(target) == files
    assert ik.status(target).state == ends


@pytest.mark.usefixtures("small")
def test_without_undo_a_failure_before_the_first_write_is_none(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models

    read = sources.read_into

    def broken(*arguments: Any) -> None:
        if threading.current_thread().name.startswith("ires-"):  # of the engine
            raise OSError(errno.EIO, os.strerror(errno.EIO), "a disk")
        read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_into", broken)
        with pytest.raises(OSError, match="Input/output error"):
            apply(target, (instruct, base), undo="none")
    ik.resume(target)
    assert ik.verify(target)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("how", ["in place", "new folder"])
def test_signals_stop_in_order(tmp_path: Path, number: signal.Signals, how: str) -> None:
    """A real process, slowed down so that the signal meets it at work."""
    base, instruct, target = triple(tmp_path, shards=3)
    where = ["--in-place"] if how == "in place" else ["-o", f"{tmp_path}/out", "--threads", "1"]
    program = f"""
        import os, sys, threading, time
        from ires_kernels.streaming import tiles
        from ires_kernels.checkpoints import sources
        from ires_kernels.in_place import cuts
        from ires_kernels.cli import main
        tiles.tiles.set(tiles.Tiles(elements=32))
        cuts.SIZES = cuts.Sizes(window=256, unit=64, gap=16)
        read = sources.read_into
        def slowly(*arguments):
            if threading.current_thread().name.startswith("ires-"):  # of the engine
                os.write(1, b"reading\\n")
                time.sleep(0.01)
            read(*arguments)
        sources.read_into = slowly
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
