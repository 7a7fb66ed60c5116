"""Commands to interrupt: what they start from, how to go on, and what must be there at any moment and at last.

A scenario runs in a world: a folder of small models that transformers itself has made, in several shards. Whatever
happens to the command, three things hold, and `World.broken` says which does not: the inputs are as they were; a folder
that a loader would take for a model is all old or all new; and a file of weights that lies open in one is whole.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from faults import Done, Fault, Warm
from quantized_models import ENCODED
from small_models import read_model, write_model

MODELS = ("base", "instruct", "target")
MANIFESTS = ("ires.json", "residual.json")
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a command to end."""
_PAIR = ("--instruct", "instruct", "--base", "base")
_NEW = ("apply", "target", *_PAIR, "-o", "out", "--threads", "1")
_IN_PLACE = ("apply", "target", *_PAIR, "--in-place", "--threads", "1")
_UNDO = (*_IN_PLACE, "--keep-undo")
_HALF_WAY = Fault("pwrite", 8, "kill")  # of about twice as many

Contents = dict[str, bytes]


class Scenario(NamedTuple):
    """A command that is to be interrupted."""

    name: str
    command: tuple[str, ...]
    again: tuple[str, ...]
    """What brings it to its end; it may be interrupted too."""
    end: tuple[str, ...] | None
    """The command whose uninterrupted run in a new world gives the wanted result; None: the world as it was."""
    before: tuple[tuple[tuple[str, ...], Fault | None], ...] = ()
    """Commands that lead to where the command starts, and what interrupts them."""
    writes_target: bool = False
    parts: bool = False
    """Whether tensors change in part, and in dozens of windows."""
    coded: bool = False
    """Whether the target is quantized, with scales in other shards than their codes, and dozens of windows."""


def same(name: str, command: tuple[str, ...], *, writes_target: bool = False) -> Scenario:
    """A command that is its own way out."""
    return Scenario(name, command, command, command, writes_target=writes_target)


class Cut(NamedTuple):
    """How a command was interrupted, how it ended in one word, and what is wrong then, or ""."""

    how: str
    word: str
    wrong: str


RESUME, ROLLBACK = ("resume", "target"), ("rollback", "target")
RESUME_OUT, ROLLBACK_OUT = ("resume", "out"), ("rollback", "out")

SCENARIOS = [
    same("extract", ("extract", "base", "instruct", "-o", "out", "--threads", "1")),
    same("apply", _NEW),
    same("in place", _IN_PLACE, writes_target=True),
    same("in place, undo kept", _UNDO, writes_target=True),
    same("in place, two threads, no fsync", (*_IN_PLACE[:-1], "2", "--no-sync"), writes_target=True),
    same("in place, in parts", _UNDO, writes_target=True)._replace(parts=True),
    same("in place, quantized", _IN_PLACE, writes_target=True)._replace(coded=True),
    Scenario("in place, resumed", _IN_PLACE, RESUME, _IN_PLACE, writes_target=True),
    Scenario("in place, rolled back", _UNDO, ROLLBACK, None, writes_target=True),
    Scenario("resume", RESUME, RESUME, _IN_PLACE, ((_IN_PLACE, _HALF_WAY),), writes_target=True),
    Scenario("rollback", ROLLBACK, ROLLBACK, None, ((_UNDO, None),), writes_target=True),
    Scenario("rollback of a half", ROLLBACK, ROLLBACK, None, ((_UNDO, _HALF_WAY),), writes_target=True),
    Scenario("resume to a new folder", RESUME_OUT, RESUME_OUT, _NEW, ((_NEW, _HALF_WAY),)),
    Scenario("rollback of a new folder", ROLLBACK_OUT, ROLLBACK_OUT, None, ((_NEW, _HALF_WAY),)),
]
_NO_UNDO = (*_IN_PLACE[:-1], "2", "--no-undo")
WITHOUT_UNDO = [
    same("in place without undo", _NO_UNDO, writes_target=True),
    Scenario("in place without undo, resumed", _NO_UNDO, RESUME, _NO_UNDO, writes_target=True),
]
"""What is lost when it is killed, and not when it is asked to end."""


@functools.cache
def _config() -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip


def make_models(folder: Path) -> Path:
    """base, instruct and target in `folder`, in bfloat16, three shards each."""
    for seed, name in enumerate(MODELS):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(_config()).to(torch.bfloat16)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 2e-3)
        model.save_pretrained(folder / name, max_shard_size="20KB")
        (folder / name / "tokenizer.json").write_text(json.dumps({"from": name}))
    return folder


def coded(models: Path) -> Path:
    """The same models with a target of float8, in blocks of 16 × 16."""
    folder = models.with_name(f"{models.name}-coded")
    if folder.exists():
        return folder
    for name in ("base", "instruct"):
        shutil.copytree(models / name, folder / name)
    tensors: dict[str, torch.Tensor] = {}
    make, settings = ENCODED["fp8-block"]
    for name, tensor in read_model(models / "target").items():
        tensors |= make(name, tensor) if "proj" in name else {name: tensor}
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale_inv")}
    codes = {name: tensor for name, tensor in tensors.items() if name not in scales}
    config = json.loads((models / "target" / "config.json").read_text()) | {"quantization_config": settings}
    files = {"tokenizer.json": json.dumps({"from": "target"})}
    write_model(folder / "target", scales | codes, config=config, shards=3, files=files)
    return folder


def contents(folder: Path) -> Contents:
    """What is in a folder, hidden files apart, by name; of a manifest only what does not depend on paths and times."""
    found = {}
    for path in folder.rglob("*"):
        name = f"{path.relative_to(folder)}"
        if path.is_file() and not any(part.startswith(".") for part in Path(name).parts):
            found[name] = path.read_bytes()
            if path.name in MANIFESTS:
                with suppress(ValueError):  # it is not whole yet
                    table = json.loads(found[name])
                    found[name] = json.dumps([table["operation"], table["digest"], table["tensors"]]).encode()
    return found


