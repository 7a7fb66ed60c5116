"""Writing a merge to a new folder in several processes, each of which does its share of one plan and ends.

    every worker     check → join the folder → write its files, and its ranges of files that are shared
    the last of them look that all is recorded → remove what nobody needs → finish as one process does

A worker waits for no other one. So whoever finds that all is complete finishes: the last worker to end, or
`finish_folder`, where that one has died.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ires_kernels.checking import guards
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files import interrupts
from ires_kernels.files.destination import check_destination
from ires_kernels.files.finished import FinishedFolder
from ires_kernels.files.locks import InUse
from ires_kernels.files.new_file import NewFile
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.shared import SharedFolder
from ires_kernels.files.unfinished import partial_path
from ires_kernels.new_folder import before
from ires_kernels.new_folder.run import Begun, finish, identity, learnt, prepared, record, write_parts
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Step
from ires_kernels.planning.workers import Item, Worker, share
from ires_kernels.records import sides
from ires_kernels.records.operation import Operation
from ires_kernels.records.report import Report
from ires_kernels.records.workers import WorkerReport, note
from ires_kernels.streaming.options import Options
from ires_kernels.streaming.outcome import Outcome

_SECONDS = 2.0
"""Between two notes of how far a process is."""


@dataclass(frozen=True)
class Joined:
    """What a process has to work with, or to finish."""

    plan: Plan
    out: Path
    options: Options
    operation: Operation
    compared: dict[str, dict[str, str]]

    @classmethod
    def of(cls, plan: Plan, out: Path, options: Options, *, sha256: bool) -> Joined:
        """Raises CheckpointError for inputs that cannot be used."""
        compared, operation = prepared(plan, sync=True, sha256=sha256, compare=options.compare)
        return cls(plan, out, options, operation, compared)

    def folder(self) -> SharedFolder:
        """The folder, as a context in which this process works there."""
        return SharedFolder(
            self.out, identity(self.operation), self.operation.to_bytes(), accept=partial(_check_same, self),
            locked=self.options.locked, access=sides.access_of(self.plan),
        )  # fmt: skip

    def is_finished(self) -> bool:
        """Whether another process has given the folder its name."""
        return os.path.lexists(self.out) and bool(os.listdir(self.out))

    def missing(self, folder: SharedFolder) -> list[str]:
        """The files that are not complete."""
        complete = folder.complete()
        return [file.name for file in self.plan.files if file.name not in complete]


@interrupts.uninterrupted
def write_share(plan: Plan, out: Path, options: Options, worker: Worker, *, sha256: bool) -> Report | WorkerReport:
    """Write the share of a worker, and finish the folder where all is complete then."""
    recorded = recorded_or_free(plan, out, options, sha256=sha256)
    if recorded is not None:
        return recorded
    started = time.perf_counter()
    joined = Joined.of(plan, out, options, sha256=sha256)
    with joined.folder() as folder:
        outcome = write_items(joined, share(plan, worker), folder, f"rank-{worker.rank}-of-{worker.world}")
        missing = [] if joined.is_finished() else settled(joined, folder)
    report = None if missing else finished(joined, outcome, started)
    seconds = time.perf_counter() - started
    return report or WorkerReport(
        plan.operation, plan.id, out, *worker, seconds, outcome.bytes_read, outcome.bytes_written,
        len(plan.files) - len(missing), tuple(missing),
    )  # fmt: skip


def recorded_or_free(plan: Plan, out: Path, options: Options, *, sha256: bool) -> Report | None:
    """The report of this very plan, if it was carried out. Refuses with StoreError a place that is not free."""
    recorded = before.recorded(plan, out, options.threads, sync=True, sha256=sha256)
    if recorded is None:
        try:
            check_destination(out, [checkpoint.path for checkpoint in plan.inputs.values()])
        except StoreError:  # or another worker has finished it between the two looks
            recorded = before.recorded(plan, out, options.threads, sync=True, sha256=sha256)
            if recorded is None:
                raise
    return recorded


@interrupts.uninterrupted
def finish_folder(plan: Plan, out: Path, options: Options, *, sha256: bool) -> Report:
    """Finish a folder whose workers have ended. Raises StoreError where something is missing, or is being written."""
    started = time.perf_counter()
    joined = Joined.of(plan, out, options, sha256=sha256)
    with joined.folder() as folder:
        missing = settled(joined, folder)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise StoreError(
            f"{out}: cannot be finished: {len(missing)} of {len(plan.files)} files are not complete: "
            f"{', '.join(missing[:3])}{more}. Start the workers again that have not ended well: each goes on where it "
            f"was. Or `ires resume {out}` writes the rest in one process."
        )
    report = finished(joined, Outcome(), started)
    if report is None:
        raise InUse(f"{partial_path(out)}: another process is finishing it. Wait for it to end.")
    return report


def write_items(joined: Joined, items: Collection[Item], folder: SharedFolder, note: str) -> Outcome:
    """Write those of the items that are not complete; returns what was learnt.

    note  under which name it is noted how far this is
    """
    outcome = Outcome()
    while not joined.is_finished():
        complete = set(folder.complete())
        try:
            parts = list(_reserved(joined, items, folder, outcome))
            with _noted(joined.options, folder, note) as options:
                write_parts(joined.plan, parts, folder, options, outcome)
            break
        except OSError:
            # Others may have completed a file meanwhile, and removed what was not needed any more.
            if not joined.is_finished() and joined.missing(folder) and folder.complete().keys() <= complete:
                raise
            folder.give_up()
    return outcome


def _reserved(
    joined: Joined, items: Iterable[Item], folder: SharedFolder, outcome: Outcome
) -> Iterator[tuple[list[Step], NewFile]]:
    """Steps that are to be carried out, and the file, or the range of one, that they make."""
    plan = joined.plan
    files = {file.name: file for file in plan.files}
    steps: dict[str, list[Step]] = {}
    for step in plan.steps:
        steps.setdefault(step.name, []).append(step)
    complete = folder.complete()
    for item in items:
        file = files[item.file]
        if file.name in complete:
            continue
        if item.is_whole:
            folder.reserve(*file)
            each = [step for name in item.tensors for step in steps[name]]
            yield each, folder.file(file.name, partial(_checked, plan, outcome, each))
            outcome.bytes_written += len(file.header)
            continue
        folder.share(*file)
        known = learnt(folder.parts(file.name)).outputs
        for run in _runs(steps[name] for name in item.tensors if name not in known):
            start, stop = run[0].offset, run[-1].offset + run[-1].start + run[-1].nbytes
            yield run, folder.range_of(file.name, start, stop, partial(_checked, plan, outcome, run))


def _runs(tensors: Iterable[list[Step]]) -> list[list[Step]]:
    """The steps of tensors, together as long as one lies behind the other."""
    runs: list[list[Step]] = []
    end = -1
    for steps in tensors:
        if steps[0].offset != end:
            runs.append([])
        runs[-1] += steps
        end = steps[-1].offset + steps[-1].start + steps[-1].nbytes
    return runs


def _checked(plan: Plan, outcome: Outcome, steps: Collection[Step]) -> bytes:
    """The record of what is written, if that was made of what the plan is of: whoever finishes cannot tell."""
    files = {path for step in steps for operand in step.operands for path in operand.paths}
    guards.check_unchanged(plan, outcome.of(steps).inputs, only=files, threads=1)
    return record(outcome, steps)


@contextmanager
def _noted(options: Options, folder: SharedFolder, name: str) -> Iterator[Options]:
    """Options whose progress is noted in the folder as well."""
    done, todo, last = 0, 0, 0.0

    def progress(*numbers: int) -> None:
        nonlocal done, todo, last
        done, todo = numbers
        if time.monotonic() - last > _SECONDS:
            last = time.monotonic()
            folder.note(name, note(done, todo))
        if options.progress:
            options.progress(done, todo)

    yield replace(options, progress=progress)
    folder.note(name, note(done, todo))


def _check_same(joined: Joined, kept: bytes, _: object) -> None:
    """Refuse to work with others whose inputs are not the same, by samples of their bytes, or who do something else."""
    mine, partial_folder = joined.operation, partial_path(joined.out)
    try:
        theirs = Operation.from_bytes(kept, partial_folder)
    except CheckpointError as error:
        raise StoreError(*error.lines) from error
    for option, there, here in (("sha256", theirs.sha256, mine.sha256), ("compare", theirs.compare, mine.compare)):
        if there != here:
            raise StoreError(f"{partial_folder}: was begun {'with' if there else 'without'} --{option}. Do the same.")
    for role, checkpoint in joined.plan.inputs.items():
        for shard in checkpoint.shards:
            name = shard.path.name
            if theirs.samples.get(role, {}).get(name) != mine.samples[role][name]:
                raise StoreError(
                    f"{shard.path}: is not the file of the {role} that other workers have: it has other bytes. Give "
                    f"all of them the same models; or `ires rollback {joined.out}`, then start all of them again."
                )


def settled(joined: Joined, folder: SharedFolder) -> list[str]:
    """Give their names to shared files whose ranges are all there; returns which files are not complete."""
    plan, missing = joined.plan, joined.missing(folder)
    tensors: dict[str, dict[str, list[Step]]] = {name: {} for name in missing}
    for step in plan.steps:
        if step.file in tensors:
            tensors[step.file].setdefault(step.name, []).append(step)
    found = False
    for name, steps in tensors.items():
        known = learnt(folder.parts(name))
        if known.outputs.keys() >= steps.keys():
            each = [step for parts in steps.values() for step in parts]
            found = True
            folder.conclude(name, record(known, each))
    return joined.missing(folder) if found else missing


def finished(joined: Joined, outcome: Outcome, started: float) -> Report | None:
    """Finish the folder, or look at what another process has finished; None where one is just doing so."""
    plan, out, options, operation = joined.plan, joined.out, joined.options, joined.operation
    place = FinishedFolder(
        out, identity(operation), operation.to_bytes(), locked=options.locked, access=sides.access_of(plan)
    )
    try:
        with place as folder:
            known = learnt(folder.finished.values())
            known.bytes_read, known.bytes_written = outcome.bytes_read, outcome.bytes_written
            begun = Begun(plan, operation, folder, known, joined.compared)
            if begun.missing:
                raise StoreError(
                    f"{folder.partial}: {begun.missing[0]} was changed or removed. Start its worker again."
                )
            finish(begun, known, options)
    except (InUse, FileNotFoundError):
        return before.recorded(plan, out, options.threads, sync=True, sha256=operation.sha256)
    return Report.of(plan, known, out, time.perf_counter() - started)
