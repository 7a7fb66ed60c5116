"""``python -m ires_kernels.bench``: how fast the kernels and whole merges are here, beside what limits them.

Everything is checked against the reference arithmetic before the clock starts, contenders take turns in one run, and
what is reported are medians and quartiles of the rounds' ratios. The parts of a run are in parts; their cases in
kernels, quantized, merges, mappings and start; those that are run by themselves in fp8, comparing (``compare``), living
(``live``) and nodes (``scale``), and those of ``gpu``, for a GPU machine, in gpu and gpu_merges.
Exit codes: 0 measured, whatever the numbers; 1 a result was wrong, nothing was timed; 2 wrong usage.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ires_kernels.backends.choice import choose
from ires_kernels.bench.accelerator import Accelerator, open_cuda
from ires_kernels.bench.arguments import parse
from ires_kernels.bench.kernels import VerificationError
from ires_kernels.bench.measure import machine
from ires_kernels.bench.parts import PARTS, ahead, on_gpu
from ires_kernels.bench.report import Report
from ires_kernels.bench.tables import open_console, print_comparisons


def main(argv: Sequence[str] | None = None, device: Accelerator | None = None) -> int:
    """Verify, measure, print; returns the exit code. `device` stands in for the GPU that ``gpu`` would open."""
    arguments = parse(argv)
    console = open_console(stderr=arguments.json == "-")
    try:
        if arguments.what == "gpu":
            device = device or open_cuda(arguments.device or "cuda")
            choose(device.place)
        else:
            choose(torch.device(arguments.device or "cpu"))
    except RuntimeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if arguments.what != "gpu" and torch.device(arguments.device or "cpu").type != "cpu":
        print(f"bench: {arguments.what} measures tensors on the CPU only, got {arguments.device}", file=sys.stderr)
        return 2
    report = Report(console, machine())
    console.print(_machine_line(report.machine))
    for outlook in ahead(arguments):
        console.print(outlook.line(arguments.dir or tempfile.gettempdir()), soft_wrap=True)
    title = "Wanted, hoped for, measured (information only)"
    try:
        if arguments.what == "gpu":
            assert device is not None
            report.gpu = device.facts()
            title = f"{device.name}: median and quartiles"
            on_gpu(arguments, device, report)
        for part, measured in PARTS.items():
            if part in arguments.parts:
                measured(arguments, report)
    except VerificationError as error:
        print(f"bench: wrong result: {error}", file=sys.stderr)
        return 1
    if arguments.gates or "gpu" in arguments.parts:  # where other tables have not all of it
        print_comparisons(console, title, report.comparisons(), wanted=arguments.gates)
    record = report.to_dict()
    text = json.dumps(record, indent=1) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    elif arguments.json:
        Path(arguments.json).write_text(text)
    if arguments.results:
        assert device is not None
        Path(arguments.results, f"{_file_name(device.name, report.machine['commit'])}.json").write_text(text)
    if arguments.plot:
        from ires_kernels.bench.plot import draw

        draw(record, arguments.plot)
    return 0


def _file_name(gpu_name: str, commit: str | None) -> str:
    """Such as nvidia-h200-1a2b3c4, with a + behind it where files differ from the commit."""
    head, plus, _ = (commit or "unknown").partition("+")
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + f"-{head[:7]}{plus}"


def _machine_line(facts: dict[str, Any]) -> str:
    memory = f"{facts['memory_bytes'] / 2**30:.0f} GiB" if facts["memory_bytes"] else "memory unknown"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    commit = facts["commit"] or "unknown"
    return f"{facts['cpu']}, {facts['cores']} cores, {memory}, {facts['kernel']}\n{versions}, commit {commit}"


if __name__ == "__main__":
    raise SystemExit(main())
