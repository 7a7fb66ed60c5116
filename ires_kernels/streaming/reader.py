"""Comparing tensors of input files byte by byte before anything is merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import xxhash

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId, TensorRef
from ires_kernels.checkpoints.sources import Files, Source
from ires_kernels.files import interrupts
from ires_kernels.planning.steps import Comparison

_CHUNK = 1 << 19  # bytes at a time


def all_file_ids(inputs: Mapping[str, Checkpoint]) -> dict[Path, FileId]:
    """What the files of several checkpoints were when they were validated."""
    return {path: file_id for checkpoint in inputs.values() for path, file_id in checkpoint.file_ids.items()}


def differing(
    comparisons: Iterable[Comparison], file_ids: Mapping[Path, FileId]
) -> tuple[list[Comparison], dict[str, dict[str, str]]]:
    """The comparisons whose two tensors differ in a byte, and xxh3_128 of all of them by role and tensor name."""
    comparisons = list(comparisons)
    different = []
    digests: dict[str, dict[str, str]] = {}
    refs = [ref for comparison in comparisons for ref in comparison.inputs]
    files = Files(file_ids, (ref.path for ref in refs), reads=lambda: map(_whole, refs))
    try:
        for comparison in comparisons:
            hashers = [xxhash.xxh3_128() for _ in comparison.inputs]
            if not _equal(files, comparison.inputs, hashers):
                different.append(comparison)
            for role, ref, hasher in zip(comparison.roles, comparison.inputs, hashers, strict=True):
                digests.setdefault(role, {})[ref.name] = hasher.hexdigest()
                files.release(ref.path)
    finally:
        files.close()
    return different, digests


def second_copies(inputs: Mapping[str, Checkpoint], memory: Mapping[Path, Source] | None = None) -> dict[str, str]:
    """Names of tensors that are an embedding again, byte for byte, in all models that have them, and its name.

    memory  of models that are in no files, by their paths
    """
    if any(model.is_unread for model in inputs.values()):
        return {}
    found = names.second_copies(inputs)
    file_ids = all_file_ids(inputs)
    copies = {}
    refs = [ref for models in found.values() for _, *pair in models for ref in pair]
    # Most differ at their beginning: only where they do not is there something to read ahead.
    begins = Files(file_ids, (), memory)
    files = Files(file_ids, (ref.path for ref in refs), memory, reads=lambda: map(_whole, refs))
    try:
        for name, models in found.items():
            pairs = [(one, two) for _, one, two in models]
            if all(one.nbytes == two.nbytes and _equal(begins, (one, two), size=_CHUNK) for one, two in pairs) and all(
                _equal(files, pair) for pair in pairs
            ):
                copies[name] = models[0][2].name
    finally:
        begins.close()
        files.close()
    return copies


def _whole(ref: TensorRef) -> tuple[Path, int, int]:
    """What is read of a tensor: all of it."""
    return ref.path, ref.offset, ref.nbytes


def _equal(
    files: Files,
    refs: tuple[TensorRef, TensorRef],
    hashers: Sequence[xxhash.xxh3_128] = (),
    size: int | None = None,
) -> bool:
    """Whether two tensors of one size have the same bytes, or begin with the same `size` of them.

    With hashers both are hashed to their end.
    """
    size = min(refs[0].nbytes, size or refs[0].nbytes)
    buffers = [bytearray(min(_CHUNK, size)) for _ in refs]
    equal = True
    for start in range(0, size, _CHUNK):
        interrupts.check()
        views = [memoryview(buffer)[: size - start] for buffer in buffers]
        for ref, view in zip(refs, views, strict=True):
            files.open(ref.path).read_into(view, ref.offset + start)
        for hasher, view in zip(hashers, views, strict=False):
            hasher.update(view)
        equal = equal and buffers[0] == buffers[1]  # what a short last tile leaves behind it was equal before
        if not equal and not hashers:
            break
    return equal
