"""The operations in plain torch: the definition that the other backends are held to, and the fallback without them.

Operands are widened to the compute type C, which is exact; every operation is then one IEEE-754 operation in C; and
the result is rounded to the stored type once. That last step is done on integers, where what happens to each bit can
be read off, and not with ``Tensor.to``, which rounds float64 twice and has changed its float8 overflow over the years.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ires_kernels.backends import counting
from ires_kernels.backends.call import Call, Tally
from ires_kernels.backends.choice import BackendStatus
from ires_kernels.dtypes import NUMBERS

PIECE = 1 << 18  # elements computed at a time, so that temporaries stay at a few MB

_F64_FRACTION = (1 << 52) - 1
_U32 = 0xFFFFFFFF


# How a storage type is written, and the integers to view its codes as.
_FORMATS = {getattr(torch, number.torch): number for number in NUMBERS.values()}
_CODES = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def status(device: str = "cpu") -> BackendStatus:
    here = device == "cpu"
    return BackendStatus(here, f"torch {torch.__version__}" if here else "for the CPU only")


@contextmanager
def subnormals_kept() -> Iterator[None]:
    """Undo torch.set_flush_denormal(True), under which torch's own arithmetic is not IEEE's, for the time being."""
    flushing = not torch.full((), 2.0**-126).mul(0.5).item()
    if flushing:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushing:
            torch.set_flush_denormal(True)


@subnormals_kept()
def run(call: Call) -> None:
    for out, operands, stream in zip(call.outs, call.inputs, call.streams, strict=True):
        compute, factors = _in_compute_type(call, out, operands)
        for start, (target, *sources) in _pieces([out, *operands], call.offset):
            values = [x.to(compute) for x in sources]
            result = _result(call.op, values, factors)
            words = random_words(call.seed, stream, start, target.numel()) if call.stochastic else None
            stored = round_to(result, target.dtype, words)
            if call.tally is not None:
                _count(call, call.tally, sources, stored)
            target.copy_(stored)


def _in_compute_type(call: Call, out: Tensor, operands: tuple[Tensor, ...]) -> tuple[torch.dtype, list[Tensor]]:
    """C, and the factors rounded to it."""
    compute = torch.float64 if torch.float64 in {out.dtype, *(x.dtype for x in operands)} else torch.float32
    return compute, [torch.tensor(factor, dtype=compute) for factor in call.factors]


def _pieces(tensors: list[Tensor], start: int) -> Iterator[tuple[int, list[Tensor]]]:
    """The same small part of every tensor, with the flat index of its first element, in row-major order."""
    first = tensors[0]
    if first.numel() <= PIECE:
        yield start, tensors
    elif len(first) == 1:
        yield from _pieces([t[0] for t in tensors], start)
    else:
        half = len(first) // 2
        yield from _pieces([t[:half] for t in tensors], start)
        yield from _pieces([t[half:] for t in tensors], start + first[:half].numel())


def _scaled(op: str, values: list[Tensor], factors: list[Tensor]) -> list[Tensor]:
    """The residuals, or the differences of pairs, times their factors."""
    residuals = values[1:]
    if op == "add_difference":
        residuals = [x - y for x, y in zip(values[1::2], values[2::2], strict=True)]
    return [factor * residual for factor, residual in zip(factors, residuals, strict=True)]


def _result(op: str, values: list[Tensor], factors: list[Tensor]) -> Tensor:
    """The value before it is stored. `+` and `*` stay apart: torch's own ``alpha=`` may fuse them."""
    if op == "scale":
        return factors[0] * values[0]
    if op == "subtract":
        return values[0] - values[1]
    return sum(_scaled(op, values, factors), start=values[0])


def round_to(value: Tensor, dtype: torch.dtype, words: Tensor | None = None) -> Tensor:
    """Round float32 or float64 to a storage type once: to nearest, ties to even, or by 32 random bits per element.

    With |value| = significand * 2^e, the significand a 53-bit integer, the type drops the lowest `drop` bits of it:
    more of them the further the value lies below the type's normal range. To nearest adds half of what is dropped,
    less one unless the kept part is odd, then truncates. Stochastic rounding adds a random number instead, uniform
    below 2^drop in steps of 2^(drop-32). Either way a carry out of the significand is a step of the exponent, because
    the codes of a type count its values in order.
    """
    if value.dtype == dtype or dtype == torch.float64:
        return value.to(dtype)
    form = _FORMATS[dtype]
    bits = value.to(torch.float64).view(torch.int64)
    field = (bits >> 52) & 0x7FF
    significand = torch.where(field == 0, 0, 1 << 52) | (bits & _F64_FRACTION)
    exponent = field.clamp(min=1) - 1023 + form.bias  # as the stored type would write it; < 1 is below its normal range
    drop = 52 - form.fraction + (1 - exponent).clamp(min=0)
    if words is None:
        drop = drop.clamp(max=54)  # 54 or more: less than half of the smallest value, so 0
        odd = (significand >> drop) & 1
        kept = (significand + (torch.ones_like(drop) << (drop - 1)) - 1 + odd) >> drop
    else:
        # (significand + random) >> drop with random = words << (drop - 32), shifted so that it fits in 64 bits
        words = words.view(value.shape)
        below = (drop - 32).clamp(0, 63)
        kept = ((significand >> below) + (words >> (32 - drop).clamp(min=0))) >> drop.clamp(max=32)
    code = ((exponent.clamp(min=1) - 1) << form.fraction) + kept
    # A finite value is never made infinite by chance: only rounding to nearest overflows.
    code = torch.where(code > form.largest, form.infinity if words is None else form.largest, code)
    code = torch.where(value.isinf(), form.infinity, code)
    code = torch.where(value.isnan(), form.nan, code)
    code = code | (bits < 0).to(torch.int64) << (form.bits - 1)
    return code.to(_CODES[form.bits]).view(dtype)


def random_words(seed: int, stream: int, start: int, count: int) -> Tensor:
    """32 random bits each, as int64, for `count` elements from flat index `start` on (modulo 2^64).

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 3.3): the key is the
    seed; the counter is index >> 2 and the stream, 64 bits each; index & 3 picks one of the four words.
    """
    skip = start & 3
    index = ((start >> 2) + torch.arange((skip + count + 3) // 4)) & ((1 << 62) - 1)
    c0, c1 = index & _U32, index >> 32
    c2, c3 = torch.full_like(index, stream & _U32), torch.full_like(index, stream >> 32)
    k0, k1 = seed & _U32, seed >> 32
    for _ in range(10):
        # int64 products wrap, which leaves all 64 bits right; the sign is masked away
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _U32) ^ c1 ^ k0, p1 & _U32, (p0 >> 32 & _U32) ^ c3 ^ k1, p0 & _U32
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return torch.stack((c0, c1, c2, c3), dim=1).view(-1)[skip : skip + count]


@subnormals_kept()
def count(call: Call) -> None:
    """Count into the tally of a call that a backend without counters has carried out, on any device."""
    assert call.tally is not None
    for out, operands in zip(call.outs, call.inputs, strict=True):
        for _, (stored, *sources) in _pieces([out, *operands], 0):
            _count(call, call.tally, sources, stored)


def _count(call: Call, tally: Tally, sources: list[Tensor], stored: Tensor) -> None:
    tally += counting.tally(stored.numel(), counting.count(call.op, sources, call.factors, stored))
