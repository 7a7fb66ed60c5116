"""Kernels against a pure memory loop and against torch: the cases, the contenders, and the check before the clock.

The yardstick is a loop that reads and writes the same bytes of the same tensors and computes nothing (`MEMORY`): no
kernel can beat it where memory is the limit. The torch contenders are what people write: the plain expression (`EAGER`),
the same with float32 in between (`UPCAST`), a loop over pieces with reused float32 scratch, of the best size
(`CHUNKED`), and the expression compiled by torch (`COMPILED`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ires_kernels import ops
from ires_kernels.backends import native
from ires_kernels.backends import threads as kernel_threads
from ires_kernels.measure import Quartiles, Times, interleave, ratio

ALPHA = 0.7
MEMORY, EAGER, UPCAST, CHUNKED, COMPILED = "memory", "eager", "eager f32", "chunked f32", "compiled"
TORCH = (EAGER, UPCAST, CHUNKED, COMPILED)
_CHUNKS = [1 << i for i in range(14, 21, 2)]
_CHECKED = (1 << 18) + 3  # elements compared of each kind of data

BF16, F16, F32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class VerificationError(Exception):
    """A result is not what the definition says, so there is no point in timing it."""


@dataclass(frozen=True, slots=True)
class Case:
    """One operation on fixed dtypes. `dtypes` is the output's, then the operands'; in place where the first two agree."""

    name: str
    op: str
    dtypes: tuple[torch.dtype, ...]
    stochastic: bool = False
    gates: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Contender → least wanted speed and the speed to reach for: instruction sets against MEMORY, torch ones against us."""

    @property
    def bytes_per_element(self) -> int:
        """Read and written."""
        return sum(dtype.itemsize for dtype in self.dtypes)

    def run(self, out: Tensor, operands: Sequence[Tensor]) -> None:
        """Our side of it, through the public functions."""
        rounding = "stochastic" if self.stochastic else "nearest"
        if self.op == "subtract":
            ops.subtract(operands[0], operands[1], out=out, rounding=rounding)
        elif self.op == "add":
            ops.add_(out, operands[1], ALPHA, rounding=rounding)
        else:
            ops.add_difference_(out, operands[1], operands[2], ALPHA, rounding=rounding)


CASES = (
    Case(
        "add_difference bf16",
        "add_difference",
        (BF16,) * 4,
        gates={"v4": (0.70, 0.90), "v3": (0.50, 0.85), EAGER: (3.5, 4.5), CHUNKED: (2.5, 3.4), COMPILED: (0.9, 1.1)},
    ),
    Case("add_difference f16", "add_difference", (F16,) * 4, gates={"v4": (0.60, 0.80)}),
    Case("add_difference f32", "add_difference", (F32,) * 4, gates={"v4": (0.90, 1.0)}),
    Case("add_difference bf16 stochastic", "add_difference", (BF16,) * 4, stochastic=True),
    Case("add bf16 + f32", "add", (BF16, BF16, F32), gates={"v4": (0.80, 0.95)}),
    Case("add f16 + f32", "add", (F16, F16, F32)),
    Case("add bf16 + e4m3", "add", (BF16, BF16, E4M3), gates={"v4": (0.33, 0.70)}),
    Case("add f16 + e4m3", "add", (F16, F16, E4M3)),
    Case("add bf16 + bf16", "add", (BF16,) * 3),
    Case("subtract f32 = bf16 - bf16", "subtract", (F32, BF16, BF16)),
)


def ours() -> list[str]:
    """Our contenders: the instruction sets of this machine, best first, or the reference where nothing was built."""
    return native.isas() or ["reference"]


@contextmanager
def chosen(name: str, threads: int) -> Iterator[None]:
    """Make the tensor operations use instruction set `name` (or "reference"), and torch too, so many threads."""
    before = {key: os.environ.get(key) for key in ("IRES_BACKEND", "IRES_ISA")}
    token, torch_threads = kernel_threads.set(threads), torch.get_num_threads()
    os.environ["IRES_BACKEND"] = "reference" if name == "reference" else "native"
    os.environ["IRES_ISA"] = "" if name == "reference" else name
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        kernel_threads.reset(token)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def make(case: Case, elements: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Output and operands like a model's weights; a block of 2^20 again and again, of which no contender can profit."""
    generator = torch.Generator().manual_seed(seed)
    operands: list[Tensor] = []
    for dtype in case.dtypes[1:]:
        block = (torch.randn(min(elements, 1 << 20), generator=generator) * 0.02).to(dtype)
        operand = torch.empty(elements, dtype=dtype)
        for piece in operand.split(len(block)):
            piece.copy_(block[: len(piece)])
        operands.append(operand)
    out = operands[0] if case.op != "subtract" else torch.zeros(elements, dtype=case.dtypes[0])
    return out, operands


def _any_bits(case: Case, elements: int) -> tuple[Tensor, list[Tensor]]:
    """Random bit patterns: every exponent, subnormal numbers, inf, NaN."""
    generator = torch.Generator().manual_seed(1)
    sizes = [elements * dtype.itemsize for dtype in case.dtypes]
    raw = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]
    out, *operands = (data.view(dtype) for data, dtype in zip(raw, case.dtypes, strict=True))
    return (out if case.op == "subtract" else operands[0]), operands


