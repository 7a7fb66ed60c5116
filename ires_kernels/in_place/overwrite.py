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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

from ires_kernels.backends.call import Tally
from ires_kernels.checking import guards
from ires_kernels.checkpoints import manifest, sidefiles
from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId, open_checkpoint
from ires_kernels.dtypes import FLOATS
from ires_kernels.files import hidden, inplace, interrupts, store
from ires_kernels.files.inplace import Workplace
from ires_kernels.files.journal import AHEAD, Extent, Journal, JournalError, UndoGone
from ires_kernels.files.opening import MAX_MANIFEST, allow_files, read_bytes
from ires_kernels.files.ownership import Access, open_folder
from ires_kernels.files.samples import sample
from ires_kernels.files.store import LostError, StoreError, boot_id
from ires_kernels.in_place import updates
from ires_kernels.in_place.updates import Window
from ires_kernels.planning.inputs import absolute, open_inputs
from ires_kernels.planning.plan import VERSION, Plan, plan_apply
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Step
from ires_kernels.records import provenance, repetition
from ires_kernels.records.history import on_top
from ires_kernels.records.operation import Operation, as_it_was, same_plan, stamps_of
from ires_kernels.records.report import Report
from ires_kernels.streaming import stream
from ires_kernels.streaming.outcome import Outcome
from ires_kernels.streaming.reader import all_file_ids
from ires_kernels.streaming.stream import Done, Progress
from ires_kernels.streaming.windows import Processors

_AGAIN = (
    "nothing was done: this was applied before. To apply it once more on purpose, give it another --tag. Of files with "
    "the times of then a sample was compared; `ires verify` reads all of what it has hashes of"
)
_FINISHED = "all weights had been updated before; what was left to do was to give the files their places"
# Bytes that are reserved for the log and the manifest, so that neither finds the disk full when the weights are new.
_ROOM, _OF_TENSOR, _OF_WINDOW = 1 << 16, 768, 512


@dataclass(frozen=True)
class Options:
    """How to compute and to show progress; what is computed does not depend on it."""

    processors: Processors
    threads: int | None = None
    progress: Progress | None = None
    locked: bool = True
    """False: without a lock, where the user says that no other process writes there."""


@interrupts.uninterrupted
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
    recipe = plan.recipe(tag)
    history, warnings = repetition.applied(target, options.threads)
    plan = replace(plan, warnings=(*plan.warnings, *warnings))
    before = repetition.repeated(plan, recipe, history, options.threads)
    if before is not None:
        if sync and target.manifest and target.manifest.unsynced:
            store.fsync_all(target.path)
            if not target.path.is_dir():  # its manifest lies beside it
                store.fsync_file(target.path.with_name(f"{target.path.name}.ires.json"))
        return Report.recorded(plan.operation, plan.id, target.path, before.report, _AGAIN)
    if steps:
        plan = replace(plan, warnings=(*plan.warnings, *on_top([*history, repetition.under_way(plan, recipe)])))
    guards.compare(plan)
    if dry_run:
        return plan
    if not steps:
        return Report.of(plan, Outcome(), target.path, time.perf_counter() - started)
    guards.read_residuals(plan, options.threads)
    stream.check_threads()

    windows = updates.windows(steps)
    with ExitStack() as stack:
        place = Workplace.begin(target.path, sync=sync, locked=options.locked)
        stack.callback(place.close)
        try:
            guards.check_unchanged(plan, threads=options.threads)  # also by another process that held the lock before
            installed, dropped = _stage(place, plan)
            ours = [manifest_name(place), sums_name(place)]
            place.check_movable([*names, *installed, *dropped, *ours])
            operation = Operation(
                plan.id, VERSION, plan.operation,
                absolute({role: checkpoint.path for role, checkpoint in plan.inputs.items()}),
                plan.rules.to_dict(), sync, sha256, tag,
                follow_links=target.follow_links,
                undo=undo,
                recipe=recipe,
                names=names,
                stamps=stamps_of(plan.inputs),
                samples={role: provenance.samples(checkpoint, plan.id) for role, checkpoint in plan.inputs.items()},
                hidden=os.stat(place.work).st_ino,
                log_size=_ROOM + sum(_OF_TENSOR + 4 * len(step.name) for step in steps) + _OF_WINDOW * len(windows),
                windows=[[window.file, window.start, window.stop] for window in windows],
                copies=dict(copies),
                installed=installed,
                dropped=dropped,
                history=[update.table for update in history],
            )  # fmt: skip
            content = operation.to_bytes()
            place.reserve(_ROOM + sum(_OF_TENSOR + 4 * len(step.name) for step in plan.steps) + len(content))
            with _journal(place.work, operation, place.folder, new=True):
                place.write(content)
        except BaseException:
            if place.phase() is None:
                place.remove()  # nothing was touched
            raise
        report = carry_on(place, options, started, fresh=True)
        why = {side.name: side.why for side in plan.side_files if side.why}
        return replace(report, warnings=tuple(dict.fromkeys((*plan.warnings, *report.warnings))), why=why)


