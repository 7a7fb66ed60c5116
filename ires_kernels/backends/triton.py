"""The Triton kernels (triton_kernels.py): GPUs of any maker, where the extension was not built for them.

A kernel is compiled when a mix of dtypes first comes up, in about a second, and kept in Triton's cache on disk; sizes,
strides, factors, seeds and streams are arguments and compile nothing. The kernels run on the caller's current stream,
wait for nothing and allocate nothing, except the tables of lists, and that more than four residuals, or two pairs, take
a scratch tensor in the compute type.

Tensors of a list that have one mix of dtypes take a launch for every 256 of them, and a table of their pointers: it is
written in pinned memory and copied to the device on the stream, both from torch's pools. A launch a tensor, at some 90
microseconds of Python, kept an H100 at .77 to .90 of a copy. One launch a tensor is what remains where a CUDA graph is
captured, which would read the table again when it is replayed, and for tensors that are strided or off a multiple of 16
bytes, and for more than two residuals. Memory is accessed 16 bytes at a time where an operand is contiguous
and starts at a multiple of 16 bytes; strided tensors, and stochastic rounding at an offset that is not a multiple of 4,
go element by element.

Under TRITON_INTERPRET=1, set before the first use, the same kernels run on the CPU, very slowly: that is for tests.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ires_kernels.backends import coded, reference
from ires_kernels.backends.call import Call
from ires_kernels.backends.choice import BackendStatus
from ires_kernels.formats import Format, span

try:
    import triton

    from ires_kernels.backends import triton_kernels as kernels
except ImportError as error:
    triton = None
    _missing = f"Triton is not installed or does not load ({error}); pip install triton"

# Triton's drivers for a device type of torch.
_DRIVERS = {"cuda": ("nvidia", "amd"), "xpu": ("intel",)}
_THREADS = 128  # of a program
# float8_e4m3fn is not known to every target; triton_kernels.py tells the two by the sign of the integer.
_CODES = {torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.int8}


class _Target(NamedTuple):
    casts: int  # what the hardware converts: triton_kernels.py
    warps: int


class _Dim(NamedTuple):
    size: int
    steps: tuple[int, ...]  # of out, of every operand, then of the flat index if it matters; in elements


@cache
def status(device: str = "cuda") -> BackendStatus:
    """Available where Triton is installed and has a driver for devices of this type."""
    if triton is None:
        return BackendStatus(False, _missing)
    version = f"Triton {triton.__version__}"
    if device == "cpu":
        if _interpreted():
            return BackendStatus(True, f"{version}, interpreted")
        return BackendStatus(False, "for GPUs only; TRITON_INTERPRET=1 interprets the kernels, for tests")
    drivers = [name for name, found in triton.backends.backends.items() if found.driver.is_active()]
    drivers = [name for name in drivers if name in _DRIVERS.get(device, ())]
    if not drivers:
        return BackendStatus(False, f"{version} finds no driver for {device} devices (torch {torch.__version__})")
    if device == "cuda" and _release() < (3, 7) and not torch.version.hip:
        majors = [torch.cuda.get_device_capability(i)[0] for i in range(torch.cuda.device_count())]
        if max(majors, default=0) >= 10:
            return BackendStatus(False, f"{version} fuses products with sums on this GPU; wanted 3.7 or later")
    return BackendStatus(True, f"{version}, {', '.join(drivers)}")


def run(call: Call) -> None:
    """Compute `call` on the current stream of the tensors' device; a tally is counted by plain torch.

    Raises RuntimeError, or torch.OutOfMemoryError, with what was computed, when Triton, the device or torch refuses.
    """
    device = call.outs[0].device
    with _on(device):
        target = _target(device)
        for number, (items, work) in enumerate(_works(call, target)):
            try:
                work()
            except Exception as error:  # Triton's own have no common class
                kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError
                what = _described(call, items) + (", others are queued" if number else "")
                raise kind(f"{what}, its own target may have changed: {type(error).__name__}: {error}") from error
    if call.tally is not None:
        reference.count(call)


def _works(call: Call, target: _Target) -> Iterator[tuple[list[int], Callable[[], None]]]:
    """What to launch, each with the numbers of its items: tensors that go into a table together, then the rest."""
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    alone = []
    together = not _is_captured(call.outs[0].device) and not (call.stochastic and call.offset % 4)
    for i, (out, operands) in enumerate(zip(call.outs, call.inputs, strict=True)):
        if not out.numel():
            continue
        row = (out, *operands)
        wide = all(x.is_contiguous() and not x.data_ptr() % 16 for x in row)
        if together and wide and len(operands) <= kernels.LISTED:
            groups.setdefault(tuple(x.dtype for x in row), []).append(i)
        else:
            alone.append(i)
    for items in groups.values():
        for first in range(0, len(items), kernels.ITEMS):
            part = items[first : first + kernels.ITEMS]
            if len(part) > 1:
                yield part, partial(_listed, call, target, part)
            else:
                alone += part
    for i in alone:
        yield [i], partial(_item, call, target, call.outs[i], call.inputs[i], call.streams[i])


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _listed(call: Call, target: _Target, items: Sequence[int]) -> None:
    """One launch for these items, of one mix of dtypes."""
    ends, rows, blocks = [], [], 0
    for i in items:
        out, operands = call.outs[i], call.inputs[i]
        blocks += _blocks(out.numel())
        ends.append(blocks)
        pointers = [x.data_ptr() for x in (out, *operands)]
        pointers += [pointers[-1]] * (kernels.LISTED + 1 - len(pointers))
        rows += [*pointers, out.numel(), _signed(call.streams[i]), 0, 0]
    ends += [blocks] * (kernels.ITEMS - len(ends))  # beyond every block
    out, operands = call.outs[items[0]], call.inputs[items[0]]
    compute = _compute(out, operands)
    names = [kernels.NAMES[_CODES.get(x.dtype, x.dtype)] for x in (out, *operands)]
    names += [names[-1]] * (kernels.LISTED + 1 - len(names))
    factors = [_bits(factor, compute) for factor in (*call.factors, 0.0, 0.0)[:2]]
    kernels.listed[(blocks,)](
        _on_device([*ends, *rows], out.device), *factors, *map(_signed, (call.offset, call.seed)),
        *names, OP=call.op, OPERANDS=len(operands), DOUBLE=compute == torch.float64,
        RANDOM=call.stochastic and out.dtype != compute, CASTS=target.casts, BLOCK=kernels.BLOCK,
        ITEMS=kernels.ITEMS, ROW=kernels.ROW, num_warps=target.warps, enable_fp_fusion=False,
    )  # fmt: skip

    kinds = (call.op, *names, call.stochastic)
    if _may_be_captured(out.device) and kinds not in _ALONE:
        _ALONE.add(kinds)
        _item(call, target, out.view(-1)[:0], tuple(x.view(-1)[:0] for x in operands), 0)


_ALONE: set[tuple[object, ...]] = set()
"""Operations and dtypes whose kernel for one tensor is loaded.

