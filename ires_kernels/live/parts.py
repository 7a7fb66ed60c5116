"""What each of the processes that hold a module does of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import xxhash

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.live.peers import PeerError, Peers
from ires_kernels.planning.box import Box
from ires_kernels.planning.boxes import within
from ires_kernels.planning.dealing import dealt
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Step

_RUNS = 1 << 18
"""Runs of elements at a time. A block of some columns has one for each of its rows, and each takes some 300 bytes."""


def check_same(plan: Plan, peers: Peers) -> None:
    """Make sure that all processes have one plan. Raises PeerError."""
    if peers.are_several:
        steps = [(s.label, s.dtype, s.op, s.factors, [(o.role, o.key) for o in s.operands]) for s in plan.steps]
        digest = xxhash.xxh3_128_hexdigest(f"{plan.rules.to_dict()} {steps}".encode())
        others = [rank for rank, its in peers.exchange("the plan", digest).items() if its != digest]
        if others:
            raise PeerError(
                f"rank {others[0]} was called with other arguments than rank {peers.rank}, or finds other files: "
                "nothing was changed. Call it alike in all processes."
            )


def steps_here(
    steps: Iterable[Step], plan: Plan, boxes: Mapping[str, Box], memory: Mapping[str, TensorRef] | None = None
) -> Iterator[list[Step]]:
    """What makes the blocks of this process, of whole tensors' steps: so much at a time that it takes little memory.

    memory  where the target's blocks are, as far as they are changed in place
    """
    batch: list[Step] = []
    runs = 0
    for made in within(steps, boxes, memory, numbered=plan.rules.rounding == "stochastic"):
        more = sum(len(operand.refs) for step in made for operand in step.operands)
        if batch and runs + more > _RUNS:
            yield batch
            batch, runs = [], 0
        batch, runs = batch + made, runs + more
    if batch:
        yield batch


def to_check(plan: Plan, peers: Peers) -> set[tuple[str, str]] | None:
    """Of the residuals' tensors, by role and name, those whose digests this process takes; None: all of them.

    Who has read a part of a tensor cannot know its digest. So each reads some tensors as a whole, and all see to it
    together that no residual is damaged.
    """
    if not peers.are_several:
        return None
    residuals = [role for role, checkpoint in plan.inputs.items() if checkpoint.kind == "residual"]
    names = [(role, name) for role in residuals for o in plan.reads(role).values() for name in o.tensors]
    names = sorted(set(names))
    weights = [plan.inputs[role].tensors[name].nbytes for role, name in names]
    return {names[index] for index in dealt(weights, len(peers.ranks))[peers.ranks.index(peers.rank)]}
