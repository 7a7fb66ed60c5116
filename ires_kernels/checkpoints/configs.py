"""What config.json says of the meaning of the weights, and where models that are merged say different things.

Equal names and shapes can compute different things: another base of the rotary embedding, another activation. No tensor
shows it, and the output has the target's config.json. Every field counts that is not known to be without influence;
spellings that mean the same are made equal first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import brief

Fields = dict[str, Any]
"""Values by name; a field of a part of the model, such as vision_config, has that in front, with a dot."""

_LONGEST = 2000  # characters of JSON of one value that is kept; the longest that are known list the kinds of 100 layers
_SHOWN = 10

# What changes no result of a forward pass: storage, training, generation, speed, names. How many rows and positions
# there are is what shapes tell, and which ids mark the end is said elsewhere.
_WITHOUT_INFLUENCE = re.compile(
    r"(.*_)?dtype|.*version.*|_.*|.*name_or_path|use_cache|.*dropout.*|.*_drop|.*_pdrop|layerdrop|initializer.*|.*init_std"
    r"|initializer_range|.*token_(id|index)s?|(.*_)?vocab_size.*|max_position_embeddings|n_positions|n_ctx|seq_length"
    r"|model_max_length|output_(attentions|hidden_states|scores|past|router_logits)|return_dict|use_return_dict|torchscript|id2label|label2id|num_labels|problem_type"
    r"|finetuning_task|task_specific_params|.*quantization.*|compression_config.*|auto_map|.*attn_implementation|(use_)?flash_attn.*"
    r"|gradient_checkpointing|.*aux_loss.*|.*z_loss.*|.*jitter.*|pretraining_tp|tokenizer_class|processor_class"
    r"|temperature|top_[kp]|do_sample|num_beams|.*length_penalty|repetition_penalty|(max|min)(_new)?_(length|tokens)"
    r"|pruned_heads|tf_legacy_loss|use_bfloat16|bf16|fp16|fp32|transformers\.js_config|custom_pipelines|use_mems.*"
    r"|license|unsloth.*|trl.*|torch_.*|fused_.*|use_fused.*|ep_size"
)
# Fields that mean something where one model has them and another, whose config.json is written out, does not.
_TOLD_BY_ABSENCE = re.compile(
    r"rope_theta|rope_scaling\..*|partial_rotary_factor|num_key_value_heads|sliding_window|.*_multiplier|.*softcapping"
    r"|logits?_scal\w*|query_pre_attn_scalar|scale_\w+|residual_scale|dim_model_base|mup_\w+|model_type|clip_qkv|alibi"
    r"|no_rope\w*|attention_chunk_size|routed_scaling_factor"
)
_INFINITE = re.compile(r'\{"__float__": "(NaN|-?Infinity)"\}')  # as transformers 5 writes what is no JSON
_NORM = re.compile(r"\w*norm\w*_eps\w*")
# Absent means one of these. Of rope_theta it is the default of nearly all models that have it.
_NEUTRAL = (None, False, 0, 1, "default", "full_attention")
_DEFAULTS: Fields = {"rope_theta": 10000.0, "sliding_attention.rope_theta": 10000.0}
_ALIASES = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
_NO_ROPE = 4  # of so many layers the last one has none, where Llama 4 does not say which
_TEXT = ("text_config", "llm_config", "language_config")


def fields(config: Mapping[str, Any] | None) -> Fields:
    """The fields of config.json that say what the weights mean, in one spelling."""
    table = dict(config or {})
    for key in _TEXT:  # of the language model of a multimodal model, as if it were on its own
        if isinstance(table.get(key), dict):
            table = {**table.pop(key), **table}
    found: Fields = {}
    for name, value in _flat("", table):
        text = _INFINITE.sub(r"\1", json.dumps(value))
        if len(text) <= _LONGEST:
            # Infinity is no JSON, though some models have it; and what is not a number is not equal to itself.
            found[name] = text if re.search(r"NaN|Infinity", text) else value
    return found


def differences(inputs: Mapping[str, Checkpoint]) -> list[str]:
    """A warning of the fields that differ among the inputs, where any do, and of whose value the output has."""
    tables: dict[str, Fields] = {}
    for role, checkpoint in inputs.items():
        if checkpoint.kind == "residual":
            recorded = checkpoint.manifest.config if checkpoint.manifest else {}
            tables |= {f"{of} of {role}": recorded[of] for of in ("instruct", "base") if of in recorded}
        elif checkpoint.config is not None:
            tables[role] = fields(checkpoint.config)
    lines = []
    for name in dict.fromkeys(name for table in tables.values() for name in table):
        values = {role: table.get(name) for role, table in tables.items()}
        if _differ(name, values, tables):
            said: dict[str, list[str]] = {}
            for role, value in values.items():
                said.setdefault("absent" if value is None else brief(value), []).append(role)
            lines.append(f"{name} is {', '.join(f'{text} in {_and(roles)}' for text, roles in said.items())}")
    if not lines:
        return []
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    whose = ". The output has the target's values" if "target" in tables else ""
    return [f"config.json says different things of what the weights mean: {'; '.join(lines[:_SHOWN])}{more}{whose}"]


def special_ids(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The ids of the tokens that begin, end and fill a text, as loaders find them in config.json."""
    table = dict(config or {})
    parts = [table, *(table[key] for key in _TEXT if isinstance(table.get(key), dict))]
    found: dict[str, Any] = {}
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        values = (part.get(key) for part in parts)
        value = next((value for value in values if _is_ids(value)), None)
        found |= {} if value is None else {key: value}
    return found


