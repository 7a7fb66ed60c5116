"""Stand-ins: folders on this disk for models that are elsewhere, with all of them but the bytes of their weights.

What lies beside the weights is small and is here as a whole. A file of weights is here as far as its header goes: what
reads more of it finds the end of the file, and never other bytes. `Files` knows what stands in for what, and reads the
rest from where it is. What a file is known by is made of its ETag, or of its bytes, and takes the place of its times:
so a merge knows its inputs by the same on every machine, and by something else when the model changes.

A stand-in lives as long as its process (scratch.py). It is one folder for as long as what is elsewhere stays the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from ires_kernels.checkpoints.header import Header, parse_header
from ires_kernels.files import samples, scratch
from ires_kernels.files.plain import call, called

if TYPE_CHECKING:
    from ires_kernels.checkpoints.objects import Object


class Far(NamedTuple):
    """What a file here stands in for."""

    object: Object
    size: int
    tag: int


_known: dict[Path, Far] = {}
_root: list[Path] = []


def far(path: Path) -> Far | None:
    """What a file of weights stands in for; None for one that has all of its bytes."""
    return _known.get(path) if _known else None


def header(path: Path, here: Far) -> Header:
    """The header of a file of weights that is elsewhere."""
    return parse_header(path.read_bytes(), here.size, f"{path}")


def check(paths: Iterable[Path]) -> None:
    """Raise Changed for a file elsewhere that is no longer what it was, and Unreachable where nobody can tell.

    All are asked for at once: of hundreds of files, each some round trips away, one after the other takes minutes.
    """
    there = [here for here in map(far, paths) if here]
    if there:
        from ires_kernels.checkpoints import objects  # which takes longer to load than all that reads models here

        objects.wait_for(objects.all_of([here.object.read(0, min(here.size, 1)) for here in there]))


def fill(folder: Path, name: str, weights: Mapping[str, tuple[Object, bytes]]) -> None:
    """Make a folder with the small files of a model a stand-in for what is called `name`."""
    for path in folder.rglob("*"):
        if path.is_file():
            tag = xxhash.xxh3_64_intdigest(path.read_bytes()) >> 4
            os.utime(path, ns=(tag, tag))
    for file, (_, raw) in weights.items():
        (folder / file).write_bytes(raw)
    ask(folder, weights)
    call(f"{folder}", name)


def ask(folder: Path, weights: Mapping[str, tuple[Object, bytes]]) -> None:
    """Have these asked for the bytes of a stand-in's weights: they may have a newer signature."""
    for file, (there, _) in weights.items():
        assert there.pin is not None
        _known[folder / file] = Far(there, there.pin.size, there.pin.tag)


def home() -> Path:
    """Where stand-ins are: nobody else may look at them, as what is elsewhere may be private."""
    if not _root:
        _root.append(scratch.make("ires-elsewhere-"))
    return _root[0]


def sample(path: Path, seed: str) -> str:
    """A sample of a file of weights, wherever it is: of one that is elsewhere what it is known by tells more."""
    there = far(path)
    return samples.sample(path, seed) if there is None else f"{there.tag:x}"


def shown(path: object) -> str:
    """A path as it is written down: of a stand-in the address of what it stands in for, without secrets."""
    return called(f"{path}")
