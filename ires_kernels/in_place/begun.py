"""An update in place that has begun: its files by name, the operation, its journal, and what forbids going on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.files import transfer
from ires_kernels.files.durable import boot_id
from ires_kernels.files.inplace import LostError, Workplace
from ires_kernels.files.journal import AHEAD, Journal, JournalError, UndoGone
from ires_kernels.files.opening import MAX_MANIFEST, read_bytes
from ires_kernels.files.ownership import StoreError, open_folder
from ires_kernels.files.slots import Extent, Targets
from ires_kernels.records import provenance
from ires_kernels.records.operation import Operation
from ires_kernels.streaming.outcome import Outcome


def hidden_names(target: Checkpoint) -> list[str]:
    """The files by which loaders know the model."""
    names = [shard.path.name for shard in target.shards]
    if target.path.is_dir():
        names += [name for name in (target.index_name, "config.json") if name and (target.path / name).exists()]
    return names


def manifest_name(place: Workplace) -> str:
    return "ires.json" if place.folder == place.target else f"{place.target.name}.ires.json"


def sums_name(place: Workplace) -> str:
    return provenance.SUMS if place.folder == place.target else f"{place.target.name}.sha256"


def new_files(place: Workplace, operation: Operation) -> list[str]:
    """The files beside the weights that the update puts there."""
    return [*operation.installed, manifest_name(place), *([sums_name(place)] if operation.sha256 else [])]


def is_ours(place: Workplace, operation: Operation) -> Callable[[str], bool]:
    """Whether a side file is the one that the update has installed, and not what somebody made of it since."""

    def is_ours(name: str) -> bool:
        path = place.folder / name
        if path.is_symlink() or not path.is_file():
            return False
        if name in operation.installed:
            return provenance.hash_file(path) == operation.installed[name]["xxh3_128"]
        return name != manifest_name(place) or operation.id.encode() in read_bytes(path, MAX_MANIFEST)

    return is_ours


def take(target: Path, *, locked: bool = True) -> tuple[Workplace, Operation]:
    """Lock what an interrupted update has left. Raises StoreError where nothing had begun there, which is removed."""
    place = Workplace.take(target, locked=locked)
    try:
        if place.phase() is None:
            place.remove()
            raise StoreError(
                f"{target}: no update in place was under way. `ires status {target}` says what the model is."
            )
        return place, read_operation(place)
    except BaseException:
        place.close()
        raise


def read_operation(place: Workplace) -> Operation:
    """The operation of an update."""
    return Operation.from_bytes(place.read(), place.work)


def check_boot(place: Workplace, operation: Operation) -> None:
    """Refuse with StoreError an update of which nobody knows what has reached the disk: no fsync, and a restart."""
    if not operation.sync and operation.boot != boot_id():
        kept = operation.undo == "all" and place.phase() != "operation"
        way = f"`ires rollback {place.target}` gives it the old ones." if kept else f"{copy_again(place)}."
        raise (StoreError if kept else LostError)(
            f"{place.target}: the machine was restarted in the middle of an update with --no-sync, so its bytes may be "
            f"anything. {way}"
        )


def copy_again(place: Workplace) -> str:
    return f"Delete {place.work} and copy the model again"


def back(place: Workplace, operation: Operation) -> str:
    """What to do where an update that has begun cannot be gone on with."""
    if operation.undo == "all":
        return f"take the update back with `ires rollback {place.target}`"
    return f"delete {place.work} and copy the model again"


def check_passes(place: Workplace, operation: Operation, first: Outcome, second: Outcome) -> None:
    """Refuse what cannot be mended: codes of one file of an input, and scales that were found for those of another.

    first, second  what either pass over the inputs has learnt
    """
    for role, hashes in first.inputs.items():
        for key in hashes.keys() & second.inputs.get(role, {}).keys():
            if hashes[key] != second.inputs[role][key]:
                raise (StoreError if operation.undo == "all" else LostError)(
                    f"{place.target}: {key!r} of {operation.paths[role]} was another when it was read for the second "
                    f"time, so codes and scales do not belong together, whatever that is by now. To have the model as "
                    f"it was, {back(place, operation)}."
                )


@contextmanager
def refused(place: Workplace, what: str = "") -> Iterator[None]:
    """Say of which model a journal does not have what is needed, and what to do then."""
    try:
        yield
    except UndoGone as error:
        raise StoreError(f"{place.target}: {what}{error}. `ires resume {place.target}` finishes it.") from None
    except JournalError as error:
        raise LostError(f"{place.target}: {what}{error}. {copy_again(place)}.") from None


def check_files(work: Path, operation: Operation, where: Path) -> None:
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


def check_untouched(work: Path, operation: Operation, where: Path, done: int) -> None:
    """Raise JournalError where somebody has written to a file, now in the folder `where`, that no window has come to.

    done  windows that are new; of those that come next the journal may have written to AHEAD. Without undo it does not
          say how far it has come
    """
    if operation.undo == "none" or os.stat(work).st_ino != operation.hidden:  # a copy has times of its own
        return
    files = dict.fromkeys(file for file, _, _ in operation.windows)
    touched = {file for file, _, _ in operation.windows[: done + AHEAD]}
    for name in files.keys() - touched:
        then, now = operation.stamps["target"][name]["mtime_ns"], os.lstat(where / name).st_mtime_ns
        if now != then:
            seconds, rest = divmod(then, 10**9)
            raise JournalError(
                f"{where / name} was written since the update began, which has not come to it yet: somebody has "
                f"changed it. If nothing but its time is another, `touch -d @{seconds}.{rest:09} "
                f"{shlex.quote(f'{where / name}')}` gives it the old one, and `ires resume` goes on; otherwise its "
                "bytes are not those of the model"
            )


@contextmanager
def opened_journal(work: Path, operation: Operation, where: Path, *, new: bool = False) -> Iterator[Journal]:
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

        def open_file(name: str) -> int:
            with transfer.named(where / name):
                return os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)

        targets = Targets({window.file for window in windows}, open_file, sync=operation.sync)
        stack.callback(targets.close)
        journal = Journal(work, targets, windows, slots, operation.log_size, sync=operation.sync, new=new)
        stack.callback(journal.close)
        yield journal
