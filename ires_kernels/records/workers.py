"""What one of several processes that make a folder together says of its share: at the end, and on the way."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ires_kernels.files.plain import size, table
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


def note(done: int, todo: int) -> bytes:
    """How far this process is, for `told`."""
    place = {"host": socket.gethostname(), "process": os.getpid(), "at": time.time()}
    return json.dumps({"done": done, "todo": todo, **place}).encode()


class Noted(NamedTuple):
    """What a process has noted: anybody may have written it, and nothing follows from it."""

    done: float
    todo: float
    at: float
    """By the clock of its machine."""
    host: str
    process: int

    @classmethod
    def of(cls, raw: bytes) -> Noted | None:
        """What `note` made, if it is that."""
        try:
            table = json.loads(raw)
            done, todo, at = (float(table[key]) for key in ("done", "todo", "at"))
            if math.isfinite(done + todo + at):
                return cls(done, todo, at, f"{table['host']}", int(table["process"]))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            pass
        return None

    def __str__(self) -> str:
        ago = max(0.0, time.time() - self.at)
        read = f"{size(self.done)} of {size(self.todo)} read and written"
        return f"{read}, {ago:.0f} s ago, by {self.host}, process {self.process}"


def told(notes: Mapping[str, bytes]) -> tuple[str, ...]:
    """A line for each process that has noted how far it is."""
    each = {name: Noted.of(raw) for name, raw in sorted(notes.items(), key=lambda each: (len(each[0]), each[0]))}
    return tuple(f"{name.replace('-', ' ')}: {noted}" for name, noted in each.items() if noted)
