"""The new folder of a merge: made by this process, by one of several workers, or by a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ires_kernels.checkpoints.addresses import Address, is_address
from ires_kernels.merging.planned import planned_again
from ires_kernels.merging.request import Running
from ires_kernels.new_folder.run import write_folder
from ires_kernels.new_folder.workers import write_share
from ires_kernels.planning.inputs import StrPath
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.workers import Worker
from ires_kernels.records.report import Report
from ires_kernels.records.workers import WorkerReport
from ires_kernels.streaming.options import Options

if TYPE_CHECKING:
    from ires_kernels.new_folder.on_ray import Task


def write(plan: Plan, path: StrPath, options: Options, running: Running) -> Report | WorkerReport | Plan:
    """Write the output of a plan, or with workers what falls to this one."""
    worker, sha256 = running.worker, running.sha256
    if is_address(path):
        from ires_kernels.new_folder.to_objects import write_objects

        return write_objects(plan, Address.of(path), options, sha256=sha256, dry_run=running.dry_run)
    out = Path(path)
    if worker is None or running.dry_run:
        return write_folder(plan, out, options, sync=running.sync, sha256=sha256, dry_run=running.dry_run)
    if isinstance(worker, Worker):
        return write_share(plan, out, options, worker, sha256=sha256)
    from ires_kernels.new_folder.on_ray import write_on_ray

    return write_on_ray(plan, out, options, worker, carry_out, sha256=sha256)


def carry_out(task: Task) -> object:
    """What a task of Ray does: `write_item`, in a process that has to plan for itself."""
    from ires_kernels.new_folder.on_ray import write_item

    return write_item(task, planned_again)
