"""SIGKILL at any moment, again and again: what is left is old, new or no model at all, and the next run finishes it."""

from __future__ import annotations

import functools
import random
import signal
from pathlib import Path

import pytest
import torch
import transformers
from faults import Done, Fault, Warm
from safetensors.torch import load
from scenarios import SCENARIOS, Cut, Scenario, World, rounds

ROUNDS = 3


def parameters(folder: Path) -> dict[str, torch.Tensor] | None:
    """What transformers loads from a folder; None where it finds no model."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except (OSError, ValueError):
        return None
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def stored(contents: dict[str, bytes]) -> dict[str, torch.Tensor]:
    """The tensors of a model whose files are these."""
    tensors = {}
    for name, data in contents.items():
        if name.endswith(".safetensors"):
            tensors |= load(data)
    return tensors


class Judge:
    """Says of a world at a moment of interruption whether all is well, with transformers and `ires inspect`."""

    def __init__(self, world: World) -> None:
        self.world = world
        names = ("target", "out")
        self.models = [stored(found[name]) for found in (world.old, world.new) for name in names if name in found]

    def wrong(self) -> str:
        wrong = self.world.broken()
        for name in ("target", "out", "out.partial"):
            folder = self.world.folder / name
            scenario = self.world.scenario
            written = scenario.writes_target and not scenario.coded  # which transformers decodes where there is a GPU
            if not wrong and folder.is_dir() and (name != "target" or written):
                wrong = self._wrong_model(folder)
        return wrong

    def _wrong_model(self, folder: Path) -> str:
        loaded = parameters(folder)
        if loaded is None:
            finished = folder.name == "out"  # a residual, which is no model
            if not finished and self.world.run(["inspect", folder.name]).code != 2:
                return f"`ires inspect {folder.name}` takes the remains of a run for a model"
        elif not any(equal(loaded, model) for model in self.models):
            return f"transformers loads {folder.name}, which is neither the old model nor the new one"
        return ""


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kill(world: World, rng: random.Random, command: tuple[str, ...], uninterrupted: Done) -> Cut:
    """Kill a command at a moment, or at a call, or while it cleans up after an error."""
    calls = uninterrupted.calls["any"]
    way, n = rng.choice(["moment", "call", "call", "error"]), rng.randint(1, calls)
    if way == "moment":
        moment = rng.uniform(0, 1.2 * uninterrupted.seconds)
        how = f"after {moment:.4f} s"
        done = world.run(command, signals=[(moment, signal.SIGKILL)])
    else:
        fault = Fault("any", n, rng.choice(["kill", "kill-after"]))
        if way == "error":
            fault = Fault("any", n, "EIO", rng.randint(1, 16))
        how = f"at call {n} of {calls}, {fault}"
        done = world.run(command, fault)
    # Who comes too late for one more kill is told that there is nothing left to do, or nothing begun.
    late = done.code == 2 and (world.complete() or command[0] == "resume")
    failed = way == "error" and done.code in (2, 3)
    wrong = "" if done.code in (0, -9) or late or failed else f"{done}"
    return Cut(how, "killed" if done.code == -9 else "ended before", wrong or Judge(world).wrong())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_kill(scenario: Scenario, warm: Warm, models: Path, scratch: Path) -> None:
    world = World(warm, models, scratch / "world", scenario)
    rounds(world, ROUNDS, 0, [1, 1, 2, 3], functools.partial(kill, world))


@pytest.mark.torture
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_kill_200_rounds(scenario: Scenario, warm: Warm, models: Path, scratch: Path) -> None:
    world = World(warm, models, scratch / "world", scenario)
    counts = rounds(world, 200, 1, [1, 1, 2, 3], functools.partial(kill, world))
    assert counts["killed"] > 100
