"""Reading input files by position: opened once, known to be the files that were validated, and never past their end."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import xxhash

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId, TensorRef
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files import interrupts
from ires_kernels.files.opening import open_file
from ires_kernels.files.store import read_into
from ires_kernels.planning.steps import Comparison

MOST_OPEN = 16
"""Files that stay open until they are needed again, with those in use."""
_CHUNK = 1 << 19  # bytes at a time


class Source(Protocol):
    """Bytes that are read by position: those of a file, or of what else has a size and a state that can be told."""

    @property
    def path(self) -> Path:
        """What it is called in errors."""

    def stamp(self) -> FileId:
        """What it is now; as long as this is what it was, so are its bytes."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill the view with the bytes from `offset` on. Raises OSError where there are fewer."""

    def close(self) -> None: ...


class LocalFile:
    """A file that is open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = open_file(path)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def stamp(self) -> FileId:
        return FileId.of(self.fd)

    def read_into(self, view: memoryview, offset: int) -> None:
        read_into(self.fd, view, offset, self.path)

    def close(self) -> None:
        os.close(self.fd)


class Files:
    """Input files, open from their first use to their last; opening makes sure that they are still the same.

    No more than MOST_OPEN stay open beyond those in use: a process may open some thousand files or fewer.
    """

    def __init__(self, file_ids: Mapping[Path, FileId], uses: Iterable[Path]) -> None:
        self._file_ids = file_ids
        self._uses = Counter(uses)
        self._held: Counter[Path] = Counter()
        self._open: dict[Path, LocalFile] = {}

    def open(self, path: Path) -> LocalFile:
        """A source to be used at once: the next call may close it."""
        source = self._open.get(path)
        if source is None:
            if len(self._open) >= MOST_OPEN:
                idle = next((other for other in self._open if not self._held[other]), None)
                if idle is not None:
                    self._open.pop(idle).close()
            source = self._open[path] = LocalFile(path)
            if not source.stamp().is_unwritten(self._file_ids[path]):
                raise CheckpointError(f"{path}: changed after it was validated. Wait for its writer, then start again.")
        return source

    def hold(self, path: Path) -> LocalFile:
        """A source that stays open until `release`."""
        source = self.open(path)
        self._held[path] += 1
        return source

    def release(self, path: Path) -> None:
        """One of the uses is over."""
        self._uses[path] -= 1
        self._held[path] -= min(1, self._held[path])
        if not self._uses[path] and path in self._open:  # of a tensor without elements nothing was read
            self._open.pop(path).close()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


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
    files = Files(file_ids, (ref.path for comparison in comparisons for ref in comparison.inputs))
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


def second_copies(inputs: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Names of tensors that are an embedding again, byte for byte, in all models that have them, and its name."""
    found = names.second_copies(inputs)
    file_ids = all_file_ids(inputs)
    copies = {}
    files = Files(file_ids, (ref.path for models in found.values() for _, *pair in models for ref in pair))
    try:
        for name, models in found.items():
            if all(one.nbytes == two.nbytes and _equal(files, (one, two)) for _, one, two in models):
                copies[name] = models[0][2].name
    finally:
        files.close()
    return copies


def _equal(files: Files, refs: tuple[TensorRef, TensorRef], hashers: Sequence[xxhash.xxh3_128] = ()) -> bool:
    """Whether two tensors of one size have the same bytes. With hashers both are hashed to their end."""
    size = refs[0].nbytes
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
