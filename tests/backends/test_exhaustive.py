"""tests/exhaustive.cpp: every conversion and every pair of property P1; here a sample, all of it under `slow`."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-trapping-math", "-pthread", f"-I{ROOT / 'csrc'}"]


def build(compiler: str, folder: Path, isas: dict[str, list[str]], extra: list[str]) -> Path:
    objects = []
    for isa, flags in isas.items():
        objects.append(str(folder / f"loops_{isa}.o"))
        source = str(ROOT / "csrc/loops.cpp")
        subprocess.run([compiler, *FLAGS, *flags, f"-DIRES_ISA={isa}", "-c", source, "-o", objects[-1]], check=True)
    program = folder / "exhaustive"
    sources = [str(ROOT / "tests/exhaustive.cpp"), str(ROOT / "csrc/cpu.cpp")]
    subprocess.run([compiler, *FLAGS, *extra, *sources, *objects, "-o", str(program)], check=True)
    return program


def build_here(folder: Path, level: str) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    isas = {"v4": ["-march=x86-64-v4"], "v3": ["-march=x86-64-v3"], "v2": ["-march=x86-64-v2"]}
    if platform.machine() != "x86_64":
        isas = {"portable": []}
    return build(compiler, folder, {isa: [level, *flags] for isa, flags in isas.items()}, [level])


def check(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("failures 0\n")


def test_sample(tmp_path: Path) -> None:
    """Without most of the optimisation, which takes half of the time; test_numerics.py has the kernels as installed."""
    check([str(build_here(tmp_path, "-O1")), "65537"])


@pytest.mark.slow
def test_all(tmp_path: Path) -> None:
    check([str(build_here(tmp_path, "-O3")), "1"])


def test_sample_on_aarch64(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    check([emulator, str(build(compiler, tmp_path, {"portable": ["-O3"]}, ["-O3", "-static"])), "1000003"])
