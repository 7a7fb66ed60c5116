"""``python -m ires_kernels.bench``: how fast the kernels and whole merges are here, beside what limits them.

Everything is checked against the reference arithmetic before the clock starts, contenders take turns in one run, and
what is reported are medians and quartiles of the rounds' ratios. The cases are in kernels, merges and mappings, and
those of ``gpu``, for a GPU machine, in gpu and gpu_merges.
Exit codes: 0 measured, whatever the numbers; 1 a result was wrong, nothing was timed; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ires_kernels.backends.choice import backends, choose
from ires_kernels.bench import gpu, gpu_merges, kernels, mappings, merges
from ires_kernels.bench.accelerator import Accelerator, open_cuda
from ires_kernels.bench.contenders import TORCH
from ires_kernels.bench.kernels import CASES, VerificationError
from ires_kernels.bench.measure import Quartiles, machine
from ires_kernels.bench.synthetic import SHAPES, count_of, shape_of, write_triple

ELEMENTS = 1 << 27  # of each tensor: far beyond any cache
ON_GPU = 1 << 30
MODEL, LIST = "llama-1b", "llama-8b"


def main(argv: Sequence[str] | None = None, device: Accelerator | None = None) -> int:
    """Verify, measure, print; returns the exit code. `device` stands in for the GPU that ``gpu`` would open."""
    arguments = _parse(argv)
    console = Console(stderr=arguments.json == "-", highlight=False)
    if not console.is_terminal:
        console.width = 120
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
    record: dict[str, Any] = {"machine": machine(), "backends": {k: v._asdict() for k, v in backends().items()}}
    record |= {"verified": [], "kernels": [], "merges": [], "mapped": [], "gates": []}
    console.print(_machine_line(record["machine"]))
    try:
        if arguments.what == "gpu":
            assert device is not None
            _on_gpu(arguments, device, record, console)
        if arguments.what in ("kernels", "all"):
            _kernels(arguments, record, console)
        if arguments.what in ("merge", "all"):
            _merges(arguments, record, console)
        if arguments.what in ("mapped", "all"):
            _mapped(arguments, record, console)
    except VerificationError as error:
        print(f"bench: wrong result: {error}", file=sys.stderr)
        return 1
    if arguments.what != "gpu":
        _print_gates(console, record["gates"])
    if arguments.json:
        text = json.dumps(record, indent=1) + "\n"
        if arguments.json == "-":
            sys.stdout.write(text)
        else:
            Path(arguments.json).write_text(text)
    if arguments.results:
        assert device is not None
        path = Path(arguments.results, f"{_file_name(device.name, record['machine']['commit'])}.json")
        path.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        from ires_kernels.bench.plot import draw

        draw(record, arguments.plot)
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
        def parsed(text: str) -> Any:
            try:
                return parse(text)
            except (ValueError, re.error) as error:
                raise argparse.ArgumentTypeError(f"{error}") from None

        return parsed

    def threads(text: str) -> list[int]:
        return [_at_least_one(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="python -m ires_kernels.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=["kernels", "merge", "mapped", "all", "gpu"], default="all")
    parser.add_argument(
        "--size",
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
        help="default: 1, 2, 4, … for kernels, all CPUs for merges",
    )
    parser.add_argument("--rounds", metavar="N", type=argument(_at_least_one), default=7)
    parser.add_argument("--cases", metavar="REGEX", type=argument(re.compile), default="", help="only these kernels")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes a while")
    parser.add_argument("--cold", action="store_true", help="drop the inputs of merges from the page cache each time")
    parser.add_argument("--dir", metavar="FOLDER", help="where models are written and removed (default: $TMPDIR)")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - for stdout, and tables to stderr")
    parser.add_argument("--results", metavar="FOLDER", help="gpu: write the JSON there as <gpu>-<commit>.json")
    parser.add_argument("--plot", metavar="FILE", help="draw it: .png, .svg or .pdf; needs matplotlib; not for gpu")
    parser.add_argument("--device", help="where the tensors are (default: cpu; for gpu: cuda)")
    arguments = parser.parse_args(argv)
    size, on_gpu = arguments.size, arguments.what == "gpu"
    if on_gpu and arguments.plot:
        parser.error("--plot draws kernels and merges on the CPU, not gpu")
    if arguments.results and not (on_gpu and Path(arguments.results).is_dir()):
        parser.error(f"--results {arguments.results}: wanted a folder that exists, and only for gpu")
    try:
        if arguments.what not in ("merge", "mapped"):
            default = ON_GPU if on_gpu else ELEMENTS
            arguments.elements = (
                default if size is None else SHAPES[size].parameters if size in SHAPES else count_of(size)
            )
        if on_gpu:
            arguments.shapes = [shape_of(arguments.model)]
        elif arguments.what != "kernels":
            arguments.shapes = [shape_of(text) for text in [size or MODEL, *filter(None, arguments.sizes.split(","))]]
    except ValueError as error:
        parser.error(f"{error}")
    if arguments.cases.pattern:
        known = _names(arguments)
        if not known:
            parser.error(f"--cases chooses kernels, for kernels, all and gpu; {arguments.what} has none")
        if not any(arguments.cases.search(name) for name in known):
            parser.error(f"--cases {arguments.cases.pattern}: got a pattern of no case, wanted one of {known}")
    return arguments


def _names(arguments: argparse.Namespace) -> list[str]:
    """What --cases chooses from."""
    if arguments.what == "gpu":
        return [load.name for load in gpu.workloads(arguments.elements, SHAPES[arguments.list], arguments.list)]
    return [case.name for case in CASES] if arguments.what in ("kernels", "all") else []


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise ValueError(f"got {text}, wanted 1 or more")
    return int(text)


def _kernels(arguments: argparse.Namespace, record: dict[str, Any], console: Console) -> None:
    cases = [case for case in CASES if re.search(arguments.cases, case.name)]
    threads = arguments.threads or _powers_of_two(len(os.sched_getaffinity(0)))
    compared = sum(kernels.verify(case, threads) for case in cases)
    names = ", ".join(kernels.ours())
    line = f"{compared} results of {len(cases)} kernels ({names}; threads {threads}) equal the reference bit for bit"
    _verified(record, console, line)
    results = []
    for case in cases:
        for count in threads:
            with console.status(f"{case.name}, threads {count}"):
                result = kernels.measure(
                    case, arguments.elements, count, arguments.rounds, compiled=not arguments.no_compile
                )
            results.append(result)
            record["kernels"].append(result.to_dict())
            record["gates"] += result.gates()
    _print_kernels(console, results, arguments.elements)


def _merges(arguments: argparse.Namespace, record: dict[str, Any], console: Console) -> None:
    threads = max(arguments.threads) if arguments.threads else None
    results = []
    for i, shape in enumerate(arguments.shapes):
        with tempfile.TemporaryDirectory(prefix="ires-bench-", dir=arguments.dir) as name:
            folder = Path(name)
            with console.status(f"writing models of {shape.parameters / 1e6:,.0f} M parameters"):
                triple = write_triple(folder, shape)
            compared = merges.verify(triple, folder, threads)
            size = f"{triple.nbytes / 1e9:.3g} GB"
            line = f"merge of {size} models: {compared:,} elements equal the reference bit for bit"
            _verified(record, console, line)
            with console.status(f"merging models of {size}"):
                result = merges.measure(
                    triple, folder, arguments.rounds, threads=threads, cold=arguments.cold, only_one_pass=i > 0
                )
        results.append(result)
        record["merges"].append(result.to_dict())
        record["gates"] += result.gates()
    record["gates"] += merges.cost_per_byte(results)
    _print_merges(console, results)


def _mapped(arguments: argparse.Namespace, record: dict[str, Any], console: Console) -> None:
    threads = max(arguments.threads) if arguments.threads else min(16, len(os.sched_getaffinity(0)))
    results = []
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory(prefix="ires-bench-", dir=arguments.dir) as name:
            folder = Path(name)
            with console.status(f"writing models of {shape.parameters / 1e6:,.0f} M parameters"):
                triple = write_triple(folder, shape)
            compared = mappings.verify(triple, folder, threads)
            size = f"{triple.nbytes / 1e9:.3g} GB"
            _verified(record, console, f"mapped models of {size}: {compared:,} bytes equal those that apply makes")
            with console.status(f"changing mapped models of {size}"):
                result = mappings.measure(triple, folder, arguments.rounds, threads=threads)
        results.append(result)
        record["mapped"].append(result.to_dict())
        record["gates"] += result.gates()
    table = _table(f"In place through mapped pages, {threads} threads, no fsync: time as a multiple of apply's", "way")
    for column in ("model GB", "seconds", "GB/s", f"/ {merges.BARE}", f"/ {mappings.FLOOR}"):
        table.add_column(column, justify="right")
    for result in results:
        for name, seconds in result.times.items():
            median = Quartiles.of(seconds).median
            table.add_row(
                name,
                f"{result.triple.nbytes / 1e9:.3g}",
                f"{median:.2f}",
                f"{4 * result.triple.nbytes / median / 1e9:.2f}",
                _shown(result.of(name, merges.BARE)),
                _shown(result.of(name, mappings.FLOOR)),
            )
    console.print(table)


def _on_gpu(arguments: argparse.Namespace, device: Accelerator, record: dict[str, Any], console: Console) -> None:
    record |= {"gpu": device.facts(), "workloads": []}
    names = gpu.available(device.place)
    loads = gpu.workloads(arguments.elements, SHAPES[arguments.list], arguments.list)
    loads = [load for load in loads if re.search(arguments.cases, load.name)]
    compared = sum(gpu.verify(load, device) for load in loads)
    line = f"{compared} results of {len(loads)} workloads ({', '.join(names)}) equal the reference bit for bit"
    _verified(record, console, line)
    rows, missing = [], []
    for load in loads:
        with console.status(load.name):
            result = gpu.measure(load, device, arguments.rounds, with_compiled=not arguments.no_compile)
        device.release()
        record["workloads"].append(result.to_dict())
        rows += result.rows()
        missing += [f"{load.name}: {name}: {why}" for name, why in result.unavailable.items()]
        speeds = (f"{name} {result.gb_per_second(name):,.0f}" for name in (gpu.COPY, *names))
        console.print(f"{load.name}, GB/s read and written: {', '.join(speeds)}", soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="ires-bench-", dir=arguments.dir) as name:
        folder, (shape,) = Path(name), arguments.shapes
        with console.status(f"writing models of {shape.parameters / 1e6:,.0f} M parameters"):
            triple = write_triple(folder, shape)
        compared = merges.verify(triple, folder, device=f"{device.place}")
        line = f"merge on the device: {compared:,} elements equal the reference bit for bit"
        _verified(record, console, line)
        with console.status("merging"):
            merged = gpu_merges.measure(triple, folder, device, arguments.rounds)
    rows += merged.rows()
    record |= {"merge_on_gpu": merged.to_dict(), "comparisons": rows}
    for line in missing:
        console.print(f"not measured: {line}", soft_wrap=True, markup=False)
    _print_gpu(console, device, names, rows)


def _file_name(gpu_name: str, commit: str | None) -> str:
    """Such as nvidia-h200-1a2b3c4, with a + behind it where files differ from the commit."""
    head, plus, _ = (commit or "unknown").partition("+")
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + f"-{head[:7]}{plus}"


def _powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, … and the limit itself."""
    return sorted({1 << i for i in range(limit.bit_length())} | {limit})


