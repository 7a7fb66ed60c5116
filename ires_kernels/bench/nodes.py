"""Workers on many machines, played by processes of this one: what they take beside what `scale` predicts of them.

Each process has a link of its own to the models (`links`), slow enough that two cores are no limit for sixteen of them.
What a start costs here says nothing of machines that start side by side, so the clock of a run begins when all have
planned and asked for weights, and ends when the output has its name; what it takes to start, to plan and to finish is
measured by itself.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

import ires_kernels as ik
from ires_kernels.bench import links, scale
from ires_kernels.bench.kernels import VerificationError
from ires_kernels.bench.measure import interleave
from ires_kernels.bench.result import Result
from ires_kernels.bench.scale import Cluster, Costs, Work
from ires_kernels.bench.start import environment
from ires_kernels.bench.synthetic import SHAPES, Shape, Triple, write_triple
from ires_kernels.planning.plan import Plan
from ires_kernels.records.report import Report
from ires_kernels.records.workers import WorkerReport

LINK = 1.2e6
LAYERS = 3
"""Of a model behind links for each node: 24 MB, of which three are read, so a minute of a link."""
SHORT = 4, 3
"""Processes of one more run, and how many of their links the source behind them is as wide as."""
ONE, ALONE, TWO = "one process, 2 threads", "one worker, 1 thread", "two workers, 1 thread each"
_MANY = replace(SHAPES["tiny"], layers=300)
"""Tensors enough to see what each of them costs."""


class Run(NamedTuple):
    """Processes behind links, and what was predicted of them."""

    nodes: int
    weights: int
    """Bytes of them that were to be read, all together."""
    link: float
    """Bytes a second of each link."""
    source: float
    """Of the source behind them."""
    started: float
    """Seconds until all had planned and asked for weights: of so many processes on the cores that are here."""
    seconds: float
    """From then on until the output had its name."""
    predicted: float
    limit: str
    read: tuple[int, ...]
    """Bytes that came through each link."""
    planning: tuple[int, ...]
    """Of these before any weights."""
    load: float
    """Of the machine at the end."""

    @property
    def off(self) -> float:
        """By how much of what is predicted it took longer."""
        return self.seconds / self.predicted - 1

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON types."""
        source = None if math.isinf(self.source) else self.source
        return {**self._asdict(), "source": source, "read": list(self.read), "planning": list(self.planning)}


def costs(folder: Path, rounds: int, local: Result) -> Costs:
    """What merges cost beside the bytes, here. `local`: what `locally` gave."""
    few, many = (write_triple(folder / name, shape) for name, shape in (("few", SHAPES["tiny"]), ("many", _MANY)))
    tensors = [len(_plan(triple).steps) for triple in (few, many)]
    planning, finishing, start = [], [], []
    for turn in range(rounds):
        plans = [_timed(partial(_plan, triple)) for triple in (few, many)]
        planning.append((plans[1] - plans[0]) / (tensors[1] - tensors[0]))
        halves = []
        for rank in range(2):
            found = _merge(many, folder / f"many-{turn}", (rank, 2))
            assert isinstance(found, (Report, WorkerReport))
            halves.append(found.seconds)
        finishing.append(max(0.0, halves[1] - halves[0]) / tensors[1])
        start.append(_timed(partial(_run, [_command(few, folder / f"few-{turn}", "--threads", "1")])))
    return Costs(
        start=statistics.median(start),
        planning=statistics.median(planning),
        finishing=statistics.median(finishing),
        node=local.traffic[ONE] / max(1e-3, local.median(ONE) - statistics.median(start)),
    )


def locally(triple: Triple, folder: Path, rounds: int) -> Result:
    """One process and two workers at the same work, into a folder that both see."""
    out = folder / "out"

    def workers(count: int) -> None:
        each = [("--threads", "1", "--rank", f"{rank}", "--world", f"{count}") for rank in range(count)]
        _run([_command(triple, out, *words) for words in each])

    ways: dict[str, Callable[[], object]] = {
        ONE: lambda: _run([_command(triple, out, "--threads", "2")]),
        ALONE: partial(workers, 1),
        TWO: partial(workers, 2),
    }
    ways[TWO]()
    sums = _sums(out)
    shutil.rmtree(out)
    ways[ONE]()
    if sums != _sums(out):
        raise VerificationError("two workers: other bytes than one process. Nothing was timed.")
    shutil.rmtree(out)
    times = interleave(ways, rounds, after=lambda _: shutil.rmtree(out))
    traffic = dict.fromkeys(times, 4 * triple.nbytes)
    return Result(f"merges of {triple.models}", triple.facts(), times, traffic, by="time", yardsticks=(ONE, ALONE))