def weights(found: Contents) -> Contents:
    """Of the contents of a folder what makes it a model."""
    return {name: data for name, data in found.items() if name.endswith((".safetensors", ".index.json", "config.json"))}


def loads(folder: Path) -> bool:
    """Whether a loader finds a model: a config, and the weights of the usual name or all that an index names."""
    if not (folder / "config.json").exists():
        return False
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return (folder / "model.safetensors").exists()
    try:
        return all((folder / name).exists() for name in json.loads(index.read_bytes())["weight_map"].values())
    except ValueError:
        return False


class World:
    """The folders of one scenario, new for every interruption."""

    def __init__(self, warm: Warm, models: Path, folder: Path, scenario: Scenario, *, small: bool = False) -> None:
        """With `small`, all commands cut the models into many windows."""
        self.warm = warm
        self.small = small
        self.scenario = scenario
        self.models = coded(models) if scenario.coded else models
        self.folder = folder
        self.old = {name: contents(self.models / name) for name in MODELS}
        self.wanted = self._uninterrupted(scenario.end)
        self.merge = next(
            c for c in (scenario.command, *(c for c, _ in scenario.before)) if c[0] in ("apply", "extract")
        )
        """The command that makes something new; the others bring it to an end or take it back."""
        self.new = self._uninterrupted(self.merge)

    def _uninterrupted(self, command: tuple[str, ...] | None) -> dict[str, Contents]:
        """Every folder of the world after a command."""
        self._copy()
        if command:
            done = self.run(command)
            assert done.code == 0, done
        return self.found()

    def _copy(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.models, self.folder)

    def begin(self) -> None:
        """Make the world anew, up to where the command starts."""
        self._copy()
        for command, fault in self.scenario.before:
            done = self.run(command, fault)
            assert (done.code == 0) == (fault is None), done

    def run(self, command: Sequence[str], fault: Fault | None = None, **options: Any) -> Done:
        """The command in the world's folder, with the options of Warm.run."""
        cut = {"small": self.small, "parts": self.scenario.parts, "coded": self.scenario.coded}
        return self.warm.run(command, self.folder, fault, **cut, **options)

    def found(self) -> dict[str, Contents]:
        """The contents of every folder in which there is anything."""
        return {
            path.name: contents(path) for path in sorted(self.folder.iterdir()) if path.is_dir() and any(path.iterdir())
        }

    def complete(self, command: tuple[str, ...] | None = None) -> bool:
        """Whether the wanted result is there, or that of `command`, and nothing else."""
        return self.found() == (self.new if command == self.merge else self.wanted)

    def broken(self) -> str:
        """What is wrong at this moment, whatever has happened so far; "" if nothing is."""
        found = self.found()
        for name in MODELS:
            if found.get(name) != self.old[name] and not (name == "target" and self.scenario.writes_target):
                return f"the input {name} was changed"
        for name, now in found.items():
            final = name.removesuffix(".partial")
            whole = [weights(folders[final]) for folders in (self.old, self.new) if final in folders]
            if loads(self.folder / name) and weights(now) not in whole:
                return f"{name} loads and is neither the old model nor the new one"
            if not name.endswith(".partial"):
                for file, data in now.items():
                    if file.endswith(".safetensors") and all(model.get(file) != data for model in whole):
                        return f"{name}/{file} is neither old nor new"
        return ""

    def finish(self) -> str:
        """Go on to the end, without another interruption; what is wrong then, or ""."""
        was_complete = self.complete()
        command = self.scenario.again
        done = self.run(command)
        if done.code == 2 and command[0] == "resume" and not was_complete:  # not begun, or given up: from the start
            command = self.merge
            done = self.run(command)
        if done.code != 0 and not (was_complete and done.code == 2):  # there was nothing left to do
            return f"`ires {' '.join(command)}` exits with {done.code}: {done.err}"
        if not self.complete():
            return f"in the end the result differs from an uninterrupted run in {self._differences()}"
        return ""

    def _differences(self) -> list[str]:
        found, wanted = (
            {f"{folder}/{file}": data for folder, files in folders.items() for file, data in files.items()}
            for folders in (self.found(), self.wanted)
        )
        return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def rounds(
    world: World,
    count: int,
    seed: int,
    times: Sequence[int],
    interrupt: Callable[[random.Random, tuple[str, ...], Done], Cut],
    *,
    begun: Callable[[], None] = lambda: None,
) -> Counter[str]:
    """Interrupt a scenario's command, then what should repair that, and let it end; so many rounds.

    times      how often it is interrupted in a round, one of these
    interrupt  runs a command and interrupts it, given what an uninterrupted run was
    begun      called when the world is where the command starts
    """
    rng = random.Random(f"{world.scenario.name} {seed}")
    world.begin()
    uninterrupted = world.run(world.scenario.command)
    counts: Counter[str] = Counter()
    for number in range(count):
        world.begin()
        begun()
        command = world.scenario.command
        for _ in range(rng.choice(times)):
            cut = interrupt(rng, command, uninterrupted)
            counts[cut.word] += 1
            where = f"{world.scenario.name}, round {number}: {' '.join(command)} {cut.how}"
            wrong = cut.wrong or world.broken()
            assert not wrong, f"{where}: {wrong}"
            command = world.scenario.again
        wrong = world.finish()
        assert not wrong, f"{where}, then again: {wrong}"
    print(f"\n{world.scenario.name}: {count} rounds: {dict(counts)}")
    return counts
