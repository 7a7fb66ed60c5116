"""What the names of tensors tell: which is the embedding, which the head, and which hold codes and not numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import TypeVar
from weakref import WeakKeyDictionary

from ires_kernels.checkpoints import roles
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.dtypes import FLOATS

_T = TypeVar("_T")

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embeddings?|embed_in|shared)\.weight$")
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_TOKENS = re.compile(r"(^|\.)(embed_tokens|embed_tokens_per_layer|wte|word_embeddings|tok_embeddings|lm_head)\.weight$")
_OTHER_ROWS = re.compile(
    r"(^|\.)((embed_out|output|output_layer|head|decoder|predictions\.decoder)\.weight"
    r"|(lm_head|embed_out|output|output_layer|head|decoder|predictions)\.bias)$"
)

# What models hold and their loaders compute again or pass over, with what it must look like to be that.
_RECOMPUTED = (
    (re.compile(r"(^|\.)rotary_(pos_)?emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$"), "float"),
    (re.compile(r"(^|\.)(position_ids|relative_position_index|num_batches_tracked)$"), "integer"),
    (re.compile(r"\.(attn|attention|self_attention|crossattention)\.(bias|causal_mask)$"), "square"),
    (re.compile(r"\.(attn|attention|self_attention|crossattention)\.masked_bias$"), "scalar"),
    (re.compile(r"(encoder|decoder)\.version$"), "scalar"),
    (re.compile(r"\._extra_state$"), "bytes"),
    (re.compile(r"(^|\.)decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$"), "float"),
)


def is_head(name: str) -> bool:
    """Whether this is the output projection of a language model, which some models share with the embedding."""
    return _HEAD.search(name) is not None


def is_embedding(name: str) -> bool:
    """Whether this is an embedding of tokens, by its name."""
    return _EMBEDDING.search(name) is not None


def is_vocabulary(name: str) -> bool:
    """Whether the first dimension is the vocabulary's: embeddings and heads."""
    return _HEAD.search(name) is not None or _EMBEDDING.search(name) is not None


def is_by_token(ref: Ref, checkpoint: Checkpoint) -> bool:
    """Whether this tensor of a model has a row for each token: an embedding, a head, or the bias of one.

    Some names have other meanings as well, and count where there are as many rows as config.json says, or as in an
    embedding.
    """
    if not ref.shape or not ref.numel:
        return False
    if _TOKENS.search(ref.name):
        return True
    if is_vocabulary(ref.name):
        said = _vocabulary_sizes(checkpoint)
        return not said or ref.shape[0] in said
    return _OTHER_ROWS.search(ref.name) is not None and ref.shape[0] in _rows(checkpoint)


def is_recomputed(ref: Ref) -> bool:
    """Whether this is a buffer that loaders compute again or pass over: frequencies, positions, causal masks.

    A name alone is not enough: GPT-2 has its causal mask as ``attn.bias``, where other models have a trained bias.
    """
    looks = next((looks for pattern, looks in _RECOMPUTED if pattern.search(ref.name)), None)
    return {
        None: False,
        "float": ref.dtype in FLOATS,
        "integer": ref.dtype in ("I64", "I32", "U8", "I16"),
        "square": len(ref.shape) == 4 and ref.shape[:2] == (1, 1) and ref.shape[2] == ref.shape[3],
        "scalar": ref.numel <= 3,
        "bytes": ref.dtype == "U8",
    }[looks]


def is_recomputed_name(name: str) -> bool:
    """Whether this is the name of such a buffer, as far as a name can tell."""
    return any(pattern.search(name) for pattern, _ in _RECOMPUTED)


def empty(checkpoint: Checkpoint, models: Iterable[Checkpoint] = ()) -> list[TensorRef]:
    """Tensors without elements that should have some: by their name, as their like have in the model, or in others."""
    without = [ref for ref in checkpoint.tensors.values() if not ref.numel]
    if not without:
        return []
    full = {pattern(ref.name) for model in (checkpoint, *models) for ref in model.tensors.values() if ref.numel}
    return [ref for ref in without if ref.name.endswith(("weight", "bias")) or pattern(ref.name) in full]