def simulate(folder: Path, nodes: int, layers: int, known: Costs, *, link: float, source: float = math.inf) -> Run:
    """A run of so many processes, each behind a link of `link` bytes a second, all of them behind one of `source`.

    layers  of the models. Raises VerificationError where the output is not that of one process without links
    """
    shape = Shape(512, 2048, layers, 8, 4, 64, 3072, shards=4)
    triple = write_triple(folder / "models", shape)
    work = of_plan(_plan(triple))
    ik.apply(triple.target, (triple.instruct, triple.base), out=folder / "alone", sync=False)
    out = folder / "out"
    far = Triple(Path("base"), Path("instruct"), Path("target"), triple.parameters, triple.nbytes)
    with links.serving(folder / "models", nodes, link=link, source=source) as served:
        ranks = [("--threads", "2", "--rank", f"{rank}", "--world", f"{nodes}") for rank in range(nodes)]
        commands = [_command(far, out, *words, at=f"{links.HOST}/") for words in ranks]
        began = time.monotonic()
        ended = _run(commands, [served.environment(rank) for rank in range(nodes)], out)
        released = served.released.value
        read, planning = tuple(served.read), tuple(served.planning)
    if _sums(out) != _sums(folder / "alone"):
        raise VerificationError(f"{nodes} workers behind links: other bytes than one process")
    for name in ("models", "alone", "out"):
        shutil.rmtree(folder / name)
    only_bytes = replace(known, start=0.0, planning=0.0)
    found = scale.predicted(work, nodes, Cluster(source, link, math.inf, math.inf, only_bytes))
    return Run(
        nodes, work.read, link, source, released - began, ended - released, found.seconds, found.limit, read, planning,
        os.getloadavg()[0],
    )  # fmt: skip


def efficiency(one: Run, run: Run) -> float:
    """Of the nodes of a run: 1 where each gets through as much as the node of a run of one."""
    return run.weights / run.seconds / run.nodes / (one.weights / one.seconds)


def table(runs: Sequence[Run]) -> str:
    """The runs in Markdown, the first of them one of one node."""
    lines = ["| nodes | read | predicted | simulated | off by | efficiency | limit |", "|---" * 7 + "|"]
    for run in runs:
        cells = (
            f"{run.nodes}", f"{run.weights / 1e6:.0f} MB", f"{run.predicted:.1f} s", f"{run.seconds:.1f} s",
            f"{100 * run.off:+.0f} %", f"{efficiency(runs[0], run):.2f}", run.limit,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def costs_line(known: Costs) -> str:
    """What was measured beside the bytes, in words."""
    return (
        f"start {known.start:.2f} s; for 1000 tensors planning {1000 * known.planning:.2f} s, finishing "
        f"{1000 * known.finishing:.2f} s; a process gets through {known.node / 1e9:.2f} GB/s"
    )


def record(known: Costs, runs: Sequence[Run]) -> dict[str, Any]:
    """What was measured and simulated, in JSON types."""
    each = [{**run.to_dict(), "off": run.off, "efficiency": efficiency(runs[0], run)} for run in runs]
    return {"costs": asdict(known), "simulated": each}


def of_plan(plan: Plan) -> Work:
    """The work of a plan, whose inputs are all of the same size."""
    files: dict[str, dict[str, int]] = {}
    for step in plan.steps:
        tensors = files.setdefault(step.file, {})
        tensors[step.name] = tensors.get(step.name, 0) + step.nbytes
    return Work(plan.operation, files)


def _plan(triple: Triple) -> Plan:
    with tempfile.TemporaryDirectory() as name:
        found = ik.apply(triple.target, (triple.instruct, triple.base), out=Path(name, "out"), dry_run=True)
    assert isinstance(found, Plan)
    return found


def _merge(triple: Triple, out: Path, workers: tuple[int, int]) -> object:
    return ik.apply(triple.target, (triple.instruct, triple.base), out=out, workers=workers, threads=1)


def _command(triple: Triple, out: Path, *more: str, at: str = "") -> list[str]:
    target, instruct, base = (f"{at}{path}" for path in (triple.target, triple.instruct, triple.base))
    words = ["apply", target, "--instruct", instruct, "--base", base, "-o", f"{out}", "--quiet", *more]
    return [sys.executable, "-m", "ires_kernels", *words]


def _run(
    commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]] = (), out: Path | None = None
) -> float:
    """Processes side by side; returns when `out` was there, or else all had ended.

    Raises VerificationError where one of them fails.
    """
    each = environments or [{}] * len(commands)
    processes = [
        subprocess.Popen(
            command, env={**environment(), **more}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for command, more in zip(commands, each, strict=True)
    ]
    while out and not out.exists() and any(process.poll() is None for process in processes):
        time.sleep(0.01)
    ended = time.monotonic()
    said = [process.communicate()[1] for process in processes]
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            raise VerificationError(f"a worker ended with {process.returncode}: {text}")
    return ended if out else time.monotonic()


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _sums(folder: Path) -> dict[str, str]:
    """Of the weights of a folder."""
    return {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in folder.glob("*.safetensors")}
