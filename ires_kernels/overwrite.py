"""Updating a model in place: begin, go on where an interrupted run was, finish, take back.

    apply     check → hide the model's files → carry_on
    carry_on  open and plan again → put back what was in the air → windows → side files, manifest → show the files
    rollback  put all old bytes back → show the files

There is one path for a first run and for every later one, so taking up an interrupted update is what always happens.
"""

from __future__ import annotations

import json
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from ires_kernels import guards, inplace, manifest, sidefiles, stream, updates
from ires_kernels.backends import Tally
from ires_kernels.checkpoint import Checkpoint, FileId
from ires_kernels.inplace import Workplace
from ires_kernels.inputs import absolute, open_inputs
from ires_kernels.journal import AHEAD, Extent, Journal, JournalError
from ires_kernels.names import FLOATS
from ires_kernels.operation import Operation, as_it_was, same_plan
from ires_kernels.plan import VERSION, Plan, plan_apply
from ires_kernels.report import Report
from ires_kernels.rules import Rules
from ires_kernels.steps import Step
from ires_kernels.store import StoreError, boot_id
from ires_kernels.stream import Done, Outcome, Progress
from ires_kernels.updates import Window
from ires_kernels.windows import Processors

_CHUNK = 1 << 20  # bytes at a time of a side file


@dataclass(frozen=True)
class Options:
    """How to compute and to show progress; what is computed does not depend on it."""

    processors: Processors
    threads: int | None = None
    progress: Progress | None = None


def apply(
    plan: Plan,
    copies: Mapping[str, str],
    options: Options,
    *,
    undo: str,
    sync: bool,
    sha256: bool,
    tag: str,
    dry_run: bool = False,
) -> Report | Plan:
    """Carry out a plan that is `in_place`; what was applied before, by the same recipe, is not applied again."""
    started = time.perf_counter()
    target = plan.inputs["target"]
    steps = updates.changes(plan)
    names = hidden_names(target)
    inplace.check(target.path, names)
    history = applied(target)
    recipe = plan.recipe(tag)
    if any(entry.get("recipe") == recipe for entry in history):
        entry = next(entry for entry in history if entry.get("recipe") == recipe)
        return Report.recorded(plan.operation, plan.id, target.path, entry["report"], _AGAIN)
    guards.compare(plan)
    if dry_run:
        return plan
    if not steps:
        return Report.of(plan, Outcome(), target.path, time.perf_counter() - started)
    guards.read_residuals(plan, options.threads)
    guards.check_unchanged(plan)

    windows = updates.windows(steps)
    with ExitStack() as stack:
        place = Workplace.begin(target.path, sync=sync)
        stack.callback(place.close)
        try:
            installed, dropped = _stage(place, plan)
            operation = Operation(
                plan.id, VERSION, plan.operation,
                absolute({role: checkpoint.path for role, checkpoint in plan.inputs.items()}),
                plan.rules.to_dict(), sync, sha256, tag,
                undo=undo,
                recipe=recipe,
                names=names,
                files={shard.path.name: [shard.file_id.size, shard.file_id.mtime_ns] for shard in target.shards},
                windows=[[window.file, window.start, window.stop] for window in windows],
                copies=dict(copies),
                installed=installed,
                dropped=dropped,
                history=history,
            )  # fmt: skip
            with _journal(place, operation, place.folder) as journal:
                journal.allocate()
            place.write(operation.to_bytes())
        except BaseException:
            if place.phase() is None:
                place.remove()  # nothing was touched
            raise
        return carry_on(place, options, started)


_FINISHED = "all weights had been updated before; what was left to do was to give the files their places"
_AGAIN = "nothing was done: this was applied before. To apply it once more on purpose, give it another --tag."


