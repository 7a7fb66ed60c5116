"""The GPU kernels' own code on a CPU, every thread of the grid, against the CPU kernels bit for bit.

What this leaves to a GPU: the conversion instructions, which csrc/arith.h uses under __CUDA_ARCH__, and the launch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from coded_weights import CASES, of_run, stored
from emulation import WORDS, Emulated, Emulator
from oracle import NARROW, STORAGE, assert_same, sample, short
from torch import Tensor

from ires_kernels.backends import coded, definition, native, reference
from ires_kernels.backends.call import Call

pytestmark = pytest.mark.xdist_group("emulation")  # what is built is built once
CPU = native if native.isas() else reference
ALPHAS = (0.3, -0.7, 1.1, 1e-40, 3.0)
COLUMNS = {"subtract": 2, "add": 2, "scale": 1, "add_difference": 3}
FLOAT, HALF, BF16, E4M3 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
# The mixes with kernels of their own: output, then operands.
HOT = {
    "subtract": [(BF16,) * 3, (FLOAT, BF16, BF16), (HALF,) * 3, (FLOAT, HALF, HALF), (FLOAT,) * 3],
    "add": [*((t, t, r) for t in (BF16, HALF) for r in (t, FLOAT, E4M3)), (FLOAT,) * 3],
    "scale": [(BF16,) * 2, (HALF,) * 2, (FLOAT,) * 2],
    "add_difference": [(BF16,) * 4, (HALF,) * 4, (FLOAT,) * 4],
}
HOT_CASES = [(op, mix) for op, mixes in HOT.items() for mix in mixes]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler = shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("no C++ compiler")
    return Emulator(compiler, tmp_path_factory.mktemp("emulate"))


def name(value: object) -> str:
    return "-".join(map(short, value)) if isinstance(value, tuple) else str(value)


def factors(op: str, operands: int) -> tuple[float, ...]:
    wanted = {"subtract": 0, "add": operands - 2, "add_difference": (operands - 2) // 2}.get(op, 1)
    return tuple(itertools.islice(itertools.cycle(ALPHAS), wanted))


def place(values: Tensor, shift: int) -> Tensor:
    """The same values `shift` bytes behind a multiple of 64."""
    memory = torch.empty(values.nbytes + 128, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + shift
    view = torch.frombuffer(memory.numpy(), dtype=values.dtype, count=values.numel(), offset=start)
    return view.copy_(values)


def tensors(mix: tuple[torch.dtype, ...], n: int, shifts: tuple[int, ...] = ()) -> list[Tensor]:
    """Output and operands with drawn values; byte shifts from good alignment, 0 where none is given."""
    if not n:
        return [torch.empty(0, dtype=dtype) for dtype in mix]
    moves = itertools.chain(shifts, itertools.repeat(0))
    return [place(sample(dtype, n, n + i), shift) for i, (dtype, shift) in enumerate(zip(mix, moves))]  # noqa: B905


def compare(
    emulator: Emulator,
    op: str,
    rows: list[list[Tensor]],
    *,
    stochastic: bool = False,
    offset: int = 0,
    in_place: bool = False,
    words: int = WORDS,
    blocks: int = 2**31 - 1,
) -> Emulated:
    """Compute every row, an output and its operands, both ways."""
    alphas = factors(op, len(rows[0]))
    seed, streams = 0x0123456789ABCDEF, [0xFEDCBA9876543210 + i for i in range(len(rows))]
    wanted = [torch.empty_like(row[0]) for row in rows]
    inputs = [tuple(row[1:]) for row in rows]
    CPU.run(Call(op, wanted, inputs, alphas, stochastic, seed, streams, offset, None))
    outs = [row[1] if in_place else row[0] for row in rows]
    items = [native._item(*item) for item in zip(outs, inputs, streams, strict=True)]
    counts = emulator.run(native._OPS[op], items, alphas, stochastic, seed, offset, words=words, blocks=blocks)
    for i, (got, want) in enumerate(zip(outs, wanted, strict=True)):
        assert_same(got, want, f"tensor {i}")
    assert counts.written == sum(out.nbytes for out in outs)
    return counts


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("op", "mix"), HOT_CASES, ids=name)
def test_hot_mixes(emulator: Emulator, op: str, mix: tuple[torch.dtype, ...], rounding: str) -> None:
    stochastic = rounding == "stochastic"
    for n, offset in [(0, 0), (1, 1), (7, 0), (333, 2**64 - 100), (4097, 3), (8192, 2**34), (8193, 0), (33333, 5)]:
        compare(emulator, op, [tensors(mix, n)], stochastic=stochastic, offset=offset)


@pytest.mark.parametrize(
    ("op", "mix"), [*HOT_CASES, ("scale", (BF16, FLOAT)), ("scale", (HALF, torch.float64))], ids=name
)
def test_the_index_wraps_within_a_thread(emulator: Emulator, op: str, mix: tuple[torch.dtype, ...]) -> None:
    for start in range(2044, 2053):
        compare(emulator, op, [tensors(mix, 8192)], stochastic=True, offset=2**64 - start)


@pytest.mark.parametrize(("op", "mix"), HOT_CASES, ids=name)
def test_aligned_tensors_go_by_wide_accesses(emulator: Emulator, op: str, mix: tuple[torch.dtype, ...]) -> None:
    """16 bytes each, but for operands narrower than the output, of which a thread has fewer bytes."""
    n = 3 * 8192
    counts = compare(emulator, op, [tensors(mix, n)])
    vector = min(16 // mix[0].itemsize, 16 // min(dtype.itemsize for dtype in mix[1:]))
    assert counts.narrow == sum(n // vector for dtype in mix if dtype.itemsize * vector < 16)
    assert counts.wide == sum(n * dtype.itemsize // 16 for dtype in mix if dtype.itemsize * vector >= 16)


@pytest.mark.parametrize(("op", "mix"), HOT_CASES, ids=name)
def test_views_shifted_alike_are_wide_but_for_their_ends(
    emulator: Emulator, op: str, mix: tuple[torch.dtype, ...]
) -> None:
    """t[1:], x[1:], y[1:] meet good alignment together, some elements on."""
    n = 10 * 8192
    shifted = compare(emulator, op, [tensors(mix, n, tuple(3 * dtype.itemsize for dtype in mix))])
    straight = compare(emulator, op, [tensors(mix, n)])
    assert shifted.narrow <= straight.narrow + len(mix) * 2 * 8192
    assert shifted.wide >= 0.8 * straight.wide


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("op", "mix"), HOT_CASES, ids=name)
def test_any_alignment(emulator: Emulator, op: str, mix: tuple[torch.dtype, ...], rounding: str) -> None:
    """Down to odd addresses, at which a GPU has no access to 2 or 4 bytes."""
    draw = random.Random(name(mix))
    stochastic = rounding == "stochastic"
    one_off = [tuple(4 * (k == which) for k in range(len(mix))) for which in range(len(mix))]
    alike = [(s,) * len(mix) for s in (1, 2, 4, 8)]
    for shifts in [*one_off, *alike, *([draw.randrange(16) for _ in mix] for _ in range(3))]:
        compare(emulator, op, [tensors(mix, 9001, tuple(shifts))], stochastic=stochastic, offset=draw.randrange(9))


def mixes(op: str, count: int) -> list[tuple[torch.dtype, ...]]:
    """Drawn ones, in which every type is met in every place."""
    every = list(itertools.product(STORAGE, repeat=COLUMNS[op] + 1))
    chosen = random.Random(op).sample(every, min(count, len(every)))
    chosen += [tuple(STORAGE[(i + k) % 6] for k in range(COLUMNS[op] + 1)) for i in range(6)]
    return chosen + [(narrow,) * (COLUMNS[op] + 1) for narrow in STORAGE]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("op", COLUMNS)
def test_mixed_types(emulator: Emulator, op: str, rounding: str) -> None:
    draw = random.Random(op + rounding)
    for mix in mixes(op, 60):
        n = draw.choice([1, 7, 1023, 2047, 2049, 4100, 5000])
        alone = draw.randrange(len(mix))
        shifts = draw.choice(
            [
                (),
                tuple(draw.randrange(16) for _ in mix),
                tuple(d.itemsize for d in mix),
                tuple(4 * (k == alone) for k in range(len(mix))),
            ]
        )
        compare(emulator, op, [tensors(mix, n, shifts)], stochastic=rounding == "stochastic", offset=draw.randrange(8))


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("op", COLUMNS)
def test_all_mixes(emulator: Emulator, op: str, rounding: str) -> None:
    for mix in itertools.product(STORAGE, repeat=COLUMNS[op] + 1):
        compare(emulator, op, [tensors(mix, 2049)], stochastic=rounding == "stochastic", offset=2)


@pytest.mark.parametrize("dtype", STORAGE, ids=short)
def test_special_values(emulator: Emulator, dtype: torch.dtype) -> None:
    """Every pattern of the 8- and 16-bit types into all others."""
    if dtype in NARROW:
        bits = torch.arange(-(2 ** (dtype.itemsize * 8 - 1)), 2 ** (dtype.itemsize * 8 - 1))
        values = bits.to(torch.int8 if dtype.itemsize == 1 else torch.int16).view(dtype)
    else:
        values = sample(dtype, 60000, 0)
    for out, rounding in itertools.product(STORAGE, (False, True)):
        row = [torch.empty(values.numel(), dtype=out), place(values, 0)]
        compare(emulator, "scale", [row], stochastic=rounding)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    "mix", [(BF16,) * 6, (HALF, HALF, E4M3, BF16, FLOAT), (FLOAT, BF16, torch.float64, E4M3)], ids=name
)
def test_several_residuals(emulator: Emulator, mix: tuple[torch.dtype, ...], rounding: str) -> None:
    for n in (5, 4096, 5001):
        compare(emulator, "add", [tensors(mix, n)], stochastic=rounding == "stochastic")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("mix", [(BF16,) * 6, (BF16, HALF, FLOAT, BF16, E4M3, HALF, BF16, BF16)], ids=name)
def test_several_pairs(emulator: Emulator, mix: tuple[torch.dtype, ...], rounding: str) -> None:
    for n in (5, 4096, 5001):
        compare(emulator, "add_difference", [tensors(mix, n)], stochastic=rounding == "stochastic")


def test_as_many_residuals_as_fit(emulator: Emulator) -> None:
    most = (WORDS - 1 - 3) // 3 - 1
    assert most > 1000
    residual = place(sample(BF16, 9, 0), 0)
    compare(emulator, "add", [[torch.empty(9, dtype=BF16), residual, *[residual] * (most - 1)]])
    with pytest.raises(RuntimeError, match=rf"{most + 1} operands .* pass fewer residuals"):
        compare(emulator, "add", [[torch.empty(9, dtype=BF16), residual, *[residual] * most]])


@pytest.mark.parametrize(("op", "mix"), HOT_CASES, ids=name)
def test_in_place(emulator: Emulator, op: str, mix: tuple[torch.dtype, ...]) -> None:
    mix = (mix[1], *mix[1:])
    compare(emulator, op, [tensors(mix, 9001)], in_place=True)


SIZES = [0, 1, 333, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8192, 8193]


def model(count: int) -> list[list[Tensor]]:
    draw = random.Random(1)
    rows = []
    for i in range(count):
        mix = (BF16,) * 4 if i % 7 else draw.choice([(HALF,) * 4, (BF16, FLOAT, BF16, BF16), (FLOAT,) * 4])
        rows.append(tensors(mix, SIZES[i % len(SIZES)], draw.choice([(), (), tuple(2 * d.itemsize for d in mix)])))
    return rows


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_300_tensors(emulator: Emulator, rounding: str) -> None:
    """One launch for each mix of types, however many tensors."""
    rows = model(300)
    kinds = {tuple(x.dtype for x in row) for row in rows if row[0].numel()}
    counts = compare(emulator, "add_difference", rows, stochastic=rounding == "stochastic", offset=1)
    assert counts.launches == len(kinds) == 4


def test_small_tables_and_grids(emulator: Emulator) -> None:
    """The same bits whatever a launch can hold: tensors are spread, and split in the middle."""
    rows = model(40)
    for words, blocks in [(24, 2**31 - 1), (100, 2**31 - 1), (WORDS, 1), (WORDS, 3), (40, 2)]:
        counts = compare(emulator, "add_difference", rows, stochastic=True, words=words, blocks=blocks)
        assert counts.launches > 4


def strided(shape: tuple[int, ...], dtype: torch.dtype, draw: random.Random) -> Tensor:
    """Dimensions in any order, with steps and gaps, at any address."""
    order = draw.sample(range(len(shape)), len(shape))
    steps = [draw.choice([1, 1, 2, 3]) for _ in shape]
    lengths = [n * step + draw.choice([0, 1]) for n, step in zip(shape, steps, strict=True)]
    whole = place(sample(dtype, math.prod(lengths), 0), draw.choice([0, 0, 1, 2, 3]))
    whole = whole.view([lengths[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    view = whole[tuple(slice(0, n * step, step) for n, step in zip(shape, steps, strict=True))]
    return view.copy_(sample(dtype, math.prod(shape), draw.randrange(99)).view(shape))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("op", COLUMNS)
def test_strides(emulator: Emulator, op: str, rounding: str) -> None:
    draw = random.Random(op + rounding)
    for mix in mixes(op, 12):
        shape = tuple(draw.randrange(1, 9) for _ in range(draw.randrange(1, 6)))
        row = [strided(shape, dtype, draw) for dtype in mix]
        compare(emulator, op, [row], stochastic=rounding == "stochastic", offset=draw.randrange(2**64))
        compare(emulator, op, [row], stochastic=rounding == "stochastic", blocks=1)


def test_strided_and_contiguous_tensors_in_one_call(emulator: Emulator) -> None:
    draw = random.Random(0)
    rows = [[strided((5, 7), BF16, draw) for _ in range(4)] if i % 2 else tensors((BF16,) * 4, 99) for i in range(6)]
    assert compare(emulator, "add_difference", rows).launches == 1 + 3


@pytest.mark.parametrize("mix", [(E4M3,) * 3, (BF16,) * 3, (BF16, BF16, E4M3)], ids=name)
def test_both_ends_of_more_than_2_to_the_31_elements(emulator: Emulator, mix: tuple[torch.dtype, ...]) -> None:
    """Memory in between is never touched, so it costs nothing."""
    n, edge = 2**31 + 5, 5000
    row = [torch.empty(n, dtype=dtype) for dtype in mix]
    for i, x in enumerate(row):
        x[:edge] = sample(mix[i], edge, 2 * i)
        x[-edge:] = sample(mix[i], edge, 2 * i + 1)
    item = native._item(row[0], tuple(row[1:]), 7)
    counts = emulator.run(native._OPS["add"], [item], (0.3,), True, 1, 3, ends=4)
    assert counts.launches == 1
    for part, offset in ((slice(0, edge), 3), (slice(n - edge, n), 3 + n - edge)):
        wanted = torch.empty(edge, dtype=mix[0])
        CPU.run(Call("add", [wanted], [tuple(x[part] for x in row[1:])], (0.3,), True, 1, [7], offset, None))
        assert_same(row[0][part], wanted, f"from {part.start}")


class OnGpu:
    """A CPU tensor that says it is elsewhere."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._tensor, self.device = tensor, device

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._tensor, attribute)


