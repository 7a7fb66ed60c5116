"""The manifest that a merge leaves in its output: what it was made of, how, and the hash of every tensor.

``residual.json`` in a residual, ``ires.json`` in a merged model. Tensor hashes are xxh3_128 of the tensor's bytes; the
digest of a checkpoint is xxh3_128 of the sorted lines ``name dtype shape hash``, so equal tensors give equal digests
however they are split into files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from ires_kernels import names
from ires_kernels.checkpoint import Checkpoint
from ires_kernels.header import CheckpointError
from ires_kernels.plan import MANIFESTS, VERSION, Plan
from ires_kernels.report import Report
from ires_kernels.stream import Outcome

_ENTRY = {"dtype", "shape", "xxh3_128", "inputs"}


def build(plan: Plan, outcome: Outcome, report: Report, others: Mapping[str, dict[str, str]]) -> bytes:
    """The manifest as JSON text. `others` are the output's other files, by name, with their hash and origin."""
    entries = {
        step.name: {
            "dtype": step.dtype,
            "shape": list(step.shape),
            "xxh3_128": outcome.outputs[step.name],
            "inputs": {role: outcome.inputs[role][ref.name] for role, ref in zip(step.roles, step.inputs, strict=True)},
            **({"copied": step.reason} if step.reason else {}),
        }
        for step in plan.steps
    }
    table: dict[str, Any] = {
        "ires": VERSION,
        "operation": plan.operation,
        "id": plan.id,
        "digest": digest((step.name, step.dtype, step.shape, outcome.outputs[step.name]) for step in plan.steps),
        "inputs": {role: _input(checkpoint, outcome.inputs.get(role, {})) for role, checkpoint in plan.inputs.items()},
        "rules": plan.rules.to_dict(),
        "report": report.numbers(),
        "files": dict(others),
        "tensors": entries,
    }
    if plan.operation == "extract":
        table["tied"] = all(map(names.is_tied, plan.inputs.values()))
        table["not_stored"] = {
            name: {"reason": reason, "dtype": ref.dtype, "shape": list(ref.shape)}
            for name, (reason, ref) in plan.not_stored.items()
        }
    return (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def read(checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest that `build` wrote into a folder. Raises CheckpointError when there is none, or not such a one."""
    table = checkpoint.manifest
    if table is None or not checkpoint.path.is_dir():
        raise CheckpointError(f"{checkpoint.path}: has no ires.json or residual.json; wanted the output of a merge.")
    kinds = {"operation": str, "inputs": dict, "rules": dict, "files": dict, "tensors": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(table.get(key), kind)]
    wrong += [f"tensor {name}" for name, entry in tensors(checkpoint).items() if _ENTRY - entry.keys()]
    if wrong or table["operation"] not in MANIFESTS:
        raise CheckpointError(
            f"{checkpoint.path}: its manifest cannot be used, for {', '.join(wrong[:10]) or 'operation'}: it was not "
            "written by a merge, or edited since. Merge again."
        )
    return table


def tensors(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """What the manifest of a checkpoint says of its tensors, by name; nothing where there is none."""
    table = (checkpoint.manifest or {}).get("tensors")
    return {name: entry for name, entry in table.items() if isinstance(entry, dict)} if isinstance(table, dict) else {}


def digest(tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    """The digest of a checkpoint from (name, dtype, shape, xxh3_128) of all its tensors."""
    lines = sorted(f"{name} {dtype} {list(shape)} {hash_}\n" for name, dtype, shape, hash_ in tensors)
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())


def _input(checkpoint: Checkpoint, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Where an input was, and its digest if all of its tensors were read."""
    whole = hashes.keys() >= checkpoint.tensors.keys()
    refs = checkpoint.tensors.values()
    return {
        "path": os.path.abspath(checkpoint.path),
        "digest": digest((ref.name, ref.dtype, ref.shape, hashes[ref.name]) for ref in refs) if whole else None,
        "files": {
            shard.path.name: {"size": shard.file_id.size, "mtime_ns": shard.file_id.mtime_ns}
            for shard in checkpoint.shards
        },
    }
