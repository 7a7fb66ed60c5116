"""The files beside the weights of an output: copied from the inputs and hashed on the way, and for whom they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

import xxhash

from ires_kernels.checkpoints import sidefiles
from ires_kernels.checkpoints.sidefiles import SideFile
from ires_kernels.files.ownership import Access
from ires_kernels.planning.plan import Plan


def access_of(plan: Plan) -> Access:
    """What others may do at most with what a plan makes: no more than with its target, and than read its inputs."""
    paths = {
        role: [*({checkpoint.path} if checkpoint.path.is_dir() else ()), *(shard.path for shard in checkpoint.shards)]
        for role, checkpoint in plan.inputs.items()
    }
    return Access(paths.pop("target", []), chain.from_iterable(paths.values()))


def copied(side: SideFile, access: Access, add: Callable[[str, Iterable[bytes], int], None]) -> dict[str, str]:
    """Give name, bytes and mode of a side file to `add`; returns what the manifest says of it."""
    hasher = xxhash.xxh3_128()
    add(side.name, sidefiles.chunks(side, hasher), access.of(side.source))
    return {"from": side.role, "xxh3_128": hasher.hexdigest()}
