"""Checking finished output: the arithmetic again from the inputs, tile by tile, against the bytes on the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ires_kernels.checking.recorded import other_hashes, other_headers, other_names
from ires_kernels.checkpoints import hub, manifest
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.folders import listed
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.files.opening import check_link
from ires_kernels.files.plain import plain_lines, several, size
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.inputs import StrPath, open_inputs
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.steps import by_output
from ires_kernels.planning.summing import plan_residual
from ires_kernels.records import provenance
from ires_kernels.records.operation import MAPPED
from ires_kernels.streaming import stream
from ires_kernels.streaming.asked import Progress
from ires_kernels.streaming.reader import all_file_ids, second_copies
from ires_kernels.streaming.tiles import Processors, processors_on

if TYPE_CHECKING:
    import torch

    from ires_kernels.streaming.comparison import Mismatch


@dataclass
class VerifyReport:
    """What `verify` found; ``print(report)`` tells it. It is true in a condition when all is well."""

    out: Path
    hashes_only: bool
    tensors: int = 0
    unread: int = 0
    """Of these, tensors that an update in place left as they were, and of which no hash is known."""
    bytes_read: int = 0
    seconds: float = 0.0
    mismatches: list[Mismatch] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What else is not as it was left: hashes, order, dtypes, inputs, side files."""
    notes: list[str] = field(default_factory=list)
    """What was not looked at, and how to do that."""

    @property
    def ok(self) -> bool:
        return not self.mismatches and not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self), "out": f"{self.out}"}

    def __str__(self) -> str:
        how = "have the recorded hashes" if self.hashes_only else "are what the inputs give, bit for bit"
        found = [f"{mismatch}" for mismatch in self.mismatches] + self.problems
        if found:
            head = f"{self.out}: {several(len(found), 'difference')}:"
            more = [f"  and {len(found) - 20} more"] if len(found) > 20 else []
            return plain_lines(head, *(f"  {line}" for line in found[:20]), *more, *self.notes)
        rate = self.bytes_read / self.seconds / 1e9 if self.seconds else 0.0
        which = f"all {self.tensors} tensors"
        if self.unread:
            which = f"{self.tensors - self.unread} tensors (not {self.unread} that were left as they were)"
        done = f"{self.out}: {which} {how} ({size(self.bytes_read)} read in {self.seconds:.2f} s, {rate:.2f} GB/s)"
        return plain_lines(done, *self.notes)


