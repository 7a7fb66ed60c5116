"""The Triton kernels on a GPU: the bits of the reference, which computes the same call on the CPU."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from oracle import NARROW, STORAGE, assert_same, from_codes, sample, short
from torch import Tensor

import ires_kernels as ik
from ires_kernels.backends import native, reference
from ires_kernels.backends import triton as backend
from ires_kernels.backends.call import Call, Tally

STATUS = backend.status("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not STATUS.available, reason=STATUS.detail)]

BLOCK = 2048
OPERATIONS = {
    "subtract": (2, ()),
    "scale": (1, (-1 / 3,)),
    "add": (2, (0.7,)),
    "add two": (3, (0.7, -1.2)),
    "add six": (7, (0.7, -1.2, 0.1, 2.0, -0.3, 1.0)),
    "add_difference": (3, (1.3,)),
}
ROUNDINGS = pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
PAIRS = list(itertools.product(STORAGE, STORAGE))
TRIPLES = list(itertools.product(STORAGE, STORAGE, STORAGE))


def mix(dtypes: tuple[torch.dtype, ...]) -> str:
    return "-".join(map(short, dtypes))


def on_gpu(x: Tensor) -> Tensor:
    """A copy with the same strides, at the same distance from a multiple of 16 bytes."""
    reach = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    before = x.data_ptr() % 16 // x.element_size()
    memory = torch.zeros((before + reach) * x.element_size(), dtype=torch.uint8, device="cuda")
    memory[before * x.element_size() :] = x.as_strided((reach,), (1,)).view(torch.uint8).cuda()
    return memory.view(x.dtype).as_strided(x.shape, x.stride(), before)


def compare(
    op: str,
    outs: list[Tensor],
    inputs: list[tuple[Tensor, ...]],
    factors: tuple[float, ...],
    stochastic: bool,
    *,
    seed: int = 0xFEDCBA9876543210,
    streams: list[int] | None = None,
    offset: int = 0,
) -> None:
    """Both ways of a call: from CPU tensors on the reference, and from copies of them on the GPU."""
    rest = (factors, stochastic, seed, streams or [5] * len(outs), offset, None)
    copies = {id(x): on_gpu(x) for x in (*outs, *itertools.chain(*inputs))}
    results = [copies[id(x)] for x in outs]
    backend.run(Call(op.split()[0], results, [tuple(copies[id(x)] for x in row) for row in inputs], *rest))
    reference.run(Call(op.split()[0], outs, inputs, *rest))
    for got, wanted in zip(results, outs, strict=True):
        assert_same(got.cpu(), wanted, f"{op} to {got.dtype} of {tuple(got.shape)}")


def zeros(dtype: torch.dtype, n: int) -> Tensor:
    return torch.zeros(n, dtype=dtype)


@ROUNDINGS
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("n", [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 33333])
def test_sizes(n: int, op: str, stochastic: bool) -> None:
    count, factors = OPERATIONS[op]
    for dtypes in ([torch.bfloat16], [torch.float8_e4m3fn], NARROW, STORAGE):
        operands = tuple(sample(dtypes[i % len(dtypes)], n, seed=i) for i in range(count))
        compare(op, [zeros(dtypes[0], n)], [operands], factors, stochastic)


@ROUNDINGS
@pytest.mark.parametrize("pair", PAIRS, ids=mix)
def test_pairs(pair: tuple[torch.dtype, ...], stochastic: bool) -> None:
    operands = tuple(sample(dtype, 20_000, seed) for seed, dtype in enumerate(pair))
    for out in STORAGE:
        compare("scale", [zeros(out, 20_000)], [operands[:1]], (1.0,), stochastic)
        compare("subtract", [zeros(out, 20_000)], [operands], (), stochastic)
        compare("add", [zeros(out, 20_000)], [operands], (0.3,), stochastic)


@ROUNDINGS
@pytest.mark.parametrize("triple", random.Random(2).sample(TRIPLES, 40), ids=mix)
def test_triples(triple: tuple[torch.dtype, ...], stochastic: bool) -> None:
    operands = tuple(sample(dtype, 20_000, seed) for seed, dtype in enumerate(triple))
    compare("add_difference", [operands[0]], [operands], (0.3,), stochastic)  # in place


def test_every_mix_in_every_alignment() -> None:
    """Target and operands on a 16-byte boundary and off it, each: what is loaded in which layout decides the code."""
    parts = max(2, min(16, os.cpu_count() or 2))
    program = [sys.executable, str(Path(__file__).parents[1] / "triton_alignments.py")]
    running = [
        subprocess.Popen([*program, str(part), str(parts)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for part in range(parts)
    ]
    compared, wrong = 0, []
    for process in running:
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-5000:]
        *lines, count = out.splitlines()
        wrong += lines
        compared += int(count)
    assert compared == 1000
    assert not wrong


@pytest.mark.parametrize("dtype", NARROW, ids=short)
def test_every_float32_narrows_as_on_the_cpu(dtype: torch.dtype) -> None:
    """All 2^32 of them: the conversions of the hardware can only be seen here."""
    cpu = native if native.status().available else reference
    for part in range(64):
        start = (part << 26) - 2**31
        x = torch.arange(start, start + 2**26, dtype=torch.int32).view(torch.float32)
        wanted, got = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=dtype, device="cuda")
        cpu.run(Call("scale", [wanted], [(x,)], (1.0,), False, 0, [0], 0, None))
        backend.run(Call("scale", [got], [(x.cuda(),)], (1.0,), False, 0, [0], 0, None))
        assert_same(got.cpu(), wanted, f"part {part}")


@ROUNDINGS
@pytest.mark.parametrize("dtype", NARROW, ids=short)
def test_every_pattern_of_a_narrow_type(dtype: torch.dtype, stochastic: bool) -> None:
    every = from_codes(torch.arange(256**dtype.itemsize).numpy(), dtype)
    for out in STORAGE:
        compare("scale", [zeros(out, len(every))], [(every,)], (1.0,), stochastic)


@ROUNDINGS
@pytest.mark.parametrize("shift", [1, 3, 8])
def test_odd_addresses(shift: int, stochastic: bool) -> None:
    for dtypes in ([torch.bfloat16] * 3, [torch.float8_e5m2, torch.float64, torch.float16]):
        rows = tuple(sample(dtype, 9999, seed)[shift * (seed + 1) % 5 :][:9000] for seed, dtype in enumerate(dtypes))
        compare("add_difference", [rows[0]], [rows], (0.3,), stochastic, offset=shift)


@ROUNDINGS
def test_strides(stochastic: bool) -> None:
    for dtypes in ([torch.bfloat16] * 3, [torch.float8_e4m3fn, torch.float32, torch.float64]):
        a, b, c = (sample(dtype, 6 * 50 * 7 * 11, seed) for seed, dtype in enumerate(dtypes))
        for rows in (
            (a[::2], b[1::2], c[: len(a) // 2]),
            (a.view(300, 77).t(), b.view(300, 77).t(), c.view(300, 77).t()),
            (a.view(300, 77)[:, 3:40], b.view(300, 77)[:, 40:], c[: 300 * 37].view(37, 300).t()),
            (a.view(6, 50, 7, 11).permute(3, 1, 0, 2), b.view(11, 50, 6, 7), c.view(7, 6, 50, 11).permute(3, 2, 1, 0)),
            (a[: 50 * 77].view(50, 77), b[:77].expand(50, 77), c[:50, None].expand(50, 77)),
            (a[7].view(()), b[8].view(()), c[9].view(())),
        ):
            compare("add_difference", [rows[0]], [rows], (0.7,), stochastic, offset=20)


@ROUNDINGS
def test_lists(stochastic: bool) -> None:
    """300 tensors of the sizes around a block and others, dtypes and streams all different."""
    sizes = [n for i in range(38) for n in (0, 1, 333, BLOCK - 1, BLOCK, BLOCK + 1, 33 * i, 5000)][:300]
    rows = [tuple(sample(STORAGE[(i + k) % 6], n, seed=i + k) for k in range(3)) for i, n in enumerate(sizes)]
    compare("add_difference", [row[0] for row in rows], rows, (0.3,), stochastic, streams=list(range(300)))


@ROUNDINGS
def test_lists_of_one_mix_of_dtypes(stochastic: bool) -> None:
    """More than a table holds, of sizes around a block; every 50th starts off a multiple of 16 bytes."""
    for dtypes in ([torch.bfloat16] * 3, [torch.float8_e4m3fn, torch.float32, torch.float16]):
        sizes = [(1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5)[i % 5] for i in range(600)]
        rows = [tuple(sample(d, n + 1, seed=i + k) for k, d in enumerate(dtypes)) for i, n in enumerate(sizes)]
        rows = [tuple(x[1:] if i % 50 == 0 else x[:-1] for x in row) for i, row in enumerate(rows)]
        compare("add_difference", [row[0] for row in rows], rows, (0.3,), stochastic, streams=list(range(600)))


@ROUNDINGS
@pytest.mark.usefixtures("many_gigabytes")
def test_more_than_2_to_the_31_elements(stochastic: bool) -> None:
    """The whole equals its pieces, and those at its ends and in the middle equal the CPU's."""
    n, step, dtype = 2**31 + 5, 2**26, torch.float8_e5m2
    x = torch.randint(0, 256, (n,), dtype=torch.uint8, device="cuda").view(dtype)
    whole, pieces = torch.empty_like(x), torch.empty_like(x)
    backend.run(Call("scale", [whole], [(x,)], (0.3,), stochastic, 1, [2], 0, None))
    for start in range(0, n, step):
        call = Call(
            "scale",
            [pieces[start : start + step]],
            [(x[start : start + step],)],
            (0.3,),
            stochastic,
            1,
            [2],
            start,
            None,
        )
        backend.run(call)
    assert torch.equal(whole.view(torch.uint8), pieces.view(torch.uint8))
    for start in (0, 2**30 - 500, 2**31 - 500):
        part = x[start : start + 1000].cpu()
        wanted = torch.empty_like(part)
        reference.run(Call("scale", [wanted], [(part,)], (0.3,), stochastic, 1, [2], start, None))
        assert_same(whole[start : start + 1000].cpu(), wanted, f"from {start}")


