"""What may be updated in place, and whether its files can be moved; everything else is refused before it begins."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from ires_kernels.files import trust
from ires_kernels.files.hidden import folder_of, foreign, work_folder
from ires_kernels.files.inplace import Workplace
from ires_kernels.files.locks import InUse
from ires_kernels.files.ownership import Foreign, StoreError

_FIXED = (errno.EPERM, errno.EACCES, errno.EBUSY, errno.EXDEV)
"""What the kernel says of a file that may not be moved."""
_COPY = "Copy the model (`cp -rL`) and update the copy, or write a new folder with -o OUT."


def check(target: Path, names: Iterable[str]) -> None:
    """Refuse with StoreError to update these files of `target`, a model folder or a single file."""
    folder = folder_of(target)
    if target.is_symlink():
        raise StoreError(
            f"{target}: is a symbolic link to {os.path.realpath(target)}. Give that path, if it is the model to change."
        )
    cache = _hub_cache(target)
    if cache:
        raise StoreError(f"{target}: lies in the Hugging Face cache {cache}, whose files serve several models. {_COPY}")
    work = work_folder(target)
    strange = foreign(target)
    if work in strange:
        raise Foreign(strange[work])
    mounts = _mount_points()
    for path in (folder / name for name in names):
        if not _is_utf8(path.name):
            raise StoreError(f"{path!r}: its name is not UTF-8, and a manifest cannot tell it. Rename the file.")
        try:
            status = os.lstat(path)
        except FileNotFoundError:  # it was there when the model was read
            raise _gone(path, target) from None
        if stat.S_ISLNK(status.st_mode):
            raise StoreError(f"{path}: is a symbolic link to {os.path.realpath(path)}. {_COPY}")
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{path}: is no regular file. {_COPY}")
        if status.st_nlink > 1:
            raise StoreError(f"{path}: has {status.st_nlink} hard links, so other models change with it. {_COPY}")
        if not status.st_mode & 0o222:
            raise StoreError(f"{path}: is read-only. `chmod u+w` it, if it is to be changed.")
        if os.path.realpath(path) in mounts:  # also of a file of the same file system
            raise StoreError(f"{path}: is a mount point. {_COPY}")
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
        except PermissionError as error:
            raise StoreError(f"{path}: cannot be written: {error.strerror}. {_COPY}") from None
        except FileNotFoundError:
            raise _gone(path, target) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(f"{folder}: no permission to make files in it, which the journal needs. {_COPY}")


def _gone(path: Path, target: Path) -> InUse:
    """What another process does that begins at this moment."""
    return InUse(
        f"{path}: was moved or removed just now. `ires status {target}` says whether another process works there."
    )


def check_movable(place: Workplace, names: Iterable[str]) -> None:
    """Refuse with StoreError files of the model that cannot be moved away, before the first of them is.

    The kernel is asked to move each of them over a folder. It looks first at whether the file may be moved at all
    (sticky folders, flags such as `chattr +i`, mounts), and then refuses, because a folder is there.
    """
    mounts = _mount_points()
    for name in names:
        path = place.folder / name
        for parent in [parent for parent in path.parents if place.folder in parent.parents]:
            if os.path.lexists(parent) and (parent.is_symlink() or not parent.is_dir()):
                raise StoreError(f"{parent}: is no folder but a link or file, and {path.name} goes there. {_COPY}")
            if parent.is_dir() and not os.access(parent, os.W_OK | os.X_OK):
                raise StoreError(f"{parent}: no permission to replace {path.name} in it. {_COPY}")
        try:
            os.rename(path, place.work)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST):
                if error.errno not in _FIXED:
                    raise
                whose = trust.stranger(os.lstat(path))
                raise StoreError(
                    f"{path}: cannot be moved or replaced: {error.strerror}{whose and f' (it {whose})'}. {_COPY}"
                ) from None
        if os.path.realpath(path.parent) + "/" + path.name in mounts:
            raise StoreError(f"{path}: is a mount point. {_COPY}")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _mount_points() -> set[str]:
    try:
        table = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return set()
    fields = [line.split(" ")[4] for line in table.splitlines()]
    return {re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field) for field in fields}


def _hub_cache(target: Path) -> Path | None:
    """The cache of the Hugging Face Hub that `target` lies in, by its settings or by its looks."""
    real = Path(os.path.realpath(target))
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    settings = [os.environ.get("HF_HUB_CACHE"), os.environ.get("HUGGINGFACE_HUB_CACHE"), os.path.join(home, "hub")]
    for cache in (Path(os.path.realpath(path)) for path in settings if path):
        if cache in real.parents:
            return cache
    for parent in real.parents:
        if parent.name in ("snapshots", "blobs") and parent.parent.name.startswith(("models--", "datasets--")):
            return parent.parent.parent
    return None
