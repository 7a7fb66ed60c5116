"""Compiles what the Triton backend launches, for GPUs that are not there: a program for test_triton_offline.py.

The backend runs as on the GPU named by the argument (cuda:90, hip:gfx942), but a launch only compiles. It reads calls
as JSON, one a line, and for each writes a line with a list of its launches: which kernel, of which grid and arguments,
and how often which instruction occurs. Afterwards the process is of no use for anything else.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from ires_kernels.backends import triton as backend
from ires_kernels.backends import triton_kernels as kernels
from ires_kernels.backends.call import Call

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
FACTORS = {"subtract": 0, "scale": 1, "add_difference": 1}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """As much of a driver as is asked for before the launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


class Recorder:
    """Takes the place of the launch: compiles, and keeps what was compiled."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.compiled: list[Any] = []
        self.take_place(kernels.flat, "flat")
        self.take_place(kernels.strided, "strided")
        self.take_place(kernels.listed, "listed")

    def take_place(self, kernel: Any, name: str) -> None:
        launch = kernel.run

        def compile_only(*args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
            assert not warmup
            assert options["enable_fp_fusion"] is False
            compiled = launch(*args, grid=grid, warmup=True, **options)
            if compiled not in self.compiled:
                self.compiled.append(compiled)
            number = self.compiled.index(compiled)
            scalars = [x for x in args if isinstance(x, int)]
            self.launches.append({"kernel": name, "number": number, "grid": list(grid), "scalars": scalars})

        kernel.run = compile_only


def operand(dtype: torch.dtype, n: int, odd: bool) -> torch.Tensor:
    """At a multiple of 16 bytes, or one element after it. The memory is never touched, so it may be large."""
    whole = torch.empty(n + 64, dtype=dtype)
    start = -whole.data_ptr() % 64 // dtype.itemsize + odd
    return whole[start : start + n]


def call_of(case: dict[str, Any]) -> Call:
    dtypes = [DTYPES[name] for name in case["dtypes"]]
    odd = case.get("odd", False)  # of all tensors, or of each
    odds = odd if isinstance(odd, list) else [odd] * len(dtypes)
    rows = []
    for n in case.get("sizes", [case.get("n", 5000)]):
        tensors = (operand(d, n, o) for d, o in zip(dtypes, odds, strict=True))
        rows.append([x[:: case.get("step", 1)] for x in tensors])
    outs, inputs = [row[0] for row in rows], [tuple(row[1:]) for row in rows]
    operands = inputs[0]
    factors = (case.get("factor", 0.5),) * FACTORS.get(case["op"], len(operands) - 1)
    random = case.get("random", False)
    seed, offset = case.get("seed", 0), case.get("offset", 0)
    return Call(case["op"], outs, inputs, factors, random, seed, [seed] * len(outs), offset, None)


def nvidia_code(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing, usage = (
            subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout
            for name, *options in (("nvdisasm",), ("cuobjdump", "-res-usage"))
        )
    return {
        "taken_apart": taken_apart(compiled.asm["ptx"]),
        "ptx": Counter(re.findall(r"(?:^|[{;])\s*(?:@%p\d+ )?([a-z][\w.:]*)", compiled.asm["ptx"], re.M)),
        "code": Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", listing, re.M)),
        "spilled": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))),
    }


def taken_apart(ptx: str) -> int:
    """How many pairs of codes from a cast to float8 are packed into a word and shifted or masked as well.

    The ptxas of Triton 3.6 (12.8) makes one instruction of such a cast and the packing, and lets what takes the pair
    apart read a register that is written only later.
    """
    pairs = re.findall(r"cvt\.rn\.satfinite\.e\dm\dx2\.f32 (%rs\d+),", ptx)
    packed = set(re.findall(r"%rs\d+", " ".join(re.findall(r"mov\.b32\s+%r\d+, (\{.*?\})", ptx))))
    apart = set(re.findall(r"(?:shr|and)\.[bu]16\s+%rs\d+, (%rs\d+),", ptx))
    return len(set(pairs) & packed & apart)


def amd_code(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    return {
        "code": Counter(re.findall(r"^\s+([a-z]\w*_\w+)\s", text, re.M)),
        "spilled": sum(map(int, re.findall(r"(?:_spill_count:|private_segment_fixed_size:)\s+(\d+)", text))),
        "denormals": [int(mode) for mode in re.findall(r"float_denorm_mode_\w+ (\d)", text)],
    }


def main() -> None:
    kind, arch = sys.argv[1].split(":")
    target = GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)
    triton.runtime.driver.set_active(Driver(target))
    recorder = Recorder()
    described: dict[int, dict[str, Any]] = {}
    for line in sys.stdin:
        backend.run(call_of(json.loads(line)))
        for launch in recorder.launches:
            number = launch["number"]
            if number not in described:
                compiled = recorder.compiled[number]
                described[number] = nvidia_code(compiled) if kind == "cuda" else amd_code(compiled)
            launch |= described[number]
        print(json.dumps(recorder.launches), flush=True)
        recorder.launches.clear()


if __name__ == "__main__":
    main()
