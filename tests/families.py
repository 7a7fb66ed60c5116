"""Tiny models of transformers, one of each kind: base, and instruct and target a little off it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

LLAMA: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": False}),
    "tied llama": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "gemma": ("GemmaForCausalLM", {**LLAMA, "head_dim": 8}),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                                 "bos_token_id": 1, "eos_token_id": 2}),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
                                          "num_heads": 4, "decoder_start_token_id": 0}),
    "bert": ("BertForMaskedLM", {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                                 "num_attention_heads": 4, "max_position_embeddings": 64}),
    "mamba": ("MambaForCausalLM", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}  # fmt: skip


def relative(model: nn.Module, seed: int) -> nn.Module:
    """A model that was trained a little further."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.004)
    return other


def family(folder: Path, name: str) -> Any:
    """The target of a family; its folder and those of instruct and base are written."""
    kind, settings = FAMILIES[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(1)
    base = cls(cls.config_class(**settings)).to(torch.bfloat16).eval()
    target = relative(base, 3)
    for role, model in {"base": base, "instruct": relative(base, 2), "target": target}.items():
        model.save_pretrained(folder / role)  # type: ignore[operator]
    return cls.from_pretrained(folder / "target", dtype=torch.bfloat16)
