"""Whether a merge is unfinished, and what to do about it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ires_kernels.checkpoints.checkpoint import open_checkpoint
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.files import hidden
from ires_kernels.files.journal import count_records, is_broken_off
from ires_kernels.files.locks import holder
from ires_kernels.files.ownership import Foreign, StoreError
from ires_kernels.files.plain import plain_lines
from ires_kernels.files.store import MARKER, is_unfinished, partial_path, read_kept
from ires_kernels.planning.inputs import StrPath
from ires_kernels.records.history import on_top
from ires_kernels.records.operation import MAPPED, Operation

State = Literal["none", "running", "unfinished", "rolling back", "finished", "foreign"]


@dataclass(frozen=True)
class Status:
    """What `status` found; ``print(status)`` tells a person."""

    path: str
    state: State
    what: str
    """In words."""
    next: tuple[str, ...] = ()
    """What can be done, a sentence each."""

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        return plain_lines(f"{self.path}: {self.state}: {self.what}", *self.next)


def status(path: StrPath) -> Status:
    """Look at a model, or at an output that is not there yet; changes nothing.

    >>> print(ik.status("target/"))
    target: none: nothing is unfinished, and no merge made it
    """
    path = Path(path)
    try:
        return _look(path)
    except FileNotFoundError:  # it went on between two looks
        return _look(path)


def _look(path: Path) -> Status:
    theirs = []  # what is there, and is not ours: said, and not followed
    if is_unfinished(partial_path(path)):
        try:
            return _of_new_folder(path)
        except Foreign as error:
            if not path.exists():
                return Status(f"{path}", "foreign", f"{error}")
            theirs.append(f"{error}")
    strange = hidden.foreign(path)
    work = hidden.work_folder(path)
    if work.is_dir() and work not in strange:
        return _of_update(path, work)
    found = _of_model(path)
    return replace(found, next=(*found.next, *theirs, *strange.values()))


def _of_model(path: Path) -> Status:
    try:
        manifest = open_checkpoint(path, follow_links=True).manifest or Manifest()
    except CheckpointError:
        for file in hidden.unfinished_files(path):  # it is incomplete because of them
            return _look(file)
        raise
    kept = hidden.undo_folders(path)
    together = "".join(f"; {line}" for line in on_top(manifest.history() if manifest.is_mine else ()))
    if kept:
        operation = Operation.from_bytes(hidden.read_record(kept[-1]), kept[-1])
        if operation.id == manifest.id:
            return Status(
                f"{path}", "finished", f"updated in place; {kept[-1]} keeps the old bytes{together}",
                (f"`ires rollback {path}` takes the update back.", f"Delete {kept[-1]} when that is no longer wanted."),
            )  # fmt: skip
    if not manifest.operation:
        return Status(f"{path}", "none", "nothing is unfinished, and no merge made it")
    whose = "" if manifest.is_mine else "; its manifest is not signed with your key"
    how = "in place" if manifest.in_place else "as a new folder"
    if manifest.operation == MAPPED:
        how = "written through ik.mapped"
    useless = tuple(f"{folder} is of an earlier update, and cannot take back anything: delete it." for folder in kept)
    return Status(f"{path}", "finished", f"{manifest.operation} {manifest.id}, {how}{whose}{together}", useless)


def _of_new_folder(out: Path) -> Status:
    """Raises Foreign where it is not ours."""
    partial = partial_path(out)
    names = os.listdir(partial)
    complete = sum(name.startswith(".ires-") and name.endswith(".done") for name in names)
    who = holder(partial / MARKER)
    try:
        what = f"{Operation.from_bytes(read_kept(out), partial)}, {complete} files complete"
    except Foreign:
        raise
    except (CheckpointError, StoreError):  # of another version, or not begun
        what = f"{complete} files complete"
    if who:
        return Status(f"{out}", "running", f"{what}, by {who}", ("Wait for it to end.",))
    return Status(
        f"{out}", "unfinished", what,
        (f"`ires resume {out}`, or the same command, goes on.", f"`ires rollback {out}` removes {partial}."),
    )  # fmt: skip


def _of_update(target: Path, work: Path) -> Status:
    who = holder(work / MARKER)
    if who:
        return Status(f"{target}", "running", f"an update in place, or ik.mapped, by {who}", ("Wait for it to end.",))
    phase = hidden.unfinished(target)
    if phase is None:
        return Status(f"{target}", "none", f"no update in place is under way; {work} is left of one",
                      (f"`ires rollback {target}` removes that.",))  # fmt: skip
    operation = Operation.from_bytes(hidden.read_record(work, phase), work)
    if operation.kind == MAPPED:
        return _of_mapped(target, work, phase, operation)
    done, total = count_records(work), len(operation.windows)
    what = f"{operation}, in place, {done} of {total} windows new; the model is in {work} until it is finished"
    back = f"`ires rollback {target}` takes it back."
    if phase in ("withdraw", "rollback", "restored"):
        return Status(f"{target}", "rolling back", what, (f"`ires rollback {target}` goes on.",))
    if operation.undo == "none" and phase == "operation" and is_broken_off(work):
        lost = f"It broke off as it wrote, with --no-undo: the model must be copied again. Delete {work} before."
        return Status(f"{target}", "unfinished", what, (lost,))
    steps = [f"`ires resume {target}`, or the same command, goes on."]
    if operation.undo == "all" or (not done and operation.undo == "ring"):
        steps.append(back)
    return Status(f"{target}", "unfinished", what, tuple(steps))


def _of_mapped(target: Path, work: Path, phase: str, operation: Operation) -> Status:
    if phase in ("installing", "finished"):
        what = "what was written to its memory is durable; what is left is to give the files their places"
        return Status(f"{target}", "unfinished", what, (f"`ires resume {target}` does that.",))
    if phase != "operation":
        what = "its old bytes are being put back"
        return Status(f"{target}", "rolling back", what, (f"`ires rollback {target}` goes on.",))
    what = f"{unclosed(operation)}; the model is in {work}"
    return Status(f"{target}", "unfinished", what, (way_out(target, work, operation),))


def unclosed(operation: Operation) -> str:
    """What became of a model that `mapped` has opened for writing, in words."""
    kept = "with a copy of its old bytes" if operation.undo == "all" else 'with undo="none"'
    return f"was opened for writing by ik.mapped {kept}, and not closed"


def way_out(target: Path, work: Path, operation: Operation) -> str:
    """What to do about that."""
    if operation.undo == "all":
        return f"`ires rollback {target}` puts the old bytes back."
    return f"Nobody knows which of its bytes are new: delete {work} and copy the model again."
