"""The numbers of quantized weights: by the loops of a backend where these know a format of `ires_kernels.formats`, and
otherwise by the definition.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ires_kernels.backends import bitsandbytes, gptq, native
from ires_kernels.backends.call import Call, Coded
from ires_kernels.backends.choice import choose
from ires_kernels.backends.definition import define
from ires_kernels.backends.weight import Parts, Weight
from ires_kernels.formats import Format


def decode(format: Format, full: tuple[int, ...], first: int, count: int, parts: Parts, out: Tensor) -> None:
    """The numbers of `count` elements from the flat index `first` on of a weight of the shape `full`, into float32.

    parts["codes"] holds the bytes that `formats.span` names for this run, and no others; the other parts are whole.
    """
    if choose(out.device) is native:
        if native.decode(format, full, first, count, parts, out):
            return
        weight = Weight.of(format, full, first, count, parts)
        if bitsandbytes.decode(weight, first, count, out) or gptq.decode(weight, first, count, out):
            return
    define(format, full, first, count, parts, out)


def decode_on_device(
    format: Format, full: tuple[int, ...], first: int, parts: Mapping[str, Tensor], out: Tensor
) -> bool:
    """`decode` on a GPU that has the parts, as bytes; False where its backend has no kernel for the format.

    On the CPU it is `decode`, for what is a device to its callers there.
    """
    if out.device.type == "cpu":
        decode(format, full, first, len(out), {name: part.numpy().data for name, part in parts.items()}, out)
        return True
    if choose(out.device) is native:
        return native.decode_on_device(format, full, first, parts, out)
    from ires_kernels.backends import triton  # which takes a while, and may not be there

    return triton.decode_on_device(format, full, first, parts, out)


def run(call: Call, coded: Mapping[int, Coded]) -> None:
    """Compute a call on one item whose operands at these places are decoded on the way, on the CPU.

    All of it is contiguous. The tensors at these places, float32, are memory for the numbers; the C++ loops leave it
    alone where they know the format, as they decode pieces that stay in the nearest cache.
    """
    fused = settle(call, coded)
    native.run_decoded(call, fused) if fused else choose(call.outs[0].device).run(call)


def settle(call: Call, coded: Mapping[int, Coded]) -> dict[int, Coded]:
    """Decode what the loops of the backend do not decode on the way; returns the rest."""
    backend = choose(call.outs[0].device)
    fused = {place: numbers for place, numbers in coded.items() if backend is native and native.fuses(numbers)}
    for place in coded.keys() - fused.keys():
        (format, full, first, parts), out = coded[place], call.inputs[0][place].view(-1)
        decode(format, full, first, len(out), parts, out)
    return fused
