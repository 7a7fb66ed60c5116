"""Models that are open for writing through their pages: hidden, locked; afterwards old or new, and never a mix."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from children import die, end_of, ends, forked
from safetensors.torch import load_file, save_file
from small_models import raw, read_model, same, snapshot, tensors, triple, write_model, write_raw
from torch import Tensor

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.cli import main
from ires_kernels.files import copies, hidden, inplace, interrupts
from ires_kernels.files.ownership import StoreError
from ires_kernels.planning.rules import ArgumentError

NAME = "model.embed_tokens.weight"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return triple(tmp_path)[2]


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def holds(path: Path, wanted: dict[str, Tensor]) -> bool:
    found = load_file(path) if path.is_file() else read_model(path)
    return found.keys() == wanted.keys() and all(same(found[name], t) for name, t in wanted.items())


def doubled(path: Path) -> dict[str, Tensor]:
    return {name: t * 2 for name, t in (load_file(path) if path.is_file() else read_model(path)).items()}


# Written


@pytest.mark.parametrize("undo", ["copy", "none"])
def test_what_is_written_is_in_the_files(tmp_path: Path, undo: str, backend: str) -> None:
    base, instruct, target = triple(tmp_path, shards=1 if undo == "copy" else 3)
    before = [path.stat().st_ino for path in sorted(target.glob("*.safetensors"))]
    ik.apply(target, (instruct, base), out=tmp_path / "wanted", alpha=0.7)
    with ik.mapped(target, write=True, undo=undo) as t, ik.mapped(instruct) as i, ik.mapped(base) as b:
        for name in t:
            ik.add_difference_(t[name], i[name], b[name], alpha=0.7)
    assert holds(target, read_model(tmp_path / "wanted")), backend
    assert [path.stat().st_ino for path in sorted(target.glob("*.safetensors"))] == before
    assert not [name for name in visible(target) if name.startswith(".")]


def test_lists_in_one_call(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    ik.apply(target, (instruct, base), out=tmp_path / "wanted")
    with ik.mapped(target, write=True) as t, ik.mapped(instruct) as i, ik.mapped(base) as b:
        ik.add_difference_([t[n] for n in t], [i[n] for n in t], [b[n] for n in t])
    assert holds(target, read_model(tmp_path / "wanted"))


def test_a_single_file(target: Path) -> None:
    file = target / "model.safetensors"
    wanted = doubled(file)
    with ik.mapped(file, write=True) as t:
        assert not file.exists()
        for x in t.values():
            x.mul_(2)
    assert holds(file, wanted)
    assert visible(target) == ["config.json", "model.safetensors", "model.safetensors.ires.json"]


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    weights = {name: t for name, t in tensors(1).items() if name != "lm_head.weight"}
    model = write_model(tmp_path / "tied", weights, config={"tie_word_embeddings": True})
    with ik.mapped(model, write=True) as t:
        ik.scale_(t[NAME], 2.0)
        assert "lm_head.weight" not in t
        ik.scale_(t[NAME], 2.0)
        assert t[NAME].data_ptr() == t[NAME].data_ptr()
    assert same(read_model(model)[NAME], weights[NAME] * 4)


def test_tensors_of_any_kind_are_ordinary_ones(tmp_path: Path) -> None:
    weights = {"codes": torch.arange(6, dtype=torch.int8), "flag": torch.zeros(3, dtype=torch.bool),
               "w": torch.ones(4, 2), "e": torch.zeros(0, 3)}  # fmt: skip
    save_file(weights, tmp_path / "model.safetensors")
    with ik.mapped(tmp_path, write=True) as t:
        t["codes"][2:4] = 7
        t["flag"].logical_not_()
        t["w"].view(-1).numpy()[3] = 5
        t["e"].zero_()
        assert not any(x.is_inference() for x in t.values())
    found = load_file(tmp_path / "model.safetensors")
    assert found["codes"].tolist() == [0, 1, 7, 7, 4, 5]
    assert found["flag"].all()
    assert found["w"].view(-1).tolist() == [1, 1, 1, 5, 1, 1, 1, 1]


def test_bytes_at_addresses_that_suit_no_numbers(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    pad = 0
    while True:
        write_raw(file, {"w": ("F32", [2], raw(torch.tensor([1.0, 2.0])))}, pad=pad)
        if (file.stat().st_size - 8) % 4 == 1:
            break
        pad += 1
    with ik.mapped(file, write=True) as t:
        assert t["w"].dtype == torch.uint8
        with pytest.raises(TypeError, match=r"uint8.*; it is 'w' of .*begin at byte \d+, no multiple of 4"):
            ik.scale_(t["w"], 2.0)
        t["w"][:4] = torch.tensor([3.0]).view(torch.uint8)
    with ik.mapped(file) as t:
        assert t["w"].tolist() == [3.0, 2.0]


def test_flush_is_durable_and_goes_on(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    with ik.mapped(target, write=True, undo="none") as t:
        t[NAME].zero_()
        synced.clear()
        t.flush()
        assert [Path(path).name for path in synced] == ["model.safetensors"]
        t[NAME].add_(1)
    assert (read_model(target)[NAME] == 1).all()
    with ik.mapped(target) as t:
        t.flush()  # nothing to do
    with pytest.raises(ValueError, match="is closed"):
        t.flush()


def test_errors_of_the_disk_are_told(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: int) -> None:
        raise OSError(5, "Input/output error")

    t = ik.mapped(target, write=True)
    t[NAME].zero_()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            t.flush()
        with pytest.raises(OSError, match="Input/output error"):
            t.close()
    assert t.closed
    assert ik.status(target).state == "unfinished"
    ik.rollback(target)
    assert read_model(target)[NAME].any()


# Meanwhile


def test_it_is_hidden_and_locked(tmp_path: Path, target: Path) -> None:
    base, instruct = tmp_path / "base", tmp_path / "instruct"
    with ik.mapped(target, write=True) as t:
        t[NAME].zero_()
        assert visible(target) == [".ires-unfinished"]
        status = ik.status(target)
        assert status.state == "running"
        for use in (
            lambda: ik.mapped(target),
            lambda: ik.mapped(target, write=True),
            lambda: ik.inspect(target),
            lambda: ik.apply(target, (instruct, base), out=tmp_path / "out"),
        ):
            with pytest.raises(CheckpointError, match="still runs or was interrupted"):
                use()
        for use in (
            lambda: ik.apply(target, (instruct, base), in_place=True),
            lambda: ik.rollback(target),
            lambda: ik.resume(target),
        ):
            with pytest.raises(StoreError):
                use()
    assert ik.status(target).state == "finished"
    with ik.mapped(target, write=True):
        pass


def test_one_of_two_writers_is_refused(target: Path) -> None:
    begin, start = os.pipe()
    end, stop = os.pipe()
    refused = 7

    def write() -> None:
        os.read(begin, 1)
        try:
            with ik.mapped(target, write=True) as t:
                t[NAME].zero_()
                os.read(end, 1)
        except ValueError:
            os.write(stop, b"x")  # for the other one to end
            os._exit(refused)

    children = [forked(write) for _ in range(2)]
    os.write(start, b"xx")
    codes = sorted(end_of(child) for child in children)
    assert codes == [0, refused]
    assert not read_model(target)[NAME].any()


def zero(target: Path, undo: str, then: Callable[[], object]) -> None:
    with ik.mapped(target, write=True, undo=undo) as t:
        for x in t.values():
            x.zero_()
        then()


def die_after(renames: int) -> None:
    """Have the process killed after so many renames."""
    rename, left = os.rename, [renames]

    def last(*paths: Path) -> None:
        rename(*paths)
        left[0] -= 1
        if not left[0]:
            die()

    os.rename = last


def killed(target: Path, undo: str) -> None:
    assert ends(lambda: zero(target, undo, die)) == -signal.SIGKILL


# Afterwards


@pytest.mark.parametrize("alone", [False, True])
def test_a_crash_with_a_copy(target: Path, alone: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path = target / "model.safetensors" if alone else target
    before = {name: (entry[1], entry[2]) for name, entry in snapshot(target).items()}
    killed(path, "copy")
    assert not (target / "model.safetensors").exists()
    status = ik.status(path)
    assert status.state == "unfinished"
    assert "was opened for writing by ik.mapped with a copy of its old bytes, and not closed" in status.what
    assert status.next == (f"`ires rollback {path}` puts the old bytes back.",)
    with pytest.raises(StoreError, match=r"was opened for writing.*`ires rollback"):
        ik.resume(path)
    with pytest.raises(StoreError, match=r"was opened for writing"):
        ik.apply(path, (target.parent / "instruct", target.parent / "base"), in_place=True)
    assert main(["rollback", f"{path}"]) == 0
    assert "is what it was before" in capsys.readouterr().out
    assert {name: (entry[1], entry[2]) for name, entry in snapshot(target).items()} == before


def test_a_crash_without_a_copy(target: Path) -> None:
    killed(target, "none")
    status = ik.status(target)
    work = hidden.work_folder(target)
    assert status.next == (f"Nobody knows which of its bytes are new: delete {work} and copy the model again.",)
    for use in (ik.resume, ik.rollback):
        with pytest.raises(StoreError, match=r'with undo="none", and not closed.*copy the model again'):
            use(target)
    with pytest.raises(CheckpointError, match="ires status"):
        ik.mapped(target)


def test_an_exception_puts_the_old_bytes_back(target: Path) -> None:
    before = {name: (entry[1], entry[2]) for name, entry in snapshot(target).items()}
    held = []
    with pytest.raises(KeyError), ik.mapped(target, write=True) as t:
        held.append(spoiled(t))
    assert {name: (entry[1], entry[2]) for name, entry in snapshot(target).items()} == before
    assert not held


def spoiled(t: ik.mapping.Mapped) -> Tensor:
    t[NAME].zero_()
    return t["no such tensor"]


@pytest.mark.parametrize("undo", ["copy", "none"])
def test_nothing_has_changed_before_the_first_tensor(target: Path, undo: str) -> None:
    before = {name: entry[:2] for name, entry in snapshot(target).items()}
    with pytest.raises(CheckpointError, match="no such file"), ik.mapped(target, write=True, undo=undo):
        ik.mapped(target / "other")
    assert {name: entry[:2] for name, entry in snapshot(target).items()} == before
    assert len(ik.mapped(target, write=True, undo=undo)) == 7
    assert {name: entry[:2] for name, entry in snapshot(target).items()} == before


@pytest.mark.parametrize("moment", ["fill", "take_after"])
def test_an_interrupt_as_it_begins(target: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: entry[:2] for name, entry in snapshot(target).items()}
    function = getattr(copies, moment)

    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        function(*arguments)

    monkeypatch.setattr(copies, "clone", lambda *_: False)
    monkeypatch.setattr(copies, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ik.mapped(target, write=True)
    assert {name: entry[:2] for name, entry in snapshot(target).items()} == before
    assert ik.status(target).state == "none"


def test_an_interrupt_that_nobody_can_return_from(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when all is done, and the caller never gets what was opened."""
    check = interrupts.check

    def late() -> None:
        check()
        os.kill(os.getpid(), signal.SIGINT)

    before = {name: entry[:2] for name, entry in snapshot(target).items()}
    monkeypatch.setattr(interrupts, "check", late)
    try:
        ik.mapped(target, write=True, undo="none")
    except KeyboardInterrupt as error:
        error.__traceback__ = None
    monkeypatch.undo()
    gc.collect()
    assert {name: entry[:2] for name, entry in snapshot(target).items()} == before
    with ik.mapped(target, write=True) as t:
        assert len(t) == 7


