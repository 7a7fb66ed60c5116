"""Who may import whom: the arrows between modules point one way, and what reads headers and plans needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ires_kernels"

ARROWS: dict[str, set[str]] = {
    # files, without torch
    "opening": set(),
    "interrupts": set(),
    "header": {"opening"},
    "trust": set(),
    "ownership": {"opening", "trust"},
    "locks": {"opening", "ownership", "trust"},
    "hidden": {"locks", "opening", "ownership", "store", "trust"},
    "inplace": {"hidden", "locks", "ownership", "store", "trust"},
    "decode": {"header"},
    "manifest": {"decode", "header", "opening", "rules", "trust"},
    "history": {"manifest"},
    "folders": {"opening"},
    "checkpoint": {"folders", "header", "hidden", "manifest", "opening", "store"},
    "names": {"checkpoint"},
    "quantized": {"checkpoint", "header", "names", "rules"},
    "absences": {"checkpoint", "header", "names"},
    "patterns": {"header"},
    "rules": {"header", "patterns"},
    "tokens": {"header", "opening"},
    "endings": {"tokens"},
    "configs": {"checkpoint", "header"},
    "references": {"header"},
    "sidefiles": {
        "checkpoint", "configs", "endings", "header", "opening", "references", "store", "tokens",
    },
    "steps": {"absences", "checkpoint", "folders", "header", "names", "quantized", "rules"},
    "plan": {"absences", "checkpoint", "configs", "header", "names", "rules", "sidefiles", "steps"},
    "store": {"interrupts", "locks", "opening", "ownership", "trust"},
    "samples": {"opening", "store"},
    "journal": {"interrupts", "ownership", "store"},
    "inputs": {"checkpoint", "folders", "header", "hidden", "rules"},
    "operation": {"checkpoint", "header", "hidden", "inputs", "ownership", "rules", "store", "trust"},
    "updates": {"checkpoint", "header", "names", "plan", "steps"},
    "state": {
        "checkpoint", "header", "history", "hidden", "inputs", "journal", "locks", "manifest", "operation",
        "ownership", "store",
    },
    "reader": {"checkpoint", "header", "interrupts", "names", "opening", "steps", "store"},
    "ancestry": {"checkpoint", "names", "reader", "store"},
    # tensors, without files
    "backends": {"_native"},
    "regions": set(),
    "checks": {"regions"},
    "launch": {"backends", "checks", "regions"},
    "library": {"backends", "checks", "launch"},
    "ops": {"backends", "checks", "launch", "library"},
    # merges
    "windows": {"backends", "names", "ops", "rules", "steps"},
    "stream": {
        "backends", "checkpoint", "header", "interrupts", "names", "reader", "rules", "steps", "store", "windows",
    },
    "counting": {"backends"},
    "device": {"backends", "counting", "names", "plan", "rules", "steps", "windows"},
    "statedict": {"checkpoint", "header", "names", "plan", "steps", "windows"},
    "report": {"absences", "backends", "manifest", "plan", "sidefiles", "stream"},
    "provenance": {
        "ancestry", "checkpoint", "interrupts", "manifest", "names", "plan", "report", "samples", "store",
        "stream", "trust",
    },
    "summary": {"checkpoint", "hidden", "inputs", "names", "quantized"},
    "verification": {
        "checkpoint", "device", "header", "inputs", "manifest", "names", "opening", "operation", "plan", "provenance",
        "reader", "rules", "steps", "store", "stream", "windows",
    },
    "guards": {"ancestry", "checkpoint", "header", "plan", "reader", "samples", "store", "stream", "windows"},
    "records": {"checkpoint", "header", "manifest", "plan", "provenance", "samples", "store", "stream"},
    "overwrite": {
        "backends", "checkpoint", "guards", "hidden", "history", "inplace", "inputs", "interrupts", "journal",
        "manifest", "names", "opening", "operation", "ownership", "plan", "provenance", "reader", "records",
        "report", "rules", "samples", "sidefiles", "steps", "store", "stream", "updates", "windows",
    },
    "merge": {
        "checkpoint", "configs", "device", "guards", "header", "hidden", "inplace", "inputs", "interrupts", "manifest",
        "operation", "overwrite", "ownership", "plan", "provenance", "reader", "records", "report", "rules", "samples",
        "sidefiles", "state", "statedict", "steps", "store", "stream", "summary", "verification",
        "writing",
    },
    "pages": set(),
    "copies": {"interrupts", "store"},
    "writing": {
        "checkpoint", "copies", "header", "inplace", "inputs", "operation", "overwrite", "ownership", "plan",
        "provenance", "records", "rules", "state", "store", "trust",
    },
    "mapping": {"checkpoint", "header", "interrupts", "opening", "pages", "regions", "rules", "writing"},
    "cli": {
        "folders", "header", "hidden", "inputs", "interrupts", "merge", "plan", "rules", "store", "stream", "trust",
        "windows",
    },
    "__main__": {"cli"},
    "__init__": {"backends", "mapping", "merge", "ops"},
}  # fmt: skip
"""What each module may import of this package. Modules that are not here, such as benchmarks, no other imports."""
NO_TORCH = {
    "interrupts",
    "opening", "header", "checkpoint", "names", "rules", "sidefiles", "steps", "plan", "store", "inplace", "journal",
    "inputs", "operation", "updates", "state", "reader", "trust", "pages", "regions", "tokens", "endings", "configs",
    "references", "ownership", "locks", "hidden", "decode", "manifest", "samples", "history", "copies",
}  # fmt: skip
STANDARD_ONLY = {
    "interrupts",
    "opening", "header", "checkpoint", "store", "inplace", "sidefiles", "names", "rules", "inputs", "operation",
    "trust", "ownership", "locks", "hidden", "pages", "regions", "copies", "tokens", "endings", "configs", "references",
}  # fmt: skip


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of this package, and top-level names of others, that a module or sub-package imports anywhere."""
    path = PACKAGE / f"{module}.py"
    own, others = set(), set()
    for file in [path] if path.exists() else sorted((PACKAGE / module).glob("*.py")):
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
    return own - {module}, others


@pytest.mark.parametrize("module", ARROWS)
def test_imports_follow_the_arrows(module: str) -> None:
    own, others = imports(module)
    assert own <= ARROWS[module]
    if module in NO_TORCH:
        assert not others & {"torch", "numpy", "rich", "transformers", "safetensors"}
    if module in STANDARD_ONLY:
        assert others <= set(sys.stdlib_module_names)
    assert not others & {"transformers", "safetensors"}


def test_the_arrows_have_no_cycle() -> None:
    done: set[str] = {"_native"}
    while len(done) <= len(ARROWS):
        ready = {module for module, targets in ARROWS.items() if targets <= done} - done
        assert ready, f"a cycle among {sorted(ARROWS.keys() - done)}"
        done |= ready


def test_importing_the_package_is_light() -> None:
    program = (
        "import sys, ires_kernels; print([m for m in ('rich', 'transformers', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
