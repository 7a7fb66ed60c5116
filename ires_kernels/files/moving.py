"""Moves of an update in place: the model's files away and back, side files to where they belong and back.

Each can be done again: whoever takes up an interrupted one looks at where the files are.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ires_kernels.files import trust
from ires_kernels.files.durable import write_file
from ires_kernels.files.inplace import Workplace
from ires_kernels.files.ownership import StoreError


def move_in(place: Workplace, names: Iterable[str]) -> None:
    """Hide the files of the model."""
    _move(place, place.folder, place.model, names)


def move_out(place: Workplace, names: Iterable[str]) -> None:
    """Give the files of the model back."""
    _move(place, place.model, place.folder, names)


def _move(place: Workplace, source: Path, target: Path, names: Iterable[str]) -> None:
    with place.here():
        for name in names:
            if (source / name).exists():
                if (target / name).exists():
                    whose = trust.stranger(os.lstat(target / name))
                    raise StoreError(
                        f"{source / name} and {target / name} are both there, and one of them is the file that is "
                        f"updated. Move the other one elsewhere{whose and f', or have it removed: it {whose}'}."
                    )
                _rename(source / name, target / name)
        place.make_durable(*(folder for folder in (target, source) if folder.exists()))


def stage(place: Workplace, name: str, chunks: Iterable[bytes], mode: int = 0o666) -> None:
    """Keep a side file for `install`. `name` may have folders in it."""
    path = place.work / "new" / name
    with place.here():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of a run that was interrupted
        write_file(path, chunks, sync=place.sync, mode=mode)
        place.make_durable(*_folders(place.work, path), place.work)


def install(place: Workplace, names: Iterable[str], dropped: Iterable[str] = ()) -> None:
    """Put staged files where they belong. What they replace, and the `dropped` files, go to old/."""
    dropped = list(dropped)
    with place.here():
        for name in [*names, *dropped]:
            there, new, old = place.folder / name, place.work / "new" / name, place.work / "old" / name
            if not os.path.lexists(new) and name not in dropped:
                continue  # it is there already
            _check_parents(place, there)
            if os.path.lexists(there) and not os.path.lexists(old):
                old.parent.mkdir(parents=True, exist_ok=True)
                _rename(there, old)
            if os.path.lexists(new):
                _take_after(new, old)
                there.parent.mkdir(parents=True, exist_ok=True)
                _rename(new, there)
                place.make_durable(*_folders(place.folder, there))
        _sync_below(place, "old")
        place.make_durable(place.folder)


def uninstall(place: Workplace, names: Iterable[str], dropped: Iterable[str], is_ours: Callable[[str], bool]) -> None:
    """Take `install` back. What has come in place of the files since, `is_ours` not being true of it, is kept."""
    dropped = list(dropped)
    with place.here():
        for name in [*names, *dropped]:
            there, new, old = place.folder / name, place.work / "new" / name, place.work / "old" / name
            theirs = place.work / "edited" / name
            if os.path.lexists(there) and not os.path.lexists(new) and not os.path.lexists(theirs):
                if name not in dropped:
                    to = new if is_ours(name) else theirs
                elif os.path.lexists(old):
                    to = theirs
                else:  # it is the old one, back already
                    to = None
                if to is not None:
                    _check_parents(place, there)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    _rename(there, to)
            if os.path.lexists(old):
                _check_parents(place, there)
                _rename(old, there)
            else:
                with suppress(OSError):  # there are other files in one, or it never was
                    for folder in _folders(place.folder, there):
                        folder.rmdir()
        _sync_below(place, "edited")
        place.make_durable(place.folder)


def _check_parents(place: Workplace, path: Path) -> None:
    """A side file goes into a folder of the model, and not through a link out of it."""
    for parent in _folders(place.folder, path):
        if parent.is_symlink():
            raise StoreError(f"{parent}: is a link, wanted a folder. Move it away, then go on.")


def _sync_below(place: Workplace, name: str) -> None:
    for folder, _, _ in os.walk(place.work / name):
        place.make_durable(Path(folder))


def _rename(source: Path, target: Path) -> None:
    """Move a file of the model; where the kernel refuses that, say whose file is there, or in its way."""
    try:
        os.rename(source, target)
    except PermissionError as error:
        for path in (source, target):
            whose = trust.stranger(os.lstat(path)) if os.path.lexists(path) else ""
            if whose:
                text = f"{error.strerror}: it {whose}, and came there meanwhile. Have it removed by them, then go on"
                raise OSError(error.errno, text, f"{path}") from None
        raise


def _folders(top: Path, path: Path) -> list[Path]:
    """The folders between `top` and a path in it, from the inside out."""
    return [folder for folder in path.parents if top in folder.parents]


def _take_after(new: Path, old: Path) -> None:
    """Give a file the mode and, where allowed, the owner of the one that it replaces."""
    if not old.is_symlink() and old.exists():
        status = old.stat()
        try:
            os.chmod(new, stat.S_IMODE(status.st_mode))
        except PermissionError:  # another user who shares the key has staged it
            return
        if (status.st_uid, status.st_gid) != (os.getuid(), os.getgid()):
            try:
                os.chown(new, status.st_uid, status.st_gid)
            except OSError as error:  # only root may give files away, and not to users that a container does not know
                if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
