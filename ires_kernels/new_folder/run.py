"""Writing a merge to a new folder: begin, write its weights, finish.

    begin   check → lock the folder → keep what an interrupted run has completed → reserve all other files
    write   stream the tensors of some files into them; each is recorded and gets its name when it is complete
    finish  check what was read → side files, sums, manifest → give the folder its name

What was learnt of a file is in its record, and a run that finds it complete reads it there. So the middle may be done
by several processes, each of which makes some of the files: see workers.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import xxhash

from ires_kernels.checking import guards
from ires_kernels.checkpoints import roles
from ires_kernels.checkpoints.addresses import Address
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files import interrupts
from ires_kernels.files.destination import check_destination
from ires_kernels.files.new_folder import NewFolder
from ires_kernels.files.ownership import Access, StoreError
from ires_kernels.files.samples import sample
from ires_kernels.files.unfinished import partial_path
from ires_kernels.new_folder import before
from ires_kernels.planning import ancestry
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.plan import MANIFESTS, Plan
from ires_kernels.planning.steps import Step
from ires_kernels.records import card, provenance, sides
from ires_kernels.records.operation import Operation, other_files
from ires_kernels.records.report import Report
from ires_kernels.streaming import fitting, stream
from ires_kernels.streaming.options import Options
from ires_kernels.streaming.outcome import Outcome


class Written(Protocol):
    """A file of which threads write the bytes."""

    def write(self, data: memoryview, offset: int, /) -> None: ...


class Folder(Protocol):
    """A new folder on a disk, as NewFolder says, or in a store."""

    @property
    def out(self) -> Path | Address: ...
    @property
    def access(self) -> Access: ...
    @property
    def finished(self) -> Mapping[str, bytes]: ...
    def file(self, name: str, record: Callable[[], bytes]) -> Written: ...
    def finish_files(self) -> None: ...
    def abandon_files(self) -> None: ...
    def add(self, name: str, chunks: Iterable[bytes], mode: int | None = None) -> None: ...
    def commit(self) -> None: ...


@dataclass(frozen=True)
class Begun:
    """A folder that is locked, in which all files of the plan are reserved or complete."""

    plan: Plan
    operation: Operation
    folder: Folder
    outcome: Outcome
    """What is known of the files that are complete."""
    compared: Mapping[str, dict[str, str]]
    """Hashes of tensors that are not merged, and are the same in instruct and base."""

    @property
    def missing(self) -> list[str]:
        """The files that are to be written."""
        return [file.name for file in self.plan.files if file.name not in self.folder.finished]

    def sums(self, threads: int | None) -> dict[str, str]:
        """sha256 of the weights, by name."""
        return provenance.sha256(self._weights(), threads)

    def samples(self) -> dict[str, str]:
        """What tells the weights from others later, by name."""
        return {name: sample(path, self.plan.id) for name, path in self._weights().items()}

    def _weights(self) -> dict[str, Path]:
        assert isinstance(self.folder, NewFolder)
        return {file.name: self.folder.partial / file.name for file in self.plan.files}


@interrupts.uninterrupted
def write_folder(
    plan: Plan, out: Path, options: Options, *, sync: bool, sha256: bool, dry_run: bool = False
) -> Report | Plan:
    """Write the folder `out`, or look at what is there where this very plan was carried out before."""
    recorded = before.recorded(plan, out, options.threads, sync=sync, sha256=sha256)
    if recorded is not None and not dry_run:
        return recorded
    check_destination(out, [checkpoint.path for checkpoint in plan.inputs.values()])
    if dry_run:
        return plan
    started = time.perf_counter()
    with begin(plan, out, options, sync=sync, sha256=sha256) as begun:
        outcome = write_files(plan, begun.missing, begun.folder, options)
        outcome.update(begun.outcome)
        finish(begun, outcome, options)
    return Report.of(plan, outcome, out, time.perf_counter() - started)


@contextmanager
def begin(plan: Plan, out: Path, options: Options, *, sync: bool, sha256: bool) -> Iterator[Begun]:
    """Lock the folder, and have all of its weights reserved there; leaving keeps what is complete by then.

    Raises CheckpointError and StoreError where the inputs are not what they have to be, OSError for a full disk.
    """
    compared, operation = prepared(plan, sync=sync, sha256=sha256, compare=options.compare)
    folder = NewFolder(
        out, identity(operation), operation.to_bytes(),
        accept=partial(check_begun, plan, partial_path(out), options.threads),
        sync=sync, locked=options.locked, access=sides.access_of(plan),
    )  # fmt: skip
    with folder:
        for file in plan.files:
            if file.name not in folder.finished:
                folder.reserve(file.name, file.header, file.size)
        yield Begun(plan, operation, folder, learnt(folder.finished.values()), compared)


def prepared(plan: Plan, *, sync: bool, sha256: bool, compare: bool) -> tuple[dict[str, dict[str, str]], Operation]:
    """What `Begun` has of a plan before anything is written. Raises CheckpointError for inputs that cannot be used."""
    compared = guards.compare(plan)
    guards.check_companions(plan)
    sizes = {file.name: file.size for file in plan.files}
    return compared, Operation.of(plan, sync=sync, sha256=sha256, compare=compare, outputs=sizes)


def write_files(
    plan: Plan, names: Collection[str], folder: Folder, options: Options, stop: Callable[[], None] | None = None
) -> Outcome:
    """Write some of the files that are reserved in `folder`; returns what is recorded of them."""
    steps: dict[str, list[Step]] = {name: [] for name in names}
    for step in plan.steps:
        if step.file in steps:
            steps[step.file].append(step)
    outcome = Outcome()
    parts = [(steps[name], folder.file(name, partial(record, outcome, steps[name]))) for name in names]
    write_parts(plan, parts, folder, options, outcome, stop)
    outcome.bytes_written += sum(len(file.header) for file in plan.files if file.name in steps)
    return outcome


def write_parts(
    plan: Plan,
    parts: Iterable[tuple[list[Step], Written]],
    folder: Folder,
    options: Options,
    outcome: Outcome,
    stop: Callable[[], None] | None = None,
) -> None:
    """Carry out steps, each into one of the files of `folder`; the outcome learns what is recorded of them.

    In one call the threads write to as many files at once, as a file system lets one of them at a time write a file.

    stop  of a folder that takes one file after the other, each from its first byte to its last, and has a thread wait
          that is ahead: called when something goes wrong
    """
    files = {step.name: file for steps, file in parts for step in steps}
    todo = [step for step in plan.steps if step.name in files]
    if stop is not None:
        order = {name: number for number, name in enumerate(files)}
        first = {step.file: order[step.name] for step in reversed(todo)}
        todo.sort(key=lambda step: (first[step.file], step.offset + step.start))
    try:
        stream.run(
            todo,
            guards.file_ids(plan),
            plan.rules,
            lambda step, start, data, _: files[step.name].write(data, step.offset + start),
            fit=fitting.of_tile if options.compare else None,
            processors=options.processors,
            threads=options.threads,
            progress=options.progress,
            in_order=stop is not None,
            outcome=outcome,
            failed=stop,
        )
        folder.finish_files()
    finally:
        folder.abandon_files()


def finish(begun: Begun, outcome: Outcome, options: Options) -> None:
    """All weights are there: check what was read, add the other files, and give the folder its name."""
    plan, operation, folder = begun.plan, begun.operation, begun.folder
    guards.check_read(plan, outcome, begun.compared, options.processors, options.threads)
    # What loaders look for first comes last.
    others = {side.name: sides.copied(side, folder.access, folder.add) for side in plan.side_files}
    for name, content in plan.documents:
        folder.add(name, [content])
        others[name] = {"from": plan.operation, "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    report = Report.of(plan, outcome, folder.out, 0.0)
    sums = begun.sums(options.threads) if operation.sha256 else {}
    if sums:
        folder.add(provenance.SUMS, [provenance.sums_file(sums)])
    manifest = provenance.build(
        plan,
        outcome,
        report,
        {role: provenance.stamps(checkpoint, operation.samples[role]) for role, checkpoint in plan.inputs.items()},
        others,
        outputs=begun.samples(),
        sha256=sums,
        unsynced="" if operation.sync else operation.boot,
        sketch=_sketch(plan) if plan.operation == "extract" else None,
    )
    if plan.operation == "apply" and plan.inputs["target"].path.is_dir():
        # In no record, as who publishes the model goes on writing it.
        digests = {role: entry["digest"] for role, entry in json.loads(manifest)["inputs"].items()}
        folder.add(card.name(plan), [card.build(plan, report, digests)])
    folder.add(MANIFESTS[plan.operation], [manifest])
    guards.check_unchanged(plan, outcome.inputs, threads=options.threads)
    folder.commit()


def _sketch(plan: Plan) -> dict[str, str]:
    """What base, or the first of several, has at a few places of each tensor of the residual."""
    base = next(filter(roles.is_base, plan.inputs), None)
    if base is None:
        return {}
    with Looks(plan.inputs) as looks:
        return ancestry.sketch(plan.steps, looks, base)


def identity(operation: Operation) -> str:
    """The words by which a later run knows the folder."""
    return operation.id if operation.sync else f"{operation.id} {operation.boot}"


def record(outcome: Outcome, steps: Iterable[Step]) -> bytes:
    """What is known of a file whose bytes are all written."""
    return json.dumps(outcome.of(steps).to_dict()).encode()


def learnt(records: Iterable[bytes]) -> Outcome:
    """What is known of files whose records these are."""
    outcome = Outcome()
    for each in records:
        outcome.update(Outcome.from_dict(json.loads(each)))
    return outcome


def check_begun(
    plan: Plan, where: Path | Address, threads: int | None, kept: bytes, finished: Mapping[str, bytes]
) -> None:
    """Refuse with StoreError to go on with an unfinished folder that was begun with other inputs."""
    operation = Operation.from_bytes(kept, where)
    others = other_files(plan.inputs, operation.stamps)
    try:
        guards.check_begun(plan, operation.samples, learnt(finished.values()), others, threads=threads)
    except CheckpointError as error:  # a file that is just being written is no reason to throw away what is complete
        raise StoreError(*error.lines) from error
