"""What must be true of the bytes of the inputs before something is written, and still when all of them were read."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from ires_kernels.checkpoints import roles
from ires_kernels.checkpoints.checkpoint import FileId
from ires_kernels.checkpoints.header import CheckpointError, read_header
from ires_kernels.checkpoints.standins import sample
from ires_kernels.dtypes import FLOATS
from ires_kernels.files.ownership import StoreError
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Operand
from ires_kernels.streaming import companions, stream
from ires_kernels.streaming.outcome import Outcome
from ires_kernels.streaming.reader import all_file_ids, differing
from ires_kernels.streaming.tiles import Processors


def file_ids(plan: Plan) -> dict[Path, FileId]:
    """What the files of the inputs were when they were validated."""
    return all_file_ids(plan.inputs)


def compare(plan: Plan, current: Mapping[Path, FileId] | None = None) -> dict[str, dict[str, str]]:
    """Refuse tensors that would be copied, or left out, although instruct and base differ in them; returns digests.

    current  what the files were when they were opened, if the plan has another time for them
    """
    different, digests = differing(plan.comparisons, file_ids(plan) if current is None else current)
    if different:
        what = "tensors that are not floating point differ between instruct and base"
        advice = "Such values have no difference to add: leave them out with --skip."
        different = [each for each in different if each.inputs[0].dtype not in FLOATS] or different
        if different[0].inputs[0].dtype in FLOATS:
            what = "tensors that the target has no place for differ in instruct and base"
            advice = "Their difference would be lost: leave them out with --skip, if that is meant."
        lines = [f"cannot {plan.operation}: {what}:"]
        for name, _, (instruct, base) in different[:10]:
            lines.append(f"  {name!r} is {instruct.dtype} in {instruct.path}, and another in {base.path}")
        lines += [f"  and {len(different) - 10} more"] if len(different) > 10 else []
        raise CheckpointError(*lines, advice)
    return digests


def check_companions(plan: Plan) -> None:
    """Refuse quantized weights with scales that are no numbers, or 0, before anything is written."""
    found = companions.faults(plan.steps, file_ids(plan))
    if found:
        lines = [f"cannot {plan.operation}: quantized weights have scales that make no numbers of them:"]
        lines += [f"  {name!r} of {role}: {wrong}" for (role, name), wrong in list(found.items())[:10]]
        lines += [f"  and {len(found) - 10} more"] if len(found) > 10 else []
        raise CheckpointError(
            *lines,
            "Such modules were never calibrated, or their files are damaged: take another copy of that model, or leave "
            "them as they are with --skip.",
        )


def left_out(
    plan: Plan, processors: Processors, threads: int | None, current: Mapping[Path, FileId] | None = None
) -> Outcome:
    """Read what finds no place in the output, for its part of the update: tallies of it by name, and nothing else.

    current  what the files were when they were opened, if the plan has another time for them
    """
    share = plan.share
    if share is None or not share.left:
        return Outcome()
    found = stream.run(
        share.left,
        current or file_ids(plan),
        plan.rules,
        lambda *_: None,
        hashed=(),
        processors=processors,
        threads=threads,
    )
    return Outcome(tallies=found.tallies)


def read_residuals(plan: Plan, threads: int | None = None, current: Mapping[Path, FileId] | None = None) -> None:
    """Read what the plan needs of its residuals, to find damage before the first byte of a model changes.

    current  what the files were when they were opened, if the plan has another time for them
    """
    check_residuals(plan, {}, threads, current)


def check_read(
    plan: Plan,
    outcome: Outcome,
    compared: Mapping[str, dict[str, str]],
    processors: Processors,
    threads: int | None,
    current: Mapping[Path, FileId] | None = None,
) -> None:
    """When all tensors were read: add to the outcome what was read besides, and refuse residuals that are damaged.

    compared  what `compare` gave
    current   what the files were when they were opened, if the plan has another time for them
    """
    outcome.update(left_out(plan, processors, threads, current))
    outcome.update(Outcome(inputs=dict(compared)))
    check_residuals(plan, outcome.inputs, threads, current)


def check_residuals(
    plan: Plan,
    hashes: Mapping[str, Mapping[str, str]],
    threads: int | None = None,
    current: Mapping[Path, FileId] | None = None,
    only: Container[tuple[str, str]] | None = None,
) -> None:
    """Compare the tensors of residuals that the plan reads with the hashes that `extract` recorded.

    hashes   of what was read already, by role and name. Others are read here: of a tensor of which only runs were read
    current  what the files were when they were opened, if the plan has another time for them
    only     of the others those of these roles and names; None: all of them
    """
    for role, checkpoint in plan.inputs.items():
        if checkpoint.kind == "residual":
            recorded = checkpoint.manifest.tensors if checkpoint.manifest else {}
            known = hashes.get(role, {})
            used = dict.fromkeys(name for operand in plan.reads(role).values() for name in operand.tensors)
            asked = {name for name in recorded.keys() - known.keys() if only is None or (role, name) in only}
            unread = {name: checkpoint.tensors[name] for name in used if name in asked & checkpoint.tensors.keys()}
            hashed = stream.hashes(unread, current or checkpoint.file_ids, threads=threads)
            for name, found in {**known, **hashed}.items():
                wanted = recorded[name].xxh3_128 if name in recorded else found
                if found != wanted:
                    raise CheckpointError(
                        f"{checkpoint.tensors[name].path}: tensor {name!r} is damaged: its xxh3_128 is {found}, "
                        f"residual.json says {wanted}. Extract or copy the residual again."
                    )


def _readable(plan: Plan, role: str) -> dict[str, Operand]:
    """All that may have been read of an input, by key: its tensors, and what the steps read."""
    tensors = plan.inputs[role].tensors
    return {**{name: Operand(role, (ref,)) for name, ref in tensors.items()}, **plan.reads(role)}


def check_unchanged(
    plan: Plan,
    read: Mapping[str, Mapping[str, str]] | None = None,
    *,
    but: Container[str] = (),
    current: Mapping[Path, FileId] | None = None,
    only: Container[Path] | None = None,
    threads: int | None = None,
    advice: str = "Wait for its writer, then start again.",
) -> None:
    """Refuse inputs whose files are no longer those that were validated; not of the roles `but`, which we change.

    read     xxh3_128 of what was read of them, by role and name: where a file has got another name, a link or a mode,
             or was written and its time set back, its content tells which
    current  what they were when they were opened, if the plan has another time for them
    only     these files; None: all of them
    advice   what to do then
    """
    for role, checkpoint in plan.inputs.items():
        written, others = ([], []) if role in but else checkpoint.changed(current, only)
        touched = set(others)
        hashes = (read or {}).get(role, {})
        known = _readable(plan, role)
        refs = {key: each for key, each in known.items() if key in hashes and not touched.isdisjoint(each.paths)}
        headers = {shard.path: shard.header for shard in checkpoint.shards}
        written += [path for path in others if read_header(path) != headers[path]]
        if not written:
            found = stream.hashes(refs, current or checkpoint.file_ids, threads=threads)
            written += [refs[key].paths[0] for key, digest in found.items() if digest != hashes[key]]
        if written:
            raise CheckpointError(f"{written[0]}: changed while it was read. {advice}")


def check_begun(
    plan: Plan,
    samples: Mapping[str, Mapping[str, str]],
    outcome: Outcome,
    changed: Iterable[Path],
    current: Mapping[Path, FileId] | None = None,
    *,
    but: Container[str] = (),
    threads: int | None = None,
    back: str = "roll back",
) -> None:
    """Refuse with StoreError inputs that are not those with which an interrupted merge was begun; not the roles `but`.

    samples  of the files of then, by role and name, at the places that the plan's id chooses
    outcome  what that run has learnt of the tensors that it has read: in files that are not the very ones of then,
             those `changed`, they must have their hashes
    current  what the files were when they were opened, if the plan has another time for them
    back     what to do instead of going on
    """
    changed = set(changed)

    def is_of_then(role: str, path: Path) -> bool:
        known = {} if role in but else samples.get(role, {})
        return known.get(path.name) in (None, sample(path, plan.id))

    refs = {
        f"{role} {key}": each
        for role in plan.inputs
        for key, each in _readable(plan, role).items()
        if key in outcome.inputs.get(role, {}) and not changed.isdisjoint(each.paths)
    }
    now = file_ids(plan) if current is None else current
    for name, digest in stream.hashes(refs, now, threads=threads).items():
        role, _, key = name.partition(" ")
        if digest == outcome.inputs[role][key]:
            continue
        path = next(path for path in refs[name].paths if path in changed)
        if is_of_then(role, path):
            raise StoreError(
                f"{path}: its tensor {refs[name].text!r} is not what the interrupted run has read, though by a sample "
                f"this is the file of the {role} that it was begun with. If it was changed since then, put that one "
                f"back. If it was another one while it was read, what is new was made of that: {back}."
            )
        raise StoreError(
            f"{path}: is not the file of the {role} that this was begun with: its tensor {refs[name].text!r} is "
            f"another. Put that one back, then go on; or {back}."
        )
    for role, checkpoint in plan.inputs.items():
        for shard in checkpoint.shards:
            if not is_of_then(role, shard.path):
                kind = "residual" if roles.is_residual(role) else f"{role} model"
                raise StoreError(
                    f"{shard.path}: is not the file of the {kind} that this was begun with, but has other bytes. "
                    f"Put that one back, then go on; or {back}."
                )
