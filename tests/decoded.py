"""The numbers of quantized weights on a disk, as recognition, the bytes of runs and decoding give them together."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ires_kernels.backends.companions import fault
from ires_kernels.backends.decoding import decode
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.checkpoints.schemes import quantized
from ires_kernels.checkpoints.validation import open_checkpoint


def read(ref: TensorRef, begin: int = 0, size: int | None = None) -> memoryview:
    """Bytes of a stored tensor."""
    with ref.path.open("rb") as file:
        file.seek(ref.offset + begin)
        return memoryview(bytearray(file.read(ref.nbytes - begin if size is None else size)))


def numbers(ref: QuantizedRef) -> Tensor:
    """The elements of a run of a quantized weight."""
    parts = {part: read(each) for part, each in ref.parts[1:]}
    parts["codes"] = read(ref.codes, *ref.span(0, ref.numel))
    out = torch.full((ref.numel,), torch.nan)
    decode(ref.format, ref.full, ref.first, ref.numel, parts, out)
    return out


def weights(folder: Path, *, sound: bool = True) -> dict[str, Tensor]:
    """All quantized weights of a model in float32, each of which is the same whole as in runs.

    sound  that nothing is wrong with their companions
    """
    found = quantized(open_checkpoint(folder))
    assert found.refused == {}
    made = {}
    for name, ref in found.weights.items():
        parts = {part: read(each) for part, each in ref.parts[1:]}
        assert bool(fault(ref.format, ref.full, parts)) != sound
        whole = numbers(ref)
        for first, count in _runs(ref.numel):
            run = numbers(ref.run(first, count))
            assert torch.equal(run.view(torch.int32), whole[first : first + count].view(torch.int32))  # NaN as well
        made[name] = whole.view(ref.shape)
    return made


def _runs(count: int) -> list[tuple[int, int]]:
    draw = random.Random(count)
    cuts = sorted({0, count, *(draw.randrange(1, count) for _ in range(8))}) if count > 1 else [0, count]
    return [(begin, end - begin) for begin, end in pairwise(cuts)]
