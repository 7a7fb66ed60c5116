"""`make gpu`: its steps and exit codes, with stand-ins for Python and for compute-sanitizer; no GPU is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import compute_sanitizer
import cuda_toolkit
import pytest
import torch

ROOT = Path(__file__).parent.parent
# What the stand-in for Python is called with, in order: the beginning of its arguments.
STEPS = {
    "gpu-build": "-m pip install -q --no-build-isolation --no-deps -e .",
    "gpu-suite": "-m pytest -q",
    "gpu-test": "-m pytest -q -m gpu -n 5",
    "gpu-sanitize": "tests/compute_sanitizer.py",
    "gpu-bench": "-m ires_kernels.bench gpu --gates --results bench/results",
}

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="no make")


def make(target: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--no-print-directory", target, *(f"{name}={value}" for name, value in variables.items())]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Answers what it is asked with -c, writes down all else, and fails where a line of the file `failing` says so."""
    script = tmp_path / "python"
    script.write_text(
        f"""#!/bin/sh
        case "$1" in -c) echo "-n 5"; exit 0;; esac
        echo "$*" >> {tmp_path}/log
        ! grep -qxF -- "$*" {tmp_path}/failing
        """
    )
    script.chmod(0o755)
    (tmp_path / "failing").touch()
    return script


def called(python: Path) -> list[str]:
    log = python.with_name("log")
    return log.read_text().splitlines() if log.exists() else []


@needs_make
def test_everything_in_order(python: Path) -> None:
    done = make("gpu", PYTHON=f"{python}")
    assert done.returncode == 0, done.stderr
    assert called(python) == list(STEPS.values())


@needs_make
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_is_named_and_fails_the_command(step: str, python: Path) -> None:
    python.with_name("failing").write_text(STEPS[step] + "\n")
    done = make("gpu", PYTHON=f"{python}")
    assert done.returncode != 0
    if step == "gpu-build":
        assert called(python) == [STEPS[step]]
    else:
        assert called(python) == list(STEPS.values())  # the others are of use all the same
        assert f"make gpu: failed: {step}\n" in done.stderr


@needs_make
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("target", ["gpu", "gpu-bench"])
@pytest.mark.parametrize("interpreter", [sys.executable, "/no/such/python"])
def test_without_a_gpu(interpreter: str, target: str) -> None:
    done = make(target, PYTHON=interpreter)
    assert done.returncode != 0
    assert done.stdout == ""
    ours, make_line = done.stderr.splitlines()
    assert ours.startswith(f"make gpu: {interpreter} has no torch that sees a GPU; ")
    assert make_line.startswith("make: ***")


class TestSanitize:
    @pytest.fixture
    def tool(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Writes down its tool and what torch was told; what it prints and its exit code are in files."""
        script = tmp_path / "compute-sanitizer"
        script.write_text(
            f"""#!/bin/sh
            case "$*" in *" -c "*) name=probe;; *) name=$2;; esac
            echo "$name $PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> {tmp_path}/log
            cat {tmp_path}/$name.out
            exit $(cat {tmp_path}/$name.code)
            """
        )
        script.chmod(0o755)
        for name, output in (("probe", ""), ("memcheck", "14 passed in 3 s"), ("racecheck", "14 passed in 3 s")):
            (tmp_path / f"{name}.out").write_text(output)
            (tmp_path / f"{name}.code").write_text("0")
        monkeypatch.setattr(cuda_toolkit, "compute_sanitizer", lambda: f"{script}")
        return script

    def test_clean(self, tool: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert compute_sanitizer.main() == 0
        assert capsys.readouterr().out.splitlines() == [
            "compute-sanitizer memcheck: clean, 14 passed",
            "compute-sanitizer racecheck: clean, 14 passed",
        ]
        probe, memcheck, racecheck = tool.with_name("log").read_text().splitlines()
        assert probe.startswith("probe 1 --tool memcheck --error-exitcode 1 ")
        assert memcheck.startswith("memcheck 1 --tool memcheck --error-exitcode 1 --report-api-errors no ")
        assert racecheck.startswith(f"racecheck 1 --tool racecheck --error-exitcode 1 {sys.executable} -m pytest ")
        assert racecheck.endswith("test_small_cases.py")

    @pytest.mark.parametrize("which", ["memcheck", "racecheck"])
    def test_findings_fail(self, which: str, tool: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tool.with_name(f"{which}.code").write_text("1")
        tool.with_name(f"{which}.out").write_text("Invalid __global__ write of size 16 bytes\n14 passed")
        assert compute_sanitizer.main() == 1
        out = capsys.readouterr().out
        assert f"compute-sanitizer {which}: exit code 1, 14 passed\nInvalid __global__ write" in out
        assert out.count(": clean") == 1

    def test_tests_that_were_all_skipped_are_not_clean(self, tool: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tool.with_name("memcheck.out").write_text("28 skipped in 1 s")
        assert compute_sanitizer.main() == 1
        assert "compute-sanitizer memcheck: exit code 0, no test passed\n28 skipped" in capsys.readouterr().out

    def test_a_tool_that_cannot_attach_says_so(self, tool: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tool.with_name("probe.code").write_text("1")
        tool.with_name("probe.out").write_text("Device not supported")
        assert compute_sanitizer.main() == 0
        assert capsys.readouterr().out == (
            "compute-sanitizer: cannot attach to torch on this GPU; not checked\nDevice not supported\n"
        )
        assert len(tool.with_name("log").read_text().splitlines()) == 1

    def test_without_the_tool(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(cuda_toolkit, "compute_sanitizer", lambda: None)
        assert compute_sanitizer.main() == 0
        assert "compute-sanitizer: not found" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["Benchmarks are automatically disabled because xdist plugin is active.", "another"])
def test_parallel_runs_start_beside_a_plugin_for_benchmarks(text: str, tmp_path: Path) -> None:
    """It warns as it is configured, and warnings are errors here: of all others still."""
    plugin = f"import warnings\ndef pytest_configure(config):\n    warnings.warn({text!r})\n"
    (tmp_path / "plugin.py").write_text(plugin)
    (tmp_path / "test_one.py").write_text("def test_one():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-c", f"{ROOT / 'pyproject.toml'}", "-q", "-p", "no:benchmark"]
    command += ["-p", "no:cacheprovider", "-p", "plugin", f"--rootdir={tmp_path}", f"{tmp_path / 'test_one.py'}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([f"{tmp_path}", os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (text != "another"), done.stdout + done.stderr