def verify(
    out: StrPath,
    *,
    inputs: Mapping[str, StrPath] | None = None,
    hashes_only: bool = False,
    follow_links: bool = False,
    trust_inputs: bool = False,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check output of `extract` or `apply` against its manifest and, recomputed, against its inputs.

    >>> report = ik.apply("target/", ("instruct/", "base/"), out="merged/")
    >>> bool(ik.verify("merged/"))
    True

    inputs         paths by role (target, instruct, base, residual, residual-1, instruct-1, base-1, …) in place of the
                   recorded ones
    hashes_only    compare hashes of tensors and files with the manifest, without the inputs. It is all that can be done
                   after an update in place, unless `inputs` has a copy of the target as it was
    follow_links   accept files of the folders that are links out of them
    trust_inputs   read the inputs where the manifest says that they are, though it was not signed with your key: a
                   stranger's may name any file
    device         where to compute, cpu or a GPU: it need not be the one of the merge

    Any NaN serves where a NaN is due, since payloads are no part of the numerics. Raises CheckpointError where there
    is nothing to check: no manifest, inputs that are gone.
    """
    started = time.perf_counter()
    processors = processors_on(device, idle=hashes_only)
    checkpoint = open_checkpoint(hub.local(out), follow_links=follow_links)
    table = checkpoint.manifest
    if table is None or not (checkpoint.path.is_dir() or table.in_place):
        raise CheckpointError(f"{checkpoint.path}: has no ires.json or residual.json; wanted the output of a merge.")
    if table.operation == MAPPED:
        raise CheckpointError(
            f"{checkpoint.path}: was written through ik.mapped, and nobody recorded what was written: there is nothing "
            "to compare it with. Keep sums of your own (sha256sum) of what you write in this way."
        )
    made_of = table.made_of()
    if table.in_place and "target" not in (inputs or {}):
        hashes_only = True
    notes = []
    if not (hashes_only or trust_inputs or table.is_mine):
        named = [role for role in made_of if role not in (inputs or {})]
        if named and inputs:
            raise ArgumentError(
                f"{out}: its manifest was not signed with your key, so it is not believed where {', '.join(named)} is. "
                "Say that too, or give --trust-inputs (trust_inputs=True)."
            )
        if named:
            hashes_only = True
            notes.append(
                "Hashes alone were compared: the manifest was not signed with your key, so it is not believed where the"
                f" inputs are. Say where {', '.join(named)} is, or give --trust-inputs (trust_inputs=True)."
            )
    report = VerifyReport(checkpoint.path, hashes_only, notes=notes)
    recorded = table.tensors
    report.problems += other_names(checkpoint, recorded)
    unread = [name for name, entry in recorded.items() if entry.xxh3_128 is None]
    report.unread = len(unread)
    to_hash = [ref for name, ref in checkpoint.tensors.items() if name in recorded and name not in unread]
    if not hashes_only:
        given = dict(inputs or {})
        unknown = given.keys() - made_of.keys()
        if unknown:
            raise ArgumentError(f"{out}: was not made of {', '.join(sorted(unknown))} but of {', '.join(made_of)}.")
        moved = {entry.path: given[role] for role, entry in made_of.items() if role in given}
        paths = {role: given.get(role) or moved.get(entry.path, entry.path) for role, entry in made_of.items()}
        rules, opened = Rules.from_dict(table.table["rules"]), _opened(paths, given, follow_links)
        if table.operation == "apply":
            plan = plan_apply(opened, rules, second_copies(opened))
        else:
            plan = plan_residual(opened, rules, second_copies(opened))
        to_hash = _recompute(plan, checkpoint, recorded, report, processors, threads, progress)
        progress = None
    report.bytes_read += sum(ref.nbytes for ref in to_hash)
    report.problems += other_hashes(checkpoint, to_hash, recorded, threads, progress)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    report.problems += other_headers(checkpoint, table.headers)
    outside = {} if follow_links else _outside(folder, [*table.files, *table.sha256])
    report.problems += outside.values()
    _check_files(folder, {name: entry for name, entry in table.files.items() if name not in outside}, report)
    _check_sums(folder, {name: sum_ for name, sum_ in table.sha256.items() if name not in outside}, report, threads)
    report.tensors = len(checkpoint.tensors)
    report.seconds = time.perf_counter() - started
    return report


def _opened(paths: Mapping[str, StrPath], given: Mapping[str, StrPath], follow_links: bool) -> dict[str, Checkpoint]:
    """Open the inputs; of one that is no longer where the manifest has it, say how to tell where it is."""
    inputs: dict[str, Checkpoint] = {}
    for role, path in paths.items():
        try:
            inputs |= open_inputs({role: hub.local(path)}, follow_links=follow_links)
        except CheckpointError as error:
            if role in given:
                raise
            option = f"--{role}"
            if role.startswith("residual-"):
                option = "--residual, once for each,"
            elif "-" in role:
                option = "--pair INSTRUCT:BASE, once for each,"
            raise CheckpointError(
                *error.lines[:-1],
                f"{error.lines[-1]} By the manifest this is the {role}: if it has moved, say where it is with {option} "
                f"(in Python inputs={{{role!r}: PATH}}), or compare hashes alone with --hashes-only.",
            ) from None
    return inputs


def _recompute(
    plan: Plan,
    out: Checkpoint,
    recorded: Mapping[str, manifest.Tensor],
    report: VerifyReport,
    processors: Processors,
    threads: int | None,
    progress: Progress | None,
) -> list[TensorRef]:
    """Compare every element; returns the tensors whose hash this does not settle, as some NaN has another payload."""
    headers = {shard.path.name: list(shard.header.tensors) for shard in out.shards}
    wanted: dict[str, list[str]] = {file.name: [] for file in plan.files}
    for output in by_output(plan.steps):
        wanted[output.file].append(output.name)
    report.problems += [
        f"{name} holds other tensors, or in another order, than the plan says"
        for name in sorted(headers.keys() | wanted.keys())
        if headers.get(name) != wanted.get(name)
    ]
    steps = [
        step
        for step in plan.steps
        if (ref := out.tensors.get(step.name)) and (ref.dtype, ref.shape) == (step.dtype, step.shape)
    ]
    planned = {step.name for step in plan.steps}
    report.problems += [f"{name} is in the manifest and not in the plan" for name in recorded if name not in planned]
    from ires_kernels.streaming.comparison import Comparer

    comparer = Comparer(out)
    try:
        outcome = stream.run(
            steps,
            all_file_ids(plan.inputs),
            plan.rules,
            comparer.compare,
            processors=processors,
            counted=False,
            threads=threads,
            progress=progress,
        )
    finally:
        comparer.close()
    report.mismatches += comparer.found.values()
    report.bytes_read += sum(step.nbytes + step.read_bytes for step in steps)
    unsettled = []
    for output, parts in by_output(steps).items():
        name, entry = output.name, recorded.get(output.name)
        read = provenance.read_by(parts, outcome.inputs)
        for role, digest in entry.inputs.items() if entry else ():
            if read.get(role, digest) != digest:
                each = (operand for part in parts for operand in part.operands if operand.role == role)
                texts = list(dict.fromkeys(operand.text for operand in each))
                report.problems.append(f"{listed(texts)} of {role} is not the one that was merged: it has another hash")
        if name in comparer.other_nan:
            unsettled.append(out.tensors[name])
        elif name not in comparer.found and entry and entry.xxh3_128 not in (None, outcome.outputs[name]):
            report.problems.append(f"{name} has another hash than the manifest says")
    return unsettled


def _outside(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The files that are links out of the folder, and that in words: a stranger's may lead to what has no end."""
    found = {}
    for name in names:
        try:
            check_link(folder / name, folder)
        except CheckpointError as error:
            found[name] = f"{error}"
    return found


def _check_files(folder: Path, recorded: Mapping[str, manifest.SideFile], report: VerifyReport) -> None:
    for name, entry in recorded.items():
        path = folder / name
        if not os.path.isfile(path):
            report.problems.append(f"{name} is gone")
        elif entry.xxh3_128 != provenance.hash_file(path):
            report.problems.append(f"{name} has changed since the merge")


def _check_sums(folder: Path, recorded: Mapping[str, str], report: VerifyReport, threads: int | None) -> None:
    found = provenance.sha256({name: folder / name for name in recorded if os.path.isfile(folder / name)}, threads)
    for name, wanted in recorded.items():
        if found.get(name) != wanted:
            report.problems.append(f"{name} has the sha256 {found.get(name)}, the manifest says {wanted}")
