"""Merging whole checkpoints: open, plan, stream, and keep the result only if everything went well."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from ires_kernels.checking import ancestry, guards
from ires_kernels.checking.verification import verify
from ires_kernels.checkpoints import configs, manifest, sidefiles
from ires_kernels.checkpoints.checkpoint import Checkpoint, is_shard
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.checkpoints.manifest import Numbers
from ires_kernels.files import hidden, interrupts
from ires_kernels.files.inplace import Workplace
from ires_kernels.files.ownership import Foreign
from ires_kernels.files.plain import plain
from ires_kernels.files.samples import sample
from ires_kernels.files.store import (
    NewFolder,
    StoreError,
    check_destination,
    discard,
    fsync_all,
    fsync_folder,
    is_unfinished,
    partial_path,
    read_kept,
    tidy,
)
from ires_kernels.in_place import overwrite
from ires_kernels.in_place.overwrite import Options
from ires_kernels.memory import writing
from ires_kernels.planning.inputs import StrPath, absolute, check_flags, check_path, open_inputs, roles_of_apply
from ires_kernels.planning.plan import MANIFESTS, VERSION, Plan, plan_apply, plan_extract
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.steps import Step
from ires_kernels.records import provenance, repetition
from ires_kernels.records.operation import MAPPED, UNDO, Operation, other_files, same_plan, stamps_of
from ires_kernels.records.report import Report
from ires_kernels.records.state import Status, status, unclosed, way_out
from ires_kernels.records.summary import inspect
from ires_kernels.streaming import stream
from ires_kernels.streaming.outcome import Outcome
from ires_kernels.streaming.reader import second_copies
from ires_kernels.streaming.stream import Progress
from ires_kernels.streaming.windows import processors_on

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Status", "apply", "extract", "inspect", "load", "resume", "rollback", "status", "verify"]

Factors = Iterable[tuple[str, float | Sequence[float]]] | Mapping[str, float | Sequence[float]]


def extract(
    base: StrPath,
    instruct: StrPath,
    out: StrPath,
    *,
    dtype: str = "f32",
    skip: Iterable[str] | str = (),
    allow_missing: bool | str = False,
    rounding: str = "nearest",
    seed: int = 0,
    sync: bool = True,
    sha256: bool = False,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    follow_links: bool = False,
    lock: bool = True,
) -> Report | Plan:
    """Write instruct - base, the instruction residual (Jindal et al., arXiv 2410.10739), into the new folder `out`.

    >>> report = ik.extract("base/", "instruct/", "residual/")
    >>> report.tensors, report.counts.lost
    (7, 0)

    dtype          of the residual: f32 loses nothing of a bf16 or f16 pair beyond one rounding; bf16 and f16 are half
                   the size; f64
    skip           regular expressions found in the names of tensors to leave out
    allow_missing  leave out tensors that only one of the two models has, which is an error otherwise; up to a tenth of
                   what the residual would hold, or with "any" whatever there is
    rounding, seed as in the tensor operations; every tensor draws its own random bits
    sync           False does without waiting for the disk, and so without surviving a power cut
    sha256         also write sha256 sums of the weights into SHA256SUMS and the manifest
    device         cpu, or a GPU such as cuda or cuda:1 to compute on: the same weights, and slower, for the files come
                   from and go to the CPU's memory. A GPU pays where the result stays on it, as with `load`
    threads        None: one per CPU, 8 at most; on a machine with 16 more than 8 were slower
    progress       called as progress(bytes_done, bytes_in_all) about ten times a second
    dry_run        return the Plan and write nothing
    follow_links   accept files in the models' folders that are links out of them: a stranger's may lead to a file of
                   yours, which would become part of what you publish. Links into the Hub's own cache need no leave
    lock           False does without the lock (flock), on file systems that have none: no other process may write there

    Called again after an interruption it goes on, with the files that are not complete; called again after success it
    changes nothing. Raises CheckpointError, StoreError and ArgumentError, all ValueErrors, before anything is written;
    OSError when the disk fails. Nothing is at `out` in any of these cases.
    """
    check_path(out, "out")
    check_flags(sync=sync, sha256=sha256, dry_run=dry_run, follow_links=follow_links, lock=lock)
    rules = Rules.of(0, skip=skip, dtype=dtype, allow_missing=allow_missing, rounding=rounding, seed=seed)
    inputs = open_inputs({"base": base, "instruct": instruct}, follow_links=follow_links)
    options = _options(device, threads, progress, lock, idle=dry_run)
    plan = _warned(plan_extract(inputs, rules, second_copies(inputs)))
    return _carry_out(plan, Path(out), options, sync=sync, sha256=sha256, dry_run=dry_run)


def apply(
    target: StrPath,
    residual: StrPath | Sequence[StrPath],
    *,
    out: StrPath | None = None,
    in_place: bool = False,
    alpha: float | Sequence[float] = 1.0,
    alphas: Factors = (),
    skip: Iterable[str] | str = (),
    dtype: str | None = None,
    allow_missing: bool | str = False,
    rounding: str = "nearest",
    seed: int = 0,
    sync: bool = True,
    sha256: bool = False,
    undo: str = "ring",
    tag: str = "",
    device: str | torch.device = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    follow_links: bool = False,
    lock: bool = True,
) -> Report | Plan:
    """Write target + alpha * residual into the new folder `out`, or with `in_place` over the target itself.

    A new folder has the layout and config of the target. In place the same files change, with no second copy: they get
    the tensors of a new folder and keep their headers, and are hidden meanwhile, so that no half-updated model loads.

    >>> report = ik.apply("target/", ("instruct/", "base/"), out="merged/", alpha=0.7)
    >>> report = ik.extract("base/", "instruct/", "residual/")
    >>> report = ik.apply("target/", "residual/", in_place=True, alpha=0.7)  # the same, without a second copy
    >>> report.tensors, round(report.strengths[0].realised, 2)  # as much of alpha as survived rounding, of 1
    (7, 1.0)

    residual       a residual folder; several of them, added in this order and rounded once; or the pair of models
                   (instruct, base), whose difference is taken on the way. The tokenizer, chat template,
                   generation_config.json and processors come from the instruct model or the first residual that has
                   them, else from the target; the target keeps its tokenizer where it has tokens of its own, or where
                   its vocabulary is another and stays
    alpha          a factor for all residuals, or one for each
    alphas         pairs of a regular expression and factors, as alpha: the first one found in a tensor's name decides
    skip           regular expressions found in the names of tensors that are copied as they are
    dtype          f32, bf16, f16 or f64 for all float tensors of the output; None keeps the target's
    allow_missing  copy from the target what the other models lack, and leave out what the target lacks; up to a tenth
                   of the residual's elements, or with "any" whatever there is. A warning says how much went in
    undo           in place, the old bytes that are kept: "ring", those that an interrupted run needs to go on, 128 MiB
                   at most; "all", so that `rollback` can take back the finished update as well; "none"
    tag            in place, what tells this from an earlier application of the same: the same again changes nothing

    The others as for `extract`, and the same errors.
    """
    check_flags(in_place=in_place, sync=sync, sha256=sha256, dry_run=dry_run, follow_links=follow_links, lock=lock)
    if not isinstance(tag, str):
        raise TypeError(f"tag is {type(tag).__name__} {brief(tag)}, wanted a text")
    if (out is None) == (not in_place):
        raise ArgumentError("give either out, a new folder, or in_place=True.")
    if out is not None:
        check_path(out, "out")
    if undo not in UNDO:
        raise ArgumentError(f"undo is {undo!r}, wanted one of {', '.join(UNDO)}.")
    if out is not None and (undo != "ring" or tag):
        raise ArgumentError("undo and tag go with in_place=True: a new folder needs neither. Leave them out.")
    paths = roles_of_apply(target, residual, follow_links=follow_links)
    rules = _rules_of_apply(paths, alpha, alphas, skip, dtype, allow_missing, rounding, seed)
    options = _options(device, threads, progress, lock, idle=dry_run)
    if in_place and hidden.unfinished(Path(target)):
        asked = {"undo": undo, "sync": sync, "sha256": sha256, "tag": tag}
        return _go_on_in_place(Path(target), paths, rules, asked, options, dry_run)
    inputs = open_inputs(paths, follow_links=follow_links)
    copies = second_copies(inputs)
    plan = plan_apply(inputs, rules, copies)
    plan = _warned(plan)
    if out is not None:
        if is_shard(plan.inputs["target"].path):
            raise CheckpointError(
                f"{target}: is one of several shards, and would be no model on its own. Give its folder, or "
                "in_place=True (--in-place) to change just this file."
            )
        return _carry_out(plan, Path(out), options, sync=sync, sha256=sha256, dry_run=dry_run)
    others = [name for name in plan.not_copied if sidefiles.is_weights(name)]
    stale = (f"{', '.join(others)} beside the weights of the target are not updated",) if others else ()
    plan = replace(plan, in_place=True, warnings=(*plan.warnings, *stale))
    if not plan.inputs["target"].path.is_dir():
        plan = replace(plan, side_files=())  # a file is updated alone, whatever is beside it
    return overwrite.apply(plan, copies, options, undo=undo, sync=sync, sha256=sha256, tag=tag, dry_run=dry_run)


@interrupts.uninterrupted
def resume(
    path: StrPath,
    *,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    lock: bool = True,
    adopt: bool = False,
) -> Report:
    """Finish an interrupted merge: `path` is the target of an update in place, or the output that is not there yet.

    >>> def give_up(done, in_all):
    ...     raise KeyboardInterrupt
    >>> try:
    ...     ik.apply("target/", ("instruct/", "base/"), in_place=True, progress=give_up)
    ... except KeyboardInterrupt:
    ...     ik.status("target/").state
    'unfinished'
    >>> ik.resume("target/").tensors
    7

    adopt  take up an update in place whose key is lost, as that of a container that has ended: it is followed without
           proof, so only what you have begun yourself

    Raises StoreError where nothing is unfinished, CheckpointError where the inputs have changed since.
    """
    path, options = Path(path).absolute(), _options(device, threads, progress, lock)
    started = time.perf_counter()
    operation = _unfinished_output(path)
    if operation is not None:
        inputs = open_inputs(operation.paths, follow_links=operation.follow_links)
        rules = Rules.from_dict(operation.rules)
        plan_again = plan_extract if operation.kind == "extract" else plan_apply
        plan = _warned(plan_again(inputs, rules, second_copies(inputs)))
        same_plan(operation, plan.id, VERSION)
        report = _carry_out(plan, path, options, sync=operation.sync, sha256=operation.sha256)
        assert isinstance(report, Report)
        return report
    if adopt:
        hidden.adopt(path, locked=lock)
    place = Workplace.take(path, locked=lock)
    try:
        if place.phase() is None:
            place.remove()
            raise StoreError(f"{path}: no update in place was under way. `ires status {path}` says what the model is.")
        begun = overwrite.read_operation(place)
        if begun.kind == MAPPED:
            writing.finish(place, begun)
            return Report.recorded(MAPPED, begun.id, path, Numbers(), _SHOWN)
        return overwrite.carry_on(place, options, started)
    finally:
        place.close()


@interrupts.uninterrupted
def rollback(path: StrPath, *, lock: bool = True, adopt: bool = False) -> str:
    """Take back an unfinished merge, or the last update in place with undo="all"; returns what was done, in words.

    >>> report = ik.apply("target/", ("instruct/", "base/"), in_place=True, undo="all")
    >>> ik.rollback("target/")
    '...target: is what it was before apply ...'

    lock, adopt as for `resume`

    Raises StoreError where there is nothing to take back, or where the old bytes are gone; then nothing was changed.
    """
    path = Path(path).absolute()
    if is_unfinished(partial_path(path)):
        try:
            discard(path, locked=lock)
            return f"{partial_path(path)}: was removed."
        except Foreign:
            if not path.exists():
                raise
    if adopt:
        hidden.adopt(path, locked=lock)
    if not os.path.lexists(hidden.work_folder(path)):
        return overwrite.rollback_kept(path, locked=lock)
    place = Workplace.take(path, locked=lock)
    try:
        begun = overwrite.read_operation(place) if place.phase() else None
        if begun is not None and begun.kind == MAPPED:
            return writing.rollback(place, begun)
        return overwrite.rollback(place)
    finally:
        place.close()


def load(
    target: StrPath,
    residual: StrPath | Sequence[StrPath],
    *,
    alpha: float | Sequence[float] = 1.0,
    alphas: Factors = (),
    skip: Iterable[str] | str = (),
    dtype: str | None = None,
    allow_missing: bool | str = False,
    rounding: str = "nearest",
    seed: int = 0,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    follow_links: bool = False,
) -> dict[str, Tensor]:
    """Merge while loading: a state dict of what `apply` would write, on the device, and nothing on the disk.

    >>> state_dict = ik.load("target/", ("instruct/", "base/"), alpha=0.7)
    >>> state_dict["model.norm.weight"].dtype
    torch.bfloat16

    Names, shapes, dtypes and bits are those of the files that `apply` makes of the same arguments. A head that the
    files leave out because it is the embedding is there under its name too, and is the same tensor, as in
    ``model.state_dict()``; so ``load_state_dict`` of a causal language model takes the result, and ``assign=True`` does
    without a copy. What else a model shares, or names otherwise than its files do, is for its loader to tell.

    Results are computed where they stay: beyond them it takes a few windows a thread. On a GPU all work is over on
    return, so any stream may use them; up to 128 MiB of pinned host memory stay for the next call, until
    ``ires_kernels.streaming.device.free()``. Arguments and errors as for `apply`, and MemoryError when the device has
    no room for the result.
    """
    check_flags(follow_links=follow_links)
    paths = roles_of_apply(target, residual, follow_links=follow_links)
    rules = _rules_of_apply(paths, alpha, alphas, skip, dtype, allow_missing, rounding, seed)
    plan = _plan_apply(open_inputs(paths, follow_links=follow_links), rules)
    from ires_kernels.streaming import device as devices
    from ires_kernels.streaming import statedict

    place = devices.resolve(device)
    options = _options(place, threads, progress)
    left_out = [plan.share.text()] if plan.share else []
    for text in (*configs.differences(plan.inputs), *guards.strangers(plan.inputs, plan.rules), *left_out):
        warnings.warn(plain(text), stacklevel=2)
    guards.compare(plan)
    tensors = statedict.allocate(plan.steps, place)
    outcome = stream.fill(
        tensors,
        plan.steps,
        guards.file_ids(plan),
        plan.rules,
        hashed=[role for role, checkpoint in plan.inputs.items() if checkpoint.kind == "residual"],
        processors=options.processors,
        threads=threads,
        progress=progress,
    )
    guards.check_residuals(plan, outcome.inputs)
    guards.check_unchanged(plan, outcome.inputs, threads=threads)
    shared = statedict.shared_head(plan.inputs["target"])
    if shared is not None:
        head, embedding = shared
        tensors[head] = tensors[embedding]
    return tensors


def _rules_of_apply(
    paths: Mapping[str, StrPath],
    alpha: float | Sequence[float],
    alphas: Factors,
    skip: Iterable[str] | str,
    dtype: str | None,
    allow_missing: bool | str,
    rounding: str,
    seed: int,
) -> Rules:
    return Rules.of(
        1 if "instruct" in paths else len(paths) - 1,
        alpha=alpha,
        alphas=alphas,
        skip=skip,
        dtype=dtype,
        allow_missing=allow_missing,
        rounding=rounding,
        seed=seed,
    )


def _warned(plan: Plan) -> Plan:
    """The plan, and what is to be said of inputs that look as if they were no relatives, or have a stranger's state."""
    theirs = [text for checkpoint in plan.inputs.values() for text in hidden.foreign(checkpoint.path).values()]
    return replace(plan, warnings=(*plan.warnings, *guards.strangers(plan.inputs, plan.rules), *theirs))


