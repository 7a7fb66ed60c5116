"""What a run of the bench is asked to measure."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ires_kernels.bench import gpu
from ires_kernels.bench.kernels import CASES, Case
from ires_kernels.bench.synthetic import SHAPES, count_of, shape_of

ELEMENTS = 1 << 27  # of each tensor: far beyond any cache
ON_GPU = 1 << 30
MODEL, LIST = "llama-1b", "llama-8b"
_ALL = ("kernels", "quantized", "merge", "mapped", "start")
_QUICK_ELEMENTS, _QUICK_MODEL = 1 << 24, 125_000_000
_QUICK_CASES = re.compile(r"^add_difference bf16$|^add bf16 \+ f32$")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """What a run is asked to measure; argparse exits with 2 for wrong usage."""

    def argument(read: Callable[[str], Any]) -> Callable[[str], Any]:
        def parsed(text: str) -> Any:
            try:
                return read(text)
            except (ValueError, re.error) as error:
                raise argparse.ArgumentTypeError(f"{error}") from None

        return parsed

    def threads(text: str) -> list[int]:
        return [_at_least_one(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        prog="python -m ires_kernels.bench",
        description="How fast the kernels and whole merges are here, beside what limits them.",
    )
    whats = [*_ALL, "fp8", "compare", "live", "scale", "all", "gpu"]
    parser.add_argument("what", nargs="?", choices=whats, default="all")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="kernels and one merge in 20 seconds, with 2 GB of memory and of disk at most: two kernels of "
        f"{_QUICK_ELEMENTS:,} elements, models of {2e-6 * _QUICK_MODEL:.0f} MB, 3 rounds",
    )
    parser.add_argument(
        "--size",
        "--shape",
        metavar="N",
        help=f"elements of a tensor, or parameters of a model: 250M, 500MB (16 bits each), {', '.join(SHAPES)} "
        f"(default: {ELEMENTS:,} elements, on a GPU {ON_GPU:,}, and {MODEL})",
    )
    parser.add_argument("--list", metavar="NAME", choices=SHAPES, default=LIST, help="gpu: tensors of one call")
    parser.add_argument("--model", metavar="N", default=MODEL, help="gpu: size of the models to merge")
    parser.add_argument("--sizes", metavar="N,N,…", default="", help="merges of more sizes, for the cost per byte")
    parser.add_argument(
        "--threads",
        metavar="N,N,…",
        type=argument(threads),
        help="default: 1, 2, 4, … for kernels, for merges as many as apply takes",
    )
    parser.add_argument("--rounds", metavar="N", type=argument(_at_least_one), help="default: 7")
    parser.add_argument("--cases", metavar="REGEX", type=argument(re.compile), help="only these kernels")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes a while")
    parser.add_argument(
        "--nodes",
        metavar="N,N,…",
        type=argument(threads),
        default=[1, 2, 4, 8, 16],
        help="scale: processes, each behind a link of its own; the first is what the others are held against",
    )
    parser.add_argument("--cold", action="store_true", help="drop the inputs of merges from the page cache each time")
    parser.add_argument("--dir", metavar="FOLDER", help="where models are written and removed (default: $TMPDIR)")
    parser.add_argument(
        "--gates", action="store_true", help="for developers: what is wanted, and hoped for, beside what was measured"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - for stdout, and tables to stderr")
    parser.add_argument("--results", metavar="FOLDER", help="gpu: write the JSON there as <gpu>-<commit>.json")
    parser.add_argument("--plot", metavar="FILE", help="draw it: .png, .svg or .pdf; needs matplotlib; not for gpu")
    parser.add_argument("--device", help="where the tensors are (default: cpu; for gpu: cuda)")
    arguments = parser.parse_args(argv)
    arguments.parts = (
        {"kernels", "quantized", "merge", "mapped", "start"} if arguments.what == "all" else {arguments.what}
    )
    if arguments.quick:
        if arguments.what not in ("kernels", "merge", "all"):
            parser.error(f"--quick is of kernels and merge, not of {arguments.what}")
        _be_quick(arguments)
    arguments.rounds, arguments.cases = arguments.rounds or 7, arguments.cases or re.compile("")
    size, on_gpu = arguments.size, arguments.what == "gpu"
    if on_gpu and arguments.plot:
        parser.error("--plot draws kernels and merges on the CPU, not gpu")
    if arguments.results and not (on_gpu and Path(arguments.results).is_dir()):
        parser.error(f"--results {arguments.results}: wanted a folder that exists, and only for gpu")
    if arguments.dir and not Path(arguments.dir).is_dir():
        parser.error(f"--dir {arguments.dir}: wanted a folder that exists")
    try:
        if arguments.what not in ("merge", "fp8", "mapped", "compare", "live", "scale", "start"):
            default = ON_GPU if on_gpu else _QUICK_ELEMENTS if arguments.quick else ELEMENTS
            arguments.elements = (
                default if size is None else SHAPES[size].parameters if size in SHAPES else count_of(size)
            )
        if on_gpu:
            arguments.shapes = [shape_of(arguments.model)]
        elif arguments.what not in ("kernels", "quantized", "start"):
            model = f"{_QUICK_MODEL}" if arguments.quick else MODEL
            arguments.shapes = [shape_of(text) for text in [size or model, *filter(None, arguments.sizes.split(","))]]
    except ValueError as error:
        parser.error(f"{error}")
    try:
        arguments.chosen = _chosen(arguments)
    except ValueError as error:
        parser.error(f"--cases {arguments.cases.pattern}: {error}")
    return arguments


def _be_quick(arguments: argparse.Namespace) -> None:
    """What --quick leaves out, as far as nothing else is asked for."""
    arguments.parts &= {"kernels", "merge"}
    arguments.rounds = arguments.rounds or 3
    arguments.threads = arguments.threads or [len(os.sched_getaffinity(0))]
    arguments.no_compile = True
    if arguments.cases is None and arguments.what != "merge":
        arguments.cases = _QUICK_CASES


def _chosen(arguments: argparse.Namespace) -> Sequence[Case | gpu.Workload]:
    """The kernels that --cases names, all without it. Raises ValueError where it names none."""
    known: Sequence[Case | gpu.Workload] = ()
    if arguments.what == "gpu":
        known = gpu.workloads(arguments.elements, SHAPES[arguments.list], arguments.list)
    elif arguments.what in ("kernels", "all"):
        known = CASES
    elif arguments.cases.pattern:
        raise ValueError(f"chooses kernels, for kernels, all and gpu; {arguments.what} has none")
    found = [each for each in known if arguments.cases.search(each.name)]
    if known and not found:
        raise ValueError(f"got a pattern of no case, wanted one of {[each.name for each in known]}")
    return found


def kernel_threads(arguments: argparse.Namespace) -> list[int]:
    """Those given, or 1, 2, 4, … and all CPUs."""
    cpus = len(os.sched_getaffinity(0))
    return arguments.threads or sorted({1 << i for i in range(cpus.bit_length())} | {cpus})


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise ValueError(f"got {text}, wanted 1 or more")
    return int(text)
