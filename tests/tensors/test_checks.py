"""Bad input to the tensor operations: the error, what it says, and that the target is as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import STORAGE
from torch import Tensor

import ires_kernels as ik
from ires_kernels.tensors import overlap
from ires_kernels.tensors.overlap import _share_memory, overlaps_itself

pytestmark = pytest.mark.usefixtures("backend")


def ones(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def memory(t: Tensor) -> bytes:
    """All bytes of the storage, whatever kind of view `t` is."""
    storage = t.untyped_storage()
    return bytes(torch.empty(0, dtype=torch.uint8).set_(storage).tolist())


def refused(error: type[Exception], message: str, target: Tensor, call: Callable[[], object]) -> None:
    """The call raises, with all of the message, and leaves the target's memory and version alone."""
    before, version = memory(target), None if target.is_inference() else target._version
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert memory(target) == before
    assert version is None or target._version == version


# Shapes and sequences


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 3), (3, 2), (2, 3, 1), ()], ids=str)
def test_shape_mismatch(shape: tuple[int, ...]) -> None:
    t = ones(2, 3)
    message = f"residual has shape {shape}, t has (2, 3); wanted equal shapes: nothing is broadcast"
    refused(ValueError, f"add_: {message}", t, lambda: ik.add_(t, ones(*shape)))
    refused(ValueError, f"add_: {message.replace('residual', 'residual[1]')}", t, lambda: ik.add_(t, [t, ones(*shape)]))
    refused(ValueError, f"add_difference_: y has shape {shape}", t, lambda: ik.add_difference_(t, t, ones(*shape)))
    refused(
        ValueError, f"subtract: out has shape {shape}, a has (2, 3)", t, lambda: ik.subtract(t, t, out=ones(*shape))
    )
    refused(
        ValueError,
        f"scale: out[1] has shape {shape}, t[1] has (2, 3)",
        t,
        lambda: ik.scale([t.clone(), t], 2.0, out=[ones(2, 3), ones(*shape)]),
    )


def test_lists_that_do_not_match() -> None:
    t = ones(4)
    for error, message, call in (
        (ValueError, "add_: residual has 1 entries, t has 2", lambda: ik.add_([t, ones(4)], [ones(4)])),
        (TypeError, "add_: residual is of type Tensor, wanted a list as t is", lambda: ik.add_([t], ones(4))),
        (TypeError, "subtract: b is of type list, wanted a tensor", lambda: ik.subtract(t, [t])),
        (TypeError, "scale: t is of type dict", lambda: ik.scale({}, 2.0)),
        (TypeError, "scale_: t is None", lambda: ik.scale_(None, 2.0)),
        (TypeError, "scale_: t[1] is of type float, wanted a tensor", lambda: ik.scale_([t, 1.0], 2.0)),
        (TypeError, "scale: t is of type str", lambda: ik.scale("weights", 2.0)),
        (TypeError, "add_: residual is of type ndarray", lambda: ik.add_(t, np.ones(4))),
        (TypeError, "add_: residual[0] is of type ndarray", lambda: ik.add_(t, [np.ones(4)])),
        (ValueError, "add_: residual is empty", lambda: ik.add_(t, [])),
        (ValueError, "add_: residual[0] is empty", lambda: ik.add_([t], [[]])),
        (
            ValueError,
            "add_: residual[1] has 1 tensors, residual[0] has 2",
            lambda: ik.add_([t, ones(4)], [[ones(4)] * 2, [ones(4)]]),
        ),
        (
            TypeError,
            "add_: residual[1] is of type Tensor, others are lists",
            lambda: ik.add_([t, ones(4)], [[ones(4)], ones(4)]),
        ),
        (ValueError, "scale: out has 1 tensors, t has 2", lambda: ik.scale([t, t], 2.0, out=[ones(4)])),
        (TypeError, "scale: out is of type Tensor, wanted a list", lambda: ik.scale([t], 2.0, out=ones(4))),
        (TypeError, "scale: out is of type list, wanted a tensor", lambda: ik.scale(t, 2.0, out=[ones(4)])),
    ):
        refused(error, message, t, call)


