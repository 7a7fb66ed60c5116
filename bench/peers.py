"""Whole merges, ours beside other people's, in one run on the same generated Llama-shaped triple.

    python bench/peers.py [--size llama-1b] [--rounds 3] [--json FILE]

Every contender is a process of its own and writes a folder: target + (instruct - base), bf16 in and out. Reported are
wall seconds from start to exit, less those of a process that only imports torch; the ratio of that to ours
in the same round; the most private memory (RssAnon) above that process; and how many elements of the output differ from
a reference in float64 that is rounded once, computed here with numpy alone. mergekit is installed from PyPI into a
virtual environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ires_kernels.bench.measure import Times, Ways, interleave, machine, watch
from ires_kernels.bench.merges import COPY, copy
from ires_kernels.bench.result import Result
from ires_kernels.bench.synthetic import SHAPES, Triple, shape_of, write_triple
from ires_kernels.bench.tables import open_console, print_contenders, print_unavailable
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.validation import open_checkpoint

OURS = "ires apply"
IMPORT = "import torch"
MERGEKIT = "0.1.5"
HERE = Path(__file__).parent
PIECE = 1 << 20  # elements of the reference at a time

MERGEKIT_CONFIG = """\
merge_method: task_arithmetic
base_model: {base}
models:
  - model: {target}
    parameters: {{weight: 1.0}}
  - model: {instruct}
    parameters: {{weight: 1.0}}
"""


@dataclass
class Contender:
    """A way to merge: what to run, and what was found."""

    name: str
    command: list[str]
    peaks: list[int] = field(default_factory=list)
    elements: int = 0
    differs: int = 0
    missing: list[str] = field(default_factory=list)
    """Tensors of the target that the output lacks."""
    failure: str = ""

    def run(self) -> None:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = watch(self.command, env=env)
        if done.code:
            raise RuntimeError(f"{self.name} exited with {done.code}: {done.output[-2000:]}")
        self.peaks.append(done.peak)


def main() -> int:
    """Generate, check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="llama-1b", help=f"{', '.join(SHAPES)}, 500M parameters, or 500MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", help="where models are written and removed (default: $TMPDIR)")
    parser.add_argument("--venv", default=HERE / ".venv", type=Path, help="of mergekit; made if missing (bench/.venv)")
    parser.add_argument("--no-mergekit", action="store_true", help="only what needs no download")
    parser.add_argument("--json", help="write everything as JSON")
    arguments = parser.parse_args()
    console = open_console()
    facts = machine()
    console.print(f"{facts['cpu']}, {facts['cores']} cores, {facts['kernel']}, {facts['versions']}")
    unavailable = {}
    mergekit = None
    if not arguments.no_mergekit:
        try:
            mergekit = install_mergekit(arguments.venv)
        except subprocess.CalledProcessError as error:
            unavailable["mergekit"] = f"{error.cmd} exited with {error.returncode}"
    with tempfile.TemporaryDirectory(prefix="ires-peers-", dir=arguments.dir) as name:
        folder = Path(name)
        triple = write_triple(folder, shape_of(arguments.size))
        console.print(
            f"{triple.parameters:,} parameters, {triple.nbytes / 1e9:.3g} GB a model; computing the reference"
        )
        write_reference(triple, folder / "reference")
        out = folder / "out"
        contenders = list_contenders(triple, out, mergekit)
        for contender in contenders:
            console.print(f"checking {contender.name}")
            check(contender, triple, folder / "reference", out)
        able = [contender for contender in contenders if not contender.failure]
        (folder / "reference").unlink()
        torch_alone = Contender(IMPORT, [sys.executable, "-c", "import torch"])
        ways: Ways = {COPY: partial(copy, triple, out)}
        ways |= {contender.name: contender.run for contender in (torch_alone, *able)}
        times = interleave(ways, arguments.rounds, after=lambda _: shutil.rmtree(out, ignore_errors=True))
    unavailable |= {contender.name: contender.failure for contender in contenders if contender.failure}
    result = result_of(triple, times, torch_alone, able, unavailable)
    title = "Whole processes, what they take above one that imports torch"
    print_contenders(
        console, title, [result], {"private MiB": private_mebibytes, "differ": share_that_differs, "missing": missing}
    )
    print_unavailable(console, [result])
    if arguments.json:
        record = {"machine": facts, "merges": [result.to_dict()]}
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0


def install_mergekit(folder: Path) -> Path:
    """The mergekit-yaml of the virtual environment `folder`, which is made if it is not there."""
    program = folder / "bin" / "mergekit-yaml"
    if not program.exists():
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
        # torch first and alone, in the version that runs here: nothing else may choose its build
        subprocess.run([*pip, f"torch=={torch.__version__.partition('+')[0]}"], check=True)
        subprocess.run([*pip, f"mergekit=={MERGEKIT}"], check=True)
    return program


