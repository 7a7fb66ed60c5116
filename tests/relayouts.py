"""Language models in the layouts that they come in: other prefixes and words, weights fused, stacked and reordered.

The plain layout is that of Llama and of Mixtral under the words of Qwen: ``model.layers.N.self_attn.q_proj.weight``,
``mlp.gate_proj``, ``mlp.experts.E.gate_proj``. Whatever a layout does moves elements and changes none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from small_models import Tensors, normal
from torch import Tensor

_META = {
    "embed_tokens.": "tok_embeddings.",
    "lm_head.": "output.",
    "self_attn.": "attention.",
    "mlp.": "feed_forward.",
    "input_layernorm.": "attention_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    **{f"{name}_proj": f"w{name}" for name in "qkvo"},
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
}
"""The words of the texts that Meta and Mistral publish."""


@dataclass(frozen=True)
class Sizes:
    """What a model consists of; those of its config.json."""

    vocabulary: int = 72
    hidden: int = 64
    intermediate: int = 96
    heads: int = 4
    key_heads: int = 2
    head: int = 16
    experts: int = 0
    layers: int = 2
    bias: bool = False

    def config(self, rows: int = 0) -> dict[str, Any]:
        """The config.json of a model of that many rows of its vocabulary."""
        moe = {"num_local_experts": self.experts, "num_experts_per_tok": 2} if self.experts else {}
        return moe | {
            "model_type": "mixtral" if self.experts else "llama",
            "vocab_size": rows or self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the plain layout."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        queries, keys, inner = self.heads * self.head, self.key_heads * self.head, self.intermediate
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (self.hidden,)
            for name, rows in (("q", queries), ("k", keys), ("v", keys)):
                shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, self.hidden)
                if self.bias:
                    shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
            shapes[f"{at}self_attn.o_proj.weight"] = (self.hidden, queries)
            if self.experts:
                shapes[f"{at}mlp.gate.weight"] = (self.experts, self.hidden)
            for mlp in [f"{at}mlp.experts.{i}." for i in range(self.experts)] or [f"{at}mlp."]:
                shapes[f"{mlp}gate_proj.weight"] = shapes[f"{mlp}up_proj.weight"] = (inner, self.hidden)
                shapes[f"{mlp}down_proj.weight"] = (self.hidden, inner)
        return shapes | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}


def family(sizes: Sizes, noise: float = 4e-3) -> dict[str, Tensors]:
    """base, and instruct and target a little off it, in the plain layout."""
    near = {"instruct": 1, "target": 2}
    made: dict[str, Tensors] = {role: {} for role in ("base", *near)}
    for i, (name, shape) in enumerate(sizes.shapes().items()):
        base = normal(shape, i, torch.float32)
        made["base"][name] = base.bfloat16()
        for role, seed in near.items():
            made[role][name] = (base + normal(shape, 1000 * seed + i, torch.float32, noise)).bfloat16()
    return made


@dataclass(frozen=True)
class Layout:
    """How a model is laid out."""

    prefix: str = "model."
    """Before the layers, the embedding and the last norm."""
    words: Literal["usual", "meta"] = "usual"
    qkv: Literal["apart", "rows", "heads", "groups"] = "apart"
    """q, k and v: of their own, one below the other, or so for each head or for each group with one head of k and v."""
    mlp: Literal["apart", "gate up", "up gate"] = "apart"
    stacked: bool = False
    """All experts of a layer in one tensor, gate and up in this order."""
    rotary: bool = False
    """Rows of q and k in Meta's order: the two halves of a head take turns."""
    padding: int = 0
    """Rows of the vocabulary that no token has."""

    def of(self, model: Tensors, sizes: Sizes) -> Tensors:
        """A model of the plain layout in this one. Relatives have the same padding, since nothing trains it."""
        made = dict(model)
        if self.padding:
            for i, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
                made[name] = torch.cat([made[name], normal((self.padding, sizes.hidden), i)])
        if self.rotary:
            for name in [name for name in made if re.search(r"\.[qk]_proj\.", name)]:
                made[name] = turns(made[name], sizes.head)
        if self.qkv != "apart":
            for name in [name for name in made if ".q_proj." in name]:
                q, k, v = (made.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv")
                made[name.replace("q_proj", _FUSED[self.qkv][0])] = _FUSED[self.qkv][1](q, k, v, sizes)
        if self.mlp != "apart":
            for name in [name for name in made if name.endswith("mlp.gate_proj.weight")]:
                gate, up = made.pop(name), made.pop(name.replace("gate_proj", "up_proj"))
                fused = torch.cat([gate, up] if self.mlp == "gate up" else [up, gate])
                made[name.replace("gate_proj", "gate_up_proj")] = fused
        if self.stacked:
            for name in [name for name in made if name.endswith("experts.0.gate_proj.weight")]:
                at = name.removesuffix("0.gate_proj.weight")
                gate, up, down = (
                    torch.stack([made.pop(f"{at}{i}.{part}_proj.weight") for i in range(sizes.experts)])
                    for part in ("gate", "up", "down")
                )
                made[f"{at}gate_up_proj"], made[f"{at}down_proj"] = torch.cat([gate, up], 1), down
        return {self._name(name): tensor for name, tensor in made.items()}

    def _name(self, name: str) -> str:
        if name.startswith("model."):
            name = self.prefix + name.removeprefix("model.")
        for ours, theirs in _META.items() if self.words == "meta" else ():
            name = re.sub(rf"(^|\.){re.escape(ours)}", rf"\g<1>{theirs}", name)
        return name


def turns(t: Tensor, head: int) -> Tensor:
    """Rows of rotary halves to rows by turns: the order of Transformers to that of Meta."""
    return t.view(-1, 2, head // 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


def _rows(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:  # noqa: ARG001
    return torch.cat([q, k, v])


def _groups(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> Tensor:
    """For each head of k and v: the heads of q that go with it, then itself."""
    parts = [t.view(sizes.key_heads, -1, *t.shape[1:]) for t in (q, k, v)]
    return torch.cat(parts, 1).flatten(0, 1)


_FUSED: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor, Sizes], Tensor]]] = {
    "rows": ("qkv_proj", _rows),
    "heads": ("query_key_value", _groups),  # as many heads of each: groups of one
    "groups": ("wqkv", _groups),
}