Who captures a graph runs the call once before, as nothing may be loaded meanwhile: a launch of nothing sees to that."""


def _may_be_captured(device: torch.device) -> bool:
    return device.type == "cuda"


def _on_device(words: list[int], device: torch.device) -> Tensor:
    """The table, on its way to the device: torch keeps the pinned memory until it was copied."""
    table = torch.tensor(words, dtype=torch.int64)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _described(call: Call, items: Sequence[int]) -> str:
    """The operation of a launch that failed, and the size and the types of its first item."""
    out, operands = call.outs[items[0]], call.inputs[items[0]]
    dtypes = [str(x.dtype).removeprefix("torch.") for x in (out, *operands)]
    text = f"{call.op} of {len(call.outs)} tensor(s) on {out.device}, at tensor {items[0]} of {out.numel()} elements"
    text += f" and {len(items) - 1} more, " if len(items) > 1 else ", "
    return text + f"{dtypes[0]} from {' '.join(dtypes[1:9])}" + (f" and {len(dtypes) - 9} more" if dtypes[9:] else "")


def _item(call: Call, target: _Target, out: Tensor, operands: tuple[Tensor, ...], stream: int) -> None:
    compute = _compute(out, operands)
    factors = [_bits(factor, compute) for factor in call.factors]
    options = {"OP": call.op, "DOUBLE": compute == torch.float64, "RANDOM": False, "CASTS": target.casts}
    last = options | {"RANDOM": call.stochastic and out.dtype != compute}
    random = (call.offset, stream, call.seed)
    scratch = None
    used = kernels.SLOTS // 2 if call.op == "add_difference" else kernels.SLOTS - 1  # factors of a launch
    while len(operands) > kernels.SLOTS:  # a sum in C is stored in C as it is
        if scratch is None:
            scratch = torch.empty_like(out, dtype=compute)
        _launch(scratch, operands[: kernels.SLOTS], factors[:used], random, options, target.warps)
        operands, factors = (scratch, *operands[kernels.SLOTS :]), factors[used:]
    _launch(out, operands, factors, random, last, target.warps)


def _compute(out: Tensor, operands: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if torch.float64 in {out.dtype, *(x.dtype for x in operands)} else torch.float32


def _launch(
    out: Tensor,
    operands: Sequence[Tensor],
    factors: Sequence[int],
    random: tuple[int, int, int],
    options: dict[str, Any],
    warps: int,
) -> None:
    """One operation of at most SLOTS operands: one kernel, unless more than two dimensions remain of `_dims`."""
    tensors = [x.view(_CODES.get(x.dtype, x.dtype)) for x in (out, *operands)]
    options = {**options, "OPERANDS": len(operands), "BLOCK": kernels.BLOCK}
    options |= {"num_warps": warps, "enable_fp_fusion": False}
    unused = kernels.SLOTS - len(operands)
    numbers = [*factors, *[0] * (kernels.SLOTS - 1 - len(factors))]
    first, stream, seed = random
    dims = _dims(tensors, indexed=options["RANDOM"])
    if len(dims) == 1 and set(dims[0].steps) == {1} and not (options["RANDOM"] and first % 4):
        scalars = map(_signed, (*numbers, dims[0].size, first, stream, seed))
        kernels.flat[(_blocks(dims[0].size),)](*tensors, *[tensors[1]] * unused, *scalars, **options)
        return
    looped, rows, columns = _split(dims)
    strides = list(itertools.chain(*zip(rows.steps, columns.steps, strict=True)))
    strides[2 * len(tensors) : 2 * len(tensors)] = [0] * 2 * unused
    strides += [0] * (2 * kernels.SLOTS + 4 - len(strides))  # of the flat index, where it does not matter
    n = rows.size * columns.size
    for place in itertools.product(*(range(dim.size) for dim in looped)):
        starts = [sum(i * dim.steps[k] for i, dim in zip(place, looped, strict=True)) for k in range(len(rows.steps))]
        views = [x.as_strided((1,), (1,), x.storage_offset() + starts[k]) for k, x in enumerate(tensors)]
        ahead = starts[-1] if options["RANDOM"] else 0
        scalars = map(_signed, (*numbers, n, first + ahead, stream, seed, columns.size, *strides))
        kernels.strided[(_blocks(n),)](*views, *[views[1]] * unused, *scalars, **options)


def _dims(tensors: Sequence[Tensor], *, indexed: bool) -> list[_Dim]:
    """The common dimensions of the tensors, outermost first and as few as will do.

    Elements may come in any order, so dimensions are sorted, and those that every tensor steps through evenly become
    one. `indexed`: so must the flat index, which steps through the shape in row-major order.
    """
    if all(x.is_contiguous() for x in tensors):
        return [_Dim(tensors[0].numel(), (1,) * (len(tensors) + indexed))]
    shape = tensors[0].shape
    strides = [x.stride() for x in tensors]
    if indexed:
        strides.append(tuple(math.prod(shape[d + 1 :]) for d in range(len(shape))))
    dims = [_Dim(n, steps) for n, steps in zip(shape, zip(*strides, strict=True), strict=True) if n > 1]
    dims.sort(key=lambda dim: dim.steps, reverse=True)
    merged: list[_Dim] = []
    for n, steps in dims:
        if merged and merged[-1].steps == tuple(step * n for step in steps):
            n *= merged.pop().size
        merged.append(_Dim(n, steps))
    return merged


def _split(dims: list[_Dim]) -> tuple[list[_Dim], _Dim, _Dim]:
    """The dimensions to loop over, and the two largest as rows and columns."""
    inner = sorted(range(len(dims)), key=lambda d: dims[d].size)[-2:]
    looped = [dim for d, dim in enumerate(dims) if d not in inner]
    *rows, columns = (dims[d] for d in sorted(inner))
    return looped, rows[0] if rows else _Dim(1, (0,) * len(columns.steps)), columns


def _blocks(n: int) -> int:
    return -(-n // int(kernels.BLOCK))


def _signed(x: int) -> int:
    """The number modulo 2^64 that fits into an int64."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _bits(factor: float, compute: torch.dtype) -> int:
    """The factor, rounded once to the compute type, as the integer of its bits."""
    real, integer = ("<d", "<q") if compute == torch.float64 else ("<f", "<i")
    return int(struct.unpack(integer, struct.pack(real, factor))[0])


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    context: AbstractContextManager[object] = (
        nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)
    )
    return context


