"""Merges that a file asks for: a recipe, or the manifest of an output that is to be made again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ires_kernels.checkpoints import hub
from ires_kernels.merging.application import Destination, applied
from ires_kernels.merging.request import Running, Workers
from ires_kernels.planning import recipe_files
from ires_kernels.planning.inputs import StrPath, check_flags, check_path
from ires_kernels.planning.plan import Plan
from ires_kernels.records import repetition
from ires_kernels.records.report import Report
from ires_kernels.records.workers import WorkerReport
from ires_kernels.streaming.asked import Progress

if TYPE_CHECKING:
    import torch


def merge(
    recipe: StrPath,
    *,
    out: StrPath | None = None,
    in_place: bool = False,
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
    stream: bool = False,
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

    recipe        of mergekit, with merge_method: task_arithmetic or linear; or with the keys target, and pairs or
                  residuals. All may have skip, alphas, rounding, seed, dtype, vocabulary, renames, trust_names and
                  allow_missing, as arguments of `apply`; linear, which adds nothing to a target, no alphas. Paths
                  begin in its folder. The output keeps its text in ires.json. Where inputs are not what an ires.json
                  tells of, a warning names them, and the report says whether the same tensors came out
    stream        read the weights of models on the Hub where they are, and download nothing to its cache
    trust_inputs  read the inputs where an ires.json says that they are, though it was not signed with your key: a
                  stranger's may name any file

    The others and the errors as for `apply`; what is not supported is an ArgumentError that names line and key.
    """
    running = Running(
        sync=sync, sha256=sha256, compare=compare, device=device, threads=threads, progress=progress,
        dry_run=dry_run, follow_links=follow_links, lock=lock, workers=workers,
    )  # fmt: skip
    where = Destination(out, in_place, undo, tag)
    where.check(running)
    check_flags(trust_inputs=trust_inputs, stream=stream)
    check_path(recipe, "recipe")
    paths, rules, made = recipe_files.read(
        recipe, in_place=in_place, stream=stream, trust_inputs=trust_inputs, follow_links=follow_links
    )
    if in_place:
        repo = hub.repo_of(paths["target"])
        hub.check_local(paths["target"] if repo is None else f"{repo}")
    done = applied(paths, rules, where, running, made)
    return repetition.compared(done, made) if made and isinstance(done, Report) and not in_place else done