def test_gpu_tensors_go_to_the_gpu_kernels(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their device current, on its current stream."""
    log: list[object] = []

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        log.append(f"enter {device}")
        yield
        log.append(f"leave {device}")

    def cuda_run(*arguments: Any) -> None:
        log.append(arguments[6:])
        emulator.run(*arguments[:6])

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + device.index))
    monkeypatch.setattr(native, "_native", SimpleNamespace(cuda_run=cuda_run))
    rows = [tensors((BF16,) * 4, n) for n in (5, 5000)]
    call = Call(
        "add_difference", [row[0] for row in rows], [tuple(row[1:]) for row in rows], (0.3,), True, 1, [2, 3], 4, None
    )
    wanted = [torch.empty_like(row[0]) for row in rows]
    reference.run(call._replace(outs=wanted))
    device = torch.device("cuda", 3)
    there = [[cast(Tensor, OnGpu(x, device)) for x in row] for row in rows]
    native.run(call._replace(outs=[row[0] for row in there], inputs=[tuple(row[1:]) for row in there]))
    assert log == ["enter cuda:3", (3, 103), "leave cuda:3"]
    for row, want in zip(rows, wanted, strict=True):
        assert_same(row[0], want)


def test_quantized_weights(emulator: Emulator) -> None:
    """What a thread of a GPU decodes: runs that begin anywhere, whose codes and numbers lie at any address."""
    for format, full in CASES:
        layout, count = coded.layout(format, full), math.prod(full)
        if layout is None or layout.transposed or format.number("ordered"):
            continue
        parts = stored(format, full)
        for first, size, shift in (
            (0, count, 0),
            (1, count - 1, 4),
            (16, count // 2, 0),
            (32, 333, 8),
            (count - 65, 65, 12),
        ):
            run = of_run(format, full, parts, first, size)
            wanted, got = torch.empty(size), place(torch.full((size,), 7.0), shift)
            definition.define(format, full, first, size, run, wanted)
            assert emulator.decode(layout, coded.stored(format, full, first, size, run), first, got) == 4 * size
            assert_same(got, wanted, f"{format} of {full} from {first} on")