# Dtypes


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint32, torch.bool, torch.complex64]
    + ([torch.float8_e4m3fnuz] if hasattr(torch, "float8_e4m3fnuz") else []),
    ids=str,
)
def test_dtypes_that_are_not_storage_types(dtype: torch.dtype) -> None:
    t, other = ones(4), torch.ones(4).to(dtype)
    wanted = f"has dtype {dtype}, wanted one of float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2"
    refused(TypeError, f"add_: residual {wanted}", t, lambda: ik.add_(t, other))
    refused(TypeError, f"add_: t {wanted}", other, lambda: ik.add_(other, t))
    refused(TypeError, f"subtract: out {wanted}", other, lambda: ik.subtract(t, t, out=other))
    refused(TypeError, f"scale: dtype is {dtype}, wanted one of", t, lambda: ik.scale(t, 2.0, dtype=dtype))


def test_dtype_arguments() -> None:
    t = ones(4)
    refused(TypeError, "scale: dtype is brain16, wanted one of", t, lambda: ik.scale(t, 2.0, dtype="brain16"))
    assert ik.scale(t, 2.0, dtype="bfloat16").dtype == ik.scale(t, 2.0, dtype="torch.bfloat16").dtype == torch.bfloat16
    message = "scale: out has dtype torch.bfloat16, and dtype= asks for torch.float32"
    refused(ValueError, message, t, lambda: ik.scale(ones(4), 2.0, out=t, dtype=torch.float32))
    assert ik.scale(ones(4), 2.0, out=t, dtype=torch.bfloat16) is t


# Numbers


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (math.nan, ValueError, "is nan, wanted a finite number"),
        (math.inf, ValueError, "is inf, wanted a finite number"),
        (-math.inf, ValueError, "is -inf, wanted a finite number"),
        (np.float32(np.inf), ValueError, "is inf, wanted a finite number"),
        (10**400, ValueError, "is beyond the range of float64"),
        (True, TypeError, "is of type bool, wanted a real number"),
        (np.bool_(True), TypeError, "wanted a real number"),
        (1j, TypeError, "is of type complex, wanted a real number"),
        ("0.5", TypeError, "is of type str, wanted a real number"),
        (None, TypeError, "is None, wanted a real number"),
        (torch.tensor(0.5), TypeError, "is of type Tensor, wanted a real number; pass its .item()"),
        (1e39, ValueError, "a factor of 1e+39 is infinite in float32"),
        (-float(2**128 - 2**103), ValueError, "is infinite in float32"),
    ],
    ids=str,
)
def test_factors_that_are_not_finite_numbers(value: Any, error: type[Exception], message: str) -> None:
    t = ones(4)
    for name, call in (
        ("add_", lambda: ik.add_(t, ones(4), value)),
        ("add_", lambda: ik.add_(t, [ones(4), ones(4)], [1.0, value])),
        ("add_difference_", lambda: ik.add_difference_(t, ones(4), ones(4), value)),
        ("scale_", lambda: ik.scale_(t, value)),
        ("scale", lambda: ik.scale([ones(4)], value, out=[t])),
    ):
        refused(error, message, t, call)
        refused(error, name, t, call)


def test_factors_that_only_float64_holds() -> None:
    assert ik.scale(ones(1, dtype=torch.float64), 1e39).item() == 1e39
    assert ik.scale(ones(1), 1e39, dtype=torch.float64).item() == 1e39
    largest = float(np.finfo(np.float32).max)
    assert ik.scale(torch.ones(1), largest).item() == largest
    assert ik.scale(torch.ones(1), np.nextafter(float(2**128 - 2**103), 0)).item() == largest
    assert ik.scale(torch.ones(1), Fraction(1, 2)).item() == 0.5


def test_as_many_alphas_as_residuals() -> None:
    t = ones(4)
    message = "add_: alpha has 1 numbers for 2 residuals"
    refused(ValueError, message, t, lambda: ik.add_(t, [ones(4), ones(4)], [1.0]))
    refused(ValueError, "alpha has 2 numbers for 1 residuals", t, lambda: ik.add_([t], [ones(4)], [1.0, 2.0]))
    refused(TypeError, "add_: alpha[1] is None", t, lambda: ik.add_(t, [ones(4), ones(4)], [1.0, None]))


