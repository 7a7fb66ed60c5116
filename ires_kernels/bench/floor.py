"""The least that a merge of files can take: loops that read the inputs and write the output, and do nothing else.

The files are mapped, tiles of them made present with MADV_POPULATE_READ, which beats pread here; what is written is the
output of the memory loop that the kernels are held against. Two kinds: into a new file by pwrite, which beats writing
to a mapping, and over a mapped file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from ires_kernels.backends import native
from ires_kernels.files.pages import Pages, populate
from ires_kernels.files.transfer import allocate, write_all

TILE = 1 << 20  # bytes of a file at a time, so that what is written is still in the cache
AHEAD = 8  # tiles that are made present at once


def is_possible() -> bool:
    """Whether there are compiled loops."""
    return bool(native.isas())


def new_file(inputs: Sequence[Path], out: Path, threads: int) -> None:
    """Read files of one size, and write another one of that size."""
    size = inputs[0].stat().st_size
    memory = _mapped(inputs, writable=False)
    scratch = [torch.zeros(TILE // 2, dtype=torch.bfloat16) for _ in range(threads)]
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)

    def tile(thread: int, start: int, stop: int) -> None:
        written = scratch[thread][: (stop - start) // 2]
        _loop(written, [each[start // 2 : stop // 2] for each in memory])
        write_all(fd, written.view(torch.uint8).numpy().data, start, out)

    try:
        allocate(fd, size, out)
        _tiles(inputs, memory, size, threads, tile, writable=False)
    finally:
        os.close(fd)


def over(groups: Iterable[Sequence[Path]], threads: int) -> None:
    """Read files of one size in each group, and write over the first one; what it holds then means nothing."""
    for inputs in groups:
        memory = _mapped(inputs, writable=True)

        def tile(_: int, start: int, stop: int, memory: Sequence[Tensor] = memory) -> None:
            pieces = [each[start // 2 : stop // 2] for each in memory]
            _loop(pieces[0], pieces)

        _tiles(inputs, memory, inputs[0].stat().st_size, threads, tile, writable=True)


def _mapped(paths: Sequence[Path], *, writable: bool) -> list[Tensor]:
    """Files as bfloat16, the first one to be written."""
    memory = []
    for i, path in enumerate(paths):
        shared = writable and i == 0
        fd = os.open(path, os.O_RDWR if shared else os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            pages = Pages(fd, size, path, shared=shared, gone=lambda: None)
        finally:
            os.close(fd)
        memory.append(torch.frombuffer(pages.buffer, dtype=torch.bfloat16, count=size // 2))
    return memory


def _tiles(
    paths: Sequence[Path],
    memory: Sequence[Tensor],
    size: int,
    threads: int,
    tile: Callable[[int, int, int], None],
    *,
    writable: bool,
) -> None:
    """Call `tile` for all of the bytes, by threads that take turns."""
    turns, errors = count(), list[BaseException]()
    size -= size % 2

    def work(thread: int) -> None:
        try:
            while (begin := next(turns) * AHEAD * TILE) < size and not errors:
                end = min(begin + AHEAD * TILE, size)
                for i, (path, each) in enumerate(zip(paths, memory, strict=True)):
                    populate(each.data_ptr() + begin, end - begin, writable and i == 0, path)
                for start in range(begin, end, TILE):
                    tile(thread, start, min(start + TILE, end))
        except BaseException as error:
            errors.append(error)

    others = [threading.Thread(target=work, args=(i,)) for i in range(1, threads)]
    for other in others:
        other.start()
    work(0)
    for other in others:
        other.join()
    if errors:
        raise errors[0]


def _loop(out: Tensor, inputs: Sequence[Tensor]) -> None:
    from ires_kernels import _native

    _native.memory_loop(native._item(out, tuple(inputs), 0), 1, "")
