"""The hidden folders that updates in place leave in or beside a model: their names, and whether they are ours.

A model's folder comes from elsewhere, or others can write to it, so such a name may be there before us. A hidden folder
is ours if its owner is who we are, if it is a real folder with real ones in it, and if its record, or before there is
one its lock, has our signature. What is in it is looked at here; inplace.py makes and changes it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from ires_kernels.files import trust
from ires_kernels.files.durable import fsync_folder, write_file
from ires_kernels.files.locks import lock
from ires_kernels.files.opening import MAX_MANIFEST, read_open
from ires_kernels.files.ownership import (
    Foreign,
    StoreError,
    check_owner,
    make_private,
    open_folder,
    open_own,
    private_mode,
    unproved,
)
from ires_kernels.files.unfinished import MARKER

SEAL = "operation"
"""What the signature of an update's record is for."""
PHASES = ("operation", "installing", "finished", "withdraw", "rollback", "restored")
"""How far an update got; see inplace.py."""
WORK, UNDO, REPLACED = ".ires-unfinished", ".ires-undo", ".ires-replaced"
TOKEN = "place", b"an update in place"
"""What is signed in the lock, so that what an update leaves is known to be ours before it has begun."""
FOLDERS = {"model", "new", "old", "edited", "copy"}
"""What an update has in its hidden folder besides files."""


def work_folder(target: Path) -> Path:
    """Where the files of an unfinished update of `target` are."""
    return beside(target, WORK)


def unfinished(target: Path) -> str | None:
    """How far an unfinished update of `target` got, one of PHASES; None where none of ours has begun."""
    try:
        work = work_folder(target)
        phase = phase_of(work)
        return phase if phase is not None and not why_not_ours(work) else None
    except (OSError, ValueError):  # whoever opens the model finds out why
        return None


def foreign(target: Path) -> dict[Path, str]:
    """What lies in or beside `target` as if it were the state of an update, and is not ours; and why, in a sentence."""
    try:
        places = [work_folder(target), *(path for _, path in numbered(target, UNDO))]
        found = {place: why_not_ours(place) for place in places if os.path.lexists(place)}
    except ValueError:  # no path at all
        return {}
    return {place: text for place, text in found.items() if text}


def unfinished_files(folder: Path) -> list[Path]:
    """The files in a folder that are updated each on its own, and are hidden there."""
    names = (path.name for path in folder.glob(f".?*{WORK}")) if os.path.isdir(folder) else ()
    found = (folder / name.removeprefix(".").removesuffix(WORK) for name in names)
    return sorted(path for path in found if unfinished(path))


def undo_folders(target: Path) -> list[Path]:
    """What --keep-undo kept of earlier updates, as far as it is ours; the last one last."""
    kept = [path for _, path in numbered(target, UNDO) if not why_not_ours(path)]
    return [path for path in kept if (path / "finished.json").exists()]


def adopt(target: Path, *, locked: bool = True) -> None:
    """Sign what an unfinished update has left, on the user's word that they began it: where its key is lost.

    Only of files of this user; and all that is in it is checked as always. Raises StoreError where nothing is.
    """
    place = work_folder(target)
    if not os.path.lexists(place):
        raise StoreError(f"{target}: nothing is there to be adopted: no update in place is unfinished.")
    at = open_hidden(place)
    try:
        check_owner(at, place, unsigned=True)
        make_private(at)
        fd = lock(place / MARKER, make=MARKER not in os.listdir(at), wanted=locked)
        try:
            phase = phase_of(place)
            if phase is not None:
                content = trust.reseal(SEAL, read_own(place / f"{phase}.json"))
                temporary = place / "operation.tmp"
                temporary.unlink(missing_ok=True)
                write_file(temporary, [content], sync=True, mode=private_mode(0o660))
                os.rename(temporary, place / f"{phase}.json")
            token = trust.sign(*TOKEN).encode()
            os.ftruncate(fd, len(token))
            os.pwrite(fd, token, 0)
            fsync_folder(place, needed=False)
        finally:
            os.close(fd)
    finally:
        os.close(at)


def read_record(folder: Path, phase: str = "finished") -> bytes:
    """What `Workplace.write` wrote, in one of `undo_folders` or a `work_folder`."""
    return read_own(folder / f"{phase}.json")


def phase_of(work: Path) -> str | None:
    return next((name for name in PHASES if (work / f"{name}.json").exists()), None)


def why_not_ours(place: Path) -> str:
    """Why a hidden folder is not one that an update of ours has left, in words; nothing where it is."""
    try:
        at = open_hidden(place)
        try:
            names = os.listdir(at)
            check_owner(at, place, unsigned=_is_unused(names))
        finally:
            os.close(at)
        if _is_unused(names):
            return ""
        if any((place / name).is_symlink() or not (place / name).is_dir() for name in FOLDERS & set(names)):
            return f"{unproved(place)}"
        for _ in range(3):  # a process that goes on with it renames its record
            phase = phase_of(place)
            if phase is None:
                if MARKER not in names:
                    return f"{place}: is in the way, and nothing that an update in place left. Move it or delete it."
                token = read_own(place / MARKER).decode(errors="replace")
                return "" if trust.is_mine(*TOKEN, token) else f"{unproved(place)}"
            try:
                raw = read_own(place / f"{phase}.json")
            except FileNotFoundError:
                continue
            return "" if trust.unseal(SEAL, raw) is not None else f"{unproved(place)}"
    except FileNotFoundError:  # it has just been finished
        return ""
    except Foreign as error:
        return f"{error}"
    except PermissionError as error:
        return f"{place}: what is in it cannot be looked at: {error.strerror}. Move it away or delete it."
    return ""


def open_hidden(place: Path) -> int:
    """Open a hidden folder. Raises Foreign where it is none, or closed to us."""
    try:
        return open_folder(place)
    except NotADirectoryError:
        raise unproved(place) from None
    except PermissionError:
        whose = trust.stranger(os.lstat(place))
        raise Foreign(
            f"{place}: {whose or 'cannot be opened'}. If an update in place is under way, wait for it to end; else "
            "have it removed by who owns it."
        ) from None


def _is_unused(names: Iterable[str]) -> bool:
    """Whether there is nothing in a hidden folder yet."""
    return set(names) <= {MARKER}


def read_own(path: Path) -> bytes:
    """A file of our own, all of it."""
    fd = open_own(path)
    try:
        return read_open(fd, MAX_MANIFEST, path)
    finally:
        os.close(fd)


def folder_of(target: Path) -> Path:
    return target if os.path.isdir(target) else target.parent


def beside(target: Path, suffix: str) -> Path:
    """A hidden name in a model folder, or beside a single file."""
    folder = folder_of(target)
    return folder / suffix if folder == target else folder / f".{target.name}{suffix}"


def numbered(target: Path, kind: str) -> list[tuple[int, Path]]:
    first = beside(target, kind)
    found = []
    for path in first.parent.glob(f"{glob.escape(first.name)}-*"):
        number = path.name[len(first.name) + 1 :]
        found += [(int(number), path)] if number.isdecimal() else []
    return sorted(found)