def test_pairs_that_do_not_match() -> None:
    t, x, y = ones(4), ones(4), ones(4)
    refused(ValueError, "add_difference_: alpha has 1 numbers for 2 pairs", t,
            lambda: ik.add_difference_(t, [x, x], [y, y], [1.0]))  # fmt: skip
    refused(ValueError, "add_difference_: y has 1 tensors, x has 2; wanted one for each, or one for all", t,
            lambda: ik.add_difference_(t, [x, x], [y]))  # fmt: skip
    refused(ValueError, "add_difference_: x[1] has 1 tensors, x[0] has 2; wanted the same number for every target", t,
            lambda: ik.add_difference_([t, ones(4)], [[x, x], [x]], [y, y]))  # fmt: skip
    refused(TypeError, "add_difference_: x[1] is of type Tensor, others are lists of tensors", t,
            lambda: ik.add_difference_([t, ones(4)], [[x, x], x], [y, y]))  # fmt: skip
    refused(ValueError, "add_difference_: x is empty, wanted at least one tensor", t,
            lambda: ik.add_difference_(t, [], y))  # fmt: skip
    refused(TypeError, "add_difference_: y is of type list, wanted a tensor", t, lambda: ik.add_difference_(t, x, [y]))
    refused(ValueError, "add_difference_: y[1] has shape (3,)", t,
            lambda: ik.add_difference_(t, [x, x], [y, ones(3)]))  # fmt: skip
    refused(RuntimeError, "add_difference_: t", t, lambda: ik.add_difference_(t[:3], [x[:3], t[1:]], y[:3]))


def test_alpha_zero_still_validates() -> None:
    t = ones(4)
    refused(ValueError, "has shape (3,)", t, lambda: ik.add_(t, ones(3), 0.0))
    refused(ValueError, "rounding is 'up'", t, lambda: ik.add_difference_(t, t, t, 0.0, rounding="up"))
    refused(TypeError, "has dtype torch.int64", t, lambda: ik.add_(t, ones(4).long(), 0))


@pytest.mark.parametrize("name", ["seed", "stream", "offset"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "is -1, wanted an integer from 0 to 2^64 - 1"),
        (2**64, ValueError, "is 18446744073709551616, wanted an integer"),
        (1.0, TypeError, "is of type float, wanted an integer"),
        (True, TypeError, "is of type bool, wanted an integer"),
        ("7", TypeError, "is of type str, wanted an integer"),
        (None, TypeError, "is None, wanted an integer"),
    ],
    ids=str,
)
def test_random_streams_are_64_bit_integers(name: str, value: Any, error: type[Exception], message: str) -> None:
    t = ones(4)
    refused(error, f"scale_: {name} {message}", t, lambda: ik.scale_(t, 2.0, **{name: value}))
    assert ik.scale(t, 2.0, **{name: np.uint64(2**64 - 1)}).tolist() == [2.0] * 4


def test_streams_of_a_list() -> None:
    t = ones(4)
    refused(
        ValueError, "scale_: stream has 1 integers for 2 tensors", t, lambda: ik.scale_([t, ones(4)], 2.0, stream=[1])
    )
    refused(ValueError, "scale_: stream[1] is -1", t, lambda: ik.scale_([t, ones(4)], 2.0, stream=[1, -1]))


@pytest.mark.parametrize("rounding", ["Nearest", "up", None, 1, ""], ids=str)
def test_roundings(rounding: Any) -> None:
    t = ones(4)
    message = f'scale_: rounding is {rounding!r}, wanted "nearest" or "stochastic"'
    refused(ValueError, message, t, lambda: ik.scale_(t, 2.0, rounding=rounding))


# Kinds of tensors


def test_strided_targets_work_and_keep_their_gaps() -> None:
    whole = torch.zeros(6, 6, dtype=torch.bfloat16)
    ik.add_(whole[::2, 1::2].t(), ones(3, 3))
    assert whole.sum() == 9
    assert whole[::2, 1::2].sum() == 9


