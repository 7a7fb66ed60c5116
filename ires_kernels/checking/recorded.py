"""What a manifest says of the weights beside it, compared with them: their tensors, headers and hashes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import xxhash

from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.manifest import Manifest, Tensor
from ires_kernels.files.opening import open_file, read_start
from ires_kernels.files.samples import sample
from ires_kernels.records import sums
from ires_kernels.records.operation import MAPPED
from ires_kernels.streaming import stream
from ires_kernels.streaming.asked import Progress


def other_names(out: Checkpoint, recorded: Mapping[str, Tensor]) -> list[str]:
    """The tensors that are not in the manifest, or are not what it says, or are gone; each in words."""
    found = []
    for name, ref in out.tensors.items():
        entry = recorded.get(name)
        if entry is None:
            found.append(f"{name} of {ref.path.name} is not in the manifest")
        elif (entry.dtype, entry.shape) != (ref.dtype, ref.shape):
            wanted = f"{entry.dtype} {list(entry.shape)}"
            found.append(f"{name} is {ref.dtype} {list(ref.shape)}, wanted {wanted}")
    return found + [f"{name} is gone" for name in recorded if name not in out.tensors]


def other_headers(out: Checkpoint, recorded: Mapping[str, str]) -> list[str]:
    """The files whose headers are not those of which the manifest has the hash."""
    found = []
    for shard in out.shards:
        fd = open_file(shard.path)
        try:
            digest = xxhash.xxh3_128_hexdigest(read_start(fd, shard.header.data_start, shard.path))
        finally:
            os.close(fd)
        if recorded.get(shard.path.name, digest) != digest:
            found.append(f"{shard.path.name} has another header than the manifest says")
    return found


def other_hashes(
    out: Checkpoint,
    refs: Iterable[TensorRef],
    recorded: Mapping[str, Tensor],
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """The tensors, of these, whose bytes have another hash than the manifest says."""
    by_name = {ref.name: ref for ref in refs}
    hashes = stream.hashes(by_name, out.file_ids, threads=threads, progress=progress)
    return [
        f"{name} has another hash than the manifest says"
        for name, digest in hashes.items()
        if recorded[name].xxh3_128 != digest
    ]


def check_weights(
    out: Checkpoint, table: Manifest, threads: int | None = None, progress: Progress | None = None
) -> None:
    """Refuse with CheckpointError weights that are not what the merge has left, or have other sums in SHA256SUMS.

    Every byte is read, but for tensors that an update in place has left unseen: of their files there is a sample. Of
    what was written through `mapped` nobody knows what it was.
    """
    if table.operation == MAPPED:
        return
    known = {name for name, entry in table.tensors.items() if entry.xxh3_128 is not None}
    found = other_names(out, table.tensors) or other_headers(out, table.headers)
    if not found:
        found = other_hashes(out, [out.tensors[name] for name in known], table.tensors, threads, progress)
    if not found and table.in_place and len(known) < len(table.tensors):
        stamps = table.in_place.files
        found = [
            f"{shard.path.name} has other bytes than the manifest says"
            for shard in out.shards
            if (stamp := stamps.get(shard.path.name)) and stamp.sample not in ("", sample(shard.path, table.id))
        ]
    if found:
        more = [f"  and {len(found) - 10} more"] if len(found) > 10 else []
        raise CheckpointError(
            f"{out.path}: is not what its merge has left:",
            *(f"  {line}" for line in found[:10]),
            *more,
            _advice(out, table),
        )
    said = sums.recorded(sums.place_of(out))
    wrong = [name for name, digest in table.sha256.items() if said.get(name, digest) != digest]
    if wrong:
        raise CheckpointError(
            f"{sums.place_of(out)}: has other sums of {', '.join(wrong)} than {table.path.name}, whose hashes the "
            "weights have. Delete it, and write it anew with `ires sha256 --write`."
        )


def _advice(out: Checkpoint, table: Manifest) -> str:
    """What to do about damage."""
    if out.kind == "residual":
        return "Put the right copy back, or extract it again."
    again = "" if table.in_place else f", or make it again with `ires merge {table.path} -o NEW`"
    return (
        f"Put the right copy back{again}. If it was changed on purpose, {table.path.name} is no longer true: delete it."
    )
