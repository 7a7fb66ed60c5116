"""Every precondition of the tensor operations, one message each: what, where, got, wanted, the way out.

TypeError: an argument of the wrong kind or dtype. ValueError: a shape or a value that does not fit. RuntimeError:
memory, device or autograd state that forbids the operation. All of it is checked before the first element is written.
"""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from ires_kernels.dtypes import NUMBERS, number_of
from ires_kernels.tensors import regions

# Storage types and their widths in bytes.
STORAGE = {getattr(torch, number.torch): number.bits // 8 for number in NUMBERS.values()}
_WANTED = "wanted one of " + ", ".join(str(dtype).removeprefix("torch.") for dtype in STORAGE)
_PLAIN = {Tensor, torch.nn.Parameter, FakeTensor}
_TEXT = (str, bytes)  # as a tuple: torch.compile of torch 2.6 does not know str | bytes
_START = operator.itemgetter(0)
_LARGEST = sys.float_info.max
F32_OVERFLOW = NUMBERS["F32"].limit  # the least magnitude that float32 rounds to infinity


class Names(NamedTuple):
    """What the caller calls the operands; made into text only when a check fails."""

    op: str
    args: tuple[str, ...]  # the last one stands for all further columns
    listed: bool  # the first argument is a sequence of tensors
    many: bool = False  # the last argument is a sequence for every target; of pairs, the last two are
    pairs: bool = False  # the last two arguments take turns

    def at(self, item: int, column: int) -> str:
        """`add_: residual[3][0]`; column -1 is the tensor given as out=."""
        last = len(self.args) - 1
        arg = "out" if column < 0 else self.args[min(column, last)]
        place = f"[{item}]" if self.listed else ""
        if self.pairs and column > 0:
            arg = self.args[2 - column % 2]
            place += f"[{(column - 1) // 2}]" if self.many else ""
        elif self.many and column >= last:
            place += f"[{column - last}]"
        return f"{self.op}: {arg}{place}"


class Rounding(NamedTuple):
    """How the caller wants results rounded, and with which random bits."""

    mode: str
    seed: int
    stream: int | Sequence[int]
    offset: int


# Numbers and options


def factor(value: Any, where: str) -> float:
    """A finite real number, as float."""
    if not isinstance(value, float):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            hint = "; pass its .item()" if isinstance(value, Tensor) else ""
            raise TypeError(f"{where} is {_kind(value)}, wanted a real number{hint}")
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{where} is beyond the range of float64, wanted a finite number") from None
    if not -_LARGEST <= value <= _LARGEST:  # math.isfinite is opaque to torch.compile
        raise ValueError(f"{where} is {value}, wanted a finite number")
    return float(value)


def factors(value: Any, count: int, where: str, what: str = "residuals") -> tuple[float, ...]:
    """One factor for each of `count` residuals or pairs, from one number for all or a sequence."""
    if not _is_sequence(value):
        return (factor(value, where),) * count
    if len(value) != count:
        raise ValueError(f"{where} has {len(value)} numbers for {count} {what}")
    return tuple(factor(x, f"{where}[{i}]") for i, x in enumerate(value))


def unsigned(value: Any, op: str, name: str) -> int:
    """An integer of 64 bits: a seed, a stream or an offset."""
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{op}: {name} is {_kind(value)}, wanted an integer")
        value = operator.index(value)
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{op}: {name} is {value}, wanted an integer from 0 to 2^64 - 1")
    return int(value)


def streams(value: Any, count: int, op: str) -> list[int]:
    """One stream per item; an integer is that of the first, and the others count on from it."""
    if not _is_sequence(value):
        first = unsigned(value, op, "stream")
        if count > 1 and first > (1 << 64) - count:
            raise ValueError(f"{op}: stream is {first}, and {count} tensors count on from it beyond 2^64 - 1")
        return [first + i for i in range(count)]
    if len(value) != count:
        raise ValueError(f"{op}: stream has {len(value)} integers for {count} tensors")
    return [unsigned(x, op, f"stream[{i}]") for i, x in enumerate(value)]


def stochastic(rounding: Any, op: str) -> bool:
    """Whether `rounding` is "stochastic" rather than "nearest"."""
    if rounding == "nearest":
        return False
    if rounding == "stochastic":
        return True
    raise ValueError(f'{op}: rounding is {rounding!r}, wanted "nearest" or "stochastic"')


def storage_dtype(dtype: Any, where: str) -> torch.dtype:
    """A storage type asked for with dtype=: torch's, or its name."""
    if isinstance(dtype, torch.dtype) and dtype in STORAGE:
        return dtype
    number = number_of(dtype) if isinstance(dtype, str) else None
    if number is not None:
        found: torch.dtype = getattr(torch, number.torch)
        return found
    raise TypeError(f"{where} is {dtype}, {_WANTED}")


# The shape of the argument list


def is_listed(value: Any, where: str) -> bool:
    """Whether a first argument is a sequence of tensors rather than a tensor."""
    if isinstance(value, Tensor):
        return False
    if _is_sequence(value):
        return True
    raise TypeError(f"{where} is {_kind(value)}, wanted a tensor or a list of tensors")


def rows(names: Names, *columns: Any) -> list[tuple[Tensor, ...]]:
    """Line up arguments that are all tensors, or all sequences of tensors of one length: one tuple per item."""
    return _table(names, list(zip(*_columns(names, columns), strict=True)) if names.listed else [columns])


def residual_rows(op: str, t: Any, residual: Any) -> tuple[Names, list[tuple[Tensor, ...]]]:
    """Line up targets with one residual each, or with several: (t, r1, …, rk) per item."""
    listed = is_listed(t, f"{op}: t")
    if not listed and isinstance(residual, Tensor):
        return Names(op, ("t", "residual"), False), [(t, residual)]
    targets, entries = _columns(Names(op, ("t", "residual"), listed), (t, residual)) if listed else ([t], [residual])
    many = any(_is_sequence(entry) for entry in entries)
    names = Names(op, ("t", "residual"), listed, many)
    lists = entries if many else [[entry] for entry in entries]
    for i, entry in enumerate(lists):
        if not _is_sequence(entry):
            raise TypeError(f"{names.at(i, 1).removesuffix('[0]')} is {_kind(entry)}, others are lists of tensors")
        if len(entry) != len(lists[0]):
            raise ValueError(
                f"{names.at(i, 1).removesuffix('[0]')} has {len(entry)} tensors, residual[0] has {len(lists[0])}; "
                "wanted the same number for every target"
            )
        if not entry:
            raise ValueError(f"{names.at(i, 1).removesuffix('[0]')} is empty, wanted at least one tensor")
    return names, _table(names, [(target, *entry) for target, entry in zip(targets, lists, strict=True)])


def pair_rows(op: str, t: Any, x: Any, y: Any) -> tuple[Names, list[tuple[Tensor, ...]]]:
    """Line up targets with one pair each, or with several: (t, x1, y1, …, xk, yk). One y may serve all pairs."""
    listed = is_listed(t, f"{op}: t")
    names = Names(op, ("t", "x", "y"), listed, pairs=True)
    columns = _columns(names, (t, x, y)) if listed else [[t], [x], [y]]
    if not any(_is_sequence(entry) for entry in columns[1]):
        return names, _table(names, list(zip(*columns, strict=True)))
    names = names._replace(many=True)
    table = []
    for i, (target, xs, ys) in enumerate(zip(*columns, strict=True)):
        where = [names.at(i, column).removesuffix("[0]") for column in (1, 2)]
        if not _is_sequence(xs):
            raise TypeError(f"{where[0]} is {_kind(xs)}, others are lists of tensors")
        if not xs:
            raise ValueError(f"{where[0]} is empty, wanted at least one tensor")
        ys = ys if _is_sequence(ys) else [ys] * len(xs)
        if len(ys) != len(xs):
            raise ValueError(f"{where[1]} has {len(ys)} tensors, x has {len(xs)}; wanted one for each, or one for all")
        if len(xs) != len(columns[1][0]):
            raise ValueError(
                f"{where[0]} has {len(xs)} tensors, x[0] has {len(columns[1][0])}; "
                "wanted the same number for every target"
            )
        table.append((target, *(each for pair in zip(xs, ys, strict=True) for each in pair)))
    return names, _table(names, table)


def outputs(names: Names, out: Any, dtype: torch.dtype | None, count: int) -> list[Tensor]:
    """The tensors given as out=: as many as there are items, and of the dtype asked for."""
    if not names.listed:
        tensors: Sequence[Any] = [out]
    elif not _is_sequence(out):
        raise TypeError(f"{names.op}: out is {_kind(out)}, wanted a list of tensors as {names.args[0]} is")
    elif len(out) != count:
        raise ValueError(f"{names.op}: out has {len(out)} tensors, {names.args[0]} has {count}")
    else:
        tensors = out
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{names.at(i, -1)} is {_kind(x)}, wanted a tensor")
        if dtype not in (None, x.dtype):
            raise ValueError(f"{names.at(i, -1)} has dtype {x.dtype}, and dtype= asks for {dtype}; leave dtype= out")
    return list(tensors)


# Tensors


# The bytes from the first element of a tensor to the end of its last: start, end, item, column, whether it is written.
# A bare tuple, because making a NamedTuple of it costs as much as all the questions to the tensor.
_Span: TypeAlias = tuple[int, int, int, int, bool, Tensor]


def operands(
    names: Names, inputs: list[tuple[Tensor, ...]], outs: list[Tensor] | None, *, in_place: bool, tally: bool = False
) -> bool:
    """Check every tensor of a launch: the operands, and the tensors given as out=, if any.

    `in_place`: the first operand of every item is written. `tally`: results must not overwrite operands.
    Returns whether the tensors have shapes only (meta or fake tensors), so that there is nothing to compute.
    """
    recording, mapped = torch.is_grad_enabled(), regions.is_any()
    spans: list[_Span] = []
    device, fake, shape_only = None, False, False
    shape: tuple[int, ...] = ()
    for i, row in enumerate(inputs):
        for j, x in enumerate(row if outs is None else (*row, outs[i])):
            column = j if j < len(row) else -1
            written = column < 0 or (in_place and column == 0)
            problem = _unusable(x)
            if problem:
                raise TypeError(f"{names.at(i, column)} {problem}{_note(x)}")
            transform = _transform(x)
            if transform:
                raise RuntimeError(f"{names.at(i, column)} {transform}")
            if not j:
                shape = x.shape
            elif x.shape != shape:
                raise ValueError(
                    f"{names.at(i, column)} has shape {tuple(x.shape)}, {_first(names, i)} has {tuple(shape)}; "
                    "wanted equal shapes: nothing is broadcast"
                )
            if device is None:
                device, fake = x.device, type(x) is FakeTensor
                shape_only = fake or x.is_meta
            elif x.device != device or (type(x) is FakeTensor) is not fake:
                raise RuntimeError(
                    f"{names.at(i, column)} is on {_place(x)}, {_first(names, 0)} is on {_place(inputs[0][0])}; "
                    "wanted one device: nothing is copied between devices"
                )
            if recording and x.requires_grad:
                raise RuntimeError(f"{names.at(i, column)}: {_autograd_problem(x, written)}")
            if mapped and x.device.type == "cpu" and not shape_only and x.numel():
                problem = regions.problem(x.data_ptr(), written)
                if problem:
                    raise RuntimeError(f"{names.at(i, column)} {problem}")
            if written and x.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"{names.at(i, column)}: Inplace update to inference tensor outside InferenceMode is not allowed. "
                    "You can make a clone to get a normal tensor before doing inplace update."
                )
            reach = x.numel()
            if shape_only or not reach:
                continue
            contiguous = x.is_contiguous()
            if not contiguous:
                reach = 1 + sum((n - 1) * stride for n, stride in zip(shape, x.stride(), strict=True))
            width = STORAGE[x.dtype]
            start = x.data_ptr()
            end = start + reach * width
            if not start or (x.storage_offset() + reach) * width > x.untyped_storage().nbytes():
                raise RuntimeError(
                    f"{names.at(i, column)} has no memory under all of its elements, wanted {end - start} bytes of it; "
                    "its storage was freed or resized"
                )
            if written and not contiguous and _overlaps_itself(x):
                raise RuntimeError(
                    f"{names.at(i, column)} overlaps itself: shape {tuple(shape)} with strides {x.stride()}; "
                    "wanted a tensor whose elements lie apart, such as .clone() of it"
                )
            spans.append((start, end, i, column, written, x))
    if in_place or outs is not None:
        _refuse_overlap(names, spans, tally)
    return shape_only


