"""What may be written only in order: a `write` that waits for all bytes before its own waits for no tile that waits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from selection import tiles
from small_models import triple

import ires_kernels as ik
from ires_kernels.checking import guards
from ires_kernels.planning.plan import Plan
from ires_kernels.streaming import stream


@pytest.mark.parametrize("threads", [1, 4])
def test_a_writer_that_waits_for_what_comes_before(tmp_path: Path, threads: int) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    plan = ik.apply(target, (instruct, base), out=tmp_path / "out", dry_run=True)
    assert isinstance(plan, Plan)
    numbers = {file.name: number for number, file in enumerate(plan.files)}
    steps = sorted(plan.steps, key=lambda step: (numbers[step.file], step.offset))
    turn, order = threading.Condition(), []
    wanted = {file.name: len(file.header) for file in plan.files}

    def write(step: stream.Step, start: int, data: memoryview, _: object) -> None:
        at = step.offset + start
        with turn:
            assert turn.wait_for(lambda: wanted[step.file] == at, timeout=20)
            wanted[step.file] += len(data)
            order.append((numbers[step.file], at))
            turn.notify_all()

    with tiles(elements=64, copied=96):
        stream.run(steps, guards.file_ids(plan), plan.rules, write, threads=threads, in_order=True)
    assert wanted == {file.name: file.size for file in plan.files}
    assert len(order) > 10


def test_it_ends_at_once(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    plan = ik.apply(target, (instruct, base), out=tmp_path / "out", dry_run=True)
    assert isinstance(plan, Plan)
    written = []

    def progress(*_: int) -> None:
        raise KeyboardInterrupt

    def write(*what: object) -> None:
        written.append(what)
        ended.wait(0.2)

    ended = threading.Event()
    with tiles(elements=16, copied=16), pytest.raises(KeyboardInterrupt):
        stream.run(
            plan.steps, guards.file_ids(plan), plan.rules, write, threads=1, progress=progress, in_order=True,
            failed=ended.set,
        )  # fmt: skip
    assert len(written) < 5
