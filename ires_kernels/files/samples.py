"""A sample of a file: the hash of a few hundred kB of it, at places that an id chooses.

Who the files of a model are is told by their names, sizes and times as long as nobody sets these: archives, image
layers and package stores do, and give two different models the same ones. A sample tells such models apart, as they
differ nearly everywhere. It does not find a byte that is damaged in a large file: only reading all of it does that.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from random import Random

import xxhash

from ires_kernels.files.opening import open_file
from ires_kernels.files.transfer import read_into

_ENDS = 1 << 15  # bytes of the beginning, where the header is, and of the end
_BLOCK, _BLOCKS = 1 << 14, 16  # of what is between, spread over it; few, as each may cost a disk a seek


def sample(path: Path, seed: str) -> str:
    """The hash of a file's size and a sample of its bytes; of all of them, if they are few.

    seed  of the places: whoever does not know it cannot tell which bytes are in the sample

    Raises OSError, and CheckpointError for what is no regular file.
    """
    fd = open_file(path)
    try:
        size = os.fstat(fd).st_size
        hasher = xxhash.xxh3_128(f"{size}".encode())
        for start, stop in _places(size, seed):
            view = memoryview(bytearray(stop - start))
            read_into(fd, view, start, path)
            hasher.update(view)
        return hasher.hexdigest()
    finally:
        os.close(fd)


def _places(size: int, seed: str) -> list[tuple[int, int]]:
    """First byte of each place, and the one after its last, in order."""
    inner = size - 2 * _ENDS
    if inner <= _BLOCK * _BLOCKS:
        return [(0, size)]
    random = Random(f"{seed} {size}")
    starts = [_ENDS + inner * i // _BLOCKS for i in range(_BLOCKS + 1)]
    blocks = [random.randint(start, end - _BLOCK) for start, end in pairwise(starts)]
    return [(0, _ENDS), *((start, start + _BLOCK) for start in blocks), (size - _ENDS, size)]
