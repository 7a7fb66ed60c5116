"""The CUDA kernels on a GPU, against the definition in plain torch on the CPU, bit for bit.

Without a GPU, test_emulation.py runs the same code thread by thread, and test_sass.py reads the machine code.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from coded_weights import CASES, of_run, stored
from oracle import STORAGE, assert_same, sample, short
from torch import Tensor

import ires_kernels as ik
from ires_kernels.backends import decoding, definition, native, reference
from ires_kernels.backends.call import Call
from ires_kernels.backends.choice import choose

gpu = pytest.mark.gpu
DEVICE = "cuda"
COLUMNS = {"subtract": 2, "add": 2, "scale": 1, "add_difference": 3}
FLOAT, HALF, BF16, E4M3 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
SIZES = [0, 1, 7, *(chunk + d for chunk in (1024, 2048, 4096, 8192) for d in (-1, 0, 1)), 33333]
SEED = 0x0123456789ABCDEF


@pytest.fixture(autouse=True)
def _native_on_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gpu" not in request.keywords:
        return
    status = native.status("cuda")
    if not status.available:
        pytest.skip(status.detail)
    monkeypatch.setenv("IRES_BACKEND", "native")


def name(value: object) -> str:
    return "-".join(map(short, value)) if isinstance(value, tuple) else str(value)


def factors(op: str, operands: int) -> tuple[float, ...]:
    wanted = {"subtract": 0, "add": operands - 2, "add_difference": (operands - 2) // 2}.get(op, 1)
    return tuple(itertools.islice(itertools.cycle((0.3, -0.7, 1.1, 1e-40)), wanted))


def data(mix: Sequence[torch.dtype], n: int) -> list[Tensor]:
    return [sample(dtype, n, n + i) if n else torch.empty(0, dtype=dtype) for i, dtype in enumerate(mix)]


def on_gpu(values: Tensor, shift: int = 0) -> Tensor:
    """The same values, `shift` elements behind good alignment."""
    return torch.empty(values.numel() + shift, dtype=values.dtype, device=DEVICE)[shift:].copy_(values)


def compare(
    op: str, rows: list[list[Tensor]], *, stochastic: bool = False, offset: int = 0, shifts: Sequence[int] = (0,)
) -> None:
    """Compute every row, an output and its operands on the CPU, on both; element shifts are taken in turn."""
    alphas = factors(op, len(rows[0]))
    streams = [0xFEDCBA9876543210 + i for i in range(len(rows))]
    shift = itertools.cycle(shifts)
    there = [[on_gpu(x, next(shift)) for x in row] for row in rows]
    for run, lists in ((reference.run, rows), (native.run, there)):
        outs, inputs = [row[0] for row in lists], [tuple(row[1:]) for row in lists]
        run(Call(op, outs, inputs, alphas, stochastic, SEED, streams, offset, None))
    for i, (wanted, got) in enumerate(zip(rows, there, strict=True)):
        assert_same(got[0].cpu(), wanted[0], f"{op} {name(tuple(x.dtype for x in wanted))}, tensor {i}")
        for before, after in zip(wanted[1:], got[1:], strict=True):
            assert_same(after.cpu(), before, "an operand")


@gpu
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("op", COLUMNS)
def test_every_mix_of_types(op: str, rounding: str) -> None:
    draw = random.Random(op + rounding)
    for i, mix in enumerate(itertools.product(STORAGE, repeat=COLUMNS[op] + 1)):
        n = SIZES[i % len(SIZES)]
        shifts = draw.choice([(0,), (3,), tuple(draw.randrange(9) for _ in mix)])
        compare(op, [data(mix, n)], stochastic=rounding == "stochastic", offset=draw.randrange(2**64), shifts=shifts)


HOT = [
    *(("subtract", mix) for mix in [(BF16,) * 3, (FLOAT, BF16, BF16), (HALF,) * 3, (FLOAT, HALF, HALF), (FLOAT,) * 3]),
    *(("add", (t, t, r)) for t in (BF16, HALF) for r in (t, FLOAT, E4M3)),
    ("add", (FLOAT,) * 3),
    *(("scale", (t,) * 2) for t in (BF16, HALF, FLOAT)),
    *(("add_difference", (t,) * 4) for t in (BF16, HALF, FLOAT)),
    ("add", (BF16,) * 6),
    ("add", (BF16, BF16, FLOAT, E4M3, HALF)),
]


@gpu
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("op", "mix"), HOT, ids=name)
def test_sizes_and_alignments(op: str, mix: tuple[torch.dtype, ...], rounding: str) -> None:
    for n, shifts, offset in itertools.product(SIZES, [(0,), (1,), (0, 1, 2, 3, 5)], [0, 1, 2**64 - 50]):
        compare(op, [data(mix, n)], stochastic=rounding == "stochastic", offset=offset, shifts=shifts)


@gpu
@pytest.mark.parametrize("dtype", STORAGE, ids=short)
def test_conversions(dtype: torch.dtype) -> None:
    """Every pattern of the narrow types, and many of the wide ones, into all others."""
    if dtype.itemsize <= 2:
        bits = torch.arange(-(2 ** (dtype.itemsize * 8 - 1)), 2 ** (dtype.itemsize * 8 - 1))
        values = bits.to(torch.int8 if dtype.itemsize == 1 else torch.int16).view(dtype)
    else:
        values = sample(dtype, 10**6, 0)
    for out, stochastic in itertools.product(STORAGE, (False, True)):
        compare("scale", [[torch.empty(values.numel(), dtype=out), values]], stochastic=stochastic)


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("out", [BF16, HALF, E4M3, torch.float8_e5m2], ids=short)
def test_every_float32_rounds_as_on_the_cpu(out: torch.dtype) -> None:
    step = 2**26
    for start in range(-(2**31), 2**31, step):
        values = torch.arange(start, start + step, dtype=torch.int32).view(FLOAT)
        got = ik.scale(values.to(DEVICE), 1.0, dtype=out)
        assert_same(got.cpu(), ik.scale(values, 1.0, dtype=out), f"from {start}")


@gpu
@pytest.mark.parametrize("shift", [1, 3, 5])
@pytest.mark.parametrize("mix", [(BF16,) * 4, (FLOAT,) * 4, (HALF, FLOAT, BF16, torch.float64)], ids=name)
def test_addresses_that_are_no_multiple_of_the_element(mix: tuple[torch.dtype, ...], shift: int) -> None:
    """torch makes no such tensors; pointers from elsewhere may be so."""
    row = data(mix, 5001)
    memory = [torch.zeros(x.nbytes + 16, dtype=torch.uint8, device=DEVICE) for x in row]
    for x, m in zip(row, memory, strict=True):
        m[shift : shift + x.nbytes] = x.view(torch.uint8).to(DEVICE)
    codes = tuple(native._DTYPES[x.dtype] for x in row)
    item: tuple[Any, ...] = (5001, 5, tuple(m.data_ptr() + shift for m in memory), codes, [], [])
    for stochastic in (False, True):
        native._native.cuda_run(native._OPS["add_difference"], [item], (0.3,), stochastic, 7, 1, 0, 0)
        reference.run(Call("add_difference", [row[0]], [tuple(row[1:])], (0.3,), stochastic, 7, [5], 1, None))
        got = memory[0][shift : shift + row[0].nbytes].clone().cpu().view(row[0].dtype)
        assert_same(got, row[0])
        assert not memory[0][:shift].any()
        assert not memory[0][shift + row[0].nbytes :].any()


def strided(shape: tuple[int, ...], dtype: torch.dtype, draw: random.Random) -> tuple[Tensor, Tensor]:
    """The same view with dimensions in any order, steps and gaps, on the CPU and on the GPU."""
    order = draw.sample(range(len(shape)), len(shape))
    steps = [draw.choice([1, 1, 2, 3]) for _ in shape]
    lengths = [n * step + draw.choice([0, 1]) for n, step in zip(shape, steps, strict=True)]
    whole = sample(dtype, math.prod(lengths), draw.randrange(99))
    views = []
    for base in (whole, on_gpu(whole, draw.randrange(3))):
        view = base.view([lengths[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
        views.append(view[tuple(slice(0, n * step, step) for n, step in zip(shape, steps, strict=True))])
    return views[0], views[1]


@gpu
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("op", COLUMNS)
def test_strides(op: str, rounding: str) -> None:
    draw = random.Random(op + rounding)
    for mix in draw.sample(list(itertools.product(STORAGE, repeat=COLUMNS[op] + 1)), 30):
        shape = tuple(draw.randrange(1, 12) for _ in range(draw.randrange(1, 6)))
        here, there = zip(*(strided(shape, dtype, draw) for dtype in mix), strict=True)
        alphas, offset = factors(op, len(mix)), draw.randrange(2**64)
        for run, row in ((reference.run, here), (native.run, there)):
            run(Call(op, [row[0]], [row[1:]], alphas, rounding == "stochastic", SEED, [9], offset, None))
        assert_same(there[0].cpu(), here[0].contiguous())


@gpu
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_300_tensors(rounding: str) -> None:
    draw = random.Random(1)
    rows = []
    for i in range(300):
        mix = (BF16,) * 4 if i % 7 else draw.choice([(HALF,) * 4, (BF16, FLOAT, BF16, BF16), (FLOAT,) * 4])
        rows.append(data(mix, SIZES[i % len(SIZES)]))
    compare("add_difference", rows, stochastic=rounding == "stochastic", shifts=(0, 0, 0, 0, 1, 1, 1, 1, 2, 0, 0, 0))


@gpu
@pytest.mark.slow
@pytest.mark.usefixtures("many_gigabytes")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("mix", [(BF16, BF16, BF16), (BF16, E4M3, FLOAT), (E4M3, E4M3, E4M3)], ids=name)
def test_more_than_2_to_the_31_elements(mix: tuple[torch.dtype, ...], rounding: str) -> None:
    n, piece = 2**31 + 5, 2**26
    t, r = (torch.empty(n, dtype=dtype, device=DEVICE) for dtype in mix[1:])
    generator = torch.Generator(DEVICE).manual_seed(0)
    for x in (t, r):
        for part in x.split(piece):
            part.copy_(torch.randn(part.shape, device=DEVICE, generator=generator) * 0.02)
    out = torch.empty(n, dtype=mix[0], device=DEVICE)
    ik.add(t, r, 0.3, out=out, rounding=rounding, seed=1, stream=2, offset=3)
    for start in range(0, n, piece):
        part = slice(start, start + piece)
        wanted = torch.empty(out[part].shape, dtype=mix[0])
        ik.add(t[part].cpu(), r[part].cpu(), 0.3, out=wanted, rounding=rounding, seed=1, stream=2, offset=3 + start)
        assert torch.equal(out[part].cpu().view(torch.uint8), wanted.view(torch.uint8)), f"from {start}"


@gpu
def test_in_place_and_lists_through_the_public_functions() -> None:
    t, x, y = ([sample(BF16, n, n + k) for n in (5, 4097, 33333)] for k in range(3))
    there, instruct, base = ([on_gpu(a) for a in column] for column in (t, x, y))
    versions = [a._version for a in there]
    for lists in ((there, instruct, base), (t, x, y)):
        ik.add_difference_(*lists, 0.3, rounding="stochastic", seed=5, stream=[1, 2, 3])
    for got, wanted in zip(there, t, strict=True):
        assert_same(got.cpu(), wanted)
    assert all(a._version > v for a, v in zip(there, versions, strict=True))
    assert ik.subtract(there[0], there[0]).device == there[0].device


@gpu
def test_a_call_is_queued_on_the_current_stream_and_does_not_wait() -> None:
    t, r = sample(BF16, 10**6, 0), sample(BF16, 10**6, 1)
    wanted = ik.add(t, r, 0.5)
    source, residual, target = on_gpu(t), on_gpu(r), torch.zeros(10**6, dtype=BF16, device=DEVICE)
    ik.add(target, residual, 0.5)  # loads the kernels
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**9)  # some tenths of a second
        target.copy_(source)
        ik.add_(target, residual, 0.5)
        assert not stream.query()
    stream.synchronize()
    assert_same(target.cpu(), wanted)


@gpu
def test_nothing_is_allocated() -> None:
    rows = [[on_gpu(x) for x in data((BF16,) * 3, 5000)] for _ in range(100)]

    def count() -> int:
        return int(torch.cuda.memory_stats()["allocation.all.allocated"])

    before = count()
    ik.add_([row[0] for row in rows], [row[1:] for row in rows], [0.5, 0.25], rounding="stochastic")
    assert count() == before


@gpu
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_call_can_be_captured_in_a_graph(rounding: str) -> None:
    t, x, y = ([sample(BF16, n, n + k) for n in (7, 4096, 33333)] for k in range(3))
    wanted = ik.add_difference(t, x, y, 0.3, rounding=rounding, seed=5)
    there, instruct, base = ([on_gpu(a) for a in column] for column in (t, x, y))
    ik.add_difference_([a.clone() for a in there], instruct, base, 0.3, rounding=rounding, seed=5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ik.add_difference_(there, instruct, base, 0.3, rounding=rounding, seed=5)
    for a, b in zip(there, t, strict=True):
        assert_same(a.cpu(), b, "capturing runs nothing")
    graph.replay()
    for a, b in zip(there, wanted, strict=True):
        assert_same(a.cpu(), b)


@gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_functions(backend: str) -> None:
    def merge(t: list[Tensor], x: list[Tensor], y: list[Tensor]) -> Tensor:
        ik.add_difference_(t, x, y, 0.3, rounding="stochastic", seed=5)
        return ik.subtract(t[0], x[0])

    columns = [[sample(BF16, n, n + k) for n in (5, 4097)] for k in range(3)]
    there = [[on_gpu(a) for a in column] for column in columns]
    wanted = merge(*columns)
    got = torch.compile(merge, fullgraph=True, backend=backend)(*there)
    assert_same(got.cpu(), wanted)
    for a, b in zip(there[0], columns[0], strict=True):
        assert_same(a.cpu(), b)


@gpu
def test_the_choice_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IRES_BACKEND")
    assert choose(torch.device(DEVICE)) is native
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    t = torch.zeros(10**6)
    ik.add_(t, torch.ones(10**6), 0.5)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert t.unique().tolist() == [0.5]


@gpu
def test_no_room_for_a_result() -> None:
    a = torch.ones(1, dtype=BF16, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        ik.subtract([a, a.expand(1 << 42)], [a, a.expand(1 << 42)])
    assert a.item() == 1
    assert ik.subtract(a, a).item() == 0


@gpu
def test_a_second_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    t, r = sample(BF16, 5000, 0), sample(BF16, 5000, 1)
    got = ik.add(t.to("cuda:1"), r.to("cuda:1"), 0.5)
    assert got.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_same(got.cpu(), ik.add(t, r, 0.5))


@gpu
def test_a_tally_counts_as_on_the_cpu() -> None:
    t, x, y = (sample(BF16, 33333, k) for k in range(3))
    here, there = ik.Tally(), ik.Tally()
    ik.add_difference(t, x, y, 0.3, tally=here)
    ik.add_difference(on_gpu(t), on_gpu(x), on_gpu(y), 0.3, tally=there)
    for field in ("elements", "updates", "lost", "nan_in", "inf_in", "nan_out", "overflow"):
        assert getattr(there, field) == getattr(here, field), field
    assert there.norm2 == pytest.approx(here.norm2, rel=1e-4)
    assert there.dot == pytest.approx(here.dot, rel=1e-4)


@gpu
def test_more_residuals_than_fit() -> None:
    t = torch.zeros(5, dtype=BF16, device=DEVICE)
    with pytest.raises(ValueError, match=r"3001 operands .* pass fewer residuals"):
        ik.add_(t, [torch.ones(5, dtype=BF16, device=DEVICE)] * 3000, 0.5)
    assert not t.any()


@gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_quantized_weights(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRES_BACKEND", backend)
    for format, full in CASES:
        parts, count = stored(format, full), math.prod(full)
        for first, size in ((0, count), (7, 1), (16, count // 2), (1, count - 1)):
            run = of_run(format, full, parts, first, size)
            wanted, got = torch.empty(size), torch.empty(size, device=DEVICE)
            definition.define(format, full, first, size, run, wanted)
            there = {name: torch.frombuffer(view, dtype=torch.uint8).to(DEVICE) for name, view in run.items()}
            if decoding.decode_on_device(format, full, first, there, got):
                assert_same(got.cpu(), wanted, f"{format} of {full} from {first} on")


@gpu
@pytest.mark.parametrize("stochastic", [False, True])
def test_several_pairs(stochastic: bool) -> None:
    for mix in ((BF16,) * 6, (BF16, HALF, FLOAT, BF16, E4M3, HALF, BF16, BF16)):
        compare("add_difference", [data(mix, n) for n in SIZES], stochastic=stochastic)


def test_a_cuda_error_says_what_was_asked() -> None:
    """There is no such device: with a GPU because of its number, without one because of the missing driver."""
    if not native.cuda_built():
        pytest.skip("the extension has no GPU kernels")
    t, r = torch.zeros(9, dtype=BF16), torch.zeros(9)
    items = [native._item(t, (t, r), 0)]
    with pytest.raises(RuntimeError) as raised:
        native._native.cuda_run(native._OPS["add"], items, (0.5,), False, 0, 0, 99, 0)
    message = str(raised.value)
    assert message.startswith(
        "add of 1 tensor(s), the largest of 9 elements, bfloat16 from bfloat16 float32: CUDA error"
    )
    assert message.endswith(" choosing device 99")
    assert not t.any()


def test_the_status_without_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_native", SimpleNamespace(cuda_built=False))
    assert not native.cuda_built()
    assert native.status("cuda") == (False, "the extension was built without nvcc; reinstall where the CUDA toolkit is")
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_missing", "the extension was not built", raising=False)
    assert not native.cuda_built()
    assert not native.status("cuda").available


@pytest.mark.parametrize(
    ("capabilities", "driver", "ending"),
    [
        ([], 0, "sees no NVIDIA GPU"),
        ([(8, 0), (9, 0)], 13000, ""),
        ([(9, 0), (7, 5)], 13010, ", but a GPU here has compute capability 7.5"),
        ([(9, 0)], 12080, ", but it needs a driver for CUDA 13.0, and there is one for 12.8"),
    ],
)
def test_the_status_names_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], driver: int, ending: str
) -> None:
    extension = SimpleNamespace(
        cuda_built=True, cuda_targets="sm_80, sm_90 and PTX", cuda_driver=lambda: driver, cuda_least_driver=13000
    )
    monkeypatch.setattr(native, "_native", extension)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    status = native.status("cuda")
    assert status.available == (ending == "")
    assert status.detail.startswith("CUDA C++ for sm_80, sm_90 and PTX")
    assert status.detail.endswith(ending or "PTX")
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for AMD calls its devices cuda as well
    assert not native.status("cuda").available