def _plan_apply(inputs: Mapping[str, Checkpoint], rules: Rules) -> Plan:
    return plan_apply(inputs, rules, second_copies(inputs))


def _options(
    device: str | torch.device, threads: int | None, progress: Progress | None, lock: bool = True, *, idle: bool = False
) -> Options:
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is {type(progress).__name__} {brief(progress)}, wanted a function of two numbers")
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise TypeError(f"threads is {type(threads).__name__} {brief(threads)}, wanted an integer, or None")
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads is {threads}, wanted 1 or more.")
    return Options(processors_on(device, idle=idle), threads, progress, lock)


def _unfinished_output(path: Path) -> Operation | None:
    """What was to be written to `path`, as the unfinished output says; None where there is none, or only a stranger's
    beside a model. Raises Foreign where there is nothing else."""
    if not is_unfinished(partial_path(path)):
        return None
    try:
        return Operation.from_bytes(read_kept(path), partial_path(path))
    except Foreign:
        if path.exists():
            return None
        raise


@interrupts.uninterrupted
def _go_on_in_place(
    target: Path,
    paths: Mapping[str, StrPath],
    rules: Rules,
    asked: Mapping[str, object],
    options: Options,
    dry_run: bool,
) -> Report:
    """Finish an interrupted update, if it is the one that is asked for."""
    place = Workplace.take(target, locked=options.locked)
    try:
        operation = overwrite.read_operation(place)
        if operation.kind == MAPPED:
            raise StoreError(f"{target}: {unclosed(operation)}. {way_out(target, place.work, operation)}")
        if not operation.is_asked_for(paths, rules, **asked):
            raise StoreError(
                f"{target}: another update in place is unfinished: {operation}. `ires resume {target}` finishes it, "
                f"`ires rollback {target}` takes it back where that is possible."
            )
        if dry_run:
            raise StoreError(f"{target}: this very update is unfinished, and without --dry-run would be gone on with.")
        return overwrite.carry_on(place, options, time.perf_counter())
    finally:
        place.close()