def grown(config: Mapping[str, Any], rows: int, special: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose vocabulary gets so many rows, with the special ids of another."""
    table = dict(config)
    parts: list[dict[str, Any]] = [table]
    for key in _TEXT:
        if isinstance(table.get(key), dict):
            table[key] = dict(table[key])
            parts.append(table[key])
    for key, value in {"vocab_size": rows, **special}.items():
        # Where none says it, it is the language model's; and its class has another default.
        for part in [part for part in parts if key in part] or parts[-1:]:
            part[key] = value
    return table


def _is_ids(value: object) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(id_) is int for id_ in value) and bool(value))


def _flat(path: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    table = _one_spelling(table)
    for key, value in table.items():
        if _WITHOUT_INFLUENCE.fullmatch(key):
            continue
        if isinstance(value, dict):
            yield from _flat(f"{path}{key}.", value)
        else:
            yield f"{path}{key}", value


def _one_spelling(table: Mapping[str, Any]) -> Fields:
    """Fields of one model, or part of one, that mean the same, under one name with one value."""
    found = {_ALIASES.get(key, key): value for key, value in table.items()}
    rope: Any = found.pop("rope_parameters", None) or found.pop("rope_scaling", None) or {}
    found.pop("rope_scaling", None)
    if isinstance(rope, dict):
        # By kind of layer in newer files; older ones had the others' base in a field of its own.
        kinds = rope if rope and all(isinstance(value, dict) for value in rope.values()) else {"": rope}
        for kind, values in kinds.items():
            prefix = "" if kind in ("", "full_attention") else f"{kind}."
            for key, value in values.items():
                key = "rope_type" if key == "type" else key
                hoisted = key in ("rope_theta", "partial_rotary_factor")
                found[f"{prefix}{key}" if hoisted else f"{prefix}rope_scaling.{key}"] = value
    else:
        found["rope_scaling"] = rope
    if "rope_local_base_freq" in found:
        found.setdefault("sliding_attention.rope_theta", found.pop("rope_local_base_freq"))
    if found.get("rope_scaling.rope_type") in ("default", "mrope"):  # whose section says that it is one
        del found["rope_scaling.rope_type"]
    elif found.get("rope_scaling.rope_type") in ("dynamic", "longrope", "su"):  # which depend on them
        found["rope_scaling.max_position_embeddings"] = found.get("max_position_embeddings")
        found.setdefault(f"rope_scaling.{_ORIGINAL}", found.get(_ORIGINAL))
    if found.get("hidden_activation"):  # which Gemma heeds, and not the other
        found["hidden_act"] = found.pop("hidden_activation")
    layers = found.get("no_rope_layers")
    if isinstance(layers, list) and layers == [int((i + 1) % _NO_ROPE != 0) for i in range(len(layers))]:
        del found["no_rope_layers"]
        if found.get("no_rope_layer_interval") == _NO_ROPE:
            del found["no_rope_layer_interval"]
    if found.get("use_sliding_window") is False:
        for key in ("use_sliding_window", "sliding_window", "max_window_layers"):
            found.pop(key, None)
    heads, hidden = found.get("num_attention_heads"), found.get("hidden_size")
    if isinstance(heads, int) and heads > 0:
        if isinstance(hidden, int) and found.get("head_dim") == hidden // heads and not hidden % heads:
            del found["head_dim"]
        if found.get("num_key_value_heads") == heads:
            del found["num_key_value_heads"]
    kinds_of_layers = found.get("layer_types")
    if isinstance(kinds_of_layers, list) and all(kind == "full_attention" for kind in kinds_of_layers):
        del found["layer_types"]
    names = found.get("architectures")
    if isinstance(names, list):  # with the head for one task or another it is the same family
        found["architectures"] = sorted({re.sub(r"(For[A-Z]|LMHead|Model).*", "", f"{name}") for name in names})
    return {key: value for key, value in found.items() if value is not None}


def _differ(name: str, values: Mapping[str, Any], tables: Mapping[str, Fields]) -> bool:
    given = [value for value in values.values() if value is not None]
    if any(value != given[0] for value in given):
        return True
    if len(given) == len(values) or given[0] in (*_NEUTRAL, _DEFAULTS.get(name)):
        return False
    # Where a model does not even say what its norms add, it says only what its class does not take for granted.
    written = all(any(_NORM.fullmatch(field) for field in table) for table in tables.values())
    return written and _TOLD_BY_ABSENCE.fullmatch(name) is not None


def _and(roles: list[str]) -> str:
    return " and ".join([", ".join(roles[:-1]), roles[-1]] if len(roles) > 1 else roles)
