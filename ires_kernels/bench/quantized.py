"""Differences of quantized weights added to a bf16 target, decoded on the way, against a pure memory loop.

Instruct and base are both quantized, which is the hardest case: two decodings for each number that is stored. The
yardstick reads and writes as many bytes as the codes and the target have; scales are a hundredth to a sixteenth more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ires_kernels.backends import decoding, definition, native, reference
from ires_kernels.backends.call import Call, Coded
from ires_kernels.backends.choice import backends
from ires_kernels.bench.kernels import MEMORY, VerificationError, chosen, differing, fill, ours
from ires_kernels.bench.measure import Ways, interleave
from ires_kernels.bench.result import Goal, Result
from ires_kernels.formats import Format, matrices, row_bytes

ALPHA = 0.7
WIDTH = 4096
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.uint8}


@dataclass(frozen=True, slots=True)
class Case:
    """Weights of one format."""

    format: Format
    gates: Mapping[str, tuple[float, float]]
    """Instruction set → least wanted speed and the speed to reach for, over MEMORY's."""

    @property
    def name(self) -> str:
        """In words."""
        return f"add_difference bf16, of {self.format}"


def _format(name: str, rows: int, columns: int, scale: str, **others: int | str) -> Format:
    return Format(name, (("rows", rows), ("columns", columns), ("scale", scale), *others.items()))


CASES = (
    Case(_format("fp8-block", 128, 128, "F32"), {"v4": (0.60, 0.80)}),
    Case(_format("mxfp4", 1, 32, "F8_E8M0"), {"v4": (0.35, 0.60)}),
    Case(_format("nvfp4", 1, 16, "F8_E4M3", **{"global": "divide"}), {"v4": (0.35, 0.60)}),
    Case(_format("pack-quantized", 1, 32, "BF16", bits=4), {"v4": (0.35, 0.60)}),
)


def weight(format: Format, rows: int, seed: int) -> tuple[tuple[int, ...], dict[str, memoryview]]:
    """A weight of so many rows, of any codes but NaN, and its parts."""
    full = (rows, WIDTH)
    generator = torch.Generator().manual_seed(seed)
    _, height, width = matrices(full)
    codes = torch.randint(0, 127, (height * row_bytes(format, full),), dtype=torch.uint8, generator=generator)
    blocks = -(-height // format.number("rows")) * -(-width // format.number("columns"))
    scale = torch.rand(blocks, generator=generator) * 1e-3 + 1e-4
    if format.word("scale") == "F8_E8M0":
        scale = torch.randint(110, 120, (blocks,), generator=generator)
    if format.word("scale") == "F8_E4M3":
        scale = scale * 1e5
    parts = {"codes": codes, "scale": scale.to(_DTYPES[format.word("scale")])}
    if format.word("global"):
        parts["global"] = torch.tensor([3000.0])
    return full, {name: part.view(torch.uint8).numpy().data for name, part in parts.items()}


def run(target: Tensor, x: Coded, y: Coded, room: Sequence[Tensor]) -> None:
    """Our side of it, in place; `room` is for the numbers where they are not decoded on the way."""
    call = Call("add_difference", [target], [(target, *room)], (ALPHA,), False, 0, [0], 0, None)
    decoding.run(call, {1: x, 2: y})


def verify(case: Case, threads: Sequence[int]) -> int:
    """Compare our contenders with the definition, bit for bit; returns how many results were compared.

    Raises VerificationError.
    """
    (full, x), (_, y) = (weight(case.format, 33, seed) for seed in range(2))
    coded = [Coded(case.format, full, 0, parts) for parts in (x, y)]
    count, compared = math.prod(full), 0
    numbers = [torch.empty(count) for _ in range(2)]
    for out, each in zip(numbers, coded, strict=True):
        definition.define(each.format, each.full, 0, count, each.parts, out)
    target = torch.empty(count, dtype=torch.bfloat16)
    fill(target, torch.Generator().manual_seed(2))
    wanted = torch.empty_like(target)
    reference.run(Call("add_difference", [wanted], [(target, *numbers)], (ALPHA,), False, 0, [0], 0, None))
    for name in ours():
        for used in threads:
            got = target.clone()
            with chosen(name, used):
                run(got, coded[0], coded[1], numbers)
            wrong = differing(got, wanted)
            if wrong:
                raise VerificationError(
                    f"{case.name}: {name} (threads {used}) differs in {wrong:,} of {count:,} elements"
                )
            compared += 1
    return compared


def measure(case: Case, elements: int, threads: int, rounds: int) -> Result:
    """Time all contenders of `case` in one run."""
    (full, x), (_, y) = (weight(case.format, max(elements // WIDTH, 1), seed) for seed in range(2))
    count = math.prod(full)
    coded = [Coded(case.format, full, 0, parts) for parts in (x, y)]
    target = torch.empty(count, dtype=torch.bfloat16)
    fill(target, torch.Generator().manual_seed(2))
    is_native = bool(native.isas())
    room = [torch.empty(0 if is_native else count) for _ in range(2)]  # native loops need none
    ways: Ways = {}
    if is_native:
        ways[MEMORY] = _memory(target, [parts["codes"] for parts in (x, y)], case.format.bits, threads)
    for name in ours():
        ways[name] = _with(name, threads, lambda: run(target, coded[0], coded[1], room))
    touched = 2 * 2 * count + len(x["codes"]) + len(y["codes"])
    facts = {"case": case.name, "elements": count, "threads": threads, "bytes_per_element": touched / count}
    return Result(
        f"{case.name}, threads {threads}",
        facts,
        interleave(ways, rounds),
        dict.fromkeys(ways, touched),
        by="speed",
        yardsticks=(MEMORY,),
        goals=[Goal(name, MEMORY, *wish) for name, wish in case.gates.items() if name in ways],
        unavailable={} if is_native else {MEMORY: backends()["native"].detail},
    )


def _memory(target: Tensor, codes: Sequence[memoryview], bits: int, threads: int) -> Callable[[], None]:
    """The loop that reads all codes and changes the target: of 4 bits, two elements are taken for one."""
    bytes_of = [torch.frombuffer(view, dtype=torch.float8_e4m3fn) for view in codes]
    out = target if bits == 8 else target.view(torch.float32)
    return native.memory_loop(out, (out, *bytes_of), threads)


def _with(name: str, threads: int, call: Callable[[], None]) -> Callable[[], None]:
    def with_it() -> None:
        with chosen(name, threads):
            call()

    return with_it
