"""Whole merges through a GPU against the slower of the two things that none can do without: storage and PCIe.

Storage is `cat` of what is read and `cp` of what is written, as for merges on the CPU; PCIe is a copy of the same bytes
between pinned host memory and the device, both ways at once. A merge that overlaps everything takes the longer of both.
`load` stands beside what else reads three models onto a device (loaders.py) as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import ires_kernels as ik
from ires_kernels.bench import loaders, merges
from ires_kernels.bench.accelerator import Accelerator
from ires_kernels.bench.gpu import available
from ires_kernels.bench.measure import Times, Ways, interleave
from ires_kernels.bench.result import Goal, Result
from ires_kernels.bench.synthetic import Triple

READ, PCIE, PCIE_IN = "cat", "PCIe", "PCIe in"
ON_CPU, ON_GPU, LOAD = "apply on the CPU", "apply", "load"
FLOORS = {ON_GPU: (merges.COPY, PCIE), LOAD: (READ, PCIE_IN)}
"""Merge → what it is measured against: the slower of the two, round by round."""
LOADERS = (loaders.PREAD, loaders.LOAD_FILE, loaders.FAST, loaders.SCRIPT)
WANTED = 1.25
"""The most wanted of a merge, as a multiple of that; of `load` also as a multiple of reading alone."""


def slower(name: str) -> str:
    """What the slower of a merge's floors is called."""
    return " or ".join(FLOORS[name])


def measure(triple: Triple, folder: Path, device: Accelerator, rounds: int) -> Result:
    """Time merges of `triple` on the CPU and on the device, and their floors, in one run."""
    out, pair, size = folder / "out", (triple.instruct, triple.base), triple.nbytes
    place = str(device.place)
    ways: Ways = {
        merges.COPY: lambda: merges.copy(triple, out),
        READ: lambda: merges.read(triple.base, triple.instruct, triple.target),
        PCIE: lambda: device.transfer(3 * size, size),
        PCIE_IN: lambda: device.transfer(3 * size, 0),
        ON_CPU: lambda: ik.apply(triple.target, pair, out=out, sync=False),
        ON_GPU: lambda: ik.apply(triple.target, pair, out=out, sync=False, device=place),
        LOAD: lambda: ik.load(triple.target, pair, device=place),
    }
    others, unavailable = loaders.ways(triple, device.place)
    ways |= others
    try:
        for name in (ON_GPU, LOAD, PCIE):  # loads kernels, takes memory
            ways[name]()
            shutil.rmtree(out, ignore_errors=True)
        times = interleave(ways, rounds, after=lambda _: shutil.rmtree(out, ignore_errors=True))
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return result_of(triple, device.name, available(device.place)[0], times, unavailable)


def result_of(
    triple: Triple, device: str, backend: str, times: Times, unavailable: Mapping[str, str] | None = None
) -> Result:
    """What was measured, and of every round the slower floor."""
    slowest = {
        slower(name): [max(seconds) for seconds in zip(*(times[floor] for floor in floors), strict=False)]
        for name, floors in FLOORS.items()
    }
    only_read = (READ, PCIE_IN, LOAD, slower(LOAD), *LOADERS)
    return Result(
        f"{triple.models} through {device}",
        {**triple.facts(), "device": device, "backend": backend},
        times | slowest,
        {name: (3 if name in only_read else 4) * triple.nbytes for name in (*times, *slowest)},
        by="time",
        yardsticks=list(slowest),
        goals=[
            *(Goal(name, slower(name), WANTED) for name in FLOORS),
            Goal(LOAD, loaders.PREAD, WANTED),
            *(Goal(LOAD, name) for name in LOADERS[1:]),
        ],
        unavailable=unavailable or {},
    )
