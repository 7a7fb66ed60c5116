"""A copy of what a module holds, which can be planned with and read as a model on a disk, and given back."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId, Shard, TensorRef
from ires_kernels.checkpoints.header import Header, TensorInfo
from ires_kernels.checkpoints.sources import IN_MEMORY, Read
from ires_kernels.files.plain import size
from ires_kernels.live.tensors import DTYPES


class Snapshot:
    """The bytes of some tensors as they were: a `Source`.

    What lies in the memory of a CPU is read there until it is to be changed. Then it is copied before (`keep`), or by
    the threads that change it, tile by tile as they read it (`keep_as_read`): so no pass over the module is spent.

    What is kept is not compressed. zlib at its fastest leaves 30 to 57 % of the difference to what a residual makes of
    bf16 weights (std .02, updates of 7e-5 to 1.4e-3), at 17 to 60 MB/s a core, where the copy takes 1 GB/s and more.
    Most of that is the system's: it clears a page of 4 KiB in 1.4 µs (of a virtual machine), 8 times what it takes to
    write one again. Pages of 2 MiB (MADV_HUGEPAGE) were 4 times as fast where there were some, and 4 times slower where
    memory was full of the files of models, as it is then.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """`name`: what errors call it. Raises MemoryError where there is no room."""
        self.name = name
        # The widest ones first: then all of them are aligned.
        ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
        self.infos: dict[str, TensorInfo] = {}
        end = 0
        for each in ordered:
            tensor = tensors[each]
            start, end = end, end + tensor.numel() * tensor.element_size()
            self.infos[each] = TensorInfo(DTYPES[tensor.dtype], tuple(tensor.shape), start, end)
        self._size = end
        try:
            self._memory = _room(max(end, 1))
        except OSError as error:
            raise MemoryError(f"a copy of {name} takes {size(end)}, and there is no room for it") from error
        weakref.finalize(self, _leave, self._memory)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._names = ordered
        self._begins = [self.infos[each].begin for each in ordered]
        # Where the bytes are that this has from some offset on, less that; and by name what is copied as it is read:
        # by where a run begins how many of its bytes are here, which who reads them itself counts as it goes.
        self._live = {n: t.data_ptr() - self.infos[n].begin for n, t in tensors.items() if _is_in_place(t)}
        self._runs: dict[str, dict[int, ctypes.c_int64]] = {}
        self._copy({name: tensor for name, tensor in tensors.items() if name not in self._live})

    @property
    def nbytes(self) -> int:
        """How much of it is a copy."""
        return sum(info.nbytes for name, info in self.infos.items() if name not in self._live or name in self._runs)

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors: they will be changed."""
        mine = {name: tensor for name, tensor in tensors.items() if name in self._live}
        self._copy(mine)
        for name in mine:
            del self._live[name]

    def keep_as_read(self, names: Iterable[str]) -> None:
        """From now on copy each byte of these when it is read: that will be once, and before it is changed."""
        self._runs = {name: {} for name in names if name in self._live}

    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.of(name, tensor).copy_(tensor)

    @property
    def path(self) -> Path:
        """One at which nothing can be, so that no file is taken for it."""
        return Path("/dev/null") / self.name

    def of(self, name: str, like: Tensor) -> Tensor:
        """A tensor as it was, in this memory; with the dtype of `like`."""
        info = self.infos[name]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=like.dtype)
        flat = torch.frombuffer(self._memory, dtype=like.dtype, count=info.numel, offset=info.begin)
        return flat.view(info.shape)

    def checkpoint(self, config: dict[str, Any] | None) -> Checkpoint:
        """All of it as a model."""
        path, infos = self.path, self.infos
        shard = Shard(path, Header(infos, {}, 0, self._size), self.stamp())
        refs = {name: TensorRef(name, i.dtype, i.shape, path, i.begin, i.nbytes) for name, i in infos.items()}
        return Checkpoint(path, "model", (shard,), refs, None, {}, config, None)

    def put_back(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Give tensors the bits that they had, as far as these were kept: no others were changed."""
        with torch.no_grad():
            for name in names:
                info, tensor = self.infos[name], tensors[name]
                whole = {info.begin: ctypes.c_int64(info.nbytes)}
                kept = self._runs.get(name, whole if name not in self._live else {})
                if _is_in_place(tensor):  # torch's own threads wait for each other, and longer where others compute
                    there = tensor.data_ptr() - info.begin
                    for begin, size in kept.items():
                        ctypes.memmove(there + begin, self._address + begin, size.value)
                    torch.autograd.graph.increment_version(tensor)
                elif kept:
                    tensor.copy_(self.of(name, tensor))

    def stamp(self) -> FileId:
        return FileId(0, 0, self._size, 0, 0)

    def read_into(self, view: memoryview, offset: int) -> None:
        if not len(view):
            return
        to, end = ctypes.addressof(ctypes.c_char.from_buffer(view)) - offset, offset + len(view)
        while offset < end:
            name = self._names[bisect_right(self._begins, offset) - 1]
            stop = min(end, self.infos[name].end)
            self._read(name, offset, stop, to + offset)
            offset = stop

    def _read(self, name: str, begin: int, end: int, to: int) -> None:
        # Other than slices of views, memmove lets other threads go on.
        source, runs = self._live.get(name, self._address), self._runs.get(name)
        if runs is not None:
            if begin not in runs:
                ctypes.memmove(self._address + begin, source + begin, end - begin)
                runs[begin] = ctypes.c_int64(end - begin)
            source = self._address
        ctypes.memmove(to, source + begin, end - begin)

    def read_views(self, views: Sequence[memoryview], offset: int) -> None:
        for view in views:
            self.read_into(view, offset)
            offset += len(view)

    def reads(self, offset: int, size: int) -> list[Read]:
        found, end = [], offset + size
        while offset < end:
            name = self._names[bisect_right(self._begins, offset) - 1]
            stop = min(end, self.infos[name].end)
            found.append(self._place(name, offset, stop - offset))
            offset = stop
        return found or [Read(IN_MEMORY, self._address, 0, self.path)]

    def _place(self, name: str, begin: int, size: int) -> Read:
        """Where bytes of a tensor are, and where they are to be kept if that is to be now."""
        runs, live = self._runs.get(name), self._live.get(name)
        if live is None or (runs is not None and begin in runs):
            return Read(IN_MEMORY, self._address + begin, size, self.path)
        if runs is None:
            return Read(IN_MEMORY, live + begin, size, self.path)
        kept = runs[begin] = ctypes.c_int64(0)
        return Read(IN_MEMORY, live + begin, size, self.path, self._address + begin, ctypes.addressof(kept))

    def will_need(self, offset: int, size: int) -> None:
        """It is here."""

    def close(self) -> None:
        """It goes with its memory."""


def _is_in_place(tensor: Tensor) -> bool:
    """Whether its bytes follow each other in the memory of the CPU."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.numel() > 0


_spare: list[mmap.mmap] = []
"""Memory of a copy that nobody needs any more, one at most. The system may take its pages whenever it needs them
(MADV_FREE): until then the next copy, as of a sweep over alpha, has pages that are not fresh."""


def _room(nbytes: int) -> mmap.mmap:
    """Memory of this process alone, that takes room where it is written. Raises OSError."""
    try:
        spare = _spare.pop()
    except IndexError:
        spare = None
    if spare is not None and nbytes <= len(spare):
        return spare
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def forget() -> None:
    """Let go of memory that is there for the next copy."""
    _spare.clear()


def _leave(memory: mmap.mmap) -> None:
    """For the next one, unless a larger one is there."""
    if hasattr(mmap, "MADV_FREE") and all(len(other) < len(memory) for other in _spare):
        memory.madvise(mmap.MADV_FREE)
        _spare[:] = [memory]
