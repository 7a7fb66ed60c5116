"""What must be true of the bytes of the inputs before something is written, and still when all of them were read."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
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


def check_unchanged(plan: Plan, *, but: Container[str] = (), current: Mapping[Path, FileId] | None = None) -> None:
    """Refuse inputs whose files are no longer those that were validated; not of the roles `but`, which we change.

    current  what they were when they were opened, if the plan has another time for them
    """
    for role, checkpoint in plan.inputs.items():
        if role in but:
            continue
        for shard in checkpoint.shards:
            if _now(shard.path) != (shard.file_id if current is None else current[shard.path]):
                raise CheckpointError(
                    f"{shard.path}: changed while it was read. Wait for its writer, then start again."
                )


def check_contents(plan: Plan, outcome: Outcome, changed: Iterable[Path], current: Mapping[Path, FileId]) -> None:
    """Refuse files of inputs that have other times than when an update began, if what was read of them is not there."""
    changed = set(changed)
    refs = {
        f"{role} {name}": checkpoint.tensors[name]
        for role, checkpoint in plan.inputs.items()
        for name in outcome.inputs.get(role, {})
        if name in checkpoint.tensors and checkpoint.tensors[name].path in changed
    }
    steps = [
        Step(name, ref.dtype, ref.shape, "copy", ("input",), (ref,), file=f"{ref.path}", nbytes=ref.nbytes)
        for name, ref in refs.items()
    ]
    found = stream.run(steps, current, Rules(), lambda *_: None).outputs
    for name, digest in found.items():
        role, _, tensor = name.partition(" ")
        if digest != outcome.inputs[role][tensor]:
            raise CheckpointError(
                f"{refs[name].path}: is not the file that the interrupted merge has read: its tensor {tensor!r} is "
                "another. Put that one back, then go on; or roll back."
            )


def _now(path: Path) -> FileId | None:
    try:
        return FileId.of(path)
    except OSError:
        return None
