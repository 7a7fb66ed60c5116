"""What of a merge lies in a store: an output that is unfinished there, as its lock and the names beside it tell."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ires_kernels.checkpoints.prefix import Prefix
from ires_kernels.checkpoints.uploads import note_of
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.unfinished import MARKER, told_by_lock
from ires_kernels.planning.plan import MANIFESTS
from ires_kernels.records.headway import Headway
from ires_kernels.records.operation import Operation


@dataclass(frozen=True)
class Unfinished:
    """An output that was begun and is not complete, or is just being written: a store does not tell which."""

    prefix: Prefix
    there: Collection[str]
    """All names under the prefix."""
    names: Collection[str]
    """Those that the merge writes."""
    operation: Operation

    @property
    def headway(self) -> Headway:
        """How much of the weights is complete."""
        sizes = self.operation.outputs
        done = [size for name, size in sizes.items() if {name, note_of(name)} <= {*self.there}]
        return Headway(sum(done), sum(sizes.values()), len(done), len(sizes))


def find(prefix: Prefix) -> Unfinished | None:
    """Ask what is unfinished there. Raises Foreign for what nobody proves to be ours."""
    there = prefix.names()
    lock = prefix.read(MARKER) if MARKER in there and not any(name in there for name in MANIFESTS.values()) else None
    if lock is None:
        return None
    names, keep = names_and_kept(told_by_lock(lock, prefix.address)[1])
    return Unfinished(prefix, there, names, Operation.from_bytes(keep, prefix.address))


def wanted(prefix: Prefix) -> Unfinished:
    """What is unfinished there. Raises StoreError where nothing is."""
    found = find(prefix)
    if found is None:
        raise StoreError(f"{prefix.address}: nothing is unfinished there. Is the name right?")
    return found


def as_kept(names: Iterable[str], keep: bytes) -> bytes:
    """What the lock has to tell: the names that are written, and the operation."""
    return json.dumps(list(names)).encode() + b"\n" + keep


def names_and_kept(content: bytes) -> tuple[list[str], bytes]:
    """What `as_kept` was given."""
    line, _, keep = content.partition(b"\n")
    return json.loads(line), keep