def test_a_tally_is_that_of_the_reference() -> None:
    operands = tuple(sample(torch.bfloat16, 50_000, seed=i) for i in range(3))
    tallies = Tally(), Tally()
    for tally, run, device in zip(tallies, (reference.run, backend.run), ("cpu", "cuda"), strict=True):
        inputs = tuple(x.to(device) for x in operands)
        run(Call("add_difference", [torch.empty_like(inputs[0])], [inputs], (0.3,), False, 0, [0], 0, tally))
    assert tallies[0].updates > tallies[0].lost > 0
    for name in Tally.__slots__:
        exact = name not in ("dot", "norm2")
        wanted, got = (getattr(tally, name) for tally in tallies)
        assert got == (wanted if exact else pytest.approx(wanted, rel=1e-6)), name


@pytest.mark.parametrize("count", [1, 300])
def test_the_callers_stream_is_used_and_never_waited_for(count: int) -> None:
    whole, r = torch.zeros(count, 1 << 12, device="cuda"), torch.ones(1 << 12, device="cuda")
    rows = [(t, r) for t in whole]
    call = Call("add", [row[0] for row in rows], rows, (1.0,), False, 0, [0] * count, 0, None)
    backend.run(call)  # compiles
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with warnings.catch_warnings():  # torch 2.11 says that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            whole.fill_(5.0)
            backend.run(call)
            assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert whole.unique().tolist() == [6.0]


