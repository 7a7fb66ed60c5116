"""Who may import whom: the arrows between rooms point one way, and what reads headers and plans needs no torch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ires_kernels"

ARROWS: dict[str, set[str]] = {
    "dtypes": set(),
    "formats": set(),
    "version": set(),
    # bytes, without numbers
    "files": set(),
    "checkpoints": {"dtypes", "files", "formats"},
    "planning": {"checkpoints", "dtypes", "files", "formats", "version"},
    # numbers, without files
    "backends": {"_native", "dtypes", "formats"},
    "tensors": {"backends", "dtypes"},
    # merges
    "streaming": {"backends", "checkpoints", "dtypes", "files", "formats", "planning", "tensors"},
    "records": {"backends", "checkpoints", "files", "planning", "streaming", "version"},
    "pictures": {"backends", "checkpoints", "files", "planning", "records", "version"},
    "checking": {"checkpoints", "dtypes", "files", "planning", "records", "streaming"},
    "new_folder": {"checking", "checkpoints", "files", "planning", "records", "streaming"},
    "in_place": {
        "backends",
        "checking",
        "checkpoints",
        "dtypes",
        "files",
        "planning",
        "records",
        "streaming",
        "version",
    },
    "memory": {"checkpoints", "dtypes", "files", "in_place", "planning", "records", "tensors", "version"},
    "live": {"backends", "checking", "checkpoints", "dtypes", "files", "planning", "streaming", "tensors"},
    "merging": {
        "checking",
        "checkpoints",
        "files",
        "in_place",
        "live",
        "memory",
        "new_folder",
        "planning",
        "records",
        "streaming",
    },
    "publishing": {"checking", "checkpoints", "pictures", "planning", "records", "streaming"},
    "residual": {"checking", "checkpoints", "memory", "merging", "planning", "records", "streaming"},
    "command_line": {"__init__", "checkpoints", "dtypes", "files", "pictures", "planning", "streaming", "version"},
    "cli": {"command_line", "files"},
    "__main__": {"cli"},
    "__init__": {"backends", "checking", "live", "memory", "merging", "publishing", "records", "residual", "tensors"},
}
"""What each room, or module beside them, may import of this package. Nobody imports what is not here."""
EXECUTORS = {"new_folder", "in_place"}
NO_TORCH = {
    "dtypes",
    "formats",
    "version",
    "files",
    "checkpoints",
    "planning",
    "records",
    "checking",
    "in_place",
    "new_folder",
    "pictures",
    "merging",
    "publishing",
    "command_line",
    "cli",
}
"""What commands that compute nothing go through: they import torch nowhere, but for the names of its types."""


def files(room: str) -> list[Path]:
    """The modules of a room, or the module itself."""
    path = PACKAGE / f"{room}.py"
    return [path] if path.exists() else sorted((PACKAGE / room).glob("*.py"))


def is_for_types(node: ast.AST) -> bool:
    """Whether this is ``if TYPE_CHECKING:``, of which our code has no else."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(room: str) -> tuple[set[str], set[str]]:
    """Rooms of this package, and top-level names of others, that are imported anywhere in a room.

    Of others not those that only a type checker imports.
    """
    own, others = set(), set()
    for file in files(room):
        tree = ast.parse(file.read_text())
        for_types = {id(node) for block in ast.walk(tree) if is_for_types(block) for node in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file.name}: write imports in full"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                parts = name.split(".")
                if parts[0] == "ires_kernels":
                    own.add("__init__" if parts[1:] == [] else parts[1])
                elif id(node) not in for_types:
                    others.add(parts[0])
    return own - {room}, others


@pytest.mark.parametrize("room", ARROWS)
def test_imports_follow_the_arrows(room: str) -> None:
    own, others = imports(room)
    assert own <= ARROWS[room]
    if room in NO_TORCH:
        others -= {"planning": {"numpy"}, "pictures": {"matplotlib"}}.get(room, set())
        known = {"xxhash", "rich", "huggingface_hub", "obstore", "ray", "yaml", "_typeshed"}
        assert others <= set(sys.stdlib_module_names) | known
    assert not others & {"transformers", "safetensors"}


def test_every_room_has_its_arrows() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {path.stem for path in PACKAGE.glob("*.py")}
    assert rooms - {"bench"} == ARROWS.keys()


def test_the_arrows_have_no_cycle() -> None:
    done: set[str] = {"_native"}
    while len(done) <= len(ARROWS):
        ready = {room for room, targets in ARROWS.items() if targets <= done} - done
        assert ready, f"a cycle among {sorted(ARROWS.keys() - done)}"
        done |= ready


def test_rooms_say_what_they_are_and_hold_no_code() -> None:
    for init in PACKAGE.glob("*/__init__.py"):
        tree = ast.parse(init.read_text())
        assert ast.get_docstring(tree)
        assert len(tree.body) == 1
