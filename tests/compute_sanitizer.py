"""The GPU kernels under compute-sanitizer: a program for `make gpu`.

Memcheck finds accesses beyond an allocation and at addresses that do not suit their width; racecheck, threads of a
block in each other's way. The calls are those of test_small_cases.py. There every tensor is an allocation of its own,
because torch's allocator, which hands out parts of large ones, would hide what goes beyond a tensor.

Exit codes: 0 clean, or the tool is not there or cannot attach to this GPU, which is said; 1 it found something, or a
result was wrong.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_toolkit

HERE = Path(__file__).parent
CASES = f"{HERE / 'backends' / 'test_small_cases.py'}"
# torch asks CUDA for things that some devices do not have; those errors are none of a kernel's accesses.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
CALLS = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", CASES]
PROBE = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda').add_(1).cpu()"]


def sanitized(sanitizer: str, tool: str, command: list[str]) -> tuple[int, str]:
    """Run a command under a tool; returns its exit code, 1 for findings, and all output."""
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "1", *TOOLS[tool], *command],
        cwd=HERE.parent,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def main() -> int:
    sanitizer = cuda_toolkit.compute_sanitizer()
    if not sanitizer:
        print("compute-sanitizer: not found on PATH or in the CUDA toolkit; not checked")
        return 0
    code, output = sanitized(sanitizer, "memcheck", PROBE)
    if code:
        print(f"compute-sanitizer: cannot attach to torch on this GPU; not checked\n{output[-1000:]}")
        return 0
    failed = False
    for tool in TOOLS:
        code, output = sanitized(sanitizer, tool, CALLS)
        passed = re.search(r"\d+ passed", output)
        if code == 0 and passed:
            print(f"compute-sanitizer {tool}: clean, {passed.group()}")
        else:
            print(f"compute-sanitizer {tool}: exit code {code}, {passed.group() if passed else 'no test passed'}")
            print(output[-10_000:])
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
