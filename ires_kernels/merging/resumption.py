"""What comes after an interruption: a merge is gone on with, finished for workers that have died, or taken back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ires_kernels.checkpoints.addresses import Address, is_address
from ires_kernels.files import hidden, interrupts
from ires_kernels.files.unfinished import discard
from ires_kernels.in_place.rollback import roll_back_kept, roll_back_update
from ires_kernels.in_place.run import resume_update
from ires_kernels.memory import writing
from ires_kernels.merging.planned import planned_again
from ires_kernels.new_folder import before
from ires_kernels.new_folder.run import write_folder
from ires_kernels.new_folder.workers import finish_folder
from ires_kernels.planning.inputs import StrPath
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.records import state
from ires_kernels.records.report import Report
from ires_kernels.streaming.asked import Progress
from ires_kernels.streaming.options import Options

if TYPE_CHECKING:
    import torch


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
    options = Options.of(device, threads, progress, lock)
    if is_address(path):
        from ires_kernels.new_folder.to_objects import resume_objects

        return resume_objects(Address.of(path), options, planned_again)
    path = Path(path).absolute()
    found = state.find(path)
    if found.what == "new folder":
        operation = found.operation
        plan = planned_again(operation)
        options = replace(options, compare=operation.compare)
        report = write_folder(plan, path, options, sync=operation.sync, sha256=operation.sha256)
        assert isinstance(report, Report)
        return report
    if adopt:
        hidden.adopt(path, locked=lock)
        found = state.find_update(path)
    return writing.resume(path, locked=lock) if found.is_mapped else resume_update(path, options)


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
    if is_address(out):
        raise ArgumentError(f"{Address.of(out)}: workers write no output in a store, so none is to be finished there.")
    out, options = Path(out), Options.of(device, threads, progress, lock)
    try:
        found = state.find(out)
        if found.what == "new folder":
            operation = found.operation
            options = replace(options, compare=operation.compare)
            return finish_folder(planned_again(operation), out, options, sha256=operation.sha256)
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
    if is_address(path):
        from ires_kernels.new_folder.to_objects import remove_objects

        return remove_objects(Address.of(path))
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
