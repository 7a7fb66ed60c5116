"""Check, choose a backend, run: what an operation does once its arguments are lined up as rows of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ires_kernels import checks, regions
from ires_kernels.backends import Call, Tally, choose, thread_count
from ires_kernels.checks import Names, Rounding

_PART = regions.POPULATED // 4  # bytes of mapped operands, so that work on the first of a long list begins soon


def apart(
    names: Names,
    inputs: list[tuple[Tensor, ...]],
    factors: tuple[float, ...],
    given: list[Tensor] | None,
    dtype: torch.dtype | None,
    rounding: Rounding,
    tally: Tally | None,
) -> list[Tensor]:
    """Compute into the tensors `given`, or into new ones of `dtype`, or else of the operation's own choice."""
    if tally is not None and not isinstance(tally, Tally):
        raise TypeError(f"{names.op}: tally is of type {type(tally).__name__}, wanted an ires_kernels.Tally")
    shape_only = checks.operands(names, inputs, given, in_place=False, tally=tally is not None)
    outs = given or [torch.empty_like(row[0], dtype=dtype or _default_dtype(names.op, row)) for row in inputs]
    call = _call(names, outs, inputs, factors, rounding, tally)
    _run(call, given or (), shape_only)
    return outs


def in_place(
    names: Names,
    inputs: list[tuple[Tensor, ...]],
    factors: tuple[float, ...],
    rounding: Rounding,
) -> None:
    """Compute into the first operand of every item; where nothing would be added, only check."""
    shape_only = checks.operands(names, inputs, None, in_place=True)
    outs = [row[0] for row in inputs]
    call = _call(names, outs, inputs, factors, rounding, None)
    if any(factors) or names.op == "scale_":
        _run(call, outs, shape_only)


def _call(
    names: Names,
    outs: list[Tensor],
    inputs: list[tuple[Tensor, ...]],
    factors: tuple[float, ...],
    rounding: Rounding,
    tally: Tally | None,
) -> Call:
    op = names.op
    checks.factors_in_range(op, factors, outs, inputs)
    return Call(
        op.rstrip("_"),
        outs,
        inputs,
        factors,
        checks.stochastic(rounding.mode, op),
        checks.unsigned(rounding.seed, op, "seed"),
        checks.streams(rounding.stream, len(outs), op),
        checks.unsigned(rounding.offset, op, "offset"),
        tally,
    )


def _run(call: Call, written: Sequence[Tensor], shape_only: bool) -> None:
    """Run on the backend for the device; autograd learns which tensors that existed before have changed."""
    if not call.outs:
        return
    backend = None if shape_only else choose(call.outs[0].device)
    for t in written:
        torch.autograd.graph.increment_version(t)
    if backend is None:
        return
    if not regions.is_any():
        backend.run(call)
        return
    for part in _parts(call):
        regions.populate(_ranges(part), thread_count())
        backend.run(part)


def _parts(call: Call) -> Iterator[Call]:
    """Calls one after the other that do what `call` does, each of not more tensors than have to be there at once."""
    first = size = 0
    for i, row in enumerate(call.inputs):
        more = sum(x.numel() * x.element_size() for x in row)
        if size and size + more > _PART:
            yield _part(call, first, i)
            first, size = i, 0
        size += more
    yield _part(call, first, len(call.outs))


def _part(call: Call, first: int, stop: int) -> Call:
    part = slice(first, stop)
    return call._replace(outs=call.outs[part], inputs=call.inputs[part], streams=call.streams[part])


def _ranges(call: Call) -> Iterator[tuple[int, int, bool]]:
    """The memory of the operands that have theirs in one piece, and whether it is written."""
    for out, row in zip(call.outs, call.inputs, strict=True):
        for x in (out, *(x for x in row if x is not out)):
            if x.device.type == "cpu" and x.numel() and x.is_contiguous():
                yield x.data_ptr(), x.numel() * x.element_size(), x is out


def _default_dtype(op: str, row: tuple[Tensor, ...]) -> torch.dtype:
    if op != "subtract":
        return row[0].dtype
    return torch.float64 if any(x.dtype == torch.float64 for x in row) else torch.float32
