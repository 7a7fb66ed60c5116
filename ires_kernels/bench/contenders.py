"""What people write in torch for the same operations: the contenders that are not ours.

The plain expression (`EAGER`), the same with float32 in between (`UPCAST`), a loop over pieces with reused float32
scratch, of the best size (`CHUNKED`), and the expression compiled by torch (`COMPILED`). For lists of tensors on a GPU,
a chain of torch's own functions for lists (`FOREACH`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

ALPHA = 0.7
EAGER, UPCAST, CHUNKED, COMPILED, FOREACH = "eager", "eager f32", "chunked f32", "compiled", "foreach"
TORCH = (EAGER, UPCAST, CHUNKED, COMPILED)
_CHUNKS = [1 << i for i in range(14, 21, 2)]

Way = Callable[[Tensor, Sequence[Tensor]], object]
"""Takes the output and the operands; out is the first operand but for "subtract"."""


def torch_contenders(op: str, stochastic: bool, chunk: int) -> dict[str, Way]:
    """The ways to do "subtract", "add" or "add_difference"; for stochastic rounding only the loop."""
    chunked = _Chunked(op, stochastic, chunk)
    if stochastic:
        return {CHUNKED: chunked}
    result = expressions(op)
    return {**result, CHUNKED: chunked, COMPILED: compiled(result[UPCAST])}


def expressions(op: str) -> dict[str, Way]:
    """EAGER and UPCAST."""
    if op == "subtract":
        return {
            EAGER: lambda out, x: out.copy_(x[0] - x[1]),
            UPCAST: lambda out, x: out.copy_(x[0].float() - x[1].float()),
        }
    if op == "add":
        return {
            EAGER: lambda out, x: out.add_(_addable(x[1], out), alpha=ALPHA),
            UPCAST: lambda out, x: out.copy_(out.float() + ALPHA * x[1].float()),
        }
    return {
        EAGER: lambda out, x: out.add_(x[1] - x[2], alpha=ALPHA),
        UPCAST: lambda out, x: out.copy_(out.float() + ALPHA * (x[1].float() - x[2].float())),
    }


def foreach(op: str, outs: list[Tensor], columns: Sequence[list[Tensor]]) -> None:
    """FOREACH: "add" or "add_difference" of whole lists, rounded to the stored type after every step."""
    if op == "add":
        torch._foreach_add_(outs, [_addable(x, out) for x, out in zip(columns[1], outs, strict=True)], alpha=ALPHA)
    else:
        torch._foreach_add_(outs, torch._foreach_sub(columns[1], columns[2]), alpha=ALPHA)


def compiled(way: Way) -> Way:
    """Compiles on the first call: importing the compiler alone takes seconds, and may fail."""
    compile_once = cache(lambda: torch.compile(way, dynamic=False))
    return lambda out, x: compile_once()(out, x)


def _addable(residual: Tensor, out: Tensor) -> Tensor:
    """torch adds no float8 to anything."""
    return residual.to(out.dtype) if residual.element_size() == 1 else residual


class _Chunked:
    """The best that plain torch allows: pieces that stay in cache, scratch that is reused, no copies of float32."""

    def __init__(self, op: str, stochastic: bool, chunk: int) -> None:
        self.op, self.stochastic, self.chunk = op, stochastic, chunk
        self.scratch = torch.empty(3, chunk)

    def __call__(self, out: Tensor, operands: Sequence[Tensor]) -> None:
        for start in range(0, out.numel(), self.chunk):
            stop = start + self.chunk
            self._piece(out[start:stop], [operand[start:stop] for operand in operands])

    def _piece(self, out: Tensor, x: Sequence[Tensor]) -> None:
        wide = [
            piece if piece.dtype == torch.float32 else row[: len(piece)].copy_(piece)
            for piece, row in zip(x, self.scratch, strict=False)
        ]
        if self.op == "subtract":
            torch.sub(wide[0], wide[1], out=out)
            return
        residual = wide[1]
        if self.op == "add_difference":
            residual = torch.sub(wide[1], wide[2], out=self.scratch[1][: len(out)])
        wide[0].add_(residual, alpha=ALPHA)
        if self.stochastic:
            # as is common for bfloat16: random bits below the 16 that stay, then truncation
            bits = wide[0].view(torch.int32)
            noise = self.scratch[1][: len(out)].view(torch.int32).random_(0, 1 << 16)
            bits.add_(noise).bitwise_and_(-(1 << 16))
        if out.dtype != torch.float32:
            out.copy_(wide[0])


def best_chunk(op: str, stochastic: bool, out: Tensor, operands: Sequence[Tensor]) -> int:
    """The size of a piece that makes CHUNKED fastest here, in elements."""
    part = slice(0, 1 << 22)
    pieces = [operand[part] for operand in operands]
    seconds = dict.fromkeys(_CHUNKS, math.inf)
    for chunk in _CHUNKS * 2:
        run, started = _Chunked(op, stochastic, chunk), time.perf_counter()
        run(out[part], pieces)
        seconds[chunk] = min(seconds[chunk], time.perf_counter() - started)
    return min(seconds, key=lambda chunk: seconds[chunk])
