"""Several commands at once on one target, with signals and kills: what is there in the end is what some order gives.

Three updates of one target, one with each kind of undo, can have been applied in any order, none of them twice; that
gives sixteen models. A new folder made of the target holds the same difference on top of one of them.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
import torch
from faults import Done, Run, Warm, compiler
from scenarios import ASKING, MODELS, contents
from small_models import read_model

import ires_kernels as ik

pytestmark = pytest.mark.skipif(compiler() is None, reason="faults.c needs a C compiler")

PAIR = ("--instruct", "instruct", "--base", "base", "--threads", "2")
UPDATES = {
    "1": ("apply", "target", *PAIR, "--in-place"),
    ".5": ("apply", "target", *PAIR, "--in-place", "--alpha", ".5", "--keep-undo"),
    ".25": ("apply", "target", *PAIR, "--in-place", "--alpha", ".25", "--no-undo"),
}
NEW = ("apply", "target", *PAIR, "-o", "out")
EXTRACT = ("extract", "base", "instruct", "-o", "residual", "--threads", "2")
READING = (("status", "target"), ("status", "out"), ("inspect", "target"), ("verify", "target"))
GOING_ON = (("resume", "target"), ("rollback", "target"), ("resume", "out"), ("rollback", "out"))
POOL = (*UPDATES.values(), *UPDATES.values(), NEW, NEW, EXTRACT, *GOING_ON, *READING)
STOPPED = {0, 1, 2, 3, -signal.SIGKILL, *(128 + number for number in ASKING), *(-number for number in ASKING)}
"""Exit codes that there may be; 1 of a `verify` whose files change under it."""

Model = frozenset[tuple[str, bytes]]


def model(tensors: dict[str, torch.Tensor]) -> Model:
    return frozenset((name, tensor.view(torch.uint8).numpy().tobytes()) for name, tensor in tensors.items())


class Storm:
    """A world with one target, and every state that it can come to."""

    def __init__(self, warm: Warm, models: Path, folder: Path) -> None:
        self.warm, self.models, self.folder = warm, models, folder
        base, instruct, target = (read_model(models / name) for name in MODELS)

        def plus(target: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
            return {name: ik.add_difference(t, instruct[name], base[name], alpha) for name, t in target.items()}

        self.targets: dict[Model, tuple[str, ...]] = {}
        """What was applied, in order, by what the target is then."""
        self.outs: set[Model] = set()
        for order in [order for count in range(len(UPDATES) + 1) for order in permutations(UPDATES, count)]:
            now = functools.reduce(plus, map(float, order), target)
            self.targets[model(now)] = order
            self.outs.add(model(plus(now, 1)))
        assert len(self.targets) == 16
        self.residual = model({name: ik.subtract(t, base[name]) for name, t in instruct.items()})

    def begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.models, self.folder)

    def model(self, name: str) -> Model:
        """What is in a folder, which has to be a whole model."""
        return model(read_model(self.folder / name))

    def one(self, command: tuple[str, ...], codes: set[int]) -> Done:
        done = self.warm.run(command, self.folder, small=True)
        assert done.code in codes, (command, done)
        return done

    def all_at_once(self, rng: random.Random) -> list[tuple[Run, Done]]:
        """A few commands with what happens to them."""
        runs = []
        for command in rng.choices(POOL, k=rng.randint(2, 4)):
            signals, at = [], rng.uniform(0, 0.3)
            for _ in range(rng.choice([0, 0, 1, 2, 4])):
                signals.append((at, rng.choice([*ASKING, *ASKING, signal.SIGKILL])))
                at += rng.choice([0, 1e-4, 1e-2])
            runs.append(Run(command, signals=signals, small=True))
        dones = self.warm.together(runs, self.folder)
        for run, done in zip(runs, dones, strict=True):
            assert done.code in STOPPED, (run, done)
            assert done.code != 1 or run.argv[0] == "verify", (run, done)
            assert "Traceback" not in done.err, (run, done)
        return list(zip(runs, dones, strict=True))

    def settle(self, path: str) -> tuple[bool, bool]:
        """Let what is unfinished at a path end; whether it was taken back, and whether it was lost."""
        found = json.loads(self.one(("status", path, "--json"), codes={0, 2}).out or '{"state": "none"}')
        state = found["state"]
        if state == "rolling back":
            self.one(("rollback", path), codes={0})
            return True, False
        if state == "unfinished":
            done = self.one(("resume", path), codes={0, 2, 3})
            if done.code == 2:  # of a new folder, whose inputs have changed since
                assert path == "out", done
                self.one(("rollback", path), codes={0})
            return done.code == 2, done.code == 3
        assert state in ("none", "finished"), state
        if "is left of an update" in found.get("what", ""):  # it was killed before it began, or as its end was cleared
            self.one(("rollback", path), codes={0})
        return False, False

    def round(self, rng: random.Random) -> str:
        """One storm; how it ended in a word."""
        self.begin()
        ran = [pair for _ in range(rng.choice([1, 1, 2])) for pair in self.all_at_once(rng)]
        commands = [(tuple(run.argv), done.code, [number for _, number in run.signals]) for run, done in ran]
        taken_back, lost = self.settle("target")
        killed = [number for command, _, numbers in commands if command == UPDATES[".25"] for number in numbers]
        if lost:
            assert signal.SIGKILL in killed, commands
            return "lost, as it was killed without undo"
        applied = self.targets.get(self.model("target"))
        assert applied is not None, f"the target is no model that any order gives: {commands}"
        asked = {name for name, command in UPDATES.items() if command in [command for command, _, _ in commands]}
        assert set(applied) <= asked, (applied, commands)
        history = json.loads((self.folder / "target" / "ires.json").read_bytes()) if applied else None
        assert (history is not None) == (self.folder / "target" / "ires.json").exists(), commands
        if not taken_back and not any(command == ("rollback", "target") for command, _, _ in commands):
            ended = {name for name, command in UPDATES.items() if (command, 0) in [c[:2] for c in commands]}
            assert ended <= set(applied), (applied, commands)
        self.settle("out")
        if (self.folder / "out").exists():
            assert self.model("out") in self.outs, f"out is no model that any order gives: {commands}"
        self.settle("residual")
        if (self.folder / "residual").exists():
            assert self.model("residual") == self.residual, commands
        for name in MODELS[:2]:
            assert contents(self.folder / name) == contents(self.models / name), commands
        left = [f"{path}" for path in self.folder.rglob(".ires-*") if not path.match(".ires-[ru]*-*")]
        assert not [path for path in left if "/.ires-undo-" not in path and "/.ires-replaced-" not in path], left
        return f"{len(applied)} applied"


@pytest.fixture
def storm(warm: Warm, models: Path, scratch: Path) -> Storm:
    return Storm(warm, models, scratch / "world")


def test_a_storm(storm: Storm) -> None:
    rng = random.Random(0)
    for _ in range(6):
        storm.round(rng)


@pytest.mark.torture
def test_a_storm_of_500_rounds(storm: Storm) -> None:
    rng = random.Random(1)
    counts = Counter(storm.round(rng) for _ in range(500))
    print(f"\n500 rounds: {dict(counts)}")
    assert len(counts) >= 4
