"""Beginning an update in place: all that can be refused is, before the first byte of the model changes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from ires_kernels.checking import guards
from ires_kernels.checkpoints import filenames, selection
from ires_kernels.checkpoints.manifest import Update
from ires_kernels.files import durable, movable, moving
from ires_kernels.files.inplace import SCALES, Workplace
from ires_kernels.in_place import begun, cuts, scales
from ires_kernels.in_place.cuts import Sizes, Window
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Step
from ires_kernels.records import repetition, sides
from ires_kernels.records.history import on_top
from ires_kernels.records.operation import Operation
from ires_kernels.records.report import Report
from ires_kernels.streaming import stream
from ires_kernels.streaming.options import Options

_AGAIN = (
    "nothing was done: this was applied before. To apply it once more on purpose, give it another --tag. Of files with "
    "the times of then a sample was compared; `ires verify` reads all of what it has hashes of"
)
# Bytes that are reserved for the log and the manifest, so that neither finds the disk full when the weights are new.
_ROOM, _OF_TENSOR, _OF_WINDOW, _FIT, _DIGEST = 1 << 16, 768, 512, 512, 32


@dataclass(frozen=True)
class Ready:
    """An update that may begin."""

    plan: Plan
    """With warnings of what was applied before."""
    steps: Sequence[Step]
    """Those that change something."""
    recipe: str
    history: Sequence[Update]


def look(plan: Plan, options: Options, *, sync: bool, tag: str) -> Ready | Report:
    """Refuse what cannot be done in place. Returns the report of then, where this was applied before."""
    plan, target = _in_place(plan), plan.inputs["target"]
    steps = cuts.changes(plan)
    movable.check(target.path, begun.hidden_names(target))
    recipe = plan.recipe(tag)
    history, warnings = repetition.applied(target, options.threads)
    before = repetition.repeated(plan, recipe, history, options.threads)
    if before is not None:
        if sync and target.manifest and target.manifest.unsynced:
            durable.fsync_all(target.path)
            if not target.path.is_dir():  # its manifest lies beside it
                durable.fsync_file(target.path.with_name(f"{target.path.name}.ires.json"))
        return Report.recorded(plan.operation, plan.id, target.path, before.report, _AGAIN)
    on_others = on_top([*history, repetition.under_way(plan, recipe)]) if steps else ()
    guards.compare(plan)
    return Ready(replace(plan, warnings=(*plan.warnings, *warnings, *on_others)), steps, recipe, history)


def begin(
    ready: Ready, copies: Mapping[str, str], options: Options, sizes: Sizes, *, undo: str, sync: bool, sha256: bool,
    tag: str,
) -> tuple[Workplace, int]:  # fmt: skip
    """Lock the target and keep there what it takes to go on; nothing is touched where this raises.

    Also returns how many bytes were read for the scales of a quantized target.
    """
    plan, target = ready.plan, ready.plan.inputs["target"]
    guards.read_residuals(plan, options.threads)
    stream.check_threads()
    place = Workplace.begin(target.path, sync=sync, locked=options.locked)
    try:
        guards.check_unchanged(plan, threads=options.threads)  # also by another process that held the lock before
        installed, dropped = _stage(place, plan)
        names = begun.hidden_names(target)
        movable.check_movable(place, [*names, *installed, *dropped, begun.manifest_name(place), begun.sums_name(place)])
        windows = cuts.windows(ready.steps, sizes)
        layout = scales.Layout(ready.steps, place.work / SCALES)
        operation = Operation.of(
            plan,
            sync=sync,
            sha256=sha256,
            compare=options.compare,
            tag=tag,
            undo=undo,
            recipe=ready.recipe,
            names=names,
            hidden=os.stat(place.work).st_ino,
            log_size=_room(ready.steps) + _room_of_windows(ready.steps, windows, _FIT * options.compare),
            sizes=asdict(sizes),
            windows=[[window.file, window.start, window.stop] for window in windows],
            copies=dict(copies),
            installed=installed,
            dropped=dropped,
            ancestry=[found.to_dict() for found in plan.ancestry],
            history=[update.table for update in ready.history],
        )
        scales.reserve(layout)
        place.reserve(_room(plan.steps) + len(operation.to_bytes()) + _DIGEST)
        with begun.opened_journal(place.work, operation, place.folder, new=True):
            digest, read = scales.find(place, plan, layout, options)
            if digest:
                guards.check_unchanged(plan, threads=options.threads)
            place.write(replace(operation, scales=digest).to_bytes())
    except BaseException:
        try:
            if place.phase() is None:
                place.remove()
        finally:
            place.close()
        raise
    return place, read


def _in_place(plan: Plan) -> Plan:
    """A plan of `apply` for the target's own files, with what that leaves as it is."""
    others = [name for name in plan.not_copied if filenames.is_weights(name)]
    stale = (f"{', '.join(others)} beside the weights of the target are not updated",) if others else ()
    side_files = plan.side_files if plan.inputs["target"].path.is_dir() else ()  # a file is updated alone
    return replace(plan, in_place=True, side_files=side_files, warnings=(*plan.warnings, *stale))


def _room(steps: Sequence[Step]) -> int:
    return _ROOM + sum(_OF_TENSOR + 4 * len(step.name) for step in steps)


def _room_of_windows(steps: Sequence[Step], windows: Sequence[Window], fit: int) -> int:
    """For what is known at the end of each window of a tensor that goes on: what each of its steps has counted.

    fit  how much more that is of each step, there and where it ends
    """
    parts = Counter(step.output for step in steps)
    lasts = [window.segments[-1].step for window in windows]
    more = fit * (len(steps) + sum(parts[step.output] for step in lasts))
    return more + sum(_OF_WINDOW * parts[step.output] + 4 * len(step.name) * (parts[step.output] - 1) for step in lasts)


def _stage(place: Workplace, plan: Plan) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Copy the side files of other models, where they differ from the target's; what else of it has to go."""
    installed: dict[str, dict[str, str]] = {}
    if not plan.inputs["target"].path.is_dir():
        return installed, []
    access = sides.access_of(plan)
    for side in plan.side_files:
        if (side.role != "target" or side.content is not None) and not side.is_at(place.folder / side.name):
            installed[side.name] = sides.copied(side, access, partial(moving.stage, place))
    dropped = selection.replaced_by(plan.inputs["target"], plan.side_files)
    return installed, dropped + [name for name in [begun.sums_name(place)] if (place.folder / name).exists()]