def factors_in_range(op: str, values: Iterable[float], outs: list[Tensor], inputs: list[tuple[Tensor, ...]]) -> None:
    """A factor that float32 cannot hold wants a float64 tensor in every item."""
    for value in values:
        if abs(value) >= F32_OVERFLOW:
            for out, row in zip(outs, inputs, strict=True):
                if not any(x.dtype == torch.float64 for x in (out, *row)):
                    raise ValueError(
                        f"{op}: a factor of {value} is infinite in float32, in which this is computed; "
                        "wanted less than 2^128, or a float64 tensor"
                    )


def _unusable(x: Tensor) -> str | None:
    """Why the kind of a tensor rules it out."""
    if type(x) not in _PLAIN:
        return f"is of the subclass {type(x).__name__}, wanted a plain tensor or a Parameter; pass the tensor it wraps"
    if x.dtype not in STORAGE:
        return f"has dtype {x.dtype}, {_WANTED}"
    if x.is_nested:
        return "is a nested tensor, wanted a strided one; pass .unbind() of it as a list"
    if x.layout is not torch.strided:
        return f"has layout {x.layout}, wanted a strided tensor; pass .to_dense() of it, or its values"
    if x.is_neg():
        return "is a negated view, whose memory holds other signs than it shows; pass .resolve_neg() of it"
    return None


