"""The power fails: what the disk then holds is old, new or no model at all, and the next run finishes it.

A file system on a loop device is shut down in mid-run, as XFS and ext4 allow for such tests: nothing more reaches the
disk, with or without a last write of the log. What was only in the page cache is lost, as it would be.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import Disk
from faults import Done, Fault, Warm
from scenarios import SCENARIOS, Cut, Scenario, World, rounds

pytestmark = pytest.mark.root

SYSTEMS = ("ext4", "xfs")
DURABLE = [scenario for scenario in SCENARIOS if "--no-sync" not in scenario.command]


@pytest.fixture(params=SYSTEMS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    missing = [tool for tool in (f"mkfs.{request.param}", "xfs_io", "mount") if shutil.which(tool) is None]
    if os.geteuid() or missing:
        pytest.skip(f"needs root, and {', '.join(missing) or 'is not'}")
    disk = Disk(tmp_path, request.param)
    yield disk
    disk.unmount()


def cut(world: World, disk: Disk, rng: random.Random, command: tuple[str, ...], uninterrupted: Done) -> Cut:
    """Cut the power of a command, at a call or a moment."""
    calls = uninterrupted.calls["any"]
    with_log = rng.random() < 0.5
    if rng.random() < 0.7:
        n = rng.randint(1, calls + 1)  # the last one is after the end
        how = f"held at call {n} of {calls}"
        done = world.run(command, Fault("any", n, "hold"), held=lambda: disk.cut(with_log=with_log))
        if done.code != -9:
            disk.cut(with_log=with_log)
    else:
        moment = rng.uniform(0, 1.2 * uninterrupted.seconds)
        how = f"after {moment:.4f} s"
        timer = threading.Timer(moment, disk.cut, kwargs={"with_log": with_log})
        timer.start()
        done = world.run(command)
        timer.join()
    disk.unmount()
    disk.mount()
    word = {0: "ended before", -9: "power cut", 3: "saw the disk fail", 2: "refused"}.get(done.code, "")
    wrong = "" if word else f"{done}"
    if done.code == 0 and not world.complete(command):
        wrong = world.broken() or "exit code 0, and the result is not on the disk"
    return Cut(f"{how}, log {with_log}", word, wrong)


@pytest.mark.parametrize("scenario", DURABLE, ids=lambda scenario: scenario.name)
def test_power_cut(scenario: Scenario, disk: Disk, warm: Warm, models: Path) -> None:
    world = World(warm, models, disk.mounted / "world", scenario)
    rounds(world, 3, 0, [1, 1, 2], functools.partial(cut, world, disk), begun=disk.sync)


@pytest.mark.torture
@pytest.mark.parametrize("scenario", DURABLE, ids=lambda scenario: scenario.name)
def test_power_cut_50_rounds(scenario: Scenario, disk: Disk, warm: Warm, models: Path) -> None:
    world = World(warm, models, disk.mounted / "world", scenario)
    counts = rounds(world, 50, 1, [1, 1, 2], functools.partial(cut, world, disk), begun=disk.sync)
    assert counts["power cut"] > 10