def test_the_hidden_files_are_gone_as_it_ends(target: Path) -> None:
    t = ik.mapped(target, write=True)
    t[NAME].zero_()
    work = hidden.work_folder(target)
    os.rename(work / "model", work / "elsewhere")
    with pytest.raises(FileNotFoundError):
        t.close()
    os.rename(work / "elsewhere", work / "model")
    assert ik.status(target).state == "unfinished"
    ik.rollback(target)
    assert read_model(target)[NAME].any()


def test_an_interrupt_as_it_ends(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def interrupted(fd: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        fsync(fd)

    t = ik.mapped(target, write=True, undo="none")
    t[NAME].zero_()
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        t.close()
    monkeypatch.undo()
    assert not read_model(target)[NAME].any()
    assert ik.status(target).state == "finished"


def test_an_exception_without_a_copy(target: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError), ik.mapped(target, write=True, undo="none") as t:
        spoiled(t)
    assert ik.status(target).state == "unfinished"
    assert "copy the model again" in caplog.text


@pytest.mark.parametrize("step", range(1, 8))
def test_killed_as_it_ends(target: Path, step: int) -> None:
    """The n-th renaming at the end is the last one of the process."""
    zeros = {name: torch.zeros_like(t) for name, t in read_model(target).items()}
    code = ends(lambda: zero(target, "copy", lambda: die_after(step)))
    assert code == (-signal.SIGKILL if step < 6 else 0)
    status = ik.status(target)
    if status.state == "unfinished":
        assert status.next == (f"`ires resume {target}` does that.",)
        with pytest.raises(StoreError, match="all of it is new"):
            ik.rollback(target)
        assert "to give the files their places" in str(ik.resume(target))
    assert holds(target, zeros)
    assert ik.status(target).state == "finished"
    with ik.mapped(target, write=True) as t:
        assert len(t) == 7


@pytest.mark.parametrize("undo", ["copy", "none"])
@pytest.mark.parametrize("step", range(1, 7))
def test_killed_as_it_ends_without_a_write(target: Path, step: int, undo: str) -> None:
    old = copy_of(target)

    def use() -> None:
        with ik.mapped(target, write=True, undo=undo):
            die_after(step)

    assert ends(use) == (-signal.SIGKILL if step < 5 else 0)
    status = ik.status(target)
    if status.state != "none":
        assert status.next == (f"`ires rollback {target}` goes on.",)
        ik.rollback(target)
    assert holds(target, old)
    assert visible(target) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("rounds", [12, pytest.param(400, marks=pytest.mark.torture)])
def test_killed_at_any_moment(target: Path, rounds: int) -> None:
    """Opening, writing, closing or going back: it is old or new, once that was asked of `status` and done."""
    rng = random.Random(7)
    states = [{name: torch.full_like(t, value) for name, t in read_model(target).items()} for value in range(3)]
    with ik.mapped(target, write=True, undo="none") as t:
        for x in t.values():
            x.zero_()
    now, seconds, ways = 0, 0.1, set()
    for _ in range(rounds):
        new = (now + 1) % 3

        def write(value: int = new) -> None:
            with ik.mapped(target, write=True) as t:
                for x in t.values():
                    x.fill_(value)

        started = time.monotonic()
        child = forked(write)
        time.sleep(rng.uniform(0, 1.3 * seconds))
        os.kill(child, signal.SIGKILL)
        if not end_of(child):
            seconds = min(time.monotonic() - started, 1.0)
        status = ik.status(target)
        if "`ires resume" in "".join(status.next):
            ways.add("resume")
            ik.resume(target)
        elif "`ires rollback" in "".join(status.next):
            ways.add("rollback")
            child = forked(lambda: ik.rollback(target))
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            end_of(child)
            if "`ires rollback" in "".join(ik.status(target).next):
                ik.rollback(target)
        found = [value for value, state in enumerate(states) if holds(target, state)]
        assert found in ([now], [new])
        now = found[0]
        assert not [name for name in visible(target) if name.startswith(".")]
    assert rounds < 100 or ways == {"resume", "rollback"}


@pytest.mark.parametrize("step", range(1, 7))
def test_rolling_back_can_be_killed_and_done_again(tmp_path: Path, step: int) -> None:
    target = triple(tmp_path, shards=2)[2]
    old = copy_of(target)
    killed(target, "copy")

    def roll_back() -> None:
        die_after(step)
        ik.rollback(target)

    assert ends(roll_back) == -signal.SIGKILL
    if ik.status(target).state != "none":
        ik.rollback(target)
    assert holds(target, old)
    assert not [name for name in visible(target) if name.startswith(".")]


def copy_of(model: Path) -> dict[str, Tensor]:
    """What the library reads is mapped, and changes with the file."""
    return {name: t.clone() for name, t in read_model(model).items()}


def test_tensors_that_are_held_after_closing(target: Path) -> None:
    with ik.mapped(target, write=True) as t:
        x = t[NAME]
        x.fill_(3)
    files = snapshot(target)
    for use in (lambda: ik.scale_(x, 2.0), lambda: ik.scale(x, 2.0)):
        with pytest.raises(RuntimeError, match=rf"is '{NAME}' of .*, which is closed"):
            use()
    assert (x == 3).all()
    x.zero_()
    assert snapshot(target) == files
    assert not x.any()
    with pytest.raises(ValueError, match="after it was closed"):
        t[NAME]
    t.close()


def test_what_is_never_closed_stays_hidden(target: Path) -> None:
    with pytest.warns(ResourceWarning, match="was never closed: the model stays hidden"):
        x = ik.mapped(target, write=True)[NAME]
    assert ik.status(target).state == "unfinished"
    file = hidden.work_folder(target) / "model" / "model.safetensors"
    before = file.read_bytes()
    x.zero_()
    assert file.read_bytes() == before
    ik.rollback(target)


def test_a_forked_child_writes_for_itself(target: Path) -> None:
    wanted = copy_of(target)

    def child() -> None:
        x.zero_()
        t.close()
        with pytest.raises(RuntimeError, match="which is closed"):
            ik.scale_(x, 2.0)

    with ik.mapped(target, write=True) as t:
        x = t[NAME]
        assert ends(child) == 0
        assert same(x, wanted[NAME])
        assert visible(target) == [".ires-unfinished"]
    assert holds(target, wanted)


def test_files_with_holes_get_their_room_first(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "model.safetensors", {"w": ("U8", [1 << 20], bytes(1 << 20))})
    start = file.stat().st_size - (1 << 20)
    os.truncate(file, start)
    os.truncate(file, start + (1 << 20))
    os.utime(file, (5, 5))
    if file.stat().st_blocks * 512 >= file.stat().st_size:
        pytest.skip("the file system makes no holes")
    with ik.mapped(file, write=True, undo="none") as t:
        assert len(t) == 1
    assert file.stat().st_blocks * 512 >= file.stat().st_size
    assert file.stat().st_mtime == 5


def test_few_descriptors_are_enough(tmp_path: Path) -> None:
    target = write_model(tmp_path / "model", {f"t{i:02}": torch.ones(2) for i in range(60)}, shards=60)

    def use() -> None:
        here = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (here + 12, here + 12))
        with ik.mapped(target, write=True) as t:
            for x in t.values():
                ik.scale_(x, 2.0)
            t.flush()
        with ik.mapped(target) as t:
            assert all((x == 2).all() for x in t.values())
        with pytest.raises(KeyError), ik.mapped(target, write=True) as t:
            t["t00"].zero_().add_(t["other"])

    assert ends(use) == 0
    assert all((t == 2).all() for t in read_model(target).values())


# What is recorded


def test_the_manifest_says_so(tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, instruct = tmp_path / "base", tmp_path / "instruct"
    ik.apply(target, (instruct, base), in_place=True, sha256=True)
    first = json.loads((target / "ires.json").read_text())
    with ik.mapped(target, write=True) as t:
        ik.scale_(t[NAME], 2.0)
    table = json.loads((target / "ires.json").read_text())
    assert table["operation"] == "mapped"
    assert table["written"].startswith("through ik.mapped")
    assert [entry["id"] for entry in table["in_place"]["history"]] == [first["id"]]
    assert not any(entry["xxh3_128"] for entry in table["tensors"].values())
    assert not (target / "SHA256SUMS").exists()
    assert "through ik.mapped" in ik.status(target).what
    assert main(["verify", f"{target}"]) == 2
    assert "was written through ik.mapped" in capsys.readouterr().err
    ik.inspect(target)
    # It is still known what was applied before, and what is applied on top of it.
    again = ik.apply(target, (instruct, base), in_place=True)
    assert "nothing was done" in str(again)
    ik.apply(target, (instruct, base), in_place=True, alpha=0.5)
    history = json.loads((target / "ires.json").read_text())["in_place"]["history"]
    assert [entry["id"] for entry in history] == [first["id"], table["id"]]


def test_a_merged_folder_is_no_longer_what_was_merged(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    out = tmp_path / "out"
    ik.apply(target, (instruct, base), out=out)
    with ik.mapped(out, write=True, undo="none"):
        pass  # no tensor was asked for
    assert ik.verify(out)
    with ik.mapped(out, write=True, undo="none") as t:
        t[NAME][0] = 0
    with pytest.raises(CheckpointError, match=r"was written through ik\.mapped"):
        ik.verify(out)
    with pytest.raises(StoreError):
        ik.apply(target, (instruct, base), out=out)


def test_times_change_even_where_memory_does_not_change_them(target: Path) -> None:
    file = target / "model.safetensors"
    os.utime(file, (1, 1))
    with ik.mapped(target, write=True, undo="none") as t:
        assert t[NAME].any()
    assert file.stat().st_mtime > 1e9


def test_room_for_the_manifest_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {f"{'é' * 60}.{i}": torch.zeros(1, 1, 1, 1, 1) for i in range(300)}
    model = write_model(tmp_path / "model", weights)
    reserved = []
    reserve = inplace.Workplace.reserve

    def watched(place: inplace.Workplace, size: int) -> None:
        reserved.append(size)
        reserve(place, size)

    monkeypatch.setattr(inplace.Workplace, "reserve", watched)
    with ik.mapped(model, write=True, undo="none") as t:
        assert len(t.values()) == len([*t.values()]) == 300
    assert reserved[0] > (model / "ires.json").stat().st_size


# Refused


def test_what_cannot_be_written(tmp_path: Path, target: Path) -> None:
    file = target / "model.safetensors"
    before = snapshot(target)
    with pytest.raises(ArgumentError, match="undo is 'ring', wanted one of copy, none"):
        ik.mapped(target, write=True, undo="ring")
    os.link(file, tmp_path / "other.safetensors")
    with pytest.raises(StoreError, match="hard links"):
        ik.mapped(target, write=True)
    os.unlink(tmp_path / "other.safetensors")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(StoreError, match="symbolic link"):
        ik.mapped(tmp_path / "link", write=True)
    os.chmod(file, 0o444)
    with pytest.raises(StoreError, match="read-only"):
        ik.mapped(target, write=True)
    os.chmod(file, 0o644)
    ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / "residual")
    with pytest.raises(StoreError, match="is a residual"):
        ik.mapped(tmp_path / "residual", write=True)
    assert {k: v[2] for k, v in snapshot(target).items()} == {k: v[2] for k, v in before.items()}


def test_it_is_the_file_that_was_validated(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = inplace.Workplace.begin.__func__

    def late(cls: type[inplace.Workplace], path: Path, **options: bool) -> inplace.Workplace:
        place: inplace.Workplace = begin(cls, path, **options)
        os.truncate(path / "model.safetensors", 100)
        return place

    monkeypatch.setattr(inplace.Workplace, "begin", classmethod(late))
    with pytest.raises(CheckpointError, match="changed while it was opened"):
        ik.mapped(target, write=True)
    assert visible(target) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("call", ["fill", "clone", "take_after", "allocate", "check_room"])
def test_nothing_has_changed_where_there_is_no_room(target: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = snapshot(target)
    monkeypatch.setattr(copies, "clone", lambda *_: call == "check_room")
    monkeypatch.setattr(copies, call, full)
    with pytest.raises(OSError, match="No space left"):
        ik.mapped(target, write=True)
    assert {k: v[1:] for k, v in snapshot(target).items()} == {k: v[1:] for k, v in before.items()}
    assert ik.status(target).state == "none"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system that makes clones, with 100 MB and a model of 24 MB on it."""
    from disks import Disk

    missing = [tool for tool in ("mkfs.xfs", "mount") if shutil.which(tool) is None]
    if os.geteuid() or missing:
        pytest.skip(f"needs root, and {', '.join(missing) or 'is not'}")
    disk = Disk(tmp_path, "xfs")
    fill(disk.mounted / "filled", shutil.disk_usage(disk.mounted).free - (100 << 20))
    write_model(disk.mounted / "model", {"w": torch.ones(12 << 20, dtype=torch.bfloat16)})
    os.sync()
    yield disk.mounted
    gc.collect()  # what is held of mapped files
    disk.unmount()


def fill(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


@pytest.mark.root
def test_a_clone_takes_no_room_until_it_is_written(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    def free() -> int:
        return shutil.disk_usage(small).free >> 20

    model, before = small / "model", free()
    with ik.mapped(model, write=True) as t:
        assert free() > before - 4
        ik.scale_(t["w"], 2.0)
        t.flush()
        assert free() < before - 20
    assert not caplog.text
    until = time.monotonic() + 30  # XFS frees behind
    while free() <= before - 4:
        assert time.monotonic() < until
        time.sleep(0.05)
    with pytest.raises(ZeroDivisionError), ik.mapped(model, write=True) as t:
        _ = ik.scale_(t["w"], 2.0).sum().item() / 0
    with ik.mapped(model) as t:
        assert (t["w"] == 2).all()


@pytest.mark.root
def test_a_full_disk_under_a_clone(small: Path) -> None:
    """Where clones are written there must be room for them: else nothing begins; if it goes later, it is an error."""
    model = small / "model"
    fill(small / "more", shutil.disk_usage(small).free - (16 << 20))
    with pytest.raises(OSError, match="No space left on device: what is written takes up to"):
        ik.mapped(model, write=True)
    assert ik.status(model).state == "none"
    os.unlink(small / "more")

    def use() -> None:
        t = ik.mapped(model, write=True)
        fill(small / "more", shutil.disk_usage(small).free - (8 << 20))
        with pytest.raises(OSError, match="the disk is full"):
            ik.scale_(t["w"], 2.0)

    assert ends(use) == 0  # and not by SIGBUS
    os.unlink(small / "more")
    ik.rollback(model)
    assert (read_model(model)["w"] == 1).all()


# Copies


def test_says_how_much_is_copied(
    target: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "clone", lambda *_: False)
    with caplog.at_level(logging.WARNING, "ires_kernels"), ik.mapped(target, write=True):
        pass
    assert f"{target}: copying its weights" in caplog.text
    caplog.clear()
    with ik.mapped(target, write=True, undo="none"):
        pass
    assert not caplog.text


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000])
def test_a_copy_is_the_same_file(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_CHUNK", 33_000)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(os.urandom(size))
    os.chmod(one, 0o640)
    os.utime(one, ns=(1, 123_456_789))
    with open(one, "rb") as source, open(other, "wb") as copy:
        copies.fill(source.fileno(), copy.fileno(), size, other)
        copies.take_after(copy.fileno(), source.fileno())
    assert other.read_bytes() == one.read_bytes()
    assert (other.stat().st_mode, other.stat().st_mtime_ns) == (one.stat().st_mode, 123_456_789)
    with open(one, "rb") as source, open(other, "r+b") as copy, pytest.raises(OSError, match="it was cut"):
        copies.fill(source.fileno(), copy.fileno(), size + 1, other)