def test_negated_and_conjugated_views() -> None:
    z = torch.tensor([1 + 2j, 3 + 4j])
    negated = torch.conj(z).imag
    assert negated.is_neg()
    t = torch.ones(2)
    refused(TypeError, "add_: residual is a negated view", t, lambda: ik.add_(t, negated))
    refused(TypeError, "scale_: t is a negated view", z, lambda: ik.scale_(negated, 2.0))
    refused(TypeError, "scale_: t has dtype torch.complex64", z, lambda: ik.scale_(z.conj(), 2.0))
    assert ik.scale(negated.resolve_neg(), 2.0).tolist() == [-4.0, -8.0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr", "mkldnn", "nested", "jagged"])
def test_layouts_other_than_strided(layout: str) -> None:
    t = torch.ones(2, 2)
    if layout == "nested":
        odd = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    elif layout == "jagged":
        odd = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    else:
        odd = {"coo": t.to_sparse, "csr": t.to_sparse_csr, "mkldnn": t.to_mkldnn}[layout]()
    message = {"nested": "is a nested tensor", "jagged": "is of the subclass NestedTensor"}.get(
        layout, "has layout torch."
    )
    refused(TypeError, f"add_: residual {message}", t, lambda: ik.add_(t, odd))
    refused(TypeError, f"scale_: t {message}", t, lambda: ik.scale_(odd, 2.0))
    refused(TypeError, f"subtract: out {message}", t, lambda: ik.subtract(t, t, out=odd))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantized_tensors() -> None:
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    t = torch.ones(4)
    refused(TypeError, "add_: residual has dtype torch.qint8", t, lambda: ik.add_(t, quantized))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # what torch itself uses for tangents
def test_transforms_of_torch() -> None:
    from torch.autograd import forward_ad

    t, r = torch.ones(4), torch.ones(4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(t, torch.ones(4))
        with pytest.raises(RuntimeError, match="scale_: t has a tangent"):
            ik.scale_(dual, 3.0)
        with pytest.raises(RuntimeError, match="add_: residual has a tangent"):
            ik.add_(r, dual)
        ik.add_(r, r.clone())
    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(RuntimeError, match=r"scale: t is inside of a transform of torch\.func"):
            transform(lambda x: ik.scale(x, 3.0).sum())(t)
    assert t.tolist() == [1.0] * 4


def test_subclasses() -> None:
    class Tagged(Tensor):
        pass

    t, tagged = torch.ones(4), torch.ones(4).as_subclass(Tagged)
    message = "is of the subclass Tagged, wanted a plain tensor or a Parameter"
    refused(TypeError, f"add_: residual {message}", t, lambda: ik.add_(t, tagged))
    refused(TypeError, f"scale_: t {message}", t, lambda: ik.scale_(tagged, 2.0))
    assert ik.scale(torch.nn.Parameter(t, requires_grad=False), 2.0).tolist() == [2.0] * 4


def test_tensors_inside_a_function_transform() -> None:
    """torch.vmap passes tensors that have no memory of their own."""
    t = torch.ones(3)
    with pytest.raises(RuntimeError):
        torch.vmap(lambda x: ik.add_(t, x))(torch.ones(2, 3))
    assert t.tolist() == [1.0] * 3


# Memory


def test_targets_that_overlap_themselves() -> None:
    one = ones(1)
    refused(
        RuntimeError,
        "scale_: t overlaps itself: shape (4,) with strides (0,)",
        one,
        lambda: ik.scale_(one.expand(4), 2.0),
    )
    row = torch.arange(8.0)
    windows = row.as_strided((3, 4), (2, 1))
    refused(
        RuntimeError,
        "add_: t overlaps itself: shape (3, 4) with strides (2, 1)",
        row,
        lambda: ik.add_(windows, ones(3, 4)),
    )
    refused(
        RuntimeError,
        "scale: out[1] overlaps",
        row,
        lambda: ik.scale([ones(4)] * 2, 2.0, out=[ones(4), row[:1].expand(4)]),
    )
    assert ik.add(windows, windows).tolist() == (2 * windows).tolist()  # as operands they are fine
    ik.scale_(one.expand(1, 1), 2.0)  # a stride of 0 over one element is nothing
    assert one.item() == 2.0


def test_interleaved_views_that_do_not_overlap() -> None:
    t = torch.arange(10.0)
    ik.add_(t[::2], t[1::2])
    assert t.tolist() == [1.0, 1.0, 5.0, 3.0, 9.0, 5.0, 13.0, 7.0, 17.0, 9.0]
    square = torch.arange(16.0).view(4, 4)
    ik.add_([square[:, 0], square[:, 2]], [square[:, 1], square[:, 3]])
    assert square[:, 0].tolist() == [1.0, 9.0, 17.0, 25.0]
    # strides 2 and 3 with three elements each never meet, though neither stride steps over the other dimension
    odd = torch.zeros(12)
    ik.add_(odd.as_strided((3, 2), (2, 3)), torch.ones(3, 2))
    assert odd.sum() == 6


def test_partial_overlap_of_target_and_operand() -> None:
    t = torch.arange(10.0)
    message = "add_: t shares memory with residual and is not the same tensor; pass a .clone() of one"
    refused(RuntimeError, message, t, lambda: ik.add_(t[:9], t[1:]))
    refused(RuntimeError, message, t, lambda: ik.add_(t[1:], t[:9]))
    refused(RuntimeError, message, t, lambda: ik.add_(t.view(2, 5)[:, :2], t.view(5, 2).t()[:, :2]))
    refused(
        RuntimeError, message, t, lambda: ik.add_(t.view(torch.float64).view(1, 5)[:, :2], t.view(5, 2).t()[:1, 1:3])
    )
    refused(RuntimeError, message, t, lambda: ik.add_(t, t.view(torch.bfloat16)[:10]))
    refused(RuntimeError, message, t, lambda: ik.add_(t[:1].view(torch.bfloat16), t[:1].view(torch.float16)))
    refused(RuntimeError, message, t, lambda: ik.add_(t[:9].view(3, 3), t[:9].view(3, 3).t()))
    refused(RuntimeError, "subtract: out shares memory with b", t, lambda: ik.subtract(ones(9), t[1:], out=t[:9]))
    refused(RuntimeError, "add_: t shares memory with residual[1]", t, lambda: ik.add_(t[:9], [ones(9), t[1:]]))
    small = t.view(torch.float8_e5m2)
    refused(RuntimeError, message, t, lambda: ik.add_(small[:20], small[19:39]))  # by a byte
    # two operands may overlap as they like
    assert ik.subtract(t[1:], t[:9]).tolist() == [1.0] * 9


def test_targets_of_a_list_that_share_memory() -> None:
    t = torch.arange(10.0)
    tied = "scale_: t[1] is t[0] again, the same tensor, and would be written twice; if they are tied, pass it once"
    refused(RuntimeError, tied, t, lambda: ik.scale_([t, t], 2.0))
    refused(RuntimeError, tied, t, lambda: ik.scale_([t, torch.nn.Parameter(t, requires_grad=False)], 2.0))
    refused(RuntimeError, "t[2] shares memory with t[0]", t, lambda: ik.scale_([t, ones(2), t.view(2, 5)], 2.0))
    message = "add_: t[0] is written and residual[1] is the same tensor, which another entry reads; pass a .clone()"
    refused(RuntimeError, message, t, lambda: ik.add_([t, ones(10)], [ones(10), t]))
    refused(RuntimeError, "shares memory with t[", t, lambda: ik.scale_([t[5:], ones(2), t[:6]], 2.0))
    refused(
        RuntimeError,
        "add: out[1] is written and residual[0][1] is the same tensor",
        t,
        lambda: ik.add([ones(10), ones(10)], [[ones(10), t], [ones(10), ones(10)]], out=[ones(10), t]),
    )
    ik.add_([t[:5], t[5:]], [t[:5], t[5:]])
    assert t.tolist() == [2.0 * i for i in range(10)]


def test_a_list_of_many_tensors_is_checked_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of one matrix overlap in extent and in nothing else; a model has hundreds of tensors.

    Only what overlaps in extent is compared exactly, and that once.
    """
    compared = [0]

    def counting(a: Tensor, b: Tensor) -> bool:
        compared[0] += 1
        return _share_memory(a, b)

    monkeypatch.setattr(overlap, "_share_memory", counting)
    apart = [torch.zeros(8) for _ in range(2000)]
    ik.add_(apart, [torch.ones(8) for _ in apart])
    assert compared == [0]
    matrix = torch.zeros(50, 200)
    columns = list(matrix.unbind(1))
    ik.scale_(columns, 2.0)
    assert compared == [200 * 199 // 2]
    with pytest.raises(RuntimeError, match="shares memory"):
        ik.scale_([*columns, matrix[7]], 2.0)


@settings(max_examples=200)
@given(st.data())
def test_overlap_is_decided_exactly(data: st.DataObject) -> None:
    """Against the sets of the addresses."""

    def view() -> tuple[Tensor, list[int]]:
        dims = data.draw(st.integers(0, 3))
        shape = [data.draw(st.integers(1, 4)) for _ in range(dims)]
        strides = [data.draw(st.integers(0, 7)) for _ in range(dims)]
        start = data.draw(st.integers(0, 12))
        t = pool.as_strided(shape, strides, start)
        return t, numbers.as_strided(shape, strides, start).flatten().tolist()

    pool, numbers = torch.zeros(100, dtype=torch.float16), torch.arange(100)
    (a, in_a), (b, in_b) = view(), view()
    assert _share_memory(a, b) == bool(set(in_a) & set(in_b))
    assert overlaps_itself(a) == (len(set(in_a)) < len(in_a))


@settings(max_examples=200)
@given(st.data())
def test_lists_are_refused_exactly_where_they_overlap(data: st.DataObject) -> None:
    pool, places = torch.zeros(60, dtype=torch.float8_e5m2), torch.arange(60)
    pairs = []
    for _ in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.integers(0, 4))
        pair = [(data.draw(st.integers(0, 40)), data.draw(st.integers(1, 5))) for _ in "tr"]
        pairs.append(
            [(pool.as_strided((count,), (step,), at), places.as_strided((count,), (step,), at)) for at, step in pair]
        )
    touched = [[set(where.tolist()) for _, where in pair] for pair in pairs]
    free = all(
        not touched[i][0] & touched[j][k] or (i == j and (k == 0 or torch.equal(pairs[i][0][1], pairs[i][1][1])))
        for i in range(len(pairs))
        for j in range(len(pairs))
        for k in (0, 1)
    )
    with nullcontext() if free else pytest.raises(RuntimeError, match=r"shares memory|the same tensor"):
        ik.add_([pair[0][0] for pair in pairs], [pair[1][0] for pair in pairs])


def test_freed_and_shrunk_storage() -> None:
    t, freed, shrunk = ones(100), ones(100), ones(100)
    views = shrunk[:75], shrunk[25:76], shrunk[::2]
    freed.untyped_storage().resize_(0)
    shrunk.untyped_storage().resize_(150)
    for odd in (freed, shrunk):
        message = (
            "residual has no memory under all of its elements, wanted 200 bytes of it; its storage was freed or resized"
        )
        refused(RuntimeError, f"add_: {message}", t, lambda odd=odd: ik.add_(t, odd))
        refused(RuntimeError, "scale_: t has no memory", t, lambda odd=odd: ik.scale_(odd, 2.0))
        refused(RuntimeError, "subtract: out has no memory", t, lambda odd=odd: ik.subtract(t, t, out=odd))
    assert ik.scale(views[0], 2.0).sum() == 150
    for view in views[1:]:
        refused(RuntimeError, "t has no memory", t, lambda view=view: ik.scale(view, 2.0))
    zeros = torch._efficientzerotensor(100)
    refused(RuntimeError, "residual has no memory", t, lambda: ik.add_(t, zeros))


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_no_elements_and_no_dimensions(dtype: torch.dtype) -> None:
    for shape in ((0,), (3, 0, 2), (0, 5)):
        t = torch.ones(shape).to(dtype)
        assert ik.add_(t, t.clone()) is t
        assert ik.subtract(t, t).shape == shape
        assert ik.scale_(t.t() if t.dim() == 2 else t, 2.0).numel() == 0
    freed = torch.ones(0).to(dtype)
    freed.untyped_storage().resize_(0)
    assert ik.scale_(freed, 2.0).numel() == 0
    scalar = torch.tensor(1.5).to(dtype)
    ik.add_(scalar, scalar.clone(), 1.0)
    assert scalar.item() == 3.0
    assert ik.subtract(scalar, torch.tensor(1.0)).item() == 2.0


@pytest.mark.parametrize("shift", range(1, 9))
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_misaligned_memory(dtype: torch.dtype, shift: int) -> None:
    raw = bytearray(shift + 100 * dtype.itemsize)
    t = torch.frombuffer(raw, dtype=dtype, count=100, offset=shift)
    t.copy_(torch.ones(100).to(dtype))
    assert t.data_ptr() % 8 == (torch.frombuffer(raw, dtype=torch.uint8).data_ptr() + shift) % 8
    ik.add_difference_(t, t, torch.zeros(100, dtype=torch.bfloat16), 0.5)
    assert t.tolist() == [1.5] * 100
    assert raw[:shift] == bytes(shift)


# Autograd and inference mode


def test_leaves_that_require_grad() -> None:
    w, t = torch.ones(3, requires_grad=True), torch.ones(3)
    with pytest.raises(RuntimeError) as torchs:
        w.add_(1)
    message = str(torchs.value).rstrip(".")
    for name, call in (
        ("scale_: t", lambda: ik.scale_(w, 2.0)),
        ("add_: t[0]", lambda: ik.add_([w], [t])),
        ("subtract: out", lambda: ik.subtract(t, t, out=w)),
    ):
        refused(RuntimeError, f"{name}: {message}", w.detach(), call)


def test_gradients_are_not_lost_silently() -> None:
    w, t = torch.ones(3, requires_grad=True), torch.ones(3)
    message = "requires grad, and these operations are not differentiable; call them under torch.no_grad()"
    refused(RuntimeError, f"add_: residual: {message}", t, lambda: ik.add_(t, w))
    refused(RuntimeError, f"subtract: a: {message}", t, lambda: ik.subtract(w, t))
    refused(RuntimeError, f"scale_: t: {message}", t, lambda: ik.scale_(w * 2, 2.0))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert ik.subtract(w, t).tolist() == [0.0] * 3


def test_inference_tensors_outside_inference_mode() -> None:
    with torch.inference_mode():
        frozen = torch.ones(3)
    with pytest.raises(RuntimeError) as torchs:
        frozen.add_(1)
    message = str(torchs.value).split(".")[0]
    refused(RuntimeError, f"scale_: t: {message}", frozen, lambda: ik.scale_(frozen, 2.0))
    refused(RuntimeError, f"scale: out: {message}", frozen, lambda: ik.scale(torch.ones(3), 2.0, out=frozen))


# Devices


def test_meta_tensors_with_real_ones() -> None:
    t, shape_only = ones(3), torch.ones(3, device="meta")
    message = "add_: residual is on meta, t is on cpu; wanted one device: nothing is copied between devices"
    refused(RuntimeError, message, t, lambda: ik.add_(t, shape_only))
    refused(RuntimeError, "out is on cpu, a is on meta", t, lambda: ik.subtract(shape_only, shape_only, out=t))
    refused(RuntimeError, "scale_: t[1] is on meta, t[0] is on cpu", t, lambda: ik.scale_([t, shape_only], 2.0))


def test_fake_tensors_with_real_ones() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(3)
    t = ones(3)
    message = "add_: residual is on cpu as a fake tensor, t is on cpu; wanted one device"
    refused(RuntimeError, message, t, lambda: ik.add_(t, fake))


def test_meta_tensors_are_checked_like_others() -> None:
    a = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match=r"b has shape \(4,\)"):
        ik.subtract(a, torch.ones(4, device="meta"))
    with pytest.raises(TypeError, match=r"torch\.int32"):
        ik.scale_(a.int(), 2.0)
    with pytest.raises(ValueError, match="rounding"):
        ik.scale_(a, 2.0, rounding="up")


@pytest.mark.gpu
def test_other_devices() -> None:
    t = ones(3)
    refused(RuntimeError, "residual is on cuda:0, t is on cpu", t, lambda: ik.add_(t, t.cuda()))


# Tally


def test_a_tally_needs_a_result_apart_from_the_operands() -> None:
    t, x = ones(4), ones(4)
    message = "subtract: out is also an operand, and tally= compares the two; use another out="
    refused(ValueError, message, t, lambda: ik.subtract(t, x, out=t, tally=ik.Tally()))
    refused(ValueError, "add_difference: out", t, lambda: ik.add_difference(x, x, t, out=t, tally=ik.Tally()))
