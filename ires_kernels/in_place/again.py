"""An update in place, opened and planned again: its target is hidden by now, and other inputs may have moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ires_kernels.checkpoints import hub
from ires_kernels.checkpoints.checkpoint import FileId
from ires_kernels.checkpoints.surroundings import with_settings
from ires_kernels.files import moving
from ires_kernels.files.inplace import Workplace
from ires_kernels.files.ownership import StoreError
from ires_kernels.in_place import begun, cuts, scales
from ires_kernels.in_place.cuts import Sizes, Window
from ires_kernels.planning.ancestry import Ancestry
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.inputs import open_inputs
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Step
from ires_kernels.records.operation import Operation, as_it_was, same_plan
from ires_kernels.streaming.reader import all_file_ids
from ires_kernels.version import VERSION


@dataclass(frozen=True)
class Update:
    """What is to be changed, and in what."""

    place: Workplace
    operation: Operation
    plan: Plan
    """With the times that the files had when the update began."""
    files: dict[Path, FileId]
    """What the files of the inputs were when they were opened now."""
    changed: list[Path]
    """Those that have other times now."""
    steps: Sequence[Step]
    """That change something, each with its place in the target, and scales from where they are kept."""
    windows: Sequence[Window]
    scales: scales.Kept | None

    @property
    def own_files(self) -> dict[Path, FileId]:
        """What the files are now, of which we write the target's."""
        ours = self.place.model
        return {path: FileId.of(path) if path.parent == ours else known for path, known in self.files.items()}


def hide_and_plan(place: Workplace, operation: Operation) -> Update:
    """Hide the target's files, where they are not yet, and plan what is to be done with them.

    Raises StoreError and CheckpointError where that is not what the update was begun with.
    """
    moving.move_in(place, operation.names)
    with begun.refused(place):
        begun.check_files(place.work, operation, place.model)
    model = place.model if place.folder == place.target else place.model / place.target.name
    target = operation.paths["target"]
    paths = {role: model if path == target else hub.local(path) for role, path in operation.paths.items()}
    inputs = open_inputs(paths, follow_links=operation.follow_links)
    files = all_file_ids(inputs)
    before, changed = {}, []
    for role, checkpoint in inputs.items():
        before[role], others = as_it_was(checkpoint, operation.stamps.get(role, {}))
        changed += others if operation.paths[role] != target else []
        if operation.paths[role] == target:  # where its side files still are
            before[role] = with_settings(replace(before[role], path=place.target))
    rules, layouts = Rules.from_dict(operation.rules), operation.known_layouts()
    plan = replace(plan_apply(before, rules, operation.copies, layouts), in_place=True)
    plan = replace(plan, ancestry=tuple(map(Ancestry.from_dict, operation.ancestry)))
    same_plan(operation, plan)
    steps = cuts.changes(plan)
    kept = scales.kept(place, operation, steps)
    steps = scales.with_kept(steps, kept)
    windows = cuts.windows(steps, Sizes(**operation.sizes))
    if [[window.file, window.start, window.stop] for window in windows] != operation.windows:
        raise StoreError(
            f"{place.target}: this ires_kernels cuts the update into other pieces than the one that began it, "
            f"though both are version {VERSION}. Go on with that one, or try `ires rollback {place.target}`."
        )
    files |= {} if kept is None else {kept.layout.path: FileId.of(kept.layout.path)}
    return Update(place, operation, plan, files, changed, steps, windows, kept)
