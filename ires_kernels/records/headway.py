"""How far an unfinished merge has come, as its files show it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files.opening import open_file
from ires_kernels.files.plain import several, unit
from ires_kernels.files.unfinished import reserved_in


@dataclass(frozen=True)
class Headway:
    """Files of weights and bytes that are done, of all; of an update in place bytes alone."""

    bytes_done: int
    bytes_in_all: int
    files_done: int = 0
    files_in_all: int = 0

    def __str__(self) -> str:
        name, factor = unit(self.bytes_in_all)
        done = f"{self.bytes_done / factor:.3g} of {self.bytes_in_all / factor:.3g} {name}"
        if not self.files_in_all:
            return done
        return f"{self.files_done} of {several(self.files_in_all, 'file')}, {done}"


def of_new_folder(partial: Path, sizes: Mapping[str, int]) -> Headway:
    """Of an output whose weights will have these sizes. A file that is being written counts by what was written."""
    there = reserved_in(partial, sizes)
    complete = [name for name, (_, is_complete) in there.items() if is_complete]
    done = sum(sizes[name] for name in complete)
    done += sum(max(map(_written, places)) for places, is_complete in there.values() if not is_complete)
    return Headway(done, sum(sizes.values()), len(complete), len(sizes))


def of_update(windows: Iterable[list[Any]], done: int) -> Headway:
    """Of an update in place of which so many windows are new; windows are nearly of one size."""
    sizes = [stop - start for _, start, stop in windows]
    return Headway(sum(sizes[:done]), sum(sizes))


def _written(path: Path) -> int:
    """Bytes of a reserved file that were written: what is reserved and no more is a hole to who asks.

    0 where the file system knows no holes.
    """
    try:
        fd = open_file(path, flags=os.O_NOFOLLOW)
    except (CheckpointError, OSError):  # it has got its name by now; or it is none of ours
        return 0
    written = end = 0
    try:
        size = os.fstat(fd).st_size
        while end < size:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            written += end - start
    except OSError:  # no data follow, or it cannot be asked
        pass
    finally:
        os.close(fd)
    return written if written < size else 0
