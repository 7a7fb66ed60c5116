"""The tensor operations: line up the arguments, then run, or under torch.compile and dispatch modes be traced.

Common to all. Tensors are float64, float32, float16, bfloat16, float8_e4m3fn or float8_e5m2, mixed freely, of equal
shapes and any strides, on one device. Arithmetic is in IEEE-754 float32, or float64 where a tensor is float64: one
rounding an operation, and one more into the stored type (docs/numerics.md). Every tensor argument may be a sequence of
tensors, and then all are, of one length: one call, with the bits that a loop would give, and few launches on a GPU.

The docstring of each operation says what its arguments are. Errors are those of checks.py, raised before anything is
written. In-place operations return their target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch.compiler import is_compiling

from ires_kernels.backends.call import Tally
from ires_kernels.tensors import checks, launch, library, scalars
from ires_kernels.tensors.names import Names
from ires_kernels.tensors.scalars import Rounding

Tensors: TypeAlias = Tensor | Sequence[Tensor]
T = TypeVar("T", Tensor, Sequence[Tensor])
F = TypeVar("F", bound=Callable[..., Any])

_ROUNDING = """\
Every tensor argument may be a list, and then all are: one call for all of them, with the bits that a loop would give.

rounding    "nearest": ties to even. "stochastic": up or down, with the probabilities that make the mean exact.
seed        of the random bits of stochastic rounding: an integer, 0 <= seed < 2^64
stream      the number of the tensor, so that tensors do not share random bits: an integer as above. For a list one
            integer each, or that of the first: tensor k then draws from stream + k
offset      flat row-major index of the first element in the whole tensor, for callers that hold a piece of it

