"""The end of an update in place: what was read is checked and recorded, then the files get their places again."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from ires_kernels.checking import guards
from ires_kernels.checkpoints import manifest
from ires_kernels.files import durable, moving
from ires_kernels.files.inplace import Workplace
from ires_kernels.files.journal import Journal, JournalError
from ires_kernels.files.ownership import Access
from ires_kernels.files.slots import Extent, Targets
from ires_kernels.in_place import begun
from ires_kernels.in_place.again import Update
from ires_kernels.records import provenance
from ires_kernels.records.history import on_top
from ires_kernels.records.operation import Operation
from ires_kernels.records.report import Report
from ires_kernels.streaming.options import Options
from ires_kernels.streaming.outcome import Outcome

_FINISHED = "all weights had been updated before; what was left to do was to give the files their places"


def record(update: Update, outcome: Outcome, options: Options, started: float) -> Report:
    """All weights are new: check what was read, and write the manifest that the update is known by from now on."""
    place, operation, plan = update.place, update.operation, update.plan
    compared = guards.compare(plan, update.own_files)
    guards.check_read(plan, outcome, compared, options.processors, options.threads, update.files)
    own = plan.roles_of_target()
    guards.check_unchanged(
        plan, outcome.inputs, but=own, current=update.files, threads=options.threads,
        advice=f"Put it back as it was, then `ires resume {place.target}`; or {begun.back(place, operation)}.",
    )  # fmt: skip
    report = Report.of(plan, outcome, place.target, time.perf_counter() - started)
    report = replace(report, side_files={name: entry["from"] for name, entry in operation.installed.items()})
    _write_manifest(update, outcome, report, options.threads)
    with begun.refused(place):
        begun.check_files(place.work, operation, place.model)
    place.advance("installing")
    return report


def show(place: Workplace, operation: Operation, report: Report | None) -> Report:
    """Install the side files and show the model again, from wherever that is; without a report, what is recorded."""
    if place.phase() == "installing":
        moving.install(place, begun.new_files(place, operation), operation.dropped)
        place.advance("finished")
    table = manifest.read(place.folder / begun.manifest_name(place)) or manifest.Manifest()
    if report is None:
        report = Report.recorded(operation.kind, operation.id, place.target, table.report, _FINISHED)
    warnings, notes = (*report.warnings, *on_top(table.history())), (*report.notes, *_finish(place, operation))
    return replace(report, warnings=warnings, notes=notes)


def _write_manifest(update: Update, outcome: Outcome, report: Report, threads: int | None) -> None:
    place, operation, plan = update.place, update.operation, update.plan
    weights = {shard.path.name: shard.path for shard in plan.inputs["target"].shards}
    if operation.sync:
        for path in weights.values():  # with their times, by which a repetition is told
            durable.fsync_file(path)
    entry = {
        "recipe": operation.recipe,
        "undo": operation.undo,
        "files": {name: provenance.as_left(path, operation.id) for name, path in weights.items()},
        "layouts": provenance.layouts(plan.inputs["target"]),
        "history": operation.history,
    }
    sums = provenance.sha256(weights, threads) if operation.sha256 else {}
    previous: dict[str, str | None] = {}
    if operation.history:  # else what an older manifest says may no longer be true
        previous = _recorded_hashes(place, operation.history[-1]["id"])
    others, paths = operation.installed, operation.paths
    stamps = {
        role: provenance.stamps(checkpoint, operation.samples.get(role, {}), update.files)
        for role, checkpoint in plan.inputs.items()
    }
    content = provenance.build(
        plan, outcome, report, stamps, others, paths=paths, sha256=sums, in_place=entry, previous=previous,
        unsynced="" if operation.sync else operation.boot,
    )  # fmt: skip
    place.release()
    mode = Access(weights.values()).file
    moving.stage(place, begun.manifest_name(place), [content], mode)
    if sums:
        moving.stage(place, begun.sums_name(place), [provenance.sums_file(sums)], mode)


def _recorded_hashes(place: Workplace, update: str) -> dict[str, str | None]:
    """What the manifest of the update before says of the tensors: that of the model, or of its file on its own."""
    names = [begun.manifest_name(place), "ires.json", *(f"{path.name}.ires.json" for path in place.model.iterdir())]
    for name in dict.fromkeys(names):
        table = manifest.read(place.folder / name)
        if table and table.id == update and table.is_mine:
            return {name: tensor.xxh3_128 for name, tensor in table.tensors.items()}
    return {}


def _finish(place: Workplace, operation: Operation) -> list[str]:
    """The files are complete: show them, and remove what is no longer needed; returns what was kept and where."""
    whole = operation.undo == "all" and _is_kept(place, operation)
    moving.move_out(place, operation.names)
    if whole:
        undo = place.keep()
        return [f"`ires rollback {place.target}` takes it back; until then {undo} keeps the old bytes"]
    notes = []
    if operation.undo == "all":
        notes.append("it cannot be taken back: somebody has cut the journal with the old bytes, or removed it")
    kept = place.remove(drop=[begun.manifest_name(place)])
    if kept:
        notes.append(f"files that came from another model replaced those that are now in {kept}")
    return notes


def _is_kept(place: Workplace, operation: Operation) -> bool:
    """Whether what takes the update back is as large as it has to be, and nobody cut it meanwhile."""
    windows = [Extent(*window) for window in operation.windows]
    try:
        none = Targets((), lambda name: os.open(name, os.O_RDWR), sync=False)
        Journal(place.work, none, windows, len(windows), operation.log_size, sync=operation.sync, new=False).close()
    except JournalError:
        return False
    return True
