"""The undo journal, cut off everywhere: what is on the disk after a power cut is old or new, window by window.

The disk is simulated: every write and fdatasync of a run is logged. Then, for every point of the log, disks are made on
which each write that no fdatasync had covered by then is there, missing, or torn; and the journal is opened on them.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from ires_kernels.files import journal
from ires_kernels.files.journal import Journal, JournalError, UndoGone
from ires_kernels.files.log import count_records
from ires_kernels.files.slots import Extent, Targets

SECTOR = 512
WINDOWS = [
    Extent("a", 100, 1800), Extent("a", 2000, 2001), Extent("a", 2001, 6000),
    Extent("b", 0, 3000), Extent("b", 3000, 5000), Extent("a", 6000, 6100),
]  # fmt: skip
SIZES = {"a": 7000, "b": 5000}
LOG = 4096
UNDO = {"ring": 2, "all": len(WINDOWS)}


def filled(seed: int) -> dict[str, bytes]:
    return {name: random.Random(f"{seed}{name}").randbytes(size) for name, size in SIZES.items()}


OLD, NEW = filled(1), filled(2)


def expected(new: int) -> dict[str, bytes]:
    """The files with so many windows changed."""
    content = {name: bytearray(old) for name, old in OLD.items()}
    for file, start, stop in WINDOWS[:new]:
        content[file][start:stop] = NEW[file][start:stop]
    return {name: bytes(each) for name, each in content.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SIZES}


class Opened:
    """A journal over the files of a folder."""

    def __init__(self, folder: Path, slots: int, *, sync: bool = True) -> None:
        self.targets = Targets(SIZES, lambda name: os.open(folder / name, os.O_RDWR), sync=sync)
        new = not (folder / "log").exists()
        self.journal = Journal(folder, self.targets, WINDOWS, slots, LOG, sync=sync, new=new)

    def __enter__(self) -> Journal:
        return self.journal

    def __exit__(self, *_: object) -> None:
        try:
            self.journal.close()
        finally:
            self.targets.close()


def made(folder: Path) -> Path:
    folder.mkdir()
    for name, old in OLD.items():
        (folder / name).write_bytes(old)
    return folder


def update(opened: Journal, *, writers: int = 2, first: int = 0, stop: int = len(WINDOWS)) -> None:
    """Write the new bytes of windows, in pieces, by several threads."""
    opened.start()
    pieces = []
    for number in range(first, stop):
        file, start, end = WINDOWS[number]
        half = (start + end) // 2
        pieces += [(number, file, at, till) for at, till in ((start, half), (half, end)) if at < till]
    left = {number: sum(piece[0] == number for piece in pieces) for number in range(first, stop)}
    lock, errors = threading.Lock(), []

    def write() -> None:
        try:
            while True:
                with lock:
                    if not pieces or errors:
                        return
                    number, file, at, till = pieces.pop(0)
                opened.wait(number)
                opened.write(file, memoryview(NEW[file][at:till]), at)
                with lock:
                    left[number] -= 1
                    complete = not left[number]
                if complete:
                    opened.complete(number, f"window {number}".encode())
        except BaseException as error:
            errors.append(error)
            opened.stop()

    threads = [threading.Thread(target=write) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("slots", [0, 2, len(WINDOWS)])
@pytest.mark.parametrize("writers", [1, 3])
def test_all_is_new_in_the_end(tmp_path: Path, slots: int, writers: int) -> None:
    folder = made(tmp_path / "d")
    with Opened(folder, slots) as opened:
        if slots:
            blocks = (folder / "journal").stat().st_size
            assert blocks <= slots * (4096 + 4096), "no more room than the slots take"
        opened.recover()
        update(opened, writers=writers)
    assert contents(folder) == expected(len(WINDOWS))
    assert count_records(folder) == len(WINDOWS)
    with Opened(folder, slots) as opened:
        opened.recover()
        assert opened.records == [f"window {k}".encode() for k in range(len(WINDOWS))]
    assert contents(folder) == expected(len(WINDOWS))


class Disk:
    """Logs what is written and made durable in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ops: list[tuple[Any, ...]] = []
        self.lock = threading.Lock()
        self.folder = folder
        self.real_pwrite, self.real_sync = os.pwrite, os.fdatasync
        self.before = {path.name: path.read_bytes() for path in folder.iterdir()}
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(os, "fdatasync", self.fdatasync)

    def name(self, fd: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{fd}")).name

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        with self.lock:
            self.ops.append(("write", self.name(fd), offset, bytes(data)))
            return self.real_pwrite(fd, data, offset)

    def fdatasync(self, fd: int) -> None:
        with self.lock:
            begun = len(self.ops)
        self.real_sync(fd)
        with self.lock:
            self.ops.append(("sync", self.name(fd), begun))

    def after_a_cut(self, at: int, luck: random.Random, folder: Path) -> None:
        """A disk as it may be when power goes before operation `at`."""
        folder.mkdir()
        content = {name: bytearray(raw) for name, raw in self.before.items()}
        covered: dict[str, int] = {}
        for op in self.ops[:at]:
            if op[0] == "sync":
                covered[op[1]] = op[2]
        chance = luck.choice([0.0, 0.5, 1.0])
        for index, op in enumerate(self.ops[:at]):
            if op[0] != "write":
                continue
            _, name, offset, data = op
            image = content.setdefault(name, bytearray())
            whole = index < covered.get(name, 0)
            for start in range(0, len(data), SECTOR):
                part = data[start : start + SECTOR]
                if whole or luck.random() < chance:
                    end = offset + start + len(part)
                    image.extend(bytes(max(0, end - len(image))))
                    image[end - len(part) : end] = part
        for name, image in content.items():
            (folder / name).write_bytes(image)


def check_after_a_cut(folder: Path, undo: str) -> None:
    """Recovery gives old and new windows; then the update can be finished, and with all old bytes kept taken back."""
    with Opened(folder, UNDO[undo], sync=False) as opened:
        opened.recover()
        done = len(opened.records)
        assert contents(folder) == expected(done)
        if undo == "all":
            opened.check_restorable(ended=False)
            opened.restore()
            assert contents(folder) == OLD
            return
        update(opened, first=done)
    assert contents(folder) == expected(len(WINDOWS))


@pytest.mark.parametrize("undo", UNDO)
def test_a_power_cut_at_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undo: str) -> None:
    folder = made(tmp_path / "d")
    with Opened(folder, UNDO[undo]) as opened, monkeypatch.context() as patch:
        disk = Disk(folder, patch)
        opened.recover()
        update(opened)
        opened.finish()
    assert sum(op[0] == "sync" for op in disk.ops) == 3 * len(WINDOWS) + 1, "journal, file and log, once a window"
    luck = random.Random(5)
    finished = 0
    for at in range(len(disk.ops) + 1):
        for turn in range(3):
            where = tmp_path / f"{at}-{turn}"
            disk.after_a_cut(at, luck, where)
            finished += count_records(where)
            check_after_a_cut(where, undo)
    assert finished


