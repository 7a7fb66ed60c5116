"""tests/exhaustive.cpp: every conversion and every pair of property P1; here a sample, all of it under `slow`."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-pthread", f"-I{ROOT / 'csrc'}"]


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


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    isas = {"v4": ["-march=x86-64-v4"], "v3": ["-march=x86-64-v3"], "v2": ["-march=x86-64-v2"]}
    if platform.machine() != "x86_64":
        isas = {"portable": []}
    return build(compiler, tmp_path_factory.mktemp("exhaustive"), isas, [])


def check(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("failures 0\n")


def test_sample(program: Path) -> None:
    check([str(program), "65537"])


@pytest.mark.slow
def test_all(program: Path) -> None:
    check([str(program), "1"])


def test_sample_on_aarch64(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    check([emulator, str(build(compiler, tmp_path, {"portable": []}, ["-static"])), "1000003"])