def _verified(record: dict[str, Any], console: Console, line: str) -> None:
    record["verified"].append(line)
    console.print(f"verified: {line}", soft_wrap=True)


def _machine_line(facts: dict[str, Any]) -> str:
    memory = f"{facts['memory_bytes'] / 2**30:.0f} GiB" if facts["memory_bytes"] else "memory unknown"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    commit = facts["commit"] or "unknown"
    return f"{facts['cpu']}, {facts['cores']} cores, {memory}, {facts['kernel']}\n{versions}, commit {commit}"


def _shown(quartiles: Quartiles | None, suffix: str = "") -> str:
    """Median and quartiles."""
    if quartiles is None:
        return "–"
    return f"{quartiles.median:.2f}{suffix} [dim]{quartiles.low:.2f}–{quartiles.high:.2f}[/dim]"


def _print_kernels(console: Console, results: list[kernels.Result], elements: int) -> None:
    ours = kernels.ours()
    table = _table(f"Kernels, {elements:,} elements: speed as a fraction of a pure memory loop's", "operation")
    other = _table(f"Kernels, {elements:,} elements: how many times as fast {ours[0]} is as torch's", "operation")
    for name in ("threads", "memory GB/s", *ours):
        table.add_column(name, justify="right")
    for name in ("threads", *TORCH):
        other.add_column(name, justify="right")
    for result in results:
        size = result.case.bytes_per_element * result.elements
        seconds = result.times.get(kernels.MEMORY)
        speed = f"{size / Quartiles.of(seconds).median / 1e9:.1f}" if seconds else "–"
        first = (result.case.name, f"{result.threads}")
        table.add_row(*first, speed, *(_shown(result.of_memory(name)) for name in ours))
        marks = {name: "*" if result.differs.get(name) else "" for name in TORCH}
        other.add_row(*first, *(_shown(result.faster_than(name), mark) for name, mark in marks.items()))
    console.print(table)
    console.print(other)
    console.print("* not the bits of the definition in all elements: more than one rounding, or fused operations")
    for line in dict.fromkeys(f"{name}: {why}" for result in results for name, why in result.unavailable.items()):
        console.print(f"not measured: {line}", soft_wrap=True, markup=False)


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    return table


