"""Giving a module the tensors of a state dict as its own: it may be on the meta device, where it has none."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.header import brief
from ires_kernels.live import sharding
from ires_kernels.live import tensors as held
from ires_kernels.live.peers import Peers
from ires_kernels.planning.box import Box
from ires_kernels.planning.rules import ArgumentError

_ELSE = "Or load the target's files into a model as its library does, and add to that with apply_."


def check(module: nn.Module, metadata: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], head: str = "") -> None:
    """Refuse a module that has other tensors than these: what it lacks, what they lack, and what nobody would fill.

    Tensors that the module has under several names need one of them; `head` is filled as well where it is there. Raises
    ArgumentError.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {type(module).__name__} {brief(module)}, wanted a torch.nn.Module")
    mine = dict(held.named(held.inner(module)))
    filled = {id(tensor) for name, tensor in mine.items() if name in metadata or name == head}
    problems = [f"{brief(name)} is in no file" for name, tensor in mine.items() if id(tensor) not in filled]
    for name, (_, shape) in metadata.items():
        if name not in mine:
            if not names.is_recomputed_name(name):
                problems.append(f"{brief(name)} is not in the module")
        elif tuple(mine[name].shape) != shape:
            problems.append(
                f"{brief(name)} has shape {list(mine[name].shape)} in the module, {list(shape)} in the files"
            )
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ArgumentError(
            f"{type(module).__name__} has other tensors than the target's files: {'; '.join(problems[:10])}{more}. "
            f"Make it by the target's config.json. {_ELSE}"
        )
    empty = [name for name, buffer in module.named_buffers() if buffer.is_meta and id(buffer) not in filled]
    if empty:
        raise ArgumentError(
            f"{brief(empty[0])} is a buffer on the meta device that no file holds. Make the module with its buffers in "
            f"memory, as accelerate.init_empty_weights() does. {_ELSE}"
        )


def boxes(module: nn.Module) -> dict[str, Box]:
    """What this process has of the tensors that several hold, by each of their names."""
    named = held.named(held.inner(module))
    return {name: sharding.box(name, tensor) for name, tensor in named if sharding.is_sharded(tensor)}


def are_apart(module: nn.Module, one: str, other: str) -> bool:
    """Whether a module has two sharded tensors under these names: then they may be cut in different ways."""
    mine = dict(held.named(held.inner(module)))
    return one in mine and mine[one] is not mine[other] and sharding.is_sharded(mine[one])


def assign(module: nn.Module, tensors: Mapping[str, Tensor], peers: Peers) -> dict[str, Tensor]:
    """Make the tensors the module's parameters and buffers, `check`ed before; what is tied stays so.

    What several processes hold is made of the blocks that each of them has. If it has memory it gets their numbers, as
    what shards it knows that memory. Returns what the module has now, by the names of `tensors`.

    Raises ArgumentError where what it has under two names has two values, or another dtype than the block for its
    memory; and PeerError where another process does; all before anything is changed.
    """
    module = held.inner(module)
    given: dict[int, tuple[str, Tensor]] = {}
    places = list(held.placed(module))
    for name, _, _, old in places:
        if name in tensors:
            other, known = given.setdefault(id(old), (name, tensors[name]))
            if known is not tensors[name] and not torch.equal(known, tensors[name]):
                raise ArgumentError(f"{brief(other)} and {brief(name)} are one in the module, and two in the files.")
            if sharding.is_sharded(old) and not old.is_meta and old.dtype != known.dtype:
                raise ArgumentError(
                    f"{brief(name)} is {old.dtype} in the module, and would get {known.dtype}. Make the module with "
                    "the dtype of the files, or on the meta device."
                )
    peers.end()
    made: dict[int, Tensor] = {}  # one for each tensor: what the files have once, the module has once
    for _, part, key, old in places:
        _, new = given[id(old)]
        if sharding.is_sharded(old):
            if not old.is_meta:
                sharding.local(old).copy_(new)
                continue
            new = made.setdefault(id(old), sharding.like(old, new))
        if isinstance(old, nn.Parameter):
            part._parameters[key] = made.setdefault(id(new), nn.Parameter(new, old.requires_grad))  # type: ignore[assignment]
        else:
            part._buffers[key] = new
    return {name: tensor.detach() for name, tensor in held.named(module) if name in tensors}