def test_capture_in_a_graph() -> None:
    rows = [(torch.zeros(n, device="cuda"), torch.ones(n, device="cuda")) for n in (5, 3000, 4096)]
    call = Call("add", [row[0] for row in rows], rows, (2.0,), False, 0, [0] * 3, 0, None)
    backend.run(call)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.run(call)
    for row in rows:
        row[0].zero_()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert {x for row in rows for x in row[0].tolist()} == {4.0}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_a_device_that_is_not_the_current_one() -> None:
    t = torch.ones(3000, device="cuda:1")
    with torch.cuda.device(0):
        backend.run(Call("scale", [t], [(t,)], (3.0,), False, 0, [0], 0, None))
        assert torch.cuda.current_device() == 0
    assert t.unique().tolist() == [3.0]


def test_public_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRES_BACKEND", "triton")
    t, x, y = (sample(torch.bfloat16, 5000, seed).cuda() for seed in range(3))
    version = t._version
    ik.add_difference_(t, x, y, 0.5, rounding="stochastic", seed=4)
    assert t._version > version
    with pytest.raises(RuntimeError, match="IRES_BACKEND=triton: not available for cpu tensors"):
        ik.scale_(t.cpu(), 2.0)
    monkeypatch.setenv("IRES_BACKEND", "reference")
    t2, x2, y2 = (sample(torch.bfloat16, 5000, seed) for seed in range(3))
    assert_same(t.cpu(), ik.add_difference_(t2, x2, y2, 0.5, rounding="stochastic", seed=4))
