"""Which tensors of the models belong to a tensor of the output: the one place that says so.

What is given as its layout decides, and else the name. A second copy of an embedding has what the embedding has, where
a model holds no tensor of its name; and the head of a model without one is its embedding. A plan keeps what was matched
in the operands of its steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import xxhash

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.planning.layout import Layout, read


class Match(NamedTuple):
    """What the models have for the elements from `first` on of a tensor."""

    first: int
    """Flat index."""
    refs: dict[str, tuple[Ref, ...]]
    """By role, that of the tensor first: tensors, or runs of their elements, that follow each other. What is matched by
    its name alone is as it is, and not yet as it fits."""
    absent: tuple[str, ...]
    """The roles that have nothing."""


class Matcher:
    """Matches tensors of some models. One of the output is made of as many runs as it has matches, in their order."""

    def __init__(self, inputs: Mapping[str, Checkpoint], copies: Mapping[str, str]) -> None:
        """`copies`: second copies of an embedding, and the embedding's name, known by their bytes."""
        self.inputs = inputs
        self.copies = copies
        self.layouts: Mapping[str, Layout] = {}
        """By role, what belongs to tensors that have other names there, or other parts."""

    def original(self, name: str) -> str:
        """The tensor that has the same bytes, where this one is a second copy; else itself."""
        return self.copies.get(name, name)

    def find(self, role: str, ref: Ref, name: str | None = None) -> tuple[Ref, ...]:
        """What of a model belongs to a tensor, or to the one of another `name` of which it is a copy."""
        checkpoint, name = self.inputs[role], ref.name if name is None else name
        runs = self.layouts[role].runs.get(name) if role in self.layouts else None
        if runs is not None:
            return read(runs, ref.shape, checkpoint.tensors) if runs else ()
        own = checkpoint.tensors.get(name)
        if own is not None:
            return (own,)
        original = self.original(name)
        if original != name:
            return self.find(role, ref, original)
        other = names.lookup(checkpoint, name)
        return () if other is None else (other,)

    def of(self, role: str, ref: Ref) -> tuple[Match, ...]:
        """What belongs to `ref`, which is the tensor that gives the output its layout, and whose role this is."""
        found = {other: self.find(other, ref) for other in self.inputs if other != role}
        refs = {other: known for other, known in found.items() if known}
        return (Match(0, {role: (ref,), **refs}, tuple(other for other in found if other not in refs)),)

    def unused(self, role: str, layout: str) -> list[str]:
        """The tensors of a model that belong to none of that which gives the layout."""
        runs, mine = self.layouts[role].runs if role in self.layouts else {}, self.inputs[layout].tensors
        used = {run.name for its in runs.values() for run in its}
        return [n for n in self.inputs[role].tensors if n not in used and (n not in mine or n in runs)]

    def heads(self, role: str, other: str) -> dict[str, list[TensorRef]]:
        """The embedding of a model under the names of heads that only another has, by its own name."""
        mine, theirs = self.inputs[role], self.inputs[other]
        if names.is_tied(theirs):
            return {}
        heads = [name for name in self.unused(other, role) if names.is_head(name) and name not in mine.tensors]
        return {ref.name: [replace(ref, name=head)] for head in heads if (ref := names.lookup(mine, head))}

    def stream(self, name: str) -> int:
        """The stream of random bits: xxh3_64 of the name; the stored head of a tied target rounds as its embedding."""
        target = self.inputs.get("target")
        if target is not None and names.is_head(name) and names.says_tied(target):
            name = getattr(names.embedding(target), "name", name)
        return xxhash.xxh3_64_intdigest(name.encode())