def differing(a: Tensor, b: Tensor) -> int:
    """Elements with other bits; any NaN equals any NaN."""
    integer = _INTEGERS[a.element_size()]
    nan_a, nan_b = a.float().isnan(), b.float().isnan()
    return int(((nan_a != nan_b) | (~nan_a & ~nan_b & (a.view(integer) != b.view(integer)))).sum())


def verify(case: Case, threads: Sequence[int]) -> int:
    """Compare our contenders with the reference backend, bit for bit; returns how many results were compared.

    Raises VerificationError.
    """
    compared = 0
    for what, data in (("weights", make(case, _CHECKED)), ("random bit patterns", _any_bits(case, _CHECKED))):
        with chosen("reference", 1):
            wanted = _result(case, data, case.run)
        for name in ours():
            for count in threads:
                with chosen(name, count):
                    wrong = differing(_result(case, data, case.run), wanted)
                if wrong:
                    raise VerificationError(
                        f"{case.name}: {name} with {count} threads differs from the reference backend in "
                        f"{wrong:,} of {_CHECKED:,} elements ({what}). Nothing was timed."
                    )
                compared += 1
    return compared


def _result(case: Case, data: tuple[Tensor, list[Tensor]], run: Callable[[Tensor, Sequence[Tensor]], object]) -> Tensor:
    """What `run` makes of a copy of the data."""
    copies = [operand.clone() for operand in data[1]]
    out = data[0].clone() if case.op == "subtract" else copies[0]
    run(out, copies)
    return out


def torch_contenders(case: Case, chunk: int) -> dict[str, Callable[[Tensor, Sequence[Tensor]], object]]:
    """The torch ways to do `case`; none for a contender that makes no sense there."""
    if case.stochastic:
        return {CHUNKED: _Chunked(case, chunk)}
    result: dict[str, Callable[[Tensor, Sequence[Tensor]], object]]
    if case.op == "subtract":
        result = {
            EAGER: lambda out, x: out.copy_(x[0] - x[1]),
            UPCAST: lambda out, x: out.copy_(x[0].float() - x[1].float()),
        }
    elif case.op == "add":
        result = {
            EAGER: lambda out, x: out.add_(x[1].to(out.dtype) if x[1].dtype == E4M3 else x[1], alpha=ALPHA),
            UPCAST: lambda out, x: out.copy_(out.float() + ALPHA * x[1].float()),
        }
    else:
        result = {
            EAGER: lambda out, x: out.add_(x[1] - x[2], alpha=ALPHA),
            UPCAST: lambda out, x: out.copy_(out.float() + ALPHA * (x[1].float() - x[2].float())),
        }
    upcast = result[UPCAST]
    return {**result, CHUNKED: _Chunked(case, chunk), COMPILED: torch.compile(upcast, dynamic=False)}


class _Chunked:
    """The best that plain torch allows: pieces that stay in cache, scratch that is reused, no copies of float32."""

    def __init__(self, case: Case, chunk: int) -> None:
        self.case, self.chunk = case, chunk
        self.scratch = torch.empty(3, chunk)

    def __call__(self, out: Tensor, operands: Sequence[Tensor]) -> None:
        for start in range(0, out.numel(), self.chunk):
            stop = start + self.chunk
            self._piece(out[start:stop], [operand[start:stop] for operand in operands])

    def _piece(self, out: Tensor, x: Sequence[Tensor]) -> None:
        wide = [
            piece if piece.dtype == F32 else row[: len(piece)].copy_(piece)
            for piece, row in zip(x, self.scratch, strict=False)
        ]
        if self.case.op == "subtract":
            torch.sub(wide[0], wide[1], out=out)
            return
        residual = wide[1]
        if self.case.op == "add_difference":
            residual = torch.sub(wide[1], wide[2], out=self.scratch[1][: len(out)])
        wide[0].add_(residual, alpha=ALPHA)
        if self.case.stochastic:
            # as is common for bfloat16: random bits below the 16 that stay, then truncation
            bits = wide[0].view(torch.int32)
            noise = self.scratch[1][: len(out)].view(torch.int32).random_(0, 1 << 16)
            bits.add_(noise).bitwise_and_(-(1 << 16))
        if out.dtype != F32:
            out.copy_(wide[0])


