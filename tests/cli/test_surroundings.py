"""Streams that are full or gone, and threads that cannot be started: the exit code says what became of the command."""

from __future__ import annotations

import errno
import io
import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from faults import Done, Warm, compiler
from small_models import snapshot, triple

import ires_kernels as ik
from ires_kernels.checkpoints import sources
from ires_kernels.cli import main
from ires_kernels.files import new_file
from ires_kernels.records.report import Report

pytestmark = pytest.mark.skipif(compiler() is None, reason="faults.c needs a C compiler")

APPLY = ("apply", "target", "--instruct", "instruct", "--base", "base")
FULL = "/dev/full"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    triple(tmp_path, shards=3)
    return tmp_path


@pytest.fixture
def run(warm: Warm, root: Path) -> Any:
    def run(*argv: str, **options: Any) -> Done:
        return warm.run(argv, root, **options)

    return run


@pytest.mark.parametrize("options", [{"err": FULL}, {"err": FULL, "out": FULL}])
def test_errors_that_cannot_be_printed(run: Any, root: Path, options: dict[str, str]) -> None:
    assert run("inspect", "nowhere", **options).code == 2
    assert run("apply", "target", **options).code == 2  # of argparse
    assert run(*APPLY, "-o", "nowhere/out", **options).code == 2
    assert run("verify", "target", **options).code == 2
    (root / "target" / "config.json").write_text('{"torch_dtype": 1, "x": [')
    assert run(*APPLY, "-o", "out", **options).code == 2


def test_results_that_cannot_be_printed(run: Any, root: Path) -> None:
    for command in ((*APPLY, "-o", "out"), ("inspect", "target", "--json"), ("status", "target"), ("verify", "out")):
        done = run(*command, out=FULL)
        assert done.code == 3, command
        assert done.err == "ires: standard output: No space left on device. What the command had to do is done.\n"
    assert ik.verify(root / "out")
    assert run("--help", out=FULL).code == 3
    assert run("--version", out=FULL).err == "ires: standard output: No space left on device.\n"


class Gone(io.StringIO):
    """A pipe that nobody reads any more."""

    def write(self, _: str) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_a_reader_that_has_seen_enough_changes_no_exit_code(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ik.apply(root / "target", (root / "instruct", root / "base"), out=root / "out", sync=False)
    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["verify", f"{root}/out"]) == 0
    with open(root / "out" / "model-00003-of-00003.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert main(["verify", f"{root}/out"]) == 1


SLOW = """
    import os, sys, threading, time
    from ires_kernels import cli
    from ires_kernels.checkpoints import sources

    read, calls = sources.read_into, iter(range(10**6))

    def slowly(*arguments):
        number = next(calls) if threading.current_thread().name.startswith("ires-") else 0  # of the engine
        if number == 5:
            os.write(1, b"working\\n")
        if number >= 5:
            time.sleep(0.05)
        read(*arguments)

    sources.read_into = slowly
    sys.exit(cli.main())
"""


def test_a_terminal_that_goes_away(root: Path) -> None:
    """It is not the one that the command is a job of, or it ignores SIGHUP: the bar has nowhere to go any more."""
    ours, theirs = pty.openpty()
    program = [sys.executable, "-c", textwrap.dedent(SLOW), *APPLY, "-o", "out", "--threads", "1"]
    with subprocess.Popen(program, cwd=root, stdout=subprocess.PIPE, stderr=theirs) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"working\n"
        os.close(ours)
        process.stdout.read()
    os.close(theirs)
    assert process.returncode == 0
    assert ik.verify(root / "out")


def test_a_bar_that_cannot_be_drawn(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.chdir(root)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for method in ("start", "update", "stop"):
        with monkeypatch.context() as patch:
            patch.setattr(f"rich.progress.Progress.{method}", fail)
            assert main([*APPLY, "-o", f"out-{method}"]) == 0, capsys.readouterr()


# Threads.


@pytest.fixture(params=[0, 1, 2])
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many threads can be there beside the one that there is."""
    begin, started = threading.Thread.start, list[threading.Thread]()

    def start(self: threading.Thread) -> None:
        if sum(thread.is_alive() for thread in started) >= request.param:
            raise RuntimeError("can't start new thread")
        started.append(self)
        begin(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    return int(request.param)


def test_a_merge_with_few_threads(root: Path, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert few < 4
    assert main([*APPLY, "-o", "out", "--threads", "4", "--sha256"]) == 0
    seen: list[tuple[int, int]] = []
    assert ik.verify("out", threads=4, progress=lambda done, todo: seen.append((done, todo)))
    assert seen[-1][0] == seen[-1][1]
    loaded = ik.load("target", ("instruct", "base"), threads=4)
    assert len(loaded) == 7
    assert [thread for thread in threading.enumerate() if thread.name.startswith("ires-")] == []


def test_an_update_in_place_with_few_threads(
    root: Path, few: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs one for the journal: without it nothing is changed."""
    monkeypatch.chdir(root)
    ik.apply("target", ("instruct", "base"), out="wanted", sync=False)
    before = snapshot(root / "target")
    code = main([*APPLY, "--in-place", "--threads", "4"])
    if few:
        assert code == 0
        for path in Path("wanted").glob("*.safetensors"):
            assert Path("target", path.name).read_bytes() == path.read_bytes()
    else:
        assert code == 3
        assert "the system starts no more threads" in capsys.readouterr().err
        assert snapshot(root / "target") == before


def test_an_interrupt_of_the_calling_thread_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    read = sources.read_into

    def read_and_press(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        read(*arguments)

    monkeypatch.setattr(sources, "read_into", read_and_press)
    with pytest.raises(KeyboardInterrupt):
        ik.apply(root / "target", (root / "instruct", root / "base"), out=root / "out")
    assert not (root / "out.partial").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.root
@pytest.mark.parametrize("command", [(*APPLY, "-o", "out"), (*APPLY, "-o", "out", "--sha256"), (*APPLY, "--in-place")])
def test_the_limit_on_processes(warm: Warm, open_folder: Path, command: tuple[str, ...]) -> None:
    root = open_folder
    triple(root, shards=3)
    for path in (root, *root.rglob("*")):
        os.chown(path, 54321, 54321)
    done = warm.run(command, root, user=54321)
    if "--in-place" in command:
        assert done.code == 3
        assert "(`ulimit -u`)" in done.err
        assert sorted(path.name for path in (root / "target").glob(".*")) == []
    else:
        assert done.code == 0, done
        assert ik.verify(root / "out")


# What a run did.


def test_a_resumed_run_counts_its_own_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = (root / "instruct", root / "base")
    whole = ik.apply(root / "target", models, out=root / "whole", sync=False)
    assert isinstance(whole, Report)
    size = sum(path.stat().st_size for path in (root / "whole").glob("*.safetensors"))
    assert (whole.bytes_read, whole.bytes_written) == (3 * 4192, size)
    write = new_file.NewFile.write

    def failing(self: new_file.NewFile, *arguments: Any) -> None:
        if self.path.name.startswith("model-00003"):
            raise OSError(5, "Input/output error", f"{self.path}")
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(new_file.NewFile, "write", failing)
        with pytest.raises(OSError, match="Input/output error"):
            ik.apply(root / "target", models, out=root / "out", threads=1)
    resumed = ik.resume(root / "out")
    last = (root / "whole" / "model-00003-of-00003.safetensors").stat().st_size
    assert resumed.bytes_written == last
    assert 0 < resumed.bytes_read < whole.bytes_read / 2