@interrupts.uninterrupted
def _carry_out(
    plan: Plan, out: Path, options: Options, *, sync: bool, sha256: bool, dry_run: bool = False
) -> Report | Plan:
    """Write a new folder."""
    recorded = _written_before(plan, out, options.threads, sync=sync, sha256=sha256)
    if recorded is not None and not dry_run:
        return recorded
    check_destination(out, [checkpoint.path for checkpoint in plan.inputs.values()])
    if dry_run:
        return plan
    started = time.perf_counter()
    compared = guards.compare(plan)
    paths = absolute({role: checkpoint.path for role, checkpoint in plan.inputs.items()})
    links = any(checkpoint.follow_links for checkpoint in plan.inputs.values())
    samples = {role: provenance.samples(checkpoint, plan.id) for role, checkpoint in plan.inputs.items()}
    operation = Operation(
        plan.id, VERSION, plan.operation, paths, plan.rules.to_dict(), sync, sha256, follow_links=links,
        stamps=stamps_of(plan.inputs), samples=samples,
    )  # fmt: skip
    identity = plan.id if sync else f"{plan.id} {operation.boot}"
    access, accept = overwrite.access_of(plan), partial(_check_begun, plan, out, options.threads)
    kept = operation.to_bytes()
    with NewFolder(out, identity, kept, accept=accept, sync=sync, locked=options.locked, access=access) as folder:
        outcome = Outcome()
        for record in folder.finished.values():
            outcome.update(Outcome.from_dict(json.loads(record)))
        groups: dict[str, list[Step]] = {}
        for step in plan.steps:
            groups.setdefault(step.file, []).append(step)
        files = {
            file.name: folder.create(file.name, file.header, file.size, partial(_record, outcome, groups[file.name]))
            for file in plan.files
            if file.name not in folder.finished
        }
        stream.run(
            [step for step in plan.steps if step.file in files],
            guards.file_ids(plan),
            plan.rules,
            lambda step, start, data, _: files[step.file].write(data, step.offset + start),
            processors=options.processors,
            threads=options.threads,
            progress=options.progress,
            outcome=outcome,
        )
        outcome.bytes_written += sum(len(file.header) for file in plan.files if file.name in files)
        folder.finish_files()
        outcome.update(guards.left_out(plan, options.processors, options.threads))
        outcome.update(Outcome(inputs=compared))
        guards.check_residuals(plan, outcome.inputs)
        # What loaders look for first comes last.
        others = {}
        for side in plan.side_files:
            hasher = xxhash.xxh3_128()
            folder.add(side.name, sidefiles.chunks(side, hasher), access.of(side.source))
            others[side.name] = {"from": side.role, "xxh3_128": hasher.hexdigest()}
        for name, content in plan.documents:
            folder.add(name, [content])
            others[name] = {"from": plan.operation, "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        weights = {file.name: folder.partial / file.name for file in plan.files}
        sums = provenance.sha256(weights, options.threads) if sha256 else {}
        if sums:
            folder.add(provenance.SUMS, [provenance.sums_file(sums)])
        report = Report.of(plan, outcome, out, 0.0)
        unsynced = "" if sync else operation.boot
        stamps = {role: provenance.stamps(checkpoint, samples[role]) for role, checkpoint in plan.inputs.items()}
        written = {file.name: sample(folder.partial / file.name, plan.id) for file in plan.files}
        receipt = provenance.build(
            plan, outcome, report, stamps, others, outputs=written, sha256=sums, unsynced=unsynced,
            sketch=ancestry.sketch(plan.inputs["base"]) if plan.operation == "extract" else None,
        )  # fmt: skip
        folder.add(MANIFESTS[plan.operation], [receipt])
        guards.check_unchanged(plan, outcome.inputs, threads=options.threads)
        folder.commit()
    return Report.of(plan, outcome, out, time.perf_counter() - started)


def _record(outcome: Outcome, group: Iterable[Step]) -> bytes:
    """What is known of a file whose bytes are all written."""
    return json.dumps(outcome.of(group).to_dict()).encode()


def _check_begun(plan: Plan, out: Path, threads: int | None, kept: bytes, finished: Mapping[str, bytes]) -> None:
    """Refuse with StoreError to go on with an unfinished folder that was begun with other inputs."""
    operation = Operation.from_bytes(kept, partial_path(out))
    outcome = Outcome()
    for record in finished.values():
        outcome.update(Outcome.from_dict(json.loads(record)))
    others = other_files(plan.inputs, operation.stamps)
    try:
        guards.check_begun(plan, operation.samples, outcome, others, threads=threads)
    except CheckpointError as error:  # a file that is just being written is no reason to throw away what is complete
        raise StoreError(*error.lines) from error


def _written_before(plan: Plan, out: Path, threads: int | None, *, sync: bool, sha256: bool) -> Report | None:
    """The report of this very plan, if it was carried out: perhaps by a run that was killed as it ended.

    Raises StoreError where it was with other inputs, and where the output is no longer what was written: changed, or
    lost in part when the machine was restarted before all was synced.
    """
    try:
        table = manifest.read(out / MANIFESTS[plan.operation])
    except (OSError, CheckpointError):
        return None
    if table is None or table.id != plan.id or (sha256 and not table.sha256):
        return None
    if not table.is_mine:
        raise StoreError(
            f"{table.path}: says that this is the output of this very command, but is not signed with your key, so it "
            f"is not believed. Give the name of a new folder, or delete {out} first."
        )
    other = repetition.other_input(plan, table, threads)
    if other is not None:
        role, path = other
        raise StoreError(
            f"{out}: was made by the same command, but of another {role}: {path} has other bytes now, though its name, "
            f"size and time are the same. Give the name of a new folder, or delete {out} first."
        )
    looked_at = "of its weights a sample was compared, `ires verify` reads all of them"
    if not repetition.is_as_written(plan, out, table):
        found = _damage(out, threads)
        if found:
            lost = "was written with --no-sync before the machine was restarted, and is"
            what = lost if repetition.is_doubtful(table) else "is the output of the same command, but"
            raise StoreError(f"{out}: {what} {found}. Delete it, then merge again.")
        looked_at = "all of it was compared with the recorded hashes"
    tidy(out)
    if sync and table.unsynced:
        fsync_all(out)
    if sync:
        fsync_folder(out.parent)
    return Report.recorded(plan.operation, plan.id, out, table.report, f"{_THERE}; {looked_at}")


def _damage(out: Path, threads: int | None) -> str:
    """What is wrong with an output, by its recorded hashes; nothing where nothing is."""
    try:
        report = verify(out, hashes_only=True, threads=threads)
    except CheckpointError as error:
        return f"cannot be used any more: {error}".removesuffix(".")
    found = [*report.mismatches, *report.problems]
    more = f", and {len(found) - 1} more differences" if found[1:] else ""
    return f"not as it was written: {found[0]}{more}" if found else ""


_SHOWN = "what was written to memory is durable; what was left to do was to give the files their places"
_THERE = "nothing was done: this is the output of the same command, run before with the same inputs"
