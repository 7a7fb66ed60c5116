"""Models as tensors that are the pages of their files: `ires_kernels.mapped`."""

from __future__ import annotations

import os
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from ires_kernels.checkpoints.checkpoint import FileId, Shard, TensorRef
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.dtypes import STORAGE
from ires_kernels.files import interrupts
from ires_kernels.files.opening import open_file
from ires_kernels.files.pages import Pages, populate
from ires_kernels.files.plain import plain
from ires_kernels.memory.writing import Writing
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.tensors import regions

_DTYPES: dict[str, torch.dtype] = {
    dtype.name: getattr(torch, dtype.torch) for dtype in STORAGE.values() if dtype.torch and hasattr(torch, dtype.torch)
}
"""What torch has of the dtypes of safetensors; not the floats of 4 and 6 bits."""

UNDO = ("copy", "none")
_CLOSED = "which is closed; use it inside of the with block, or a .clone() of it"


def mapped(
    path: str | os.PathLike[str],
    write: bool = False,
    undo: str = "copy",
    *,
    sync: bool = True,
    follow_links: bool = False,
    lock: bool = True,
) -> Mapped:
    """The tensors of a model, a residual or a .safetensors file, as what they are: the pages of its files.

    A mapping from names to tensors, in the order of the files, and a context manager. Nothing is read before it is
    touched; what is touched is in the page cache, takes no memory of this process, and is read once whoever maps it.

    >>> with ik.mapped("target/", write=True) as t, ik.mapped("instruct/") as i, ik.mapped("base/") as b:
    ...     for name in t:
    ...         _ = ik.add_difference_(t[name], i[name], b[name], alpha=0.7)

    Read-only, tensors are not written. Operations of this package refuse to, and so does torch, for they are inference
    tensors; what gets past that (in torch.inference_mode(), through numpy, .detach() or .data) stays in this process
    and never reaches the file. ``.clone()`` and ``.to(…)`` give ordinary tensors. Elements that torch has no dtype for
    (4 and 6 bits) are served as bytes: uint8 of one dimension. A tensor at an address that does not suit its dtype, in
    a file whose writer aligned nothing, is served as a copy in memory. Files that somebody writes to meanwhile change
    under the tensors, and `close` raises CheckpointError then; a file that somebody cuts ends the process with SIGBUS
    when what is gone is touched. `apply` reads its inputs another way, and is safe from that.

    With `write` the tensors are ordinary ones, and what anybody writes to them is in the files. Meanwhile the model is
    locked and hidden, as by an update in place, so that nothing loads what is half-written. At the end of the block,
    or by `close`, it is made durable, comes back, and its manifest says that it was written. An exception that leaves
    the block puts the old bytes back; a process that dies leaves the model hidden, and `ires status` says what to do.
    A tensor at an unsuitable address is served as bytes.

    Tensors that are still held afterwards can be read, and no operation of this package takes them; what torch writes
    to them then stays in this process, and so does what a forked child writes, at any time.

    write         lock and hide the model, and let it be written
    undo          with `write`, "copy": keep a copy of the weights until the end, to go back to; a clone, which takes no
                  time, where the file system makes those, and otherwise a copy, of which the logger "ires_kernels"
                  says how large it is. "none": after an exception or a crash the model must be copied again
    sync          with `write`, False does without waiting for the disk, and so without surviving a power cut
    follow_links  accept files of the folder that are links out of it, as for `apply`
    lock          with `write`, False does without the lock, as for `apply`

    Raises CheckpointError for what cannot be used, StoreError for what cannot be written, as everywhere, and OSError.
    """
    undo = "copy" if undo == "all" else undo  # as `apply` calls it
    if undo not in UNDO:
        raise ArgumentError(f"undo is {undo!r}, wanted one of {', '.join(UNDO)}.")
    how = {"undo": undo == "copy", "sync": sync, "locked": lock}
    return Mapped(Path(path).absolute(), how if write else None, follow_links=follow_links)


