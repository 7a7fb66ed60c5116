"""The parts of a run: each verifies, measures and prints its own."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ires_kernels.bench import gpu, gpu_merges, kernels, mappings, merges, outlook, quantized, start
from ires_kernels.bench.accelerator import Accelerator
from ires_kernels.bench.arguments import kernel_threads
from ires_kernels.bench.contenders import TORCH
from ires_kernels.bench.report import Report
from ires_kernels.bench.result import Result
from ires_kernels.bench.synthetic import SHAPES, Shape, Triple, write_triple
from ires_kernels.bench.tables import print_contenders, print_ratios, print_unavailable
from ires_kernels.streaming.stream import default_threads


def ahead(arguments: argparse.Namespace) -> Iterator[outlook.Outlook]:
    """What every part of the run will take."""
    rounds, compiled = arguments.rounds, not arguments.no_compile
    if "gpu" in arguments.parts:
        yield outlook.of_gpu(arguments.chosen, arguments.shapes[0], rounds, compiled=compiled)
    if "kernels" in arguments.parts:
        threads = kernel_threads(arguments)
        yield outlook.of_kernels(arguments.chosen, arguments.elements, threads, rounds, compiled=compiled)
    if "quantized" in arguments.parts:
        yield outlook.of_quantized(len(quantized.CASES), arguments.elements, kernel_threads(arguments), rounds)
    if "merge" in arguments.parts:
        yield outlook.of_merges(arguments.shapes, rounds, brief=arguments.quick)
    if "fp8" in arguments.parts:
        yield outlook.of_fp8(arguments.shapes, rounds)
    if "mapped" in arguments.parts:
        yield outlook.of_mapped(arguments.shapes, rounds)
    if "compare" in arguments.parts:
        yield outlook.of_comparing(arguments.shapes, rounds)
    if "live" in arguments.parts:
        yield outlook.of_living(arguments.shapes, rounds)
    if "scale" in arguments.parts:
        yield outlook.of_scale(arguments.shapes, rounds, arguments.nodes)
    if "start" in arguments.parts:
        yield outlook.of_start(rounds)


def _kernels(arguments: argparse.Namespace, report: Report) -> None:
    cases, threads = arguments.chosen, kernel_threads(arguments)
    compared = sum(kernels.verify(case, threads) for case in cases)
    ours = kernels.ours()
    what = f"{len(cases)} kernels ({', '.join(ours)}; threads {threads})"
    report.say_verified(f"{compared} results of {what} equal the reference bit for bit")
    for case in cases:
        for count in threads:
            with report.console.status(f"{case.name}, threads {count}"):
                result = kernels.measure(
                    case, arguments.elements, count, arguments.rounds, compiled=not arguments.no_compile
                )
            report.kernels.append(result)
    title = f"Kernels, {arguments.elements:,} elements:"
    print_ratios(
        report.console,
        f"{title} speed as a fraction of a pure memory loop's",
        report.kernels,
        {name: (name, kernels.MEMORY) for name in ours},
        speed_of=kernels.MEMORY,
    )
    print_ratios(
        report.console,
        f"{title} how many times as fast {ours[0]} is as torch's",
        report.kernels,
        {name: (ours[0], name) for name in TORCH},
    )
    line = "* not the bits of the definition in all elements: more than one rounding, or fused operations"
    report.console.print(line)
    print_unavailable(report.console, report.kernels)


def _quantized(arguments: argparse.Namespace, report: Report) -> None:
    threads, ours = kernel_threads(arguments), kernels.ours()
    compared = sum(quantized.verify(case, threads) for case in quantized.CASES)
    report.say_verified(f"{compared} results of quantized weights ({', '.join(ours)}) equal the definition bit for bit")
    for case in quantized.CASES:
        for count in threads:
            with report.console.status(f"{case.name}, threads {count}"):
                report.quantized.append(quantized.measure(case, arguments.elements, count, arguments.rounds))
    print_ratios(
        report.console,
        f"Quantized weights, {arguments.elements:,} elements: speed as a fraction of a pure memory loop's",
        report.quantized,
        {name: (name, kernels.MEMORY) for name in ours},
        speed_of=kernels.MEMORY,
    )


def _merges(arguments: argparse.Namespace, report: Report) -> None:
    threads = max(arguments.threads) if arguments.threads else None
    for i, shape in enumerate(arguments.shapes):
        with _models(arguments, shape, report.console) as (triple, folder):
            compared = merges.verify(triple, folder, threads)
            report.say_verified(f"merge of {triple.models}: {compared:,} elements equal the reference bit for bit")
            with report.console.status(f"merging {triple.models}"):
                result = merges.measure(
                    triple,
                    folder,
                    arguments.rounds,
                    threads=threads,
                    cold=arguments.cold,
                    only_one_pass=i > 0 or arguments.quick,
                )
        report.merges.append(result)
    report.across += merges.cost_per_byte(report.merges)
    cache = "inputs dropped from the page cache" if arguments.cold else "page cache warm where the models fit"
    title = f"Whole merges, {cache}"
    print_contenders(report.console, title, report.merges, {"private MB": _private_megabytes})


def _fp8(arguments: argparse.Namespace, report: Report) -> None:
    from ires_kernels.bench import fp8

    threads = max(arguments.threads) if arguments.threads else None
    for shape in arguments.shapes:
        with _models(arguments, shape, report.console) as (triple, folder), report.console.status("merging in fp8"):
            report.fp8.append(fp8.measure(triple, folder, arguments.rounds, threads=threads))
    print_contenders(report.console, "Merges of fp8 models, and by hand: decode, merge, encode", report.fp8)


def _private_megabytes(result: Result, name: str) -> str:
    found = result.notes.get(name, {}).get("private_memory_bytes")
    return "" if found is None else f"{found / 1e6:.0f}"


def _mapped(arguments: argparse.Namespace, report: Report) -> None:
    threads = max(arguments.threads) if arguments.threads else default_threads()
    for shape in arguments.shapes:
        with _models(arguments, shape, report.console) as (triple, folder):
            compared = mappings.verify(triple, folder, threads)
            report.say_verified(f"mapped {triple.models}: {compared:,} bytes equal those that apply makes")
            with report.console.status(f"changing mapped {triple.models}"):
                report.mapped.append(mappings.measure(triple, folder, arguments.rounds, threads=threads))
    title = f"In place through mapped pages, threads {threads}, no fsync"
    print_contenders(report.console, title, report.mapped)


def _comparing(arguments: argparse.Namespace, report: Report) -> None:
    from ires_kernels.bench import comparing

    threads = max(arguments.threads) if arguments.threads else None
    for shape in arguments.shapes:
        with _models(arguments, shape, report.console) as (triple, _):
            compared = comparing.verify(triple, threads)
            report.say_verified(f"compare of {triple.models}: {compared:,} elements are counted as by the definition")
            with report.console.status(f"comparing {triple.models}"):
                report.looked.append(comparing.measure(triple, arguments.rounds, threads=threads))
    print_contenders(report.console, "Three models, page cache warm where they fit", report.looked)


def _living(arguments: argparse.Namespace, report: Report) -> None:
    from ires_kernels.bench import living

    threads = max(arguments.threads) if arguments.threads else default_threads()
    for shape in arguments.shapes:
        with _models(arguments, shape, report.console) as (triple, _):
            live = living.Live(triple)
            compared, kept = living.verify(live, triple, threads)
            report.say_verified(f"apply_ and undo: {compared:,} elements have the bits of load, and those from before")
            report.say_verified(f'undo="packed" keeps {8 * kept / compared:.2f} bits of each element')
            with report.console.status(f"changing a module of {triple.nbytes / 1e9:.3g} GB"):
                report.looked.append(living.measure(live, triple, arguments.rounds, threads))
    print_contenders(report.console, f"Live on the CPU, threads {threads}", report.looked)


def _scale(arguments: argparse.Namespace, report: Report) -> None:
    from ires_kernels.bench import nodes, scale

    (shape,) = arguments.shapes
    with _models(arguments, shape, report.console) as (triple, folder):
        with report.console.status(f"workers of one machine, {triple.models}"):
            local = nodes.locally(triple, folder, arguments.rounds)
        report.say_verified("two workers write the bytes of one process")
        report.workers.append(local)
        print_contenders(report.console, "A folder that both see, with all fsyncs", report.workers)
        with report.console.status("start, planning, finishing"):
            known = nodes.costs(folder, arguments.rounds, local)
    runs = []
    of_source = nodes.SHORT[1] * nodes.LINK
    for count, source in (*((count, math.inf) for count in arguments.nodes), (nodes.SHORT[0], of_source)):
        with (
            tempfile.TemporaryDirectory(prefix="ires-bench-", dir=arguments.dir) as name,
            report.console.status(f"{count} processes behind links"),
        ):
            runs.append(nodes.simulate(Path(name), count, nodes.LAYERS * count, known, link=nodes.LINK, source=source))
    report.say_verified(f"{', '.join(map(str, arguments.nodes))} workers behind links write the bytes of one process")
    report.scale = nodes.record(known, runs)
    report.console.print(nodes.costs_line(known), soft_wrap=True)
    title = (
        f"Each node behind a link of {nodes.LINK / 1e6:g} MB/s, the last ones behind one of {of_source / 1e6:g} as well"
    )
    report.console.print(f"{title}\n{nodes.table(runs)}", soft_wrap=True)
    for title, cluster in scale.TABLES.items():
        report.console.print(f"{title}\n{scale.table(cluster)}", soft_wrap=True)


def _start(arguments: argparse.Namespace, report: Report) -> None:
    with _models(arguments, SHAPES["tiny"], report.console) as (triple, folder):
        peaks = start.weigh(triple, folder)
        report.say_verified(f"start: {len(peaks)} commands end as they should")
        with report.console.status("starting commands"):
            report.start.append(start.measure(triple, folder, arguments.rounds, peaks))
    title = "Whole processes, time as a multiple of others'"
    print_contenders(report.console, title, report.start, {"peak MB": _peak_megabytes})


def _peak_megabytes(result: Result, name: str) -> str:
    return f"{result.notes[name]['peak_memory_bytes'] / 1e6:.0f}"


def on_gpu(arguments: argparse.Namespace, device: Accelerator, report: Report) -> None:
    """The workloads of `gpu`, and merges with the device."""
    names = gpu.available(device.place)
    loads = arguments.chosen
    compared = sum(gpu.verify(load, device) for load in loads)
    what = f"{len(loads)} workloads ({', '.join(names)})"
    report.say_verified(f"{compared} results of {what} equal the reference bit for bit")
    for load in loads:
        with report.console.status(load.name):
            result = gpu.measure(load, device, arguments.rounds, with_compiled=not arguments.no_compile)
        device.release()
        report.kernels.append(result)
        speeds = (f"{name} {result.gb_per_second(name):,.0f}" for name in (gpu.COPY, *names))
        report.console.print(f"{load.name}, GB/s read and written: {', '.join(speeds)}", soft_wrap=True)
    (shape,) = arguments.shapes
    with _models(arguments, shape, report.console) as (triple, folder):
        compared = merges.verify(triple, folder, device=f"{device.place}")
        report.say_verified(f"merge on the device: {compared:,} elements equal the reference bit for bit")
        with report.console.status(f"merging {triple.models}"):
            report.merges.append(gpu_merges.measure(triple, folder, device, arguments.rounds))
    print_unavailable(report.console, report.kernels)


@contextmanager
def _models(arguments: argparse.Namespace, shape: Shape, console: Console) -> Iterator[tuple[Triple, Path]]:
    """Three models and the folder they lie in, which goes away."""
    with tempfile.TemporaryDirectory(prefix="ires-bench-", dir=arguments.dir) as name:
        with console.status(f"writing models of {shape.parameters / 1e6:,.0f} M parameters"):
            triple = write_triple(name, shape)
        yield triple, Path(name)


PARTS = {
    "kernels": _kernels,
    "quantized": _quantized,
    "merge": _merges,
    "fp8": _fp8,
    "mapped": _mapped,
    "compare": _comparing,
    "live": _living,
    "scale": _scale,
    "start": _start,
}
"""By their names, in the order in which they run."""
