"""Who may import whom: the arrows between rooms point one way, and what reads headers and plans needs no torch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ires_kernels"

ARROWS: dict[str, set[str]] = {
    "dtypes": set(),
    # bytes, without numbers
    "files": set(),
    "checkpoints": {"dtypes", "files"},
    "planning": {"checkpoints", "dtypes", "files"},
    # numbers, without files
    "backends": {"_native", "dtypes"},
    "tensors": {"backends", "dtypes"},
    # merges
    "streaming": {"backends", "checkpoints", "dtypes", "files", "planning", "tensors"},
    "records": {"backends", "checkpoints", "files", "planning", "streaming"},
    "checking": {"checkpoints", "dtypes", "files", "planning", "records", "streaming"},
    "in_place": {"backends", "checking", "checkpoints", "dtypes", "files", "planning", "records", "streaming"},
    "memory": {"checkpoints", "dtypes", "files", "in_place", "planning", "records", "tensors"},
    "merge": {"checking", "checkpoints", "files", "in_place", "memory", "planning", "records", "streaming"},
    "cli": {"checkpoints", "files", "merge", "planning", "streaming"},
    "__main__": {"cli"},
    "__init__": {"backends", "memory", "merge", "tensors"},
}
"""What each room, or module beside them, may import of this package. Nobody imports what is not here."""
NO_TORCH = {"files", "checkpoints", "planning"}


def files(room: str) -> list[Path]:
    """The modules of a room, or the module itself."""
    path = PACKAGE / f"{room}.py"
    return [path] if path.exists() else sorted((PACKAGE / room).glob("*.py"))


def imports(room: str) -> tuple[set[str], set[str]]:
    """Rooms of this package, and top-level names of others, that are imported anywhere in a room."""
    own, others = set(), set()
    for file in files(room):
        for node in ast.walk(ast.parse(file.read_text())):
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
                    own.add(parts[1])
                else:
                    others.add(parts[0])
    return own - {room}, others


@pytest.mark.parametrize("room", ARROWS)
def test_imports_follow_the_arrows(room: str) -> None:
    own, others = imports(room)
    assert own <= ARROWS[room]
    if room in NO_TORCH:
        assert others - {"xxhash"} <= set(sys.stdlib_module_names)
    assert not others & {"transformers", "safetensors"}


def test_every_room_has_its_arrows() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {path.stem for path in PACKAGE.glob("*.py")}
    assert rooms - {"bench", "new_folder"} == ARROWS.keys()


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