def carry_on(place: Workplace, options: Options, started: float) -> Report:
    """Take an update from wherever it is to its end."""
    if place.phase() in ("rollback", "restored"):
        raise StoreError(f"{place.target}: is being rolled back. `ires rollback {place.target}` goes on with that.")
    operation = read_operation(place)
    place.sync = operation.sync
    if place.phase() == "operation":
        place.move_in(operation.names)
        plan, current = _plan_again(place, operation)
        steps = updates.changes(plan)
        windows = updates.windows(steps)
        same_plan(operation, plan.id, VERSION)
        assert [[w.file, w.start, w.stop] for w in windows] == operation.windows
        outcome = _overwrite(place, operation, plan, current, steps, windows, options)
        compared = guards.compare(plan)
        outcome.update(Outcome(inputs=compared))
        guards.check_residuals(plan, outcome)
        guards.check_unchanged(plan, but=_roles_of_target(plan))
        report = Report.of(plan, outcome, place.target, time.perf_counter() - started)
        _write_manifest(place, operation, plan, outcome, report)
        place.install(_new_files(place, operation), operation.dropped)
        place.advance("finished")
    else:
        table = json.loads((place.folder / _manifest_name(place)).read_bytes())
        report = Report.recorded(operation.kind, operation.id, place.target, table["report"], _FINISHED)
    return replace(report, notes=(*report.notes, *_finish(place, operation)))


def rollback(place: Workplace) -> str:
    """Give the target the bytes that it had before; returns what was done."""
    if place.phase() is None:
        place.remove()
        return f"{place.target}: nothing had been changed."
    operation = read_operation(place)
    place.sync = operation.sync
    if place.phase() == "finished" and operation.undo != "all":
        raise StoreError(
            f"{place.target}: all of it is new, and the old bytes were not kept. `ires resume {place.target}` finishes."
        )
    if place.phase() != "restored":
        place.move_in(operation.names)
        with _journal(place, operation, place.work) as journal:
            try:
                journal.check_restorable()
            except JournalError as error:
                raise StoreError(f"{place.target}: cannot be rolled back: {error}.") from None
            if place.phase() != "rollback":
                place.advance("rollback")
            journal.restore()
        place.uninstall(_new_files(place, operation), operation.dropped)
        place.move_out(operation.names)
        place.advance("restored")
    place.remove()
    return f"{place.target}: is what it was before {operation.kind} {operation.id}."


def read_operation(place: Workplace) -> Operation:
    """The operation of an update, known to have trustworthy bytes. Raises StoreError where they are not."""
    operation = Operation.from_bytes(place.read(), place.work)
    if not operation.sync and operation.boot != boot_id():
        raise StoreError(
            f"{place.target}: the machine was restarted in the middle of an update with --no-sync, so its bytes may be "
            f"anything. Copy the model again; what is left of this one is in {place.work}."
        )
    return operation


def hidden_names(target: Checkpoint) -> list[str]:
    """The files by which loaders know the model."""
    names = [shard.path.name for shard in target.shards]
    if target.path.is_dir():
        names += [name for name in (target.index_name, "config.json") if name and (target.path / name).exists()]
    return names


def applied(target: Checkpoint) -> list[dict[str, Any]]:
    """What was applied to this model in place, as long as its bytes are still the result of that; the last one last."""
    entry = (target.manifest or {}).get("in_place")
    if not isinstance(entry, dict) or not unchanged(target):
        return []
    return [*entry.get("history", []), manifest.history_entry(target.manifest or {})]


def unchanged(target: Checkpoint) -> bool:
    """Whether the model is what its manifest of an update in place says: by size and time, or else by all hashes."""
    entry = (target.manifest or {}).get("in_place", {})
    if guards.have_stamps({shard.path.name: shard.path for shard in target.shards}, entry.get("files", {})):
        return True
    recorded = manifest.tensors(target)
    refs = [ref for name, ref in target.tensors.items() if recorded.get(name, {}).get("xxh3_128")]
    steps = [
        Step(ref.name, ref.dtype, ref.shape, "copy", ("target",), (ref,), file=ref.path.name, nbytes=ref.nbytes)
        for ref in refs
    ]
    file_ids = {shard.path: shard.file_id for shard in target.shards}
    found = stream.run(steps, file_ids, Rules(), lambda *_: None).outputs
    return all(recorded[name]["xxh3_128"] == digest for name, digest in found.items())


