"""The tensor operations as a caller sees them, and that no backend, size, view, list, piece or thread changes a bit."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, lru_cache

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import STORAGE, assert_same, expected, sample, short
from torch import Tensor

import ires_kernels as ik
from ires_kernels.backends import native, reference, triton
from ires_kernels.backends.call import Call, threads
from ires_kernels.backends.choice import _fastest, choose, thread_count

SIZES = [0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 333, 1023, 1024, 1025, 4095, 4096, 4097, 33333, 65537]
PAIRS = list(itertools.product(STORAGE, STORAGE))
TRIPLES = list(itertools.product(STORAGE, STORAGE, STORAGE))
SOME_TRIPLES = random.Random(1).sample(TRIPLES, 24)
ROUNDINGS = ("nearest", "stochastic")
FACTORS = {
    "subtract": (),
    "add": (0.3,),
    "add2": (0.3, -1.7),
    "scale": (-0.7,),
    "add_difference": (0.7,),
    "add_difference2": (0.7, -1.1),
}


def mix(dtypes: tuple[torch.dtype, ...]) -> str:
    return "-".join(map(short, dtypes))


@cache
def operand(dtype: torch.dtype, column: int) -> list[Tensor]:
    return [sample(dtype, size, seed=100 * column + i) for i, size in enumerate(SIZES)]


@lru_cache(maxsize=512)  # those of the normal run, some 200 MB
def by_reference(op: str, dtypes: tuple[torch.dtype, ...], out: torch.dtype, rounding: str) -> list[Tensor]:
    outs = [torch.empty(size, dtype=out) for size in SIZES]
    inputs = list(zip(*(operand(dtype, column) for column, dtype in enumerate(dtypes)), strict=True))
    streams = list(range(len(SIZES)))
    stochastic = rounding == "stochastic"
    reference.run(Call(op.rstrip("2"), outs, inputs, FACTORS[op], stochastic, 42, streams, 3, None))
    return outs


@pytest.fixture(autouse=True, scope="module")
def forget_results() -> Iterator[None]:
    yield
    by_reference.cache_clear()
    operand.cache_clear()


def call(op: str, operands: list[list[Tensor]], out: torch.dtype, rounding: str) -> list[Tensor]:
    options = {"rounding": rounding, "seed": 42, "stream": list(range(len(SIZES))), "offset": 3}
    if op == "subtract":
        return ik.subtract(*operands, dtype=out, **options)
    if op == "scale":
        return ik.scale(*operands, *FACTORS[op], dtype=out, **options)
    if op == "add_difference":
        return ik.add_difference(*operands, *FACTORS[op], dtype=out, **options)
    if op == "add_difference2":
        t, *rest = operands
        x, y = (list(zip(*rest[i::2], strict=True)) for i in range(2))
        return ik.add_difference(t, x, y, FACTORS[op], dtype=out, **options)
    return ik.add(operands[0], list(zip(*operands[1:], strict=True)), FACTORS[op], dtype=out, **options)


def compare(op: str, dtypes: tuple[torch.dtype, ...], out: torch.dtype) -> None:
    for rounding in ROUNDINGS:
        got = call(op, [operand(dtype, column) for column, dtype in enumerate(dtypes)], out, rounding)
        for size, mine, wanted in zip(SIZES, got, by_reference(op, dtypes, out, rounding), strict=True):
            assert_same(mine, wanted, f"{op} {mix(dtypes)} to {short(out)}, {rounding}, {size} elements")


# Backends against the reference


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("pair", PAIRS, ids=mix)
def test_pairs_of_types(pair: tuple[torch.dtype, torch.dtype]) -> None:
    first, second = pair
    compare("subtract", pair, torch.float32)
    compare("subtract", pair, first)
    compare("add", pair, first)
    compare("add2", (first, second, first), first)
    compare("scale", (first,), second)
    compare("add_difference", (first, second, second), first)
    compare("add_difference2", (first, second, second, second, first), first)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("triple", SOME_TRIPLES, ids=mix)
def test_triples_of_types(triple: tuple[torch.dtype, ...]) -> None:
    compare("add_difference", triple, triple[0])
    compare("add2", triple, triple[0])


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("triple", TRIPLES, ids=mix)
def test_all_triples_of_types(triple: tuple[torch.dtype, ...]) -> None:
    for out in STORAGE:
        compare("add_difference", triple, out)
        compare("add2", triple, out)
        compare("subtract", triple[1:], out)


# In place, apart, and into given memory


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", STORAGE, ids=short)
def test_in_place_equals_apart(dtype: torch.dtype, rounding: str) -> None:
    t, x, y = (sample(dtype, 5000, seed) for seed in range(3))
    options = {"rounding": rounding, "seed": 5, "stream": 6, "offset": 7}
    for name, arguments in (
        ("add", (x, 0.3)),
        ("add", ([x, y], [0.3, -0.1])),
        ("scale", (0.3,)),
        ("add_difference", (x, y, 0.3)),
    ):
        apart = getattr(ik, name)(t, *arguments, **options)
        target = t.clone()
        assert getattr(ik, f"{name}_")(target, *arguments, **options) is target
        assert_same(target, apart, name)
        given_memory = torch.empty_like(t)
        assert getattr(ik, name)(t, *arguments, out=given_memory, **options) is given_memory
        assert_same(given_memory, apart, f"{name} out=")
        over = t.clone()
        getattr(ik, name)(over, *arguments, out=over, **options)
        assert_same(over, apart, f"{name} out=t")


@pytest.mark.usefixtures("backend")
def test_the_target_may_be_any_operand() -> None:
    t, x = sample(torch.bfloat16, 3000, 0), sample(torch.bfloat16, 3000, 1)
    for a, b, c in ((0, 0, 1), (0, 1, 0), (0, 0, 0)):
        for n in (3000, 17):
            pool = [t[:n].clone(), x[:n].clone()]
            wanted = expected("add_difference", [pool[a], pool[b], pool[c]], (0.7,), torch.bfloat16)
            assert_same(ik.add_difference_(pool[a], pool[b], pool[c], 0.7), wanted)
    wanted = expected("subtract", [t, x], (), torch.bfloat16)
    assert_same(ik.subtract(t, x.clone(), out=t), wanted)


def test_dtypes_of_results() -> None:
    bf16, f32, f64 = (torch.ones(3, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    assert ik.subtract(bf16, bf16).dtype == torch.float32
    assert ik.subtract(bf16, f64).dtype == torch.float64
    assert ik.subtract(bf16, f64, dtype=torch.float8_e5m2).dtype == torch.float8_e5m2
    assert ik.add(bf16, f32).dtype == torch.bfloat16
    assert ik.add(bf16, [f32, f64], dtype=torch.float16).dtype == torch.float16
    assert ik.scale(f64, 2).dtype == torch.float64
    assert ik.add_difference(bf16, f64, f32).dtype == torch.bfloat16
    assert [x.dtype for x in ik.subtract([bf16, f64], [f32, f32])] == [torch.float32, torch.float64]
    assert [x.dtype for x in ik.add([bf16, f64], [f32, f32])] == [torch.bfloat16, torch.float64]


@pytest.mark.usefixtures("backend")
def test_factors_of_every_kind_of_number() -> None:
    t = torch.ones(4)
    for two in (2, 2.0, np.float32(2), np.int64(2)):
        assert ik.scale(t, two).tolist() == [2.0] * 4
    assert ik.add(t, [t, t], 2).tolist() == [5.0] * 4
    assert ik.add(t, [t, t], (2, -1)).tolist() == [2.0] * 4
    assert ik.add([t], [[t, t]], [2, -1])[0].tolist() == [2.0] * 4


@pytest.mark.usefixtures("backend")
def test_alpha_zero_changes_nothing_in_place() -> None:
    bits = oracle.from_codes(np.arange(2**16), torch.bfloat16)  # NaN payloads and -0 among them
    bad = torch.full_like(bits, float("nan"))
    t = bits.clone()
    version = t._version
    ik.add_(t, bad, 0.0)
    ik.add_(t, [bad, bad], [0.0, -0.0])
    ik.add_difference_(t, bad, bad, 0)
    assert np.array_equal(oracle.codes(t), oracle.codes(bits))
    assert t._version == version
    assert ik.add(t, bad, 0.0).isnan().all()  # apart, it is the arithmetic: 0 * NaN is NaN
    assert ik.add_(torch.ones(2), [torch.ones(2), torch.ones(2)], [0.0, 1.0]).tolist() == [2.0, 2.0]


# Sequences


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_lists_equal_loops(rounding: str) -> None:
    shapes = [(5, 7), (), (0, 3), (1000,), (33, 65), (1,)]
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float8_e5m2, torch.float64, torch.bfloat16]
    t, x, y = (
        [
            sample(dtypes[(i + k) % 6], max(1, int(np.prod(s))), i + 10 * k)[: int(np.prod(s))].view(s)
            for i, s in enumerate(shapes)
        ]
        for k in range(3)
    )
    streams = [3, 1, 4, 1, 5, 9]
    options = {"rounding": rounding, "seed": 7, "offset": 11}
    whole = [
        ik.subtract(x, y, stream=streams, **options),
        ik.add(t, x, 0.3, stream=streams, **options),
        ik.add(t, [[a, b] for a, b in zip(x, y, strict=True)], [0.3, 0.7], stream=streams, **options),
        ik.scale(tuple(t), 0.3, stream=tuple(streams), **options),
        ik.add_difference(t, x, y, 0.3, stream=streams, **options),
    ]
    for i, stream in enumerate(streams):
        parts = [
            ik.subtract(x[i], y[i], stream=stream, **options),
            ik.add(t[i], x[i], 0.3, stream=stream, **options),
            ik.add(t[i], [x[i], y[i]], [0.3, 0.7], stream=stream, **options),
            ik.scale(t[i], 0.3, stream=stream, **options),
            ik.add_difference(t[i], x[i], y[i], 0.3, stream=stream, **options),
        ]
        for results, part in zip(whole, parts, strict=True):
            assert isinstance(results, list)
            assert_same(results[i], part)
    targets = [a.clone() for a in t]
    assert ik.add_difference_(targets, x, y, 0.3, stream=streams, **options) is targets
    outs = [torch.empty_like(a) for a in t]
    assert ik.add_difference(t, x, y, 0.3, out=outs, stream=streams, **options) is outs
    for one, two, three in zip(targets, outs, whole[4], strict=True):
        assert_same(one, three)
        assert_same(two, three)


def test_empty_lists() -> None:
    assert ik.subtract([], []) == []
    assert ik.add([], []) == []
    assert ik.add_((), ()) == ()
    assert ik.scale_([], 2.0) == []
    assert ik.add_difference([], [], [], out=[]) == []


# Pieces, threads, memory


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_pieces_equal_the_whole(rounding: str) -> None:
    n = 2000
    t, x, y = (sample(dtype, n, 0) for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn))
    options = {"rounding": rounding, "seed": 2**63 + 5, "stream": 2**64 - 1}
    for base in (0, 2**32 - 1001, 2**64 - 999):  # across the borders of 32 and 64 bits
        whole = ik.add_difference(t, x, y, 0.3, offset=base, **options)
        cuts = [0, 1, 3, 4, 7, 100, 131, 1000, 1001, n]
        for start, end in itertools.pairwise(cuts):
            part = slice(start, end)
            got = ik.add_difference(t[part], x[part], y[part], 0.3, offset=(base + start) % 2**64, **options)
            assert_same(got, whole[part], f"{start}:{end} of {base}")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_thread_counts_do_not_matter(rounding: str) -> None:
    n = 7 * 100_003
    t, r = sample(torch.bfloat16, n, 0), sample(torch.float32, n, 1)
    results = []
    for count in (1, 2, 3):
        token = threads.set(count)
        try:
            assert thread_count() == count
            one = ik.add(t, r, 0.3, rounding=rounding)
            two = ik.add(t.view(7, -1)[:, 1:], r.view(7, -1)[:, 1:], 0.3, rounding=rounding)
        finally:
            threads.reset(token)
        results.append((one, two))
    for one, two in results[1:]:
        assert_same(one, results[0][0])
        assert_same(two, results[0][1])
    assert thread_count() == torch.get_num_threads()


@pytest.mark.usefixtures("backend")
def test_a_reference_piece_border_inside_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference cuts large tensors; cutting at other places changes nothing."""
    shape = (3, 1, 5, 7, 11)
    t, r = sample(torch.bfloat16, 1155, 0).view(shape), sample(torch.float32, 1155, 1).view(shape).transpose(2, 3)
    t = t.transpose(2, 3)
    whole = ik.add(t, r, 0.3, rounding="stochastic")
    for piece in (1, 2, 10, 100):
        monkeypatch.setattr(reference, "PIECE", piece)
        assert_same(ik.add(t, r, 0.3, rounding="stochastic"), whole, f"{piece}")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("pair", [p for p in PAIRS if p[0].itemsize <= p[1].itemsize], ids=mix)
