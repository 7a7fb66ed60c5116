"""Who writes what, where several processes carry out one plan: which of how many a process is, and what its share is.

Nobody need deal the work out: every process has the same plan, and finds the same shares by itself. An item of work is
a file of the output. Where files are too few, or too large for that, some of them are cut between tensors, and a run of
tensors is an item.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from ires_kernels.checkpoints.header import brief
from ires_kernels.planning.dealing import dealt
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError

_MOST = 100_000
"""Workers: shares of more take longer to find than to do."""
_UNEVEN = 1.1
"""Times the fair share that the largest share may be before a file is cut for it."""
_CUTS = 8
"""Items of a file that is cut, for each fair share in it: the fewer, the less even; the more, the more records."""
_ENVIRONMENTS = (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
"""Rank and world as torchrun and its kin set them, and mpirun."""
_INDEX = "JOB_COMPLETION_INDEX"
"""Of Kubernetes, which does not tell how many completions a job has."""
_ARRAY = "SLURM_ARRAY_TASK_ID"


class Worker(NamedTuple):
    """One of the processes that carry out a plan together."""

    rank: int
    world: int

    @classmethod
    def of(cls, rank: object, world: object) -> Worker:
        """Raises TypeError and ArgumentError for what is no rank below a world."""
        for name, value in (("rank", rank), ("world", world)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {type(value).__name__} {value!r}, wanted an integer")
        assert isinstance(rank, int)
        assert isinstance(world, int)
        if not 0 <= rank < world:
            raise ArgumentError(f"rank is {rank} of {world}, wanted 0 or more, and less than the number of workers.")
        if world > _MOST:
            raise ArgumentError(f"there are to be {world} workers, wanted {_MOST} at most.")
        return cls(rank, world)

    @classmethod
    def of_environment(cls, environment: Mapping[str, str], world: int | None = None) -> Worker:
        """As launchers tell their processes: torchrun, mpirun, Slurm and the tasks of its arrays, Kubernetes.

        world  for Kubernetes, whose indexed jobs tell the index alone. Raises ArgumentError where nothing tells
        """
        for names in _ENVIRONMENTS:
            if names[0] in environment:
                return cls._told(_number(environment, names[0]), _number(environment, names[1]), world, names[1])
        if _ARRAY in environment or "SLURM_PROCID" in environment:
            return cls._told(*_slurm(environment), world, "Slurm")
        if _INDEX in environment:
            if world is None:
                raise ArgumentError(f"{_INDEX} is the rank, and nothing says of how many: give --world COMPLETIONS.")
            return cls.of(_number(environment, _INDEX), world)
        raise ArgumentError(
            "--workers env: nothing in the environment says which of how many workers this is (RANK and WORLD_SIZE, "
            f"SLURM_PROCID, {_ARRAY}, OMPI_COMM_WORLD_RANK or {_INDEX}). Give --rank and --world."
        )

    @classmethod
    def _told(cls, rank: int, found: int, world: int | None, where: str) -> Worker:
        if world not in (None, found):
            raise ArgumentError(f"--world is {world}, and {where} says {found}. Leave --world out, or give --rank too.")
        return cls.of(rank, found)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"


class Cluster(NamedTuple):
    """Who gives the items to processes that it has started itself: Ray."""

    address: str | None
    """None: that of RAY_ADDRESS, or else processes of this machine."""
    device: str
    """cpu, or cuda: the GPU that each of them gets."""


def asked(workers: object, device: str = "cpu") -> Worker | Cluster | None:
    """Of an argument: (rank, world), "env" for what the environment tells, "ray"; None for one process alone.

    device  on which to compute, for Ray
    """
    if workers is None:
        return None
    if workers == "env":
        return Worker.of_environment(os.environ)
    if isinstance(workers, str) and workers.partition(":")[0] == "ray":
        return Cluster(workers.partition(":")[2] or None, device.partition(":")[0])
    if not isinstance(workers, tuple) or len(workers) != 2:
        raise TypeError(f'workers is {brief(workers)}, wanted (rank, world), "env", "ray", "ray:ADDRESS" or None')
    return Worker.of(*workers)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None or not text.strip().isdecimal() or len(text) > 20:
        raise ArgumentError(f"{name} is {brief(text)} in the environment, wanted a number. Or give --rank and --world.")
    return int(text)


def _slurm(environment: Mapping[str, str]) -> tuple[int, int]:
    """Rank and world of a process of a step, of a task of an array, or of a step in such a task."""
    rank, world = 0, 1
    if "SLURM_PROCID" in environment:
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        rank, world = _number(environment, "SLURM_PROCID"), _number(environment, tasks)
    if _ARRAY in environment:
        names = (_ARRAY, "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
        task, first, last, count = (_number(environment, name) for name in names)
        step = _number(environment, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environment else 1
        if (last - first) // max(step, 1) + 1 != count:
            raise ArgumentError("the Slurm array has gaps, so its tasks have no ranks: give --rank and --world.")
        rank, world = (task - first) // max(step, 1) * world + rank, count * world
    return rank, world


@dataclass(frozen=True)
class Item:
    """A file of the output, or a run of its tensors, in their order there."""

    file: str
    tensors: tuple[str, ...]
    is_whole: bool
    weight: int
    """Bytes that are read and written for it."""


def items(plan: Plan, world: int) -> list[Item]:
    """What is to be done, in items that so many workers can share evenly."""
    weights: dict[str, dict[str, int]] = {file.name: {} for file in plan.files}
    for step in plan.steps:
        tensors = weights[step.file]
        tensors[step.name] = tensors.get(step.name, 0) + step.nbytes + step.read_bytes
    return cut(weights, world)


def cut(weights: Mapping[str, Mapping[str, int]], world: int) -> list[Item]:
    """Items of files whose tensors weigh so much; a file is cut only where it takes that for even shares."""
    found = {name: [Item(name, tuple(each), True, sum(each.values()))] for name, each in weights.items()}
    fair = sum(item.weight for each in found.values() for item in each) / world
    while True:
        every = [item for each in found.values() for item in each]
        largest = max(shares(every, world), key=_weight)
        cuttable = [item for item in largest if item.is_whole and len(item.tensors) > 1]
        if _weight(largest) <= _UNEVEN * fair or not cuttable:
            return every
        item = max(cuttable, key=lambda item: item.weight)
        found[item.file] = _cut(item, weights[item.file], fair / _CUTS)


def share(plan: Plan, worker: Worker) -> list[Item]:
    """The items of one worker."""
    return shares(items(plan, worker.world), worker.world)[worker.rank]


def _weight(items: Sequence[Item]) -> int:
    return sum(item.weight for item in items)


def shares(items: Sequence[Item], world: int) -> list[list[Item]]:
    """The items by rank: the largest one first, to whom has least."""
    return [[items[index] for index in indexes] for indexes in dealt([item.weight for item in items], world)]


def _cut(item: Item, weights: Mapping[str, int], size: float) -> list[Item]:
    """Runs of tensors of a file, of about this weight each."""
    ends, end = {}, 0
    for name, weight in weights.items():
        ends[name] = int((end + weight / 2) / size)  # by the middle of each tensor
        end += weight
    runs = [tuple(names) for _, names in groupby(weights, key=ends.__getitem__)]
    if len(runs) == 1:
        runs = [runs[0][:1], runs[0][1:]]
    return [Item(item.file, run, False, sum(weights[name] for name in run)) for run in runs]
