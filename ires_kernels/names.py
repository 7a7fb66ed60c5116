"""What the names of tensors tell: which is the embedding, which the head, and which hold codes and not numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ires_kernels.checkpoint import Checkpoint, TensorRef

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""The dtypes that arithmetic is defined on, by safetensors name, with their width in bytes."""

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embeddings?|embed_in|shared)\.weight$")
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")

# GPTQ and AWQ; compressed-tensors; bitsandbytes of 8 and of 4 bits; MXFP4
_PACKED = re.compile(
    r"(^|\.)(qweight|qzeros|g_idx|weight_packed|SCB|absmax|quant_map|nested_absmax|nested_quant_map)$"
    r"|\.quant_state\.|_blocks$"
)
# With scales beside them 8-bit and narrower tensors are codes: after the whole name, and in place of `weight`.
_SCALES = ("_scale_inv", "_scale", "_scale_2", "_scales", ".absmax")
_SCALES_OF_WEIGHT = ("scale", "scales", "scale_weight", "weight_scale", "weight_scale_inv", "input_scale", "SCB")
_WIDE = {"F64", "F32", "F16", "BF16", "BOOL", "I16", "U16", "I64", "U64", "C64"}


def is_head(name: str) -> bool:
    """Whether this is the output projection of a language model, which some models share with the embedding."""
    return _HEAD.search(name) is not None


def is_vocabulary(name: str) -> bool:
    """Whether the first dimension is the vocabulary's: embeddings and heads."""
    return _HEAD.search(name) is not None or _EMBEDDING.search(name) is not None


def is_adapter(name: str) -> bool:
    """Whether this is a factor of a low-rank adapter (LoRA), whose update is a product of two tensors."""
    return re.search(r"\.lora_(A|B|embedding_A|embedding_B)(\.|$)", name) is not None


def embedding(checkpoint: Checkpoint) -> TensorRef | None:
    """The token embedding, where there is exactly one."""
    found = [ref for name, ref in checkpoint.tensors.items() if _EMBEDDING.search(name)]
    return found[0] if len(found) == 1 else None


def says_tied(checkpoint: Checkpoint) -> bool | None:
    """What config.json says of tie_word_embeddings, for a residual what its two models had; None if nothing."""
    if checkpoint.kind == "residual":
        said = (checkpoint.manifest or {}).get("tied")
    else:
        config = checkpoint.config or {}
        text = config.get("text_config")
        said = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    return said if isinstance(said, bool) else None


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding: config.json says so, or there is no head and it does not deny it."""
    said = says_tied(checkpoint)
    if said is not None or checkpoint.kind == "residual":
        return bool(said)
    return embedding(checkpoint) is not None and not any(map(is_head, checkpoint.tensors))


def lookup(checkpoint: Checkpoint, name: str) -> TensorRef | None:
    """The tensor `name`; for the head of a model that has none of its own the embedding, which loaders use as head."""
    ref = checkpoint.tensors.get(name)
    if ref is None and is_head(name) and is_tied(checkpoint):
        return embedding(checkpoint)
    return ref


def second_copies(inputs: Mapping[str, Checkpoint]) -> dict[str, list[tuple[str, TensorRef, TensorRef]]]:
    """Tensors of the target that may be second copies of its embedding: (role, tensor, embedding) in all that have it.

    Many checkpoints hold a tied embedding under two names. Only their bytes tell.
    """
    target, *sources = inputs.values()
    embeddings = [
        ref
        for name, ref in target.tensors.items()
        if _EMBEDDING.search(name) and all(name in source.tensors for source in sources)
    ]
    found: dict[str, list[tuple[str, TensorRef, TensorRef]]] = {}
    for name, ref in target.tensors.items():
        if is_head(name) and says_tied(target) is False:
            continue
        alike = (each for each in embeddings if (each.dtype, each.shape) == (ref.dtype, ref.shape))
        original = next(alike, ref)
        if original is not ref:
            found[name] = [
                (role, checkpoint.tensors[name], checkpoint.tensors[original.name])
                for role, checkpoint in inputs.items()
                if name in checkpoint.tensors
            ]
    return found


def rows(checkpoint: Checkpoint, name: str) -> int | None:
    """First dimension of a tensor, also of one that a residual does not store but knows; None if unknown."""
    ref = lookup(checkpoint, name)
    if ref is not None:
        return ref.shape[0] if ref.shape else None
    known = (checkpoint.manifest or {}).get("not_stored", {}).get(name, {}) if checkpoint.kind == "residual" else {}
    shape = known.get("shape")
    return shape[0] if shape else None


def codes(checkpoint: Checkpoint, ref: TensorRef) -> str | None:
    """Why the elements of `ref` are codes of a quantized weight, on which arithmetic means nothing; None if numbers."""
    if _PACKED.search(ref.name):
        return "packed quantized weights"
    if ref.dtype in _WIDE:
        return None
    stem = ref.name.removesuffix("weight")
    companions = [ref.name + suffix for suffix in _SCALES]
    if stem != ref.name:
        companions += [stem + suffix for suffix in _SCALES_OF_WEIGHT]
    for name in companions:
        if name in checkpoint.tensors:
            return f"{ref.dtype} codes whose scale is {name}"
    if (checkpoint.config or {}).get("quantization_config"):
        return f"{ref.dtype} codes, by quantization_config in config.json"
    return None
