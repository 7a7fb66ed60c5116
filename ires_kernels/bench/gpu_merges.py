"""Whole merges through a GPU against the slower of the two things that none can do without: storage and PCIe.

Storage is `cat` of what is read and `cp` of what is written, as for merges on the CPU; PCIe is a copy of the same bytes
between pinned host memory and the device, both ways at once. A merge that overlaps everything takes the longer of both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ires_kernels import merge
from ires_kernels.bench import merges
from ires_kernels.bench.accelerator import Accelerator
from ires_kernels.bench.gpu import available
from ires_kernels.bench.measure import Quartiles, Times, interleave
from ires_kernels.bench.synthetic import Triple

READ, PCIE, PCIE_IN = "cat", "PCIe", "PCIe in"
ON_CPU, ON_GPU, LOAD = "apply on the CPU", "apply", "load"
FLOORS = {ON_GPU: (merges.COPY, PCIE), LOAD: (READ, PCIE_IN)}
"""Merge → what it is measured against: the slower of the two, round by round."""
GATE = 1.25
"""The most wanted of a merge, as a multiple of that."""


@dataclass
class Result:
    """All merges of one size through one device."""

    triple: Triple
    backend: str
    times: Times

    def of_floor(self, name: str) -> Quartiles:
        """Time as a multiple of that of the slower of storage and PCIe."""
        rounds = zip(self.times[name], *(self.times[floor] for floor in FLOORS[name]), strict=False)
        return Quartiles.of([seconds / max(floors) for seconds, *floors in rounds])

    def rows(self) -> list[dict[str, Any]]:
        """What was measured of every merge on the device, and what is wanted."""
        size = f"{self.triple.nbytes / 1e9:.3g} GB"
        return [
            {
                "what": f"{name}, {size} models: time / the slower of {', '.join(FLOORS[name])}",
                "wanted": GATE,
                "at_most": True,
                "measured": {self.backend: self.of_floor(name).to_dict()},
            }
            for name in FLOORS
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON types."""
        medians = {name: Quartiles.of(seconds).median for name, seconds in self.times.items()}
        return {
            "parameters": self.triple.parameters,
            "model_bytes": self.triple.nbytes,
            "backend": self.backend,
            "contenders": {
                name: {"seconds": seconds, "median_seconds": medians[name]} for name, seconds in self.times.items()
            },
        }


def measure(triple: Triple, folder: Path, device: Accelerator, rounds: int) -> Result:
    """Time merges of `triple` on the CPU and on the device, and their floors, in one run."""
    out, pair, size = folder / "out", (triple.instruct, triple.base), triple.nbytes
    place = str(device.place)
    contenders: dict[str, Callable[[], object]] = {
        merges.COPY: lambda: merges.copy(triple, out),
        READ: lambda: _read(triple),
        PCIE: lambda: device.transfer(3 * size, size),
        PCIE_IN: lambda: device.transfer(3 * size, 0),
        ON_CPU: lambda: merge.apply(triple.target, pair, out=out, sync=False),
        ON_GPU: lambda: merge.apply(triple.target, pair, out=out, sync=False, device=place),
        LOAD: lambda: merge.load(triple.target, pair, device=place),
    }
    for name in (ON_GPU, LOAD, PCIE):  # loads kernels, takes memory
        contenders[name]()
        shutil.rmtree(out, ignore_errors=True)
    try:
        times = interleave(contenders, rounds, after=lambda _: shutil.rmtree(out, ignore_errors=True))
        return Result(triple, available(device.place)[0], times)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _read(triple: Triple) -> None:
    files = [path for folder in (triple.base, triple.instruct, triple.target) for path in merges.weights(folder)]
    with open(os.devnull, "wb") as null:
        subprocess.run(["cat", *files], stdout=null, check=True)
