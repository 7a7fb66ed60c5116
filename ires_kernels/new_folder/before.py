"""What lies under the name of a new folder already: the output of the same command, or something else."""

from __future__ import annotations

from pathlib import Path

from ires_kernels.checking.verification import verify
from ires_kernels.checkpoints import manifest, standins
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files.durable import fsync_all, fsync_folder
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.unfinished import tidy
from ires_kernels.planning.plan import MANIFESTS, Plan
from ires_kernels.records import repetition
from ires_kernels.records.report import Report

_THERE = "nothing was done: this is the output of the same command, run before with the same inputs"


def recorded(plan: Plan, out: Path, threads: int | None, *, sync: bool, sha256: bool) -> Report | None:
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
    is_far = any(standins.far(out / file.name) for file in plan.files)
    known = "what the store says of them" if is_far else "a sample"
    looked_at = f"of its weights {known} was compared, `ires verify` reads all of them"
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


def finished(out: Path) -> Report:
    """The report of a new folder that is finished, as its manifest tells. Raises StoreError where none is."""
    for name in MANIFESTS.values():
        try:
            table = manifest.read(out / name)
        except OSError:
            continue
        if table is not None and table.is_mine and table.in_place is None:
            tidy(out)
            note = "nothing was done: all of it was finished before"
            return Report.recorded(table.operation, table.id, out, table.report, note)
    raise StoreError(f"{out}: nothing is unfinished there, and it is no output of yours. Is the name right?")


def _damage(out: Path, threads: int | None) -> str:
    """What is wrong with an output, by its recorded hashes; nothing where nothing is."""
    try:
        report = verify(out, hashes_only=True, threads=threads)
    except CheckpointError as error:
        return f"cannot be used any more: {error}".removesuffix(".")
    found = [*report.mismatches, *report.problems]
    more = f", and {len(found) - 1} more differences" if found[1:] else ""
    return f"not as it was written: {found[0]}{more}" if found else ""
