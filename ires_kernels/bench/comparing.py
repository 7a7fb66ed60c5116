"""`ires compare` as a whole process, beside `cat` of the three models, which does nothing but read them."""

from __future__ import annotations

import subprocess
import sys

import torch

import ires_kernels as ik
from ires_kernels.backends.fit import Fit
from ires_kernels.backends.fitting import definition
from ires_kernels.bench.kernels import VerificationError
from ires_kernels.bench.measure import interleave
from ires_kernels.bench.merges import read, weights
from ires_kernels.bench.result import Goal, Result
from ires_kernels.bench.start import environment
from ires_kernels.bench.synthetic import Triple
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.streaming.cpu import TORCH_DTYPES

CAT, COMMAND, CALL = "cat of all three", "ires compare", "ik.compare, in a process that runs"
WANTED = 1.3

_SUMS = ("elements", "both", "conflicts", "base", "drift", "update", "exact")
_CHECKED = 5
"""Tensors that are compared, those that come first and the smallest ones."""


def verify(triple: Triple, threads: int | None = None) -> int:
    """Compare, and hold some tensors against the definition; returns how many elements. Raises VerificationError."""
    found = ik.compare(triple.target, (triple.instruct, triple.base), threads=threads).tensors
    roles = [open_checkpoint(path).tensors for path in (triple.target, triple.instruct, triple.base)]
    names = [*list(found)[:2], *sorted(found, key=lambda name: found[name].elements)[:_CHECKED]]
    for name in dict.fromkeys(names):
        operands = []
        for tensors in roles:
            ref = tensors[name]
            with open(ref.path, "rb") as file:
                file.seek(ref.offset)
                operands.append(torch.frombuffer(bytearray(file.read(ref.nbytes)), dtype=TORCH_DTYPES[ref.dtype]))
        t, x, y = operands
        wanted = definition(t, x, y, (1.0,), t.dtype)
        wanted.exact = wanted.update
        wrong = [each for each in _SUMS if not _alike(found[name], wanted, each)]
        if wrong or found[name].within != wanted.within:
            raise VerificationError(f"compare: {', '.join(wrong or ['steps'])} of {name!r} differ. Nothing was timed.")
    return sum(found[name].elements for name in dict.fromkeys(names))


def _alike(found: Fit, wanted: Fit, name: str) -> bool:
    got, want = getattr(found, name), getattr(wanted, name)
    return bool(abs(got - want) <= 1e-6 * abs(want))


def measure(triple: Triple, rounds: int, *, threads: int | None = None) -> Result:
    """Time them in turns, after `verify` has read all of it into the page cache, if it fits there."""
    pair = ["--instruct", f"{triple.instruct}", "--base", f"{triple.base}", "--quiet"]
    more = ["--threads", f"{threads}"] if threads else []
    command = [sys.executable, "-m", "ires_kernels", "compare", f"{triple.target}", *pair, *more]

    def run() -> None:
        subprocess.run(command, env=environment(), check=True)

    def call() -> None:
        ik.compare(triple.target, (triple.instruct, triple.base), threads=threads)

    folders = triple.target, triple.instruct, triple.base
    run()  # what is imported is compiled
    times = interleave({CAT: lambda: read(*folders), COMMAND: run, CALL: call}, rounds)
    nbytes = sum(path.stat().st_size for folder in folders for path in weights(folder))
    goals = [Goal(COMMAND, CAT, WANTED)]
    facts = {**triple.facts(), "threads": threads}
    traffic = dict.fromkeys(times, nbytes)
    return Result(f"compare of {triple.models}", facts, times, traffic, by="time", yardsticks=(CAT,), goals=goals)
