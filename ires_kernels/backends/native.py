"""The C++ kernels for the CPU and for NVIDIA GPUs (csrc/), called with raw pointers.

The CPU loops are compiled once per instruction set and the best one this CPU runs is taken; IRES_ISA=v2|v3|v4 (x86-64
levels) forces one, for tests and comparisons. All of them give the same bits, and so do the GPU kernels, which setup.py
adds where it finds nvcc. On a GPU a call is queued on the caller's current stream; nothing is allocated, copied or
waited for, so a call can be captured into a CUDA graph.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ires_kernels.backends import coded, reference
from ires_kernels.backends.call import Call, Coded, Tally
from ires_kernels.backends.choice import BackendStatus, thread_count
from ires_kernels.dtypes import NUMBERS
from ires_kernels.formats import Format

try:
    from ires_kernels import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _missing = f"the extension was not built or does not load ({error}); reinstall where a C++17 compiler is"

# The numbers are those of OpCode in csrc/arith.h.
_OPS = {"subtract": 0, "add": 1, "scale": 2, "add_difference": 3}
_DTYPES = {getattr(torch, number.torch): number.csrc for number in NUMBERS.values()}


def isas() -> list[str]:
    """The instruction sets this CPU runs and the extension has, best first; empty without the extension."""
    return _native.isas() if _native else []


def cuda_built() -> bool:
    """Whether the extension has GPU kernels; `status` tells whether they can run here."""
    return bool(_native and _native.cuda_built)


def status(device: str = "cpu") -> BackendStatus:
    """Available on the CPU where the extension was built and has one of its instruction sets, and on GPUs where it was
    built with nvcc and for what there is.
    """
    if not _native:
        return BackendStatus(False, _missing)
    if device == "cuda":
        return _cuda_status()
    if device != "cpu":
        return BackendStatus(False, "the extension is for the CPU and for NVIDIA GPUs")
    if not isas():
        return BackendStatus(False, "this CPU has none of the instruction sets the extension was built for")
    return BackendStatus(True, f"C++ on the CPU, instruction sets {', '.join(isas())}")


def _cuda_status() -> BackendStatus:
    if not cuda_built():
        return BackendStatus(False, "the extension was built without nvcc; reinstall where the CUDA toolkit is")
    detail = f"CUDA C++ for {_native.cuda_targets}"
    if not torch.cuda.is_available() or not torch.version.cuda:
        return BackendStatus(False, f"{detail}, but torch {torch.__version__} sees no NVIDIA GPU")
    driver, least = _native.cuda_driver(), _native.cuda_least_driver
    if driver < least:
        needed, there = (f"{version // 1000}.{version % 1000 // 10}" for version in (least, driver))
        return BackendStatus(False, f"{detail}, but it needs a driver for CUDA {needed}, and there is one for {there}")
    major, minor = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    oldest = re.search(r"\d+", _native.cuda_targets)
    if oldest and 10 * major + minor < int(oldest.group()):
        return BackendStatus(False, f"{detail}, but a GPU here has compute capability {major}.{minor}")
    return BackendStatus(True, detail)


def _item(out: Tensor, inputs: tuple[Tensor, ...], stream: int) -> tuple[object, ...]:
    operands = (out, *inputs)
    sizes: list[int] = []
    strides: list[int] = []
    if not all(t.is_contiguous() for t in operands):
        sizes = list(out.shape)
        strides = [stride for t in operands for stride in t.stride()]
    pointers = tuple(t.data_ptr() for t in operands)
    return out.numel(), stream, pointers, tuple(_DTYPES[t.dtype] for t in operands), sizes, strides


def memory_loop(out: Tensor, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], None]:
    """What touches the same bytes as a call and computes nothing, for benchmarks; other widths are a ValueError."""
    item = _item(out, inputs, 0)
    return lambda: _native.memory_loop(item, threads, "")


HOST = -1
"""In place of a GPU, for `load`: the memory of the host, which computes at once; for tests."""


def code(op: str) -> int:
    """The number of an operation in `load`."""
    return _OPS[op]


def item(n: int, stream: int, pointers: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> tuple[object, ...]:
    """Contiguous operands for `load`, the output first; `n` elements and the stream of their random numbers."""
    return n, stream, pointers, tuple(_DTYPES[dtype] for dtype in dtypes), [], []


def load(
    reads: list[tuple[int, int, int, int, int]],
    op: int,
    items: list[tuple[object, ...]],
    factors: tuple[float, ...],
    device: int,
    stream: int,
    *,
    stochastic: bool,
    seed: int,
    offset: int,
) -> tuple[int, int, int] | None:
    """Read from files into pinned memory, queue copies to the device and one call on its stream, without Python's lock.

    A read is (descriptor, offset in the file, address in the host, address in the device, bytes). Pieces of several
    places that are copied as one have 0 for the device; behind them comes a read of descriptor -1, which only copies.
    Without items nothing is computed. Returns None, or why not all was read: (which read, errno or 0 for the end of the
    file, position).
    Raises RuntimeError with what CUDA said. Nothing is waited for: some of it is queued after either of them.
    """
    return _native.load_tile(reads, op, items, factors, stochastic, seed, offset, device, stream)


Operand: TypeAlias = "int | tuple[list[tuple[int, int, int, int, int, int]], int]"
"""Of `run_fused`: where numbers are that are the same for each piece; or stretches, and where all of it is to stay."""
CONSTANT = 1 << 16
"""Elements that an operand of `run_fused` has to have which is the same for each piece."""


def run_fused(
    op: str,
    item: tuple[object, ...],
    operands: tuple[Operand, ...],
    factors: tuple[float, ...],
    *,
    stochastic: bool,
    seed: int,
    offset: int,
) -> tuple[int, int, int, int] | None:
    """Compute on the CPU by pieces that stay in the cache, out of files and memory, on the calling thread and without
    Python's lock.

    `item` has no pointers but that of the output. An operand's stretches are (descriptor, offset, bytes, 0, 0, -1), or
    (-1, address, bytes, where these bytes are to be copied before they change or 0, address of an int64 that counts
    those which are there, -1), or in place of the -1 a dtype: then a record of them as of `pack` goes there when they
    have changed, whose bytes a second int64 counts; with an address beside them all of the operand stays there as well.

    Returns None, or where reading ended, with the pieces before in place: (which operand, which of its stretches, errno
    or 0 for the end of the file, position).
    """
    isa = os.environ.get("IRES_ISA", "")
    return _native.run_fused(_OPS[op], item, operands, CONSTANT, factors, stochastic, seed, offset, isa)


def run(call: Call) -> None:
    """Compute `call` with all of `thread_count()` threads, or on the current stream of the GPU that holds its tensors;
    operands have passed the checks of `checks`. On a GPU a tally is counted by plain torch, which waits for the result.
    """
    items = [_item(*item) for item in zip(call.outs, call.inputs, call.streams, strict=True)]
    what = _what(call, items)
    device = call.outs[0].device
    if device.type == "cuda":
        with torch.cuda.device(device):
            _native.cuda_run(*what, device.index, torch.cuda.current_stream(device).cuda_stream)
            if call.tally is not None:
                reference.count(call)
        return
    _run_on_cpu(call, what)


_What: TypeAlias = tuple[int, list[tuple[object, ...]], tuple[float, ...], bool, int, int]


def _what(call: Call, items: list[tuple[object, ...]]) -> _What:
    return _OPS[call.op], items, call.factors, call.stochastic, call.seed, call.offset


def _run_on_cpu(call: Call, what: _What) -> None:
    sums = _native.run(*what, thread_count(), os.environ.get("IRES_ISA", ""), call.tally is not None)
    if call.tally is not None:
        call.tally.__iadd__(Tally(sum(out.numel() for out in call.outs), *sums))


def fuses(numbers: Coded) -> bool:
    """Whether `run_decoded` takes such numbers: the loops know the format, and they lie in rows as they are stored."""
    layout = coded.layout(numbers.format, numbers.full)
    return layout is not None and not layout.transposed and coded.fits(layout, numbers.parts)


def run_decoded(call: Call, operands: Mapping[int, Coded]) -> None:
    """`decoding.run` for what `fuses` with a call."""
    _run_on_cpu(call, _what(call, [_decoded_item(call, operands)]))


def _decoded_item(call: Call, operands: Mapping[int, Coded]) -> tuple[object, ...]:
    inputs, count = call.inputs[0], call.outs[0].numel()
    decoded: list[object] = [None] * len(inputs)
    for place, (format, full, first, parts) in operands.items():
        decoded[place] = coded.layout(format, full), coded.stored(format, full, first, count, parts), first
    return (*_item(call.outs[0], inputs, call.streams[0]), tuple(decoded))


def decode(
    format: Format, full: tuple[int, ...], first: int, count: int, parts: Mapping[str, memoryview], out: Tensor
) -> bool:
    """`decoding.decode` into contiguous memory, without Python's lock; False where the loops do not know the format."""
    layout = coded.layout(format, full)
    if layout is None or not coded.fits(layout, parts):
        return False
    stored = coded.stored(format, full, first, count, parts)
    _native.decode(layout, stored, first, count, out.data_ptr(), thread_count(), os.environ.get("IRES_ISA", ""))
    return True


