"""The safetensors files of an output, where in them each step has its place, and their index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ires_kernels.checkpoints.header import build_header, tensor_bytes
from ires_kernels.planning.steps import Step, by_output


class OutputFile(NamedTuple):
    """A safetensors file to write: the bytes before its data, and the size of all of it."""

    name: str
    header: bytes
    size: int


def lay_out_residual(
    groups: Sequence[list[Step]],
) -> tuple[tuple[OutputFile, ...], tuple[Step, ...], tuple[tuple[str, bytes], ...]]:
    """The files of a residual, one for each group of steps; these in their places; and the index, where it has one."""
    stem = "residual-{:05}-of-{:05}" if len(groups) > 1 else "residual"
    layout = [
        (f"{stem.format(number, len(groups))}.safetensors", {"format": "pt"}, group)
        for number, group in enumerate(groups, 1)
    ]
    files, placed = lay_out(layout)
    documents = [("residual.safetensors.index.json", index(placed, {}))] if len(groups) > 1 else []
    return files, placed, tuple(documents)


def lay_out(
    layout: Iterable[tuple[str, dict[str, str], list[Step]]],
) -> tuple[tuple[OutputFile, ...], tuple[Step, ...]]:
    """Give every step its place in the files, each of which is (name, metadata, steps)."""
    files: list[OutputFile] = []
    placed: list[Step] = []
    for name, metadata, group in layout:
        outputs = by_output(group)
        header = build_header(((output.name, output.dtype, output.shape) for output in outputs), metadata)
        end = len(header)
        for output, parts in outputs.items():
            place = replace(output, file=name, offset=end)
            placed += [replace(step, output=place) for step in parts]
            end += tensor_bytes(output.dtype, output.shape)
        files.append(OutputFile(name, header, end))
    return tuple(files), tuple(placed)


def index(placed: Iterable[Step], metadata: dict[str, Any]) -> bytes:
    """The index of these files, as loaders want it."""
    weight_map = {step.name: step.file for step in placed}
    total = sum(step.nbytes for step in placed)
    return as_json({"metadata": metadata | {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def as_json(table: dict[str, Any]) -> bytes:
    """A file of JSON, for people to read as well."""
    try:
        return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only escape
        return (json.dumps(table, indent=2) + "\n").encode()
