"""Whole merges against copying: `cat` of two models and `cp` of a third is the least that a merge reads and writes.

And against compiled loops that do as much in this process (floor.py).
Contenders take turns; between turns outputs are removed and dirty pages written, untimed. Before the clock starts, one
merge is compared with the reference arithmetic at both ends of every tensor. Memory is what a process of its own holds
privately (RssAnon) above an interpreter that has imported torch; pages of files are not counted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ires_kernels as ik
from ires_kernels.bench import floor
from ires_kernels.bench.kernels import VerificationError, chosen, differing
from ires_kernels.bench.measure import Quartiles, Ways, interleave, watch
from ires_kernels.bench.result import Comparison, Goal, Result
from ires_kernels.bench.synthetic import Triple
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.streaming.cpu import TORCH_DTYPES
from ires_kernels.streaming.stream import default_threads
from ires_kernels.tensors import ops

COPY, FLOOR = "cat + cp", "bare floor"
ONE_PASS, SYNCED, EXTRACT, APPLY = "one pass", "one pass, fsync", "extract f32", "apply f32"
BARE, RING, RING_SYNCED = "in place, no undo", "in place", "in place, fsync"
BRIEF = (COPY, FLOOR, ONE_PASS, BARE)
"""What is measured of further sizes, for the cost per byte."""
JOBS = (*BRIEF, SYNCED, EXTRACT, APPLY, RING, RING_SYNCED)
GOALS = (Goal(ONE_PASS, COPY, 1.0, 0.6), Goal(ONE_PASS, FLOOR, 1.5, 1.2), Goal(BARE, COPY, 0.6, 0.43))
"""With a warm page cache."""

_turns = count()
_CHECKED = 1 << 14  # elements compared at each end of a tensor

# What `watch` runs: the first line of its output is the memory before the package is imported.
_IN_A_PROCESS = """\
import sys, torch
torch.zeros(1)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon:")), flush=True)
import ires_kernels
target, instruct, base, out, threads = sys.argv[1:]
ires_kernels.apply(target, (instruct, base), out=out, sync=False, threads=int(threads) or None)
"""


def weights(folder: Path) -> list[Path]:
    """The files that hold tensors."""
    return sorted(folder.glob("*.safetensors"))


def read(*folders: Path) -> None:
    """Read all weights with the ordinary tool."""
    with open(os.devnull, "wb") as null:
        subprocess.run(["cat", *(path for folder in folders for path in weights(folder))], stdout=null, check=True)


def copy(triple: Triple, out: Path) -> None:
    """What a merge is measured against, with the ordinary tools. Reflinks would copy nothing."""
    read(triple.base, triple.instruct)
    out.mkdir()
    subprocess.run(["cp", "--reflink=never", *weights(triple.target), out], check=True)


def bare(triple: Triple, out: Path, threads: int) -> None:
    """The least that a merge can take: reads what it reads and writes what it writes."""
    out.mkdir()
    for group in zip(*map(weights, (triple.target, triple.instruct, triple.base)), strict=True):
        floor.new_file(group, out / group[0].name, threads)


def in_place(target: Path, triple: Triple, threads: int | None, *, undo: str = "none", sync: bool = False) -> None:
    """Change `target`; a tag of its own makes it another application to what the one before has left."""
    pair, tag = (triple.instruct, triple.base), f"{next(_turns)}"
    ik.apply(target, pair, in_place=True, undo=undo, sync=sync, tag=tag, threads=threads)


def forget(folders: Iterable[Path]) -> None:
    """Drop the folders' weights from the page cache; what is not on the disk yet goes there first."""
    for path in (path for folder in folders for path in weights(folder)):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def verify(triple: Triple, folder: Path, threads: int | None = None, device: str = "cpu") -> int:
    """Merge, and compare both ends of every tensor with the reference arithmetic; returns how many elements.

    Raises VerificationError.
    """
    out = folder / "out"
    try:
        pair = (triple.instruct, triple.base)
        ik.apply(triple.target, pair, out=out, sync=False, threads=threads, device=device)
        return _compare(triple, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _compare(triple: Triple, out: Path) -> int:
    checkpoints = [open_checkpoint(path).tensors for path in (triple.target, triple.instruct, triple.base, out)]
    compared = 0
    for name in checkpoints[0]:
        *inputs, got = (tensors[name] for tensors in checkpoints)
        for start in {0, max(0, got.numel - _CHECKED)}:
            values = [_read(ref, start) for ref in inputs]
            with chosen("reference", 1):
                wanted = ops.add_difference(values[0], values[1], values[2])
            wrong = differing(_read(got, start), wanted)
            if wrong:
                raise VerificationError(
                    f"{got.path}: {name!r} differs from the reference backend in {wrong:,} of {len(wanted):,} elements "
                    f"from {start:,} on. Nothing was timed."
                )
            compared += len(wanted)
    return compared


def _read(ref: TensorRef, start: int) -> Tensor:
    """Up to _CHECKED elements, flat."""
    dtype = TORCH_DTYPES[ref.dtype]
    nbytes = min(_CHECKED, ref.numel - start) * dtype.itemsize
    raw = np.fromfile(ref.path, np.uint8, nbytes, offset=ref.offset + start * dtype.itemsize)
    return torch.from_numpy(raw).view(dtype)


@contextmanager
def contenders(
    triple: Triple, folder: Path, threads: int | None = None, *, only_one_pass: bool = False
) -> Iterator[Ways]:
    """All merges of `triple` by name, and copying, for as long as what they need lies in `folder`.

    New models are written to `folder`/out, which must not be there.
    """
    out, residual, changed = folder / "out", folder / "residual", folder / "changed"
    pair = (triple.instruct, triple.base)
    ways: Ways = {
        COPY: lambda: copy(triple, out),
        FLOOR: lambda: bare(triple, out, threads or default_threads()),
        ONE_PASS: lambda: ik.apply(triple.target, pair, out=out, sync=False, threads=threads),
        BARE: lambda: in_place(changed, triple, threads),
        SYNCED: lambda: ik.apply(triple.target, pair, out=out, threads=threads),
        EXTRACT: lambda: ik.extract(triple.base, triple.instruct, out, sync=False, threads=threads),
        APPLY: lambda: ik.apply(triple.target, residual, out=out, sync=False, threads=threads),
        RING: lambda: in_place(changed, triple, threads, undo="ring"),
        RING_SYNCED: lambda: in_place(changed, triple, threads, undo="ring", sync=True),
    }
    if not floor.is_possible():
        del ways[FLOOR]
    try:
        shutil.copytree(triple.target, changed)
        if not only_one_pass:
            ik.extract(triple.base, triple.instruct, residual, sync=False, threads=threads)
        yield {name: way for name, way in ways.items() if name in BRIEF or not only_one_pass}
    finally:
        for path in (out, residual, changed):
            shutil.rmtree(path, ignore_errors=True)


def measure(
    triple: Triple,
    folder: Path,
    rounds: int,
    *,
    threads: int | None = None,
    cold: bool = False,
    only_one_pass: bool = False,
) -> Result:
    """Time the merges of `triple` into new folders below `folder`, and copying, in one run."""
    out = folder / "out"

    def before(_: str) -> None:
        os.sync()  # what one contender leaves to be written is not for the next one to pay
        if cold:
            forget(path for path in folder.iterdir() if path.is_dir())

    with contenders(triple, folder, threads, only_one_pass=only_one_pass) as ways:
        times = interleave(ways, rounds, before=before, after=lambda _: shutil.rmtree(out, ignore_errors=True))
        memory = private_memory(triple, out, threads)
    one_residual = 2 * triple.nbytes + 4 * triple.parameters
    megabytes = Quartiles.of([memory / 1e6])
    return Result(
        triple.models,
        {**triple.facts(), "threads": threads, "cold": cold},
        times,
        {name: one_residual if name in (EXTRACT, APPLY) else 4 * triple.nbytes for name in times},  # the journal apart
        by="time",
        yardsticks=(COPY, FLOOR),
        goals=() if cold else GOALS,
        numbers=[Comparison(f"{triple.models}: {ONE_PASS}, MB of private memory", megabytes, 256, 64)],
        notes={ONE_PASS: {"private_memory_bytes": memory}},
    )


def private_memory(triple: Triple, out: Path, threads: int | None) -> int:
    """Peak bytes of a process that does nothing but a one-pass merge, above what importing torch takes."""
    paths = [f"{path}" for path in (triple.target, triple.instruct, triple.base, out)]
    done = watch([sys.executable, "-c", _IN_A_PROCESS, *paths, f"{threads or 0}"])
    if done.code:
        raise RuntimeError(f"the merge whose memory was to be measured failed: {done.output}")
    return done.peak - int(done.output.splitlines()[0]) * 1024


def cost_per_byte(results: Sequence[Result]) -> list[Comparison]:
    """How far the cost of a byte of the one-pass merge strays from its median over the sizes."""
    if len(results) < 2:
        return []
    costs = [result.median(ONE_PASS) / result.traffic[ONE_PASS] for result in results]
    middle = Quartiles.of(costs).median
    spread = max(abs(cost / middle - 1) for cost in costs)
    sizes = [result.facts["model_bytes"] / 1e9 for result in results]
    what = f"cost per byte from {min(sizes):.3g} to {max(sizes):.3g} GB: deviation from the median"
    return [Comparison(what, Quartiles.of([spread]), 0.15, 0.05)]
