"""Where a new folder may be written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ires_kernels.files.ownership import StoreError
from ires_kernels.files.unfinished import partial_path


def check_destination(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse with StoreError to write the folder `out` where something is, or into one of the inputs."""
    if out.name in ("", "..") or out.suffix == ".safetensors":
        raise StoreError(f"{out}: the output is a new folder. Give it a name of its own.")
    if out.is_symlink():
        raise StoreError(f"{out}: is a symbolic link. Give the name of a new folder.")
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out}: is a file. Give the name of a new folder.")
    if out.exists() and os.listdir(out):
        raise StoreError(f"{out}: is not empty. Give the name of a new folder, or delete this one first.")
    if os.path.ismount(out):
        raise StoreError(f"{out}: is a mount point, which cannot be replaced. Give a new folder inside of it.")
    if out.exists() and not _is_replaceable(out):
        raise StoreError(
            f"{out}: belongs to another user, in a folder where only they can replace it. Give another name."
        )
    if not out.parent.is_dir():
        raise StoreError(f"{out}: its parent {out.parent} is not a folder. Create that one first.")
    place = Path(os.path.realpath(out))
    for path in inputs:
        real = Path(os.path.realpath(path))
        if place == real or real in place.parents:
            raise StoreError(f"{out}: lies in the input {path}. Give a folder outside of the inputs.")
        partial = partial_path(place)
        if partial == real or partial in real.parents:
            raise StoreError(f"{out}: the input {path} has the name that the unfinished output would get. Rename it.")


def _is_replaceable(path: Path) -> bool:
    """Whether a sticky folder lets us rename or replace what is in it."""
    parent, status = os.stat(path.parent), os.lstat(path)
    return not parent.st_mode & stat.S_ISVTX or os.geteuid() in (0, parent.st_uid, status.st_uid)
