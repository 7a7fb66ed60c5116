"""What was applied to a model in place before, as its manifest tells; and whether the model still is what that made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ires_kernels import manifest, stream
from ires_kernels.checkpoint import Checkpoint
from ires_kernels.opening import MAX_MANIFEST, read_bytes
from ires_kernels.plan import Plan
from ires_kernels.store import StoreError, boot_id


def applied(target: Checkpoint) -> list[dict[str, Any]]:
    """What was applied to this model, as long as its bytes are still the result of that; the last one last."""
    found: list[dict[str, Any]] = []
    for table in _manifests(target):
        entry = table.get("in_place")
        if isinstance(entry, dict) and is_doubtful(table) and not has_hashes(target, table):
            raise StoreError(
                f"{target.path}: was updated with --no-sync before the machine was restarted, and is not what that "
                "wrote. Copy the model again; or, if it was you who changed it since, delete its manifest first."
            )
        if isinstance(entry, dict) and unchanged(target, table):
            found += [*entry.get("history", []), manifest.history_entry(table)]
    return found


def repeated(plan: Plan, recipe: str, history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The entry of the history that is what `plan` would do; files are compared by size and time, or else by hash.

    Raises StoreError where that cannot be told.
    """
    for entry in history:
        if entry.get("recipe") == recipe:
            others = plan.inputs.keys() - plan.roles_of_target()
            same = [_is_same(plan, role, entry.get("inputs", {}).get(role, {})) for role in sorted(others)]
            if None in same:
                raise StoreError(
                    f"{plan.inputs['target'].path}: this looks like {entry.get('id')}, which was applied before, but "
                    "the files of the other models have other times now. To apply it once more, give it a --tag."
                )
            if all(same):
                return entry
    return None


def unchanged(target: Checkpoint, table: Mapping[str, Any]) -> bool:
    """Whether the model is what the manifest of an update in place says: by size and time, or else by all hashes."""
    recorded = table.get("in_place", {}).get("files", {})
    if not all(shard.path.name in recorded for shard in target.shards):
        return False
    if all(recorded[name] == stamp for name, stamp in manifest.stamps(target).items()):
        return True
    return has_hashes(target, table)


def replaceable(target: Checkpoint, table: Mapping[str, Any]) -> bool:
    """Whether all bytes of the model's files are those that an update in place has left, each in its place.

    By size and time; or else by all hashes, if there is one of every tensor, and the layout.
    """
    entry = table.get("in_place", {})
    if entry.get("files") == manifest.stamps(target):
        return True
    tensors = manifest.tensors(target)
    whole = all(tensors.get(name, {}).get("xxh3_128") for name in target.tensors)
    return whole and entry.get("layouts") == manifest.layouts(target) and has_hashes(target, table)


def is_doubtful(table: Mapping[str, Any]) -> bool:
    """Whether nobody knows if what the manifest tells of has reached the disk: no fsync, and a restart since."""
    return table.get("unsynced", "") not in ("", boot_id())


def has_hashes(target: Checkpoint, table: Mapping[str, Any]) -> bool:
    """Whether all tensors of which the manifest has a hash have that."""
    hashes = {name: entry.get("xxh3_128") for name, entry in table.get("tensors", {}).items()}
    found = stream.hashes({name: ref for name, ref in target.tensors.items() if hashes.get(name)}, target.file_ids)
    return bool(found) and all(hashes[name] == digest for name, digest in found.items())


def _is_same(plan: Plan, role: str, recorded: Mapping[str, Any]) -> bool | None:
    """Whether an input is the one that was recorded; None when nobody knows."""
    checkpoint = plan.inputs[role]
    if recorded.get("files") == manifest.stamps(checkpoint):
        return True
    if recorded.get("read") is None:
        return None
    refs = plan.reads(role)
    return bool(manifest.digest_of(refs.values(), stream.hashes(refs, checkpoint.file_ids)) == recorded["read"])


def _manifests(target: Checkpoint) -> list[Mapping[str, Any]]:
    """That of the model, and that of the same file under its other name: alone, or as the weights of its folder."""
    tables: list[Mapping[str, Any]] = [target.manifest or {}]
    if len(target.shards) == 1:
        file = target.shards[0].path
        other = file.with_name(f"{file.name}.ires.json") if target.path.is_dir() else file.with_name("ires.json")
        try:
            table = json.loads(read_bytes(other, MAX_MANIFEST))
        except (OSError, ValueError):
            return tables
        tables += [table] if isinstance(table, dict) else []
    return tables
