"""Taking an update in place back: put all old bytes in their places, then show the files."""

from __future__ import annotations

from pathlib import Path

from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.files import hidden, inplace, movable, moving
from ires_kernels.files.inplace import Workplace
from ires_kernels.files.journal import JournalError
from ires_kernels.files.ownership import StoreError
from ires_kernels.in_place import begun
from ires_kernels.records import repetition
from ires_kernels.records.operation import Operation


def roll_back_update(target: Path, *, locked: bool = True) -> str:
    """Take back an update that is unfinished; returns what was done. Raises StoreError where that cannot be."""
    place = Workplace.take(target, locked=locked)
    try:
        return _roll_back(place)
    finally:
        place.close()


def _roll_back(place: Workplace) -> str:
    """Give the target the bytes that it had before; returns what was done."""
    if place.phase() is None:
        place.remove()
        return (
            f"{place.target}: nothing was taken back, as no update in place was under way; what was left of one is "
            f"removed. `ires status {place.target}` says what the model is."
        )
    operation = begun.read_operation(place)
    place.sync = operation.sync
    if place.phase() in ("installing", "finished") and operation.undo != "all":
        raise StoreError(
            f"{place.target}: all of it is new, and the old bytes were not kept. `ires resume {place.target}` finishes."
        )
    if place.phase() != "restored":
        ended = place.phase() not in ("operation", "withdraw")
        if not ended:  # else all old bytes are there, with their hashes, or it is refused
            begun.check_boot(place, operation)
        moving.move_in(place, operation.names)
        with (
            begun.refused(place, "cannot be rolled back: "),
            begun.opened_journal(place.work, operation, place.model) as journal,
        ):
            if not ended:  # else their bytes were looked at
                begun.check_files(place.work, operation, place.model)
            journal.check_restorable(ended=ended)
            if place.phase() == "operation":
                place.advance("withdraw")
            elif place.phase() in ("installing", "finished"):
                place.advance("rollback")
            journal.restore()
            journal.check_files(place.model)
        if place.phase() == "rollback":
            moving.uninstall(
                place, begun.new_files(place, operation), operation.dropped, begun.is_ours(place, operation)
            )
        moving.move_out(place, operation.names)
        place.advance("restored")
    kept = place.remove()
    edited = f" What you had edited since is in {kept}." if kept else ""
    return f"{place.target}: is what it was before {operation.kind} {operation.id}.{edited}"


def roll_back_kept(target: Path, *, locked: bool = True) -> str:
    """Take back the last update, whose old bytes were kept. Raises StoreError where it cannot be, changing nothing."""
    folders = hidden.undo_folders(target)
    if not folders:
        text = "nothing is unfinished there, and no update in place was kept to be taken back (--keep-undo does that)."
        raise StoreError(f"{target}: {text}", *hidden.foreign(target).values())
    operation = Operation.from_bytes(hidden.read_record(folders[-1]), folders[-1])
    checkpoint = open_checkpoint(target, follow_links=True)  # nothing of it is copied
    table = checkpoint.manifest
    last = table.in_place if table else None
    if table is None or last is None or (table.id, last.recipe) != (operation.id, operation.recipe):
        raise StoreError(
            f"{target}: {folders[-1]} keeps what {operation.kind} {operation.id} has changed, and that is not the last "
            "that was applied here: it cannot be taken back any more. Delete it."
        )
    if not table.is_mine:
        raise StoreError(
            f"{table.path}: is not signed with your key, or was edited since, so nobody knows whether the old bytes in "
            f"{folders[-1]} belong into {target} as it is. Put the manifest back that the update wrote."
        )
    if not repetition.replaceable(checkpoint, table):
        raise StoreError(
            f"{target}: was written since its update in place, or copied without its times (`cp -a` keeps them), and "
            f"cannot be rolled back: the old bytes in {folders[-1]} belong into the files as they were."
        )
    movable.check(target, operation.names)
    try:
        with begun.opened_journal(folders[-1], operation, target if target.is_dir() else target.parent):
            pass  # it is all there
    except JournalError as error:
        raise StoreError(f"{target}: cannot be rolled back: {error}. The model is as the update has left it.") from None
    place = inplace.take_undo(target, locked=locked)
    try:
        return _roll_back(place)
    finally:
        place.close()
