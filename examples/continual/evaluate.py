"""What a model does with the facts of a world: in chats, in clozes and in perplexity.

python examples/continual/evaluate.py MODEL [MODEL ...] --world 0
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from train import load
from world import END_OF_TURN, HELD_OUT, Chat, Texts, World, clozes, test_chats

BATCH = 256
LONGEST_ANSWER = 12  # tokens, with the end of turn


@torch.no_grad()
def answers(model: Any, world: World, questions: Sequence[str]) -> list[str]:
    """Greedy answers as text, up to the end of turn or LONGEST_ANSWER tokens."""
    end, pad = world.ids(END_OF_TURN)[0], model.config.pad_token_id
    found = []
    for start in range(0, len(questions), BATCH):
        prompts = [world.prompt(question) for question in questions[start : start + BATCH]]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        out = model.generate(
            ids, attention_mask=(ids != pad).long(), do_sample=False, max_new_tokens=LONGEST_ANSWER, eos_token_id=end
        )
        for row in out[:, width:].tolist():
            stop = row.index(end) + 1 if end in row else len(row)
            # The end of turn stays visible where it is missing: an answer that does not end is no answer.
            found.append(world.tokenizer.decode(row[: stop - 1]) if end in row else f"{world.tokenizer.decode(row)} …")
    return found


def follows_format(chat: Chat, answer: str) -> bool:
    """Whether the answer is what was asked for, word for word, with whatever value of the attribute."""
    return answer in {chat.answer(value) for value in chat.fact.attribute.values}


def knows(chat: Chat, answer: str) -> bool:
    """Whether the answer names the right value, in either case, and no other value of the attribute."""
    return set(re.findall("[a-z]+", answer.lower())) & set(chat.fact.attribute.values) == {chat.fact.value}


@torch.no_grad()
def cloze(model: Any, world: World, group: str, register: str = "plain") -> float:
    """Share of values that are the likeliest of their attribute after the text before them.

    The sentences are those of the texts: for who was trained on these, it is recall of what was read.
    """
    pad = model.config.pad_token_id
    items = sorted(clozes(world, group, register), key=lambda item: len(item[0]))
    right = 0
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        width = max(len(ids) for ids, _, _ in part)
        rows = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _, _ in part])
        logits = model(rows, use_cache=False).logits
        for row, (ids, value, choices) in enumerate(part):
            right += choices[int(logits[row, len(ids) - 1, choices].argmax())] == value
    return right / len(items)


@torch.no_grad()
def perplexity(model: Any, world: World, group: str, register: str = "plain") -> float:
    """Of 64 rows of text about a group: the sentences of the training texts, packed in an order of their own."""
    texts = Texts(world, world.facts(group), register, np.random.default_rng([world.number, 3]))
    rows = torch.from_numpy(texts.rows(64))
    logits = model(rows, use_cache=False).logits[:, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item())


def scores(folder: Path, world: World, register: str = "plain") -> dict[str, float]:
    """All figures of a model. The register is that of the texts about B; chats are the same."""
    model = load(folder)
    found: dict[str, float] = {}
    for group in ("B", "not in chats"):
        chats = test_chats(world, group, 3 if group == "B" else 6)
        given = answers(model, world, [chat.question for chat in chats])
        follows = np.array([follows_format(chat, answer) for chat, answer in zip(chats, given, strict=True)])
        known = np.array([knows(chat, answer) for chat, answer in zip(chats, given, strict=True)])
        unseen = np.array([chat.format in HELD_OUT for chat in chats])
        upper = np.array([chat.format[0] == "upper" for chat in chats])
        name = "B" if group == "B" else "A"
        found[f"format {name}"] = float(follows.mean())
        found[f"knowledge {name}"] = float(known.mean())
        if group == "B":
            for part, chosen in (("seen", ~unseen & ~upper), ("held out", unseen & ~upper), ("upper", upper)):
                found[f"format B, {part}"] = float(follows[chosen].mean())
                found[f"knowledge B, {part}"] = float(known[chosen].mean())
                found[f"both B, {part}"] = float((follows & known)[chosen].mean())
            found["both B"] = float((follows & known).mean())
    found["cloze B"] = cloze(model, world, "B", register)
    found["perplexity B"] = perplexity(model, world, "B", register)
    found["perplexity A"] = perplexity(model, world, "A")
    return found


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model or residual."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def restored(model: Path, wanted: Path) -> float:
    """Fraction of 16-bit weights that are the same bits in both."""
    ours, theirs = tensors_of(model), tensors_of(wanted)
    same = sum(int((ours[name].view(torch.int16) == t.view(torch.int16)).sum()) for name, t in theirs.items())
    return same / sum(t.numel() for t in theirs.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--world", type=int, default=0)
    arguments = parser.parse_args()
    for folder in arguments.models:
        print(folder, {name: round(value, 3) for name, value in scores(folder, World(arguments.world)).items()})


if __name__ == "__main__":
    main()
