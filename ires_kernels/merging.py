"""Merging whole checkpoints: open, plan, stream, and keep the result only if everything went well."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ires_kernels.checking import guards
from ires_kernels.checking.verification import verify
from ires_kernels.checkpoints import configs, hub, roles, sidefiles
from ires_kernels.checkpoints.checkpoint import is_shard
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.files import hidden, interrupts
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.unfinished import discard
from ires_kernels.in_place.rollback import roll_back_kept, roll_back_update
from ires_kernels.in_place.run import carry_on_as_asked, resume_update, update_model
from ires_kernels.memory import writing
from ires_kernels.new_folder import before
from ires_kernels.new_folder.run import write_folder
from ires_kernels.new_folder.workers import finish_folder, write_share
from ires_kernels.planning import ancestry, recipe_files
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.inputs import Pair, StrPath, check_flags, check_path, open_inputs, roles_of_apply
from ires_kernels.planning.plan import Plan, plan_apply, related
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.summing import plan_residual
from ires_kernels.planning.sums import Sum, written_out
from ires_kernels.planning.workers import Cluster, Worker, asked
from ires_kernels.records import repetition, state
from ires_kernels.records.operation import UNDO, Operation, other_files, same_plan
from ires_kernels.records.report import Report
from ires_kernels.records.state import Status, status, unclosed, way_out
from ires_kernels.records.summary import inspect
from ires_kernels.records.workers import WorkerReport
from ires_kernels.streaming.options import Options
from ires_kernels.streaming.reader import second_copies
from ires_kernels.streaming.stream import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ires_kernels.live.loading import Weights
    from ires_kernels.new_folder.on_ray import Task
    from ires_kernels.records.fit import FitReport

__all__ = [
    "Status",
    "apply",
    "compare",
    "extract",
    "finish",
    "inspect",
    "load",
    "merge",
    "resume",
    "rollback",
    "status",
    "verify",
    "weights",
]

Added = StrPath | Sum | Sequence[StrPath | Sum] | Sequence[Pair | Sum]
Renames = Iterable[str | tuple[str, str]] | Mapping[str, str]
Workers = tuple[int, int] | str | None
Factors = Iterable[tuple[str, float | Sequence[float]]] | Mapping[str, float | Sequence[float]]


def extract(
    base: StrPath,
    instruct: StrPath,
    out: StrPath,
    *,
    dtype: str | torch.dtype = "f32",
    skip: Iterable[str] | str = (),
    allow_missing: bool | str = False,
    rounding: str = "nearest",
    seed: int = 0,
    vocabulary: str | None = None,
    renames: Renames = (),
    trust_names: bool = False,
    sync: bool = True,
    sha256: bool = False,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    follow_links: bool = False,
    lock: bool = True,
    workers: Workers = None,
) -> Report | WorkerReport | Plan:
    """Write instruct - base, the instruction residual (Jindal et al., arXiv 2410.10739), into the new folder `out`.

    >>> report = ik.extract("base/", "instruct/", "residual/")
    >>> report.tensors, report.counts.lost
    (7, 0)

    dtype          of the residual: f32 loses nothing of a bf16 or f16 pair beyond one rounding; bf16 and f16 are half
                   the size; f64. It may be spelt otherwise: "float32", torch.float32
    skip           regular expressions found in the names of tensors to leave out
    allow_missing  leave out tensors that only one of the two models has, which is an error otherwise; up to a tenth of
                   what the residual would hold, or with "any" whatever there is
    rounding, seed as in the tensor operations; every tensor draws its own random bits
    vocabulary     "rows" takes rows of embeddings by number, whatever tokens the tokenizers say that they belong to
    renames        "A=B" for parts of names: what is A in the layout of the output is B in the other models. Most is
                   found without being told: by names, structure and values
    trust_names    match tensors by their names and shapes, and compare no values
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
    workers        (rank, world): this is one of several processes, perhaps on other machines, that were all given this
                   call, each with its rank. It does its share and returns a WorkerReport; the last one to end finishes
                   the folder and returns the Report. "env" takes both from torchrun, mpirun or Slurm. "ray" or
                   "ray:ADDRESS" has it done by the machines of a Ray cluster, and returns the Report

    Called again after an interruption it goes on, with the files that are not complete; called again after success it
    changes nothing. Raises CheckpointError, StoreError and ArgumentError, all ValueErrors, before anything is written;
    OSError when the disk fails. Nothing is at `out` in any of these cases.
    """
    return save_sum(
        {"base": base, "instruct": instruct}, (), out,
        dtype=dtype, skip=skip, allow_missing=allow_missing, rounding=rounding, seed=seed, vocabulary=vocabulary,
        renames=renames, trust_names=trust_names, sync=sync, sha256=sha256, device=device, threads=threads,
        progress=progress, dry_run=dry_run, follow_links=follow_links, lock=lock, workers=workers,
    )  # fmt: skip


def save_sum(
    paths: Mapping[str, StrPath],
    factors: Sequence[float],
    out: StrPath,
    *,
    dtype: str | torch.dtype = "f32",
    skip: Iterable[str] | str = (),
    allow_missing: bool | str = False,
    rounding: str = "nearest",
    seed: int = 0,
    vocabulary: str | None = None,
    renames: Renames = (),
    trust_names: bool = False,
    sync: bool = True,
    sha256: bool = False,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    follow_links: bool = False,
    lock: bool = True,
    workers: Workers = None,
) -> Report | WorkerReport | Plan:
    """What `extract` does, with the difference of a pair, or with a sum of residuals or of pairs and their factors.

    paths    by role
    factors  one for each residual or pair; none for the difference of a pair
    """
    check_path(out, "out")
    hub.check_out(out)
    check_flags(sync=sync, sha256=sha256, dry_run=dry_run, follow_links=follow_links, lock=lock)
    worker = _worker(workers, device, sync)
    if vocabulary not in (None, "rows"):
        raise ArgumentError(f'vocabulary is {vocabulary!r}, and extract takes "rows" alone: there is no target yet.')
    rules = Rules.of(
        len(factors),
        alpha=list(factors),
        skip=skip,
        dtype=dtype,
        allow_missing=allow_missing,
        rounding=rounding,
        seed=seed,
        vocabulary=vocabulary,
        renames=renames,
        trust_names=trust_names,
    )
    paths = {role: hub.local(path) for role, path in paths.items()}
    inputs = open_inputs(paths, follow_links=follow_links, dry_run=dry_run)
    options = Options.of(_here(device, worker), threads, progress, lock, idle=dry_run)
    with Looks(inputs) as looks:
        plan = _warned(plan_residual(inputs, rules, second_copies(inputs), looks=looks), looks)
    return _written(plan, Path(out), options, worker, sync=sync, sha256=sha256, dry_run=dry_run)


def apply(
    target: StrPath,
    residual: Added,
    *,
    out: StrPath | None = None,
    in_place: bool = False,
    alpha: float | Sequence[float] = 1.0,
    alphas: Factors = (),
    skip: Iterable[str] | str = (),
    dtype: str | torch.dtype | None = None,
    allow_missing: bool | str = False,
    rounding: str = "nearest",
    seed: int = 0,
    vocabulary: str | None = None,
    renames: Renames = (),
    trust_names: bool = False,
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
    workers: Workers = None,
) -> Report | WorkerReport | Plan:
    """Write target + alpha * residual into the new folder `out`, or with `in_place` over the target itself.

    A new folder has the layout and config of the target. In place the same files change, with no second copy: they get
    the tensors of a new folder and keep their headers, and are hidden meanwhile, so that no half-updated model loads.

    >>> report = ik.apply("target/", ("instruct/", "base/"), out="merged/", alpha=0.7)
    >>> report = ik.extract("base/", "instruct/", "residual/")
    >>> report = ik.apply("target/", "residual/", in_place=True, alpha=0.7)  # the same, without a second copy
    >>> report.tensors, round(report.strengths[0].realised, 2)  # as much of alpha as survived rounding, of 1
    (7, 1.0)

    residual       a residual folder; the pair of models (instruct, base), whose difference is taken on the way; or a
                   list of either, which are added in this order and rounded once; or a `Residual`, which is a sum of
                   them. The tokenizer, chat template, generation_config.json and processors come from the first
                   instruct model or residual that has them (a tokenizer from one that has all tokens of the others),
                   else from the target; the target keeps its tokenizer where it has tokens of its own, or where its
                   vocabulary is another and stays
    alpha          a factor for all residuals or pairs, or one for each
    alphas         pairs of a regular expression and factors, as alpha: the first one found in a tensor's name decides
    skip           regular expressions found in the names of tensors that are copied as they are
    dtype          f32, bf16, f16 or f64 for all float tensors of the output, and for quantized ones, which become plain
                   weights; None keeps the target's, and the format of what it has quantized
    allow_missing  copy from the target what the other models lack, and leave out what the target lacks; up to a tenth
                   of the residual's elements, or with "any" whatever there is. A warning says how much went in
    vocabulary     where the tokenizers of models disagree, which is an error otherwise: "target" keeps the tokenizer of
                   the target and the rows of its tokens; "instruct" takes that of the instruct model and the rows of
                   its new tokens, for which embeddings grow if need be; "rows" adds rows by their number
    undo           in place, the old bytes that are kept: "ring", those that an interrupted run needs to go on, 128 MiB
                   at most; "all", so that `rollback` can take back the finished update as well; "none"
    tag            in place, what tells this from an earlier application of the same: the same again changes nothing

    The others as for `extract`, and the same errors.
    """
    where = Destination(
        out, in_place, undo, tag, sync, sha256, dry_run, follow_links, lock, _worker(workers, device, sync)
    )
    where.check()
    if in_place:
        hub.check_local(target)
    paths, rules = _asked(
        target, residual, alpha, alphas, follow_links,
        skip=skip, dtype=dtype, allow_missing=allow_missing, rounding=rounding, seed=seed,
        vocabulary=vocabulary, renames=renames, trust_names=trust_names,
    )  # fmt: skip
    return _applied(paths, rules, where, Options.of(_here(device, where.worker), threads, progress, lock, idle=dry_run))


def merge(
    recipe: StrPath,
    *,
    out: StrPath | None = None,
    in_place: bool = False,
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
    trust_inputs: bool = False,
    workers: Workers = None,
) -> Report | WorkerReport | Plan:
    """Do what a recipe asks for, as `apply` would: a file of YAML, or the ires.json of an output, to make it again.

    >>> text = "{target: target, pairs: [{instruct: instruct, base: base, alpha: 0.7}]}"
    >>> with open("recipe.yml", "w") as file:
    ...     _ = file.write(text)
    >>> report = ik.merge("recipe.yml", out="merged/")
    >>> report.tensors
    7

    recipe        of mergekit, with merge_method: task_arithmetic; or with the keys target, and pairs or residuals. Both
                  may have skip, alphas, rounding, seed, dtype, vocabulary, renames, trust_names and allow_missing, as
                  arguments of `apply`. Paths begin in its folder. The output keeps its text in ires.json. Where
                  inputs are not what an ires.json tells of, a warning names them, and the report says whether the same
                  tensors came out
    trust_inputs  read the inputs where an ires.json says that they are, though it was not signed with your key: a
                  stranger's may name any file

    The others and the errors as for `apply`; what is not supported is an ArgumentError that names line and key.
    """
    where = Destination(
        out, in_place, undo, tag, sync, sha256, dry_run, follow_links, lock, _worker(workers, device, sync)
    )
    where.check()
    check_flags(trust_inputs=trust_inputs)
    check_path(recipe, "recipe")
    paths, rules, made = recipe_files.read(
        recipe, in_place=in_place, trust_inputs=trust_inputs, follow_links=follow_links
    )
    if in_place:
        repo = hub.repo_of(paths["target"])
        hub.check_local(paths["target"] if repo is None else f"{repo}")
    done = _applied(
        paths, rules, where, Options.of(_here(device, where.worker), threads, progress, lock, idle=dry_run), made
    )
    return repetition.compared(done, made) if made and isinstance(done, Report) and not in_place else done


class Destination(NamedTuple):
    """Where the output of `apply` goes and how, as its arguments say."""

    out: StrPath | None
    in_place: bool
    undo: str
    tag: str
    sync: bool
    sha256: bool
    dry_run: bool
    follow_links: bool
    lock: bool
    worker: Worker | Cluster | None

    def check(self) -> None:
        """Refuse arguments of wrong kinds, and those that do not go together."""
        flags = ("in_place", "sync", "sha256", "dry_run", "follow_links", "lock")
        check_flags(**{flag: getattr(self, flag) for flag in flags})
        if not isinstance(self.tag, str):
            raise TypeError(f"tag is {type(self.tag).__name__} {brief(self.tag)}, wanted a text")
        if (self.out is None) == (not self.in_place):
            raise ArgumentError("give either out, a new folder, or in_place=True.")
        if self.out is not None:
            check_path(self.out, "out")
            hub.check_out(self.out)
        if self.undo not in UNDO:
            raise ArgumentError(f"undo is {self.undo!r}, wanted one of {', '.join(UNDO)}.")
        if self.out is not None and (self.undo != "ring" or self.tag):
            raise ArgumentError("undo and tag go with in_place=True: a new folder needs neither. Leave them out.")
        if self.in_place and self.worker is not None:
            raise ArgumentError("workers go with out, a new folder: in place one process updates a model.")


def _worker(workers: Workers, device: str | torch.device, sync: bool) -> Worker | Cluster | None:
    """Which of several processes this is, or who has them."""
    worker = asked(workers, f"{device}")
    if worker is not None and not sync:
        raise ArgumentError("workers wait for the disk: of what others wrote a machine that restarts knows nothing.")
    return worker


def _here(device: str | torch.device, worker: Worker | Cluster | None) -> str | torch.device:
    """On what this process computes: the machines of a cluster may have GPUs, and this one none."""
    return "cpu" if isinstance(worker, Cluster) else device


def _written(
    plan: Plan, out: Path, options: Options, worker: Worker | Cluster | None, *, sync: bool, sha256: bool, dry_run: bool
) -> Report | WorkerReport | Plan:
    if worker is None or dry_run:
        return write_folder(plan, out, options, sync=sync, sha256=sha256, dry_run=dry_run)
    if isinstance(worker, Worker):
        return write_share(plan, out, options, worker, sha256=sha256)
    from ires_kernels.new_folder.on_ray import write_on_ray

    return write_on_ray(plan, out, options, worker, carry_out, sha256=sha256)


def carry_out(task: Task) -> object:
    """What a task of Ray does: `write_item`, in a process that has to plan for itself."""
    from ires_kernels.new_folder.on_ray import write_item

    return write_item(task, _planned_again)


def _applied(
    paths: Mapping[str, StrPath], rules: Rules, where: Destination, options: Options, made: Manifest | None = None
) -> Report | WorkerReport | Plan:
    """Carry out `apply`; `made` is the manifest of what is to be made again."""
    target, sync, sha256, dry_run = paths["target"], where.sync, where.sha256, where.dry_run
    begun = state.find_update(Path(target)) if where.in_place else None
    if begun is None or begun.phase is None:
        inputs = open_inputs(paths, follow_links=where.follow_links, dry_run=dry_run)
        copies = second_copies(inputs)
        with Looks(inputs) as looks:
            plan = _warned(plan_apply(inputs, rules, copies, looks=looks), looks)
        if made is not None:
            plan = replace(plan, warnings=(*plan.warnings, *repetition.changed(inputs, made)))
        if where.out is None:
            undo, tag = where.undo, where.tag
            return update_model(plan, copies, options, undo=undo, sync=sync, sha256=sha256, tag=tag, dry_run=dry_run)
        if is_shard(plan.inputs["target"].path):
            raise CheckpointError(
                f"{target}: is one of several shards, and would be no model on its own. Give its folder, or "
                "in_place=True (--in-place) to change just this file."
            )
        return _written(plan, Path(where.out), options, where.worker, sync=sync, sha256=sha256, dry_run=dry_run)
    if begun.is_mapped:
        raise StoreError(f"{target}: {unclosed(begun.operation)}. {way_out(begun.path, begun.where, begun.operation)}")
    asked = {"undo": where.undo, "sync": sync, "sha256": sha256, "tag": where.tag}
    return carry_on_as_asked(Path(target), paths, rules, options, dry_run=dry_run, **asked)


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
    path, options = Path(path).absolute(), Options.of(device, threads, progress, lock)
    found = state.find(path)
    if found.what == "new folder":
        operation = found.operation
        plan = _planned_again(operation)
        report = write_folder(plan, path, options, sync=operation.sync, sha256=operation.sha256)
        assert isinstance(report, Report)
        return report
    if adopt:
        hidden.adopt(path, locked=lock)
        found = state.find_update(path)
    return writing.resume(path, locked=lock) if found.is_mapped else resume_update(path, options)


def _planned_again(operation: Operation) -> Plan:
    """The plan of an unfinished new folder. Raises CheckpointError where its inputs are not what they were."""
    paths = {role: hub.local(path) for role, path in operation.paths.items()}
    inputs = open_inputs(paths, follow_links=operation.follow_links)
    plan_again = plan_residual if operation.kind == "extract" else plan_apply
    known = None if other_files(inputs, operation.stamps) else operation.known_layouts()
    rules = Rules.from_dict(operation.rules)
    with Looks(inputs) as looks:
        plan = _warned(plan_again(inputs, rules, second_copies(inputs), known, looks), looks)
    same_plan(operation, plan)
    return plan


def finish(
    out: StrPath,
    *,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    lock: bool = True,
) -> Report:
    """Finish a new folder whose weights several workers have written: `out`, which is not there yet.

    >>> ik.apply("target/", ("instruct/", "base/"), out="merged/", workers=(0, 2)).missing
    ('model.safetensors',)
    >>> try:
    ...     ik.finish("merged/")
    ... except ValueError as error:
    ...     print(error)
    merged: cannot be finished: 1 of 1 files are not complete: model.safetensors. Start the workers again that ...

    The last worker to end does this as well; here it is done where that one has died, or where a file system shows the
    machines late what others have written. Every record is checked, what was left by workers that have died is removed,
    and index, side files and manifest are added. Where the folder is finished nothing is done.

    Raises StoreError where files are not complete, or are just being written by one process.
    """
    out, options = Path(out), Options.of(device, threads, progress, lock)
    try:
        found = state.find(out)
        if found.what == "new folder":
            operation = found.operation
            return finish_folder(_planned_again(operation), out, options, sha256=operation.sha256)
    except FileNotFoundError:  # the last worker was faster
        pass
    return before.finished(out)


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
    found = state.find(path)
    if found.what == "new folder":
        discard(path, locked=lock)
        return f"{found.where}: was removed."
    if adopt:
        hidden.adopt(path, locked=lock)
        found = state.find_update(path)
    if found.what == "nothing":
        return roll_back_kept(path, locked=lock)
    return writing.take_back(path, locked=lock) if found.is_mapped else roll_back_update(path, locked=lock)


def load(
    target: StrPath,
    residual: Added,
    *,
    alpha: float | Sequence[float] = 1.0,
    alphas: Factors = (),
    skip: Iterable[str] | str = (),
    dtype: str | torch.dtype | None = None,
    allow_missing: bool | str = False,
    rounding: str = "nearest",
    seed: int = 0,
    vocabulary: str | None = None,
    renames: Renames = (),
    trust_names: bool = False,
    device: str | torch.device | Mapping[str, str | int | torch.device] = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    follow_links: bool = False,
    module: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Merge while loading: a state dict of what `apply` would write, on the device, and nothing on the disk.

    >>> state_dict = ik.load("target/", ("instruct/", "base/"), alpha=0.7)
    >>> state_dict["model.norm.weight"].dtype
    torch.bfloat16

    Names, shapes, dtypes and bits are those of the files that `apply` makes of the same arguments. A head that the
    files leave out because it is the embedding is there under its name too, and is the same tensor, as in
    ``model.state_dict()``; so ``load_state_dict`` of a causal language model takes the result, and ``assign=True`` does
    without a copy. What else a model shares, or names otherwise than its files do, is for its loader to tell.

    module  gets the tensors as its parameters and buffers, with the dtypes that they have, and need have no memory
            before: its parameters may be on the meta device. What it ties stays tied; requires_grad is kept. It is
            checked before anything is computed, and has to have the names that the files have

    device  also "cuda:all": each GPU gets tensors that follow each other in the model, of as many bytes as the others
            but for a tensor, and all compute at the same time. Or by the beginnings of names, as a device_map:
            {"model.layers.0": 0, "": "cuda:1"}. With a sharded module it is one, the process's own

    Results are computed where they stay: beyond them it takes a few tiles a thread. On a GPU all work is over on
    return, so any stream may use them; up to 128 MiB of pinned host memory a GPU stay for the next call, until
    ``ires_kernels.streaming.device.free()``. Arguments and errors as for `apply`, and MemoryError when the device has
    no room for the result. Nothing is counted: of NaN, overflow and lost updates `apply` alone tells.
    """
    check_flags(follow_links=follow_links)
    from ires_kernels.live import assigning, loading, sharding
    from ires_kernels.streaming import statedict

    with sharding.peers(module) as peers:
        paths, rules = _asked(
            target, residual, alpha, alphas, follow_links,
            skip=skip, dtype=dtype, allow_missing=allow_missing, rounding=rounding, seed=seed,
            vocabulary=vocabulary, renames=renames, trust_names=trust_names,
        )  # fmt: skip
        tells = peers.is_first
        weights = loading.planned(paths, rules, device, threads, progress, follow_links=follow_links, tells=tells)
        head, embedding = statedict.shared_head(weights.target) or ("", "")
        if module is not None:
            assigning.check(module, weights.metadata, head)
        if module is not None and peers.are_several:
            again = {head: embedding} if head and assigning.are_apart(module, head, embedding) else {}
            tensors = weights.blocks(assigning.boxes(module), again, peers)
        else:
            tensors = weights.all()
        if head:
            tensors.setdefault(head, tensors[embedding])
        if module is not None:
            made = assigning.assign(module, tensors, peers)
            return made if peers.are_several else tensors
    return tensors