@cache
def _target(_device: torch.device) -> _Target:
    """Of the device, which is the current one."""
    if _interpreted():
        return _Target(0, 1)
    target = triton.runtime.driver.active.get_current_target()
    casts = (target.arch >= 80) + (target.arch >= 89) if target.backend == "cuda" else 0
    return _Target(casts, _THREADS // target.warp_size)


def _interpreted() -> bool:
    return not isinstance(kernels.flat, triton.JITFunction)


def _release() -> tuple[int, ...]:
    return tuple(map(int, triton.__version__.split(".")[:2]))


def decode_on_device(
    format: Format, full: tuple[int, ...], first: int, parts: Mapping[str, Tensor], out: Tensor
) -> bool:
    """`decoding.decode_on_device`: formats without zero points, whose rows follow each other.

    No GPU has run this kernel yet: it is held to the definition in Triton's interpreter.
    """
    layout = coded.layout(format, full)
    if layout is None or layout.transposed or layout.zero or "g_idx" in parts or not coded.fits(layout, parts):
        return False
    _, rows, columns, stride = layout.shape
    block_rows, block_columns = layout.block
    scale, over = parts["scale"], parts.get("global", parts["scale"][:0])
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(format.word("scale"), torch.uint8)
    table = torch.tensor(layout.table or (0.0,), dtype=torch.float32).to(out.device)
    sizes = (columns, stride, rows, block_rows, block_columns, -(-rows // block_rows), -(-columns // block_columns))
    with _on(out.device):
        target = _target(out.device)
        kernels.decoded[(_blocks(len(out)),)](
            out, parts["codes"], scale.view(dtype), over.view(torch.float32), table,
            len(out), first, span(format, full, first, len(out))[0], *sizes, int(len(over) > 4),
            CODES=layout.codes, E8M0=format.word("scale") == "F8_E8M0", SECOND=layout.second, CASTS=target.casts,
            BLOCK=kernels.BLOCK, num_warps=target.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return True