def test_nothing_is_touched_around_the_operands(pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Every size up to a few vectors, ending at a page that may not be read and starting after one."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    areas = []
    for _ in pair:
        area = mmap.mmap(-1, 4 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for guard in (address, address + 3 * page):
            assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
        areas.append((area, address))
    try:
        for n in [*range(1, 70), 127, 128, 129, 255, 500]:
            data = [sample(dtype, n, n) for dtype in pair]
            wanted = expected("add", data, (0.5,), pair[0])
            for at_end in (True, False):
                views = []
                for dtype, (area, _) in zip(pair, areas, strict=True):
                    offset = 3 * page - n * dtype.itemsize if at_end else page
                    views.append(torch.frombuffer(area, dtype=dtype, count=n, offset=offset))
                for view, values in zip(views, data, strict=True):
                    view.copy_(values)
                assert_same(ik.add_(*views, 0.5), wanted, f"{n} elements")
                del views, view
    finally:
        for _, address in areas:
            for guard in (address, address + 3 * page):
                libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.usefixtures("backend")
def test_strides_beyond_32_bits() -> None:
    """Two short rows more than 2^31 elements apart; the memory between them is never touched, so it costs nothing."""
    rows = torch.empty(2**31 + 100, dtype=torch.float8_e5m2).as_strided((2, 40), (2**31 + 5, 1))
    data = sample(torch.float8_e5m2, 80, 0).view(2, 40)
    rows.copy_(data)
    other = sample(torch.bfloat16, 80, 1).view(2, 40)
    assert_same(ik.add_(rows, other, 0.5), expected("add", [data, other], (0.5,), torch.float8_e5m2))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_more_than_2_to_the_31_elements() -> None:
    n = 2**31 + 17
    t = torch.full((n,), 1.0, dtype=torch.float8_e5m2)
    x = torch.tensor([0.5], dtype=torch.float8_e5m2).expand(n)
    ik.add_(t, x, 1.0)
    assert (t.view(torch.uint8) == oracle.codes(torch.tensor([1.5], dtype=t.dtype))[0]).all()


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, bytearray]:
    """A tensor of this shape with drawn values, in drawn order of dimensions, steps, gaps and alignment."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    gaps = [draw(st.sampled_from([0, 0, 1, 5])) for _ in shape]
    lengths = [n * step + gap for n, step, gap in zip(shape, steps, gaps, strict=True)]
    count = max(1, int(np.prod(lengths)))
    shift = draw(st.integers(0, 9))
    memory = bytearray(b"\xa5" * (shift + count * dtype.itemsize))
    whole = torch.frombuffer(memory, dtype=dtype, count=count, offset=shift)
    whole = whole[: int(np.prod(lengths))].view([lengths[d] for d in order])
    whole = whole.permute([order.index(d) for d in range(len(shape))])
    view = whole[tuple(slice(gap, gap + n * step, step) for n, step, gap in zip(shape, steps, gaps, strict=True))]
    assert view.shape == shape
    view.copy_(sample(dtype, max(1, int(np.prod(shape))), seed)[: int(np.prod(shape))].view(shape))
    return view, memory


@pytest.mark.usefixtures("backend")
@settings(max_examples=150)
@given(st.data())
def test_any_view_of_anything(data: st.DataObject) -> None:
    """Shapes, strides, alignments, types, factors, rounding and streams at will, against the independent oracle."""
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4)))
    op = data.draw(st.sampled_from(list(FACTORS)))
    columns = {"subtract": 2, "add": 2, "add2": 3, "scale": 1, "add_difference": 3, "add_difference2": 5}[op]
    dtypes = data.draw(st.tuples(*[st.sampled_from(STORAGE)] * (columns + 1)))
    tensors, memories = zip(
        *(data.draw(views(shape, dtype, seed)) for seed, dtype in enumerate(dtypes)),
        strict=True,
    )
    finite = st.floats(-(2.0**40), 2.0**40, allow_subnormal=False)
    factors = tuple(data.draw(finite) for _ in FACTORS[op])
    word = st.integers(0, 2**64 - 1)
    options = {
        "rounding": data.draw(st.sampled_from(ROUNDINGS)),
        "seed": data.draw(word),
        "stream": data.draw(word),
        "offset": data.draw(word),
    }
    out, *inputs = tensors
    wanted = expected(op.rstrip("2"), inputs, factors, out.dtype, **options)
    before = [bytearray(memory) for memory in memories]
    if op == "subtract":
        ik.subtract(*inputs, out=out, **options)
    elif op == "add2":
        ik.add(inputs[0], inputs[1:], factors, out=out, **options)
    elif op == "add_difference2":
        ik.add_difference(inputs[0], inputs[1::2], inputs[2::2], factors, out=out, **options)
    else:
        getattr(ik, op)(*inputs, *factors, out=out, **options)
    assert_same(out, wanted)
    assert list(memories[1:]) == before[1:], "an operand was changed"
    # what lies between the elements of the result is as it was: undo the elements and compare everything
    out.copy_(out_as_it_was(out, memories[0], before[0]))
    assert memories[0] == before[0], "memory between the elements was changed"


def out_as_it_was(out: Tensor, memory: bytearray, before: bytearray) -> Tensor:
    if not out.numel():
        return out
    start = out.data_ptr() - torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    count = (len(before) - start) // out.element_size()
    return torch.frombuffer(before, dtype=out.dtype, count=count, offset=start).as_strided(out.shape, out.stride())


def test_results_keep_the_layout_of_the_first_operand() -> None:
    t = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert ik.scale(t, 1.0).stride() == t.stride()
    expanded = torch.ones(1, 3).expand(4, 3)
    assert ik.scale(expanded, 2.0).is_contiguous()
    assert ik.add(torch.zeros(4, 3), expanded).tolist() == [[1.0] * 3] * 4


# Autograd, inference mode, tensors without data


def test_in_place_operations_are_seen_by_autograd() -> None:
    w = torch.ones(3, requires_grad=True)
    t = torch.ones(3)
    y = (w * t).sum()
    ik.scale_(t, 2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    for change in (
        lambda t: ik.add_(t, torch.ones(3)),
        lambda t: ik.add_difference_(t, torch.ones(3), torch.ones(3)),
        lambda t: ik.subtract(torch.ones(3), torch.ones(3), out=t),
    ):
        version = t._version
        change(t)
        assert t._version == version + 1


def test_parameters_under_no_grad() -> None:
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        wanted = layer.weight * 2
        assert ik.scale_(layer.weight, 2.0) is layer.weight
        residual = ik.subtract(layer.weight, layer.weight)
    assert torch.equal(layer.weight, wanted)
    assert type(residual) is Tensor
    assert not residual.requires_grad


def test_inference_mode() -> None:
    with torch.inference_mode():
        t = ik.scale(torch.ones(3), 2.0)
        ik.add_(t, torch.ones(3))
    assert t.is_inference()
    assert ik.scale(t, 2.0).tolist() == [6.0] * 3


def test_meta_and_fake_tensors_have_shapes_only() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode, device in ((torch.no_grad(), "meta"), (FakeTensorMode(), "cpu")):
        with mode:
            a, b = (torch.empty(2, 3, dtype=torch.bfloat16, device=device) for _ in range(2))
            r = ik.subtract(a, b)
            assert (type(r), r.shape, r.dtype, r.device) == (type(a), a.shape, torch.float32, a.device)
            assert ik.add_(a, r) is a
            assert ik.add([a], [[r, b]], out=[b])[0] is b


# Backends


def test_backends_are_listed() -> None:
    found = ik.backends()
    assert list(found) == ["native", "reference", "triton"]
    assert found["reference"].available
    assert all(status.detail for status in found.values())


@pytest.mark.parametrize("name", ["reference", "native"])
def test_a_backend_can_be_forced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ik.backends()[name].available:
        pytest.skip("not built")
    monkeypatch.setenv("IRES_BACKEND", name)
    assert choose(torch.device("cpu")) is {"reference": reference, "native": native}[name]


def test_the_fastest_backend_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IRES_BACKEND", raising=False)
    assert choose(torch.device("cpu")) is (native if native.status().available else reference)


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRES_BACKEND", "fortran")
    t = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"IRES_BACKEND=fortran: no such backend; there is native .*reference"):
        ik.scale_(t, 2.0)
    assert t.tolist() == [1.0] * 3


def test_an_unavailable_backend_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRES_BACKEND", "native")
    monkeypatch.setattr(native, "status", lambda _: ik.BackendStatus(False, "no compiler was there"))
    wanted = r"IRES_BACKEND=native: not available for cpu tensors: no compiler was there; there is"
    with pytest.raises(RuntimeError, match=wanted):
        ik.scale(torch.ones(3), 2.0)


def test_a_device_without_a_backend() -> None:
    wanted = r"no backend for tensors on mps:0: native \(not .*reference .*triton .*; make one .* or move the tensors"
    with pytest.raises(RuntimeError, match=wanted):
        choose(torch.device("mps:0"))


@pytest.mark.parametrize(("available", "wanted"), [(["native", "triton"], native), (["triton"], triton)])
def test_the_backend_for_a_gpu(available: list[str], wanted: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("native", native), ("triton", triton)):
        usable = name in available
        monkeypatch.setattr(module, "status", lambda kind, usable=usable: ik.BackendStatus(usable, kind))
    monkeypatch.delenv("IRES_BACKEND", raising=False)
    _fastest.cache_clear()
    try:
        assert choose(torch.device("cuda:1")) is wanted
        monkeypatch.setenv("IRES_BACKEND", "triton")
        assert choose(torch.device("cuda:1")) is triton
        monkeypatch.setenv("IRES_BACKEND", "reference")
        with pytest.raises(RuntimeError, match="IRES_BACKEND=reference: not available for cuda tensors: for the CPU"):
            choose(torch.device("cuda:1"))
    finally:
        _fastest.cache_clear()


def test_triton_is_not_needed() -> None:
    """It is not imported for tensors on the CPU, and where it is not installed the status says so."""
    code = """if True:
        import sys, torch, ires_kernels as ik
        ik.scale_(torch.ones(3), 2.0)
        print("triton" in sys.modules)
        sys.modules["triton"] = None  # makes the import fail
        print(ik.backends()["triton"])
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded, status = run.stdout.splitlines()
    assert loaded == "False"
    assert status.startswith("BackendStatus(available=False")
    assert "Triton is not installed" in status
    assert "pip install triton" in status


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.isas():
        pytest.skip("not built")
    monkeypatch.setenv("IRES_BACKEND", "native")
    monkeypatch.setenv("IRES_ISA", "v9")
    with pytest.raises(ValueError, match="v9"):
        ik.scale(torch.ones(3), 2.0)


def test_a_flushing_caller_does_not_flush_results(compiled: str) -> None:
    """A thread that set its CPU to flush subnormals to zero still gets them from the compiled kernels."""
    if compiled == "triton":
        pytest.skip("the interpreter computes in numpy")
    t = oracle.specials(torch.bfloat16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        got = ik.scale(t, 0.5)
        flushes = float(torch.tensor(1e-40) * 1.0) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert flushes
    assert_same(got, expected("scale", [t], (0.5,), torch.bfloat16))


def test_importing_stays_light() -> None:
    """Tensor arithmetic loads neither the merge layer nor what that needs."""
    program = (
        "import sys, ires_kernels; print(*sorted({'rich', 'transformers', 'ires_kernels.merging'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == ""


def test_public_names() -> None:
    assert all(callable(getattr(ik, name)) for name in ik.__all__)
    assert ik.__version__
    with pytest.raises(AttributeError, match="no attribute 'substract'"):
        ik.substract  # noqa: B018


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_several_pairs_are_rounded_once(rounding: str) -> None:
    """In place too, of lists too, and with one y for all of them; two calls would round twice."""
    options = {"rounding": rounding, "seed": 5, "stream": 6}
    t, x1, y1, x2, y2 = (sample(torch.bfloat16, 5000, seed) for seed in range(5))
    wanted = expected("add_difference", [t, x1, y1, x2, y2], (0.6, -0.3), t.dtype, **options)
    assert_same(ik.add_difference(t, [x1, x2], [y1, y2], [0.6, -0.3], **options), wanted)
    assert_same(ik.add_difference_(t.clone(), (x1, x2), (y1, y2), (0.6, -0.3), **options), wanted)
    shared = expected("add_difference", [t, x1, y1, x2, y1], (0.5, 0.5), t.dtype, **options)
    assert_same(ik.add_difference(t, [x1, x2], y1, 0.5, **options), shared)
    lists = ik.add_difference([t, t], [[x1, x2], [x1, x2]], [y1, [y1, y1]], 0.5, **{**options, "stream": [6, 6]})
    for each in lists:
        assert_same(each, shared)
    one = expected("add_difference", [t, x1, y1], (0.5,), t.dtype, **options)
    assert_same(ik.add_difference(t, [x1], [y1], [0.5], **options), one)
    three = [t, *(x for pair in zip((x1, x2, t), (y2, t, y1), strict=True) for x in pair)]
    factors = (0.1, 0.2, 0.3)
    assert_same(
        ik.add_difference(t, [x1, x2, t], [y2, t, y1], factors, **options),
        expected("add_difference", three, factors, t.dtype, **options),
    )
    twice = ik.add_difference(ik.add_difference(t, x1, y1, 0.6), x2, y2, -0.3)
    assert rounding == "stochastic" or not torch.equal(twice.view(torch.int16), wanted.view(torch.int16))