def _note(x: Tensor) -> str:
    """What is to be added where a dtype is refused that only the tensor's memory explains."""
    if x.dtype != torch.uint8 or type(x) is not Tensor or x.device.type != "cpu" or x.is_nested:
        return ""
    note = regions.note(x.data_ptr()) if x.layout is torch.strided and _transform(x) is None else None
    return f"; {note}" if note else ""


def _transform(x: Tensor) -> str | None:
    """What of torch's transforms a tensor is in that would not be carried on."""
    if is_functorch_wrapped_tensor(x):
        return "is inside of a transform of torch.func, which these operations do not know; call them outside of it"
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
        return "has a tangent, and these operations are not differentiable; pass the primal of unpack_dual()"
    return None


def _place(x: Tensor) -> str:
    return f"{x.device} as a fake tensor" if type(x) is FakeTensor else str(x.device)


def _autograd_problem(x: Tensor, written: bool) -> str:
    if written and x.is_leaf:
        return "a leaf Variable that requires grad is being used in an in-place operation; use it under torch.no_grad()"
    return "requires grad, and these operations are not differentiable; call them under torch.no_grad()"


def _refuse_overlap(names: Names, spans: list[_Span], tally: bool) -> None:
    """A written tensor may be exactly an operand of its own item, and shares no memory with anything else.

    A sweep over the spans in the order of their addresses: only spans that overlap are compared element by element.
    """
    spans.sort(key=_START)
    earlier: list[_Span] = []
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


def _overlaps_itself(x: Tensor) -> bool:
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


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, _TEXT)


def _columns(names: Names, columns: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """Arguments that are known to be sequences of one length."""
    for arg, column in zip(names.args, columns, strict=True):
        if not _is_sequence(column):
            raise TypeError(f"{names.op}: {arg} is {_kind(column)}, wanted a list as {names.args[0]} is")
        if len(column) != len(columns[0]):
            raise ValueError(f"{names.op}: {arg} has {len(column)} entries, {names.args[0]} has {len(columns[0])}")
    return columns


def _table(names: Names, table: list[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
    for i, row in enumerate(table):
        for j, x in enumerate(row):
            if not isinstance(x, Tensor):
                raise TypeError(f"{names.at(i, j)} is {_kind(x)}, wanted a tensor")
    return table


def _first(names: Names, item: int) -> str:
    return names.at(item, 0).split()[-1]


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
