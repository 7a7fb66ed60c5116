"""Whether a merge is unfinished, and what to do about it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ires_kernels.checkpoints import hub
from ires_kernels.checkpoints.addresses import Address, is_address
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.files import hidden
from ires_kernels.files.inplace import SCALES
from ires_kernels.files.locks import holder, holders
from ires_kernels.files.log import count_records, is_broken_off
from ires_kernels.files.ownership import Foreign
from ires_kernels.files.plain import plain_lines
from ires_kernels.files.unfinished import MARKER, is_unfinished, notes, partial_path, read_kept
from ires_kernels.planning.inputs import StrPath
from ires_kernels.records import headway, provenance
from ires_kernels.records.headway import Headway
from ires_kernels.records.history import on_top
from ires_kernels.records.operation import MAPPED, Operation
from ires_kernels.records.workers import told

_AT_WORK = "an update in place, or ik.mapped"
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
    details: tuple[str, ...] = ()
    """Which merge it is, and where its files are."""
    headway: Headway | None = None
    """Of what is unfinished, how much is done."""

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        return plain_lines(f"{self.path}: {self.state}: {self.what}", *self.details, *self.next)


@dataclass(frozen=True)
class Found:
    """What of merges lies at a path, asked once; who goes on with it asks again under its lock."""

    path: Path
    what: Literal["nothing", "new folder", "update", "left over", "foreign"]
    """Unfinished: an output, or an update in place or through `mapped`; what is left of one that is not under way."""
    where: Path
    """The folder of that."""
    phase: str | None = None
    """Of an update."""
    record: Operation | ValueError | None = None
    """The operation, or why it cannot be read."""
    theirs: tuple[str, ...] = ()
    """What is there, and is not ours: said, and not followed."""

    @property
    def operation(self) -> Operation:
        """What was begun. Raises why it cannot be read."""
        if isinstance(self.record, ValueError):
            raise self.record
        assert self.record is not None, f"{self.what}: nothing had begun"
        return self.record

    @property
    def is_mapped(self) -> bool:
        """Whether the model is, or was, open for writing through `mapped`."""
        return isinstance(self.record, Operation) and self.record.kind == MAPPED


def find(path: Path) -> Found:
    """Ask what is unfinished at a path: an output that is not there yet, or an update of a model."""
    partial = partial_path(path)
    if not is_unfinished(partial):
        return find_update(path)
    try:
        record: Operation | ValueError = Operation.from_bytes(read_kept(path), partial)
    except ValueError as error:
        record = error
    if not isinstance(record, Foreign) or not path.exists():
        return Found(path, "new folder", partial, record=record)
    found = find_update(path)
    return replace(found, theirs=(f"{record}", *found.theirs))


def find_update(path: Path) -> Found:
    """Ask what is unfinished of a model, whatever has its name with a suffix."""
    work, strange = hidden.work_folder(path), hidden.foreign(path)
    if work in strange:
        return Found(path, "foreign", work, theirs=tuple(strange.values()))
    if not os.path.lexists(work):
        return Found(path, "nothing", work, theirs=tuple(strange.values()))
    phase = hidden.phase_of(work)
    if phase is None:
        return Found(path, "left over", work)
    try:
        record: Operation | ValueError = Operation.from_bytes(hidden.read_record(work, phase), work)
    except ValueError as error:
        record = error
    return Found(path, "update", work, phase, record)


def status(path: StrPath) -> Status:
    """Look at a model, or at an output that is not there yet; changes nothing.

    >>> print(ik.status("target/"))
    target: none: nothing is unfinished, and no merge made it
    """
    if is_address(path):
        address = Address.of(path)
        return _of_store(address) or replace(_of_model(Path(hub.local(path))), path=f"{address}")
    path = Path(path)
    try:
        return _told(find(path))
    except FileNotFoundError:  # it went on between two looks
        return _told(find(path))


def _told(found: Found) -> Status:
    if found.what == "new folder":
        return _of_new_folder(found)
    if found.what in ("update", "left over"):
        return _of_update(found)
    model = _of_model(found.path)
    return replace(model, next=(*model.next, *found.theirs))


def _of_model(path: Path) -> Status:
    try:
        manifest = open_checkpoint(path, follow_links=True).manifest or Manifest()
    except CheckpointError:
        for file in hidden.unfinished_files(path):  # it is incomplete because of them
            return status(file)
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


def _of_new_folder(found: Found) -> Status:
    out, partial = found.path, found.where
    if isinstance(found.record, Foreign):
        return Status(f"{out}", "foreign", f"{found.record}")
    done, what = None, "a new folder"
    details: tuple[str, ...] = (f"It is in {partial}.",)
    steps = [f"`ires resume {out}`, or the same command, goes on."]
    if isinstance(found.record, Operation):  # else of another version, or not begun
        done = headway.of_new_folder(partial, found.record.outputs)
        what, details = f"{found.record.kind}, {done}", (f"It is {found.record}, in {partial}.",)
        if 0 < done.files_in_all == done.files_done:
            steps = [f"`ires finish {out}` adds what else belongs to it, and gives it its name."]
    details += told(notes(partial))
    who, together = holder(partial / MARKER), holders(partial / MARKER)
    if who:
        return Status(f"{out}", "running", f"{what}, by {who}", ("Wait for it to end.",), details, done)
    if together:
        return Status(f"{out}", "running", f"{what}, by {', '.join(together)}", ("Wait for all.",), details, done)
    steps.append(f"`ires rollback {out}` removes {partial}.")
    return Status(f"{out}", "unfinished", what, tuple(steps), details, done)


def _of_store(address: Address) -> Status | None:
    """Of an output that is unfinished under an address; None where none is."""
    from ires_kernels.checkpoints.prefix import Prefix  # with what asks stores, which takes a while to load
    from ires_kernels.records import elsewhere

    if not address.is_store or address.is_file:
        return None
    try:
        found = elsewhere.find(Prefix(address))
    except Foreign as error:
        return Status(f"{address}", "foreign", f"{error}")
    except CheckpointError as error:
        return Status(f"{address}", "unfinished", f"{error}")
    if found is None:
        return None
    done = found.headway
    return Status(
        f"{address}",
        "unfinished",
        f"{found.operation.kind}, {done}; or it is just being written, which a store does not tell",
        (
            f"`ires resume {address}`, or the same command, goes on; one that is at work comes to no harm by it.",
            f"`ires rollback {address}` removes it, where none is at work.",
        ),
        (f"It is {found.operation}.",),
        done,
    )


def _of_update(found: Found) -> Status:
    target, work, phase = found.path, found.where, found.phase
    who = holder(work / MARKER)
    if who:
        first = phase is None and (work / SCALES).exists()
        what = "the first pass of an update in place, which has changed nothing yet" if first else _AT_WORK
        return Status(f"{target}", "running", f"{what}, by {who}", ("Wait for it to end.",))
    if phase is None:
        model = _of_model(target)
        what = f"{model.what}; {work} is left of an update in place that never began, or has ended"
        return replace(model, what=what, next=(f"`ires rollback {target}` removes that.",))
    operation = found.operation
    if operation.kind == MAPPED:
        return _of_mapped(target, work, phase, operation)
    windows = count_records(work)
    done = headway.of_update(operation.windows, windows)
    what = f"{operation.kind} in place, {done} new"
    details: tuple[str, ...] = (f"It is {operation}. The model is in {work} until it is finished.",)
    back = f"`ires rollback {target}` takes it back."
    if phase in ("withdraw", "rollback", "restored"):
        return Status(f"{target}", "rolling back", what, (f"`ires rollback {target}` goes on.",), details, done)
    if operation.undo == "none" and phase == "operation" and is_broken_off(work):
        lost = f"It broke off as it wrote, with --no-undo: the model must be copied again. Delete {work} before."
        return Status(f"{target}", "unfinished", what, (lost,), details, done)
    steps = [f"`ires resume {target}`, or the same command, goes on."]
    if operation.scales and phase == "operation" and not provenance.has_hash(work / SCALES, operation.scales):
        details += (f"{work / SCALES} is gone or was changed, so it cannot go on.",)
        steps = []
    if operation.undo == "all" or (not windows and operation.undo == "ring"):
        steps.append(back)
    steps = steps or [f"The model must be copied again. Delete {work} before."]
    return Status(f"{target}", "unfinished", what, tuple(steps), details, done)


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
