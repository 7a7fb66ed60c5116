"""The power fails: what the disk then holds is old, new or no model at all, and the next run finishes it.

A file system on a loop device is shut down in mid-run, as XFS and ext4 allow for such tests: nothing more reaches the
disk, with or without a last write of the log. What was only in the page cache is lost, as it would be.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Fault, Warm
from scenarios import SCENARIOS, Scenario, World

pytestmark = pytest.mark.root

SYSTEMS = ("ext4", "xfs")
DURABLE = [scenario for scenario in SCENARIOS if "--no-sync" not in scenario.command]
SIZE = 320 << 20  # bytes; XFS wants 300 MB


class Disk:
    """A file system in a file."""

    def __init__(self, folder: Path, system: str) -> None:
        self.image = folder / "image"
        self.mounted = folder / "mounted"
        self.mounted.mkdir()
        self.image.touch()
        os.truncate(self.image, SIZE)
        subprocess.run([f"mkfs.{system}", "-q", f"{self.image}"], check=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", f"{self.image}", f"{self.mounted}"], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", f"{self.mounted}"], check=True)

    def sync(self) -> None:
        """Make durable what is there so far."""
        subprocess.run(["sync", "--file-system", f"{self.mounted}"], check=True)

    def cut(self, *, with_log: bool) -> None:
        """Let nothing more through. With the log, names and sizes are as the programs left them, whatever data is."""
        command = "shutdown -f" if with_log else "shutdown"
        subprocess.run(["xfs_io", "-x", "-c", command, f"{self.mounted}"], check=True)


@pytest.fixture(params=SYSTEMS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    missing = [tool for tool in (f"mkfs.{request.param}", "xfs_io", "mount") if shutil.which(tool) is None]
    if os.geteuid() or missing:
        pytest.skip(f"needs root, and {', '.join(missing) or 'is not'}")
    disk = Disk(tmp_path, request.param)
    yield disk
    disk.unmount()


def rounds(world: World, disk: Disk, count: int, seed: int) -> Counter[str]:
    """Cut the power of a scenario's command, and sometimes of the one that repairs; let it end at last."""
    rng = random.Random(f"{world.scenario.name} {seed}")
    world.begin()
    uninterrupted = world.run(world.scenario.command)
    calls = uninterrupted.calls["any"]
    counts: Counter[str] = Counter()
    for number in range(count):
        world.begin()
        disk.sync()
        command = world.scenario.command
        for _ in range(rng.choice([1, 1, 2])):
            with_log = rng.random() < 0.5
            if rng.random() < 0.7:
                n = rng.randint(1, calls + 1)  # the last one is after the end
                how = f"held at call {n} of {calls}"
                done = world.run(command, Fault("any", n, "hold"), held=lambda log=with_log: disk.cut(with_log=log))
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
            outcome = {0: "ended before", -9: "power cut", 3: "saw the disk fail", 2: "refused"}
            where = f"{world.scenario.name}, round {number}: {' '.join(command)}, {how}, log {with_log}"
            assert done.code in outcome, f"{where}: {done}"
            counts[outcome[done.code]] += 1
            wrong = world.broken()
            assert not wrong, f"{where}: {wrong}"
            assert done.code != 0 or world.complete(command), f"{where}: exit code 0, and the result is not on the disk"
            command = world.scenario.again
        wrong = world.finish()
        assert not wrong, f"{where}, then again: {wrong}"
    print(f"\n{world.scenario.name}: {count} rounds: {dict(counts)}")
    return counts


@pytest.mark.parametrize("scenario", DURABLE, ids=lambda scenario: scenario.name)
def test_power_cut(scenario: Scenario, disk: Disk, warm: Warm, models: Path) -> None:
    rounds(World(warm, models, disk.mounted / "world", scenario), disk, 3, seed=0)


@pytest.mark.torture
@pytest.mark.parametrize("scenario", DURABLE, ids=lambda scenario: scenario.name)
def test_power_cut_50_rounds(scenario: Scenario, disk: Disk, warm: Warm, models: Path) -> None:
    counts = rounds(World(warm, models, disk.mounted / "world", scenario), disk, 50, seed=1)
    assert counts["power cut"] > 10
