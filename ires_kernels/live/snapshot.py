"""A copy of what a module holds, which can be planned with and read as a model on a disk, and given back."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ires_kernels.backends import packing
from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId, Shard, TensorRef
from ires_kernels.checkpoints.header import Header, TensorInfo
from ires_kernels.checkpoints.sources import IN_MEMORY, Read
from ires_kernels.files.plain import size
from ires_kernels.live import kept
from ires_kernels.live.kept import Rooms, Run, Shelf, for_each
from ires_kernels.live.tensors import DTYPES


class Snapshot:
    """The bytes of some tensors as they were: a `Source`.

    What lies in the memory of a CPU is read there until it is to be changed. Then it is copied before (`keep`), or by
    the threads that change it, tile by tile as they read it (`keep_as_read`): so no pass over the module is spent. Of
    each piece a copy is there until the new bits are; then it can be packed by what the update did to it, and takes a
    fifth to a half of its room. That needs no file: what was read of a residual may be gone.

    A copy takes .8 of that time where its memory is fresh, and next to none where it is not: the system clears a page
    of 4 KiB in 1.4 µs (of a virtual machine), 8 times what it takes to write one again. Pages of 2 MiB (MADV_HUGEPAGE)
    were 4 times as fast where there were some, and 4 times slower where memory was full of the files of models, as it
    is then.

    Not the update again, from the residual's files with -alpha: of that .4 to .7 bits an element are lost to rounding,
    but these files may be changed or out of reach by then, and while an update fails they are what has just failed.
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
        # Where the bytes are that this has from some offset on, less that; and by name what is copied as it is read, by
        # where it begins.
        self._live = {n: t.data_ptr() - self.infos[n].begin for n, t in tensors.items() if _is_in_place(t)}
        self._runs: dict[str, dict[int, Run]] = {}
        self._packed: set[str] = set()
        self._rooms, self._shelf = Rooms(), Shelf()
        self._copy({name: tensor for name, tensor in tensors.items() if name not in self._live})

    @property
    def nbytes(self) -> int:
        """How much memory it takes, beside what is there anyway."""
        copied = sum(info.nbytes for name, info in self.infos.items() if name not in self._live)
        return copied + sum(run.nbytes for runs in self._runs.values() for run in runs.values())

    @property
    def is_packed(self) -> bool:
        """Whether some of it needs the bits that the update made of it."""
        return bool(self._packed)

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors: they will be changed."""
        mine = {name: tensor for name, tensor in tensors.items() if name in self._live}
        self._copy(mine)
        for name in mine:
            del self._live[name]

    def keep_as_read(self, names: Iterable[str], *, packed: bool) -> None:
        """From now on copy each byte of these when it is read: that will be once, and before it is changed.

        packed  what can be packed will be, once it is changed, and is not copied otherwise
        """
        self._runs = {name: {} for name in names if name in self._live}
        self._packed = {name for name in self._runs if packed and packing.packs(self.infos[name].dtype)}

    def placed(self, name: str, begin: int, size: int) -> None:
        """Bytes of a tensor, from `begin` on, are what the update makes of them: pack what they were."""
        if name in self._packed:
            runs = self._runs[name]
            at, end = self.infos[name].begin + begin, self.infos[name].begin + begin + size
            while at < end and at in runs:
                run = runs[at]
                room = run.address
                if not run.is_packed:
                    run.pack(self._live[name] + at, room + _aligned(run.size))
                run.move(self._shelf)
                self._rooms.give(room)
                at += run.size

    def settle(self) -> None:
        """No more of it will change: let go of what that took."""
        self._rooms.clear()

    def _run(self, name: str, begin: int, size: int, *, by_reader: bool) -> Run:
        """Room for a run, which begins here: for a copy; or, if its reader packs it, for a record alone."""
        dtype, address = self.infos[name].dtype, self._address + begin
        packed = name in self._packed
        if packed:
            count = size // (self.infos[name].nbytes // self.infos[name].numel)
            address = self._rooms.take((0 if by_reader else _aligned(size)) + packing.room(dtype, count))
        run = self._runs[name][begin] = Run(dtype, address, 0, packed=packed and by_reader)
        return run

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

    def differing(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> str | None:
        """The first of the tensors that has not the bits by which its old ones were packed; these it has to have."""
        wrong: set[str] = set()

        def look(place: _Place) -> None:
            if not place.run.fits(place.address):
                wrong.add(place.name)

        names = [name for name in names if name in self._packed]
        for_each([place for name in names for place in self._places(name, tensors[name])], look)
        for name in names:
            if not _is_in_place(tensors[name]):
                for_each(self._places(name, flat := _flat(tensors[name])), look)
                del flat
        return next((name for name in names if name in wrong), None)

    def put_back(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Give tensors the bits that they had, as far as these were kept: no others were changed."""
        names = [*names]
        for_each([place for name in names for place in self._places(name, tensors[name])], _restore)
        with torch.no_grad():
            for name in names:
                tensor = tensors[name]
                if _is_in_place(tensor):
                    torch.autograd.graph.increment_version(tensor)
                elif name not in self._live:
                    tensor.copy_(self.of(name, tensor))
                elif self._runs.get(name):
                    for_each(self._places(name, flat := _flat(tensor)), _restore)
                    tensor.copy_(flat)

    def _places(self, name: str, tensor: Tensor) -> list[_Place]:
        """What is kept of a tensor, and where that belongs; nothing where its bytes do not follow each other there."""
        if not _is_in_place(tensor):
            return []
        info = self.infos[name]
        whole = {} if name in self._live else {info.begin: Run(info.dtype, self._address + info.begin, info.nbytes)}
        there = tensor.data_ptr() - info.begin
        return [_Place(name, run, there + begin) for begin, run in self._runs.get(name, whole).items()]

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
        source = self._live.get(name, self._address) + begin
        runs = self._runs.get(name)
        if runs is not None:
            if begin not in runs:
                self._run(name, begin, end - begin, by_reader=False).copy(source, end - begin)
            source = runs[begin].copied
        ctypes.memmove(to, source, end - begin)

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
        if live is None or runs is None:
            return Read(IN_MEMORY, (self._address if live is None else live) + begin, size, self.path)
        if begin in runs:
            return Read(IN_MEMORY, runs[begin].copied, size, self.path)
        run = self._run(name, begin, size, by_reader=True)
        packed = run.dtype if run.is_packed else ""
        return Read(IN_MEMORY, live + begin, size, self.path, run.address, run.counts, packed)

    def will_need(self, offset: int, size: int) -> None:
        """It is here."""

    def close(self) -> None:
        """It goes with its memory."""


def _aligned(size: int) -> int:
    """Bytes after which the next memory begins: at a cache line of its own."""
    return -(-size // 64) * 64


class _Place(NamedTuple):
    """Where a run belongs."""

    name: str
    run: Run
    address: int


def _restore(place: _Place) -> None:
    place.run.restore(place.address)


def _flat(tensor: Tensor) -> Tensor:
    """Its elements in the memory of the CPU, one after the other."""
    return tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


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
    """Let go of memory that is there for the next copy, or the next records."""
    _spare.clear()
    kept.forget()


def _leave(memory: mmap.mmap) -> None:
    """For the next one, unless a larger one is there."""
    if hasattr(mmap, "MADV_FREE") and all(len(other) < len(memory) for other in _spare):
        memory.madvise(mmap.MADV_FREE)
        _spare[:] = [memory]
