"""What a file beside the weights is, by its name."""

from __future__ import annotations

import re
from typing import Literal

Group = Literal["tokenizer", "template", "generation", "processor", "model"]

TEMPLATES = "additional_chat_templates"
GENERATION, JINJA, SETTINGS = "generation_config.json", "chat_template.jinja", "tokenizer_config.json"
_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt|model)|merges\.txt|tekken\.json"
    r"|(spiece|spm|tiktoken|source|target)\.(model|spm)|sentencepiece.*\.model|.*\.tiktoken|bpe\.codes|vocab\.bpe"
    r"|normalizer\.json|tokenization_.*\.py"
)
_PROCESSOR = re.compile(
    r".*processor_config\.json|(image|video|audio)_processor.*\.json|feature_extractor.*\.json"
    r"|(.*_)?processing_.*\.py|feature_extraction_.*\.py"
)
_NO_VOCABULARY = re.compile(r"tokenizer_config\.json|special_tokens_map\.json|(added_tokens|normalizer)\.json|.*\.py")
"""Files of a tokenizer that has no tokens without one of the others."""
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|npz|index\.json)")
OURS = {"ires.json", "residual.json", "SHA256SUMS", "README.ires.md", "README.ires.png"}
ADAPTER = "adapter_config.json"
"""Loaders that find it look for the adapter, which is no part of a merged model."""


def group_of(name: str) -> Group:
    """What it belongs to; to the model itself if nothing is known of it."""
    if name.startswith(("chat_template.", f"{TEMPLATES}/")):
        return "template"
    if name == GENERATION:
        return "generation"
    if "/" in name:
        return "model"
    return "tokenizer" if _TOKENIZER.fullmatch(name) else "processor" if _PROCESSOR.fullmatch(name) else "model"


def is_weights(name: str) -> bool:
    """Whether a file is of weights, by its name."""
    return _WEIGHTS.fullmatch(name) is not None


def has_tokens(name: str) -> bool:
    """Whether it is that file of a tokenizer which holds the tokens, or one of several."""
    return group_of(name) == "tokenizer" and not _NO_VOCABULARY.fullmatch(name)


def names_others(name: str) -> bool:
    """Whether it is code or settings, in which other files may be named."""
    return name.endswith(".py") or (name.endswith(".json") and (group_of(name) == "model" or is_settings(name)))


def is_settings(name: str) -> bool:
    """Whether it is settings of a tokenizer, a processor or of generation."""
    return _NO_VOCABULARY.fullmatch(name) is not None or group_of(name) in ("processor", "generation")