def test_a_power_cut_in_the_recovery_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "d")
    with Opened(folder, 2) as opened, monkeypatch.context() as patch:
        disk = Disk(folder, patch)
        update(opened, stop=4)
        opened.finish()
    luck = random.Random(6)
    for turn, at in enumerate(range(5, len(disk.ops), 3)):
        where = tmp_path / f"first-{turn}"
        disk.after_a_cut(at, luck, where)
        with Opened(where, 2) as opened, monkeypatch.context() as patch:
            second = Disk(where, patch)
            opened.recover()
        for again in range(len(second.ops) + 1):
            there = tmp_path / f"second-{turn}-{again}"
            second.after_a_cut(again, luck, there)
            check_after_a_cut(there, "ring")


@pytest.mark.parametrize("how", ["recover", "restore"])
def test_what_is_put_back_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """After it the journal may go."""
    folder = made(tmp_path / "d")
    with Opened(folder, len(WINDOWS)) as opened:
        update(opened)
        opened.finish()
    if how == "recover":  # no window has its record
        (folder / "log").write_bytes(bytes(LOG))
    with Opened(folder, len(WINDOWS)) as opened, monkeypatch.context() as patch:
        disk = Disk(folder, patch)
        opened.check_restorable(ended=False)
        getattr(opened, how)()
    luck = random.Random(7)
    for turn in range(20):
        disk.after_a_cut(len(disk.ops), luck, tmp_path / f"{turn}")
        assert contents(tmp_path / f"{turn}") == OLD


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "preadv"])
@pytest.mark.parametrize("slots", [2, len(WINDOWS)])
def test_every_call_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, slots: int) -> None:
    real = getattr(os, call)
    for number in range(1000):
        folder = made(tmp_path / f"{number}")
        calls = iter(range(1000))

        def failing(*arguments: Any, calls: Any = calls, number: int = number) -> Any:
            if next(calls) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments)

        error = None
        try:
            with Opened(folder, slots) as opened:
                opened.recover()
                with monkeypatch.context() as patch:
                    patch.setattr(os, call, failing)
                    update(opened)
                    opened.finish()
        except OSError as raised:
            error = raised
        if error is None:
            assert contents(folder) == expected(len(WINDOWS))
            assert number >= len(WINDOWS)
            return
        assert (error.errno, error.filename is None) == (errno.EIO, False)
        check_after_a_cut(folder, "all" if slots > 2 else "ring")
    pytest.fail("the calls never end")