def decode_row(
    codes: memoryview, table: tuple[float, ...], size: int, scales: memoryview, first: int, count: int, out: Tensor
) -> None:
    """Numbers of a row of nibbles, high ones first, in blocks of `size` with a scale in float32 each.

    `codes` begins with the byte of element `first`, `scales` with that of the first block.
    """
    width = first + count
    what = coded.nibbles_high_first(table, width, size), (codes, first // 2, scales, None, None, None)
    _native.decode(*what, first, count, out.data_ptr(), thread_count(), os.environ.get("IRES_ISA", ""))


def decode_groups(
    kind: str,
    shape: tuple[int, int],
    size: int,
    parts: Sequence[memoryview | None],
    first: int,
    count: int,
    out: Tensor,
) -> None:
    """Numbers of a matrix of codes, nibbles, I8 or U8 less 128, in groups of `size` columns.

    `parts` are codes, scales in float32, zeros in int8, and maybe the group of each column.
    """
    codes, scales, zeros, order = parts
    what = coded.groups(kind, shape, size), (codes, 0, scales, zeros, None, order)
    _native.decode(*what, first, count, out.data_ptr(), thread_count(), os.environ.get("IRES_ISA", ""))


def decode_on_device(
    format: Format, full: tuple[int, ...], first: int, parts: Mapping[str, Tensor], out: Tensor
) -> bool:
    """`decoding.decode_on_device`: formats whose rows follow each other.

    No GPU has run this kernel yet: what its threads do is held to the definition on a CPU, and it is compiled.
    """
    layout = coded.layout(format, full)
    if layout is None or layout.transposed or "g_idx" in parts or not coded.fits(layout, parts):
        return False
    codes, begin, *others = coded.stored(format, full, first, len(out), parts)
    pointers = [None if part is None else (part.data_ptr(), part.nbytes) for part in (codes, *others)]
    stored = (pointers[0], begin, *pointers[1:])
    stream = torch.cuda.current_stream(out.device).cuda_stream
    _native.cuda_decode(layout, stored, first, len(out), out.data_ptr(), out.device.index, stream)
    return True


def measure(format: Format, full: tuple[int, ...], first: int, values: Tensor, largest: Tensor) -> bool:
    """`encoding.measure` of contiguous values; False where the loops do not encode the format."""
    layout = coded.encoded(format, full)
    if layout is None:
        return False
    isa = os.environ.get("IRES_ISA", "")
    _native.measure(layout, first, len(values), values.data_ptr(), largest.data_ptr(), len(largest), isa)
    return True


def measure_results(
    call: Call, operands: Mapping[int, Coded], format: Format, full: tuple[int, ...], largest: Tensor
) -> None:
    """`encoding.measure_results` for operands that `fuses` with a call."""
    layout, isa = coded.encoded(format, full), os.environ.get("IRES_ISA", "")
    assert layout is not None
    what = _OPS[call.op], _decoded_item(call, operands), call.factors
    _native.measure_results(*what, layout, call.offset, largest.data_ptr(), len(largest), isa)


def store(
    call: Call, operands: Mapping[int, Coded], to: Coded, renewed: bool, random: tuple[int, int] | None, codes: Tensor
) -> None:
    """`encoding.store` for operands that `fuses` with a call."""
    format, full, first, parts = to
    layout, stored = coded.encoded(format, full), coded.stored(format, full, first, len(codes), parts)
    assert layout is not None
    what = _OPS[call.op], _decoded_item(call, operands), call.factors
    isa, counted = os.environ.get("IRES_ISA", ""), call.tally is not None
    counts = _native.store(*what, layout, stored, first, renewed, codes.data_ptr(), random, isa, counted)
    if call.tally is not None:
        call.tally.__iadd__(Tally(len(codes), *counts))


def encode(
    format: Format,
    full: tuple[int, ...],
    first: int,
    values: Tensor,
    scales: memoryview,
    out: Tensor,
    random: tuple[int, int] | None,
) -> bool:
    """`encoding.encode` of contiguous values into contiguous bytes; False where the loops do not encode the format."""
    layout = coded.encoded(format, full)
    if layout is None:
        return False
    pointers, isa = (values.data_ptr(), out.data_ptr()), os.environ.get("IRES_ISA", "")
    _native.encode(layout, scales, first, len(values), *pointers, random, thread_count(), isa)
    return True


def most_packed(dtype: int, count: int) -> int:
    """Room for `pack`, in bytes; `dtype` is a number of csrc."""
    return _native.most_packed(dtype, count)


def pack(dtype: int, old: int, new: int, count: int, into: int) -> int:
    """`packing.pack`, on the calling thread and without Python's lock."""
    return _native.pack(dtype, old, new, count, into, os.environ.get("IRES_ISA", ""))


def unpack(dtype: int, record: int, new: int, count: int) -> None:
    """`packing.unpack`, likewise."""
    _native.unpack(dtype, record, new, count, os.environ.get("IRES_ISA", ""))


def fits(dtype: int, record: int, new: int, count: int) -> bool:
    """`packing.fits`, likewise."""
    return _native.fits(dtype, record, new, count, os.environ.get("IRES_ISA", ""))
