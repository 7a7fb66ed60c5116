"""Writing a merge to a new folder by tasks of Ray, one for each item of work; which of its machines does what Ray says.

    here       check → join the folder → give out the items, the largest first → wait → finish as the last worker does
    each task  read in the folder what is asked for → plan again, once a process → join → write its item

Nothing goes through Ray but where an item is and how it ended. Ray begins a task again whose machine has died, and it
may be at work still: as with workers (workers.py) that harms nothing. So a task of which nothing has been heard for a
while is given out once more, and the first to end counts.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files import interrupts, trust
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.shared import SharedFolder
from ires_kernels.files.unfinished import notes
from ires_kernels.new_folder.workers import Joined, finished, recorded_or_free, settled, write_items
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.planning.workers import Cluster, Item, items
from ires_kernels.records import state
from ires_kernels.records.operation import Operation
from ires_kernels.records.report import Report
from ires_kernels.records.workers import Noted
from ires_kernels.streaming.failures import ComputeError
from ires_kernels.streaming.options import Options
from ires_kernels.streaming.outcome import Outcome

_THREADS = 8
"""Of a task, as of a process alone; fewer where machines have fewer."""
_LEAST = 8
"""Workers to cut files for where the cluster has none yet, as one that grows when it is asked to."""
_RETRIES = 20
"""Times that a task is begun again as its machine has died, or was taken away."""
_SILENT = 120.0
"""Seconds without a sign of a task that has begun, after which it is given out once more."""
_COPIES = 3
_LOOK = 0.5
"""Seconds between two looks at how far all are."""
_LAST = 20.0
"""Seconds that tasks get to end in order when they are to."""


class Task(NamedTuple):
    """An item, and where and how to write it."""

    out: str
    id: str
    """Of the plan."""
    item: tuple[str, int, int]
    """File, and its first tensor and how many, by their order there; all of them: the whole file."""
    note: str
    device: str
    threads: int
    locked: bool
    key: str
    """Where the key is, if it was named."""


class Failure(NamedTuple):
    """How a task has ended that did not end well, in what any version of Python can unpickle."""

    kind: str
    lines: tuple[str, ...]
    number: int | None = None
    path: str | None = None


@interrupts.uninterrupted
def write_on_ray(
    plan: Plan,
    out: Path,
    options: Options,
    cluster: Cluster,
    carry_out: Callable[[Task], object],
    *,
    sha256: bool,
) -> Report:
    """Write the folder `out` by tasks of Ray.

    carry_out  the function `write_item` with its second argument, which Ray finds by its name
    """
    recorded = recorded_or_free(plan, out, options, sha256=sha256)
    if recorded is not None:
        return recorded
    started, outcome, ray = time.perf_counter(), Outcome(), _ray()
    joined = Joined.of(plan, out, options, sha256=sha256)
    with _connected(ray, cluster), joined.folder() as folder:
        if not joined.is_finished():
            threads, slots = _slots(ray, options.threads, cluster.device)
            tasks = _tasks(joined, folder, items(plan, slots), cluster.device, threads)
            _Run(ray, joined, folder, carry_out, tasks, threads, outcome).run()
        missing = [] if joined.is_finished() else settled(joined, folder)
    report = None if missing else finished(joined, outcome, started)
    if report is None:
        raise StoreError(
            f"{out}: was changed by another process at work there. Wait for it, then give the command again."
        )
    return report


def write_item(task: Task, planned_again: Callable[[Operation], Plan]) -> Failure | tuple[int, int]:
    """What a task does; returns bytes read and written. A process keeps the plan for the tasks that follow."""
    if task.key:
        os.environ[trust.VARIABLE] = task.key
    try:
        with interrupts.held():
            return _write_item(task, planned_again)
    except OSError as error:
        path = None if error.filename is None else os.fsdecode(error.filename)
        return Failure("OSError", (f"{error.strerror or error}",), error.errno, path)
    except ValueError as error:
        return Failure("ValueError", tuple(getattr(error, "lines", (f"{error}",))))
    except RuntimeError as error:
        return Failure("RuntimeError", (f"{error}",))


_joined: dict[tuple[str, str], Joined] = {}


def _write_item(task: Task, planned_again: Callable[[Operation], Plan]) -> tuple[int, int]:
    out, known = Path(task.out), (task.out, task.id)
    if known not in _joined:
        found = state.find(out)
        if found.what != "new folder":  # it is finished, or was taken back
            return 0, 0
        plan = planned_again(found.operation)
        options = Options.of(task.device, task.threads, None, task.locked, compare=found.operation.compare)
        _joined.clear()
        _joined[known] = Joined.of(plan, out, options, sha256=found.operation.sha256)
    joined = _joined[known]
    file, first, count = task.item
    names = list(dict.fromkeys(step.name for step in joined.plan.steps if step.file == file))
    item = Item(file, tuple(names[first : first + count]), count == len(names), 0)
    with joined.folder() as folder:
        outcome = write_items(joined, [item], folder, task.note)
    return outcome.bytes_read, outcome.bytes_written


def _ray() -> Any:
    """The library. Raises ArgumentError where it is not there."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ArgumentError("--engine ray needs Ray: pip install 'ires_kernels[ray]'.") from None
    return ray


