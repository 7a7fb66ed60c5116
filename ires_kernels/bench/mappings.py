"""Models that are changed through their own pages, beside an update in place and what people write with safetensors.

All of them change copies of one target again and again, without waiting for the disk; between turns dirty pages are
written, untimed. Before the clock starts, what mapping makes is compared with what `apply` makes, byte for byte.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ires_kernels as ik
from ires_kernels.backends.call import threads as kernel_threads
from ires_kernels.bench import floor
from ires_kernels.bench.kernels import VerificationError
from ires_kernels.bench.measure import Ways, interleave
from ires_kernels.bench.merges import BARE, FLOOR, in_place, weights
from ires_kernels.bench.result import Goal, Result
from ires_kernels.bench.synthetic import Triple
from ires_kernels.memory.mapping import mapped
from ires_kernels.tensors import ops

MAPPED, LISTED, SAFETENSORS = "mapped", "mapped, one call", "safe_open + torch"
JOBS = (BARE, MAPPED, LISTED, SAFETENSORS, FLOOR)
GOALS = (Goal(MAPPED, BARE, 1.0, 0.8), Goal(MAPPED, FLOOR, 1.5, 1.2))


def change(target: Path, triple: Triple, *, listed: bool = False) -> None:
    """target += instruct - base, through the pages of the files."""
    with mapped(target, True, "none", sync=False) as t, mapped(triple.instruct) as i, mapped(triple.base) as b:
        if listed:
            ops.add_difference_([t[name] for name in t], [i[name] for name in t], [b[name] for name in t])
        else:
            for name in t:
                ops.add_difference_(t[name], i[name], b[name])


def by_hand(target: Path, triple: Triple) -> None:
    """The same with safetensors and torch: file by file, tensor by tensor, in float32, and saved again."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    others = []
    for model in (triple.instruct, triple.base):
        opened: list[Any] = [safe_open(path, "pt") for path in weights(model)]
        others.append({name: file for file in opened for name in list(file.keys())})
    for file in weights(target):
        made = {}
        with safe_open(file, "pt") as t:
            for name in list(t.keys()):
                own, instruct, base = (each.get_tensor(name) for each in (t, *(other[name] for other in others)))
                made[name] = (own.float() + (instruct.float() - base.float())).to(own.dtype)
            metadata = t.metadata()
        save_file(made, f"{file}.new", metadata=metadata)
        os.rename(f"{file}.new", file)


def verify(triple: Triple, folder: Path, threads: int) -> int:
    """Change a copy, and compare it with what `apply` makes; returns how many bytes. Raises VerificationError."""
    out, changed = folder / "out", folder / "changed"
    token = kernel_threads.set(threads)
    try:
        ik.apply(triple.target, (triple.instruct, triple.base), out=out, sync=False, threads=threads)
        for listed in (False, True):
            shutil.copytree(triple.target, changed)
            change(changed, triple, listed=listed)
            for one, other in zip(weights(changed), weights(out), strict=True):
                if not _same(one, other):
                    raise VerificationError(f"{one}: differs from what apply makes. Nothing was timed.")
            shutil.rmtree(changed)
        return sum(os.stat(path).st_size for path in weights(out))
    finally:
        kernel_threads.reset(token)
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(changed, ignore_errors=True)


def _same(one: Path, other: Path) -> bool:
    with open(one, "rb") as first, open(other, "rb") as second:
        while True:
            piece = first.read(1 << 24)
            if piece != second.read(1 << 24):
                return False
            if not piece:
                return True


@contextmanager
def contenders(triple: Triple, folder: Path, threads: int) -> Iterator[Ways]:
    """All ways by name, for as long as the copies of the target that they change lie in `folder`.

    Each has a copy of its own, except that `apply` and mapping share one.
    """
    changed, saved, over = folder / "changed", folder / "saved", folder / "over"
    ways: Ways = {
        BARE: lambda: in_place(changed, triple, threads),
        MAPPED: lambda: change(changed, triple),
        LISTED: lambda: change(changed, triple, listed=True),
    }
    token = kernel_threads.set(threads)
    try:
        shutil.copytree(triple.target, changed)
        if find_spec("safetensors"):
            shutil.copytree(triple.target, saved)
            ways[SAFETENSORS] = lambda: by_hand(saved, triple)
        if floor.is_possible():
            shutil.copytree(triple.target, over)
            groups = list(zip(*map(weights, (over, triple.instruct, triple.base)), strict=True))
            ways[FLOOR] = lambda: floor.over(groups, threads)
        yield ways
    finally:
        kernel_threads.reset(token)
        for path in (changed, saved, over):
            shutil.rmtree(path, ignore_errors=True)


def measure(triple: Triple, folder: Path, rounds: int, *, threads: int) -> Result:
    """Time all ways in one run."""
    with contenders(triple, folder, threads) as ways:
        times = interleave(ways, rounds, before=lambda _: os.sync())
    return Result(
        triple.models,
        {**triple.facts(), "threads": threads},
        times,
        dict.fromkeys(times, 4 * triple.nbytes),
        by="time",
        yardsticks=(BARE, FLOOR),
        goals=GOALS,
    )
