"""What must be true of the bytes of the inputs before something is written, and still when all of them were read."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path

from ires_kernels import ancestry, manifest, stream
from ires_kernels.checkpoint import Checkpoint, FileId
from ires_kernels.header import CheckpointError
from ires_kernels.plan import Plan
from ires_kernels.reader import differing
from ires_kernels.rules import Rules
from ires_kernels.steps import Step
from ires_kernels.stream import Outcome


def file_ids(plan: Plan) -> dict[Path, FileId]:
    """What the files of the inputs were when they were validated."""
    return {shard.path: shard.file_id for checkpoint in plan.inputs.values() for shard in checkpoint.shards}


def compare(plan: Plan) -> dict[str, dict[str, str]]:
    """Refuse tensors that would be copied, or left out, although instruct and base differ in them; returns digests."""
    different, digests = differing(plan.comparisons, file_ids(plan))
    if different:
        lines = [f"cannot {plan.operation}: tensors that are not floating point differ between instruct and base:"]
        for name, _, (instruct, base) in different[:10]:
            lines.append(f"  {name!r} is {instruct.dtype} in {instruct.path}, and another in {base.path}")
        lines += [f"  and {len(different) - 10} more"] if len(different) > 10 else []
        raise CheckpointError("\n".join([*lines, "Such values have no difference to add: leave them out with --skip."]))
    return digests


def strangers(inputs: Mapping[str, Checkpoint]) -> tuple[str, ...]:
    """Warnings of a target that looks as if it did not descend from the base of what is added to it."""
    if "base" in inputs:
        sketches: dict[str, object] = {"base": ancestry.sketch(inputs["base"])}
    else:
        residuals = {role: checkpoint for role, checkpoint in inputs.items() if role != "target"}
        sketches = {f"the base of {r}": (c.manifest or {}).get("ancestry") for r, c in residuals.items()}
    found = {role: ancestry.compare(inputs["target"], sketch) for role, sketch in sketches.items()}
    return tuple(each.warning(role) for role, each in found.items() if each is not None and not each.related)


def read_residuals(plan: Plan, threads: int | None = None) -> None:
    """Read what the plan needs of its residuals, to find damage before the first byte of a model changes."""
    refs = {
        (role, ref.name): ref
        for step in plan.steps
        for role, ref in zip(step.roles, step.inputs, strict=True)
        if role.startswith("residual") and not step.reason
    }
    steps = [
        Step(f"{role} {name}", ref.dtype, ref.shape, "copy", (role,), (ref,), file=f"{ref.path}", nbytes=ref.nbytes)
        for (role, name), ref in refs.items()
    ]
    check_residuals(plan, stream.run(steps, file_ids(plan), Rules(), lambda *_: None, threads=threads))


def check_residuals(plan: Plan, outcome: Outcome) -> None:
    """Compare what was read of residuals with the hashes that `extract` recorded."""
    for role, checkpoint in plan.inputs.items():
        if checkpoint.kind == "residual":
            recorded = manifest.tensors(checkpoint)
            for name, found in outcome.inputs.get(role, {}).items():
                wanted = recorded.get(name, {}).get("xxh3_128", found)
                if found != wanted:
                    raise CheckpointError(
                        f"{checkpoint.tensors[name].path}: tensor {name!r} is damaged: its xxh3_128 is {found}, "
                        f"residual.json says {wanted}. Extract or copy the residual again."
                    )


def check_unchanged(plan: Plan, *, but: Container[str] = ()) -> None:
    """Refuse inputs whose files are no longer those that were validated; not of the roles `but`, which we change."""
    for role, checkpoint in plan.inputs.items():
        if role not in but and (changed := checkpoint.changed()):
            raise CheckpointError(f"{changed[0]}: changed while it was read. Wait for its writer, then start again.")


def have_stamps(files: Mapping[str, Path], recorded: Mapping[str, list[int]]) -> bool:
    """Whether files have the sizes and mtime_ns that were recorded of them, and all of these are there."""
    found = {name: [file_id.size, file_id.mtime_ns] for name, path in files.items() if (file_id := FileId.of(path))}
    return all(found.get(name) == list(stamp) for name, stamp in recorded.items())
