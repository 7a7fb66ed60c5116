"""Every call that touches the disk fails once, in every way: nothing is corrupted, nothing fails in silence."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faults import KINDS, Fault, Warm, compiler, library
from scenarios import SCENARIOS, Scenario, World

pytestmark = pytest.mark.skipif(compiler() is None, reason="faults.c needs a C compiler")

ACTIONS: dict[str, tuple[str, ...]] = {
    "read": ("EIO", "short", "gone", "kill"),
    "pwrite": ("EIO", "ENOSPC", "EDQUOT", "short", "gone", "kill", "kill-after"),
    "write": ("EIO", "ENOSPC", "EDQUOT", "short", "gone", "kill", "kill-after"),
    "fallocate": ("EIO", "ENOSPC", "EDQUOT", "EOPNOTSUPP", "gone", "kill", "kill-after"),
    "ftruncate": ("EIO", "ENOSPC", "gone", "kill", "kill-after"),
    "open": ("EIO", "ENOSPC", "EROFS", "gone", "kill", "kill-after"),
    "mkdir": ("EIO", "ENOSPC", "EROFS", "gone", "kill", "kill-after"),
    "link": ("EIO", "ENOSPC", "gone", "kill", "kill-after"),
    "rename": ("EIO", "ENOSPC", "EROFS", "gone", "kill", "kill-after"),
}
OTHERS = ("EIO", "gone", "kill", "kill-after")
HARMLESS = {("read", "short"), ("pwrite", "short"), ("write", "short"), ("fallocate", "EOPNOTSUPP")}
"""What a program has to put up with."""
MUST_FAIL = {"fsync", "fdatasync", "msync"}
"""Calls whose failure means that data is lost, though it can be read back for now."""


EVERY_CALL = """
import mmap, os
os.mkdir("d")
file = os.open("d/f", os.O_RDWR | os.O_CREAT)
os.posix_fallocate(file, 0, 8)
os.ftruncate(file, 4096)
os.fchmod(file, 0o600)
os.pwrite(file, b"12345678", 0)
os.pwritev(file, [b"1234", b"5678"], 8)
os.write(file, b"12345678")
os.preadv(file, [bytearray(8)], 0)
os.pread(file, 8, 0)
memory = mmap.mmap(file, 4096)
memory.flush()
os.fsync(file)
os.fdatasync(file)
os.link("d/f", "d/g")
os.rename("d/g", "d/h")
os.unlink("d/h")
os.close(file)
"""
TWICE = {"pwrite", "read", "close"}  # Python's mmap closes a descriptor of its own


def under_the_library(folder: Path, program: str = EVERY_CALL, **variables: object) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own."""
    folder.mkdir()
    environment = {"LD_PRELOAD": f"{library()}", "FAULTS_ROOT": f"{folder}", "FAULTS_COUNTS": f"{folder}.counts"}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, **environment, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_library_sees_every_call(tmp_path: Path) -> None:
    done = under_the_library(tmp_path / "a")
    assert (done.returncode, done.stderr) == (0, "")
    calls = dict(zip(KINDS, struct.unpack(f"{len(KINDS)}Q", (tmp_path / "a.counts").read_bytes()), strict=True))
    assert calls == {**{kind: 1 + (kind in TWICE) for kind in KINDS}, "any": sum(calls.values()) - calls["any"]}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_library_makes_calls_fail(tmp_path: Path, kind: str) -> None:
    done = under_the_library(tmp_path / "a", FAULTS_KIND=kind, FAULTS_N=1, FAULTS_ACTION="EIO")
    assert done.returncode == 1
    assert "OSError: [Errno 5]" in done.stderr
    done = under_the_library(tmp_path / "b", FAULTS_KIND=kind, FAULTS_N=1, FAULTS_ACTION="kill")
    assert (done.returncode, done.stderr) == (-9, "")
    if kind == "pwrite":
        assert (tmp_path / "b" / "d" / "f").read_bytes().rstrip(b"\0") == b"1234", "it dies in mid-write"
    if kind == "rename":
        assert (tmp_path / "b" / "d" / "g").exists()
        done = under_the_library(tmp_path / "c", FAULTS_KIND=kind, FAULTS_N=1, FAULTS_ACTION="kill-after")
        assert (done.returncode, (tmp_path / "c" / "d" / "h").exists()) == (-9, True)