class Mapped(Mapping[str, Tensor]):
    """See `mapped`, which makes them."""

    def __init__(self, path: Path, write: Mapping[str, bool] | None, *, follow_links: bool) -> None:
        """`write`: options of Writing.begin; None for reading."""
        self.path = path
        """The folder, or the file."""
        self.closed = True
        self._writing: Writing | None = None
        self._touched = False
        self.checkpoint = open_checkpoint(path, follow_links=follow_links)
        """Names, dtypes, shapes and offsets, as the headers have them."""
        self._files: dict[Path, _File] = {}
        with interrupts.held():
            try:
                if write is None:
                    for shard in self.checkpoint.shards:
                        fd = open_file(shard.path)
                        try:
                            self._map(shard, fd)
                        finally:
                            os.close(fd)
                else:
                    self._writing = Writing.begin(self.checkpoint, self._map, **write)
                interrupts.check()
            except BaseException:
                self._files = {}
                if self._writing is not None:
                    self._writing.cancel()
                raise
            self.closed = False
            if self._writing is not None:
                _open.add(self)

    def _map(self, shard: Shard, fd: int, hidden: Path | None = None) -> None:
        self._files[shard.path] = _File(shard, self.checkpoint.tensors, fd, hidden)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name; made anew by each call, over the same memory."""
        ref = self.checkpoint.tensors.get(name)
        if ref is None:
            raise KeyError(f"{brief(name)} is not in {self.path}")
        if self.closed:
            raise ValueError(f"{self.path}: {brief(name)} was asked for after it was closed.")
        self._touched = True
        return self._files[ref.path].tensor(ref)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.tensors)

    # A Mapping compares by its values, and comparing tensors is no answer.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} holds memory of this process, and cannot be copied or sent; map {self.path} there")

    def __repr__(self) -> str:
        state = "closed" if self.closed else "read-only" if self._writing is None else "writable"
        return f"<{state} mapping of {brief(f'{self.path}')}, {len(self)} tensors>"

    def flush(self) -> None:
        """Make durable what was written so far. Raises OSError where the disk fails: then nothing is known of it."""
        if self.closed:
            raise ValueError(f"{self.path}: is closed.")
        if self._writing is not None:
            for file in self._files.values():
                file.pages.sync()
            self._writing.sync()

    def close(self) -> None:
        """End the use of the tensors, and keep what was written. Signals wait until that is done.

        Raises OSError where that cannot be made durable, or the model not be shown again: then it stays hidden.
        Read-only, raises CheckpointError where a file is not what it was when it was opened.
        """
        if self.closed:
            return
        if self._writing is not None:
            self._end(self._writing.commit)
            return
        self._release()
        changed, _ = self.checkpoint.changed()
        if changed:
            raise CheckpointError(
                f"{changed[0]}: changed or went away while it was mapped, so what was read of it may be anything. "
                "Wait for its writer, then start again."
            )

    def __enter__(self) -> Mapped:
        if self.closed:
            raise ValueError(f"{self.path}: is closed. Map it again.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif not self.closed and self._writing is not None:
            self._end(self._writing.withdraw)
        else:  # the error matters more than what became of files that were read meanwhile
            self._release()

    def __del__(self) -> None:
        if self.closed or self._writing is None:
            return
        if not self._touched:
            self._end(self._writing.cancel)
        else:
            warnings.warn(
                plain(f"{self!r} was never closed: the model stays hidden"), ResourceWarning, source=self, stacklevel=1
            )
            self._abandon()

    def _end(self, how: Callable[[], None]) -> None:
        """End writing in one of its ways; where no tensor was asked for, nothing was written."""
        assert self._writing is not None
        _open.discard(self)
        with interrupts.held():
            try:
                for file in self._release():
                    file.pages.detach()
            except BaseException:
                self._writing.leave()
                raise
            if self._touched:
                how()
            else:
                self._writing.cancel()

    def _release(self) -> list[_File]:
        """From now on our operations take no tensors of these files."""
        self.closed = True
        files, self._files = list(self._files.values()), {}
        for file in files:
            file.region.state = "closed"
        return files

    def _abandon(self) -> None:
        """Leave the files as they are, and the model hidden: whoever wrote to it is gone, or is another process."""
        assert self._writing is not None
        for file in self._release():
            try:
                file.pages.detach()
            except OSError:
                file.pages.forbid()
        self._writing.leave()


_open: weakref.WeakSet[Mapped] = weakref.WeakSet()
"""Those that are being written."""


def _after_fork() -> None:
    """In a forked child: the files are the parent's."""
    for each in list(_open):
        each._abandon()
    _open.clear()