@contextmanager
def _connected(ray: Any, cluster: Cluster) -> Iterator[None]:
    """To the cluster; where there is none, to processes of this machine that end with this one."""
    if ray.is_initialized():
        yield
        return
    _check_reachable(cluster.address or os.environ.get("RAY_ADDRESS") or "")
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = cluster.address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise OSError(None, f"Ray cannot be reached: {error}".rstrip("."), where) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray has one that ends the process at once
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ask whether anybody listens at an address: Ray would go on asking for minutes. Raises OSError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            text = f"no Ray cluster is reached there ({error.strerror or error}). `ray status` there says its address"
            raise OSError(error.errno, text, address) from None


def _slots(ray: Any, threads: int | None, device: str) -> tuple[int, int]:
    """How many threads a task has, and how many tasks the cluster carries out at a time."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if device != "cpu":
        gpus = [each for each in machines if each.get("GPU", 0) >= 1]
        if machines and not gpus:
            raise ArgumentError(f"--device {device}: the Ray cluster has no GPU. Leave it out to compute on its CPUs.")
        machines = gpus
    cpus = [int(each["CPU"]) for each in machines if each.get("CPU", 0) >= 1]
    threads = threads or min([_THREADS, *cpus])
    each = [max(1, count // threads) for count in cpus]
    if device != "cpu":
        each = [int(machine["GPU"]) for machine in machines]
    return threads, sum(each) or _LEAST


def _tasks(joined: Joined, folder: SharedFolder, every: list[Item], device: str, threads: int) -> dict[Task, int]:
    """What is to be done, the largest first, and how many bytes are read and written for it."""
    missing = set(joined.missing(folder))
    names: dict[str, list[str]] = {}
    for step in joined.plan.steps:
        each = names.setdefault(step.file, [])
        each += [] if each and each[-1] == step.name else [step.name]
    key = f"{trust.key_path()}" if trust.is_explicit() else ""
    tasks = {}
    for number, item in enumerate(sorted(every, key=lambda item: -item.weight)):
        if item.file in missing:
            first = names[item.file].index(item.tensors[0]) if item.tensors else 0
            place = item.file, first, len(item.tensors)
            out, locked = f"{joined.out.absolute()}", joined.options.locked
            task = Task(out, joined.plan.id, place, f"item-{number}", device, threads, locked, key)
            tasks[task] = item.weight
    return tasks


@dataclass
class _Run:
    """Tasks that are given out, until all have ended."""

    ray: Any
    joined: Joined
    folder: SharedFolder
    carry_out: Callable[[Task], object]
    weights: dict[Task, int]
    threads: int
    outcome: Outcome
    refs: dict[Any, Task] = field(default_factory=dict)
    """What Ray calls each task that has not ended, and each copy of it."""
    heard: dict[Task, tuple[float, float]] = field(default_factory=dict)
    """What was last noted by a task, and when that was seen."""
    copies: dict[Task, int] = field(default_factory=dict)
    before: dict[str, bytes] = field(default_factory=dict)
    """What was noted by tasks of another run."""

    def run(self) -> None:
        self.before = notes(self.folder.partial)
        device = next(iter(self.weights)).device if self.weights else "cpu"
        given = {"num_gpus": 1} if device != "cpu" else {}
        most = max((int(node["Resources"].get("CPU", 0)) for node in self.ray.nodes() if node["Alive"]), default=0)
        cpus = min(self.threads, most or self.threads)  # else nobody could take it
        remote = self.ray.remote(num_cpus=cpus, max_retries=_RETRIES, **given)(self.carry_out)
        try:
            for task in self.weights:
                self.refs[remote.remote(task)] = task
            while self.refs:
                ended, _ = self.ray.wait(list(self.refs), num_returns=len(self.refs), timeout=_LOOK)
                for ref in ended:
                    self._end(ref)
                interrupts.check()
                self._look()
                for task in self._silent():
                    self.refs[remote.remote(task)] = task
        except BaseException:
            self._cancel(list(self.refs))
            raise

    def _end(self, ref: Any) -> None:
        """Take what a task has returned; what is left of its copies is not waited for."""
        task = self.refs.pop(ref, None)
        if task is None:
            return
        try:
            found = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            text = f"{error}".strip().splitlines() or [type(error).__name__]
            raise ComputeError(f"Ray has given up {task.item[0]}: {text[-1]}") from error
        if isinstance(found, Failure):
            _raise(found)
        self.outcome.bytes_read += found[0]
        self.outcome.bytes_written += found[1]
        for other in [other for other, same in self.refs.items() if same == task]:
            del self.refs[other]
            with suppress(Exception):
                self.ray.cancel(other, force=True)

    def _look(self) -> None:
        """Show how far all of them are."""
        unfinished = set(self.refs.values())
        done, working = float(sum(self.weights[task] for task in self.weights if task not in unfinished)), 0
        noted = {name: raw for name, raw in notes(self.folder.partial).items() if raw != self.before.get(name)}
        for task in unfinished:
            note = Noted.of(noted.get(task.note, b""))
            if note:
                part = min(max(note.done / note.todo, 0.0), 1.0) if note.todo > 0 else 0.0
                done += part * self.weights[task]
                sign = note.at
                if self.heard.get(task, (None,))[0] != sign:
                    self.heard[task] = sign, time.monotonic()
                working += time.monotonic() - self.heard[task][1] < _SILENT
        progress = self.joined.options.progress
        if progress:
            tell = getattr(progress, "tell", None)
            if tell:  # a bar of ours, which has words as well
                tell(f"{self.joined.plan.operation}, {working} workers")
            progress(int(done), sum(self.weights.values()))

    def _silent(self) -> list[Task]:
        """Tasks that have begun, and of which nothing was heard for so long that they are given out once more."""
        found = []
        for task, (sign, seen) in list(self.heard.items()):
            copies = self.copies.get(task, 0)
            if task in self.refs.values() and time.monotonic() - seen > _SILENT and copies < _COPIES:
                self.heard[task] = sign, time.monotonic()
                self.copies[task] = copies + 1
                found.append(task)
        return found

    def _cancel(self, refs: list[Any]) -> None:
        """Have tasks end in order, and at last by force."""
        for force in (False, True):
            for ref in refs:
                with suppress(Exception):
                    self.ray.cancel(ref, force=force)
            with suppress(Exception):
                _, refs = self.ray.wait(refs, num_returns=len(refs), timeout=_LAST)
            if not refs:
                return


def _raise(failure: Failure) -> None:
    """The error of a task, here."""
    if failure.kind == "OSError":
        raise OSError(failure.number, failure.lines[0], failure.path)
    raise (CheckpointError if failure.kind == "ValueError" else ComputeError)(*failure.lines)
