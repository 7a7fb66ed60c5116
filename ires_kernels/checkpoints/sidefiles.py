"""The files beside the weights: what there is in a folder, and what of it an output holds as it is or made anew."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId
from ires_kernels.checkpoints.filenames import ADAPTER, OURS, TEMPLATES, group_of, is_weights
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files import transfer
from ires_kernels.files.opening import MAX_CONFIG, kind_of_file, open_file, read_bytes
from ires_kernels.files.transfer import Hasher

_DEPTH = 16  # folders within each other


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of the output that is a copy of `source`, from the input `role`. `name` may have folders in it."""

    name: str
    source: Path
    role: str
    file_id: FileId
    """What `source` was when it was chosen."""
    why: str = ""
    """Why it is this parent's, where that is not the rule."""
    content: bytes | None = None
    """What the output holds in place of the bytes of `source`, from which it is made."""

    def read(self) -> bytes:
        """All of its bytes, of settings, templates or code. Raises CheckpointError where they are too many for that."""
        return read_bytes(self.source, MAX_CONFIG) if self.content is None else self.content

    def is_at(self, path: Path) -> bool:
        """Whether a file has these bytes already."""
        size = self.file_id.size if self.content is None else len(self.content)
        if not path.is_file() or path.stat().st_size != size:
            return False
        return read_bytes(path, size) == (self.content or read_bytes(self.source, size))


def rows(files: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """What comes from whom, for people; `files` are names, roles and why."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, role, why in files:
        grouped.setdefault((role, why), []).append(name)
    return [
        (f"from {role}", ", ".join(names) + (f" ({why})" if why else ""))
        for (role, why), names in sorted(grouped.items(), key=lambda item: item[0])
    ]


def chunks(side: SideFile, hasher: Hasher) -> Iterator[bytes]:
    """A side file by pieces, hashed on the way. Raises CheckpointError where it is not the one that was chosen."""
    if side.content is not None:
        hasher.update(side.content)
        yield side.content
        return
    fd = open_file(side.source)
    try:
        if FileId.of(fd).is_unwritten(side.file_id):
            yield from transfer.chunks(side.source, hasher, fd)
        if not FileId.of(fd).is_unwritten(side.file_id):
            raise CheckpointError(f"{side.source}: changed after it was looked at. Wait for its writer, then repeat.")
    finally:
        os.close(fd)


def listing(checkpoint: Checkpoint) -> tuple[dict[str, Path], list[str]]:
    """Copyable files of a folder by name, and the names of what is there besides weights and hidden files."""
    folder = checkpoint.path
    if not folder.is_dir():
        return {}, []
    files: dict[str, Path] = {}
    left: list[str] = []
    weights = {shard.path.name for shard in checkpoint.shards} | {checkpoint.index_name} | OURS
    # What updates in place of a single file recorded beside it: of that file, and not of what becomes of it.
    weights |= {f"{shard.path.name}{suffix}" for shard in checkpoint.shards for suffix in (".ires.json", ".sha256")}
    for name in sorted(set(os.listdir(folder)) - weights):
        path = folder / name
        if name.startswith("."):
            continue
        if name == TEMPLATES and path.is_dir():
            files.update((f"{name}/{child.name}", child) for child in sorted(path.glob("*.jinja")) if child.is_file())
        elif path.is_file() and not is_weights(name) and name != ADAPTER:
            files[name] = path
        elif path.is_symlink() and not path.exists() and group_of(name) != "model":
            raise CheckpointError(
                f"{path}: is a link to {os.path.realpath(path)}, which is not there. Download it again, or delete it."
            )
        elif not path.is_dir() and not path.is_file() and group_of(name) != "model":
            raise CheckpointError(f"{path}: is {kind_of_file(path.stat().st_mode)}, wanted a regular file. Delete it.")
        else:
            left.append(f"{name}/" if path.is_dir() else name)
    return files, left


def tree(folder: Path, part: str) -> dict[str, Path]:
    """The module `part` of a folder, and all files of its sub-folder of that name, hidden ones apart.

    Raises CheckpointError for what cannot be copied, which would be missing in the output.
    """
    top = folder / part
    try:
        found = {f"{part}.py": folder / f"{part}.py"} if (folder / f"{part}.py").is_file() else {}
        if part.startswith(".") or part == TEMPLATES or not top.is_dir():
            return found
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return {}  # a text with a slash in it, and no path
    for place, folders, names in os.walk(top):
        inner = Path(place).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        links = [name for name in folders if (folder / inner / name).is_symlink()]
        if links or len(inner.parts) > _DEPTH:
            what = (
                f"has more than {_DEPTH} folders within each other" if not links else f"{links[0]} is a linked folder"
            )
            raise CheckpointError(f"{folder / inner}: {what}. Put what is needed of it into a folder without that.")
        for name in sorted(names):
            path = folder / inner / name
            if name.startswith("."):
                continue
            if not path.is_file():
                what = kind_of_file(path.stat().st_mode) if path.exists() else "a link to something that is gone"
                raise CheckpointError(f"{path}: is {what}, wanted a regular file. Delete it.")
            found[f"{inner / name}"] = path
    return found