def carry_on(place: Workplace, options: Options, started: float, *, fresh: bool = False) -> Report:
    """Take an update from wherever it is to its end; a `fresh` one has just begun."""
    if place.phase() in ("withdraw", "rollback", "restored"):
        raise StoreError(f"{place.target}: is being rolled back. `ires rollback {place.target}` goes on with that.")
    operation = read_operation(place)
    check_boot(place, operation)
    place.sync = operation.sync
    report = None
    if place.phase() == "operation":
        if not fresh:
            stream.check_threads()
        place.move_in(operation.names)
        with _refused(place):
            _check_files(place.work, operation, place.model)
        plan, current, changed = _plan_again(place, operation)
        same_plan(operation, plan.id, VERSION)
        steps = updates.changes(plan)
        windows = updates.windows(steps)
        if [[window.file, window.start, window.stop] for window in windows] != operation.windows:
            raise StoreError(
                f"{place.target}: this ires_kernels cuts the update into other pieces than the one that began it, "
                f"though both are version {VERSION}. Go on with that one, or try `ires rollback {place.target}`."
            )
        if not fresh:
            guards.read_residuals(plan, options.threads, current)
        outcome = _overwrite(place, operation, plan, current, changed, steps, windows, options)
        outcome.update(guards.left_out(plan, options.processors, options.threads, current))
        outcome.update(Outcome(inputs=guards.compare(plan, _with_own(place, current))))
        guards.check_residuals(plan, outcome.inputs)
        own = plan.roles_of_target()
        guards.check_unchanged(plan, outcome.inputs, but=own, current=current, threads=options.threads)
        report = Report.of(plan, outcome, place.target, time.perf_counter() - started)
        report = replace(report, side_files={name: entry["from"] for name, entry in operation.installed.items()})
        _write_manifest(place, operation, plan, current, outcome, report, options.threads)
        with _refused(place):
            _check_files(place.work, operation, place.model)
        place.advance("installing")
    if place.phase() == "installing":
        place.install(_new_files(place, operation), operation.dropped)
        place.advance("finished")
    table = manifest.read(place.folder / manifest_name(place)) or manifest.Manifest()
    if report is None:
        report = Report.recorded(operation.kind, operation.id, place.target, table.report, _FINISHED)
    warnings, notes = (*report.warnings, *on_top(table.history())), (*report.notes, *_finish(place, operation))
    return replace(report, warnings=warnings, notes=notes)


def rollback(place: Workplace) -> str:
    """Give the target the bytes that it had before; returns what was done."""
    if place.phase() is None:
        place.remove()
        return f"{place.target}: nothing had been changed."
    operation = read_operation(place)
    place.sync = operation.sync
    if place.phase() in ("installing", "finished") and operation.undo != "all":
        raise StoreError(
            f"{place.target}: all of it is new, and the old bytes were not kept. `ires resume {place.target}` finishes."
        )
    if place.phase() != "restored":
        ended = place.phase() not in ("operation", "withdraw")
        if not ended:  # else all old bytes are there, with their hashes, or it is refused
            check_boot(place, operation)
        place.move_in(operation.names)
        with _refused(place, "cannot be rolled back: "), _journal(place.work, operation, place.model) as journal:
            if not ended:  # else their bytes were looked at
                _check_files(place.work, operation, place.model)
            journal.check_restorable(ended=ended)
            if place.phase() == "operation":
                place.advance("withdraw")
            elif place.phase() in ("installing", "finished"):
                place.advance("rollback")
            journal.restore()
            journal.check_files(place.model)
        if place.phase() == "rollback":
            place.uninstall(_new_files(place, operation), operation.dropped, _is_ours(place, operation))
        place.move_out(operation.names)
        place.advance("restored")
    kept = place.remove()
    edited = f" What you had edited since is in {kept}." if kept else ""
    return f"{place.target}: is what it was before {operation.kind} {operation.id}.{edited}"


