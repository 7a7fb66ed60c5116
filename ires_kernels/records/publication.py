"""Output for others to have: its manifest without what tells of this machine, and what of its folder to upload.

A manifest has where its inputs lie, and when their files were written where on which disk: by that, the same command is
told from another without reading them again. Others have no use for it. In their place come the ids of models on the
Hub, at their commits, and the names of folders; digests, sizes and samples of the bytes stay, and so does all else.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ires_kernels.checkpoints import hub, manifest
from ires_kernels.checkpoints.addresses import is_address
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.files import trust
from ires_kernels.files.durable import fsync_all, replace_file
from ires_kernels.files.plain import several, size, table
from ires_kernels.planning.inputs import StrPath
from ires_kernels.records import card, provenance

_MANIFESTS = ("ires.json", "residual.json")
_ENDING = ".ires.json"
"""Of the manifest of a file that was updated in place."""
_OURS = ".ires-"
"""What the names of files begin with that are nobody's but this package's."""


@dataclass(frozen=True)
class Publication:
    """What `publish` did; ``print(publication)`` tells a person."""

    out: Path
    names: dict[str, str]
    """What each input is called in the manifest now, by role."""
    upload: tuple[str, ...]
    """The files of the folder that make it up."""
    bytes_to_upload: int
    private: tuple[str, ...]
    """What else is in the folder, and is not to be uploaded."""
    picture: str = ""
    """The one of the card: its name, or why there is none."""

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return {**asdict(self), "out": f"{self.out}"}

    def __str__(self) -> str:
        rows = [("output", f"{self.out}")]
        rows += [(role, name) for role, name in self.names.items()]
        rows.append(("upload", f"{several(len(self.upload), 'file')}, {size(self.bytes_to_upload)}"))
        rows += [("keep here", name) for name in self.private]
        if {card.NAME, card.BESIDE} <= {*self.upload}:
            rows.append(("card", f"{card.NAME} is the target's, {card.BESIDE} that of the merge: make one of the two"))
        rows += [("picture", self.picture)] if self.picture else []
        exclude = f" --exclude '{_OURS}*'" if self.private else ""
        upload = f"`hf upload USER/NAME {shlex.quote(f'{self.out}')} .{exclude}`"
        has_card = not {card.NAME, card.BESIDE}.isdisjoint(self.upload)
        rows.append(("next", f"complete the card, then {upload}" if has_card else upload))
        return table(rows)


def publish(
    out: StrPath,
    check: Callable[[Checkpoint, Manifest], None],
    draw: Callable[[Path, Manifest], str],
    *,
    follow_links: bool = False,
) -> Publication:
    """Take out of an output's manifest what tells of this machine, and say what of its folder to upload.

    check  refuses weights that are not those that the manifest tells of
    draw   makes the picture of the card of a folder, and returns its name or why there is none

    Raises CheckpointError where there is none, or where the output is not complete.
    """
    hub.check_local(out, "Have a copy of it on this disk, and publish that.")
    checkpoint = open_checkpoint(out, follow_links=follow_links)
    if hub.repo_of(checkpoint.path) is not None:
        raise CheckpointError(f"{out}: is in the Hub's cache, which is never written. It is published already.")
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if checkpoint.manifest is None:
        raise CheckpointError(
            f"{checkpoint.path}: has no ires.json or residual.json, so nothing in it tells of this machine. Wanted the "
            "output of a merge."
        )
    check(checkpoint, checkpoint.manifest)
    if checkpoint.manifest.unsynced:  # which tells when this machine was started
        fsync_all(checkpoint.path)
    own = f"{checkpoint.path.name}{_ENDING}"
    names: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name == own or (checkpoint.path.is_dir() and (path.name in _MANIFESTS or path.name.endswith(_ENDING))):
            found = manifest.read(path)
            if found is not None:
                told = public(found.table)
                replace_file(path, provenance.as_text(trust.signed("manifest", told) if found.is_mine else told))
                names = names or _names(found.table.get("inputs", {}))
    picture = draw(folder, checkpoint.manifest) if checkpoint.path.is_dir() else ""
    there = [path.relative_to(folder) for path in _files(folder)]
    upload = [path for path in there if not path.parts[0].startswith(_OURS)]
    private = sorted({path.parts[0] for path in there if path.parts[0].startswith(_OURS)})
    total = sum((folder / path).stat().st_size for path in upload)
    return Publication(checkpoint.path, names, tuple(map(str, upload)), total, tuple(private), picture)


def public_copy(folder: Path, place: Path) -> None:
    """Fill an empty folder with links to the files of another one, and with its manifest as `publish` would leave it.

    For an upload of what stays as it is.
    """
    for path in _files(folder):
        inner = path.relative_to(folder)
        if inner.parts[0].startswith(_OURS):
            continue
        (place / inner).parent.mkdir(parents=True, exist_ok=True)
        found = manifest.read(path) if inner.name in _MANIFESTS and len(inner.parts) == 1 else None
        if found is None:
            (place / inner).symlink_to(path.absolute())
        else:
            told = public(found.table)
            (place / inner).write_bytes(provenance.as_text(trust.signed("manifest", told) if found.is_mine else told))


def public(table: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest in JSON types, unsigned, without what tells of the machine where it was made."""
    told = {key: value for key, value in table.items() if key not in (trust.SIGNATURE, "unsynced")}
    told |= _made_of(table)
    if isinstance(table.get("in_place"), Mapping):
        history = [{**entry, **_made_of(entry)} for entry in table["in_place"].get("history", ())]
        files = {name: _lasting(stamp) for name, stamp in table["in_place"].get("files", {}).items()}
        told["in_place"] = {**table["in_place"], "files": files, **({"history": history} if history else {})}
    return told


def _made_of(table: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs and rules of a merge."""
    told: dict[str, Any] = {}
    if isinstance(table.get("inputs"), Mapping):
        names = _names(table["inputs"])
        told["inputs"] = {role: {**entry, "path": names[role]} for role, entry in table["inputs"].items()}
        for entry in told["inputs"].values():
            if "files" in entry:
                entry["files"] = {name: _lasting(stamp) for name, stamp in entry["files"].items()}
    rules = table.get("rules")
    if isinstance(rules, Mapping) and rules.get("recipe"):
        known = [f"{entry.get('path', '')}" for entry in table.get("inputs", {}).values()]
        told["rules"] = {**rules, "recipe": card.without_paths(rules["recipe"], known)}
    return told


def _lasting(stamp: Mapping[str, Any]) -> dict[str, Any]:
    return {key: stamp[key] for key in ("size", "sample") if key in stamp}


def _names(inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What to call each input: a model on the Hub by id and commit, others as their folders; no two of them alike."""
    names: dict[str, str] = {}
    owners: dict[str, str] = {}
    for role, entry in inputs.items():
        path = f"{entry.get('path', '')}"
        repo = hub.repo_of(path)
        name = f"{repo}" if repo else path.rstrip("/").rpartition("/")[2] or role
        if repo is None and hub.is_remote(path) and not is_address(path):  # streamed, or published before
            name = path.rpartition("://")[2]
        if owners.setdefault(name, path) != path:
            name = f"{name}-{role}"
        names[role] = name
    return names


def _files(folder: Path) -> Iterable[Path]:
    """The regular files of a folder, in order."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from (path for name in sorted(names) if (path := Path(place, name)).is_file())
