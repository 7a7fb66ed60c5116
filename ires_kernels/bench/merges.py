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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ires_kernels import merge
from ires_kernels.bench import floor
from ires_kernels.bench.kernels import VerificationError, chosen, differing
from ires_kernels.bench.measure import Quartiles, Times, interleave, ratio, watch
from ires_kernels.bench.synthetic import Triple
from ires_kernels.checkpoints.checkpoint import TensorRef, open_checkpoint
from ires_kernels.streaming.cpu import TORCH_DTYPES
from ires_kernels.tensors import ops

COPY, FLOOR = "cat + cp", "bare floor"
ONE_PASS, SYNCED, EXTRACT, APPLY = "one pass", "one pass, fsync", "extract f32", "apply f32"
BARE, RING, RING_SYNCED = "in place, no undo", "in place", "in place, fsync"
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


@dataclass
class Result:
    """All merges of one size with one number of threads (None: what `apply` takes by itself)."""

    triple: Triple
    threads: int | None
    cold: bool
    times: Times
    traffic: dict[str, int]
    """Contender → bytes read and written."""
    memory: int
    """Peak private memory above the interpreter with torch, in bytes, of the one-pass merge."""

    def of_copy(self, name: str) -> Quartiles | None:
        """Time as a multiple of that of copying."""
        return ratio(self.times, name, COPY)

    @property
    def ns_per_byte(self) -> float:
        """Of the one-pass merge, per byte read or written."""
        return Quartiles.of(self.times[ONE_PASS]).median * 1e9 / self.traffic[ONE_PASS]

    def gates(self) -> list[dict[str, Any]]:
        """What was wanted, what to reach for, and what was measured; information, not a verdict."""
        size = f"{self.triple.nbytes / 1e9:.3g} GB"
        rows = [
            {
                "what": f"one pass, {size}: MB of private memory",
                "gate": 256,
                "reach": 64,
                "measured": self.memory / 1e6,
                "at_most": True,
            }
        ]
        of_copy = self.of_copy(ONE_PASS)
        if of_copy and not self.cold:
            what = f"one pass without fsync, {size} / cat + cp"
            rows.append({"what": what, "gate": 1.0, "reach": 0.6, "measured": of_copy.median, "at_most": True})
        of_floor = ratio(self.times, ONE_PASS, FLOOR)
        if of_floor and not self.cold:
            what = f"one pass without fsync, {size} / {FLOOR}"
            rows.append({"what": what, "gate": 1.5, "reach": 1.2, "measured": of_floor.median, "at_most": True})
        of_copy = self.of_copy(BARE)
        if of_copy and not self.cold:
            what = f"in place without undo and fsync, {size} / cat + cp"
            rows.append({"what": what, "gate": 0.6, "reach": 0.43, "measured": of_copy.median, "at_most": True})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON types."""
        contenders: dict[str, Any] = {}
        for name, seconds in self.times.items():
            median, of_copy = Quartiles.of(seconds).median, self.of_copy(name)
            contenders[name] = {
                "seconds": seconds,
                "median_seconds": median,
                "gb_per_second": self.traffic[name] / median / 1e9,
                "of_copy": of_copy and of_copy.to_dict(),
            }
        return {
            "parameters": self.triple.parameters,
            "model_bytes": self.triple.nbytes,
            "threads": self.threads,
            "cold": self.cold,
            "contenders": contenders,
            "ns_per_byte": self.ns_per_byte,
            "private_memory_bytes": self.memory,
            "gates": self.gates(),
        }


def weights(folder: Path) -> list[str]:
    """The files that hold tensors."""
    return sorted(f"{path}" for path in folder.glob("*.safetensors"))


def copy(triple: Triple, out: Path) -> None:
    """What a merge is measured against, with the ordinary tools. Reflinks would copy nothing."""
    with open(os.devnull, "wb") as null:
        subprocess.run(["cat", *weights(triple.base), *weights(triple.instruct)], stdout=null, check=True)
    out.mkdir()
    subprocess.run(["cp", "--reflink=never", *weights(triple.target), f"{out}"], check=True)


def bare(triple: Triple, out: Path, threads: int) -> None:
    """The least that a merge can take: reads what it reads and writes what it writes."""
    out.mkdir()
    for group in zip(*map(weights, (triple.target, triple.instruct, triple.base)), strict=True):
        floor.new_file([Path(path) for path in group], out / Path(group[0]).name, threads)


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
        merge.apply(triple.target, pair, out=out, sync=False, threads=threads, device=device)
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
    count = min(_CHECKED, ref.numel - start) * dtype.itemsize
    raw = np.fromfile(ref.path, np.uint8, count, offset=ref.offset + start * dtype.itemsize)
    return torch.from_numpy(raw).view(dtype)


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
    out, residual, changed = folder / "out", folder / "residual", folder / "changed"
    pair = (triple.instruct, triple.base)
    size = triple.nbytes
    residual_size = 4 * triple.parameters
    turns = iter(range(1 << 30))

    def in_place(undo: str, sync: bool) -> object:
        # The tag makes it another application to what the one before has left.
        tag = f"{next(turns)}"
        return merge.apply(changed, pair, in_place=True, undo=undo, sync=sync, tag=tag, threads=threads)

    count = threads or min(16, len(os.sched_getaffinity(0)))
    contenders: dict[str, Callable[[], object]] = {
        COPY: lambda: copy(triple, out),
        **({FLOOR: lambda: bare(triple, out, count)} if floor.is_possible() else {}),
        ONE_PASS: lambda: merge.apply(triple.target, pair, out=out, sync=False, threads=threads),
        BARE: lambda: in_place("none", False),
    }
    traffic = {COPY: 4 * size, FLOOR: 4 * size, ONE_PASS: 4 * size, BARE: 4 * size}
    if not only_one_pass:
        contenders |= {
            SYNCED: lambda: merge.apply(triple.target, pair, out=out, threads=threads),
            EXTRACT: lambda: merge.extract(triple.base, triple.instruct, out, sync=False, threads=threads),
            APPLY: lambda: merge.apply(triple.target, residual, out=out, sync=False, threads=threads),
            RING: lambda: in_place("ring", False),
            RING_SYNCED: lambda: in_place("ring", True),
        }
        traffic |= {SYNCED: 4 * size, EXTRACT: 2 * size + residual_size, APPLY: 2 * size + residual_size}
        traffic |= {RING: 4 * size, RING_SYNCED: 4 * size}  # the journal apart
        merge.extract(triple.base, triple.instruct, residual, sync=False, threads=threads)

    def before(_: str) -> None:
        os.sync()  # what one contender leaves to be written is not for the next one to pay
        if cold:
            forget([triple.base, triple.instruct, triple.target, residual, changed])

    try:
        shutil.copytree(triple.target, changed)
        times = interleave(contenders, rounds, before=before, after=lambda _: shutil.rmtree(out, ignore_errors=True))
        memory = private_memory(triple, out, threads)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(residual, ignore_errors=True)
        shutil.rmtree(changed, ignore_errors=True)
    return Result(triple, threads, cold, times, traffic, memory)


def private_memory(triple: Triple, out: Path, threads: int | None) -> int:
    """Peak bytes of a process that does nothing but a one-pass merge, above what importing torch takes."""
    paths = [f"{path}" for path in (triple.target, triple.instruct, triple.base, out)]
    done = watch([sys.executable, "-c", _IN_A_PROCESS, *paths, f"{threads or 0}"])
    if done.code:
        raise RuntimeError(f"the merge whose memory was to be measured failed: {done.output}")
    return done.peak - int(done.output.splitlines()[0]) * 1024


def cost_per_byte(results: list[Result]) -> list[dict[str, Any]]:
    """How far the cost of a byte strays from its median over the sizes, as a gate."""
    if len(results) < 2:
        return []
    costs = [result.ns_per_byte for result in results]
    middle = Quartiles.of(costs).median
    spread = max(abs(cost / middle - 1) for cost in costs)
    sizes = [result.triple.nbytes / 1e9 for result in results]
    what = f"cost per byte from {min(sizes):.3g} to {max(sizes):.3g} GB: deviation from the median"
    return [{"what": what, "gate": 0.15, "reach": 0.05, "measured": spread, "at_most": True}]
