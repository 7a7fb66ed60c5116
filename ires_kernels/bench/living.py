"""`ik.apply_` to a module in memory, beside a memory loop over the same numbers, which computes nothing.

The loop finds all of it in memory, where `apply_` reads the pair of models from the page cache and keeps what it takes
to undo it. So there are four of them: the first in a process, whose memory for that is fresh; those that follow it, as
of a sweep over alpha; one that keeps it packed, which follows another; and one that keeps nothing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ires_kernels as ik
from ires_kernels.backends import native
from ires_kernels.backends.call import threads as kernel_threads
from ires_kernels.bench.kernels import MEMORY, VerificationError
from ires_kernels.bench.measure import Ways, interleave
from ires_kernels.bench.result import Goal, Result
from ires_kernels.bench.synthetic import Triple
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.live import snapshot
from ires_kernels.streaming.cpu import TORCH_DTYPES

KERNEL = "the kernel, in memory"
FIRST, AGAIN, PACKED, UNKEPT = "apply_, first", "apply_, again", 'apply_, undo="packed"', "apply_, undo=False"
WANTED = 0.8


class Live:
    """A module that holds the target, and instruct and base in memory beside it, for the loops."""

    def __init__(self, triple: Triple) -> None:
        self.pair = triple.instruct, triple.base
        self.target, *self.others = (_read(path) for path in (triple.target, *self.pair))
        self.before = {name: values.clone() for name, values in self.target.items()}
        self.module = nn.Module()
        for name, values in self.target.items():
            *path, last = name.split(".")
            at = self.module
            for part in path:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at.get_submodule(part)
            at.register_parameter(last, nn.Parameter(values, requires_grad=False))
        self.module.eval()

    def apply(self, threads: int, *, undo: bool | str = True) -> ik.Applied:
        """All of it, with half of the residual."""
        return ik.apply_(self.module, self.pair, 0.5, threads=threads, undo=undo)

    def restore(self) -> None:
        """Give the module the bits of the target's files."""
        for name, values in self.target.items():
            values.copy_(self.before[name])

    def touch(self, threads: int) -> None:
        """The memory loop."""
        for name, values in self.target.items():
            native.memory_loop(values, (values, *(each[name] for each in self.others)), threads)()

    def compute(self, threads: int) -> None:
        """The kernel: nothing else, and nothing that lasts."""
        token = kernel_threads.set(threads)
        try:
            instruct, base = (list(each.values()) for each in self.others)
            ik.add_difference_(list(self.target.values()), instruct, base, alpha=0.5)
        finally:
            kernel_threads.reset(token)


def _read(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for name, ref in open_checkpoint(folder).tensors.items():
        raw = np.fromfile(ref.path, np.uint8, ref.nbytes, offset=ref.offset)
        tensors[name] = torch.from_numpy(raw).view(TORCH_DTYPES[ref.dtype]).reshape(ref.shape)
    return tensors


def verify(live: Live, triple: Triple, threads: int) -> tuple[int, int]:
    """Apply, undo, and compare with what `load` makes and what was there.

    Returns how many elements, and how many bytes were kept of them. Raises VerificationError.
    """
    wanted = ik.load(triple.target, live.pair, alpha=0.5, threads=threads)
    applied = live.apply(threads, undo="packed")
    wrong = [name for name, values in live.target.items() if not torch.equal(values, wanted[name])]
    applied.undo()
    wrong += [name for name, values in live.target.items() if not torch.equal(values, live.before[name])]
    if wrong:
        raise VerificationError(
            f"live: {wrong[0]!r} has not the bits of load, or not those from before. Nothing timed."
        )
    return sum(values.numel() for values in live.before.values()), applied.nbytes


def measure(live: Live, triple: Triple, rounds: int, threads: int) -> Result:
    """Time them in turns."""
    ways: Ways = {MEMORY: partial(live.touch, threads)} if native.isas() else {}
    ways[KERNEL] = partial(live.compute, threads)
    applied: list[ik.Applied] = []
    for name, undo in ((FIRST, True), (AGAIN, True), (PACKED, "packed"), (UNKEPT, False)):
        ways[name] = lambda undo=undo: applied.append(live.apply(threads, undo=undo))  # type: ignore[misc]

    def before(name: str) -> None:
        if name == FIRST:
            snapshot.forget()

    def after(name: str) -> None:
        if name in (FIRST, AGAIN, PACKED):
            applied[0].undo()
        elif name == UNKEPT:
            live.restore()  # or the module would be another one soon
        applied.clear()

    times = interleave(ways, rounds, before=before, after=after)
    traffic = dict.fromkeys(times, 4 * triple.nbytes)  # what is kept apart
    goals = [Goal(AGAIN, MEMORY, WANTED), *(Goal(name, MEMORY) for name in (FIRST, PACKED, UNKEPT))]
    facts = {**triple.facts(), "threads": threads}
    what = f"apply_ to a module of {triple.nbytes / 1e9:.3g} GB"
    return Result(what, facts, times, traffic, by="speed", yardsticks=(MEMORY,), goals=goals)
