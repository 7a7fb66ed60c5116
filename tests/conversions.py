"""Pairs of layouts that transformers knows, told by which element is which: its table of conversions as an oracle.

A model type with an entry in the table is built on the meta device with a tiny configuration. Every element of its
parameters gets a number of its own, and the table's reverse turns the tensors of numbers into those of the other
layout. So where each element of a file goes is read off, and is nobody's opinion. No list of types or of differences is
kept here: both are what the installed transformers has.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import transformers
from small_models import Tensors
from torch import Tensor
from transformers import CONFIG_MAPPING, conversion_mapping, core_model_loading
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

transformers.logging.set_verbosity_error()

LARGEST = 1_000_000
"""Elements: more is not tiny, and its type is left out."""

_TINY = {
    r"(key_value|kv)_heads$": 2,
    r"heads?$": 4,
    r"(head_dim|head_size)$": 64,
    r"lora_rank$": 32,
    r"vocab(_size)?$": 160,
    r"(n_group|topk_group|num_shared_experts|n_shared_experts)$": 1,
    r"(experts_per_tok|top_k|topk|moe_k)$": 2,
    r"experts$": 4,
    r"first_k_dense_replace$": 1,
    r"(layers?|depth|num_blocks)$": 2,
    r"(intermediate.*size|ffn.*|ff_dim|d_ff|n_inner|mlp_dim|feed_forward.*)$": 96,
    r"(hidden.*(size|dim)|d_model|n_embd|embed.*dim|projection_dim|output_dim|width|(en|de)coder_dim)$": 64,
    r"(position.*|seq_len.*)$": 64,
    r"image_size$": 32,
    r"patch_size$": 8,
    r"token_(id|index)$": 1,
}
"""What integers of a configuration become, by their name: the first pattern found counts."""

_CLASSES = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM")
"""Tasks whose class is asked first."""


class Places:
    """Where the elements of a layout are."""

    def __init__(self, layout: Tensors) -> None:
        self.names = list(layout)
        count = 1 + max(int(ids.max()) for ids in layout.values())
        self._tensor, self._element = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for i, ids in enumerate(layout.values()):
            flat = ids.reshape(-1).numpy()
            self._tensor[flat], self._element[flat] = i, np.arange(len(flat))

    def runs(self, ids: Tensor) -> list[tuple[str, int, int]]:
        """Where the elements of a tensor of another layout are, in their order: name, first element, count."""
        flat = ids.reshape(-1).numpy()
        tensors, elements = self._tensor[flat], self._element[flat]
        edges = np.flatnonzero(np.diff(tensors, prepend=-1, append=-1) | (np.diff(elements, prepend=0, append=0) != 1))
        firsts = zip(tensors[edges[:-1]].tolist(), elements[edges[:-1]].tolist(), strict=True)
        return [(self.names[i], first, n) for (i, first), n in zip(firsts, np.diff(edges).tolist(), strict=True)]


@dataclass(frozen=True)
class Conversion:
    """Two layouts of one model: under each name, the numbers of the elements that belong there."""

    config: str
    """The text of its config.json."""
    new: Tensors
    """As transformers has it in memory."""
    old: Tensors
    """As its table says that files are."""

    @cached_property
    def places(self) -> dict[str, Places]:
        return {"new": Places(self.new), "old": Places(self.old)}


@cache
def model_types() -> tuple[str, ...]:
    """The model types that the table speaks of, by their own name or by that of one of their classes."""
    return tuple(kind for kind in CONFIG_MAPPING_NAMES if {kind, *_classes(kind)} & _entries())


def _entries() -> set[str]:
    """Model types and names of classes."""
    conversion_mapping.get_checkpoint_conversion_mapping("")
    return set(conversion_mapping._checkpoint_conversion_mapping_cache)


def _classes(kind: str) -> Iterator[str]:
    """The names of the classes of a model type, those of the tasks above first."""
    tables = [name for name in vars(modeling_auto) if name.endswith("MAPPING_NAMES")]
    first = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in _CLASSES] + ["MODEL_MAPPING_NAMES"]
    for table in [*first, *(name for name in tables if name not in first)]:
        found = getattr(modeling_auto, table).get(kind, ())
        yield from (found,) if isinstance(found, str) else found


def tiny(settings: Mapping[str, Any], *, all_heads: bool = False, fill: bool = False) -> dict[str, Any]:
    """The integers of a configuration and of those within it that are to be others.

    `all_heads`: with as many heads for keys and values as for queries. `fill`: what is None gets a number as well,
    where its name is that of one.
    """
    small: dict[str, Any] = {}
    for key, value in settings.items():
        number = next((number for pattern, number in _TINY.items() if re.search(pattern, key)), None)
        if isinstance(value, dict) and (key.endswith("_config") or "rope" in key):
            within = tiny(value, all_heads=all_heads, fill=fill)
            kept = {k: v for k, v in value.items() if k == "model_type"} if key.endswith("_config") else value
            small |= {key: {**kept, **within}} if within else {}
        elif key == "mrope_section":
            small[key] = [12, 12, 8]  # of half a head
        elif key.endswith("token_id") and isinstance(value, list):
            small[key] = [1]
        elif number is not None and (number < value if type(value) is int else value is None and fill):
            small[key] = 4 if all_heads and number == 2 and "heads" in key else number
    return small


@cache
def conversion(kind: str) -> Conversion | None:
    """The two layouts of a model type; None where it cannot be built so small, or has but one layout."""
    model = tiny_model(kind, "meta")
    if model is None:
        return None
    table = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    new, end = {}, 0
    for name, parameter in model.state_dict().items():
        if name not in tied and parameter.numel():
            new[name] = torch.arange(end, end + parameter.numel()).view(parameter.shape)
            end += parameter.numel()
    model._weight_conversions = table  # or what only loading adds would be left out
    try:
        reverted = core_model_loading.revert_weight_conversion(model, new) if table else new
    except Exception:  # an operation that has no reverse
        return None
    old = {name: ids.contiguous() for name, ids in reverted.items()}
    whole = torch.equal(torch.cat([ids.flatten() for ids in old.values()]).sort().values, torch.arange(end))
    differ = new.keys() != old.keys() or any(not torch.equal(ids, old[name]) for name, ids in new.items())
    return Conversion(model.config.to_json_string(), new, old) if whole and differ else None


def tiny_model(kind: str, device: str) -> Any:
    """A model of a type, tiny; None where its configuration does not allow that."""
    names = list(_classes(kind))
    made = getattr(transformers, next((name for name in names if name in _entries()), names[0]))
    for options in ({}, {"all_heads": True}, {"fill": True}, {"all_heads": True, "fill": True}):
        with contextlib.suppress(Exception), torch.device(device):  # whatever such a class thinks of small numbers
            config = CONFIG_MAPPING[kind]
            model = made(config(**tiny(config().to_dict(), **options)))
            return model if sum(each.numel() for each in model.state_dict().values()) <= LARGEST else None
    return None