def test_the_library_kills_while_errors_are_handled(tmp_path: Path) -> None:
    program = "import os; os.mkdir('a')\ntry: os.mkdir('b')\nfinally: [os.mkdir(c) for c in 'cde']"
    fault = {"FAULTS_KIND": "mkdir", "FAULTS_N": 2, "FAULTS_ACTION": "EIO", "FAULTS_LATER": 2}
    assert under_the_library(tmp_path / "w", program, **fault).returncode == -9
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["a", "c"]


def test_a_fault_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    assert under_the_library(tmp_path / "a", FAULTS_KIND="fsink", FAULTS_N=1, FAULTS_ACTION="EIO").returncode == 127
    assert under_the_library(tmp_path / "b", FAULTS_KIND="fsync", FAULTS_N=1, FAULTS_ACTION="EI0").returncode == 127


def faults(calls: dict[str, int], sample: int | None) -> list[Fault]:
    """Every fault there is for these calls, or a sample of them, of as many kinds and actions as there can be."""
    groups = [
        [Fault(kind, n + 1, action) for n in range(calls[kind])]
        for kind in KINDS[1:]
        for action in ACTIONS.get(kind, OTHERS)
        if calls[kind]
    ]
    if sample is None:
        return [fault for group in groups for fault in group]
    rng = random.Random(1)
    chosen = [rng.choice(group) for group in rng.sample(groups, min(sample, len(groups)))]
    lost = [Fault(kind, n + 1, "EIO") for kind in sorted(MUST_FAIL) for n in range(calls[kind])]
    return chosen + rng.sample(lost, min(sample, len(lost)))


def inject(world: World, fault: Fault) -> tuple[str, str]:
    """One fault: how it went in one word, and what is wrong."""
    world.begin()
    before = world.found()
    done = world.run(world.scenario.command, fault)
    wrong = world.broken()
    if wrong:
        return "corrupt", wrong
    if done.code == 0 and not world.complete(world.scenario.command):
        return "silent", "exit code 0 without the whole result"
    if done.code == 0 and fault.kind in MUST_FAIL and fault.action in ("EIO", "gone"):
        return "silent", "exit code 0 although the disk said that data may be lost"
    # A file that cannot be read is refused like any other bad file as long as nothing was written.
    refused = done.code == 2 and fault.kind == "read" and world.found() == before
    if done.code not in (0, 3, -9) and not refused:
        return "wrong code", f"exit code {done.code}: {done.err}"
    if done.code and (fault.kind, fault.action) in HARMLESS:
        return "wrong code", f"exit code {done.code} where the program should go on: {done.err}"
    if done.code == 3 and len(done.err.splitlines()) < 2:
        return "wrong code", f"no next step is printed: {done.err}"
    wrong = world.finish()
    if wrong:
        return "stuck", wrong
    return ("killed" if done.code == -9 else "reported" if done.code else "overcome"), ""


def sweep(world: World, sample: int | None) -> Counter[str]:
    """Inject faults into a scenario's command one after the other; fails with a list of what went wrong."""
    world.begin()
    calls = world.run(world.scenario.command).calls
    assert calls["pwrite"] or calls["unlink"] or calls["rename"], "a scenario that touches nothing proves nothing"
    counts: Counter[str] = Counter()
    failures = []
    for fault in faults(calls, sample):
        how, wrong = inject(world, fault)
        counts[how] += 1
        if wrong:
            failures.append(f"{how}: {fault.kind} {fault.n} of {calls[fault.kind]}, {fault.action}: {wrong}")
    print(f"\n{world.scenario.name}: {dict(calls)}: {counts.total()} faults: {dict(counts)}")
    assert not failures, "\n".join([f"{len(failures)} of {counts.total()} faults:", *failures[:20]])
    return counts


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_faults(scenario: Scenario, warm: Warm, models: Path, scratch: Path) -> None:
    counts = sweep(World(warm, models, scratch / "world", scenario), sample=16)
    assert counts["killed"]
    assert counts["reported"]


@pytest.mark.torture
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_fault(scenario: Scenario, warm: Warm, models: Path, scratch: Path) -> None:
    sweep(World(warm, models, scratch / "world", scenario), sample=None)
