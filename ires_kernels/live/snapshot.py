"""A copy of what a module holds, which can be planned with and read as a model on a disk, and given back."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId, Shard, TensorRef
from ires_kernels.checkpoints.header import Header, TensorInfo
from ires_kernels.live.tensors import DTYPES
from ires_kernels.planning.plan import size


class Snapshot:
    """The bytes of some tensors as they were: a `Source`.

    They are not compressed. zlib at its fastest leaves 30 to 57 % of the difference to what a residual makes of bf16
    weights (std .02, updates of 7e-5 to 1.4e-3), at 17 to 60 MB/s a core, where the copy takes 1 GB/s and more.
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
        self.nbytes = end
        try:
            self._memory = mmap.mmap(-1, max(end, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"a copy of {name} takes {size(end)}, and there is no room for it") from error
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        with torch.no_grad():
            for each in ordered:
                self.of(each, tensors[each]).copy_(tensors[each])

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
        shard = Shard(path, Header(infos, {}, 0, self.nbytes), self.stamp())
        refs = {name: TensorRef(name, i.dtype, i.shape, path, i.begin, i.nbytes) for name, i in infos.items()}
        return Checkpoint(path, "model", (shard,), refs, None, {}, config, None)

    def put_back(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
        """Give tensors the bits that they had."""
        with torch.no_grad():
            for name in names:
                tensors[name].copy_(self.of(name, tensors[name]))

    def stamp(self) -> FileId:
        return FileId(0, 0, self.nbytes, 0, 0)

    def read_into(self, view: memoryview, offset: int) -> None:
        # Other than slices of views, this lets other threads go on.
        ctypes.memmove(ctypes.addressof(ctypes.c_char.from_buffer(view)), self._address + offset, len(view))

    def read_views(self, views: Sequence[memoryview], offset: int) -> None:
        for view in views:
            self.read_into(view, offset)
            offset += len(view)

    def will_need(self, offset: int, size: int) -> None:
        """It is here."""

    def close(self) -> None:
        """It goes with its memory."""
