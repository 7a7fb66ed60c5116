"""What commands print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any

from ires_kernels.checkpoints.folders import MERGE_ADAPTER
from ires_kernels.command_line.streams import say, tell
from ires_kernels.files.plain import plain, several, size
from ires_kernels.files.plain import table as columns


def result(arguments: argparse.Namespace, found: Any) -> int:
    """A report or plan, as a table or as JSON."""
    if arguments.json:
        say(json.dumps(found.to_dict(), indent=2))
    elif not getattr(arguments, "quiet", False):
        tell(f"{found}")
    return 0


def inspected(table: dict[str, Any], tensors: Iterable[dict[str, Any]]) -> str:
    """What `inspect` found, and a line for each of the tensors that are asked for."""
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in table["parameters_by_dtype"].items())
    rows = [
        (table["kind"], table["path"]),
        ("parameters", f"{table['parameters']:,} in {several(table['tensors'], 'tensor')} ({dtypes})"),
        ("size", f"{size(table['bytes'])} in {several(len(table['files']), 'file')}"),
        *((key, f"{value}") for key, value in table["config"].items()),
    ]
    rows += [("head", "is the embedding")] if table["head_is_embedding"] else []
    rows += [("not read", ", ".join(table["beside"]))] if table["beside"] else []
    if table["shard"]:
        rows.append(("shard", "{} of {}: the other tensors of the model are not in this file".format(*table["shard"])))
    if table["empty"]:
        names = f"{several(len(table['empty']), 'tensor')} without elements, such as {table['empty'][0]}"
        rows.append(("empty", f"{names}: saved under ZeRO-3 without gathering?"))
    if table["adapter"]:
        names = f"{several(len(table['adapter']), 'tensor')}, such as {table['adapter'][0]}"
        rows.append(("adapter", f"{names}. {MERGE_ADAPTER}"))
    if table["quantized"]:
        rows.append(
            ("quantized", f"{several(len(table['quantized']), 'tensor')}: {next(iter(table['quantized'].values()))}")
        )
    rows += [("format", f"{form}: {several(count, 'weight')}") for form, count in table["formats"].items()]
    if table["not_decoded"]:
        name, why = next(iter(table["not_decoded"].items()))
        rows.append(("not decoded", f"{several(len(table['not_decoded']), 'weight')}, such as {name}: {why}"))
    made_by = table["made_by"]
    rows += [("made by", f"ires {made_by['operation']}, {made_by.get('id')}")] if "operation" in made_by else []
    rows += [(f"from {role}", f"{entry.get('path')}") for role, entry in made_by.get("inputs", {}).items()]
    rows += [("note", text) for text in table["notes"]]
    return "\n".join([columns(rows), *map(plain, map(_tensor, tensors))])


def _tensor(entry: dict[str, Any]) -> str:
    """A stored tensor in a line, and where it is a part of a quantized weight, of which."""
    stored = f"{entry['dtype']:<8} {entry['shape']!s:<20} {entry['name']}  {entry['file']}"
    if "format" in entry:
        return f"{stored}  {entry['format']} codes of {entry['weight']} {entry['numbers']}"
    return f"{stored}  of {entry['weight']}" if "weight" in entry else stored