def list_contenders(triple: Triple, out: Path, mergekit: Path | None) -> list[Contender]:
    """Ours first."""
    base, instruct, target = (str(path) for path in triple[:3])
    ours = [sys.executable, "-m", "ires_kernels", "apply", target, "--instruct", instruct, "--base", base]
    ours += ["-o", str(out), "--quiet"]
    loops = [sys.executable, str(HERE / "peer_loops.py")]
    paths = [target, instruct, base, str(out)]
    contenders = [
        Contender(OURS, [*ours, "--no-sync"]),
        Contender(f"{OURS}, fsync", ours),
        Contender("PyTorch loop, fixed f32 buffers", [*loops, "chunked", *paths]),
        Contender("safetensors loop, tensor by tensor, f32", [*loops, "tensorwise", *paths]),
    ]
    config = MERGEKIT_CONFIG.format(base=base, instruct=instruct, target=target)
    modes = {
        "bf16": "dtype: bfloat16\n",
        "f32 math, bf16 out": "dtype: float32\nout_dtype: bfloat16\n",
    }
    for i, (mode, dtype) in enumerate(modes.items() if mergekit else ()):
        path = out.with_name(f"mergekit-{i}.yaml")
        path.write_text(config + dtype)
        contenders.append(Contender(f"mergekit {MERGEKIT}, {mode}", [str(mergekit), "--quiet", str(path), str(out)]))
    return contenders


def check(contender: Contender, triple: Triple, reference: Path, out: Path) -> None:
    """Run once, untimed, and compare the output with the reference, value by value."""
    try:
        contender.run()
        wanted = np.memmap(reference, np.uint16, mode="r")
        merged, start = open_checkpoint(out).tensors, 0
        for name, ref in open_checkpoint(triple.target).tensors.items():
            got = merged.get(name)
            if got is None:
                contender.missing.append(name)
            elif (got.dtype, got.shape) != (ref.dtype, ref.shape):
                raise RuntimeError(f"{name!r} is {got.dtype} {got.shape}, wanted {ref.dtype} {ref.shape}")
            else:
                contender.elements += got.numel
                for done, values in pieces(got):
                    contender.differs += differing(values, wanted[start + done : start + done + len(values)])
            start += ref.numel
    except (RuntimeError, ValueError) as error:
        contender.failure = f"{error}"
    finally:
        contender.peaks.clear()
        shutil.rmtree(out, ignore_errors=True)


def differing(a: NDArray[np.uint16], b: NDArray[np.uint16]) -> int:
    """bf16 codes of other values; zeros of either sign are one."""
    return int(((a != b) & (((a | b) & 0x7FFF) != 0)).sum())


def pieces(ref: TensorRef) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    """Flat index and bf16 codes."""
    for start in range(0, ref.numel, PIECE):
        count = min(PIECE, ref.numel - start)
        yield start, np.fromfile(ref.path, np.uint16, count, offset=ref.offset + 2 * start)


def write_reference(triple: Triple, path: Path) -> None:
    """target + (instruct - base) in float64, rounded once to bf16: the tensors of the target one after the other."""
    target, instruct, base = (
        open_checkpoint(folder).tensors for folder in (triple.target, triple.instruct, triple.base)
    )
    with open(path, "wb") as file:
        for name in target:
            parts = zip(pieces(target[name]), pieces(instruct[name]), pieces(base[name]), strict=True)
            for (_, t), (_, i), (_, b) in parts:
                file.write(to_bf16(from_bf16(t) + (from_bf16(i) - from_bf16(b))).data)


def from_bf16(codes: NDArray[np.uint16]) -> NDArray[np.float64]:
    return (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def to_bf16(x: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Round finite numbers to nearest, ties to even, once: by way of float32 rounded to odd, which keeps ties apart."""
    nearest = x.astype(np.float32)
    wide = nearest.astype(np.float64)
    towards_zero = nearest.view(np.uint32) - (np.abs(wide) > np.abs(x))
    bits = (towards_zero | (wide != x)).astype(np.uint32)
    codes: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return codes


def result_of(
    triple: Triple, times: Times, torch_alone: Contender, contenders: list[Contender], unavailable: dict[str, str]
) -> Result:
    """What was measured, less what a process takes that only imports torch; copying takes what it takes."""
    above, notes = {COPY: times[COPY]}, {}
    for each in contenders:
        whole = times[each.name]
        above[each.name] = [seconds - others for seconds, others in zip(whole, times[IMPORT], strict=False)]
        notes[each.name] = {
            "process_seconds": whole,
            "private_memory_bytes": max(each.peaks),
            "above_import_bytes": max(each.peaks) - max(torch_alone.peaks),
            "elements": each.elements,
            "differs": each.differs,
            "missing": each.missing,
        }
    return Result(
        triple.models,
        {**triple.facts(), "import_seconds": times[IMPORT], "import_memory_bytes": max(torch_alone.peaks)},
        above,
        dict.fromkeys(above, 4 * triple.nbytes),
        by="time",
        yardsticks=(OURS,),
        notes=notes,
        unavailable=unavailable,
    )


def private_mebibytes(result: Result, name: str) -> str:
    return f"{result.notes[name]['above_import_bytes'] / 2**20:.0f}" if name in result.notes else ""


def share_that_differs(result: Result, name: str) -> str:
    found = result.notes.get(name)
    if not found:
        return ""
    return f"{found['differs'] / found['elements']:.4%}" if found["differs"] else "0"


def missing(result: Result, name: str) -> str:
    tensors = result.notes[name]["missing"] if name in result.notes else []
    return f"{len(tensors)} tensors" if tensors else "0" if name in result.notes else ""


if __name__ == "__main__":
    raise SystemExit(main())
