"""How long a merge takes on many machines: all of its bytes, over the slowest of the links that they go through.

    seconds = start + planning + the slowest link + finishing

Nothing goes between the workers, so a link is all that can be short: of the source, from which all read; of the machine
that has the largest share, in and out; that machine itself; and of the file system, to which all write. How even the
shares are is no estimate: they are dealt out here as workers do it. What it takes to start, to plan and to finish goes
by the number of tensors, and was measured (`python -m ires_kernels.bench scale` does it anew).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from ires_kernels.bench.synthetic import SHAPES, Shape
from ires_kernels.checkpoints.ahead import AT_ONCE
from ires_kernels.planning.workers import cut, shares

NODES = 1, 8, 64
SAMPLES = 10
"""Requests for a tensor of the output, of three models elsewhere, with which each process plans."""
MOST_SAMPLES = 30_000


@dataclass(frozen=True)
class Work:
    """A merge in one pass: what is written, and what is read for it."""

    name: str
    files: Mapping[str, Mapping[str, int]]
    """Bytes of the tensors of each file of the output."""
    models: int = 3
    """That are read for a byte of the output: target, instruct and base."""

    @cached_property
    def tensors(self) -> int:
        return sum(map(len, self.files.values()))

    @cached_property
    def written(self) -> int:
        return sum(sum(each.values()) for each in self.files.values())

    @property
    def read(self) -> int:
        return self.models * self.written

    def largest(self, nodes: int) -> float:
        """The part of all bytes that the worker has who has most; 1/nodes where all have the same."""
        every = shares(cut(self.files, nodes), nodes)
        return max(sum(item.weight for item in each) for each in every) / self.written


@dataclass(frozen=True)
class Costs:
    """What there is beside the bytes, in seconds, and how fast a machine is by itself."""

    start: float
    """Until a process has begun to plan: Python, torch, the headers of small models."""
    planning: float
    """For a tensor of the output; each process plans all of them."""
    finishing: float
    """For a tensor of the output: records, manifest, index. The last worker does it alone."""
    node: float
    """Bytes a second that a machine reads, computes, hashes and writes when no link holds it up."""


@dataclass(frozen=True)
class Cluster:
    """The links, in bytes a second."""

    source: float
    """Of where the inputs are, all answers together."""
    into: float
    """Of a machine, for what comes in."""
    out: float
    """Of a machine, for what it writes elsewhere."""
    shared: float
    """Of the file system that all see, read and written."""
    costs: Costs
    is_far: bool = True
    """Whether the inputs are elsewhere; else on that file system."""
    latency: float = 0.0
    """Seconds until an answer of the source begins."""


class Prediction(NamedTuple):
    """How long it takes, and what of it is whose."""

    seconds: float
    links: dict[str, float]
    """Seconds for which each link has bytes to carry."""
    beside: float
    """Seconds of start, planning and finishing."""

    @property
    def limit(self) -> str:
        """The link that is the limit, or what else takes longer."""
        name = max(self.links, key=self.links.__getitem__)
        return name if self.links[name] >= self.beside else "start and end"


def predicted(work: Work, nodes: int, cluster: Cluster) -> Prediction:
    """For so many machines, a worker on each."""
    costs, largest = cluster.costs, work.largest(nodes)
    read, written = work.read * largest, work.written * largest
    links = {
        "link of a node": max(read / cluster.into, written / cluster.out),
        "node": (read + written) / costs.node,
        "file system": (work.written + (0 if cluster.is_far else work.read)) / cluster.shared,
    }
    if cluster.is_far:
        links["source"] = work.read / cluster.source
    beside = costs.start + (costs.planning + costs.finishing) * work.tensors
    if cluster.is_far:
        beside += min(MOST_SAMPLES, SAMPLES * work.tensors) * cluster.latency / AT_ONCE
    return Prediction(beside + max(links.values()), links, beside)


def efficiency(work: Work, nodes: int, cluster: Cluster) -> float:
    """Of so many machines: 1 where they take a part of the time of one that is as small as they are many."""
    return predicted(work, 1, cluster).seconds / predicted(work, nodes, cluster).seconds / nodes


def dense(name: str, shape: Shape) -> Work:
    """A model of Llama's shape, in bfloat16, in files as they are published."""
    return Work(name, _filed({key: 2 * math.prod(size) for key, size in shape.tensors().items()}, shape.shards))


def experts(name: str, layers: int, count: int, hidden: int, inner: int, vocabulary: int, shards: int) -> Work:
    """A mixture of experts in bfloat16, each expert in three tensors."""
    tensors = {"model.embed_tokens.weight": 2 * vocabulary * hidden}
    for layer in range(layers):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"model.layers.{layer}.self_attn.{part}.weight"] = 2 * hidden * hidden // 2
        for expert in range(count):
            for part in ("gate_proj", "up_proj", "down_proj"):
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"] = 2 * hidden * inner
    tensors["lm_head.weight"] = 2 * vocabulary * hidden
    return Work(name, _filed(tensors, shards))


def _filed(tensors: Mapping[str, int], shards: int) -> dict[str, dict[str, int]]:
    """Tensors one after the other in files of the same size, more or less."""
    files: dict[str, dict[str, int]] = {}
    total, done = sum(tensors.values()), 0
    for name, nbytes in tensors.items():
        files.setdefault(f"{(2 * done + nbytes) * shards // (2 * total):05}", {})[name] = nbytes
        done += nbytes
    return files


def works() -> list[Work]:
    """The models of the tables: those of Llama 3.1, and a mixture of 384 experts a layer."""
    large = replace(SHAPES["llama-8b"], hidden=8192, intermediate=28672, layers=80, heads=64, shards=30)
    largest = replace(large, hidden=16384, intermediate=53248, layers=126, heads=128, shards=191)
    return [
        dense("8B", SHAPES["llama-8b"]),
        dense("70B", large),
        dense("405B", largest),
        experts("1T, 384 experts", 60, 384, 7168, 2048, 163840, 62),
    ]


COSTS = Costs(start=2.0, planning=5e-4, finishing=2e-4, node=5.8e9)
"""Seconds as measured on two cores of an EPYC that others used as well; a machine as the 16 cores beside an H100."""
GBIT = 1e9 / 8
STORE = Cluster(100 * GBIT, AT_ONCE * 25e6 * 0.85, 25 * GBIT, 10e9, COSTS, latency=0.05)
"""Inputs in an object store of 100 Gbit/s, answers of 25 MB/s of which .85 were measured; output to 10 GB/s."""
SHARED = Cluster(math.inf, 25 * GBIT, 25 * GBIT, 5e9, COSTS, is_far=False)
"""All of it on a file system of 5 GB/s; nodes with 25 Gbit/s."""
TABLES = {"store": STORE, "shared disk": SHARED}


def table(cluster: Cluster) -> str:
    """Times and limits of the models on 1, 8 and 64 machines, in Markdown."""
    lines = ["| | bytes read, written | " + " | ".join(f"{n} node{'s' * (n > 1)}" for n in NODES) + " |"]
    lines.append("|---" * (len(NODES) + 2) + "|")
    for work in works():
        cells = [work.name, f"{_size(work.read)}, {_size(work.written)}"]
        for nodes in NODES:
            found = predicted(work, nodes, cluster)
            cells.append(f"{_time(found.seconds)}: {found.limit}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e12:.1f} TB" if nbytes >= 1e12 else f"{nbytes / 1e9:.0f} GB"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5700 else f"{seconds / 3600:.1f} h"
