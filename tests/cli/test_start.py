"""What starts at once: importing the package, and commands that compute nothing, load neither torch nor numpy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import tensors, write_model

import ires_kernels as ik


def run(program: str) -> str:
    """What a program of its own prints: here torch is loaded already."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "first",
    [
        "import ires_kernels",
        "import ires_kernels.backends",
        "import ires_kernels.backends.native",
        "from ires_kernels.backends import native",
        "from ires_kernels.backends.choice import backends",
        "from ires_kernels import backends",
        "import torch; import ires_kernels",
        "import importlib, ires_kernels; ires_kernels.backends(); importlib.reload(ires_kernels)",
    ],
)
def test_backends_is_the_function_whatever_was_imported_first(first: str) -> None:
    told = run(
        f"{first}\n"
        "import ires_kernels as ik, ires_kernels.backends, ires_kernels.backends.reference\n"
        "from ires_kernels.backends import native\n"
        "from ires_kernels import backends\n"
        "print(backends is ik.backends, *ik.backends(), native.__name__)"
    )
    assert told == "True native reference triton ires_kernels.backends.native"


def test_every_public_name_is_there() -> None:
    told = run(
        "import ires_kernels as ik; listed = dir(ik)\n"
        "from ires_kernels import *\n"
        "print([n for n in [*ik.__all__, '__version__'] if n not in listed or getattr(ik, n) is None])\n"
        "print([n for n in ik.__all__ if globals()[n] is not getattr(ik, n)])"
    )
    assert told == "[]\n[]"
    with pytest.raises(AttributeError, match="module 'ires_kernels' has no attribute 'multiply'"):
        ik.multiply  # noqa: B018


def test_operators_of_torch_are_there_for_who_has_torch() -> None:
    program = "import torch, ires_kernels; x = torch.ones(2); print(torch.ops.ires_kernels.subtract([x], [x])[0].sum())"
    assert run(program) == "tensor(0.)"


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("numpy", "rich", "safetensors", "torch", "transformers")
    assert run(f"import sys, ires_kernels; print([name for name in {heavy} if name in sys.modules])") == "[]"


# Commands.

MAIN = """
import json, sys
from ires_kernels.cli import main
try:
    code = main(json.loads(sys.argv[1]))
except SystemExit as error:
    code = error.code
print(code, [name for name in ("torch", "numpy", "rich") if name in sys.modules], file=sys.stderr)
"""


def command(*arguments: object) -> tuple[str, str, str]:
    """What a command prints, and on stderr what it says and then its exit code with what was loaded."""
    texts = json.dumps([f"{each}" for each in arguments])
    done = subprocess.run([sys.executable, "-c", MAIN, texts], capture_output=True, text=True, check=True)
    said, _, ended = done.stderr.rstrip("\n").rpartition("\n")
    return done.stdout, said, ended


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in shards, with a tied head and an integer tensor; one that is updated, and one whose update stopped."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "instruct", "target", "done", "stopped")):
        write_model(root / name, tensors(min(seed, 2)) | {"count": torch.arange(9)}, shards=2)
    ik.extract(root / "base", root / "instruct", root / "residual", sync=False)
    ik.apply(root / "target", root / "residual", out=root / "out", sync=False)
    ik.apply(root / "done", root / "residual", in_place=True, sync=False)

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ik.apply(root / "stopped", root / "residual", in_place=True, sync=False, progress=interrupt)
    return root


PAIR = ("--instruct", "instruct", "--base", "base")
AT_ONCE: dict[str, tuple[tuple[str, ...], int, str]] = {
    "help": (("--help",), 0, "usage: ires"),
    "help of a command": (("apply", "--help"), 0, "usage: ires apply"),
    "version": (("--version",), 0, f"ires_kernels {ik.__version__}"),
    "no command": ((), 2, "usage: ires"),
    "wrong usage": (("apply", "target"), 2, "usage: ires apply"),
    "wrong argument": (("apply", "target", "residual", "-o", "new", "--seed", "-1"), 2, "ires: seed"),
    "no such model": (("inspect", "none"), 2, "ires: "),
    "inspect": (("inspect", "target", "--tensors"), 0, "model "),
    "inspect a residual": (("inspect", "residual", "--json"), 0, "{"),
    "inspect output": (("inspect", "out"), 0, "model "),
    "status": (("status", "target"), 0, ""),
    "status of output": (("status", "out", "--json"), 0, "{"),
    "status of an update": (("status", "done"), 0, ""),
    "status of what was stopped": (("status", "stopped"), 0, ""),
    "dry extract": (("extract", "base", "instruct", "-o", "new", "--dry-run"), 0, ""),
    "dry extract again": (("extract", "base", "instruct", "-o", "residual", "--dry-run"), 2, "ires: "),
    "dry apply": (("apply", "target", "residual", "-o", "new", "--dry-run"), 0, ""),
    "dry apply of two": (("apply", "target", "residual:0.5", "residual:-1", "-o", "new", "--dry-run"), 0, ""),
    "dry apply of a pair": (("apply", "target", *PAIR, "-o", "new", "--dry-run", "--json"), 0, "{"),
    "dry apply at random": (("apply", "target", *PAIR, "-o", "n", "--dry-run", "--rounding", "stochastic"), 0, ""),
    "dry apply in place": (("apply", "target", "residual", "--in-place", "--dry-run"), 0, ""),
    "dry apply once more": (("apply", "done", "residual", "--in-place", "--dry-run"), 0, ""),
    "dry apply on top": (("apply", "done", "residual", "--in-place", "--dry-run", "--tag", "2"), 0, ""),
    "verify hashes": (("verify", "out", "--hashes-only"), 0, "out: all "),
    "dry apply to what was stopped": (("apply", "stopped", "residual", "--in-place", "--dry-run"), 2, "ires: "),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_commands_that_compute_nothing_load_nothing(models: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(models)
    arguments, code, first = AT_ONCE[case]
    printed, said, ended = command(*arguments)
    assert (printed or said).startswith(first), said
    assert ended == f"{code} []", said


def test_commands_that_compute_load_torch(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    assert command("apply", "target", *PAIR, "-o", "new", "--no-sync")[2] == "0 ['torch', 'numpy']"


def test_a_dry_run_refuses_what_the_run_refuses(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is not there, or a device: to know that, torch is loaded."""
    monkeypatch.chdir(models)
    dry = ("apply", "target", "residual", "-o", "n", "--dry-run")
    assert "wanted cpu, cuda" in command(*dry, "--device", "abacus")[1]
    monkeypatch.setenv("IRES_BACKEND", "abacus")
    assert "IRES_BACKEND=abacus: no such backend" in command(*dry)[1]
