"""tests/nvidia_oracle.cpp: the conversions against those of NVIDIA's headers; here a sample, all of it under `slow`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cuda_toolkit
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler, include = shutil.which("c++") or shutil.which("g++"), cuda_toolkit.include()
    if not compiler:
        pytest.skip("no C++ compiler")
    if not include:
        pytest.skip("no CUDA headers: no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda")
    made = tmp_path_factory.mktemp("oracle") / "nvidia_oracle"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", f"-isystem{include}"]
    subprocess.run([compiler, *flags, str(ROOT / "tests/nvidia_oracle.cpp"), "-o", str(made)], check=True)
    return made


def check(program: Path, stride: int) -> None:
    done = subprocess.run([str(program), str(stride)], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("failures 0\n")


def test_sample(program: Path) -> None:
    check(program, 251)


@pytest.mark.slow
def test_all(program: Path) -> None:
    check(program, 1)
