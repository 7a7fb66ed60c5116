"""Check, choose a backend, run: what an operation does once its arguments are lined up as rows of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ires_kernels.backends.call import Call, Tally
from ires_kernels.backends.choice import choose, thread_count
from ires_kernels.tensors import checks, regions, scalars
from ires_kernels.tensors.names import Names
from ires_kernels.tensors.scalars import Rounding

_PART = 256 << 20
"""Bytes of operands that have to be there at once where some are mapped files: what is populated long before it is used
may be gone by then, and work begins sooner."""


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
    scalars.factors_in_range(op, factors, outs, inputs)
    return Call(
        op.rstrip("_"),
        outs,
        inputs,
        factors,
        scalars.stochastic(rounding.mode, op),
        scalars.unsigned(rounding.seed, op, "seed"),
        scalars.streams(rounding.stream, len(outs), op),
        scalars.unsigned(rounding.offset, op, "offset"),
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
    """Calls one after the other that do what `call` does, of not many more bytes each than `_PART`."""
    first = size = 0
    for i, (out, row) in enumerate(zip(call.outs, call.inputs, strict=True)):
        width = sum(x.element_size() for x in (out, *row))
        more = width * out.numel()
        if size and size + more > _PART:
            yield _items(call, first, i)
            first, size = i, 0
        size += more
        if size > _PART and all(x.is_contiguous() for x in (out, *row)):  # then it is alone
            step = max(1, _PART // width)
            yield from (_piece(call, i, start, step) for start in range(0, out.numel(), step))
            first, size = i + 1, 0
    if first < len(call.outs):
        yield _items(call, first, len(call.outs))


def _items(call: Call, first: int, stop: int) -> Call:
    part = slice(first, stop)
    return call._replace(outs=call.outs[part], inputs=call.inputs[part], streams=call.streams[part])


def _piece(call: Call, item: int, start: int, count: int) -> Call:
    """Some elements of one item; their random bits are those that they have in the whole."""
    part = slice(start, start + count)
    out, row = call.outs[item].view(-1)[part], call.inputs[item]
    operands = tuple(out if x is call.outs[item] else x.view(-1)[part] for x in row)
    return call._replace(
        outs=[out], inputs=[operands], streams=[call.streams[item]], offset=(call.offset + start) % (1 << 64)
    )


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
