"""What tells one merge from another: hashes of what determines its output."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import xxhash

from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.sidefiles import SideFile


def made_of(side: SideFile) -> list[Any]:
    """Of a file beside the weights."""
    if side.content is not None:
        return [side.name, side.role, xxhash.xxh3_128_hexdigest(side.content)]
    # Not its place on the disk: a restart may number disks anew, and an interrupted merge must know its own id then.
    return [side.name, side.role, side.file_id.size, side.file_id.mtime_ns]


def identities(checkpoint: Checkpoint) -> list[list[Any]]:
    """Of the files of a model: sizes, times and headers."""
    return [
        [shard.path.name, shard.file_id.size, shard.file_id.mtime_ns, _header_digest(shard.header.tensors.items())]
        for shard in checkpoint.shards
    ]


def digest(table: dict[str, Any]) -> str:
    """xxh3_128, as hex, of a table of JSON types."""
    return xxhash.xxh3_128_hexdigest(json.dumps(table, sort_keys=True, separators=(",", ":")).encode())


def _header_digest(tensors: Iterable[tuple[str, Any]]) -> str:
    table = [[name, info.dtype, info.shape, info.begin] for name, info in tensors]
    return xxhash.xxh3_128_hexdigest(json.dumps(table, separators=(",", ":")).encode())
