"""Kernels against a pure memory loop and against torch: the cases, the contenders, and the check before the clock.

The yardstick is a loop that reads and writes the same bytes of the same tensors and computes nothing (`MEMORY`): what a
plain loop gets out of the memory. What people write in torch is in contenders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ires_kernels.backends import native
from ires_kernels.backends.call import threads as kernel_threads
from ires_kernels.backends.choice import backends
from ires_kernels.bench.contenders import ALPHA, CHUNKED, COMPILED, EAGER, TORCH, best_chunk, torch_contenders
from ires_kernels.bench.measure import Ways, interleave, reason
from ires_kernels.bench.result import Goal, Result
from ires_kernels.tensors import ops

MEMORY = "memory"
CHECKED = (1 << 18) + 3  # elements compared of each kind of data

T = TypeVar("T", Tensor, list[Tensor])
BF16, F16, F32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class VerificationError(Exception):
    """A result is not what the definition says, so there is no point in timing it."""


@dataclass(frozen=True, slots=True)
class Case:
    """One operation on fixed dtypes, in place but for "subtract". `dtypes` is the output's, then the operands'."""

    name: str
    op: str
    dtypes: tuple[torch.dtype, ...]
    stochastic: bool = False
    gates: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Contender → least wanted speed and the speed to reach for: ours over MEMORY's, or over that of a torch one."""

    @property
    def bytes_per_element(self) -> int:
        """Read and written."""
        return sum(dtype.itemsize for dtype in self.dtypes)

    def facts(self) -> dict[str, object]:
        """The case in JSON types."""
        dtypes = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        return {"case": self.name, "dtypes": dtypes, "bytes_per_element": self.bytes_per_element}

    def run(self, out: T, operands: Sequence[T]) -> None:
        """Our side of it, through the public functions: tensors, or a list of tensors for each."""
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
def forced(backend: str, isa: str = "") -> Iterator[None]:
    """Make the tensor operations use one backend, and of native one instruction set."""
    before = {key: os.environ.get(key) for key in ("IRES_BACKEND", "IRES_ISA")}
    os.environ |= {"IRES_BACKEND": backend, "IRES_ISA": isa}
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextmanager
def chosen(name: str, threads: int) -> Iterator[None]:
    """Make the tensor operations use instruction set `name` (or "reference"), and torch too, so many threads."""
    token, torch_threads = kernel_threads.set(threads), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with forced("reference") if name == "reference" else forced("native", name):
            yield
    finally:
        torch.set_num_threads(torch_threads)
        kernel_threads.reset(token)


def make(case: Case, elements: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Output and operands like a model's weights; a block of 2^20 again and again, of which no contender can profit."""
    generator = torch.Generator().manual_seed(seed)
    operands = [torch.empty(elements, dtype=dtype) for dtype in case.dtypes[1:]]
    for operand in operands:
        fill(operand, generator)
    out = operands[0] if case.op != "subtract" else torch.zeros(elements, dtype=case.dtypes[0])
    return out, operands


def fill(operand: Tensor, generator: torch.Generator) -> None:
    """Weights for a contiguous tensor on any device, from a generator of the CPU."""
    block = (torch.randn(min(operand.numel(), 1 << 20), generator=generator) * 0.02).to(operand.dtype)
    block, flat = block.to(operand.device), operand.view(-1)
    for start in range(0, len(flat), len(block)):
        piece = flat[start : start + len(block)]
        piece.copy_(block[: len(piece)])


def any_bits(case: Case, elements: int) -> tuple[Tensor, list[Tensor]]:
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
    for what, data in (("weights", make(case, CHECKED)), ("random bit patterns", any_bits(case, CHECKED))):
        with chosen("reference", 1):
            wanted = _result(case, data, case.run)
        for name in ours():
            for count in threads:
                with chosen(name, count):
                    wrong = differing(_result(case, data, case.run), wanted)
                if wrong:
                    raise VerificationError(
                        f"{case.name}: {name} (threads {count}) differs from the reference backend in "
                        f"{wrong:,} of {CHECKED:,} elements ({what}). Nothing was timed."
                    )
                compared += 1
    return compared


def _result(case: Case, data: tuple[Tensor, list[Tensor]], run: Callable[[Tensor, Sequence[Tensor]], object]) -> Tensor:
    """What `run` makes of a copy of the data."""
    copies = [operand.clone() for operand in data[1]]
    out = data[0].clone() if case.op == "subtract" else copies[0]
    run(out, copies)
    return out


def contenders(case: Case, out: Tensor, operands: Sequence[Tensor], threads: int, chunk: int) -> Ways:
    """Every way to do `case` to this data, by name; COMPILED compiles, or fails to, when it is first called."""
    ways: Ways = {}
    if native.isas():
        ways[MEMORY] = native.memory_loop(out, tuple(operands), threads)
    for name in ours():
        ways[name] = _with(name, threads, lambda: case.run(out, operands))
    for name, run in torch_contenders(case.op, case.stochastic, chunk).items():
        ways[name] = _with("reference", threads, partial(run, out, operands))
    return ways


def measure(case: Case, elements: int, threads: int, rounds: int, *, compiled: bool = True) -> Result:
    """Time all contenders of `case` in one run."""
    out, operands = make(case, elements)
    begin = (out[:CHECKED], [operand[:CHECKED] for operand in operands])
    if compiled:
        torch.compiler.reset()  # or it gives up on compiling the same expression for other dtypes and threads
    with chosen("reference", threads):
        chunk = best_chunk(case.op, case.stochastic, out, operands)
    ways = contenders(case, out, operands, threads, chunk)
    unavailable = {} if MEMORY in ways else {MEMORY: backends()["native"].detail}
    if not compiled:
        ways.pop(COMPILED, None)
    differs = {}  # fraction of elements whose bits are not those of the definition
    for name, run in list(ways.items()):
        with chosen("reference", threads):
            wanted = _result(case, begin, case.run)
        try:
            run()
        except Exception as error:  # a missing compiler has many faces; the report says which
            if name != COMPILED:
                raise
            unavailable[name] = reason(error)
            del ways[name]
            continue
        if name in TORCH and not case.stochastic:  # there torch draws other random numbers
            differs[name] = {"differs": differing(begin[0], wanted) / len(wanted)}
    facts = {**case.facts(), "elements": elements, "threads": threads, "chunk": chunk}
    return Result(
        f"{case.name}, threads {threads}",
        facts,
        interleave(ways, rounds),
        dict.fromkeys(ways, case.bytes_per_element * elements),
        by="speed",
        yardsticks=(MEMORY, *TORCH),
        goals=[
            Goal(ours()[0], name, *wish) if name in TORCH else Goal(name, MEMORY, *wish)
            for name, wish in case.gates.items()
        ],
        notes=differs,
        unavailable=unavailable,
    )


def _with(name: str, threads: int, run: Callable[[], object]) -> Callable[[], None]:
    """`run` with an instruction set and number of threads: microseconds on top, the same for all."""

    def run_with() -> None:
        with chosen(name, threads):
            run()

    return run_with