def compare(
    target: StrPath,
    residual: Pair,
    *,
    alpha: float = 1.0,
    curve: bool = False,
    skip: Iterable[str] | str = (),
    dtype: str | torch.dtype | None = None,
    allow_missing: bool | str = False,
    vocabulary: str | None = None,
    renames: Renames = (),
    trust_names: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    follow_links: bool = False,
) -> FitReport:
    """Say how the difference of a pair (instruct, base) fits a target that descends from base; nothing is written.

    >>> report = ik.compare("target/", ("instruct/", "base/"), alpha=0.7)
    >>> report.total.cosine is not None, sorted(report.kinds)[:2]
    (True, ['lm_head', 'mlp'])

    All weights are read once. Of each tensor, layer and kind of tensor, and of all together: how far target and
    instruct are from base, relative to its norm; the cosine of these two differences, and how often their signs differ;
    how many weights instruct has changed by an ulp of the target's dtype at most; and how much of alpha rounding to
    nearest would leave. Of weights that are stored as codes this last is not known.

    curve  also for other alphas, for a picture

    The others as for `apply`, and the same errors.
    """
    check_flags(follow_links=follow_links, curve=curve)
    paths = roles_of_apply(hub.local(target), hub.locals_of(residual), follow_links=follow_links)
    if list(paths) != ["target", "instruct", "base"]:
        raise ArgumentError(f"{', '.join(paths)} are given; wanted a target and a pair of models: (instruct, base).")
    asked = Rules.of(1, alpha=alpha)
    rules = Rules.of(
        1,
        skip=skip,
        dtype=dtype,
        allow_missing=allow_missing,
        vocabulary=vocabulary,
        renames=renames,
        trust_names=trust_names,
    )
    options = Options.of("cpu", threads, progress, idle=True)
    start = time.monotonic()
    inputs = open_inputs(paths, follow_links=follow_links)
    with Looks(inputs) as looks:
        plan = plan_apply(inputs, rules, second_copies(inputs), looks=looks)
        kin = ancestry.compare(inputs, plan.steps, looks)
    left_out = [plan.share.text()] if plan.share else []
    known = (*configs.differences(inputs), *ancestry.warnings(kin, inputs), *left_out)
    from ires_kernels.records.fit import CURVE, FitReport
    from ires_kernels.streaming.fitting import fits

    alphas = (*asked.alpha, *(CURVE if curve else ()))
    found, read = fits(plan.steps, guards.file_ids(plan), alphas, threads=options.threads, progress=options.progress)
    guards.check_unchanged(plan, {})
    return FitReport.of(plan, found, alphas, time.monotonic() - start, read, known)


