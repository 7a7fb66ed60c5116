"""No reader takes more threads than it was given: whatever a command reads to compute, to compare or to hash."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import triple

import ires_kernels as ik
from ires_kernels.streaming import stream


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that were started, where many are to be had and nobody falls back to as many as there are."""
    started: list[str] = []
    start = threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    def unasked() -> int:
        raise AssertionError("a reader was not told how many threads it may use")

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(threading.Thread, "start", noted)
    monkeypatch.setattr(stream, "default_threads", unasked)
    return started


def touch(path: Path) -> None:
    """Other files of the same bytes and times: only reading tells."""
    for file in path.glob("*.safetensors"):
        copy = shutil.copy2(file, file.with_suffix(".copy"))
        os.replace(copy, file)


def test_one_thread_is_one_thread_everywhere(tmp_path: Path, names: list[str]) -> None:
    base, instruct, target = triple(tmp_path, shards=3)
    options: dict[str, Any] = {"threads": 1, "sync": False, "sha256": True}
    residual, out = tmp_path / "residual", tmp_path / "out"
    commands: list[Callable[[], object]] = [
        lambda: ik.extract(base, instruct, residual, **options),
        lambda: ik.apply(target, residual, out=out, **options),
        lambda: ik.verify(out, threads=1),
        lambda: ik.verify(out, hashes_only=True, threads=1),
        lambda: ik.load(target, residual, threads=1),
        lambda: touch(residual),
        lambda: ik.apply(target, residual, out=out, **options),  # again: compares the inputs by their hashes
        lambda: touch(out),
        lambda: ik.apply(target, residual, out=out, **options),  # and the output
        lambda: ik.apply(target, residual, in_place=True, **options),
        lambda: touch(target),
        lambda: ik.apply(target, residual, in_place=True, **options),  # again: compares the model by its hashes
        lambda: ik.apply(target, (instruct, base), in_place=True, alpha=0.5, **options),
    ]
    for command in commands:
        names.clear()
        command()
        assert "ires-sha256" not in names
        assert {name for name in names if name.startswith("ires")} <= {"ires-0", "ires-journal"}  # this one writes


def test_two_are_two(tmp_path: Path, names: list[str]) -> None:
    base, instruct, _ = triple(tmp_path, shards=3)
    ik.extract(base, instruct, tmp_path / "residual", threads=2, sync=False, sha256=True)
    assert {name for name in names if name.startswith("ires-")} == {"ires-0", "ires-1", "ires-sha256"}
    assert names.count("ires-sha256") == 1  # beside the one that asks


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (8, 8), (16, 8)])
def test_by_default_no_more_than_pay(cpus: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    assert stream.default_threads() == threads
