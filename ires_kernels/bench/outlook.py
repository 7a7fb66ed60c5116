"""What a run will take, said before it begins: minutes, memory and disk.

Minutes are rough: what such runs took on machines of 2 cores (bench/results), and on an H100. The sizes are exact to a
tensor or two.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ires_kernels.bench import gpu
from ires_kernels.bench.kernels import Case
from ires_kernels.bench.synthetic import Shape

_KERNELS = 1.6  # seconds of a round for a GB that a kernel reads and writes: all contenders, one thread
_QUANTIZED = 0.6  # seconds of a round for a GB of codes and target: all contenders, one thread
_COMPILE = 10.0  # seconds of torch.compile, each time
_MERGES, _BRIEF, _MAPPED, _THROUGH_GPU = 13.0, 5.0, 13.0, 2.1  # seconds of a round for a GB of a model
_BY_HAND = 40.0  # seconds of a round for a GB of a model of 16 bits that is merged as one of fp8, and by hand
_MODELS = 5.0  # seconds for a GB of a model: to write three of them, and to compare a merge
_ON_GPU = 0.1  # seconds of a round for a GB that a workload reads and writes
_LOOKED, _LIVE = 1.5, 4.0  # seconds of a round for a GB of a model
_START = 4.0  # seconds of a round of commands
_BEHIND_LINKS = 75.0  # seconds of a run of processes behind links
_SCALES = 4  # threads with which kernels still become faster, at least


class Outlook(NamedTuple):
    """What one part of a run will take; bytes of memory, on a GPU of its own, and of disk."""

    what: str
    seconds: float
    memory: float = 0
    disk: float = 0

    def line(self, folder: str) -> str:
        """The outlook in words; the disk is that of `folder`."""
        minutes = self.seconds / 60
        parts = ["less than a minute" if minutes < 1 else f"about {minutes:.0f} minute{'s' * (minutes >= 1.5)}"]
        if self.memory:
            parts.append(f"{self.memory / 1e9:.3g} GB of memory")
        if self.disk:
            free = shutil.disk_usage(folder).free
            parts.append(f"{self.disk / 1e9:.3g} GB of disk in {Path(folder)}, where {free / 1e9:.3g} GB are free")
        return f"{self.what}: {', '.join(parts)}"


def of_kernels(cases: Sequence[Case], elements: int, threads: Sequence[int], rounds: int, *, compiled: bool) -> Outlook:
    """Kernels and what torch has for them: operands, and two or three temporaries of float32."""
    gigabytes = sum(case.bytes_per_element for case in cases) * elements / 1e9
    seconds = sum(gigabytes * (rounds + 1) * _KERNELS / min(count, _SCALES) for count in threads)
    seconds += len(cases) * len(threads) * _COMPILE * compiled
    return Outlook(f"kernels: {len(cases)} of {elements:,} elements, threads {threads}", seconds, 24 * elements)


def of_quantized(cases: int, elements: int, threads: Sequence[int], rounds: int) -> Outlook:
    """Differences of quantized weights: codes, and a target of 16 bits."""
    gigabytes = cases * 6 * elements / 1e9
    seconds = sum(gigabytes * (rounds + 1) * _QUANTIZED / min(count, _SCALES) for count in threads)
    what = f"quantized: {cases} formats of {elements:,} elements, threads {threads}"
    return Outlook(what, seconds, 4 * elements)


def of_merges(shapes: Sequence[Shape], rounds: int, *, brief: bool = False) -> Outlook:
    """Merges: of the first size all of them, unless it is to be brief, of others the short list.

    On the disk are three models, a copy that is changed, a residual of float32, and a new one of those.
    """
    first, *others = (2e-9 * shape.parameters for shape in shapes)
    seconds = first * (rounds * (_BRIEF if brief else _MERGES) + _MODELS) + sum(others) * (rounds * _BRIEF + _MODELS)
    disk = max((5 if brief else 8) * first, 5 * max(others, default=0)) * 1e9
    return Outlook(f"merge: {_models(shapes)}", seconds, disk=disk)


def of_fp8(shapes: Sequence[Shape], rounds: int) -> Outlook:
    """Merges of fp8 models: three models of 16 bits and of 8, and by hand three more, the merged one, and a new one."""
    sizes = [2e-9 * shape.parameters for shape in shapes]
    return Outlook(f"fp8: {_models(shapes)}", sum(sizes) * (rounds * _BY_HAND + 2 * _MODELS), disk=9.5e9 * max(sizes))


def of_mapped(shapes: Sequence[Shape], rounds: int) -> Outlook:
    """Mapped models: three, and three copies that are changed, of which one is saved anew file by file."""
    sizes = [2e-9 * shape.parameters for shape in shapes]
    disk = max((6 + 1 / shape.shards) * size for shape, size in zip(shapes, sizes, strict=True)) * 1e9
    return Outlook(f"mapped: {_models(shapes)}", sum(sizes) * (rounds * _MAPPED + _MODELS), disk=disk)


def of_comparing(shapes: Sequence[Shape], rounds: int) -> Outlook:
    """`compare` twice a round, and `cat`: three models."""
    sizes = [2e-9 * shape.parameters for shape in shapes]
    return Outlook(f"compare: {_models(shapes)}", sum(sizes) * (rounds * _LOOKED + _MODELS), disk=3e9 * max(sizes))


def of_living(shapes: Sequence[Shape], rounds: int) -> Outlook:
    """`apply_` four times a round and undone: three models in memory, and while it is verified two more."""
    sizes = [2e-9 * shape.parameters for shape in shapes]
    seconds = sum(sizes) * (rounds * _LIVE + _MODELS)
    return Outlook(f"live: {_models(shapes)}", seconds, 5e9 * max(sizes), 3e9 * max(sizes))


def of_scale(shapes: Sequence[Shape], rounds: int, nodes: Sequence[int]) -> Outlook:
    """Local merges three times a round, and a minute or so for each number of processes behind links."""
    sizes = [2e-9 * shape.parameters for shape in shapes]
    seconds = sum(sizes) * (rounds * _MERGES + _MODELS) + rounds * _START + sum(_BEHIND_LINKS + n for n in (*nodes, 4))
    disk = max(4e9 * max(sizes), 5 * 30e6 * max(nodes))
    return Outlook(f"scale: {_models(shapes)}, {', '.join(map(str, nodes))} nodes", seconds, disk=disk)


def of_start(rounds: int) -> Outlook:
    """Commands one after the other; the first round comes with the tiny models, and weighs them."""
    return Outlook("start: commands that have little to do", (rounds + 1) * _START)


def of_gpu(loads: Sequence[gpu.Workload], shape: Shape, rounds: int, *, compiled: bool) -> Outlook:
    """Workloads on a device, and merges through it: three models, and a new one."""
    size = 2e-9 * shape.parameters
    gigabytes = sum(load.nbytes for load in loads) / 1e9
    seconds = gigabytes * (rounds + 1) * _ON_GPU + size * (rounds * _THROUGH_GPU + _MODELS)
    seconds += len(loads) * _COMPILE * compiled
    memory = max(load.on_device for load in loads)
    return Outlook(f"gpu: {len(loads)} workloads, {_models([shape])}", seconds, memory, 4 * size * 1e9)


def _models(shapes: Sequence[Shape]) -> str:
    return "models of " + ", ".join(f"{2e-9 * shape.parameters:.3g}" for shape in shapes) + " GB"
