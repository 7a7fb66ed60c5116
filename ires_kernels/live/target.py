"""What is merged into: the tensors of a module, their bits from before, and the model that these are for planning."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.sources import Source
from ires_kernels.live import parts, sharding
from ires_kernels.live.peers import Peers
from ires_kernels.live.snapshot import Snapshot
from ires_kernels.live.whole import Whole
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Step


class Target:
    """A module's tensors by name, each of which is here as a whole or as a block."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor], peers: Peers) -> None:
        """Raises MemoryError where there is no room for a copy, and ArgumentError for what is no block."""
        self.tensors = tensors
        self.peers = peers
        self.boxes = {name: sharding.box(name, each) for name, each in tensors.items() if sharding.is_sharded(each)}
        name = type(module).__name__
        self.before = Snapshot(f"{name} of rank {peers.rank}" if peers.are_several else name, self.local())
        self.whole = Whole(name, self.before, self.boxes, peers) if peers.are_several else None
        self._source: Snapshot | Whole = self.whole or self.before

    def local(self) -> dict[str, Tensor]:
        """What is here of the tensors, in their own memory."""
        return {name: sharding.local(tensor) for name, tensor in self.tensors.items()}

    @property
    def memory(self) -> dict[Path, Source]:
        """What can be read of it, by path."""
        return {self.before.path: self.before, self._source.path: self._source}

    def checkpoint(self, config: dict[str, Any] | None) -> Checkpoint:
        """All of it as a model."""
        return self._source.checkpoint(config)

    def named(self, text: str) -> str:
        """A text for people, in which it is called by its name."""
        return text.replace(f"{self._source.path}", self._source.path.name)

    def planned(self, plan: Plan) -> None:
        """Wait until all processes have planned, and make sure that they have planned the same."""
        if self.whole is not None:
            self.whole.answer()
        parts.check_same(plan, self.peers)

    def changed(self, plan: Plan) -> list[str]:
        """The names of the tensors of which something changes here."""
        names = dict.fromkeys(step.name for step in plan.steps if not step.is_own)
        return [name for name in names if name not in self.boxes or self.boxes[name].numel]

    def keep(self, plan: Plan, changed: Iterable[str], *, undo: bool, packed: bool) -> None:
        """Have all bits stay that are about to be changed: those that each step reads where it changes them as read.

        Without `undo` only what other steps read, of which some were changed by then. With `packed` what can be packed
        is, tile by tile.
        """
        local = self.local()
        as_read = set() if self.whole is not None else set(changed) - self.boxes.keys() - _moved(plan.steps)
        self.before.keep({name: local[name] for name in changed if name not in as_read})
        if undo:
            self.before.keep_as_read(as_read, packed=packed)

    def steps(self, plan: Plan, names: Container[str]) -> Iterator[list[Step]]:
        """What makes what is here of some tensors, some of it at a time."""
        steps = [step for step in plan.steps if step.name in names]
        if self.whole is None:
            yield steps
        else:
            yield from parts.steps_here(steps, plan, self.boxes, self.before.checkpoint(None).tensors)


def _moved(steps: Iterable[Step]) -> set[str]:
    """The target's tensors of which elements are not read exactly where they are changed, or by others as well."""
    moved = set()
    for step in steps:
        refs = [ref for operand in step.operands if operand.role == "target" for ref in operand.refs]
        starts = accumulate((ref.numel for ref in refs), initial=step.first)
        if not refs or any((ref.tensor, ref.first) != (step.name, at) for ref, at in zip(refs, starts, strict=False)):
            moved |= {step.name, *(ref.tensor for ref in refs)}
    return moved
