"""A checkpoint as its headers tell of it: files, tensors with dtype, shape, file and offset, settings."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ires_kernels.checkpoints import standins
from ires_kernels.checkpoints.folders import SHARD_NAME
from ires_kernels.checkpoints.header import Header
from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.dtypes import STORAGE

Kind = Literal["model", "residual", "adapter"]
_FACTOR = re.compile(
    r"(^|[._])(lora_(A|B|embedding_A|embedding_B|magnitude_vector|down|up|mid)|ia3_l|vera_lambda_[bd]|randlora_lambda"
    r"|hada_[wt]\d(_[ab])?|lokr_[wt]\d(_[ab])?|oft_[rR]|boft_[Rs]|prompt_embeddings)(\.|$)"
)


class FileId(NamedTuple):
    """What tells that a file is still the one that was looked at."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int
    """Nobody can set it; but a new name, a hard link or another mode sets it as well as a write."""

    @classmethod
    def of(cls, file: Path | int | os.stat_result) -> FileId:
        """The identity of a path now, links followed, of an open file, or by its status. Raises OSError."""
        status = file if isinstance(file, os.stat_result) else os.stat(file)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @classmethod
    def far(cls, size: int, tag: int) -> FileId:
        """That of a file that is elsewhere, where a number stands for what it is."""
        return cls(0, 0, size, tag, tag)

    def is_unwritten(self, since: FileId) -> bool:
        """Whether it is the file that it was, and nobody wrote it who did not set its time back."""
        return self[:4] == since[:4]

    def stamp(self) -> dict[str, int]:
        """All of it in JSON types."""
        return self._asdict()


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of a checkpoint."""

    path: Path
    header: Header
    file_id: FileId


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies: `nbytes` bytes from the absolute `offset` in the file `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    whole: str = ""
    """Of a run of elements, the name of the tensor that has them."""
    first: int = 0
    """And the flat index of the first one there."""

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def tensor(self) -> str:
        """The name of the tensor that it is, or that it is a run of."""
        return self.whole or self.name

    def run(self, first: int, count: int) -> TensorRef:
        """Its elements from the flat index `first` on, under a name that says which; itself where it is all of them.

        Raises ValueError for elements that it does not have, or that do not fill whole bytes.
        """
        bits, numel = STORAGE[self.dtype].bits, self.numel
        stop = first + count
        if not 0 <= first < stop <= numel or first * bits % 8 or count * bits % 8:
            raise ValueError(f"{self.name!r} has {numel} {self.dtype} elements, and no run [{first}:{stop}]")
        if count == numel:
            return self
        place, size = self.offset + first * bits // 8, count * bits // 8
        tensor, first = self.tensor, self.first + first
        name = f"{tensor}[{first}:{first + count}]"
        return TensorRef(name, self.dtype, (count,), self.path, place, size, tensor, first)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A validated checkpoint; see `open_checkpoint`. It is the same as itself only, so it can be a key."""

    path: Path
    """The folder, or the single file."""
    kind: Kind
    shards: tuple[Shard, ...]
    """By file name."""
    tensors: dict[str, TensorRef]
    """By name, in the order of shards and data."""
    index_name: str | None
    """Name of the index file, None for a single file."""
    index_metadata: dict[str, Any]
    """``metadata`` of the index as it stands; its total_size is wrong in many published models and not checked."""
    config: dict[str, Any] | None
    """config.json of the folder."""
    manifest: Manifest | None
    """residual.json of a residual, ires.json of a merged model, NAME.ires.json of a file that was updated in place."""
    follow_links: bool = False
    """Whether files of the folder may be links out of it."""
    blocks: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """What the settings of the model say of quantized weights, by where they say so."""
    beside: tuple[str, ...] = ()
    """Other .safetensors files of the folder, which are not read."""
    is_unread: bool = False
    """Whether only headers of it may be read, and no values: they are elsewhere, and nothing is made of them yet."""
    elsewhere: frozenset[str] = frozenset()
    """Of one shard given alone, the names of the tensors in the others, as far as the index beside it knows."""

    @property
    def quantization(self) -> str:
        """Which settings say that the weights are quantized; "" where none do."""
        return next(iter(self.blocks), "")

    @property
    def file_ids(self) -> dict[Path, FileId]:
        """What its files were when they were validated."""
        return {shard.path: shard.file_id for shard in self.shards}

    def changed(
        self, current: Mapping[Path, FileId] | None = None, only: Container[Path] | None = None
    ) -> tuple[list[Path], list[Path]]:
        """The shards that are no longer the files that were validated, or those that `current` says they were.

        And those of which only the time of the last change of their status is another one, by a write or by something
        else. Of the shards `only`, or of all. Raises OSError for one that is elsewhere and has changed, or cannot be
        asked.
        """
        known = self.file_ids if current is None else current
        paths = [path for path in self.file_ids if only is None or path in only]
        standins.check(paths)
        now = {path: _file_id_now(path) for path in paths}
        written = [path for path, file_id in now.items() if not (file_id and file_id.is_unwritten(known[path]))]
        return written, [path for path, file_id in now.items() if path not in written and file_id != known[path]]


def is_shard(path: Path) -> bool:
    """Whether a file is one of the shards of a model, by its name."""
    return SHARD_NAME.fullmatch(path.name) is not None


def is_factor(name: str) -> bool:
    """Whether this is a tensor of an adapter (LoRA and its kin), which is no weight but makes one with others."""
    return _FACTOR.search(name) is not None


def shard_number(path: Path) -> tuple[int, int] | None:
    """Which of how many shards a file is, by its name; None for what is no shard."""
    found = re.search(r"-(\d+)-of-(\d+)\.safetensors$", path.name)
    return (int(found[1]), int(found[2])) if found else None


def file_id_of(path: Path) -> FileId | None:
    try:
        return FileId.of(path)
    except OSError:
        return None


def _file_id_now(path: Path) -> FileId | None:
    """As it is by now, also of a file that is elsewhere, and was asked for."""
    far = standins.far(path)
    return file_id_of(path) if far is None else FileId.far(far.size, far.tag)
