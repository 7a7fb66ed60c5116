"""The C++ CPU kernels (csrc/), called with raw pointers.

The loops are compiled once per instruction set and the best one this CPU runs is taken; IRES_ISA=v2|v3|v4 (x86-64
levels) forces one, for tests and comparisons. All of them give the same bits.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ires_kernels.backends import BackendStatus, Call, Tally, thread_count

try:
    from ires_kernels import _native
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _missing = f"the extension was not built or does not load ({error}); reinstall where a C++17 compiler is"

# The numbers are those of OpCode and DType in csrc/arith.h.
_OPS = {"subtract": 0, "add": 1, "scale": 2, "add_difference": 3}
_DTYPES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.float8_e4m3fn: 4,
    torch.float8_e5m2: 5,
}


def isas() -> list[str]:
    """The instruction sets this CPU runs and the extension has, best first; empty without the extension."""
    return _native.isas() if _native else []


def status() -> BackendStatus:
    """Available where the extension was built and the CPU has one of its instruction sets."""
    if not _native:
        return BackendStatus(False, _missing)
    if not isas():
        return BackendStatus(False, "this CPU has none of the instruction sets the extension was built for")
    return BackendStatus(True, f"C++ on the CPU, instruction sets {', '.join(isas())}")


def _item(out: Tensor, inputs: tuple[Tensor, ...], stream: int) -> tuple[object, ...]:
    operands = (out, *inputs)
    sizes: list[int] = []
    strides: list[int] = []
    if not all(t.is_contiguous() for t in operands):
        sizes = list(out.shape)
        strides = [stride for t in operands for stride in t.stride()]
    pointers = tuple(t.data_ptr() for t in operands)
    return out.numel(), stream, pointers, tuple(_DTYPES[t.dtype] for t in operands), sizes, strides


def run(call: Call) -> None:
    """Compute `call` with all of `thread_count()` threads; operands have passed the checks of `checks`."""
    items = [_item(*item) for item in zip(call.outs, call.inputs, call.streams, strict=True)]
    sums = _native.run(
        _OPS[call.op],
        items,
        call.factors,
        call.stochastic,
        call.seed,
        call.offset,
        thread_count(),
        os.environ.get("IRES_ISA", ""),
        call.tally is not None,
    )
    if call.tally is not None:
        call.tally.__iadd__(Tally(sum(out.numel() for out in call.outs), *sums))
