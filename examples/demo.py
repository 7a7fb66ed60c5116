"""What an instruction residual does, and how fast, with nothing to download: `make demo`.

First with models that can answer: a family of tiny ones, trained from scratch by examples/continual/train.py and kept
in the repository. The base was trained further on news about entities that no chat ever mentioned; it knows them and
follows no instruction. The residual of its older instruct model is added, and it answers in the format asked for.
Then on a generated triple of Llama's shape, with the commands a person would type, to show the speed.

Everything is written into a temporary folder and removed; --keep FOLDER keeps it.
"""

from __future__ import annotations

import argparse
import filecmp
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import ires_kernels as ik
from ires_kernels.bench.synthetic import write_triple

CONTINUAL = Path(__file__).parent / "continual"
FAMILY = CONTINUAL / "family"
sys.path.append(f"{CONTINUAL}")

from evaluate import answers, follows_format, knows, restored, tensors_of  # noqa: E402
from train import load  # noqa: E402
from world import Chat, World, test_chats  # noqa: E402

PROMPTS, ALPHA_PROMPTS = 5, 224
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def say(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]" if console.is_terminal else f"\n# {text}")


def ires(folder: Path, command: str) -> None:
    print(f"$ ires {command}", flush=True)
    subprocess.run([sys.executable, "-m", "ires_kernels", *shlex.split(command)], cwd=folder, check=True)