def _stage(place: Workplace, plan: Plan) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Copy the side files of other models, where they differ from the target's; what else of it has to go."""
    installed: dict[str, dict[str, str]] = {}
    if not plan.inputs["target"].path.is_dir():
        return installed, []
    for side in plan.side_files:
        if side.role != "target" and not _same(side.source, place.folder / side.name):
            hasher = xxhash.xxh3_128()
            place.stage(side.name, chunks(side.source, hasher))
            installed[side.name] = {"from": side.role, "xxh3_128": hasher.hexdigest()}
    dropped = sidefiles.replaced_by(plan.inputs["target"], plan.side_files)
    return installed, dropped + [name for name in [_sums_name(place)] if (place.folder / name).exists()]


@contextmanager
def _journal(place: Workplace, operation: Operation, where: Path) -> Iterator[Journal]:
    """The journal of an update of the target's files, which are in the folder `where` now."""
    windows = [Extent(*window) for window in operation.windows]
    slots = {"none": 0, "ring": min(AHEAD, len(windows)), "all": len(windows)}[operation.undo]
    with ExitStack() as stack:
        files = {}
        for name in {window.file for window in windows}:
            files[name] = os.open(where / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, files[name])
        journal = Journal(place.work, files, windows, slots, sync=operation.sync)
        stack.callback(journal.close)
        yield journal


def _plan_again(place: Workplace, operation: Operation) -> tuple[Plan, dict[Path, FileId]]:
    """The plan of an update whose target is hidden, and what the files of the inputs are now."""
    hidden = place.work if place.folder == place.target else place.work / place.target.name
    target = operation.paths["target"]
    inputs = open_inputs({role: hidden if path == target else path for role, path in operation.paths.items()})
    current = {shard.path: shard.file_id for checkpoint in inputs.values() for shard in checkpoint.shards}
    before = {
        role: as_it_was(checkpoint, operation) if operation.paths[role] == target else checkpoint
        for role, checkpoint in inputs.items()
    }
    plan = plan_apply(before, Rules.from_dict(operation.rules), operation.copies)
    return replace(plan, in_place=True), current


def _overwrite(
    place: Workplace,
    operation: Operation,
    plan: Plan,
    current: Mapping[Path, FileId],
    steps: Sequence[Step],
    windows: Sequence[Window],
    options: Options,
) -> Outcome:
    """Change what is not changed yet."""
    outcome = Outcome()
    with _journal(place, operation, place.work) as journal:
        try:
            journal.recover()
        except JournalError as error:
            raise StoreError(f"{place.target}: {error}.") from None
        done: dict[str, Done] = {}
        for record in journal.records:
            table = json.loads(record)
            outcome.update(Outcome.from_dict(table["outcome"]))
            part = table["part"]
            done = {part["name"]: Done(part["elements"], Tally(**part["tally"]))} if part else {}
        file_ids = {path: FileId.of(path) if path.parent == place.work else known for path, known in current.items()}
        writer = _Writer(windows, journal, outcome)
        journal.start()
        return stream.run(
            [step for step in steps if step.name not in outcome.outputs],
            file_ids,
            plan.rules,
            writer.write,
            hashed={role for role in plan.inputs if role not in _roles_of_target(plan)},
            processors=options.processors,
            threads=options.threads,
            progress=options.progress,
            stops={(window.segments[0].step.name, window.segments[0].first) for window in windows},
            done=done,
            outcome=outcome,
            failed=journal.stop,
        )


