"""The compiled code under the sanitizers; `make sanitize` runs this.

AddressSanitizer and UndefinedBehaviorSanitizer: the extension is built with them into build/sanitize, and the kernel
tests run on it. ThreadSanitizer: threads.cpp calls the loops directly, since Python under it reports much of its own.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "sanitize"
CHECKS = "address,undefined,float-cast-overflow"
TESTS = (
    *(
        f"tests/backends/test_{name}.py"
        for name in ("numerics", "stochastic", "stats", "counting", "fit", "small_cases")
    ),
    *(
        f"tests/backends/test_{name}.py"
        for name in ("decoding", "encoding", "packed_words", "companions", "schedule", "packing")
    ),
    *(f"tests/tensors/test_{name}.py" for name in ("ops", "checks", "random_words")),
    *(f"tests/streaming/test_{name}.py" for name in ("load", "decoded", "parts", "fused", "device")),
    *(f"tests/new_folder/test_{name}.py" for name in ("merge", "failures", "second_copies", "pairs", "quantized")),
    *(f"tests/in_place/test_{name}.py" for name in ("parts", "quantized")),
    "tests/live/test_update.py",
    "tests/live/test_undo.py",
    "tests/cli/test_look.py",
)
MEASURED = (
    "new_folder/test_merge.py::test_memory_does_not_grow_with_the_model",
    "streaming/test_load.py::test_there_is_one_copy_of_the_model",
)
"""Tests of how much memory the process has, which is the sanitizer's here."""
ISAS = {"v4": ["-march=x86-64-v4"], "v3": ["-march=x86-64-v3"], "v2": ["-march=x86-64-v2"]}
if platform.machine() != "x86_64":
    ISAS = {"portable": []}


def call(*command: str, **variables: str) -> None:
    print(" ".join(command), flush=True)
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed with exit code {done.returncode}")


def runtime(compiler: str, name: str) -> str:
    """Where the compiler keeps a library of the sanitizers."""
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def memory_and_undefined_behaviour(compiler: str) -> None:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", f"{BUILD}", "--build-lib", f"{BUILD / 'lib'}"]
    call(*command, IRES_SANITIZE=CHECKS, IRES_NATIVE="1", IRES_CUDA="0", CC=compiler, CXX=compiler)
    call(
        # Not `python -m pytest`, which looks for the package in this folder first.
        f"{Path(sys.executable).with_name('pytest')}",
        "-q",
        *TESTS,
        *(f"--deselect=tests/{name}" for name in MEASURED),
        "-p",
        "sanitized",
        PYTHONPATH=f"{BUILD / 'lib'}:{ROOT / 'tests'}",
        LD_PRELOAD=" ".join(runtime(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")),
        # Python and torch free little at the end; and a test asks for more memory than there is.
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
    )


def threads(compiler: str) -> None:
    flags = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-pthread", "-fsanitize=thread", "-Icsrc"]
    objects = []
    for isa, extra in ISAS.items():
        objects.append(f"{BUILD / f'loops_{isa}.o'}")
        call(compiler, *flags, *extra, f"-DIRES_ISA={isa}", "-c", "csrc/loops.cpp", "-o", objects[-1])
    program = f"{BUILD / 'threads'}"
    call(compiler, *flags, "tests/threads.cpp", "csrc/cpu.cpp", *objects, "-o", program)
    call(program, TSAN_OPTIONS="halt_on_error=1")


if __name__ == "__main__":
    found = shutil.which("g++")
    if found is None:
        sys.exit("needs g++ and its sanitizers")
    BUILD.mkdir(parents=True, exist_ok=True)
    threads(found)
    memory_and_undefined_behaviour(found)
