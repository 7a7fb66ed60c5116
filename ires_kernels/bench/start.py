"""How soon a command is over that has little to do: seconds of whole processes, and the most memory they hold.

What computes nothing starts without torch. What computes imports it once, also with many threads; that import is what a
merge of tiny models takes, so it is measured beside.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ires_kernels as ik
from ires_kernels.bench.kernels import VerificationError
from ires_kernels.bench.measure import Quartiles, interleave
from ires_kernels.bench.result import Comparison, Result
from ires_kernels.bench.synthetic import Triple

TORCH, MERGE = "python -c 'import torch'", "a merge of tiny models"
SECONDS, MEGABYTES = 0.15, 40
"""What a command that computes nothing may take."""

# The peak of a process itself: what the system counts of a child includes the memory of the parent that started it.
_PEAK = """\
import atexit, sys
def tell():
    status = open("/proc/self/status").read().splitlines()
    print(next(line.split()[1] for line in status if line.startswith("VmHWM:")), file=sys.stderr)
atexit.register(tell)
"""


class Command(NamedTuple):
    """A command, and how it is to end."""

    arguments: tuple[str, ...]
    """Of `ires`; none for the import of torch alone."""
    code: int = 0

    def timed(self) -> list[str]:
        """The process as a user starts it."""
        if not self.arguments:
            return [sys.executable, "-c", "import torch"]
        return [sys.executable, "-m", "ires_kernels", *self.arguments]

    def weighed(self) -> list[str]:
        """The same, and the last line on stderr is the most memory that it held, in KiB."""
        body = "from ires_kernels.cli import main; sys.exit(main())" if self.arguments else "import torch"
        return [sys.executable, "-c", f"{_PEAK}{body}", *self.arguments]


def commands(triple: Triple, folder: Path) -> dict[str, Command]:
    """The commands by name; `folder` has a residual and no folder `out`."""
    target, base, instruct = f"{triple.target}", f"{triple.base}", f"{triple.instruct}"
    residual, out = f"{folder / 'residual'}", f"{folder / 'out'}"
    return {
        TORCH: Command(()),
        "ires --help": Command(("--help",)),
        "ires --version": Command(("--version",)),
        "ires apply, wrong usage": Command(("apply", target), 2),
        "ires inspect": Command(("inspect", target)),
        "ires status": Command(("status", target)),
        "ires extract --dry-run": Command(("extract", base, instruct, "-o", out, "--dry-run")),
        "ires apply --dry-run": Command(("apply", target, residual, "-o", out, "--dry-run")),
        "ires apply --in-place --dry-run": Command(("apply", target, residual, "--in-place", "--dry-run")),
        MERGE: Command(("apply", target, residual, "-o", out, "--no-sync")),
    }


def weigh(triple: Triple, folder: Path) -> dict[str, int]:
    """Run every command once; returns the most bytes that each held. Raises VerificationError for another exit code."""
    ik.extract(triple.base, triple.instruct, folder / "residual", sync=False)
    peaks = {}
    for name, command in commands(triple, folder).items():
        done = subprocess.run(command.weighed(), env=environment(), capture_output=True, text=True, check=False)
        *_, last = done.stderr.splitlines() or [""]
        if done.returncode != command.code or not last.isdigit():
            raise VerificationError(f"{name} ended with {done.returncode}, wanted {command.code}: {done.stderr}")
        peaks[name] = int(last) * 1024
    shutil.rmtree(folder / "out", ignore_errors=True)
    return peaks


def measure(triple: Triple, folder: Path, rounds: int, peaks: Mapping[str, int]) -> Result:
    """Time the commands in turns, after `weigh` has read all that they read and compiled all that they import."""

    def run(command: Command) -> None:
        subprocess.run(command.timed(), env=environment(), capture_output=True, check=False)

    ways = {name: partial(run, command) for name, command in commands(triple, folder).items()}
    times = interleave(ways, rounds, after=lambda _: shutil.rmtree(folder / "out", ignore_errors=True))
    numbers = []
    for name in (name for name in times if name not in (TORCH, MERGE)):
        numbers.append(Comparison(f"{name}: seconds", Quartiles.of(times[name]), SECONDS))
        numbers.append(Comparison(f"{name}: peak MB", Quartiles.of([peaks[name] / 1e6]), MEGABYTES))
    return Result(
        "start",
        triple.facts(),
        times,
        {},
        by="time",
        yardsticks=(TORCH,),
        numbers=numbers,
        notes={name: {"peak_memory_bytes": peak} for name, peak in peaks.items()},
    )


def environment() -> dict[str, str]:
    """Ours, but that what is imported is compiled once, as for a user."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