def weights(
    target: StrPath,
    residual: Added,
    *,
    alpha: float | Sequence[float] = 1.0,
    alphas: Factors = (),
    skip: Iterable[str] | str = (),
    dtype: str | torch.dtype | None = None,
    allow_missing: bool | str = False,
    rounding: str = "nearest",
    seed: int = 0,
    vocabulary: str | None = None,
    renames: Renames = (),
    trust_names: bool = False,
    device: str | torch.device | Mapping[str, str | int | torch.device] = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
    follow_links: bool = False,
) -> Weights:
    """The tensors of a merged model one after the other, for what takes pairs of names and tensors, such as a server.

    >>> weights = ik.weights("target/", ("instruct/", "base/"), alpha=0.7)
    >>> weights.metadata["model.norm.weight"]
    (torch.bfloat16, (16,))
    >>> for name, tensor in weights:
    ...     assert (tensor.dtype, tensor.shape) == weights.metadata[name]

    Names, order and bits are those of the files that `apply` would write. Some 256 MiB are computed at a time, and no
    more is held here; nothing is written. Where a residual turns out to be damaged, or a file changed, the iteration
    ends with CheckpointError, and what was taken is not to be used. Arguments as for `load`; progress is told for each
    of these parts anew.
    """
    check_flags(follow_links=follow_links)
    paths, rules = _asked(
        target, residual, alpha, alphas, follow_links,
        skip=skip, dtype=dtype, allow_missing=allow_missing, rounding=rounding, seed=seed,
        vocabulary=vocabulary, renames=renames, trust_names=trust_names,
    )  # fmt: skip
    from ires_kernels.live import loading

    return loading.planned(paths, rules, device, threads, progress, follow_links=follow_links)


