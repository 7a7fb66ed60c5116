"""Who is who among the paths of a merge: target, instruct, base, residual, residual-1, … (checkpoints/roles.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from ires_kernels.checkpoints import roles, standins
from ires_kernels.checkpoints.addresses import Address, is_address, is_elsewhere
from ires_kernels.checkpoints.checkpoint import Checkpoint, Kind
from ires_kernels.checkpoints.folders import MERGE_ADAPTER
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.checkpoints.standins import shown
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.files.hidden import unfinished
from ires_kernels.planning.rules import ArgumentError

StrPath = str | os.PathLike[str]
Pair = tuple[StrPath, StrPath]
"""Of models: instruct and base."""

_ADVICE = {
    "model": "Residuals are added to models: give several of them to apply.",
    "residual": "Extract one from two models, or give both: --instruct and --base, in Python (instruct, base).",
}


def open_inputs(
    paths: Mapping[str, StrPath], *, follow_links: bool = False, dry_run: bool = False
) -> dict[str, Checkpoint]:
    """Open checkpoints by role. Refuses a residual where a model belongs, a model for a residual, unfinished output.

    dry_run  of models that are elsewhere no more than headers will be read
    """
    inputs = {}
    for role, path in paths.items():
        check_path(path, role)
        checkpoint = open_checkpoint(path, follow_links=follow_links)
        wanted = "residual" if roles.is_residual(role) else "model"
        check_adapter(checkpoint.kind, path, role)
        if checkpoint.kind != wanted:
            raise CheckpointError(f"{path}: is a {checkpoint.kind}, wanted a {wanted} as {role}. {_ADVICE[wanted]}")
        is_far = any(standins.far(shard.path) for shard in checkpoint.shards)
        inputs[role] = replace(checkpoint, is_unread=True) if dry_run and is_far else checkpoint
    return inputs


def roles_of_apply(
    target: StrPath, residual: StrPath | Sequence[StrPath] | Sequence[Pair], *, follow_links: bool = False
) -> dict[str, StrPath]:
    """Roles for one residual, several, a tuple of two models (instruct, base), or a list of such pairs."""
    check_path(target, "target")
    if isinstance(residual, (str, os.PathLike)):
        return {"target": target, "residual": residual}
    if not isinstance(residual, Sequence) or isinstance(residual, bytes):
        raise TypeError(
            f"residual is {type(residual).__name__} {brief(residual)}, wanted the path of a residual, a list of them, "
            "or the tuple of models (instruct, base), or a list of such tuples"
        )
    if any(isinstance(each, (tuple, list)) for each in residual):
        return {"target": target} | _roles_of_pairs(residual, follow_links)
    paths = cast(list[StrPath], list(residual))
    for i, path in enumerate(paths):
        check_path(path, f"residual[{i}]")
    kinds = [kind_of(path, follow_links=follow_links) for path in paths]
    for kind, path in zip(kinds, paths, strict=True):
        check_adapter(kind, path, "residual" if "residual" in kinds or len(paths) != 2 else "instruct or base")
    if kinds == ["model", "model"] and isinstance(residual, tuple):
        return {"target": target, **dict(zip(roles.of_pairs(1), paths, strict=True))}
    if not paths or "model" in kinds:
        given = ", ".join(f"{path} is a {kind}" for path, kind in zip(paths, kinds, strict=True)) or "nothing is given"
        raise ArgumentError(
            f"{given}; wanted one or more residual folders, or the pair of models (instruct, base): "
            "a tuple in Python, --instruct and --base on the command line; or several pairs: a list of tuples in "
            "Python, --pair INSTRUCT:BASE on the command line."
        )
    return {"target": target, **dict(zip(roles.of_residuals(len(paths)), paths, strict=True))}


def _roles_of_pairs(pairs: Sequence[object], follow_links: bool) -> dict[str, StrPath]:
    paths: list[StrPath] = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ArgumentError(
                f"residual[{i}] is {brief(pair)}, wanted a pair of models (instruct, base) as the others are: "
                "residuals are not mixed with pairs. Extract a residual from each pair, or give all as pairs."
            )
        for what, path in zip(("instruct", "base"), pair, strict=True):
            check_path(path, f"{what} of residual[{i}]")
            paths.append(path)
    named = dict(zip(roles.of_pairs(len(pairs)), paths, strict=True))
    for role, path in named.items():
        check_model(path, role, follow_links=follow_links)
    return named


def check_model(path: StrPath, role: str, *, follow_links: bool = False) -> None:
    """Refuse what is no model, or an adapter; a model that is being updated in place is one."""
    kind = kind_of(path, follow_links=follow_links)
    check_adapter(kind, path, role)
    if kind != "model":  # or two residuals would pass
        raise ArgumentError(f"{path}: is a {kind}, wanted a model as {role}.")


def check_adapter(kind: Kind, path: StrPath, role: str) -> None:
    """Refuse an adapter, which holds no weights but factors of an update: their sums are not sums of the updates."""
    if kind == "adapter":
        raise CheckpointError(f"{path}: is an adapter (LoRA or its kin), wanted a model as {role}. {MERGE_ADAPTER}")


def check_path(path: object, name: str) -> None:
    """Refuse what is no path. A path of bytes is none: names of files are text, in manifests as well."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} is {type(path).__name__} {brief(path)}, wanted a path as str or pathlib.Path")


def check_flags(**flags: object) -> None:
    """Refuse what is neither True nor False: it would be taken for one of them, and could not be read back."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {type(value).__name__} {brief(value)}, wanted True or False")


def kind_of(path: StrPath, *, follow_links: bool = False) -> Kind:
    """Whether this is a model or a residual; a model that is being updated in place is one."""
    return "model" if unfinished(Path(path)) else open_checkpoint(path, follow_links=follow_links).kind


def absolute(paths: Mapping[str, StrPath]) -> dict[str, str]:
    """The same paths from anywhere, links resolved; of models that are elsewhere the addresses, without secrets."""
    return {role: recorded(path, os.path.realpath) for role, path in paths.items()}


def recorded(path: StrPath, resolve: Callable[[StrPath], str] = os.path.abspath) -> str:
    """A path as it is written down."""
    if is_address(path):
        return f"{Address.of(path)}"
    text = shown(path)
    return text if is_elsewhere(text) else resolve(path)
