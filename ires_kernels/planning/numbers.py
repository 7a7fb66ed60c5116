"""A model as the numbers that it stands for: quantized weights by their own names, without what belongs to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.quantized import QuantizedRef, Ref
from ires_kernels.checkpoints.schemes import quantized
from ires_kernels.planning.quantized import Part, parts


@dataclass(frozen=True)
class Numbers:
    """What planning sees of a checkpoint."""

    model: Checkpoint
    """The checkpoint with its quantized weights as float tensors, among those that are stored as numbers."""
    weights: dict[str, QuantizedRef]
    """The quantized weights that can be decoded, by the name of the tensor that holds their codes."""
    companions: dict[str, QuantizedRef | None]
    """What else is stored of them, by name: scales and so on. None: of what goes in and out of any module."""
    codes: dict[str, Part]
    """What is no number and cannot be decoded."""

    def tensor(self, name: str) -> Ref | None:
        """What the stored tensor `name` stands for: itself, or a weight; None for what belongs to one."""
        if name in self.companions:
            return None
        return self.weights.get(name) or self.model.tensors[name]

    def stored(self) -> Iterator[tuple[str, str]]:
        """The names of all that is stored of the weights, each with the name of its weight."""
        for name, weight in self.weights.items():
            yield name, weight.name
        for name, owner in self.companions.items():
            if owner is not None:
                yield name, owner.name


def numbers(checkpoint: Checkpoint) -> Numbers:
    """What a checkpoint stands for."""
    found = quantized(checkpoint)
    owners = {name: found.weights[weight] for name, weight in found.parts.items() if weight in found.weights}
    weights = {name: owner for name, owner in owners.items() if name == owner.codes.name}
    companions: dict[str, QuantizedRef | None] = {n: owner for n, owner in owners.items() if n not in weights}
    rest = {name: part for name, part in parts(checkpoint).items() if name not in owners}
    for name, weight in found.parts.items():
        if name in rest and weight in found.refused:
            rest[name] = rest[name]._replace(why=f"{rest[name].why}, and not decoded: {found.refused[weight]}")
    if not weights:
        return Numbers(checkpoint, {}, {}, rest)
    companions |= {name: None for name, part in rest.items() if not part.module}
    tensors: dict[str, TensorRef | QuantizedRef] = {}
    for name, ref in checkpoint.tensors.items():
        if name in weights:
            tensors[weights[name].name] = weights[name]
        elif name not in companions:
            tensors[name] = ref
    rest = {name: part for name, part in rest.items() if name not in companions}
    # Planning takes of a tensor what both kinds have; where it lies is the reader's to know.
    return Numbers(replace(checkpoint, tensors=cast(dict[str, TensorRef], tensors)), weights, companions, rest)