def pattern(text: str) -> str:
    """A name, or words with names in them, with ``*`` for every number between dots: what names of one kind share."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", text)


def once(ask: Callable[[Checkpoint], _T]) -> Callable[[Checkpoint], _T]:
    """Ask once for each checkpoint, which never changes: the answer takes a look at all of its tensors."""
    known: WeakKeyDictionary[Checkpoint, _T] = WeakKeyDictionary()

    @wraps(ask)
    def answer(checkpoint: Checkpoint) -> _T:
        if checkpoint not in known:
            known[checkpoint] = ask(checkpoint)
        return known[checkpoint]

    return answer


@once
def _vocabulary_sizes(checkpoint: Checkpoint) -> frozenset[int]:
    """What config.json calls a vocabulary's size, of the model or a part of it."""
    config = checkpoint.config or {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return frozenset(part["vocab_size"] for part in parts if type(part.get("vocab_size")) is int)


@once
def _rows(checkpoint: Checkpoint) -> frozenset[int]:
    """The rows of its embeddings."""
    return frozenset(ref.shape[0] for name, ref in checkpoint.tensors.items() if _EMBEDDING.search(name) and ref.shape)


@once
def embedding(checkpoint: Checkpoint) -> TensorRef | None:
    """The token embedding, where there is exactly one."""
    found = [ref for name, ref in checkpoint.tensors.items() if _EMBEDDING.search(name)]
    return found[0] if len(found) == 1 else None


def says_tied(checkpoint: Checkpoint) -> bool | None:
    """What config.json says of tie_word_embeddings, for a residual what its two models had; None if nothing."""
    if checkpoint.kind == "residual":
        said = checkpoint.manifest.tied if checkpoint.manifest else None
    else:
        config = checkpoint.config or {}
        text = config.get("text_config")
        said = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    return said if isinstance(said, bool) else None


@once
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
    """Tensors that may be second copies of an embedding: (role, tensor, embedding) in all models that have it.

    Many checkpoints hold a tied embedding under two names, and BERT and its kin a bias of the vocabulary as well; some
    of the models of a merge hold it twice and others once. Only their bytes tell. The target decides what is whose
    copy, or where there is none the first instruct model; residuals alone have none.
    """
    layout = inputs.get("target") or next((inputs[role] for role in inputs if roles.is_instruct(role)), None)
    if layout is None:
        return {}
    sources = [checkpoint for checkpoint in inputs.values() if checkpoint is not layout]
    everywhere = {n: ref for n, ref in layout.tensors.items() if all(n in source.tensors for source in sources)}
    originals: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, ref in everywhere.items():
        if _EMBEDDING.search(name):
            originals.setdefault((ref.dtype, ref.shape), name)
    rows = {shape[0] for _, shape in originals if shape}
    for name, ref in everywhere.items():
        if name.endswith("bias") and len(ref.shape) == 1 and ref.shape[0] in rows:
            originals.setdefault((ref.dtype, ref.shape), name)
    found: dict[str, list[tuple[str, TensorRef, TensorRef]]] = {}
    for holder in (layout, *sources):
        alike: dict[tuple[str, tuple[int, ...]], str] = {}
        for name in originals.values():  # a model may have another dtype
            alike.setdefault((holder.tensors[name].dtype, holder.tensors[name].shape), name)
        for name, ref in holder.tensors.items():
            if name in found or (holder is not layout and name in layout.tensors):
                continue
            if is_head(name) and says_tied(layout) is False:
                continue
            original = alike.get((ref.dtype, ref.shape), name)
            if original != name:
                found[name] = [
                    (role, checkpoint.tensors[name], checkpoint.tensors[original])
                    for role, checkpoint in inputs.items()
                    if name in checkpoint.tensors
                ]
    return found


def rows(checkpoint: Checkpoint, name: str) -> int | None:
    """First dimension of a tensor, also of one that a residual does not store but knows; None if unknown."""
    ref = lookup(checkpoint, name)
    if ref is not None:
        return ref.shape[0] if ref.shape else None
    known = checkpoint.manifest.not_stored.get(name) if checkpoint.kind == "residual" and checkpoint.manifest else None
    return known.shape[0] if known and known.shape else None