def rollback_kept(target: Path, *, locked: bool = True) -> str:
    """Take back the last update, whose old bytes were kept. Raises StoreError where it cannot be, changing nothing."""
    kept = hidden.undo_folders(target)
    if not kept:
        text = "nothing is unfinished there, and no update in place was kept to be taken back (--keep-undo does that)."
        raise StoreError(f"{target}: {text}", *hidden.foreign(target).values())
    operation = Operation.from_bytes(hidden.read_record(kept[-1]), kept[-1])
    checkpoint = open_checkpoint(target, follow_links=True)  # nothing of it is copied
    table = checkpoint.manifest
    last = table.in_place if table else None
    if table is None or last is None or (table.id, last.recipe) != (operation.id, operation.recipe):
        raise StoreError(
            f"{target}: {kept[-1]} keeps what {operation.kind} {operation.id} has changed, and that is not the last "
            "that was applied here: it cannot be taken back any more. Delete it."
        )
    if not table.is_mine:
        raise StoreError(
            f"{table.path}: is not signed with your key, or was edited since, so nobody knows whether the old bytes in "
            f"{kept[-1]} belong into {target} as it is. Put the manifest back that the update wrote."
        )
    if not repetition.replaceable(checkpoint, table):
        raise StoreError(
            f"{target}: was written since its update in place, or copied without its times (`cp -a` keeps them), and "
            f"cannot be rolled back: the old bytes in {kept[-1]} belong into the files as they were."
        )
    inplace.check(target, operation.names)
    try:
        with _journal(kept[-1], operation, target if target.is_dir() else target.parent):
            pass  # it is all there
    except JournalError as error:
        raise StoreError(f"{target}: cannot be rolled back: {error}. The model is as the update has left it.") from None
    place = inplace.take_undo(target, locked=locked)
    try:
        return rollback(place)
    finally:
        place.close()


def read_operation(place: Workplace) -> Operation:
    """The operation of an update."""
    return Operation.from_bytes(place.read(), place.work)


def check_boot(place: Workplace, operation: Operation) -> None:
    if not operation.sync and operation.boot != boot_id():
        kept = operation.undo == "all" and place.phase() != "operation"
        way = f"`ires rollback {place.target}` gives it the old ones." if kept else _copy_again(place)
        raise (StoreError if kept else LostError)(
            f"{place.target}: the machine was restarted in the middle of an update with --no-sync, so its bytes may be "
            f"anything. {way}"
        )


def _copy_again(place: Workplace) -> str:
    return f"Delete {place.work} and copy the model again."


@contextmanager
def _refused(place: Workplace, what: str = "") -> Iterator[None]:
    """Say of which model a journal does not have what is needed, and what to do then."""
    try:
        yield
    except UndoGone as error:
        raise StoreError(f"{place.target}: {what}{error}. `ires resume {place.target}` finishes it.") from None
    except JournalError as error:
        raise LostError(f"{place.target}: {what}{error}. {_copy_again(place)}") from None


def hidden_names(target: Checkpoint) -> list[str]:
    """The files by which loaders know the model."""
    names = [shard.path.name for shard in target.shards]
    if target.path.is_dir():
        names += [name for name in (target.index_name, "config.json") if name and (target.path / name).exists()]
    return names


def _stage(place: Workplace, plan: Plan) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Copy the side files of other models, where they differ from the target's; what else of it has to go."""
    installed: dict[str, dict[str, str]] = {}
    if not plan.inputs["target"].path.is_dir():
        return installed, []
    access = access_of(plan)
    for side in plan.side_files:
        if (side.role != "target" or side.content is not None) and not side.is_at(place.folder / side.name):
            hasher = xxhash.xxh3_128()
            place.stage(side.name, sidefiles.chunks(side, hasher), access.of(side.source))
            installed[side.name] = {"from": side.role, "xxh3_128": hasher.hexdigest()}
    dropped = sidefiles.replaced_by(plan.inputs["target"], plan.side_files)
    return installed, dropped + [name for name in [sums_name(place)] if (place.folder / name).exists()]


