"""Which tensors of the models belong to a tensor of the output: the one place that says so.

By name. A second copy of an embedding has what the embedding has, where a model holds no tensor of its name; and the
head of a model without one is its embedding. A plan keeps what was matched in the operands of its steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import xxhash

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef


class Match(NamedTuple):
    """What the models have for the elements from `first` on of a tensor."""

    first: int
    """Flat index."""
    refs: dict[str, TensorRef]
    """By role, that of the tensor first: tensors, or runs of their elements. As they are named, not yet as they fit."""
    absent: tuple[str, ...]
    """The roles that have nothing."""


class Matcher:
    """Matches tensors of some models. One of the output is made of as many runs as it has matches, in their order."""

    def __init__(self, inputs: Mapping[str, Checkpoint], copies: Mapping[str, str]) -> None:
        """`copies`: second copies of an embedding, and the embedding's name, known by their bytes."""
        self.inputs = inputs
        self.copies = copies

    def original(self, name: str) -> str:
        """The tensor that has the same bytes, where this one is a second copy; else itself."""
        return self.copies.get(name, name)

    def find(self, role: str, name: str) -> TensorRef | None:
        """The tensor of a model that belongs to the one of this name."""
        checkpoint = self.inputs[role]
        return names.lookup(checkpoint, name) or names.lookup(checkpoint, self.original(name))

    def of(self, role: str, ref: TensorRef) -> tuple[Match, ...]:
        """What belongs to `ref`, which is the tensor that gives the output its layout, and whose role this is."""
        found = {other: self.find(other, ref.name) for other in self.inputs if other != role}
        refs = {other: known for other, known in found.items() if known is not None}
        return (Match(0, {role: ref, **refs}, tuple(other for other in found if other not in refs)),)

    def heads(self, role: str, other: str) -> dict[str, list[TensorRef]]:
        """The embedding of a model under the names of heads that only another has, by its own name."""
        mine, theirs = self.inputs[role], self.inputs[other]
        if names.is_tied(theirs):
            return {}
        heads = [name for name in theirs.tensors if names.is_head(name) and name not in mine.tensors]
        return {ref.name: [replace(ref, name=head)] for head in heads if (ref := names.lookup(mine, head))}

    def stream(self, name: str) -> int:
        """The stream of random bits: xxh3_64 of the name; the stored head of a tied target rounds as its embedding."""
        target = self.inputs.get("target")
        if target is not None and names.is_head(name) and names.says_tied(target):
            name = getattr(names.embedding(target), "name", name)
        return xxhash.xxh3_64_intdigest(name.encode())
