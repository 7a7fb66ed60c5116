"""The operations as torch.library operators, for what must see every operation: torch.compile, export, dispatch modes.

    torch.ops.ires_kernels.subtract(a[], b[], *, dtype, …) -> Tensor[]        subtract.out(…, outs[]) -> ()
    torch.ops.ires_kernels.add(t[], residual[], alpha[], …)                   add.out, add_
    torch.ops.ires_kernels.scale(t[], s, …)                                   scale.out, scale_
    torch.ops.ires_kernels.add_difference(t[], x[], y[], alpha, …)            add_difference.out, add_difference_
    torch.ops.ires_kernels.add_differences(t[], x[], y[], alpha[], …)         add_differences.out, add_differences_

Tensors come as lists. `residual` holds len(alpha) tensors for the first target, then those for the second, and so on;
x and y of add_differences, which is add_difference of several pairs, likewise.
Integers are 64 bits with a sign, as torch has them: `seed`, `stream` and `offset` stand for themselves modulo 2^64.
`stream` holds one for every target, or nothing for 0, 1, 2, …

`apart` and `in_place` take the arguments of their namesakes in `launch` and go through these operators to them. While
tracing, tensors have no memory: devices, shapes, dtypes and autograd are checked then, and memory when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ires_kernels.backends.call import Tally
from ires_kernels.tensors import checks, launch, scalars
from ires_kernels.tensors.names import Names
from ires_kernels.tensors.scalars import Rounding

_TENSORS = {
    "subtract": ("a", "b"),
    "add": ("t", "residual"),
    "scale": ("t",),
    "add_difference": ("t", "x", "y"),
    "add_differences": ("t", "x", "y"),
}
_FACTORS = {
    "subtract": "",
    "add": ", float[] alpha",
    "scale": ", float s",
    "add_difference": ", float alpha",
    "add_differences": ", float[] alpha",
}
_OPTIONS = 'str rounding="nearest", SymInt seed=0, SymInt[] stream=[], SymInt offset=0'


def apart(
    names: Names,
    inputs: list[tuple[Tensor, ...]],
    factors: tuple[float, ...],
    given: list[Tensor] | None,
    dtype: torch.dtype | None,
    rounding: Rounding,
    tally: Tally | None,
) -> list[Tensor]:
    """`launch.apart` by way of the dispatcher."""
    if tally is not None:
        raise RuntimeError(f"{names.op}: tally= counts as it runs and cannot be traced; call it outside torch.compile")
    operator = _operator(names.op, factors)
    arguments, options = _pack(names.op, inputs, factors, rounding)
    if not inputs:
        return []
    if given is None:
        outs: list[Tensor] = operator.default(*arguments, dtype=dtype, **options)
        return outs
    operator.out(*arguments, outs=given, **options)
    return given


def in_place(
    names: Names,
    inputs: list[tuple[Tensor, ...]],
    factors: tuple[float, ...],
    rounding: Rounding,
) -> None:
    """`launch.in_place` by way of the dispatcher."""
    operator = _operator(names.op, factors)
    arguments, options = _pack(names.op, inputs, factors, rounding)
    if inputs:
        operator.default(*arguments, **options)


def _operator(op: str, factors: tuple[float, ...]) -> Any:
    several = op.startswith("add_difference") and len(factors) > 1
    return getattr(torch.ops.ires_kernels, op.replace("difference", "differences") if several else op)


def _pack(
    op: str,
    inputs: list[tuple[Tensor, ...]],
    factors: tuple[float, ...],
    rounding: Rounding,
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of an operator. torch.compile traces this: plain Python that it can follow."""
    options = {
        "rounding": rounding.mode,
        "seed": _signed(scalars.unsigned(rounding.seed, op, "seed")),
        "stream": [_signed(x) for x in scalars.streams(rounding.stream, len(inputs), op)],
        "offset": _signed(scalars.unsigned(rounding.offset, op, "offset")),
    }
    scalars.stochastic(rounding.mode, op)
    if op in {"add", "add_"}:
        return [[row[0] for row in inputs], [x for row in inputs for x in row[1:]], list(factors)], options
    if op in {"add_difference", "add_difference_"} and len(factors) > 1:
        columns = [[row[0] for row in inputs], *([x for row in inputs for x in row[i::2]] for i in (1, 2))]
        return [*columns, list(factors)], options
    width = len(inputs[0]) if inputs else 0
    return [*([row[i] for row in inputs] for i in range(width)), *factors], options


