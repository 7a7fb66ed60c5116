"""The main job on a generated Llama-shaped triple, with the commands a person would type: `make demo`.

A base, an instruct model and a continually pre-trained base are made up; the instruction residual is extracted, added
to the new base in two ways, verified, and the result is loaded with transformers. Nothing is downloaded. Everything is
written into a temporary folder and removed; --keep FOLDER keeps it.
"""

from __future__ import annotations

import argparse
import filecmp
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from ires_kernels.synthetic import write_triple


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n# {text}", flush=True)


def ires(folder: Path, command: str) -> None:
    print(f"$ ires {command}", flush=True)
    subprocess.run([sys.executable, "-m", "ires_kernels", *shlex.split(command)], cwd=folder, check=True)


def same_weights(folder: Path, one: str, other: str) -> bool:
    names = sorted(path.name for path in (folder / one).glob("*.safetensors"))
    return all(filecmp.cmp(folder / one / name, folder / other / name, shallow=False) for name in names)


def load(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    messages = [{"role": "user", "content": "Hello"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(chat, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.isfinite(logits).all()
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}")
    print(f"with the chat template of the instruct model: {chat!r} -> logits {tuple(logits.shape)}, all finite")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="500MB", help="size of a model: 500MB, 250M, or a name such as llama-1b")
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        say(f"Generate base, instruct and target, {arguments.shape} each")
        write_triple(folder, arguments.shape)
        ires(folder, "inspect target")

        say("Extract the instruction residual: instruct - base, float32")
        ires(folder, "extract base instruct -o residual")

        say("Add it to the continually pre-trained base")
        ires(folder, "apply target residual -o merged")

        say("The same in one pass, with no residual stored")
        ires(folder, "apply target --instruct instruct --base base -o merged-in-one-pass")
        assert same_weights(folder, "merged", "merged-in-one-pass")
        print("both are the same, byte for byte")

        say("A third of it: rounding to nearest changes alpha, stochastic rounding keeps it")
        ires(folder, "apply target residual:0.3 -o third-nearest")
        ires(folder, "apply target residual:0.3 -o third-stochastic --rounding stochastic --seed 1")

        say("Recompute the merge from its inputs and compare every bit")
        ires(folder, "verify merged")
        ires(folder, "verify third-stochastic")

        say("Load it with transformers")
        load(folder / "merged")
        say("Done" if arguments.keep is None else f"Done; everything is in {folder}")


if __name__ == "__main__":
    main()
