"""faults.c for Python: builds the library, and runs commands under it in children of one warm process.

To import torch takes seconds and an injection needs a process of its own; so one process imports everything under
LD_PRELOAD and forks for every command.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import pkgutil
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("faults.c")
KINDS = (
    "any", "read", "pwrite", "write", "fsync", "fdatasync", "rename", "unlink", "link", "fallocate", "ftruncate",
    "open", "mkdir", "chmod", "mmap", "msync", "close",
)  # fmt: skip
"""Kinds of calls, in the order of faults.c."""
HUNG = 60  # seconds after which a command is ended


class Fault(NamedTuple):
    """What happens to the n-th call of a kind, counted from 1; and so many calls after it the process is killed."""

    kind: str
    n: int
    action: str
    later: int = 0


class Done(NamedTuple):
    """How a command ended: exit code, or -9 and the like for a signal; what it printed; its calls, by kind; seconds."""

    code: int
    out: str
    err: str
    calls: dict[str, int]
    seconds: float


def compiler() -> str | None:
    """A C compiler, or None."""
    return shutil.which(os.environ.get("CC", "gcc"))


@functools.cache
def library() -> Path:
    """faults.c, compiled once for this process."""
    folder = tempfile.mkdtemp(prefix="faults-")
    built = Path(folder) / "faults.so"
    command = [f"{compiler()}", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"{SOURCE}", "-o", f"{built}"]
    subprocess.run([*command, "-ldl"], check=True)
    return built


class Run(NamedTuple):
    """A command to run."""

    argv: Sequence[str]
    fault: Fault | None = None
    signals: Sequence[tuple[float, int]] = ()
    """What it gets, with the seconds after its start; those that come too late are nothing."""
    ignored: Sequence[int] = ()
    """Signals that it is started to ignore."""
    file_size: int | None = None
    """RLIMIT_FSIZE, in bytes."""
    small: bool = False
    """Whether tensors are cut into hundreds of windows, so that a tiny model takes as many as a large one."""
    parts: bool = False
    """Whether matrices are made of parts, as in made_of_parts.py, and cut into dozens of windows."""
    coded: bool = False
    """Whether the target is quantized, and cut into dozens of windows."""
    user: int | None = None
    """Whose process it is, with this one as the only process or thread that the user may have."""
    out: str | None = None
    err: str | None = None
    """Where it prints to, if not to what is read back."""


class Warm:
    """A process that has imported the command line, and forks for every command."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="warm-"))
        self._process = subprocess.Popen(
            [sys.executable, __file__, f"{self._folder}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LD_PRELOAD": f"{library()}"},
        )

    def run(
        self,
        argv: Sequence[str],
        cwd: Path,
        fault: Fault | None = None,
        *,
        held: Callable[[], None] | None = None,
        **options: Any,
    ) -> Done:
        """Run ``ires ARGV`` in `cwd`; only what it does below `cwd` is counted and can fail.

        held     called when the fault "hold" has stopped the command, which is killed after that
        options  as of Run
        """
        (done,) = self.together([Run(argv, fault, **options)], cwd, held=held)
        return done

    def together(self, runs: Sequence[Run], cwd: Path, *, held: Callable[[], None] | None = None) -> list[Done]:
        """`run` several commands at once."""
        self._ask(commands=[run._asdict() for run in runs], cwd=os.path.realpath(cwd))
        answer = self._answer()
        if "held" in answer:
            try:
                assert held is not None, "nobody waits for a process that is held"
                held()
            finally:
                self._ask()
                answer = self._answer()
        return [
            self._done(number, run, code, seconds)
            for number, (run, (code, seconds)) in enumerate(zip(runs, answer["ends"], strict=True))
        ]

    def _done(self, number: int, run: Run, code: int, seconds: float) -> Done:
        folder = self._folder / f"{number}"
        out, err = ((folder / name).read_text() for name in ("out", "err"))
        counts = struct.unpack(f"{len(KINDS)}Q", (folder / "counts").read_bytes())
        assert code != -signal.SIGALRM, f"ires {' '.join(run.argv)} hung for {HUNG} seconds: {run}: {out}{err}"
        return Done(code, out, err, dict(zip(KINDS, counts, strict=True)), seconds)

    def _ask(self, **question: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        shutil.rmtree(self._folder)


def serve(folder: str) -> None:
    """What the warm process does: a question a line on stdin, an answer a line on stdout."""
    import torch

    import ires_kernels

    # What a command would load when it needs it: forks have it already, and another user may not reach it.
    for module in pkgutil.walk_packages(ires_kernels.__path__, "ires_kernels."):
        if not module.name.startswith(("ires_kernels.__main__", "ires_kernels.bench", "ires_kernels.backends.triton")):
            importlib.import_module(module.name)
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the command line handles it, nobody does
    for line in sys.stdin:
        question = json.loads(line)
        runs = [Run(**command) for command in question["commands"]]
        started = time.monotonic()
        pids = [start(Path(folder, f"{number}"), question["cwd"], run) for number, run in enumerate(runs)]
        due = sorted((at, pid, what) for pid, run in zip(pids, runs, strict=True) for at, what in run.signals)
        for at, pid, what in due:
            time.sleep(max(0.0, started + at - time.monotonic()))
            os.kill(pid, what)
        ends = []
        for pid in pids:
            _, status = os.waitpid(pid, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                print(json.dumps({"held": pid}), flush=True)
                sys.stdin.readline()
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            ends.append([os.waitstatus_to_exitcode(status), time.monotonic() - started])
        print(json.dumps({"ends": ends}), flush=True)


def start(folder: Path, cwd: str, run: Run) -> int:
    """Fork for a command; returns the process."""
    import made_of_parts

    from ires_kernels import cli
    from ires_kernels.in_place import cuts
    from ires_kernels.planning import deeds
    from ires_kernels.streaming import tiles

    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = 4
    try:
        if run.small:
            tiles.tiles.set(tiles.Tiles(elements=32))
            cuts.SIZES = cuts.Sizes(window=1024, unit=64, gap=16)
        if run.parts or run.coded:
            tiles.tiles.set(tiles.Tiles(elements=512, copied=512))
            cuts.SIZES = cuts.Sizes(window=2048, unit=512, gap=16)
        if run.parts:
            deeds.apply_steps = made_of_parts.steps_of_parts
        prepare(f"{folder}", cwd, run)
        sys.argv = ["ires", *run.argv]
        code = cli.main()
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            code = 120  # as of Python
        os._exit(code)


def prepare(folder: str, cwd: str, run: Run) -> None:
    """In the child: its files, its folder, its limits, and its fault."""
    for path in (f"{folder}/out", f"{folder}/err"):
        Path(path).write_text("")
    for path, fd in ((run.out or f"{folder}/out", 1), (run.err or f"{folder}/err", 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_NOCTTY), fd)
    signal.alarm(HUNG)
    for number in run.ignored:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(cwd)
    if run.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.file_size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    kind, n, action, later = run.fault or Fault("any", 0, "count")
    arm = ctypes.CDLL(None).faults_arm
    text, number64 = ctypes.c_char_p, ctypes.c_uint64
    arm.argtypes = [text, text, number64, text, number64, text]
    assert arm(cwd.encode(), kind.encode(), n, action.encode(), later, f"{folder}/counts".encode()) == 0, run
    if run.user is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        os.environ["IRES_KEY"] = f"{cwd}/key"
        os.setgroups([])
        os.setgid(run.user)
        os.setuid(run.user)


if __name__ == "__main__":
    serve(sys.argv[1])
