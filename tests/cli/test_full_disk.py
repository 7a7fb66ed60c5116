"""No room, no more allowed, no writing at all: said with an exit code and a next step, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Done, Fault, Warm
from scenarios import SCENARIOS, Scenario, World

every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


def check(world: World, before: object, done: Done) -> None:
    """A command that was refused has changed nothing, one that failed says how to go on, and no model is a mix."""
    assert world.broken() == "", done
    if done.code == 0:
        assert world.complete(world.scenario.command), "exit code 0 without the whole result"
    elif done.code == 2:
        assert world.found() == before, done
    else:
        assert done.code == 3, done
        assert len(done.err.splitlines()) > 1, f"no next step is printed: {done.err}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB in memory."""
    if os.geteuid():
        pytest.skip("needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", f"{folder}"], check=True)
    yield folder
    subprocess.run(["umount", "--recursive", f"{folder}"], check=True)


def free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


@pytest.mark.root
@pytest.mark.parametrize("share", [0, 0.5, 0.95])
@every_scenario
def test_a_full_disk(scenario: Scenario, share: float, warm: Warm, models: Path, small_disk: Path) -> None:
    world = World(warm, models, small_disk / "world", scenario)
    world.begin()
    before = free(small_disk)
    world.run(scenario.command)
    needed = max(before - free(small_disk), 0)
    world.begin()
    (small_disk / "theirs").write_bytes(bytes(free(small_disk) - int(share * needed) // 4096 * 4096))
    start = world.found()
    done = world.run(scenario.command)
    check(world, start, done)
    assert done.code or needed < 4096
    if not share and scenario.command == world.merge:  # known before the first byte
        assert world.found() == start, done
    (small_disk / "theirs").unlink()
    assert world.finish() == ""


@every_scenario
def test_a_limit_on_the_size_of_files(scenario: Scenario, warm: Warm, models: Path, scratch: Path) -> None:
    world = World(warm, models, scratch / "world", scenario)
    world.begin()
    start = world.found()
    check(world, start, world.run(scenario.command, file_size=4096))
    assert world.finish() == ""


@pytest.mark.root
@every_scenario
def test_a_disk_that_cannot_be_written(scenario: Scenario, warm: Warm, models: Path, small_disk: Path) -> None:
    world = World(warm, models, small_disk / "world", scenario)
    world.begin()
    start = world.found()
    subprocess.run(["mount", "-o", "remount,ro", f"{small_disk}"], check=True)
    done = world.run(scenario.command)
    assert done.code in (2, 3), done
    assert "Read-only file system" in done.err or "read-only" in done.err
    check(world, start, done)
    assert world.found() == start
    subprocess.run(["mount", "-o", "remount,rw", f"{small_disk}"], check=True)
    assert world.finish() == ""


@pytest.mark.parametrize("kind", ["pwrite", "fallocate"])
@every_scenario
def test_a_quota_that_ends_half_way(scenario: Scenario, kind: str, warm: Warm, models: Path, scratch: Path) -> None:
    """The data, or the room that is kept for it: a quota on a server may not be known before."""
    world = World(warm, models, scratch / "world", scenario)
    world.begin()
    calls = world.run(scenario.command).calls[kind]
    if not calls:
        pytest.skip(f"makes no call of {kind}")
    world.begin()
    done = world.run(scenario.command, Fault(kind, (calls + 1) // 2, "EDQUOT"))
    check(world, None, done)
    assert done.code == 3, done
    assert "quota" in done.err
    assert world.finish() == ""
