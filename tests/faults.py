"""faults.c for Python: builds the library, and runs commands under it in children of one warm process.

To import torch takes seconds and an injection needs a process of its own; so one process imports everything under
LD_PRELOAD and forks for every command.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
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
        kill_after: float | None = None,
        held: Callable[[], None] | None = None,
        file_size: int | None = None,
    ) -> Done:
        """Run ``ires ARGV`` in `cwd`; only what it does below `cwd` is counted and can fail.

        kill_after  seconds after which the command is killed, if it still runs
        held        called when the fault "hold" has stopped the command, which is killed after that
        file_size   RLIMIT_FSIZE of the command, in bytes
        """
        child = {"cwd": os.path.realpath(cwd), "fault": fault or Fault("any", 0, "count"), "file_size": file_size}
        self._ask(argv=list(argv), kill_after=kill_after, child=child)
        answer = self._answer()
        if "held" in answer:
            try:
                assert held is not None, "nobody waits for a process that is held"
                held()
            finally:
                self._ask()
                answer = self._answer()
        out, err = ((self._folder / name).read_text() for name in ("out", "err"))
        counts = struct.unpack(f"{len(KINDS)}Q", (self._folder / "counts").read_bytes())
        calls = dict(zip(KINDS, counts, strict=True))
        assert answer["code"] != -signal.SIGALRM, f"ires {' '.join(argv)} hung for {HUNG} seconds under {fault}"
        return Done(answer["code"], out, err, calls, answer["seconds"])

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

    from ires_kernels import cli

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for line in sys.stdin:
        question = json.loads(line)
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            code = 4
            try:
                prepare(folder, **question["child"])
                code = cli.main(question["argv"])
            except SystemExit as stop:  # argparse
                code = int(stop.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        if question["kill_after"] is not None:
            time.sleep(question["kill_after"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            print(json.dumps({"held": pid}), flush=True)
            sys.stdin.readline()
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        seconds = time.monotonic() - started
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": seconds}), flush=True)


def prepare(folder: str, cwd: str, fault: list[Any], file_size: int | None) -> None:
    """In the child: its files, its folder, and its fault."""
    for name, fd in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), fd)
    signal.alarm(HUNG)
    os.chdir(cwd)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    kind, n, action, later = fault
    arm = ctypes.CDLL(None).faults_arm
    text, number = ctypes.c_char_p, ctypes.c_uint64
    arm.argtypes = [text, text, number, text, number, text]
    assert arm(cwd.encode(), kind.encode(), n, action.encode(), later, f"{folder}/counts".encode()) == 0, fault


if __name__ == "__main__":
    serve(sys.argv[1])