os.register_at_fork(after_in_child=_after_fork)


class _File:
    """One file of the model in memory."""

    def __init__(self, shard: Shard, tensors: Mapping[str, TensorRef], fd: int, hidden: Path | None = None) -> None:
        """`hidden`: where the file is, if it can be written; then it was looked at before it got there."""
        if hidden is None and FileId.of(fd) != shard.file_id:
            raise CheckpointError(f"{shard.path}: changed while it was opened. Wait for its writer to finish.")
        self.is_writable = hidden is not None
        self.region = _Region([tensors[name] for name in shard.header.tensors], "writable" if hidden else "read-only")
        gone = partial(regions.remove, self.region)
        self.pages = Pages(fd, shard.file_id.size, hidden or shard.path, shared=self.is_writable, gone=gone)
        self.region.start, self.region.stop = self.pages.start, self.pages.start + self.pages.size
        regions.add(self.region)

    def tensor(self, ref: TensorRef) -> Tensor:
        """The memory of a tensor of this file, as one."""
        with torch.inference_mode(not self.is_writable):
            dtype = _DTYPES.get(ref.dtype)
            if not ref.nbytes:
                return torch.empty(ref.shape, dtype=dtype or torch.uint8)
            raw = torch.frombuffer(self.pages.buffer, dtype=torch.uint8, count=ref.nbytes, offset=ref.offset)
            if dtype is None or (not _suits(ref, dtype) and self.is_writable):
                return raw
            return (raw if _suits(ref, dtype) else raw.clone()).view(dtype).view(ref.shape)


def _suits(ref: TensorRef, dtype: torch.dtype) -> bool:
    """Whether a tensor lies where elements of its dtype may lie: torch promises nothing of others."""
    return not ref.offset % dtype.itemsize


class _Region:
    """What is known of the memory of one file at any of its addresses. Holds no memory, for it outlives that."""

    def __init__(self, refs: Sequence[TensorRef], state: Literal["read-only", "writable"]) -> None:
        self.start = self.stop = 0
        self.state: Literal["read-only", "writable", "closed"] = state
        self._refs = refs
        self._offsets = [ref.offset for ref in refs]

    def problem(self, address: int, written: bool) -> str | None:
        if self.state == "closed":
            return f"is {self._name(address)}, {_CLOSED}"
        if written and self.state == "read-only":
            return f"is {self._name(address)}, which is mapped read-only; map it with write=True to change the file"
        return None

    def note(self, address: int) -> str | None:
        ref = self._ref(address)
        dtype = _DTYPES.get(ref.dtype)
        if dtype is None:
            return f"it is {self._name(address)}, whose {ref.dtype} torch does not have, and which is served as bytes"
        if not _suits(ref, dtype) and self.state != "read-only":
            return (
                f"it is {self._name(address)}, whose {ref.dtype} begin at byte {ref.offset}, no multiple of "
                f"{dtype.itemsize}, and which is served as bytes; apply with in_place=True takes it as it is"
            )
        return None

    def populate(self, address: int, nbytes: int, written: bool) -> None:
        populate(address, nbytes, written, self._ref(address).path)

    def _ref(self, address: int) -> TensorRef:
        return self._refs[bisect_right(self._offsets, address - self.start) - 1]

    def _name(self, address: int) -> str:
        ref = self._ref(address)
        return f"{brief(ref.name)} of {ref.path}"
