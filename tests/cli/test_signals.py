"""Ctrl-C, SIGTERM and SIGHUP, several of them, at any moment: nothing is lost, and the next run finishes it."""

from __future__ import annotations

import functools
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults import Done, Warm, compiler
from scenarios import ASKING, SCENARIOS, WITHOUT_UNDO, Cut, Scenario, World, rounds

pytestmark = pytest.mark.skipif(compiler() is None, reason="faults.c needs a C compiler")

ALL = [*SCENARIOS, *WITHOUT_UNDO]
SOME = [scenario for scenario in ALL if scenario.name in ("apply", "in place", "resume", "rollback")] + WITHOUT_UNDO
GAPS = (0, 0, 1e-4, 1e-3, 1e-2)
"""Seconds between two of them: `timeout` and the like send one to the group and one to the child at once."""


def ask(world: World, rng: random.Random, command: tuple[str, ...], uninterrupted: Done) -> Cut:
    """Send a command up to six signals from a random moment on."""
    at = rng.uniform(0, uninterrupted.seconds)
    signals = []
    for _ in range(rng.choice([1, 2, 2, 3, 4, 5, 6])):
        signals.append((at, rng.choice(ASKING)))
        at += rng.choice(GAPS)
    done = world.run(command, signals=signals)
    how = ", ".join(f"{signal.Signals(number).name} after {at:.4f} s" for at, number in signals)
    # Too late for one more of them, as for a kill. Without a handler yet a signal ends the process.
    late = done.code == 2 and (world.complete() or command[0] == "resume")
    stopped = done.code in (130, *(code for _, number in signals for code in (128 + number, -number)))
    wrong = "" if done.code == 0 or late or stopped else f"{done}"
    if "Traceback" in done.err or " running: " in done.err:  # which would be this very process
        wrong = f"{done}"
    return Cut(how, "stopped" if stopped else "ended before", wrong)


@pytest.mark.parametrize("scenario", SOME, ids=lambda scenario: scenario.name)
def test_signals(scenario: Scenario, warm: Warm, models: Path, scratch: Path) -> None:
    world = World(warm, models, scratch / "world", scenario, small=True)
    rounds(world, 1, 0, [2], functools.partial(ask, world))


LATE = """
import os, sys
from ires_kernels import cli
flush = cli.flush
cli.flush = lambda code: (os.kill(os.getpid(), NUMBER), flush(code))[1]
sys.exit(cli.main())
"""
"""A command that gets a signal when it has told how it ended."""


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_after_the_end_changes_nothing(number: signal.Signals, tmp_path: Path) -> None:
    program = LATE.replace("NUMBER", f"{int(number)}")
    for command, code in ((["status", "nowhere"], 2), (["--version"], 0)):
        asked = [sys.executable, "-c", program, *command]
        done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.torture
@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.name)
def test_signals_200_rounds(scenario: Scenario, warm: Warm, models: Path, scratch: Path) -> None:
    world = World(warm, models, scratch / "world", scenario, small=True)
    counts = rounds(world, 200, 1, [1, 1, 2, 3], functools.partial(ask, world))
    assert counts["stopped"] > 20
