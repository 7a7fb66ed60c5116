"""Folders of processes: they go with them, and of those that were killed at the next occasion; no other ones do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ires_kernels.files import scratch

PREFIX = "ires-elsewhere-"
MAKE = f"""
import os, sys
from ires_kernels.files import scratch
folder = scratch.make({PREFIX!r})
(folder / "inner").mkdir()
(folder / "inner/file").write_text("x")
print(folder, flush=True)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}")
    monkeypatch.setenv("TMPDIR", f"{tmp_path}")
    return tmp_path


def begin(program: str) -> tuple[subprocess.Popen[str], Path]:
    """A process, and the folder that it has made."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE + program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=60)


def test_it_goes_with_its_process(place: Path) -> None:
    process, folder = begin("sys.stdin.read()\n")
    assert [*place.iterdir()] == [folder]
    assert folder.stat().st_mode & 0o777 == 0o700
    end(process)
    assert [*place.iterdir()] == []


def test_what_the_killed_have_left_goes_at_the_next_occasion(place: Path) -> None:
    """Not that of a process which lives, of a fork of a dead one, of one without a lock, and what a link leads to."""
    living, its = begin("sys.stdin.read()\n")
    killed, gone = begin("sys.stdin.read()\n")
    killed.kill()
    end(killed)
    forked, kept = begin("os.fork() or (print('fork', flush=True), sys.stdin.read(), os._exit(0))\nos._exit(0)\n")
    assert forked.stdout is not None
    assert forked.stdout.readline() == "fork\n"
    forked.wait(60)
    (place / f"{PREFIX}unlocked").mkdir()
    (place / "mine").mkdir()
    (place / f"{PREFIX}link.held").symlink_to(place / "mine")
    others = {*place.iterdir()} - {gone}
    assert {its, kept} < others
    new = scratch.make(PREFIX)
    try:
        assert {*place.iterdir()} == others | {new}
        assert (kept / "inner/file").read_text() == "x"
    finally:
        scratch._remove(new, os.getpid())
    end(living)
    end(forked)


def test_without_locks_nobody_finds_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError

    monkeypatch.setattr("fcntl.flock", none)
    one, other = scratch.make(PREFIX), scratch.make(PREFIX)
    assert {*place.iterdir()} == {one, other}
    assert not any(path.name.endswith(".held") for path in (one, other))