def _check_files(work: Path, operation: Operation, where: Path) -> None:
    """Raise JournalError where the files that change, now in the folder `where`, are not those of the operation."""
    copied = os.stat(work).st_ino != operation.hidden  # all of it, so that every file has another inode
    for name in {file for file, _, _ in operation.windows}:
        status, stamp = os.lstat(where / name), operation.stamps["target"][name]
        if status.st_size != stamp["size"]:
            raise JournalError(
                f"{where / name} had {stamp['size']} bytes and has {status.st_size}: somebody has changed it"
            )
        if status.st_ino != stamp["ino"] and not copied:
            raise JournalError(f"{where / name} is another file than when the update began: somebody has replaced it")


@contextmanager
def _journal(work: Path, operation: Operation, where: Path, *, new: bool = False) -> Iterator[Journal]:
    """The journal in the folder `work` of an update of the target's files, which are in the folder `where` now."""
    windows = [Extent(*window) for window in operation.windows]
    slots = {"none": 0, "ring": min(AHEAD, len(windows)), "all": len(windows)}[operation.undo]
    with ExitStack() as stack:
        # No link leads out of the folder, whoever may have put one there: neither its own name nor those in it.
        at = None
        if where.parent == work:
            at = open_folder(work)
            stack.callback(os.close, at)
        folder = open_folder(where if at is None else where.name, dir_fd=at)
        stack.callback(os.close, folder)
        files = {}
        names = {window.file for window in windows}
        allow_files(len(names), work)
        for name in names:
            with store.named(where / name):
                files[name] = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            stack.callback(os.close, files[name])
        journal = Journal(work, files, windows, slots, operation.log_size, sync=operation.sync, new=new)
        stack.callback(journal.close)
        yield journal


def _plan_again(place: Workplace, operation: Operation) -> tuple[Plan, dict[Path, FileId], list[Path]]:
    """The plan of an update whose target is hidden, what the inputs' files are now, and which have other times."""
    model = place.model if place.folder == place.target else place.model / place.target.name
    target = operation.paths["target"]
    paths = {role: model if path == target else path for role, path in operation.paths.items()}
    inputs = open_inputs(paths, follow_links=operation.follow_links)
    current = all_file_ids(inputs)
    before, changed = {}, []
    for role, checkpoint in inputs.items():
        before[role], others = as_it_was(checkpoint, operation.stamps.get(role, {}))
        changed += others if operation.paths[role] != target else []
        if operation.paths[role] == target:  # where its side files still are
            before[role] = replace(before[role], path=place.target)
    plan = plan_apply(before, Rules.from_dict(operation.rules), operation.copies)
    return replace(plan, in_place=True), current, changed


def _overwrite(
    place: Workplace,
    operation: Operation,
    plan: Plan,
    current: Mapping[Path, FileId],
    changed: Sequence[Path],
    steps: Sequence[Step],
    windows: Sequence[Window],
    options: Options,
) -> Outcome:
    """Change what is not changed yet."""
    outcome = Outcome()
    with _refused(place), _journal(place.work, operation, place.model) as journal:
        journal.recover()
        done: dict[str, Done] = {}
        for record in journal.records:
            table = json.loads(record)
            outcome.update(Outcome.from_dict(table["outcome"]))
            part = table["part"]
            done = {part["name"]: Done(part["elements"], Tally(**part["tally"]))} if part else {}
        own = plan.roles_of_target()
        guards.check_begun(plan, operation.samples, outcome, changed, current, but=own, threads=options.threads)
        file_ids = _with_own(place, current)
        writer = _Writer(windows, journal, outcome)
        journal.start()
        stream.run(
            [step for step in steps if step.name not in outcome.outputs],
            file_ids,
            plan.rules,
            writer.write,
            hashed=plan.inputs.keys() - plan.roles_of_target(),
            processors=options.processors,
            threads=options.threads,
            progress=options.progress,
            stops={(window.segments[0].step.name, window.segments[0].first) for window in windows},
            done=done,
            outcome=outcome,
            failed=journal.stop,
        )
        journal.finish()
        journal.check_files(place.model)
        return outcome


def _with_own(place: Workplace, current: Mapping[Path, FileId]) -> dict[Path, FileId]:
    """What the files of the inputs are, of which we write the target's."""
    return {path: FileId.of(path) if path.parent == place.model else known for path, known in current.items()}


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


