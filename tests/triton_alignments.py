"""Every mix of storage types in every alignment, through the Triton kernels: a program for test_triton_gpu.py.

`triton_alignments.py PART PARTS` takes every PARTS-th of the mixes, because each is a kernel of its own that takes a
second to compile. It names those that differ from the reference, one a line, and prints last how many it compared.
Without a GPU, TRITON_INTERPRET=1 lets it run on the CPU.
"""

from __future__ import annotations

import itertools
import os
import sys

import torch
from oracle import NARROW, codes, sample, short
from torch import Tensor

from ires_kernels.backends import reference
from ires_kernels.backends import triton as backend
from ires_kernels.backends.call import Call

TYPES = [torch.float32, *NARROW]
# How many elements after a multiple of 16 bytes the target and the two operands begin.
SHIFTS = list(itertools.product((0, 1), (0, 2), (0, 3)))
N = 2 * 2048 + 333  # two whole blocks, and the beginning of one
MIXES = list(itertools.product(TYPES, TYPES, TYPES, SHIFTS))


def shifted(x: Tensor, shift: int, device: str) -> Tensor:
    """A copy on the device, so many elements after a multiple of 16 bytes."""
    memory = torch.empty(len(x) + 64, dtype=x.dtype, device=device)
    start = -memory.data_ptr() % 64 // x.element_size() + shift
    return memory[start : start + len(x)].copy_(x)


def differing(mix: tuple[torch.dtype, torch.dtype, torch.dtype, tuple[int, ...]], device: str) -> int:
    """How many elements of `target += 0.7 * (x - y)` have other bits than the reference."""
    *dtypes, shifts = mix
    operands = [sample(dtype, N, seed) for seed, dtype in enumerate(dtypes)]
    results = []
    for run, where in ((reference.run, "cpu"), (backend.run, device)):
        t, x, y = (shifted(x, shift, where) for x, shift in zip(operands, shifts, strict=True))
        run(Call("add_difference", [t], [(t, x, y)], (0.7,), False, 0, [0], 0, None))
        results.append(t.cpu())
    wanted, got = results
    nan = wanted.double().isnan()
    return int(((codes(wanted) != codes(got)) & ~nan.numpy()).sum() + (got.double().isnan() != nan).sum())


def main() -> None:
    part, parts = map(int, sys.argv[1:])
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    mine = MIXES[part::parts]
    for mix in mine:
        wrong = differing(mix, device)
        if wrong:
            *dtypes, shifts = mix
            print(f"{' '.join(map(short, dtypes))} shifted by {shifts}: {wrong} of {N}")
    print(len(mine))


if __name__ == "__main__":
    main()
