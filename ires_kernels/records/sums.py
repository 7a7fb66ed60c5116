"""sha256 sums of weights, as the Hub shows them beside each file: of any model, compared where SHA256SUMS has them."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ires_kernels.checkpoints import hub
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.files.durable import replace_file
from ires_kernels.files.opening import MAX_CONFIG, read_bytes
from ires_kernels.files.plain import plain_lines
from ires_kernels.planning.inputs import StrPath
from ires_kernels.records import provenance
from ires_kernels.streaming.asked import Progress

_LINE = re.compile(r"(?P<sum>[0-9a-f]{64}) [ *](?P<name>.+)")


@dataclass(frozen=True)
class Sums:
    """What `sha256` found; ``print(sums)`` gives the lines that `sha256sum -c` reads. True where nothing differs."""

    path: Path
    sums: dict[str, str]
    """sha256 of each file of weights, by name."""
    recorded: dict[str, str] = field(default_factory=dict)
    """What SHA256SUMS says of them; empty where there is none."""
    unrecorded: list[str] = field(default_factory=list)
    """Those of which SHA256SUMS is there and says nothing that can be read: they were not compared."""

    @property
    def differ(self) -> list[str]:
        """The files whose sum is not the recorded one."""
        return [name for name, found in self.sums.items() if self.recorded.get(name, found) != found]

    @property
    def ok(self) -> bool:
        return not self.differ

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return {"ok": self.ok, **asdict(self), "path": f"{self.path}", "differ": self.differ}

    def __str__(self) -> str:
        return plain_lines(*provenance.sums_file(self.sums).decode(errors="surrogateescape").splitlines())


def sha256(
    path: StrPath,
    *,
    write: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    follow_links: bool = False,
) -> Sums:
    """The sha256 sums of the weights of a model or a residual, compared with SHA256SUMS where that is there.

    >>> report = ik.apply("target/", ("instruct/", "base/"), out="merged/")
    >>> bool(ik.sha256("merged/", write=True))
    True
    >>> list(ik.sha256("merged/").sums)
    ['model.safetensors']

    write  write them into SHA256SUMS, as `sha256` of `apply` does; what is there and differs is an error

    Raises CheckpointError for what is no model, and where `write` would change what is recorded.
    """
    if write:
        hub.check_local(path, "Without --write (write=True) the sums are said all the same.")
    checkpoint = open_checkpoint(hub.local(path), follow_links=follow_links)
    files = {shard.path.name: shard.path for shard in checkpoint.shards}
    place = place_of(checkpoint)
    size = sum(shard.header.file_size for shard in checkpoint.shards)
    tell = None if progress is None else lambda done: progress(done, size)
    known = recorded(place)
    unknown = [name for name in files if name not in known] if place.exists() and not write else []
    found = Sums(checkpoint.path, provenance.sha256(files, threads, tell), known, unknown)
    if write and not found.ok:
        raise CheckpointError(
            f"{place}: has other sums of {', '.join(found.differ)}. If that is right, delete it, and write it anew."
        )
    if write and hub.repo_of(checkpoint.path):
        raise CheckpointError(f"{path}: is in the Hub's cache, which is never written. Leave --write out.")
    if write and not found.sums.keys() <= known.keys():
        others = {name: known[name] for name in known.keys() - files.keys() if (place.parent / name).exists()}
        replace_file(place, provenance.sums_file(found.sums | dict(sorted(others.items()))))
    return found


def place_of(checkpoint: Checkpoint) -> Path:
    """Where the sums of its weights are, if they are anywhere."""
    path = checkpoint.path
    return path / provenance.SUMS if path.is_dir() else path.with_name(f"{path.name}.sha256")


def recorded(path: Path) -> dict[str, str]:
    """The sums in a file that `sha256sum` wrote; of a line that is none, nothing."""
    try:
        lines = read_bytes(path, MAX_CONFIG).decode(errors="surrogateescape").splitlines()
    except FileNotFoundError:
        return {}
    return {match["name"]: match["sum"] for line in lines if (match := _LINE.fullmatch(line))}
