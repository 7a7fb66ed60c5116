"""The Triton kernels in Triton's interpreter: the bits of the reference, without a GPU.

The interpreter has to be chosen before Triton is imported, and afterwards nothing can be compiled, so the tests run in
a process of their own: under TRITON_INTERPRET=1 this file holds tests, and otherwise one that starts them, together
with those tests of the contract that are quick enough.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from coded_weights import CASES, of_run, stored
from oracle import NARROW, STORAGE, assert_same, philox, rounds, sample, short
from torch import Tensor

from ires_kernels.backends import definition, reference
from ires_kernels.backends import triton as backend
from ires_kernels.backends.call import Call, Tally
from ires_kernels.formats import Format

pytest.importorskip("triton", reason="Triton is not installed")

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton import jit

    from ires_kernels.backends import triton_kernels as kernels

    ROUNDINGS = [False, True]
    BLOCK = int(kernels.BLOCK)
    GUARD = 64  # bytes
    OPERATIONS = {
        "subtract": (2, ()),
        "scale": (1, (-1 / 3,)),
        "add": (2, (0.7,)),
        "add_difference": (3, (1.3,)),
    }

    def compare(
        op: str,
        outs: list[Tensor],
        inputs: list[tuple[Tensor, ...]],
        factors: tuple[float, ...],
        stochastic: bool,
        seed: int = 0x123456789ABCDEF0,
        streams: list[int] | None = None,
        offset: int = 0,
    ) -> None:
        """The same call on both backends; `outs` says shapes, strides and dtypes, and may be operands of their item."""
        results = []
        for run in (reference.run, backend.run):
            memories, copies = zip(*map(guarded, outs), strict=True)
            own = [
                tuple(copy if x is out else x for x in row) for out, copy, row in zip(outs, copies, inputs, strict=True)
            ]
            run(Call(op, list(copies), own, factors, stochastic, seed, streams or [7] * len(outs), offset, None))
            for memory in memories:
                assert set(memory[:GUARD].tolist() + memory[-GUARD:].tolist()) == {0x55}, "written beyond the end"
            results.append(copies)
        for wanted, got in zip(*results, strict=True):
            assert_same(got, wanted, f"{op} to {got.dtype} of {tuple(got.shape)}")

    def guarded(x: Tensor) -> tuple[Tensor, Tensor]:
        """A copy with the same strides, and its memory, which begins and ends with bytes that are not its own."""
        reach = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        memory = torch.full((reach * x.element_size() + 2 * GUARD,), 0x55, dtype=torch.uint8)
        copy = memory[GUARD:-GUARD].view(x.dtype).as_strided(x.shape, x.stride(), GUARD // x.element_size())
        return memory, copy.copy_(x)

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    @jit
    def words_kernel(out, first, stream, seed, BLOCK: tl.constexpr, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, BLOCK)
        words = kernels.words_of_run(first, stream, seed, BLOCK) if RUN else kernels.words_of(first + at, stream, seed)
        tl.store(out + at, words.to(tl.int64))

    def words(first: int, stream: int, seed: int, run: bool) -> list[int]:
        out = torch.empty(16, dtype=torch.int64)
        signed = (backend._signed(x) for x in (first, stream, seed))
        words_kernel[(1,)](out, *signed, BLOCK=16, RUN=run)
        return out.tolist()

    @pytest.mark.parametrize("run", [False, True])
    def test_known_answers_of_philox(run: bool) -> None:
        """The first is of the authors' own kat_vectors; the rest are of the definition in Python integers."""
        assert words(0, 0, 0, run)[:4] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
        assert words(0, 0, 0, run)[4:8] == rounds([1, 0, 0, 0], [0, 0])
        top = (1 << 64) - 1
        for first, stream, seed in (
            (0, top, top),
            (4 * 0x12345678, 0x9ABCDEF0FEDCBA98, 0x0123456789ABCDEF),
            ((1 << 34) - 8, 1 << 32, 1 << 63),  # a carry between the halves of the counter
            (top - 7, 3, 4),  # and past its end
        ):
            wanted = [philox(seed, stream, (first + i) % (1 << 64)) for i in range(16)]
            assert words(first, stream, seed, run) == wanted

    @pytest.mark.parametrize("first", [1, 2, 3, (1 << 64) - 5])
    def test_words_from_an_odd_index_on(first: int) -> None:
        assert words(first, 5, 6, run=False) == [philox(6, 5, (first + i) % (1 << 64)) for i in range(16)]

    @pytest.mark.parametrize("stochastic", ROUNDINGS)
    @pytest.mark.parametrize("op", OPERATIONS)
    @pytest.mark.parametrize("n", [0, 1, 7, 333, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
    def test_sizes(n: int, op: str, stochastic: bool) -> None:
        count, factors = OPERATIONS[op]
        for out in (torch.bfloat16, torch.float8_e4m3fn):
            operands = tuple(sample(STORAGE[1 + i], n, seed=i) for i in range(count))
            compare(op, [new(out, n)], [operands], factors, stochastic)

    @pytest.mark.parametrize("out", [*NARROW, torch.float32], ids=short)
    def test_random_stores_of_every_type(out: torch.dtype) -> None:
        for wide in (torch.float32, torch.float64):
            for seed in (0, 1 << 31, 1 << 32, (1 << 64) - 1):
                x = sample(wide, 2 * BLOCK, seed=3)
                compare("scale", [new(out, 2 * BLOCK)], [(x,)], (1.0,), True, seed=seed, streams=[seed])

    @pytest.mark.parametrize("offset", [4, 5, 6, 7, (1 << 34) - 3, (1 << 64) - 8, (1 << 64) - 2])
    def test_offsets(offset: int) -> None:
        operands = sample(torch.bfloat16, 333, 1), sample(torch.float32, 333, 2)
        compare("add", [new(torch.bfloat16, 333)], [operands], (0.3,), True, offset=offset)

    def strided_views(dtype: torch.dtype, seed: int) -> dict[str, list[Tensor]]:
        """Tensors of a shape each, in layouts that take every way through the backend."""
        flat = sample(dtype, 4 * 5 * 6 * 7, seed)
        whole = flat.view(4, 5, 6, 7)
        return {
            "one dimension": [flat[::2], flat[1::2], flat[:420]],
            "rows": [whole.view(20, 42)[:, 1:8], whole.view(20, 42)[:, 7:14], flat[:140].view(20, 7)],
            "transposed": [whole.view(20, 42).t(), whole.view(20, 42).t(), flat.view(42, 20)],
            "all transposed": [whole.view(20, 42).t()] * 3,
            "three dimensions": [
                whole[..., 0],
                whole[..., 1:].permute(0, 1, 2, 3)[..., 0],
                flat[:120].view(6, 5, 4).permute(2, 1, 0),
            ],
            "channels last": [whole, whole.to(memory_format=torch.channels_last), whole],
            "four dimensions": [
                whole.permute(3, 1, 0, 2),
                whole.view(7, 6, 5, 4).permute(0, 2, 3, 1),
                flat.view(7, 5, 4, 6),
            ],
            "expanded": [whole[0, 0], whole[1, 1, 0].expand(6, 7), whole[:1, 0, 0, :1].expand(6, 7)],
            "a number": [flat[3].view(()), flat[4].view(()), flat[5].view(())],
        }

    @pytest.mark.parametrize("layout", list(strided_views(torch.float32, 0)))
    @pytest.mark.parametrize("stochastic", ROUNDINGS)
    def test_strides(layout: str, stochastic: bool) -> None:
        for dtypes in (
            (torch.bfloat16, torch.float32, torch.bfloat16),
            (torch.float8_e5m2, torch.float64, torch.float8_e4m3fn),
        ):
            rows = [strided_views(dtype, seed)[layout][seed] for seed, dtype in enumerate(dtypes)]
            out = new(torch.bfloat16, *rows[0].shape)
            compare("add_difference", [out], [tuple(rows)], (0.7,), stochastic, offset=12)
            compare("add_difference", [rows[0]], [tuple(rows)], (0.7,), stochastic, offset=12)  # in place

    @pytest.mark.parametrize("stochastic", ROUNDINGS)
    @pytest.mark.parametrize("count", [4, 5, 9, 12])
    def test_more_residuals_than_one_launch_takes(count: int, stochastic: bool) -> None:
        factors = tuple((-1) ** i / (i + 1) for i in range(count))
        for dtypes in (NARROW, [torch.float32, torch.bfloat16], [torch.bfloat16] * (count - 1) + [torch.float64]):
            operands = tuple(sample(dtypes[i % len(dtypes)], 1000, seed=i) for i in range(count + 1))
            compare("add", [new(torch.bfloat16, 1000)], [operands], factors, stochastic)
            compare("add", [operands[0]], [operands], factors, stochastic)

    @pytest.mark.parametrize("stochastic", ROUNDINGS)
    @pytest.mark.parametrize("count", [2, 3, 5])
    def test_several_pairs(count: int, stochastic: bool) -> None:
        """Two of them in a launch."""
        factors = tuple((-1) ** i / (i + 1) for i in range(count))
        for dtypes in (NARROW, [torch.bfloat16], [torch.bfloat16, torch.float64]):
            operands = tuple(sample(dtypes[i % len(dtypes)], 1000, seed=i) for i in range(2 * count + 1))
            compare("add_difference", [new(torch.bfloat16, 1000)], [operands], factors, stochastic)
            compare("add_difference", [operands[0]], [operands], factors, stochastic)

    def test_lists() -> None:
        """Items of different dtypes, sizes and streams."""
        rows = [tuple(sample(STORAGE[(i + k) % 6], 17 * i, seed=i + k) for k in range(3)) for i in range(12)]
        outs = [new(STORAGE[(5 * i) % 6], 17 * i) for i in range(12)]
        for stochastic in ROUNDINGS:
            compare("add_difference", outs, rows, (0.3,), stochastic, streams=[1 << i for i in range(12)], offset=8)

    @pytest.mark.parametrize("stochastic", ROUNDINGS)
    @pytest.mark.parametrize("op", OPERATIONS)
    def test_lists_of_one_mix_of_dtypes(op: str, stochastic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sizes around a block, in tables of four, with tensors between them that cannot be in one."""
        launched: list[int] = []
        listed = backend._listed
        monkeypatch.setattr(kernels, "ITEMS", 4)
        monkeypatch.setattr(backend, "_listed", lambda *a: (launched.append(len(a[2])), listed(*a)))
        count, factors = OPERATIONS[op]
        sizes = [5, BLOCK, 0, 2 * BLOCK + 7, 1, BLOCK - 1, BLOCK + 1, 64, 64, 100]
        rows = [tuple(sample(STORAGE[1 + k], n, seed=i + k) for k in range(count)) for i, n in enumerate(sizes)]
        rows[7], rows[8] = tuple(x[1:] for x in rows[7]), tuple(x[::2] for x in rows[8])
        outs = [new(torch.bfloat16, len(row[0])) for row in rows]
        streams = [(1 << 63) + i for i in range(10)]
        compare(op, outs, rows, factors, stochastic, streams=streams, offset=12)
        assert launched == [4, 3]

    @pytest.mark.parametrize("factor", [0.0, -0.0, 1e-45, -1e-45, 2.0**128 - 2.0**103 - 2.0**75, 0.1, -1e300])
    def test_factors(factor: float) -> None:
        """Rounded once to the compute type, and handed over as bits: the sign, subnormals and the ends of the range."""
        wide = abs(factor) > 1e40
        x = sample(torch.float64 if wide else torch.float32, 500, seed=1)
        compare("scale", [new(x.dtype, 500)], [(x,)], (factor,), False)
        compare("scale", [new(torch.float64, 500)], [(x,)], (factor,), False)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_quantized_weights(case: tuple[Format, tuple[int, ...]]) -> None:
        format, full = case
        parts, count = stored(format, full), math.prod(full)
        for first, size in ((0, min(count, 5000)), (7, 1), (count - 2101, 2101 if count > 2101 else count)):
            if first < 0:
                continue
            run = of_run(format, full, parts, first, size)
            wanted, got = torch.empty(size), torch.empty(size)
            definition.define(format, full, first, size, run, wanted)
            tensors = {name: torch.frombuffer(view, dtype=torch.uint8) for name, view in run.items()}
            if backend.decode_on_device(format, full, first, tensors, got):
                assert_same(got, wanted, f"{format} of {full} from {first} on")
            else:
                assert format.word("zero_point") or format.name == "mxfp4-transposed"

    def test_a_tally_is_that_of_the_reference() -> None:
        operands = tuple(sample(torch.bfloat16, 3000, seed=i) for i in range(3))
        tallies = []
        for run in (reference.run, backend.run):
            tallies.append(Tally())
            run(Call("add_difference", [new(torch.bfloat16, 3000)], [operands], (0.3,), False, 0, [0], 0, tallies[-1]))
        assert tallies[0] == tallies[1]
        assert tallies[0].updates > tallies[0].lost > 0

else:
    TESTS = Path(__file__).parents[1]

    def interpret(*arguments: str) -> int:
        """Run pytest under the interpreter; returns how many tests passed."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("IRES_", "PYTEST_"))}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore::RuntimeWarning",
            *arguments,
        ]
        run = subprocess.run(
            command, cwd=TESTS.parent, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
        return int(re.findall(r"(\d+) passed", run.stdout)[-1])

    def test_kernels() -> None:
        assert interpret(__file__) > 110

    def all_but(names: str) -> str:
        return "[triton" + "".join(f" and not {name}" for name in names.split())

    def test_contract() -> None:
        """Every conversion, every pair of dtypes and any views, as docs/numerics.md has it."""
        slow = "two_steps triples three_operands pairs_of is_touched in_place_equals thread_counts piece_border"
        files = (str(TESTS / name) for name in ("backends/test_numerics.py", "tensors/test_ops.py"))
        assert interpret(*files, "-k", all_but(slow)) > 70

    @pytest.mark.slow
    def test_contract_in_full() -> None:
        backends = ("numerics", "stochastic", "stats")
        files = ["tensors/test_ops.py", *(f"backends/test_{name}.py" for name in backends)]
        assert interpret(*(str(TESTS / name) for name in files), "-k", all_but("thread_counts piece_border")) > 350