def test_without_undo_only_a_run_that_ended_in_order_is_gone_on_with(tmp_path: Path) -> None:
    folder = made(tmp_path / "d")
    with Opened(folder, 0) as opened:
        opened.recover()
        update(opened, stop=2)
    with Opened(folder, 0) as opened:
        opened.recover()
        assert len(opened.records) == 2
        update(opened, first=2, stop=3)
        opened.stop()  # something failed: nobody knows what is written of window 3
    with Opened(folder, 0) as opened, pytest.raises(JournalError, match="part old and part new"):
        opened.recover()
    with Opened(folder, 0) as opened, pytest.raises(JournalError, match="--no-undo kept no old bytes"):
        opened.check_restorable(ended=False)


def test_a_ring_says_what_it_no_longer_has(tmp_path: Path) -> None:
    folder = made(tmp_path / "d")
    with Opened(folder, 2) as opened:
        opened.start()
        opened.wait(1)
        for file, start, stop in WINDOWS[
            :2
        ]:  # not complete: the old bytes of these two are the only ones that are kept
            opened.write(file, memoryview(NEW[file][start:stop]), start)
        opened.stop()
    assert contents(folder) == expected(2)
    with Opened(folder, 2) as opened:
        opened.check_restorable(ended=False)
        opened.restore()
        assert contents(folder) == OLD
    folder = made(tmp_path / "e")
    with Opened(folder, 2) as opened:
        update(opened, stop=4)
    text = r"4 of its 6 windows are new, .* of \d of them"
    with Opened(folder, 2) as opened, pytest.raises(UndoGone, match=text):
        opened.check_restorable(ended=False)
    with Opened(folder, 2) as opened, pytest.raises(UndoGone, match="6 of its 6 windows are new"):
        opened.check_restorable(ended=True)


def test_waiting_ends_when_the_writers_fail(tmp_path: Path) -> None:
    folder = made(tmp_path / "d")
    with Opened(folder, 2) as opened:
        opened.start()
        opened.wait(0)

        def wait() -> None:
            with pytest.raises(InterruptedError):
                opened.wait(5)

        waiting = threading.Thread(target=wait)
        waiting.start()
        opened.stop()
        waiting.join(10)
        assert not waiting.is_alive()
    assert contents(folder) == OLD


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    folder = made(tmp_path / "d")

    def cut_and_update() -> None:
        with Opened(folder, 2) as opened:
            os.truncate(folder / "a", 1500)
            update(opened)

    with pytest.raises(OSError, match="the file ends at byte 1500: it shrank") as caught:
        cut_and_update()
    assert caught.value.filename == "a"


@pytest.mark.parametrize("name", ["journal", "log"])
@pytest.mark.parametrize("what", ["gone", "cut"])
def test_without_all_of_it_nothing_is_gone_on_with(tmp_path: Path, name: str, what: str) -> None:
    folder = made(tmp_path / "d")
    with Opened(folder, 2) as opened:
        update(opened, stop=3)
    if what == "gone":
        (folder / name).unlink()
        (folder / f"{name}.elsewhere").write_text("")
    else:
        os.truncate(folder / name, 1000)
    before = contents(folder)
    with pytest.raises(JournalError, match=f"{name} (is gone|was cut), and nobody knows which of its bytes are new"):
        Journal(folder, Targets((), os.open, sync=False), WINDOWS, 2, LOG, sync=False, new=False)
    assert contents(folder) == before


def test_slots_are_no_larger_than_what_they_hold(tmp_path: Path) -> None:
    folder = made(tmp_path / "d")
    with Opened(folder, len(WINDOWS)):
        assert (folder / "journal").stat().st_size == len(WINDOWS) * 2 * 4096
    assert journal.AHEAD == 2
