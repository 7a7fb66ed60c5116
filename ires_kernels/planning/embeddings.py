"""Embeddings and heads of other names and numbers of rows: an embedding is an embedding, whatever it is called."""

from __future__ import annotations

from collections.abc import Mapping

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.quantized import Ref


def partners(mine: Mapping[str, Ref], theirs: Mapping[str, Ref], one: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """What has a row for each token in both models, by name in the first, where each has one of its kind and width.

    `mine` and `theirs` are the tensors of the two that are left: what agrees in name or shape was matched before.
    """
    ours, yours = _kinds(mine, one), _kinds(theirs, other)
    return {
        found[0].name: yours[kind][0].name
        for kind, found in ours.items()
        if len(found) == 1 and len(yours.get(kind, ())) == 1
    }


def _kinds(refs: Mapping[str, Ref], model: Checkpoint) -> dict[tuple[str, tuple[int, ...]], list[Ref]]:
    found: dict[tuple[str, tuple[int, ...]], list[Ref]] = {}
    for name, ref in refs.items():
        if names.is_by_token(ref, model):
            kind = "bias" if name.endswith("bias") else "embedding" if names.is_embedding(name) else "head"
            found.setdefault((kind, ref.shape[1:]), []).append(ref)
    return found
