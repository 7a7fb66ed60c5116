"""A model whose files are open for writing as memory: hidden meanwhile as in an update in place, and what comes after.

    begin     check → lock → whole copies of the weights, unless without undo → operation.json → hide the files
    commit    fsync of the files → manifest → installing.json → finished.json → show the files
    rollback  the copies take the places of the files → show them

Whoever writes to memory tells nobody, so there are no windows, and nothing to go on with: until `commit` the bytes may
be anything, and from then on they are what they are meant to be.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId, Shard
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.manifest import Numbers
from ires_kernels.files import copies, durable, movable, moving, transfer, trust
from ires_kernels.files.inplace import Workplace
from ires_kernels.files.ownership import Access, StoreError, private_mode
from ires_kernels.in_place import begun
from ires_kernels.planning.inputs import absolute
from ires_kernels.planning.rules import Rules
from ires_kernels.records import provenance, repetition
from ires_kernels.records.operation import MAPPED, Operation, stamps_of
from ires_kernels.records.report import Report
from ires_kernels.records.state import unclosed, way_out
from ires_kernels.version import VERSION

_COPIES = "copy"
_ROOM, _OF_TENSOR = 1 << 16, 320  # bytes that are reserved for the manifest
Use = Callable[[Shard, int, Path], object]
"""With one of the weights, a descriptor that it is open on, and where it will be."""
_SHOWN = "what was written to memory is durable; what was left to do was to give the files their places"
_log = logging.getLogger("ires_kernels")


class Writing:
    """A model that this process may write to. Make one with `begin`; `commit` or `withdraw` ends it."""

    def __init__(self, place: Workplace, operation: Operation, target: Checkpoint) -> None:
        self.place = place
        self._operation = operation
        self._target = target

    @classmethod
    def begin(cls, target: Checkpoint, use: Use, *, undo: bool, sync: bool, locked: bool) -> Writing:
        """Hide the files of a model.

        use     called with each of its weights, while it is open and not yet hidden
        undo    keep whole copies of the weights until it ends
        locked  False: without the lock, where the user says that no other process works there

        Raises StoreError, CheckpointError and OSError, and has changed nothing then.
        """
        if target.kind == "residual":
            raise StoreError(
                f"{target.path}: is a residual, and residual.json keeps the hashes of what is in it, so it cannot be "
                "written. Scale it with an alpha where it is applied."
            )
        names = begun.hidden_names(target)
        movable.check(target.path, names)
        history, _ = repetition.applied(target)
        place = Workplace.begin(target.path, sync=sync, locked=locked)
        try:
            dropped = [name for name in [begun.sums_name(place)] if (place.folder / name).exists()]
            movable.check_movable(place, [*names, *dropped, begun.manifest_name(place)])
            copied = _Copies(place, sum(shard.file_id.size for shard in target.shards)) if undo else None
            for shard in target.shards:
                fd = _open(shard.path, shard.file_id)
                try:
                    if copied:
                        copied.add(shard.path, fd)
                    use(shard, fd, place.model / shard.path.name)
                finally:
                    os.close(fd)
            if copied:
                copied.finish()
            operation = Operation(
                secrets.token_hex(8), VERSION, MAPPED, absolute({"target": target.path}),
                Rules.of(0).to_dict(), sync,
                undo="all" if undo else "none",
                names=names,
                stamps=stamps_of({"target": target}),
                dropped=dropped,
                history=[update.table for update in history],
            )  # fmt: skip
            content = operation.to_bytes()
            place.reserve(_ROOM + sum(_OF_TENSOR + 6 * len(name) for name in target.tensors) + len(content))
            place.write(content)
            moving.move_in(place, names)
        except BaseException:
            _show(place, names)
            raise
        return cls(place, operation, target)

    def _hidden(self) -> list[Path]:
        """The files of the model, where they are meanwhile."""
        return [self.place.model / shard.path.name for shard in self._target.shards]

    def sync(self) -> None:
        """Make durable what is in the files. Raises OSError where that fails."""
        for path in self._hidden():
            durable.fsync_file(path)

    def commit(self) -> None:
        """Keep what was written: nobody writes any more. Raises OSError; then the model stays hidden."""
        place, operation = self.place, self._operation
        try:
            for path in self._hidden():
                os.utime(path)  # some file systems do not do that for writes to memory
            if operation.sync:
                self.sync()
            place.release()
            mode = Access(self._hidden()).file
            moving.stage(place, begun.manifest_name(place), [_manifest(place, operation, self._target)], mode)
            place.advance("installing")
            finish(place, operation)
        finally:
            place.close()

    def withdraw(self) -> None:
        """Put the old bytes back: nobody writes any more. Without copies of them the model stays hidden."""
        place, operation = self.place, self._operation
        try:
            if operation.undo == "all":
                rollback(place, operation)
            else:
                _log.warning(
                    "%s: %s. %s", place.target, unclosed(operation), way_out(place.target, place.work, operation)
                )
        finally:
            place.close()

    def cancel(self) -> None:
        """Show the files again, to which nobody has written."""
        _show(self.place, self._operation.names)

    def leave(self) -> None:
        """Unlock, with the model as it is."""
        self.place.close()


def _show(place: Workplace, names: Iterable[str]) -> None:
    """End before anything was written. Where this is killed, `rollback` goes on, also without copies."""
    try:
        if place.phase() is not None:
            place.advance("withdraw")
            moving.move_out(place, names)
            place.advance("restored")
        place.remove()
    finally:
        place.close()


def finish(place: Workplace, operation: Operation) -> None:
    """End what was committed, from wherever it is. Raises StoreError for what was not."""
    if place.phase() not in ("installing", "finished"):
        raise StoreError(f"{place.target}: {unclosed(operation)}. {way_out(place.target, place.work, operation)}")
    place.sync = operation.sync
    if place.phase() == "installing":
        moving.install(place, [begun.manifest_name(place)], operation.dropped)
        place.advance("finished")
    moving.move_out(place, operation.names)
    place.remove(drop=[begun.manifest_name(place)])


def resume(target: Path, *, locked: bool = True) -> Report:
    """`finish` what a process that was killed has committed."""
    place, operation = begun.take(target, locked=locked)
    try:
        finish(place, operation)
        return Report.recorded(MAPPED, operation.id, target, Numbers(), _SHOWN)
    finally:
        place.close()


def take_back(target: Path, *, locked: bool = True) -> str:
    """`rollback` what a process that was killed has left."""
    place, operation = begun.take(target, locked=locked)
    try:
        return rollback(place, operation)
    finally:
        place.close()


def rollback(place: Workplace, operation: Operation) -> str:
    """Put the copies in the places of the files; returns what was done. Raises StoreError where that cannot be."""
    place.sync = operation.sync
    if place.phase() in ("installing", "finished"):
        raise StoreError(
            f"{place.target}: all of it is new. `ires resume {place.target}` gives the files their places."
        )
    if place.phase() == "operation":
        if operation.undo == "none":
            raise StoreError(f"{place.target}: {unclosed(operation)}. {way_out(place.target, place.work, operation)}")
        begun.check_boot(place, operation)
        for name in _weights(operation):
            copy = place.work / _COPIES / name
            if not copy.is_file() or copy.stat().st_size != operation.stamps["target"][name]["size"]:
                raise StoreError(f"{copy}: is gone or was cut. Delete {place.work} and copy the model again.")
        moving.move_in(place, operation.names)
        place.advance("withdraw")
    if place.phase() == "withdraw":
        for name in _weights(operation):
            copy = place.work / _COPIES / name
            hidden = place.model / name
            if copy.exists() and hidden.exists():  # else it is there already, or was shown as nobody had written to it
                os.rename(copy, hidden)
        if place.sync:
            durable.fsync_folder(place.model)
        moving.move_out(place, operation.names)
        place.advance("restored")
    place.remove()
    return f"{place.target}: is what it was before it was opened for writing."


def _weights(operation: Operation) -> list[str]:
    """The files that were written."""
    return [name for name in operation.names if name in operation.stamps["target"]]


def _open(path: Path, file_id: FileId) -> int:
    """Open a file that is to be mapped, and have blocks under all of it: a full disk would end the process later."""
    with transfer.named(path):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            status = os.fstat(fd)
            if FileId.of(fd) != file_id:
                raise CheckpointError(f"{path}: changed while it was opened. Wait for its writer to finish.")
            if status.st_blocks * 512 < status.st_size:
                transfer.allocate(fd, status.st_size, path)
                os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
        except BaseException:
            os.close(fd)
            raise
    return fd


class _Copies:
    """The copies that `rollback` puts back, with the owners, modes and times of the files; `total` bytes of them."""

    def __init__(self, place: Workplace, total: int) -> None:
        self._place = place
        self._total = total
        self._said = False
        self._folder = place.work / _COPIES
        with transfer.named(self._folder):
            os.mkdir(self._folder, private_mode(0o770))

    def add(self, path: Path, fd: int) -> None:
        """Copy an open file. Raises OSError where there is no room, also for what a clone takes when it is written."""
        copy = self._folder / path.name
        with transfer.named(copy):
            to = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                if copies.clone(fd, to):
                    copies.check_room(fd, self._total, path)
                else:
                    self._say()
                    copies.fill(fd, to, os.fstat(fd).st_size, copy)
                copies.take_after(to, fd)
                if self._place.sync:
                    os.fsync(to)
            finally:
                os.close(to)

    def finish(self) -> None:
        """Make their names durable."""
        if self._place.sync:
            durable.fsync_folder(self._folder)

    def _say(self) -> None:
        if not self._said:
            _log.warning(
                "%s: copying its weights (%.3g GB) before they are written; without, with undo='none'",
                self._place.target, self._total / 1e9,
            )  # fmt: skip
        self._said = True


def _manifest(place: Workplace, operation: Operation, target: Checkpoint) -> bytes:
    """What the model's manifest says from now on: by what it was written, and that no hash of a tensor is known."""
    table: dict[str, object] = {
        "ires": VERSION,
        "operation": MAPPED,
        "id": operation.id,
        "written": "through ik.mapped, by whom and with what is not recorded",
        "digest": None,
        "inputs": {},
        "report": {},
        "files": {},
        "in_place": {
            "recipe": operation.id,
            "undo": operation.undo,
            "files": {s.path.name: provenance.as_left(place.model / s.path.name, operation.id) for s in target.shards},
            "layouts": provenance.layouts(target),
            "history": operation.history,
        },
        **({} if operation.sync else {"unsynced": operation.boot}),
        "tensors": {
            name: {"dtype": ref.dtype, "shape": list(ref.shape), "xxh3_128": None, "inputs": {}}
            for name, ref in target.tensors.items()
        },
    }
    text = json.dumps(trust.signed("manifest", table), indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")
