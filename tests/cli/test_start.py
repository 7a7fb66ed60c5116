"""What starts at once: importing the package, and commands that compute nothing, load neither torch nor numpy."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
