"""Which memory operands share, and where that is refused."""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from ires_kernels.tensors.names import Names
from ires_kernels.tensors.scalars import STORAGE

_START = operator.itemgetter(0)

# The bytes from the first element of a tensor to the end of its last: start, end, item, column, whether it is written.
# A bare tuple, because making a NamedTuple of it costs as much as all the questions to the tensor.
Span: TypeAlias = tuple[int, int, int, int, bool, Tensor]


def refuse_overlap(names: Names, spans: list[Span], tally: bool) -> None:
    """A written tensor may be exactly an operand of its own item, and shares no memory with anything else.

    A sweep over the spans in the order of their addresses: only spans that overlap are compared element by element.
    """
    spans.sort(key=_START)
    earlier: list[Span] = []
    for span in spans:
        start, _, item, column, written, x = span
        earlier = [other for other in earlier if other[1] > start]
        for _, _, other_item, other_column, other_written, other in earlier:
            if not (written or other_written):
                continue
            if item == other_item and _identical(x, other):
                if tally:
                    raise ValueError(
                        f"{names.at(item, -1)} is also an operand, and tally= compares the two; use another out="
                    )
            elif _share_memory(x, other):
                here, there = names.at(item, column), names.at(other_item, other_column).split()[-1]
                if not written:
                    here, there = names.at(other_item, other_column), names.at(item, column).split()[-1]
                raise RuntimeError(f"{here} {_shared(there, written and other_written, _identical(x, other))}")
        earlier.append(span)


def _shared(there: str, both_written: bool, identical: bool) -> str:
    """What is wrong with a written tensor that has memory in common with one of another place, and the way out."""
    if not identical:
        return f"shares memory with {there} and is not the same tensor; pass a .clone() of one"
    if both_written:
        return f"is {there} again, the same tensor, and would be written twice; if they are tied, pass it once"
    return f"is written and {there} is the same tensor, which another entry reads; pass a .clone() of one"


def _identical(a: Tensor, b: Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.dtype == b.dtype
        and all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))
    )


def overlaps_itself(x: Tensor) -> bool:
    """Whether two different indices lead to one address.

    Where every stride steps over all that the smaller ones reach, none do. Otherwise: two such indices differ along
    some dimension, and can be shifted along it until one of them is at 0 there.
    """
    reach = 0
    for stride, n in sorted((stride, n) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1):
        if stride <= reach:
            break
        reach += (n - 1) * stride
    else:
        return False
    return any(n > 1 and _share_memory(x.narrow(d, 0, 1), x.narrow(d, 1, n - 1)) for d, n in enumerate(x.shape))


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Exactly, whatever the strides; numpy solves it without touching the elements."""
    return np.shares_memory(_Bytes(a).array(), _Bytes(b).array())


class _Bytes:
    """A tensor's elements as opaque bytes, for any dtype and whether or not it requires grad."""

    def __init__(self, x: Tensor) -> None:
        width = STORAGE[x.dtype]
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{width}",
            "shape": tuple(x.shape),
            "strides": tuple(stride * width for stride in x.stride()),
            "data": (x.data_ptr(), True),
        }

    def array(self) -> np.ndarray[Any, Any]:
        return np.asarray(self)
