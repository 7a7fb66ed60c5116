"""Models as tensors that are the pages of their files: `ires_kernels.mapped`."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from ires_kernels import regions
from ires_kernels.checkpoint import FileId, Shard, TensorRef, open_checkpoint
from ires_kernels.header import CheckpointError, brief
from ires_kernels.opening import open_file
from ires_kernels.pages import Pages

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", "C64": "complex64", "BOOL": "bool", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip
_DTYPES: dict[str, torch.dtype] = {
    dtype: getattr(torch, name) for dtype, name in _NAMES.items() if hasattr(torch, name)
}
"""What torch has of the dtypes of safetensors; not the floats of 4 and 6 bits."""

_CLOSED = "which is closed; use it inside of the with block, or a .clone() of it"


def mapped(path: str | os.PathLike[str], *, follow_links: bool = False) -> Mapped:
    """The tensors of a model, a residual or a .safetensors file, as what they are: the pages of its files.

    A mapping from names to tensors, in the order of the files, and a context manager. Nothing is read before it is
    touched; what is touched is in the page cache, takes no memory of this process, and is read once whoever maps it.

    >>> with ik.mapped("instruct/") as instruct, ik.mapped("base/") as base:
    ...     for name in instruct:
    ...         residual = ik.subtract(instruct[name], base[name])

    Tensors are read-only. Operations of this package refuse to write them, and so does torch, for they are inference
    tensors; what gets past that (in torch.inference_mode(), through numpy, .detach() or .data) stays in this process
    and never reaches the file. ``.clone()`` and ``.to(…)`` give ordinary tensors.

    Elements that torch has no dtype for (4 and 6 bits) are served as bytes: uint8 of one dimension. A tensor at an
    address that does not suit its dtype, in a file whose writer aligned nothing, is served as a copy in memory.

    Tensors that are still held after `close` can be read, and no operation of this package takes them. Files that
    somebody writes to meanwhile change under the tensors, and `close` raises CheckpointError then; a file that somebody
    cuts ends the process with SIGBUS when what is gone is touched. `apply` reads its inputs another way, and is safe.

    follow_links  accept files of the folder that are links out of it, as for `apply`

    Raises CheckpointError for what cannot be used, as everywhere, and OSError.
    """
    return Mapped(Path(os.path.abspath(path)), follow_links=follow_links)


class Mapped(Mapping[str, Tensor]):
    """See `mapped`, which makes them."""

    def __init__(self, path: Path, *, follow_links: bool) -> None:
        self.path = path
        """The folder, or the file."""
        self.checkpoint = open_checkpoint(path, follow_links=follow_links)
        """Names, dtypes, shapes and offsets, as the headers have them."""
        self._files = {shard.path: _File(shard, self.checkpoint.tensors) for shard in self.checkpoint.shards}
        self.closed = False

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name; made anew by each call, over the same memory."""
        ref = self.checkpoint.tensors.get(name)
        if ref is None:
            raise KeyError(f"{brief(name)} is not in {self.path}")
        if self.closed:
            raise ValueError(f"{self.path}: {brief(name)} was asked for after it was closed.")
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

    def __repr__(self) -> str:
        return f"<{'closed' if self.closed else 'read-only'} mapping of {brief(f'{self.path}')}, {len(self)} tensors>"

    def close(self) -> None:
        """End the use of the tensors. Raises CheckpointError where a file is not what it was when it was opened."""
        if self.closed:
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
        else:  # which matters more than what became of the files meanwhile
            self._release()

    def _release(self) -> None:
        self.closed = True
        for file in self._files.values():
            file.region.state = "closed"
        self._files = {}


class _File:
    """One file of the model in memory."""

    def __init__(self, shard: Shard, tensors: Mapping[str, TensorRef]) -> None:
        self.region = _Region([tensors[name] for name in shard.header.tensors])
        fd = open_file(shard.path)
        try:
            if FileId.of(fd) != shard.file_id:
                raise CheckpointError(f"{shard.path}: changed while it was opened. Wait for its writer to finish.")
            gone = partial(regions.remove, self.region)
            self.pages = Pages(fd, shard.file_id.size, shard.path, shared=False, gone=gone)
        finally:
            os.close(fd)
        self.region.start, self.region.stop = self.pages.start, self.pages.start + self.pages.size
        regions.add(self.region)

    def tensor(self, ref: TensorRef) -> Tensor:
        """The memory of a tensor of this file, as one."""
        dtype = _DTYPES.get(ref.dtype)
        with torch.inference_mode():
            if not ref.nbytes:
                return torch.empty(ref.shape, dtype=dtype or torch.uint8)
            raw = torch.frombuffer(self.pages.buffer, dtype=torch.uint8, count=ref.nbytes, offset=ref.offset)
            if dtype is None:
                return raw
            if raw.data_ptr() % dtype.itemsize:
                raw = raw.clone()
            return raw.view(dtype).view(ref.shape)


class _Region:
    """What is known of the memory of one file at any of its addresses. Holds no memory, for it outlives that."""

    def __init__(self, refs: Sequence[TensorRef]) -> None:
        self.start = self.stop = 0
        self.state: Literal["read-only", "closed"] = "read-only"
        self._refs = refs
        self._offsets = [ref.offset for ref in refs]

    def problem(self, address: int, written: bool) -> str | None:
        if self.state == "closed":
            return f"is {self._name(address)}, {_CLOSED}"
        if written:
            return f"is {self._name(address)}, which is mapped read-only"
        return None

    def note(self, address: int) -> str | None:
        ref = self._ref(address)
        if ref.dtype in _DTYPES:
            return None
        return f"it is {self._name(address)}, whose {ref.dtype} torch does not have, and which is served as bytes"

    def _ref(self, address: int) -> TensorRef:
        return self._refs[bisect_right(self._offsets, address - self.start) - 1]

    def _name(self, address: int) -> str:
        ref = self._ref(address)
        return f"{brief(ref.name)} of {ref.path}"
