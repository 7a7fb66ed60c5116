"""What one of several processes that make a folder together says of its share: at the end, and on the way."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ires_kernels.files.plain import table
from ires_kernels.planning.plan import size
from ires_kernels.planning.workers import Worker


@dataclass(frozen=True)
class WorkerReport:
    """Outcome of `apply` or `extract` in a worker whose output is not finished yet; ``print(report)`` is a table."""

    operation: str
    id: str
    out: Path
    rank: int
    world: int
    seconds: float
    bytes_read: int
    bytes_written: int
    files: int
    """Of the output, that are complete."""
    missing: tuple[str, ...]
    """The others."""

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON types."""
        return {**vars(self), "out": f"{self.out}", "missing": list(self.missing)}

    def __str__(self) -> str:
        speed = (self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9) / 1e9
        rows = [
            ("output", f"{self.out}, not finished yet"),
            ("worker", f"{Worker(self.rank, self.world)}: its share is done"),
            ("read, written", f"{size(self.bytes_read)}, {size(self.bytes_written)}"),
            ("time", f"{self.seconds:.2f} s, {speed:.2f} GB/s"),
            ("complete", f"{self.files} of {self.files + len(self.missing)} files"),
        ]
        last = f"the last worker to end does that, or `ires finish {self.out}`"
        if not self.missing:
            last = f"another worker is doing that; if it does not come to an end, `ires finish {self.out}` does"
        return table([*rows, ("finished", last)])


class Note:
    """How far a worker is, for `status`: anybody may have written it, and nothing follows from it."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.done = self.todo = 0

    @property
    def name(self) -> str:
        return f"{self.worker.rank}-of-{self.worker.world}"

    def to_bytes(self) -> bytes:
        place = {"host": socket.gethostname(), "process": os.getpid(), "at": time.time()}
        return json.dumps({"done": self.done, "todo": self.todo, **place}).encode()


def told(notes: Mapping[str, bytes]) -> tuple[str, ...]:
    """A line for each worker that has said how far it is."""
    lines = []
    for name, raw in sorted(notes.items(), key=lambda each: (len(each[0]), each[0])):
        try:
            note = json.loads(raw)
            done, todo, at = (float(note[key]) for key in ("done", "todo", "at"))
            place = f"{note['host']}, process {int(note['process'])}"
            rank, _, world = name.partition("-of-")
            ago = max(0.0, time.time() - at)
            lines.append(
                f"rank {int(rank)} of {int(world)}: {size(done)} of {size(todo)} read and written, {ago:.0f} s ago, "
                f"by {place}"
            )
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
    return tuple(lines)
