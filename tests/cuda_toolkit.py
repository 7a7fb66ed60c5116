"""What of the CUDA toolkit is at hand; a GPU is not needed for any of it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path


def nvcc() -> str | None:
    """Where setup.py would find it."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(str(Path(home, "bin/nvcc")) for home in homes), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and Path(place).is_file()), None)


def include() -> Path | None:
    """The folder with cuda_bf16.h."""
    compiler = nvcc()
    roots = [Path("/usr/local/cuda")]
    if compiler:
        command = [compiler, "--dryrun", "-x", "cu", "-c", os.devnull]
        dry = subprocess.run(command, capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(.*)$", dry.stdout + dry.stderr, re.MULTILINE)
        roots.insert(0, Path(top.group(1).strip()) if top else Path(compiler).parent.parent)
    folders = [root / place for root in roots for place in ("include", "targets/x86_64-linux/include")]
    return next((folder for folder in folders if (folder / "cuda_bf16.h").is_file()), None)


def cuobjdump() -> str | None:
    """From PATH, the toolkit, or the wheel of Triton."""
    places = [shutil.which("cuobjdump")]
    compiler = nvcc()
    if compiler:
        places.append(str(Path(compiler).parent / "cuobjdump"))
    wheel = importlib.util.find_spec("triton")
    if wheel and wheel.origin:
        places.append(str(Path(wheel.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((place for place in places if place and Path(place).is_file()), None)


def compute_sanitizer() -> str | None:
    """From PATH or the toolkit."""
    places = [shutil.which("compute-sanitizer")]
    compiler = nvcc()
    if compiler:
        places.append(str(Path(compiler).parent / "compute-sanitizer"))
    places.append("/usr/local/cuda/bin/compute-sanitizer")
    return next((place for place in places if place and Path(place).is_file()), None)
