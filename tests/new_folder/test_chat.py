"""A merged model chats, with transformers: the marks of its template are tokens, with rows of instruct; turns end."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import ires_kernels as ik

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5.0")

TEXT = ["the cat sat on the mat", "hello there", "assistant user hello", "naïve café 12 345"] * 5
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
H = 64


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, unk_token="<unk>", special_tokens=["</s>", "<unk>"], show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["</s>", "[UNK]"], show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    return made


def save(folder: Path, model: Any, made: Tokenizer, eos: str, template: str | None = None) -> None:
    model.config.eos_token_id = model.generation_config.eos_token_id = made.token_to_id(eos)
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, chat_template=template)
    tokenizer.save_pretrained(folder)


def changed(model: Any, seed: int, *, rows: int) -> Any:
    """The model after some training, with so many rows."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator) * p.std() * 0.02 if p.dim() > 1 else 0
    old = {name: p.detach().clone() for name, p in model.named_parameters() if "embed" in name or "lm_head" in name}
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in old:
                p[: len(old[name])] = old[name]
                p[len(old[name]) :] = torch.randn(p[len(old[name]) :].shape, generator=generator)
    return model


def answering(model: Any, ids: list[int]) -> Any:
    """The model so that each of the ids follows the one before, since no layer adds to what the embedding says."""
    with torch.no_grad():
        for one, two in pairwise(ids):
            row = model.model.embed_tokens.weight[one]
            model.lm_head.weight[two] = row / row.norm() * 40
    return model


def chat(folder: Path) -> tuple[list[int], str]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": "the cat"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, prompt["input_ids"].shape[1] :]
    return prompt["input_ids"][0].tolist(), tokenizer.decode(out)


@pytest.mark.parametrize("kind", [byte_level, unigram, word_piece])
@pytest.mark.parametrize("padded", [True, False])
def test_the_marks_are_known_and_the_turn_ends(tmp_path: Path, kind: Callable[[], Tokenizer], padded: bool) -> None:
    made = kind()
    size = made.get_vocab_size()
    rows = size + 5 if padded else size
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=H, intermediate_size=H, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    save(tmp_path / "base", base, made, "</s>")
    save(tmp_path / "target", changed(base, 2, rows=rows), made, "</s>")
    marked = Tokenizer.from_str(made.to_str())
    marked.add_special_tokens([START, END])
    instruct = changed(base, 3, rows=max(rows, size + 3))
    word = marked.token_to_id("hello") or marked.encode("hello").ids[-1]
    answering(instruct, [marked.token_to_id(START), word, marked.token_to_id(END)])
    save(tmp_path / "instruct", instruct, marked, END, TEMPLATE)

    wanted = chat(tmp_path / "instruct")
    assert wanted[0].count(marked.token_to_id(START)) == 2
    assert wanted[1].endswith(END)
    rules: dict[str, Any] = {} if padded else {"vocabulary": "instruct"}
    ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / "residual", sync=False)
    ik.apply(tmp_path / "target", (tmp_path / "instruct", tmp_path / "base"), out=tmp_path / "one", sync=False, **rules)
    ik.apply(tmp_path / "target", tmp_path / "residual", out=tmp_path / "two", sync=False, **rules)
    for out in ("one", "two"):
        assert chat(tmp_path / out) == wanted
        settings = [
            json.loads((tmp_path / out / f"{name}.json").read_text()) for name in ("config", "generation_config")
        ]
        assert settings[1]["eos_token_id"] == marked.token_to_id(END)
        assert settings[0]["vocab_size"] == instruct.config.vocab_size
        assert padded or settings[0]["eos_token_id"] == settings[1]["eos_token_id"]
