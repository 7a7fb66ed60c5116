"""Which of several workers a process is, and what each of them does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import normal, write_model

import ires_kernels as ik
from ires_kernels.planning import workers
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.planning.workers import Item, Worker

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
STEP = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "8"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "9",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "4",
}


@pytest.mark.parametrize(
    ("environment", "world", "wanted"),
    [
        (TORCHRUN, None, (1, 4)),
        (TORCHRUN, 4, (1, 4)),
        (TORCHRUN | STEP | ARRAY, None, (1, 4)),  # torchrun, which Slurm has started
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, None, (0, 2)),
        (STEP, None, (2, 3)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, None, (5, 8)),
        (ARRAY, None, (2, 4)),
        (ARRAY | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None, (2, 4)),
        (ARRAY | STEP, None, (8, 12)),
        ({"JOB_COMPLETION_INDEX": "3"}, 5, (3, 5)),
    ],
)
def test_the_environment_tells_which_worker_it_is(
    environment: dict[str, str], world: int | None, wanted: tuple[int, int]
) -> None:
    assert Worker.of_environment(environment, world) == wanted


@pytest.mark.parametrize(
    ("environment", "world", "text"),
    [
        ({}, None, "nothing in the environment says which of how many workers this is"),
        ({"RANK": "1"}, None, "WORLD_SIZE is None in the environment, wanted a number"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, None, "RANK is 'x' in the environment"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, None, "rank is 2 of 2, wanted 0 or more, and less"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "2"}, None, r"RANK is '9+\.\.\.9+' in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "1000000000"}, None, "1000000000 workers, wanted 100000 at most"),
        (TORCHRUN, 5, "--world is 5, and WORLD_SIZE says 4"),
        ({"JOB_COMPLETION_INDEX": "3"}, None, "JOB_COMPLETION_INDEX is the rank, and nothing says of how many"),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "3"}, None, "the Slurm array has gaps"),
    ],
)
def test_an_environment_that_does_not_tell(environment: dict[str, str], world: int | None, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        Worker.of_environment(environment, world)


def test_an_environment_means_nothing_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert workers.asked(None) is None
    assert workers.asked("env") == workers.asked((1, 4)) == (1, 4)
    for wrong, kind in (([0, 1], TypeError), (3, TypeError), ((0, True), TypeError), ((-1, 2), ArgumentError)):
        with pytest.raises(kind):
            workers.asked(wrong)
    with pytest.raises(ArgumentError, match="workers go with out"):
        ik.apply(tmp_path, tmp_path, in_place=True, workers=(0, 2))
    with pytest.raises(ArgumentError, match="workers wait for the disk"):
        ik.apply(tmp_path, tmp_path, out=tmp_path / "out", sync=False, workers=(0, 2))


def planned(folder: Path, rows: list[int], shards: int) -> Plan:
    tensors = {f"model.layers.{i}.weight": normal((count, 8), i) for i, count in enumerate(rows)}
    models = [
        write_model(folder / name, {key: t + i for key, t in tensors.items()}, shards=shards)
        for i, name in enumerate(("base", "instruct"))
    ]
    plan = ik.extract(*models, folder / "out", dry_run=True)
    assert isinstance(plan, Plan)
    return plan


@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 9))
def test_the_shares_are_all_of_it_and_even(files: list[list[int]], world: int) -> None:
    steps = [
        SimpleNamespace(file=f"{i}", name=f"{i}.{j}", nbytes=size, read_bytes=3 * size)
        for i, sizes in enumerate(files)
        for j, size in enumerate(sizes)
    ]
    plan: Any = SimpleNamespace(files=[SimpleNamespace(name=f"{i}") for i in range(len(files))], steps=steps)
    shares = [workers.share(plan, Worker(rank, world)) for rank in range(world)]
    done = Counter((item.file, name) for each in shares for item in each for name in item.tensors)
    assert done == Counter((step.file, step.name) for step in steps)
    for item in (item for each in shares for item in each):
        names = [step.name for step in steps if step.file == item.file]
        first = names.index(item.tensors[0])
        assert tuple(names[first : first + len(item.tensors)]) == item.tensors
        assert item.is_whole == (len(item.tensors) == len(names))
    loads = [sum(item.weight for item in each) for each in shares]
    fair, largest = 4 * sum(map(sum, files)) / world, 4 * max(map(max, files))
    assert sum(loads) == 4 * sum(map(sum, files))
    assert max(loads) <= 1.125 * fair + 2 * largest


def test_files_are_cut_only_where_they_are_too_few(tmp_path: Path) -> None:
    plan = planned(tmp_path, [16] * 24, 6)

    def cut(world: int) -> list[Item]:
        return [item for item in workers.items(plan, world) if not item.is_whole]

    assert not any(cut(world) for world in (1, 2, 3, 6))
    assert {item.file for item in cut(5)} < {file.name for file in plan.files}
    assert {item.file for item in cut(12)} == {file.name for file in plan.files}