def _asked(
    target: StrPath,
    residual: Added,
    alpha: float | Sequence[float],
    alphas: Factors,
    follow_links: bool,
    **rules: Any,
) -> tuple[dict[str, StrPath], Rules]:
    """Where the models of a merge are, by role, and its rules."""
    added, alpha, alphas = written_out(residual, alpha, alphas)
    paths = roles_of_apply(hub.local(target), hub.locals_of(added), follow_links=follow_links)
    return paths, Rules.of(len(roles.added(paths)), alpha=alpha, alphas=alphas, **rules)


def _warned(plan: Plan, looks: Looks) -> Plan:
    """The plan, and what is to be said of inputs by their values, and where one has a stranger's state."""
    plan = related(plan, looks)
    theirs = [text for checkpoint in plan.inputs.values() for text in hidden.foreign(checkpoint.path).values()]
    givers = [each for role, each in plan.inputs.items() if roles.is_instruct(role)]
    doubts = [text for each in givers if (text := hub.doubt(each.path, sidefiles.has_vocabulary(each)))]
    unread = [role for role, checkpoint in plan.inputs.items() if checkpoint.is_unread]
    told = f"of {', '.join(unread)} only headers were read, and no values: a merge compares some first"
    notes = (*plan.notes, told) if unread else plan.notes
    return replace(plan, warnings=(*plan.warnings, *theirs, *(text + _FETCH for text in doubts)), notes=notes)


_FETCH = ": where there is a network, naming it as org/name@commit fetches what a merge takes from an instruct model"
