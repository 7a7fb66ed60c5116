"""Residuals added to a target: into a new folder, or over the target itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ires_kernels.checkpoints import hub, roles
from ires_kernels.checkpoints.checkpoint import is_shard
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.files.ownership import StoreError
from ires_kernels.in_place.run import carry_on_as_asked, update_model
from ires_kernels.merging.output import write
from ires_kernels.merging.planned import warned
from ires_kernels.merging.request import PAIR, Added, Factors, Renames, Running, Workers, wanted
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.inputs import StrPath, check_flags, check_path, open_inputs
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.records import repetition, state
from ires_kernels.records.operation import UNDO
from ires_kernels.records.report import Report
from ires_kernels.records.state import unclosed, way_out
from ires_kernels.records.workers import WorkerReport
from ires_kernels.streaming.asked import Progress
from ires_kernels.streaming.reader import second_copies

if TYPE_CHECKING:
    import torch

_NOT_COMPARED = "not compared: all of it, or a part, was merged before, by a run without compare (--compare)"


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
    compare: bool = False,
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
    compare        with a pair: count on the way what `compare` tells, for the report. Nothing is read twice

    The others as for `extract`, and the same errors.
    """
    running = Running(
        sync=sync, sha256=sha256, compare=compare, device=device, threads=threads, progress=progress,
        dry_run=dry_run, follow_links=follow_links, lock=lock, workers=workers,
    )  # fmt: skip
    where = Destination(out, in_place, undo, tag)
    where.check(running)
    if in_place:
        hub.check_local(target)
    paths, rules = wanted(
        target, residual, alpha, alphas, follow_links,
        skip=skip, dtype=dtype, allow_missing=allow_missing, rounding=rounding, seed=seed,
        vocabulary=vocabulary, renames=renames, trust_names=trust_names,
    )  # fmt: skip
    return applied(paths, rules, where, running)


class Destination(NamedTuple):
    """Where the output of `apply` goes, as its arguments say."""

    out: StrPath | None
    in_place: bool
    undo: str
    tag: str

    def check(self, running: Running) -> None:
        """Refuse arguments of wrong kinds, and those that do not go together."""
        running.check()
        check_flags(in_place=self.in_place)
        if not isinstance(self.tag, str):
            raise TypeError(f"tag is {type(self.tag).__name__} {brief(self.tag)}, wanted a text")
        if (self.out is None) == (not self.in_place):
            raise ArgumentError("give either out, a new folder, or in_place=True.")
        if self.out is not None:
            check_path(self.out, "out")
            running.check_out(self.out)
        if self.undo not in UNDO:
            raise ArgumentError(f"undo is {self.undo!r}, wanted one of {', '.join(UNDO)}.")
        if self.out is not None and (self.undo != "ring" or self.tag):
            raise ArgumentError("undo and tag go with in_place=True: a new folder needs neither. Leave them out.")
        if self.in_place and running.worker is not None:
            raise ArgumentError("workers go with out, a new folder: in place one process updates a model.")


def applied(
    paths: Mapping[str, StrPath], rules: Rules, where: Destination, running: Running, made: Manifest | None = None
) -> Report | WorkerReport | Plan:
    """Carry out `apply`; `made` is the manifest of what is to be made again."""
    if running.compare:
        _check_pair(paths)
    done = _carried_out(paths, rules, where, running, made)
    if running.compare and isinstance(done, Report) and done.compared is None:
        done = replace(done, notes=(*done.notes, _NOT_COMPARED))
    return done


def _check_pair(paths: Iterable[str]) -> None:
    """Refuse with ArgumentError to compare, on the way, what is no pair of models."""
    given = [role for role in paths if role != "target"]
    if any(map(roles.is_residual, given)):
        raise ArgumentError(
            "compare (--compare) needs what base holds, and a residual does not have that. Give the two models that it "
            "was made of in its place: (instruct, base) (--instruct, --base). Or leave compare out."
        )
    if ["target", *given] != PAIR:
        raise ArgumentError(
            f"compare (--compare) takes one pair of models, and not {', '.join(given)}. Leave it out: "
            "`ires compare TARGET --instruct I --base B` says of one pair after the other how it fits."
        )


def _carried_out(
    paths: Mapping[str, StrPath], rules: Rules, where: Destination, running: Running, made: Manifest | None
) -> Report | WorkerReport | Plan:
    target, sync, sha256, dry_run = paths["target"], running.sync, running.sha256, running.dry_run
    options = running.options
    begun = state.find_update(Path(target)) if where.in_place else None
    if begun is None or begun.phase is None:
        inputs = open_inputs(paths, follow_links=running.follow_links, dry_run=dry_run)
        copies = second_copies(inputs)
        with Looks(inputs) as looks:
            plan = warned(plan_apply(inputs, rules, copies, looks=looks), looks)
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
        return write(plan, where.out, options, running)
    if begun.is_mapped:
        raise StoreError(f"{target}: {unclosed(begun.operation)}. {way_out(begun.path, begun.where, begun.operation)}")
    asked = {"undo": where.undo, "sync": sync, "sha256": sha256, "tag": where.tag}
    return carry_on_as_asked(Path(target), paths, rules, options, dry_run=dry_run, **asked)