def every(chats: list[Chat], count: int) -> list[Chat]:
    """So many of them, at equal distances: nothing is picked for its answer."""
    return [chats[i * len(chats) // count] for i in range(count)]


def marked(chat: Chat, answer: str) -> Text:
    """An answer and what is right about it."""
    mark, style = {
        (True, True): ("✓", "green"),
        (True, False): ("f", "yellow"),
        (False, True): ("v", "yellow"),
        (False, False): ("✗", "red"),
    }[follows_format(chat, answer), knows(chat, answer)]
    return Text(f"{mark} {answer}", style)


def talk(folder: Path) -> None:
    """The same prompts for the instruct model, the new base, and the new base plus the residual."""
    world = World(0)
    say("Extract the residual of the instruct model, and add it to the base that has read the news")
    base, instruct, cpt = (shlex.quote(f"{FAMILY / name}") for name in ("base", "instruct", "cpt"))
    ires(folder, f"extract {base} {instruct} -o residual")
    ires(folder, f"apply {cpt} residual -o cpt-instruct")
    say("How far both are from the base, and whether what they have learnt gets in each other's way")
    ires(folder, f"compare {cpt} --instruct {instruct} --base {base}")

    models = {
        "instruct": FAMILY / "instruct",
        "trained further (CPT)": FAMILY / "cpt",
        "CPT + residual": folder / "cpt-instruct",
    }
    chats = every(test_chats(world, "B", 6), PROMPTS)
    say("Five questions about the news: ✓ value and format are right, f only the format, v only the value, ✗ neither")
    table = Table("prompt", "truth", *models)
    columns = [answers(load(path), world, [chat.question for chat in chats]) for path in models.values()]
    for chat, *given in zip(chats, *columns, strict=True):
        table.add_row(chat.question, chat.fact.value, *(marked(chat, answer) for answer in given))
    console.print(table)


def sweep(folder: Path) -> None:
    """Alpha, from the new base as it is to more than the whole residual."""
    world = World(0)
    chats = every(test_chats(world, "B", 6), ALPHA_PROMPTS)
    say(f"CPT + alpha · residual, {ALPHA_PROMPTS} prompts each")
    table = Table("alpha", "effective alpha", "follows the format", "knows the fact", "both")
    for alpha in ALPHAS:
        out = folder / f"alpha-{alpha:g}"
        report: Any = ik.apply(FAMILY / "cpt", folder / "residual", out=out, alpha=alpha, sync=False)
        given = list(zip(chats, answers(load(out), world, [chat.question for chat in chats]), strict=True))
        follows = [follows_format(*pair) for pair in given]
        known = [knows(*pair) for pair in given]
        both = [f and k for f, k in zip(follows, known, strict=True)]
        effective = report.strengths[0].effective_alpha if report.strengths else None
        shares = (f"{sum(flags) / len(flags):.0%}" for flags in (follows, known, both))
        table.add_row(f"{alpha:g}", "–" if effective is None else f"{effective:.4f}", *shares)
    console.print(table)
    say("Exactness: base + residual is the instruct model again, and the merge is what its inputs say, bit for bit")
    for dtype in ("f32", "bf16"):
        residual, again = folder / f"residual-{dtype}", folder / f"again-{dtype}"
        ik.extract(FAMILY / "base", FAMILY / "instruct", residual, dtype=dtype, sync=False)
        ik.apply(FAMILY / "base", residual, out=again, sync=False)
        print(f"base + residual in {dtype}: {restored(again, FAMILY / 'instruct'):.5%} of the weights of instruct")
    explain_what_is_not_restored(folder)
    ires(folder, "verify cpt-instruct")


def explain_what_is_not_restored(folder: Path) -> None:
    """The weights that an exact residual cannot bring back, and how much a rounded one leaves out."""
    base, instruct, again = map(tensors_of, (FAMILY / "base", FAMILY / "instruct", folder / "again-f32"))
    exact, rounded = (tensors_of(folder / f"residual-{dtype}") for dtype in ("f32", "bf16"))
    for name, wanted in instruct.items():
        for i in (again[name] != wanted).flatten().nonzero().flatten().tolist():
            was, now, got = (float(model[name].flatten()[i]) for model in (base, instruct, again))
            print(
                f"  f32: {name}[{i}] went from {was:.3g} to {now:.4g}, and comes back as {got:.4g}.\n"
                "  Where a weight becomes 2^16 times smaller, their float32 difference has no room for all its\n"
                "  bits (docs/numerics.md, P1)."
            )
    count = sum(t.numel() for t in exact.values())
    share = sum(int((rounded[name].float() != t).sum()) for name, t in exact.items()) / count
    error = sum(float((rounded[name].double() - t.double()).square().sum()) for name, t in exact.items()) ** 0.5
    norm = sum(float(t.double().square().sum()) for t in exact.values()) ** 0.5
    print(
        f"  bf16: {share:.1%} of these differences need more bits than the 8 of bfloat16 and are rounded,\n"
        f"  by {error / norm:.2%} of the residual's norm in all. For every bit store f32 (the default)."
    )


def same_weights(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def speed(folder: Path, shape: str) -> None:
    """The whole job on a Llama-shaped triple of made-up weights."""
    say(f"Now for speed: made-up models of Llama's shape, {shape} each")
    write_triple(folder, shape)
    ires(folder, "extract base instruct -o residual-large")
    ires(folder, "apply target residual-large -o merged")
    say("The same in one pass, with no residual stored")
    ires(folder, "apply target --instruct instruct --base base -o merged-in-one-pass")
    print(f"both are the same, byte for byte: {same_weights(folder / 'merged', folder / 'merged-in-one-pass')}")
    say("A third of it: rounding to nearest changes alpha, stochastic rounding keeps it")
    ires(folder, "apply target residual-large:0.3 -o third-nearest")
    ires(folder, "apply target residual-large:0.3 -o third-stochastic --rounding stochastic --seed 1")
    say("Recompute the merge from its inputs and compare every bit; load it with transformers")
    ires(folder, "verify merged")
    load_with_transformers(folder / "merged")


def load_with_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    messages = [{"role": "user", "content": "Hello"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(chat, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.isfinite(logits).all()
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}: logits {tuple(logits.shape)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", "--size", default="500MB", help="size of a made-up model: 500MB, 250M, or llama-1b …"
    )
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    arguments = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the tiny models gain nothing from more; ires has threads of its own
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=arguments.keep is None)
        talk(folder)
        sweep(folder)
        speed(folder, arguments.shape)
        say("Done" if arguments.keep is None else f"Done; everything is in {folder}")


if __name__ == "__main__":
    main()
