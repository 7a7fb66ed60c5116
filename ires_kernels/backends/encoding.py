"""New codes of quantized weights, for the formats that `Format.is_encoded`: in plain torch, which is the definition, or
by the C++ loops.

A code is that of RN(value / scale), one rounding to float32, rounded to what codes are: to nearest, ties to even, or by
32 random bits. The scales are those that are there as long as they serve: a block whose largest |value| / scale still
rounds to the largest code, being within half a step of it, keeps its own. Another one gets a new scale, the largest
|value| over `_RANGE`, in the dtype of scales, and to the next power of two above it where those of the weight are such
numbers. It is finite whatever the values: where the largest of float16 is too small, codes saturate. No number that a
rule of quantizers gives to a block of zeros is needed: zeros never need a new scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ires_kernels.backends import decoding, native
from ires_kernels.backends.call import Call, Coded
from ires_kernels.backends.choice import choose
from ires_kernels.backends.reference import random_words, round_to, subnormals_kept
from ires_kernels.backends.weight import Grid, as_bytes, floats
from ires_kernels.formats import Format, matrices

_LARGEST = {"F8_E4M3": 448.0, "I8": 127.0}
_RANGE = {"F8_E4M3": 448.0, "I8": 127.5}
"""What the largest of a block is divided by; of integers half a step more, as compressed-tensors has it."""
_LIMIT = {"F8_E4M3": 464.0, "I8": 128.0}
"""The largest |value| / scale that serves; of integers that of -128, which files hold."""
_SCALES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CAST = torch.float8_e4m3fn


def block_count(format: Format, full: tuple[int, ...]) -> int:
    """How many blocks of a weight have a scale each."""
    many, height, width = matrices(full)
    grid = Grid.of(format, full)
    return many * height // grid.height * -(-grid.height // grid.rows) * -(-width // grid.columns) if width else 0


def measure(format: Format, full: tuple[int, ...], first: int, values: Tensor, largest: Tensor) -> None:
    """Take the elements from the flat index `first` on into account in `largest`, the largest |value| of each block.

    Of finite values: no scale makes room for others.
    """
    if choose(values.device) is native and native.measure(format, full, first, values, largest):
        return
    magnitude = values.abs()
    magnitude = torch.where(magnitude.isfinite(), magnitude, 0.0)
    largest.scatter_reduce_(0, _blocks(format, full, first, len(values)), magnitude, "amax")


@subnormals_kept()
def new_scales(format: Format, largest: Tensor, scales: memoryview) -> tuple[memoryview, Tensor | None]:
    """The bytes of all scales: those that serve as they are, and others where blocks have larger values than before.

    Also returns which are new, None where none is.
    """
    stored = torch.frombuffer(bytearray(scales), dtype=torch.uint8)
    dtype, codes = format.word("scale"), _codes(format)
    before = floats(stored, dtype)
    renewed = largest / before.abs() > _LIMIT[codes]
    if not renewed.any():
        return scales, None
    wanted = largest[renewed] / torch.tensor(_RANGE[codes])
    mantissa, _ = torch.frexp(before)
    if dtype == "F8_E8M0" or bool((mantissa == 0.5).all()):
        mantissa, exponent = torch.frexp(wanted)
        exponent = (exponent - (mantissa == 0.5).int()).clamp(-127, 15 if dtype == "F16" else 127)
        wanted = torch.exp2(exponent.double()).float()
    if dtype == "F8_E8M0":
        stored[renewed] = (exponent + 127).to(torch.uint8)
    else:
        typed = stored.view(_SCALES[dtype])
        typed[renewed] = round_to(wanted.clamp(max=torch.finfo(typed.dtype).max), typed.dtype)
    return stored.numpy().data, renewed


@subnormals_kept()
def encode(
    format: Format,
    full: tuple[int, ...],
    first: int,
    values: Tensor,
    scales: memoryview,
    out: Tensor,
    random: tuple[int, int] | None = None,
) -> None:
    """The codes of values, the elements from the flat index `first` on of a weight of the shape `full`, as bytes.

    What no code is large enough for gets the largest one. `random` is the seed and stream of a stochastic rounding.
    """
    if choose(values.device) is native and native.encode(format, full, first, values, scales, out, random):
        return
    stored = torch.frombuffer(bytearray(scales), dtype=torch.uint8)
    scale = floats(stored, format.word("scale"), _blocks(format, full, first, len(values)))
    words = None if random is None else random_words(*random, first, len(values))
    codes, largest = _codes(format), _LARGEST[_codes(format)]
    if codes == "F8_E4M3":
        out.copy_(round_to((values / scale).clamp(-largest, largest), _CAST, words).view(torch.uint8))
    else:
        exact = (values / scale).double().clamp(-largest - 1, largest)
        whole = exact.round() if words is None else (exact + words.double() / 2.0**32).floor()
        out.copy_(whole.clamp(-largest - 1, largest).nan_to_num().to(torch.int8).view(torch.uint8))


def measure_results(
    call: Call, coded: Mapping[int, Coded], format: Format, full: tuple[int, ...], largest: Tensor
) -> None:
    """`measure` of what a call gives for one item, with operands that are decoded as in `decoding.run`.

    Its output, float32, is memory for that. Its offset counts within the weight.
    """
    fused = decoding.settle(call, coded)
    if choose(largest.device) is native:
        native.measure_results(call, fused, format, full, largest)
    else:
        choose(largest.device).run(call)
        measure(format, full, call.offset, call.outs[0], largest)


def store(
    call: Call, coded: Mapping[int, Coded], to: Coded, renewed: bool, random: tuple[int, int] | None, codes: Tensor
) -> None:
    """Make codes, as bytes, of what a call gives for one item, with operands that are decoded as in `decoding.run`.

    Its output, float32, is memory for that. `to` has the codes of the target until now, and the scales that there are
    now; `renewed` says that its numbers by these are not operand 0, as the scales are others than before, or it is
    another operand. A number that is what it was keeps its code. The call's tally counts what is stored.
    """
    fused = decoding.settle(call, coded)
    if choose(codes.device) is native:
        native.store(call, fused, to, renewed, random, codes)
        return
    format, full, first, parts = to
    target, values, count = call.inputs[0][0], call.outs[0], len(codes)
    again = target
    choose(codes.device).run(call)
    encode(format, full, first, values, parts["scale"], codes, random)
    if renewed:
        again = torch.empty(count)
        decoding.decode(format, full, first, count, parts, again)
    _keep(values, again, as_bytes(parts["codes"]), codes)
    if call.tally is not None:
        update, stored = torch.empty(2, count)
        inputs = (torch.zeros(count), *call.inputs[0][1:])  # what is added to 0 is the update
        choose(codes.device).run(call._replace(outs=[update], inputs=[inputs], tally=None))
        decoding.decode(format, full, first, count, {**parts, "codes": codes.numpy().data}, stored)
        tally = call.tally
        tally.lost, tally.nan_out, tally.dot, tally.norm2, tally.noise = _count_stored(target, update, values, stored)


def _keep(values: Tensor, again: Tensor, before: Tensor, codes: Tensor) -> None:
    """Put back the codes of `before` where they still stand for the values: where these are what is decoded `again`.

    So what a merge leaves as it is keeps its bytes: -0 beside 0, and the sign of NaN.
    """
    torch.where((values == again) | (values.isnan() & again.isnan()), before, codes, out=codes)


class _Stored(NamedTuple):
    """What was stored as codes, counted as a `Tally` counts; `noise` is the sum of (stored - value)^2."""

    lost: int
    nan_out: int
    dot: float
    norm2: float
    noise: float


def _count_stored(target: Tensor, update: Tensor, values: Tensor, stored: Tensor) -> _Stored:
    """Count what is decoded from new codes: `stored` for `values`, which are `target` and `update` together."""
    lost = (stored == target) & (update != 0) & ~update.isnan()
    measured = update.isfinite() & target.isfinite() & stored.isfinite()
    by = torch.where(measured, update, 0).double()
    moved = torch.where(measured, stored.double() - target.double(), 0)
    off = torch.where(values.isfinite() & stored.isfinite(), stored.double() - values.double(), 0)
    sums = (float(torch.dot(one, two)) for one, two in ((moved, by), (by, by), (off, off)))
    return _Stored(int(lost.sum()), int(stored.isnan().sum()), *sums)


def _codes(format: Format) -> str:
    return "I8" if format.name.startswith("int8") else "F8_E4M3"


def _blocks(format: Format, full: tuple[int, ...], first: int, count: int) -> Tensor:
    """The flat index of the block of each element."""
    index, width = torch.arange(first, first + count), matrices(full)[2]
    return Grid.of(format, full).block(index // width, index % width)
