"""Writing a merge to a store, as `run` does to a folder on a disk: begin, write its weights, finish.

Nothing of it is on a disk here, or in memory as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from ires_kernels.checkpoints import standins
from ires_kernels.checkpoints.addresses import Address, is_address
from ires_kernels.checkpoints.far_folders import stand_in
from ires_kernels.checkpoints.prefix import Prefix
from ires_kernels.files import interrupts
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.unfinished import MARKER
from ires_kernels.new_folder import before
from ires_kernels.new_folder.elsewhere import FolderElsewhere, discard, not_empty, tidy
from ires_kernels.new_folder.run import Begun, check_begun, finish, identity, learnt, prepared, write_files
from ires_kernels.planning.plan import MANIFESTS, Plan
from ires_kernels.records import card, elsewhere, provenance
from ires_kernels.records.operation import Operation
from ires_kernels.records.report import Report
from ires_kernels.streaming.options import Options


@dataclass(frozen=True)
class _Begun(Begun):
    folder: FolderElsewhere

    def sums(self, _: int | None) -> dict[str, str]:
        """As they were taken on the way."""
        return {file.name: self.folder.complete[file.name].sha256 for file in self.plan.files}

    def samples(self) -> dict[str, str]:
        """What the store says that they are: of no bytes, but another when they change."""
        return {file.name: f"{self.folder.complete[file.name].pin.tag:032x}" for file in self.plan.files}


@interrupts.uninterrupted
def write_objects(plan: Plan, out: Address, options: Options, *, sha256: bool, dry_run: bool = False) -> Report | Plan:
    """Put the output under `out`, or look at what is there where this very plan was carried out before."""
    _check_destination(out, (standins.shown(checkpoint.path) for checkpoint in plan.inputs.values()))
    prefix = Prefix(out)
    there = prefix.names()
    recorded = _recorded(plan, prefix, there, options.threads, sha256=sha256)
    if recorded is not None and not dry_run:
        return recorded
    if there and (MARKER not in there or MANIFESTS[plan.operation] in there):
        raise not_empty(out)
    if dry_run:
        return plan
    started = time.perf_counter()
    with _begin(plan, prefix, options, sha256=sha256) as begun:
        outcome = write_files(plan, begun.missing, begun.folder, options, begun.folder.stop)
        outcome.update(begun.outcome)
        finish(begun, outcome, options)
    return Report.of(plan, outcome, out, time.perf_counter() - started)


def _check_destination(out: Address, inputs: Iterable[str]) -> None:
    """Refuse with StoreError an output that is no folder, or lies in one of the inputs."""
    if out.is_file:
        raise StoreError(f"{out}: the output is a new folder. Give it a name of its own.")
    for path in inputs:
        if is_address(path) and f"{out}/".startswith(f"{Address.of(path)}/"):
            raise StoreError(f"{out}: lies in the input {path}. Give a folder outside of the inputs.")


def _recorded(plan: Plan, prefix: Prefix, there: set[str], threads: int | None, *, sha256: bool) -> Report | None:
    """The report of this very plan, if it was carried out."""
    if MANIFESTS[plan.operation] not in there:
        return None
    folder = stand_in(f"{prefix.address}")
    report = before.recorded(plan, folder, threads, sync=False, sha256=sha256)
    if report is None:
        return None
    if MARKER in there:  # it was killed as it ended
        tidy(prefix)
    return replace(report, out=prefix.address)


@contextmanager
def _begin(plan: Plan, prefix: Prefix, options: Options, *, sha256: bool) -> Iterator[_Begun]:
    """Have the output begun, or taken up; leaving keeps what is complete by then."""
    compared, operation = prepared(plan, sync=True, sha256=sha256, compare=options.compare)
    names = [file.name for file in plan.files] + [side.name for side in plan.side_files]
    names += [name for name, _ in plan.documents] + [provenance.SUMS, card.name(plan), MANIFESTS[plan.operation]]
    folder = FolderElsewhere(
        prefix, identity(operation), operation.to_bytes(), names,
        accept=partial(check_begun, plan, prefix.address, options.threads), hashed=sha256,
    )  # fmt: skip
    with folder:
        for file in plan.files:
            if file.name not in folder.finished:
                folder.reserve(file.name, file.header, file.size)
        yield _Begun(plan, operation, folder, learnt(folder.finished.values()), compared)


def resume_objects(out: Address, options: Options, planned: Callable[[Operation], Plan]) -> Report:
    """Finish what is unfinished under an address. Raises StoreError where nothing is."""
    operation = elsewhere.wanted(Prefix(out)).operation
    options = replace(options, compare=operation.compare)
    report = write_objects(planned(operation), out, options, sha256=operation.sha256)
    assert isinstance(report, Report)
    return report


def remove_objects(out: Address) -> str:
    """Remove what is unfinished under an address; returns that in words. Raises StoreError where nothing is."""
    found = elsewhere.wanted(Prefix(out))
    discard(found.prefix, found.names, found.there)
    return f"{out}: was removed."
