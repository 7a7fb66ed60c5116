"""Fields of config.json that change what weights mean, and differ, are named; other spellings of the same are not."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from small_models import triple

import ires_kernels as ik
from ires_kernels.checkpoints import configs
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.extraction import plan_extract
from ires_kernels.planning.rules import Rules

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "hidden_size": 16,
    "num_attention_heads": 4, "num_hidden_layers": 2, "torch_dtype": "bfloat16", "layer_norm_eps": 1e-6,
}  # fmt: skip


def said(folder: Path, **changes: dict[str, Any]) -> list[str]:
    """Warnings of a merge in one pass, with changed fields in some of the models."""
    inputs = {}
    for role in ("target", "instruct", "base"):
        text = json.dumps(CONFIG | changes.get(role, {}))
        (folder / role / "config.json").write_text(text)
        inputs[role] = open_checkpoint(folder / role)
    return list(plan_apply(inputs, Rules.of(1)).warnings)


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        ({"rope_theta": 1e6}, {"rope_theta": 5e6}, "rope_theta is 1000000.0 in target and base, 5000000.0 in instruct"),
        ({}, {"rope_theta": 5e6}, "rope_theta is absent in target and base, 5000000.0 in instruct"),
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, "rope_theta"),
        ({}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.factor is absent"),
        ({"rms_norm_eps": 1e-6}, {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-06 in target and base, 1e-05 in instruct"),
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, "hidden_act is 'silu'"),
        ({"num_key_value_heads": 2}, {"num_key_value_heads": 1}, "num_key_value_heads is 2"),
        ({}, {"num_key_value_heads": 2}, "num_key_value_heads is absent"),
        ({}, {"num_attention_heads": 8}, "num_attention_heads is 4"),
        ({"head_dim": 8}, {"head_dim": 16}, "head_dim is 8"),
        ({"sliding_window": 4096}, {"sliding_window": None}, "sliding_window is 4096 in target and base, absent"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            {"layer_types": ["sliding_attention", "full_attention"]},
            "layer_types is ['full_attention', 'sliding_attention'] in target and base",
        ),
        ({"rotary_emb_base": 10000}, {"rope_theta": 20000}, "rope_theta is 10000"),
        (
            {"rope_scaling": {"rope_type": "dynamic"}, "max_position_embeddings": 10},
            {"rope_scaling": {"rope_type": "dynamic"}, "max_position_embeddings": 20},
            "rope_scaling.max_position_embeddings is 10",
        ),
        ({}, {"tie_word_embeddings": True}, "tie_word_embeddings is False"),
        ({"embedding_multiplier": 12}, {"embedding_multiplier": 6}, "embedding_multiplier is 12"),
        ({"logits_scaling": 8}, {"logits_scaling": 16}, "logits_scaling is 8"),
        ({"query_pre_attn_scalar": 256}, {"query_pre_attn_scalar": 224}, "query_pre_attn_scalar is 256"),
        ({"final_logit_softcapping": 30.0}, {"final_logit_softcapping": None}, "final_logit_softcapping is 30.0"),
        ({}, {"model_type": "mistral"}, "model_type is 'llama' in target and base, 'mistral' in instruct"),
        ({}, {"architectures": ["MistralForCausalLM"]}, "architectures is ['Llama']"),
        ({"num_experts_per_tok": 2}, {"num_experts_per_tok": 4}, "num_experts_per_tok is 2"),
        ({"something_new": 1}, {"something_new": 2}, "something_new is 1"),
        ({"text_config": {"rope_theta": 1e6}}, {"text_config": {"rope_theta": 5e6}}, "rope_theta is 1000000.0"),
        (
            {"vision_config": {"hidden_act": "gelu"}},
            {"vision_config": {"hidden_act": "quick_gelu"}},
            "vision_config.hidden_act is 'gelu'",
        ),
        (
            {"rope_local_base_freq": 10000, "rope_theta": 1e6},
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 2e4}}},
            "sliding_attention.rope_theta is 10000 in target and base, 20000.0 in instruct",
        ),
    ],
)
def test_fields_that_differ_are_named(tmp_path: Path, one: Any, other: Any, text: str) -> None:
    base, instruct, target = triple(tmp_path)
    (warning,) = said(tmp_path, base=one, instruct=other, target=one)
    assert text in warning
    assert warning.endswith("The output has the target's values")
    (extracted,) = plan_extract(
        {"base": open_checkpoint(base), "instruct": open_checkpoint(instruct)}, Rules.of(0)
    ).warnings
    assert text.split(" is ")[0] in extracted
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    inputs = {"target": open_checkpoint(target), "residual": open_checkpoint(tmp_path / "residual")}
    (by_residual,) = plan_apply(inputs, Rules.of(1)).warnings
    assert "in instruct of residual" in by_residual
    with pytest.warns(UserWarning, match="what the weights mean"):
        ik.load(target, (instruct, base))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rope_scaling": None}, {}),
        ({"rope_theta": 10000.0}, {}),
        ({"rope_theta": 10000}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4}},
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}},
        ),
        (
            {"rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2}},
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2}},
        ),
        ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        (
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8}},
            {"rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }},
        ),
        ({"torch_dtype": "float16"}, {"dtype": "bfloat16"}),
        ({"transformers_version": "4.40"}, {"transformers_version": "5.0", "use_cache": True, "resid_pdrop": 0.1}),
        ({"eos_token_id": 1, "vocab_size": 40}, {"pad_token_id": 2, "vocab_size": 41, "image_token_id": 3}),
        ({"max_position_embeddings": 4096}, {"max_position_embeddings": 32768}),
        ({"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}, {"sliding_window": None}),
        ({"head_dim": 4, "num_key_value_heads": 4}, {}),
        ({"layer_types": ["full_attention", "full_attention"]}, {}),
        ({"architectures": ["LlamaModel"]}, {"architectures": ["LlamaForSequenceClassification"]}),
        ({"attention_bias": False, "mlp_bias": False, "residual_multiplier": 1.0}, {}),
        ({"id2label": {"0": "a"}}, {"id2label": {"0": "b"}}),
        ({"quantization_config": {"bits": 4}}, {"_name_or_path": "x", "auto_map": {"AutoModel": "a--b.C"}}),
        ({"text_config": {"rope_theta": 1e6}}, {"rope_theta": 1e6}),
        ({"odd": float("nan"), "far": float("inf")}, {"odd": float("nan"), "far": float("inf")}),
        ({"time_step_limit": [0.0, float("inf")]}, {"time_step_limit": [0.0, {"__float__": "Infinity"}]}),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, {"hidden_act": "gelu_pytorch_tanh"}),
        (
            {"rms_norm_eps": 1e-5, "no_rope_layers": []},
            {"rms_norm_eps": 1e-5, "no_rope_layers": [1, 1, 1, 0, 1], "no_rope_layer_interval": 4},
        ),
        (
            {"rms_norm_eps": 1e-5, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
            {"rms_norm_eps": 1e-5, "rope_scaling": {"type": "default", "rope_type": "default",
                                                    "mrope_section": [2, 3, 3]}},
        ),
        (
            {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 64, "rope_scaling": {"type": "longrope"}},
            {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 64,
             "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64}},
        ),
        ({"only_here": 7}, {}),
        ({"layer_types": ["sliding_attention", "full_attention"]}, {"sliding_window_pattern": 2}),
        ({"rotary_emb_base": 20000, "rotary_pct": 0.25}, {"rope_theta": 20000, "partial_rotary_factor": 0.25}),
        ({"vision_config": {"depth": 2, "hidden_act": "gelu"}}, {"vision_config": {"depth": 2}}),
    ],
)  # fmt: skip
def test_other_spellings_are_the_same(tmp_path: Path, one: Any, other: Any) -> None:
    base, instruct, target = triple(tmp_path)
    assert said(tmp_path, base=one, instruct=other, target=one) == []
    assert said(tmp_path, base=other, instruct=one, target=other) == []
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    inputs = {"target": open_checkpoint(target), "residual": open_checkpoint(tmp_path / "residual")}
    assert not plan_apply(inputs, Rules.of(1)).warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ik.load(target, (instruct, base))


def test_many_fields_are_cut(tmp_path: Path) -> None:
    triple(tmp_path)
    (warning,) = said(
        tmp_path, target={f"scale_{i}": i + 2 for i in range(15)}, base={f"scale_{i}": i for i in range(15)}
    )
    assert warning.count("scale_") == 10
    assert "and 5 more" in warning


def test_models_without_config_and_old_residuals_say_nothing(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    assert configs.differences({"target": open_checkpoint(target / "model.safetensors")}) == []
    (instruct / "config.json").unlink()
    inputs = {"target": target, "instruct": instruct, "base": base}
    opened = {role: open_checkpoint(path) for role, path in inputs.items()}
    assert configs.differences(opened) == []
    assert configs.fields(None) == {}
    assert configs.special_ids(None) == {}
    assert configs.special_ids({"eos_token_id": float("nan"), "bos_token_id": [], "pad_token_id": True}) == {}


COMMON = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
WRITTEN = {
    "llama": {
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131072,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "qwen2": {
        "num_key_value_heads": 2, "rope_theta": 1e6, "sliding_window": 131072, "use_sliding_window": False,
        "max_window_layers": 28, "use_mrope": False,
    },
    "gemma2": {
        "num_key_value_heads": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 224, "sliding_window": 4096,
        "cache_implementation": "hybrid", "rope_theta": 10000.0,
    },
    "gemma3_text": {
        "num_key_value_heads": 2, "attn_logit_softcapping": None, "head_dim": 32, "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}} | COMMON,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 64, "vision_use_head": False},
    },
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True},
    "deepseek_v3": {
        "num_key_value_heads": 4, "rope_theta": 10000, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    },
}  # fmt: skip
"""config.json as versions 4 of transformers wrote them."""


@pytest.mark.parametrize("family", WRITTEN)
@pytest.mark.filterwarnings("ignore")
def test_what_another_version_of_transformers_wrote_means_the_same(tmp_path: Path, family: str) -> None:
    import transformers

    fields = WRITTEN[family] if family == "gemma3" else COMMON | WRITTEN[family]
    old = {"model_type": family, "architectures": [f"{family}ForCausalLM"]} | fields
    new = json.loads(transformers.AutoConfig.for_model(**json.loads(json.dumps(old))).to_json_string())
    _, instruct, target = triple(tmp_path)
    for folder, config in ((instruct, new), (target, old)):
        (folder / "config.json").write_text(json.dumps(config))
    inputs = {"target": open_checkpoint(target), "instruct": open_checkpoint(instruct)}
    assert configs.differences(inputs) == []
    assert len(configs.fields(old)) > 3


def test_a_number_that_no_float_holds(tmp_path: Path) -> None:
    triple(tmp_path)
    assert said(tmp_path, target={"hidden_size": 10**400, "num_attention_heads": 2, "head_dim": 8})
