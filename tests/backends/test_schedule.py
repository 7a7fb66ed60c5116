"""tests/schedule.cpp: the tables of GPU launches, for tensors of any size and lists of any length."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{ROOT / 'csrc'}"]


def test_tables(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    program = tmp_path / "schedule"
    subprocess.run([compiler, *FLAGS, str(ROOT / "tests/schedule.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("failures 0\n")
