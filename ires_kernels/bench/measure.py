"""Measuring: contenders interleaved in one run, quartiles of ratios, private memory, and what the machine is.

Absolute times of a shared machine mean little. So contenders take turns in rounds, a ratio is taken within a round, and
the median and quartiles of the rounds' ratios are the result.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from ires_kernels.version import VERSION

Ways = dict[str, Callable[[], object]]
"""Contender → what it does in a round."""

Times = dict[str, list[float]]
"""Contender → seconds by round. Slow contenders sit out the later rounds."""

SLOW = 8.0
"""Contenders so many times slower than the fastest take part in the first three rounds only."""


class Quartiles(NamedTuple):
    """Of a sample: half of it lies between `low` and `high`."""

    low: float
    median: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Raises statistics.StatisticsError for no values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high, len(values))

    def scaled(self, factor: float) -> Quartiles:
        """The same sample in other units."""
        return self._replace(low=self.low * factor, median=self.median * factor, high=self.high * factor)

    def to_dict(self) -> dict[str, float]:
        """The quartiles in JSON types."""
        return self._asdict()


def wall_clock(run: Callable[[], object]) -> float:
    """Seconds from the call of `run` to its return."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    before: Callable[[str], object] | None = None,
    after: Callable[[str], object] | None = None,
    timer: Callable[[Callable[[], object]], float] = wall_clock,
) -> Times:
    """Let every contender run once a round and time it; each round starts with another one.

    `before` and `after` get the name of the contender and are not timed. `timer` runs what it gets and returns seconds.
    """
    times: Times = {name: [] for name in contenders}
    names, out = list(contenders), set()
    for turn in range(rounds):
        fastest = min((statistics.median(seconds) for seconds in times.values() if seconds), default=0.0)
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            if turn >= 3 and statistics.median(times[name]) > SLOW * fastest:
                out.add(name)  # for good: `ratio` pairs seconds by their rounds
            if name in out:
                continue
            if before:
                before(name)
            times[name].append(timer(contenders[name]))
            if after:
                after(name)
    return times


def ratio(times: Times, numerator: str, denominator: str) -> Quartiles | None:
    """Of seconds within the same round; None where one of the two did not take part."""
    # A contender takes part in the first rounds or in all, so equal positions are the same round.
    pairs = zip(times.get(numerator, ()), times.get(denominator, ()), strict=False)
    ratios = [above / below for above, below in pairs]
    return Quartiles.of(ratios) if ratios else None


def reason(error: Exception) -> str:
    """Why a contender could not run, in a line of the report."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


class Watched(NamedTuple):
    """A finished process."""

    seconds: float
    peak: int
    """Most private memory (RssAnon) it was seen with, in bytes."""
    code: int
    output: str


def watch(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Watched:
    """Run `command` and look at its private memory every few milliseconds; pages of files do not count."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, private_memory(process.pid))
                time.sleep(0.002)
            seconds = time.perf_counter() - started
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        return Watched(seconds, peak, process.returncode, output.read().decode(errors="replace"))


def private_memory(pid: int | str = "self") -> int:
    """RssAnon of a process in bytes; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0][1]) * 1024 if lines else 0


def machine() -> dict[str, Any]:
    """CPU, memory, kernel, versions and commit, in JSON types."""
    facts = _facts("/proc/cpuinfo")
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    memory = _facts("/proc/meminfo")
    return {
        "cpu": facts.get("model name", platform.machine()),
        "flags": sorted(flag for flag in flags if flag.startswith(_FLAGS)),
        "cores": len(os.sched_getaffinity(0)),
        "l3": _text("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "memory_bytes": int(memory["MemTotal"].split()[0]) * 1024 if "MemTotal" in memory else None,
        "load": list(os.getloadavg()),
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "versions": {"ires_kernels": VERSION, **{name: _version(name) for name in ("torch", "numpy")}},
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


_FLAGS = ("sse4", "ssse3", "avx", "f16c", "fma", "popcnt", "bmi", "amx", "asimd", "sve", "bf16", "fphp")


def _facts(path: str) -> dict[str, str]:
    """`key : value` lines; of a key that comes again, the first."""
    facts: dict[str, str] = {}
    for line in (_text(path) or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts.setdefault(key.strip(), value.strip())
    return facts


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this file is in, with a + where files differ from it; elsewhere what IRES_COMMIT says."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("IRES_COMMIT")
    return head + ("+" if status.stdout else "")
