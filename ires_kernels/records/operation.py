"""What it takes to go on with an interrupted merge: the command, as it lies beside the unfinished output."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ires_kernels.checkpoints.addresses import is_elsewhere
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.standins import sample
from ires_kernels.files import trust
from ires_kernels.files.durable import boot_id
from ires_kernels.files.hidden import SEAL
from ires_kernels.files.ownership import is_bare, is_inner, unproved
from ires_kernels.planning.inputs import StrPath, absolute
from ires_kernels.planning.layout import Layout
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import Rules
from ires_kernels.version import VERSION

MAPPED = "mapped"
"""The kind of operation in which nobody knows what is written: see writing.py."""
UNDO = ("ring", "all", "none")
"""What an update in place keeps of the old bytes: what an interruption needs, all of them, nothing."""


@dataclass(frozen=True)
class Operation:
    """A merge as it was asked for and planned."""

    id: str
    """Plan.id."""
    version: str
    """Of this package."""
    kind: str
    """apply, extract or MAPPED"""
    paths: dict[str, str]
    """By role, absolute."""
    rules: dict[str, Any]
    """Rules.to_dict."""
    sync: bool = True
    sha256: bool = False
    compare: bool = False
    tag: str = ""
    follow_links: bool = False
    """Whether files of the inputs may be links out of their folders."""
    boot: str = field(default_factory=boot_id)
    """Bytes that were not synced are trusted as long as this is the machine's boot_id."""
    outputs: dict[str, int] = field(default_factory=dict)
    """Of a new folder, the sizes of its weights, by name."""
    # of an update in place
    undo: str = "ring"
    recipe: str = ""
    """As id, but the same before and after the target has changed."""
    names: list[str] = field(default_factory=list)
    """Files of the target that are hidden."""
    stamps: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """FileId of the weights of all inputs when it began, by role and name."""
    samples: dict[str, dict[str, str]] = field(default_factory=dict)
    """And a sample of each, at the places that `id` chooses."""
    hidden: int = 0
    """Inode of the hidden folder: who has copied all of an unfinished update has another."""
    log_size: int = 0
    """Bytes that are reserved for the log."""
    sizes: dict[str, int] = field(default_factory=dict)
    """How the windows are cut, where it is not the usual way."""
    windows: list[list[Any]] = field(default_factory=list)
    """(file, start, stop) of everything that changes, in order."""
    scales: str = ""
    """xxh3_128 of the file with the scales of a quantized target, old and new; "" where none change."""
    copies: dict[str, str] = field(default_factory=dict)
    """Second copies of the target's embedding, which can no longer be told from its bytes."""
    layouts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`Plan.layouts` in JSON types: what values said of tensors that change meanwhile."""
    installed: dict[str, dict[str, str]] = field(default_factory=dict)
    """Side files that come from other models: their origin and xxh3_128, by name."""
    ancestry: list[dict[str, Any]] = field(default_factory=list)
    """What the models had in common before the target changed."""
    dropped: list[str] = field(default_factory=list)
    """Files of the target that are no longer true beside the new ones."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """What was applied to the target in place before."""

    @classmethod
    def of(cls, plan: Plan, **more: Any) -> Operation:
        """What is to be kept of a plan that is about to be carried out; `more` of the fields by name."""
        return cls(
            plan.id, VERSION, plan.operation,
            absolute({role: checkpoint.path for role, checkpoint in plan.inputs.items()}),
            plan.rules.to_dict(),
            follow_links=any(checkpoint.follow_links for checkpoint in plan.inputs.values()),
            stamps=stamps_of(plan.inputs),
            samples={role: samples_of(checkpoint, plan.id) for role, checkpoint in plan.inputs.items()},
            layouts={role: layout.to_dict() for role, layout in plan.layouts.items()},
            **more,
        )  # fmt: skip

    def to_bytes(self) -> bytes:
        """As JSON, signed."""
        return trust.seal(SEAL, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def from_bytes(cls, raw: bytes, where: object) -> Operation:
        """What `to_bytes` wrote. Raises Foreign for what nothing proves to be ours, CheckpointError for other versions.

        where  the folder that it lies in
        """
        text = trust.unseal(SEAL, raw)
        if text is None:
            raise unproved(where)
        version: object = "another version"
        try:
            table = json.loads(text)  # not as strictly as what others wrote: paths may be no UTF-8
            version = table.get("version", version)
            wrong = [name for name, is_right in _CHECKS.items() if name in table and not is_right(table[name])]
            if wrong:
                raise ValueError(f"{', '.join(wrong)} of its record cannot be used")
            operation = cls(**table)
            Rules.from_dict(operation.rules)
        except (TypeError, ValueError, AttributeError, KeyError, RecursionError) as error:
            raise CheckpointError(
                f"{where}: was written by ires_kernels {version}: {error}. Go on with that version."
            ) from None
        return operation

    def known_layouts(self) -> dict[str, Layout]:
        """What belongs to tensors of other names or parts, by role."""
        return {role: Layout.from_dict(layout) for role, layout in self.layouts.items()}

    def is_asked_for(self, paths: Mapping[str, StrPath], rules: Rules, **options: object) -> bool:
        """Whether a command with these arguments means this operation."""
        same_rules = json.loads(json.dumps(rules.to_dict())) == self.rules
        same_options = all(getattr(self, name) == value for name, value in options.items())
        return absolute(paths) == self.paths and same_rules and same_options

    def __str__(self) -> str:
        roles = ", ".join(f"{role} {path}" for role, path in self.paths.items())
        return f"{self.kind} {self.id} of {roles}"


def _is_layout(value: object) -> bool:
    try:
        Layout.from_dict(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, KeyError, AttributeError):
        return False
    return True


def _is_table(value: object, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_right, value.values()))


def _is_list(value: object, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_right, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_time(value: object) -> bool:
    return type(value) is int


def _is_window(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and is_bare(value[0])
        and all(map(_is_count, value[1:]))
        and value[1] <= value[2]
    )


def _is_ancestry(value: object) -> bool:
    kinds = {"model": str, "base": str, "cosine": float, "distance": float, "matrices": int, "tensors": int}
    kinds |= {"relation": str, "equal": bool, "odd": dict}
    return isinstance(value, dict) and {key: type(each) for key, each in value.items()} == kinds


def _is_flag(value: object) -> bool:
    return type(value) is bool


_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("id", "version", "tag", "boot", "recipe", "scales"), _is_text),
    **dict.fromkeys(("sync", "sha256", "compare", "follow_links"), _is_flag),
    "kind": ("apply", "extract", MAPPED).__contains__,
    "undo": UNDO.__contains__,
    "paths": lambda value: _is_table(
        value, lambda path: _is_text(path) and (os.path.isabs(path) or is_elsewhere(path))
    ),
    "rules": lambda value: isinstance(value, dict),
    "names": lambda value: _is_list(value, is_bare),
    "stamps": lambda value: _is_table(value, lambda files: _is_table(files, lambda stamp: _is_table(stamp, _is_time))),
    "samples": lambda value: _is_table(value, lambda files: _is_table(files, _is_text)),
    **dict.fromkeys(("hidden", "log_size"), _is_count),
    "sizes": lambda value: _is_table(value, _is_count) and value.keys() <= {"window", "unit", "gap"},
    "windows": lambda value: _is_list(value, _is_window),
    "outputs": lambda value: _is_table(value, _is_count),
    "copies": lambda value: _is_table(value, _is_text),
    "layouts": lambda value: _is_table(value, _is_layout),
    "installed": lambda value: _is_table(value, lambda entry: _is_table(entry, _is_text)) and all(map(is_inner, value)),
    "dropped": lambda value: _is_list(value, is_inner),
    "ancestry": lambda value: _is_list(value, _is_ancestry),
    "history": lambda value: _is_list(value, lambda entry: isinstance(entry, dict)),
}
"""What is right for each key of a record. Files are named within their folder: an update touches nothing elsewhere."""


def stamps_of(inputs: Mapping[str, Checkpoint]) -> dict[str, dict[str, dict[str, int]]]:
    """FileId of the weights of all inputs, by role and name."""
    return {
        role: {path.name: file_id.stamp() for path, file_id in checkpoint.file_ids.items()}
        for role, checkpoint in inputs.items()
    }


def samples_of(checkpoint: Checkpoint, seed: str) -> dict[str, str]:
    """A `sample` of each of its weights, by name."""
    return {shard.path.name: sample(shard.path, seed) for shard in checkpoint.shards}


def other_files(inputs: Mapping[str, Checkpoint], stamps: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[Path]:
    """The weights of inputs that are not the very files of `stamps_of`, by any of their times or place on the disk."""
    return [
        path
        for role, checkpoint in inputs.items()
        for path, file_id in checkpoint.file_ids.items()
        if stamps.get(role, {}).get(path.name) != file_id.stamp()
    ]


def same_plan(operation: Operation, plan: Plan) -> None:
    """Refuse with CheckpointError to go on with inputs that are not those of the interrupted run."""
    if operation.version != VERSION:
        raise CheckpointError(
            f"the interrupted merge was begun by ires_kernels {operation.version}, and this is {VERSION}. "
            "Go on with that version, or roll back."
        )
    if operation.id != plan.id:
        paths = ", ".join(operation.paths.values())
        raise CheckpointError(
            f"the interrupted merge cannot be gone on with: its inputs are not what they were (now {plan.id}, then "
            f"{operation.id}). Restore the files of {paths} that were changed or replaced since, with their times; "
            "or roll back."
        )


def as_it_was(checkpoint: Checkpoint, stamps: Mapping[str, Mapping[str, int]]) -> tuple[Checkpoint, list[Path]]:
    """A checkpoint with the times that its files had when the operation began, so that it gives the same Plan.

    Also returns the files that are not the very ones of then, by any of their times or their place on the disk. Those
    of another size are left as they are.
    """
    shards, changed = [], []
    for shard in checkpoint.shards:
        known = stamps.get(shard.path.name, {})
        if known != shard.file_id.stamp() and known.get("size") == shard.file_id.size:
            changed.append(shard.path)
            shard = replace(shard, file_id=shard.file_id._replace(mtime_ns=known["mtime_ns"]))
        shards.append(shard)
    return replace(checkpoint, shards=tuple(shards)), changed
