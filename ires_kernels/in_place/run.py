"""Updating a model in place: begin, work, finish. The way back is in rollback.py.

    begin    check → lock → stage the side files → make the journal → find new scales → operation.json
    again    hide the model's files → open and plan again
    work     put back what was in the air → windows
    finish   check what was read → manifest → side files → show the model's files

There is one path for a first run and for every later one, so taking up an interrupted update is what always happens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ires_kernels.checking import guards
from ires_kernels.files import interrupts
from ires_kernels.files.inplace import Workplace
from ires_kernels.files.ownership import StoreError
from ires_kernels.in_place import begin, begun, cuts, finish
from ires_kernels.in_place.again import hide_and_plan
from ires_kernels.in_place.cuts import Sizes
from ires_kernels.in_place.work import work
from ires_kernels.planning.inputs import StrPath
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import Rules
from ires_kernels.records.operation import Operation
from ires_kernels.records.report import Report
from ires_kernels.streaming import stream
from ires_kernels.streaming.options import Options
from ires_kernels.streaming.outcome import Outcome


@interrupts.uninterrupted
def update_model(
    plan: Plan,
    copies: Mapping[str, str],
    options: Options,
    *,
    undo: str = "ring",
    sync: bool = True,
    sha256: bool = False,
    tag: str = "",
    dry_run: bool = False,
    sizes: Sizes | None = None,
) -> Report | Plan:
    """Carry out a plan that is `in_place`; what was applied before, by the same recipe, is not applied again."""
    started = time.perf_counter()
    ready = begin.look(plan, options, sync=sync, tag=tag)
    if isinstance(ready, Report):
        return ready
    plan = ready.plan
    if dry_run:
        return plan
    guards.check_companions(plan)  # which takes torch, and a dry run does without
    if not ready.steps:
        return Report.of(plan, Outcome(), plan.inputs["target"].path, time.perf_counter() - started)
    sizes = sizes or cuts.SIZES
    place, read = begin.begin(ready, copies, options, sizes, undo=undo, sync=sync, sha256=sha256, tag=tag)
    try:
        report = carry_on(place, begun.read_operation(place), options.part(read, 0), started, fresh=True)
    finally:
        place.close()
    why = {side.name: side.why for side in plan.side_files if side.why}
    warnings = tuple(dict.fromkeys((*plan.warnings, *report.warnings)))
    return replace(report, bytes_read=report.bytes_read + read, warnings=warnings, why=why)


@interrupts.uninterrupted
def carry_on_as_asked(
    target: Path, paths: Mapping[str, StrPath], rules: Rules, options: Options, *, dry_run: bool, **asked: object
) -> Report:
    """Finish an interrupted update, if it is the one that is asked for. Raises StoreError for another one."""
    place, operation = begun.take(target, locked=options.locked)
    try:
        if not operation.is_asked_for(paths, rules, **asked):
            raise StoreError(
                f"{target}: another update in place is unfinished: {operation}. `ires resume {target}` finishes it, "
                f"`ires rollback {target}` takes it back where that is possible."
            )
        if dry_run:
            raise StoreError(f"{target}: this very update is unfinished, and without --dry-run would be gone on with.")
        return carry_on(place, operation, options, time.perf_counter())
    finally:
        place.close()


def resume_update(target: Path, options: Options) -> Report:
    """Finish an interrupted update. Raises StoreError where there is none."""
    place, operation = begun.take(target, locked=options.locked)
    try:
        return carry_on(place, operation, options, time.perf_counter())
    finally:
        place.close()


def carry_on(
    place: Workplace, operation: Operation, options: Options, started: float, *, fresh: bool = False
) -> Report:
    """Take an update from wherever it is to its end; a `fresh` one has just begun."""
    if place.phase() in ("withdraw", "rollback", "restored"):
        raise StoreError(f"{place.target}: is being rolled back. `ires rollback {place.target}` goes on with that.")
    begun.check_boot(place, operation)
    place.sync = operation.sync
    report = None
    if place.phase() == "operation":
        if not fresh:
            stream.check_threads()
        update = hide_and_plan(place, operation)
        if not fresh:
            guards.read_residuals(update.plan, options.threads, update.files)
        outcome = work(update, options)
        report = finish.record(update, outcome, options, started)
    return finish.show(place, operation, report)
