"""No value of the files beside the weights is a bug: each is read, or passed over, or refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from small_models import triple

from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.extraction import plan_extract
from ires_kernels.planning.rules import Rules

FILES: dict[str, Any] = {
    "config.json": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "eos_token_id": [1],
        "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, "rms_norm_eps": 1e-5,
        "rope_scaling": {"type": "longrope", "long_factor": [1.0]}, "original_max_position_embeddings": 64,
        "hidden_activation": "gelu", "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4,
        "layer_types": ["full_attention"], "use_sliding_window": False, "sliding_window": 8,
        "text_config": {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "vision_config": {"depth": 2},
        "auto_map": {"AutoModel": "modeling_x.X"}, "quantization_config": None,
    },
    "generation_config.json": {"eos_token_id": [1, 2], "bos_token_id": 0, "do_sample": True},
    "tokenizer.json": {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        "added_tokens": [{"id": 2, "content": "<|end|>"}],
    },
    "tokenizer_config.json": {
        "eos_token": {"content": "<|end|>"}, "bos_token": "a", "additional_special_tokens": ["b"],
        "added_tokens_decoder": {"2": {"content": "<|end|>"}},
        "chat_template": [{"name": "default", "template": "<|end|>"}],
    },
    "special_tokens_map.json": {"pad_token": {"content": "b"}},
    "added_tokens.json": {"<|more|>": 3},
    "modules.json": [{"idx": 0, "path": "1_Pooling", "type": "x.Pooling"}],
    "preprocessor_config.json": {"auto_map": {"AutoProcessor": "processing_x.X"}, "size": {"height": 2}},
    "params.json": {"dim": 16, "quantization": {}},
}  # fmt: skip
ODD = (None, True, -1, 2**70, 1.5, float("nan"), "", "../x", [], [[1]], {}, {"content": 7})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a JSON document are, itself among them."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    new = inner = copy.deepcopy(document)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return new


@pytest.mark.parametrize("name", FILES)
def test_no_value_of_a_side_file_is_a_bug(tmp_path: Path, name: str) -> None:
    base, instruct, target = triple(tmp_path)
    for folder in (base, instruct, target):
        for other, document in FILES.items():
            (folder / other).write_text(json.dumps(document))
    planned = refused = 0
    role = cycle((target, instruct, base, instruct, target))
    for number, path in enumerate(places(FILES[name])):
        for value in ODD[number % 3 :: 3]:  # all of them at each place take long, and have been tried
            file = next(role) / name
            file.write_text(json.dumps(changed(FILES[name], path, value)))
            try:
                models = {"target": open_checkpoint(target)}
                models |= {"instruct": open_checkpoint(instruct), "base": open_checkpoint(base)}
                plan_apply(models, Rules.of(1))
                del models["target"]
                plan_extract({"base": models["base"], "instruct": models["instruct"]}, Rules.of(0))
                planned += 1
            except CheckpointError:
                refused += 1
            file.write_text(json.dumps(FILES[name]))
    assert planned > (0 if name == "tokenizer.json" else refused)  # whose ids have to be right
