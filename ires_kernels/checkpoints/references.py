"""What a file beside the weights needs of its folder to be of use: the modules, packages and folders that it names.

Custom code is named in auto_map and imports more of its kind; sentence-transformers names its parts in modules.json,
each with a folder of its own; and some settings hold paths. Code is only looked at, never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from ires_kernels.checkpoints.header import check_depth

_PARTS = ("modules.json", "router_config.json")
_FROM = re.compile(r"^[ \t]*from[ \t]+(\.+)(\w[\w.]*)?[ \t]+import[ \t]+(\([^()]*\)|[^\n#;]*)", re.MULTILINE)
# Settings that tell where a model was made, which may be the name of a folder here by chance.
_ELSEWHERE = re.compile(r"_.*|.*name_or_path|.*checkpoint.*|.*_dir")
_NAME = re.compile(r"[A-Za-z_]\w*")


def named_by(name: str, raw: bytes) -> set[str]:
    """The first components of all paths in the folder that the file `name` of these bytes may need.

    A module `x.py` is named as `x`. Most of what is found is no path at all: whoever asks knows what is there.
    """
    if name.endswith(".py"):
        return set(_imported(name, raw.decode(errors="replace")))
    if not name.endswith(".json"):
        return set()
    try:
        check_depth(raw, name)
        table = json.loads(raw)
    except ValueError:  # loaders cannot read it either; CheckpointError is one
        return set()
    return {_first(text) for text in _texts(table, bare=PurePosixPath(name).name in _PARTS)} - {""}


def _imported(name: str, text: str) -> Iterator[str]:
    """What a module imports of its own folder, and of those around it."""
    folder = PurePosixPath(name).parent.parts
    for dots, module, names in _FROM.findall(text):
        package = folder[: len(folder) + 1 - len(dots)]
        if len(dots) > len(folder) + 1:
            continue
        if package:
            yield package[0]
        elif module:
            yield module.partition(".")[0]
        else:
            yield from _NAME.findall(re.sub(r"\bas\s+\w+", "", names))


def _texts(value: Any, *, bare: bool, code: bool = False) -> Iterator[str]:
    """Strings that may be paths: with a slash, or any where `bare`; and of `code` the module of a class."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if _ELSEWHERE.fullmatch(key):
                continue
            if bare:
                yield key
            yield from _texts(inner, bare=bare, code=code or key in ("auto_map", "custom_pipelines"))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, bare=bare, code=code)
    elif isinstance(value, str):
        if code:
            yield "" if "--" in value else value.partition(".")[0]  # of another repository
        elif bare:
            yield from (value, value.partition(".")[0])
        elif "/" in value:
            yield value


def _first(path: str) -> str:
    parts = PurePosixPath(path).parts
    return parts[0] if parts and parts[0] not in ("/", "..") else ""
