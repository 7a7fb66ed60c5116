"""Instruction residuals, and sums of them, into new folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ires_kernels.checkpoints import hub
from ires_kernels.merging.output import write
from ires_kernels.merging.planned import warned
from ires_kernels.merging.request import Renames, Running, Workers
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.inputs import StrPath, check_path, open_inputs
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.summing import plan_residual
from ires_kernels.records.report import Report
from ires_kernels.records.workers import WorkerReport
from ires_kernels.streaming.asked import Progress
from ires_kernels.streaming.reader import second_copies

if TYPE_CHECKING:
    import torch


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

    out            also in a store, "s3://bucket/folder", gs:// or az://, with nothing of it on this disk
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
    running = Running(
        sync=sync, sha256=sha256, device=device, threads=threads, progress=progress,
        dry_run=dry_run, follow_links=follow_links, lock=lock, workers=workers,
    )  # fmt: skip
    return save_sum(
        {"base": base, "instruct": instruct}, (), out, running,
        dtype=dtype, skip=skip, allow_missing=allow_missing, rounding=rounding, seed=seed, vocabulary=vocabulary,
        renames=renames, trust_names=trust_names,
    )  # fmt: skip


def save_sum(
    paths: Mapping[str, StrPath],
    factors: Sequence[float],
    out: StrPath,
    running: Running,
    *,
    dtype: str | torch.dtype = "f32",
    skip: Iterable[str] | str = (),
    allow_missing: bool | str = False,
    rounding: str = "nearest",
    seed: int = 0,
    vocabulary: str | None = None,
    renames: Renames = (),
    trust_names: bool = False,
) -> Report | WorkerReport | Plan:
    """What `extract` does, with the difference of a pair, or with a sum of residuals or of pairs and their factors.

    paths    by role
    factors  one for each residual or pair; none for the difference of a pair
    """
    check_path(out, "out")
    running.check()
    running.check_out(out)
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
    inputs = open_inputs(paths, follow_links=running.follow_links, dry_run=running.dry_run)
    options = running.options
    with Looks(inputs) as looks:
        plan = warned(plan_residual(inputs, rules, second_copies(inputs), looks=looks), looks)
    return write(plan, out, options, running)
