"""Old bits of a tensor as what an update did to them, which with the new bits gives them again (csrc/pack.h).

An update has one size, and a float says by its exponent how far its neighbours are from it. So the new bits say how
many steps of the format the old ones can be away, and that number takes few bits: of bf16 weights of std .02 3.3 after
an update of 7e-5, 6.2 after 5e-4 and 7.5 after 1.4e-3; of f16 9 after 5e-4, and of float32 19 to 24.
"""

from __future__ import annotations

from ires_kernels.backends import native
from ires_kernels.dtypes import NUMBERS

_PACKED = {name: NUMBERS[name].csrc for name in ("BF16", "F16", "F32")}


def packs(dtype: str) -> bool:
    """Whether tensors of this dtype, a name of safetensors, can be packed here: by the extension alone."""
    return dtype in _PACKED and bool(native.isas())


def number(dtype: str) -> int:
    """What csrc calls a dtype that is packed; -1 without one."""
    return _PACKED[dtype] if dtype else -1


def room(dtype: str, count: int) -> int:
    """Bytes that `pack` may write for so many elements; what it leaves is less."""
    return native.most_packed(_PACKED[dtype], count)


def pack(dtype: str, old: int, new: int, count: int, into: int) -> int:
    """Write at the address `into` what the elements at `old` have become at `new`; returns how many bytes it takes."""
    return native.pack(_PACKED[dtype], old, new, count, into)


def unpack(dtype: str, record: int, new: int, count: int) -> None:
    """Put the old elements into the place of the new ones, which are those that `pack` had: who may doubt it asks
    `fits` before."""
    native.unpack(_PACKED[dtype], record, new, count)


def fits(dtype: str, record: int, new: int, count: int) -> bool:
    """Whether the new elements are those that `pack` had."""
    return native.fits(_PACKED[dtype], record, new, count)