class _Writer:
    """Writes results over the target, and tells the journal of windows that are complete; called by several threads."""

    def __init__(self, windows: Sequence[Window], journal: Journal, outcome: Outcome) -> None:
        self._windows = windows
        self._journal = journal
        self._outcome = outcome
        self._left = [window.nbytes for window in windows]
        self._tallies: dict[int, Tally] = {}  # at the end of a window, of the tensor that goes on in the next one
        self._lock = threading.Lock()
        self._numbers: dict[str, list[int]] = {}
        for number, window in enumerate(windows):
            self._numbers.setdefault(window.file, []).append(number)
        self._starts = {file: [windows[n].start for n in numbers] for file, numbers in self._numbers.items()}

    def write(self, step: Step, start: int, data: memoryview, tally: Tally) -> None:
        offset = step.offset + start
        number = self._numbers[step.file][bisect_right(self._starts[step.file], offset) - 1]
        self._journal.wait(number)
        self._journal.write(step.file, data, offset)
        last = self._windows[number].segments[-1]
        with self._lock:
            if step is last.step and start + len(data) == last.stop:
                self._tallies[number] = tally
            self._left[number] -= len(data)
            complete = self._left[number] == 0
        if complete:
            self._journal.complete(number, self._record(number))

    def _record(self, number: int) -> bytes:
        """What a later run has to know of the tensors that end in a window, and of the one that does not."""
        window = self._windows[number]
        last = window.segments[-1]
        tally = self._tallies.pop(number)
        part = None
        if not last.is_last:
            elements = last.stop // FLOATS[last.step.dtype]
            part = {"name": last.step.name, "elements": elements, "tally": asdict(tally)}
        ended = self._outcome.of(segment.step for segment in window.segments if segment.is_last)
        return json.dumps({"outcome": ended.to_dict(), "part": part}).encode()


def _write_manifest(place: Workplace, operation: Operation, plan: Plan, outcome: Outcome, report: Report) -> None:
    weights = {name: FileId.of(place.work / name) for name in operation.files}
    entry = {
        "recipe": operation.recipe,
        "undo": operation.undo,
        "files": {name: [file_id.size, file_id.mtime_ns] for name, file_id in weights.items()},
        "history": operation.history,
    }
    sums = manifest.sha256({name: place.work / name for name in weights}) if operation.sha256 else {}
    if operation.sync:
        for name in weights:  # with their times, by which a repetition is told
            _fsync(place.work / name)
    previous: dict[str, str | None] = {}
    if operation.history:  # else what an older manifest says may no longer be true
        previous = _recorded_hashes(place)
    content = manifest.build(plan, outcome, report, operation.installed, sha256=sums, in_place=entry, previous=previous)
    place.stage(_manifest_name(place), [content])
    if sums:
        place.stage(_sums_name(place), [manifest.sums_file(sums)])


def _recorded_hashes(place: Workplace) -> dict[str, str | None]:
    """What the manifest of the update before says of the tensors."""
    name = _manifest_name(place)
    old = place.work / "old" / name  # where it is when this update was interrupted late
    table = json.loads((old if old.exists() else place.folder / name).read_bytes())
    return {tensor: entry.get("xxh3_128") for tensor, entry in table["tensors"].items()}


def _finish(place: Workplace, operation: Operation) -> list[str]:
    """The files are complete: show them, and remove what is no longer needed; returns what was kept and where."""
    place.move_out(operation.names)
    if operation.undo == "all":
        return [f"`ires rollback {place.target}` takes it back; until then {place.keep()} keeps the old bytes"]
    kept = place.remove(drop=[_manifest_name(place)])
    return [f"files that came from another model replaced those that are now in {kept}"] if kept else []


def _manifest_name(place: Workplace) -> str:
    return "ires.json" if place.folder == place.target else f"{place.target.name}.ires.json"


def _sums_name(place: Workplace) -> str:
    return manifest.SUMS if place.folder == place.target else f"{place.target.name}.sha256"


def _new_files(place: Workplace, operation: Operation) -> list[str]:
    """The files beside the weights that the update puts there."""
    return [*operation.installed, _manifest_name(place), *([_sums_name(place)] if operation.sha256 else [])]


def _roles_of_target(plan: Plan) -> set[str]:
    place = plan.inputs["target"].path.resolve()
    return {role for role, checkpoint in plan.inputs.items() if checkpoint.path.resolve() == place}


def chunks(path: Path, hasher: xxhash.xxh3_128) -> Iterator[bytes]:
    """A file by pieces, hashed on the way."""
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
            yield chunk


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