def _write_manifest(
    place: Workplace,
    operation: Operation,
    plan: Plan,
    current: Mapping[Path, FileId],
    outcome: Outcome,
    report: Report,
    threads: int | None,
) -> None:
    weights = {shard.path.name: shard.path for shard in plan.inputs["target"].shards}
    if operation.sync:
        for path in weights.values():  # with their times, by which a repetition is told
            store.fsync_file(path)
    entry = {
        "recipe": operation.recipe,
        "undo": operation.undo,
        "files": {name: as_left(path, operation.id) for name, path in weights.items()},
        "layouts": provenance.layouts(plan.inputs["target"]),
        "history": operation.history,
    }
    sums = provenance.sha256(weights, threads) if operation.sha256 else {}
    previous: dict[str, str | None] = {}
    if operation.history:  # else what an older manifest says may no longer be true
        previous = _recorded_hashes(place, operation.history[-1]["id"])
    others, paths = operation.installed, operation.paths
    stamps = {
        role: provenance.stamps(checkpoint, operation.samples.get(role, {}), current)
        for role, checkpoint in plan.inputs.items()
    }
    content = provenance.build(
        plan, outcome, report, stamps, others, paths=paths, sha256=sums, in_place=entry, previous=previous,
        unsynced="" if operation.sync else operation.boot,
    )  # fmt: skip
    place.release()
    mode = Access(weights.values()).file
    place.stage(manifest_name(place), [content], mode)
    if sums:
        place.stage(sums_name(place), [provenance.sums_file(sums)], mode)


def access_of(plan: Plan) -> Access:
    """What others may do at most with what a plan makes: no more than with its target, and than read its inputs."""
    paths = {
        role: [*({checkpoint.path} if checkpoint.path.is_dir() else ()), *(shard.path for shard in checkpoint.shards)]
        for role, checkpoint in plan.inputs.items()
    }
    return Access(paths.pop("target", []), chain.from_iterable(paths.values()))


def as_left(path: Path, seed: str) -> dict[str, Any]:
    """What a file of the target is when all of it is new. Its other times change when it is shown."""
    file_id = FileId.of(path)
    return {"size": file_id.size, "mtime_ns": file_id.mtime_ns, "sample": sample(path, seed)}


def _recorded_hashes(place: Workplace, update: str) -> dict[str, str | None]:
    """What the manifest of the update before says of the tensors: that of the model, or of its file on its own."""
    names = [manifest_name(place), "ires.json", *(f"{path.name}.ires.json" for path in place.model.iterdir())]
    for name in dict.fromkeys(names):
        table = manifest.read(place.folder / name)
        if table and table.id == update and table.is_mine:
            return {name: tensor.xxh3_128 for name, tensor in table.tensors.items()}
    return {}


def _finish(place: Workplace, operation: Operation) -> list[str]:
    """The files are complete: show them, and remove what is no longer needed; returns what was kept and where."""
    whole = operation.undo == "all" and _is_kept(place, operation)
    place.move_out(operation.names)
    if whole:
        undo = place.keep()
        return [f"`ires rollback {place.target}` takes it back; until then {undo} keeps the old bytes"]
    notes = []
    if operation.undo == "all":
        notes.append("it cannot be taken back: somebody has cut the journal with the old bytes, or removed it")
    kept = place.remove(drop=[manifest_name(place)])
    if kept:
        notes.append(f"files that came from another model replaced those that are now in {kept}")
    return notes


def _is_kept(place: Workplace, operation: Operation) -> bool:
    """Whether what takes the update back is as large as it has to be, and nobody cut it meanwhile."""
    windows = [Extent(*window) for window in operation.windows]
    try:
        Journal(place.work, {}, windows, len(windows), operation.log_size, sync=operation.sync, new=False).close()
    except JournalError:
        return False
    return True


def manifest_name(place: Workplace) -> str:
    return "ires.json" if place.folder == place.target else f"{place.target.name}.ires.json"


def sums_name(place: Workplace) -> str:
    return provenance.SUMS if place.folder == place.target else f"{place.target.name}.sha256"


def _new_files(place: Workplace, operation: Operation) -> list[str]:
    """The files beside the weights that the update puts there."""
    return [*operation.installed, manifest_name(place), *([sums_name(place)] if operation.sha256 else [])]


def _is_ours(place: Workplace, operation: Operation) -> Callable[[str], bool]:
    """Whether a side file is the one that the update has installed, and not what somebody made of it since."""

    def is_ours(name: str) -> bool:
        path = place.folder / name
        if path.is_symlink() or not path.is_file():
            return False
        if name in operation.installed:
            return provenance.hash_file(path) == operation.installed[name]["xxh3_128"]
        return name != manifest_name(place) or operation.id.encode() in read_bytes(path, MAX_MANIFEST)

    return is_ours