def _unpack(op: str, arguments: Sequence[Any]) -> tuple[Names, list[tuple[Tensor, ...]], tuple[float, ...]]:
    """What `_pack` made arguments of."""
    tensors = _TENSORS[op.rstrip("_")]
    if not _FACTORS[op.rstrip("_")].endswith("[] alpha"):
        columns, factors = arguments[: len(tensors)], tuple(arguments[len(tensors) :])
        inputs = checks.rows(Names(op, tensors, listed=True), *columns)
        return Names(op, tensors, len(columns[0]) > 1), inputs, factors
    t, *columns, alpha = arguments
    width = len(alpha)
    for name, column in zip(tensors[1:], columns, strict=True):
        if len(column) != len(t) * width:
            raise ValueError(f"{op}: {name} has {len(column)} tensors for {len(t)} targets of {width} alphas each")
    grouped = [[column[i * width : (i + 1) * width] for i in range(len(t))] for column in columns]
    if len(columns) == 1:
        _, inputs = checks.residual_rows(op, t, *grouped)
    else:
        op = op.replace("differences", "difference")
        _, inputs = checks.pair_rows(op, t, *grouped)
    return Names(op, tensors, len(t) > 1, width > 1, len(columns) > 1), inputs, tuple(alpha)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _kernel(op: str, *, fake: bool) -> Callable[..., list[Tensor] | None]:
    """What an operator does, or for tensors without memory and numbers that may be symbols, what is known of it."""

    def kernel(
        *arguments: Any,
        outs: list[Tensor] | None = None,  # torch.compile would take an argument "out" for a contiguous one
        dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        stream: Sequence[int] = (),
        offset: int = 0,
    ) -> list[Tensor] | None:
        names, inputs, factors = _unpack(op, arguments)
        how = Rounding(rounding, 0, 0, 0)
        if fake:
            factors = (1.0,) * len(factors)
        else:
            factors = tuple(scalars.factor(x, f"{op}: a factor") for x in factors)
            how = Rounding(rounding, seed % 2**64, [x % 2**64 for x in stream] or 0, offset % 2**64)
        if op.endswith("_"):
            launch.in_place(names, inputs, factors, how)
            return None
        results = launch.apart(names, inputs, factors, outs, dtype, how, None)
        return results if outs is None else None

    return kernel


def _define(op: str) -> None:
    tensors, factor = [f"Tensor[] {x}" for x in _TENSORS[op]], _FACTORS[op]
    pure = ", ".join(tensors) + factor
    schemas = {
        op: f"({pure}, *, ScalarType? dtype=None, {_OPTIONS}) -> Tensor[]",
        f"{op}.out": f"({pure}, *, {_OPTIONS}, Tensor(a!)[] outs) -> ()",
    }
    if op != "subtract":
        written = ", ".join(["Tensor(a!)[] t", *tensors[1:]]) + factor
        schemas[f"{op}_"] = f"({written}, *, {_OPTIONS}) -> ()"
    for name, schema in schemas.items():
        base = name.removesuffix(".out")
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _kernel(base, fake=False), "CompositeExplicitAutograd")
        torch.library.register_fake(f"ires_kernels::{name}", _kernel(base, fake=True), lib=_LIBRARY)


_LIBRARY = cast(Any, torch.library).Library("ires_kernels", "DEF")  # the operators live as long as this does
for _op in _TENSORS:
    _define(_op)