An element's random bits depend on (seed, stream, its index) alone: neither pieces nor threads nor backends change them.
Two calls with the same seed and stream draw the same bits; their errors are alike and do not average out. So give each
step of a loop a seed of its own, and each tensor a stream of its own.
"""
_APART = """
out         write here, and return it; the default makes a new tensor. It may be exactly an operand
dtype       of the new tensor, torch.float32 or "f32"
"""
_TALLY = """
tally       an ires_kernels.Tally to count into what rounding and overflow did
"""


def _explained(operation: F) -> F:
    """Say in the docstring what the arguments are that many operations have, those that this one has."""
    arguments = inspect.signature(operation).parameters
    rounding, random = _ROUNDING.rsplit("\n\n", 1)
    rounding += _APART.rstrip() if "out" in arguments else ""
    rounding += _TALLY.rstrip() if "tally" in arguments else ""
    operation.__doc__ = f"{inspect.cleandoc(operation.__doc__ or '')}\n\n{rounding}\n\n{random}"
    return operation


@_explained
def subtract(
    a: T,
    b: T,
    *,
    out: T | None = None,
    dtype: torch.dtype | str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    stream: int | Sequence[int] = 0,
    offset: int = 0,
    tally: Tally | None = None,
) -> T:
    """a - b: the residual of an instruct model over its base. dtype defaults to float64 if an operand is, else float32.

    With float32 out of narrower operands nothing is lost to storage (one rounding, that of the subtraction).

        >>> base, instruct = torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([1.5, 2.0]).bfloat16()
        >>> subtract(instruct, base)
        tensor([0.5000, 0.0000])
    """
    names = Names("subtract", ("a", "b"), checks.is_listed(a, "subtract: a"))
    inputs = checks.rows(names, a, b)
    return cast(T, _apart(names, inputs, (), out, dtype, Rounding(rounding, seed, stream, offset), tally))


@_explained
def add(
    t: T,
    residual: Tensors | Sequence[Tensors],
    alpha: float | Sequence[float] = 1.0,
    *,
    out: T | None = None,
    dtype: torch.dtype | str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    stream: int | Sequence[int] = 0,
    offset: int = 0,
    tally: Tally | None = None,
) -> T:
    """t + alpha * residual, or ((t + alpha[0] * residual[0]) + alpha[1] * residual[1]) + … for several residuals.

    For a sequence of targets: a residual for each, or a sequence of k residuals for each, with k alphas or one for all.
    dtype defaults to that of t.

        >>> t, r1, r2 = torch.ones(2), torch.tensor([0.0, 2.0]), torch.tensor([4.0, 0.0])
        >>> add(t, r1, 0.5)
        tensor([1., 2.])
        >>> add(t, [r1, r2], [0.5, -0.25])
        tensor([0., 2.])
    """
    names, inputs = checks.residual_rows("add", t, residual)
    alphas = scalars.factors(alpha, _width(inputs), "add: alpha")
    return cast(T, _apart(names, inputs, alphas, out, dtype, Rounding(rounding, seed, stream, offset), tally))


@_explained
def add_(
    t: T,
    residual: Tensors | Sequence[Tensors],
    alpha: float | Sequence[float] = 1.0,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    stream: int | Sequence[int] = 0,
    offset: int = 0,
) -> T:
    """`add` in place: t += alpha * residual. With every alpha 0, everything is checked and t is left as it is.

    >>> layers = [torch.ones(1000).bfloat16() for _ in range(2)]
    >>> residuals = [torch.full((1000,), 0.001) for _ in range(2)]  # an eighth of what bfloat16 can add to 1
    >>> for step in range(8):
    ...     layers = add_(layers, residuals, rounding="stochastic", seed=step)
    >>> [round(layer.double().mean().item(), 3) for layer in layers]  # to nearest, both would still be 1
    [1.008, 1.008]
    """
    names, inputs = checks.residual_rows("add_", t, residual)
    alphas = scalars.factors(alpha, _width(inputs), "add_: alpha")
    _in_place(names, inputs, alphas, Rounding(rounding, seed, stream, offset))
    return t


@_explained
def scale(
    t: T,
    s: float,
    *,
    out: T | None = None,
    dtype: torch.dtype | str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    stream: int | Sequence[int] = 0,
    offset: int = 0,
) -> T:
    """s * t. dtype defaults to that of t.

    >>> scale(torch.tensor([1.0, -2.0]).half(), 0.5, dtype=torch.float32)
    tensor([ 0.5000, -1.0000])
    """
    names = Names("scale", ("t",), checks.is_listed(t, "scale: t"))
    inputs = checks.rows(names, t)
    factors = (scalars.factor(s, "scale: s"),)
    return cast(T, _apart(names, inputs, factors, out, dtype, Rounding(rounding, seed, stream, offset), None))


@_explained
def scale_(
    t: T,
    s: float,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    stream: int | Sequence[int] = 0,
    offset: int = 0,
) -> T:
    """`scale` in place: t *= s.

    >>> scale_(torch.tensor([1.0, -2.0]), 0.5)
    tensor([ 0.5000, -1.0000])
    """
    names = Names("scale_", ("t",), checks.is_listed(t, "scale_: t"))
    inputs = checks.rows(names, t)
    _in_place(names, inputs, (scalars.factor(s, "scale_: s"),), Rounding(rounding, seed, stream, offset))
    return t


@_explained
def add_difference(
    t: T,
    x: Tensors | Sequence[Tensors],
    y: Tensors | Sequence[Tensors],
    alpha: float | Sequence[float] = 1.0,
    *,
    out: T | None = None,
    dtype: torch.dtype | str | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    stream: int | Sequence[int] = 0,
    offset: int = 0,
    tally: Tally | None = None,
) -> T:
    """t + alpha * (x - y): target, instruct, base, in one pass, with no residual stored. dtype defaults to that of t.

    The same bits as `subtract` into the compute type followed by `add`. With k tensors as x, and k as y or one for all:
    ((t + alpha[0] * (x[0] - y[0])) + alpha[1] * (x[1] - y[1])) + …, rounded once; one alpha is that of each pair. For a
    sequence of targets: an x and a y for each, or a sequence of k for each.

        >>> target, instruct, base = torch.tensor([3.0, 3.0]), torch.tensor([1.5, 2.0]), torch.tensor([1.0, 2.0])
        >>> add_difference(target, instruct, base, 0.5)
        tensor([3.2500, 3.0000])
        >>> code = torch.tensor([1.0, 4.0])
        >>> add_difference(target, [instruct, code], base, [0.5, -1.0])
        tensor([3.2500, 1.0000])
    """
    names, inputs = checks.pair_rows("add_difference", t, x, y)
    factors = scalars.factors(alpha, _pairs(inputs), "add_difference: alpha", "pairs")
    return cast(T, _apart(names, inputs, factors, out, dtype, Rounding(rounding, seed, stream, offset), tally))


@_explained
def add_difference_(
    t: T,
    x: Tensors | Sequence[Tensors],
    y: Tensors | Sequence[Tensors],
    alpha: float | Sequence[float] = 1.0,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    stream: int | Sequence[int] = 0,
    offset: int = 0,
) -> T:
    """`add_difference` in place: t += alpha * (x - y). With every alpha 0, all is checked and t is left as it is.

    >>> target, instruct, base = torch.tensor([3.0, 3.0]), torch.tensor([1.5, 2.0]), torch.tensor([1.0, 2.0])
    >>> add_difference_(target, instruct, base, 0.5)
    tensor([3.2500, 3.0000])
    """
    names, inputs = checks.pair_rows("add_difference_", t, x, y)
    factors = scalars.factors(alpha, _pairs(inputs), "add_difference_: alpha", "pairs")
    _in_place(names, inputs, factors, Rounding(rounding, seed, stream, offset))
    return t


def _apart(
    names: Names,
    inputs: list[tuple[Tensor, ...]],
    factors: tuple[float, ...],
    out: Tensors | None,
    dtype: torch.dtype | str | None,
    rounding: Rounding,
    tally: Tally | None,
) -> Tensors:
    """Compute into out= or into new tensors: one, or a list as the first argument is."""
    if dtype is not None:
        dtype = scalars.storage_dtype(dtype, f"{names.op}: dtype")
    given = None if out is None else checks.outputs(names, out, dtype, len(inputs))
    run = library.apart if is_compiling() or dispatch_modes() else launch.apart
    outs = run(names, inputs, factors, given, dtype, rounding, tally)
    if out is not None:
        return out
    return outs if names.listed else outs[0]


def _in_place(
    names: Names,
    inputs: list[tuple[Tensor, ...]],
    factors: tuple[float, ...],
    rounding: Rounding,
) -> None:
    """Compute into the first operand of every item."""
    run = library.in_place if is_compiling() or dispatch_modes() else launch.in_place
    run(names, inputs, factors, rounding)


def _width(inputs: list[tuple[Tensor, ...]]) -> int:
    """Residuals per target."""
    return len(inputs[0]) - 1 if inputs else 1


def _pairs(inputs: list[tuple[Tensor, ...]]) -> int:
    """Pairs per target."""
    return len(inputs[0]) // 2 if inputs else 1
