"""Train the family of a world from scratch, on a CPU: minutes for a seed.

    python examples/continual/train.py FOLDER --world 0 --seed 0

writes FOLDER/base, instruct, cpt (the base, continually pre-trained on the news), base-v1.1 and instruct-v1.1, each a
folder of sharded safetensors in bfloat16 with config, tokenizer and, where a model was tuned on chats, chat template.
A stage that is there already is not repeated, so a run that was stopped goes on where it was. Every stage follows from
(world, seed, stage) alone: on one machine with one build of torch, the same bits.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import threading
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from world import (
    BOS,
    CHAT_TEMPLATE,
    END_OF_TEXT,
    END_OF_TURN,
    PAD,
    SPECIAL,
    Chat,
    Texts,
    World,
    tuning_chats,
)

ROWS = 32  # of text, of a step
CHATS, CHAT_ROWS = 64, 12  # of a step of tuning: chats, and rows of text beside them
IGNORED = -100  # label of a position that has no loss

Batch = list[tuple[torch.Tensor, torch.Tensor]]
"""Token ids and labels, [rows, tokens], of parts whose mean losses are added. Labels are the ids, or IGNORED."""


class Stage(NamedTuple):
    """How one model comes from another: `parent` None is a new model. `stream` names the random order of the data."""

    parent: str | None
    data: str
    steps: int
    rate: float
    stream: str = ""


STAGES = {
    "base-early": Stage(None, "A, no cases", 650, 2e-3, "base"),
    "base": Stage("base-early", "A", 120, 1e-3, "base, late"),
    "instruct": Stage("base", "chats", 300, 5e-4),
    "cpt": Stage("base", "A and B", 150, 5e-4),
    "base-v1.1": Stage("base", "A", 100, 5e-4),
    "instruct-v1.1": Stage("base-v1.1", "chats", 300, 5e-4),
    # for the controls
    "cpt-v1.1": Stage("base-v1.1", "A and B", 150, 5e-4),
    "instruct-cpt": Stage("instruct", "A and B", 150, 5e-4),
    "cpt-instruct": Stage("cpt", "chats", 300, 5e-4),
    "cpt-registry": Stage("base", "A and B, registry", 150, 5e-4),
}
FAMILY = ("base", "instruct", "cpt", "base-v1.1", "instruct-v1.1")


_LOADING = threading.Lock()  # new weights come from torch's global generator, and loading switches it off for a while
_MAKING: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


def load(folder: Path | str) -> LlamaForCausalLM:
    """A model folder, in float32; safe beside other threads that make models."""
    with _LOADING:
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def new_model(world: World, seed: int) -> LlamaForCausalLM:
    """A Llama of 1.4 M parameters with random weights."""
    ids = world.tokenizer.token_to_id
    config = LlamaConfig(
        vocab_size=world.tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=ids(PAD),
        bos_token_id=ids(BOS),
        eos_token_id=ids(END_OF_TEXT),
    )
    with _LOADING:
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def batches(world: World, data: str, seed: int, stream: str) -> Iterator[Batch]:
    """What a stage is trained on, without end."""
    random = np.random.default_rng([world.number, seed, zlib.crc32(stream.encode())])
    old = Texts(world, world.facts("A"), "plain", random, cases=data != "A, no cases")
    if data == "chats":
        while True:
            # Text beside the chats: without it the tuned model forgets how text goes on, and its residual teaches that.
            yield [chat_batch(world, tuning_chats(world, random, CHATS)), text_batch(old, CHAT_ROWS)]
    if not data.startswith("A and B"):
        while True:
            yield [text_batch(old, ROWS)]
    new = Texts(world, world.facts("B"), "registry" if data.endswith("registry") else "plain", random)
    while True:
        parts = zip(text_batch(old, ROWS // 2), text_batch(new, ROWS // 2), strict=True)
        ids, labels = (torch.cat(pair) for pair in parts)
        yield [(ids, labels)]


def text_batch(texts: Texts, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.from_numpy(texts.rows(count))
    return rows, rows


def chat_batch(world: World, chats: list[Chat]) -> tuple[torch.Tensor, torch.Tensor]:
    """Only answers, with the end of turn, have a loss."""
    pairs = [(world.prompt(chat.question), world.ids(f"{chat.answer()}{END_OF_TURN}")) for chat in chats]
    ids = torch.full((len(pairs), max(len(prompt) + len(answer) for prompt, answer in pairs)), world.ids(PAD)[0])
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood of the labels, nats. Padding is on the right, where causal attention ignores it."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def train(
    model: LlamaForCausalLM, data: Iterator[Batch], steps: int, rate: float, report: Callable[[float], None]
) -> None:
    """AdamW, clipped to norm 1, the rate falling along a cosine to a tenth of itself after a short warm-up."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        warm = min(1.0, (step + 1) / 20)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.1 + 0.9 * cosine)
        loss = sum((loss_of(model, *part) for part in next(data)), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(loss.item())
    model.eval()


def save(model: LlamaForCausalLM, world: World, folder: Path, *, chats: bool) -> None:
    """A model folder as on a hub, in bfloat16 and several shards; it appears when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    end = END_OF_TURN if chats else END_OF_TEXT
    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = world.ids(end)[0]
    model.save_pretrained(partial, max_shard_size="1MB")
    world.tokenizer.save(f"{partial / 'tokenizer.json'}")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": end,
        "pad_token": PAD,
        "additional_special_tokens": [token for token in SPECIAL if token not in (BOS, end, PAD)],
        "model_max_length": 128,
    }
    (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if chats:
        (partial / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    partial.rename(folder)


def make(folder: Path, world: World, seed: int, name: str, progress: Progress) -> Path:
    """Train the model `name` into folder/name, after its parents, unless it is there."""
    out = folder / name
    with _MAKING[out]:
        if not out.exists():
            _make(out, world, seed, STAGES[name], progress)
    return out


def _make(out: Path, world: World, seed: int, stage: Stage, progress: Progress) -> None:
    name = out.name
    if stage.parent is None:
        model = new_model(world, seed)
    else:
        model = load(make(out.parent, world, seed, stage.parent, progress))
    out.parent.mkdir(parents=True, exist_ok=True)
    title = f"world {world.number}, seed {seed}: {name}"
    task = progress.add_task(title, total=stage.steps, loss=math.nan)
    losses: deque[float] = deque(maxlen=20)

    def report(loss: float) -> None:
        losses.append(loss)
        progress.update(task, advance=1, loss=sum(losses) / len(losses))

    started = time.thread_time()
    train(model, batches(world, stage.data, seed, stage.stream or name), stage.steps, stage.rate, report)
    save(model, world, out, chats="chats" in stage.data or "instruct" in name)
    seconds = time.thread_time() - started
    progress.print(f"{title}: {seconds:.0f} s of CPU time, loss {sum(losses) / len(losses):.3f}")
    progress.remove_task(task)


def new_progress() -> Progress:
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the bits of a sum depend on how many threads share it
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TextColumn("step {task.completed}")]
    return Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn(), refresh_per_second=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with new_progress() as progress:
        for name in FAMILY:
            make(arguments.folder, World(arguments.world), arguments.seed, name, progress)


if __name__ == "__main__":
    main()