@dataclass
class Result:
    """One case with one number of threads."""

    case: Case
    elements: int
    threads: int
    times: Times
    unavailable: dict[str, str]
    """Contender → why it could not run."""
    differs: dict[str, float]
    """Torch contender → fraction of elements whose bits are not those of the definition."""
    chunk: int
    """Elements of the best piece for CHUNKED."""

    def of_memory(self, name: str) -> Quartiles | None:
        """Speed as a fraction of the memory loop's."""
        return ratio(self.times, MEMORY, name)

    def faster_than(self, name: str) -> Quartiles | None:
        """How many times as fast as a torch contender our best one is."""
        return ratio(self.times, name, ours()[0])

    def gates(self) -> list[dict[str, Any]]:
        """What was wanted, what to reach for, and what was measured; information, not a verdict."""
        rows = []
        for name, (gate, reach) in self.case.gates.items():
            measured = self.faster_than(name) if name in TORCH else self.of_memory(name)
            if measured:
                what = f"{self.case.name}, {self.threads} threads: "
                what += f"times as fast as {name}" if name in TORCH else f"{name} / memory loop"
                rows.append({"what": what, "gate": gate, "reach": reach, "measured": measured.median, "at_most": False})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON types."""
        size = self.case.bytes_per_element * self.elements
        contenders: dict[str, Any] = {}
        for name, seconds in self.times.items():
            median = Quartiles.of(seconds).median
            contenders[name] = {"seconds": seconds, "median_seconds": median, "gb_per_second": size / median / 1e9}
            of_memory, slower = self.of_memory(name), self.faster_than(name)
            contenders[name]["of_memory"] = of_memory and of_memory.to_dict()
            contenders[name]["ours_faster"] = slower and slower.to_dict()
            if name in self.differs:
                contenders[name]["differs"] = self.differs[name]
        return {
            "case": self.case.name,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in self.case.dtypes],
            "elements": self.elements,
            "threads": self.threads,
            "bytes_per_element": self.case.bytes_per_element,
            "chunk": self.chunk,
            "contenders": contenders,
            "unavailable": self.unavailable,
            "gates": self.gates(),
        }


def measure(case: Case, elements: int, threads: int, rounds: int, *, compiled: bool = True) -> Result:
    """Time all contenders of `case` in one run."""
    out, operands = make(case, elements)
    sample = (out[:_CHECKED].clone(), [operand[:_CHECKED].clone() for operand in operands])
    contenders: dict[str, Callable[[], object]] = {}
    unavailable, differs = {}, {}
    if native.isas():
        item = native._item(out, tuple(operands), 0)
        contenders[MEMORY] = lambda: native._native.memory_loop(item, threads, "")
    else:
        unavailable[MEMORY] = native.status().detail
    for name in ours():
        contenders[name] = _with(name, threads, lambda: case.run(out, operands))
    with chosen("reference", threads):
        wanted = _result(case, sample, case.run)
        chunk = _best_chunk(case, out, operands)
        for name, run in torch_contenders(case, chunk).items():
            if name == COMPILED and not compiled:
                continue
            try:
                wrong = differing(_result(case, sample, run), wanted)
                run(out, operands)  # compiles for this size
            except Exception as error:  # a missing compiler has many faces; the report says which
                if name != COMPILED:
                    raise
                unavailable[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            if not case.stochastic:  # there torch draws other random numbers
                differs[name] = wrong / len(wanted)
            contenders[name] = _with("reference", threads, lambda run=run: run(out, operands))  # type: ignore[misc]
    for name, run_once in contenders.items():
        if name not in TORCH:
            run_once()
    times = interleave(contenders, rounds)
    return Result(case, elements, threads, times, unavailable, differs, chunk)


def _with(name: str, threads: int, run: Callable[[], object]) -> Callable[[], None]:
    """`run` with an instruction set and number of threads: microseconds on top, the same for all."""

    def run_with() -> None:
        with chosen(name, threads):
            run()

    return run_with


def _best_chunk(case: Case, out: Tensor, operands: Sequence[Tensor]) -> int:
    """The size of piece that is fastest here."""
    seconds = {}
    part = slice(0, 1 << 22)
    pieces = [operand[part] for operand in operands]
    for chunk in _CHUNKS * 2:
        run, started = _Chunked(case, chunk), time.perf_counter()
        run(out[part], pieces)
        seconds[chunk] = min(seconds.get(chunk, float("inf")), time.perf_counter() - started)
    return min(seconds, key=lambda chunk: seconds[chunk])