def _print_merges(console: Console, results: list[merges.Result]) -> None:
    cache = "inputs dropped from the page cache" if results[0].cold else "page cache warm where the models fit"
    title = f"Whole merges to a new folder, {cache}: time as a multiple of cat + cp"
    table = _table(title, "job")
    for name in ("model GB", "seconds", "GB/s", "/ cat + cp", "ns/byte", "private MB"):
        table.add_column(name, justify="right")
    for result in results:
        for name, seconds in result.times.items():
            median = Quartiles.of(seconds).median
            one_pass = name == merges.ONE_PASS
            table.add_row(
                name,
                f"{result.triple.nbytes / 1e9:.3g}",
                f"{median:.2f}",
                f"{result.traffic[name] / median / 1e9:.2f}",
                _shown(result.of_copy(name)),
                f"{median * 1e9 / result.traffic[name]:.3f}",
                f"{result.memory / 1e6:.0f}" if one_pass else "",
            )
    console.print(table)


def _print_gpu(console: Console, device: Accelerator, names: list[str], rows: list[dict[str, Any]]) -> None:
    """The last table: what was measured of each backend, beside what is wanted (information only)."""
    table = _table(f"{device.name}: median and quartiles; what is wanted informs and fails nothing", "what")
    for name in ("wanted", *names):
        table.add_column(name, justify="right")
    for row in rows:
        sign = "≤" if row["at_most"] else "≥"
        wanted = "" if row["wanted"] is None else f"{sign} {row['wanted']:g}"
        found = (row["measured"].get(name) for name in names)
        table.add_row(row["what"], wanted, *(_shown(Quartiles(**x) if x else None) for x in found))
    console.print(table)


def _print_gates(console: Console, gates: Iterable[dict[str, Any]]) -> None:
    table = _table("Wanted, hoped for, measured (information only)", "what")
    for name in ("wanted", "reach for", "measured"):
        table.add_column(name, justify="right")
    for gate in gates:
        sign = "≤" if gate["at_most"] else "≥"
        numbers = f"{sign} {gate['gate']:g}", f"{sign} {gate['reach']:g}", f"{gate['measured']:.3g}"
        table.add_row(gate["what"], *numbers)
    if table.rows:
        console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
