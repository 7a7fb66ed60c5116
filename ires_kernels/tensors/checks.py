"""Every precondition of the tensor operations, one message each: what, where, got, wanted, the way out.

Of tensors here; of numbers and words in scalars.py, of memory that operands share in overlap.py.

TypeError: an argument of the wrong kind or dtype. ValueError: a shape or a value that does not fit. RuntimeError:
memory, device or autograd state that forbids the operation. All of it is checked before the first element is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from ires_kernels.tensors import regions
from ires_kernels.tensors.names import Names, first_of, is_sequence, kind_of
from ires_kernels.tensors.overlap import Span, overlaps_itself, refuse_overlap
from ires_kernels.tensors.scalars import STORAGE, WANTED

_PLAIN = {Tensor, torch.nn.Parameter, FakeTensor}


# The shape of the argument list


def is_listed(value: Any, where: str) -> bool:
    """Whether a first argument is a sequence of tensors rather than a tensor."""
    if isinstance(value, Tensor):
        return False
    if is_sequence(value):
        return True
    raise TypeError(f"{where} is {kind_of(value)}, wanted a tensor or a list of tensors")


def rows(names: Names, *columns: Any) -> list[tuple[Tensor, ...]]:
    """Line up arguments that are all tensors, or all sequences of tensors of one length: one tuple per item."""
    return _table(names, list(zip(*_columns(names, columns), strict=True)) if names.listed else [columns])


def residual_rows(op: str, t: Any, residual: Any) -> tuple[Names, list[tuple[Tensor, ...]]]:
    """Line up targets with one residual each, or with several: (t, r1, …, rk) per item."""
    listed = is_listed(t, f"{op}: t")
    if not listed and isinstance(residual, Tensor):
        return Names(op, ("t", "residual"), False), [(t, residual)]
    targets, entries = _columns(Names(op, ("t", "residual"), listed), (t, residual)) if listed else ([t], [residual])
    many = any(is_sequence(entry) for entry in entries)
    names = Names(op, ("t", "residual"), listed, many)
    lists = entries if many else [[entry] for entry in entries]
    for i, entry in enumerate(lists):
        if not is_sequence(entry):
            raise TypeError(f"{names.at(i, 1).removesuffix('[0]')} is {kind_of(entry)}, others are lists of tensors")
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
    if not any(is_sequence(entry) for entry in columns[1]):
        return names, _table(names, list(zip(*columns, strict=True)))
    names = names._replace(many=True)
    table = []
    for i, (target, xs, ys) in enumerate(zip(*columns, strict=True)):
        where = [names.at(i, column).removesuffix("[0]") for column in (1, 2)]
        if not is_sequence(xs):
            raise TypeError(f"{where[0]} is {kind_of(xs)}, others are lists of tensors")
        if not xs:
            raise ValueError(f"{where[0]} is empty, wanted at least one tensor")
        ys = ys if is_sequence(ys) else [ys] * len(xs)
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
    elif not is_sequence(out):
        raise TypeError(f"{names.op}: out is {kind_of(out)}, wanted a list of tensors as {names.args[0]} is")
    elif len(out) != count:
        raise ValueError(f"{names.op}: out has {len(out)} tensors, {names.args[0]} has {count}")
    else:
        tensors = out
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{names.at(i, -1)} is {kind_of(x)}, wanted a tensor")
        if dtype not in (None, x.dtype):
            raise ValueError(f"{names.at(i, -1)} has dtype {x.dtype}, and dtype= asks for {dtype}; leave dtype= out")
    return list(tensors)


def operands(
    names: Names, inputs: list[tuple[Tensor, ...]], outs: list[Tensor] | None, *, in_place: bool, tally: bool = False
) -> bool:
    """Check every tensor of a launch: the operands, and the tensors given as out=, if any.

    `in_place`: the first operand of every item is written. `tally`: results must not overwrite operands.
    Returns whether the tensors have shapes only (meta or fake tensors), so that there is nothing to compute.
    """
    recording, mapped = torch.is_grad_enabled(), regions.is_any()
    spans: list[Span] = []
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
                    f"{names.at(i, column)} has shape {tuple(x.shape)}, {first_of(names, i)} has {tuple(shape)}; "
                    "wanted equal shapes: nothing is broadcast"
                )
            if device is None:
                device, fake = x.device, type(x) is FakeTensor
                shape_only = fake or x.is_meta
            elif x.device != device or (type(x) is FakeTensor) is not fake:
                raise RuntimeError(
                    f"{names.at(i, column)} is on {_place(x)}, {first_of(names, 0)} is on {_place(inputs[0][0])}; "
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
            if written and not contiguous and overlaps_itself(x):
                raise RuntimeError(
                    f"{names.at(i, column)} overlaps itself: shape {tuple(shape)} with strides {x.stride()}; "
                    "wanted a tensor whose elements lie apart, such as .clone() of it"
                )
            spans.append((start, end, i, column, written, x))
    if in_place or outs is not None:
        refuse_overlap(names, spans, tally)
    return shape_only


def _unusable(x: Tensor) -> str | None:
    """Why the kind of a tensor rules it out."""
    if type(x) not in _PLAIN:
        return f"is of the subclass {type(x).__name__}, wanted a plain tensor or a Parameter; pass the tensor it wraps"
    if x.dtype not in STORAGE:
        return f"has dtype {x.dtype}, {WANTED}"
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


def _columns(names: Names, columns: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """Arguments that are known to be sequences of one length."""
    for arg, column in zip(names.args, columns, strict=True):
        if not is_sequence(column):
            raise TypeError(f"{names.op}: {arg} is {kind_of(column)}, wanted a list as {names.args[0]} is")
        if len(column) != len(columns[0]):
            raise ValueError(f"{names.op}: {arg} has {len(column)} entries, {names.args[0]} has {len(columns[0])}")
    return columns


def _table(names: Names, table: list[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
    for i, row in enumerate(table):
        for j, x in enumerate(row):
            if not isinstance(x, Tensor):
                raise TypeError(f"{names.at(i, j)} is {kind_of(x)}, wanted a tensor")
    return table
