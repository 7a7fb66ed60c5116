"""Kernels on a GPU against a copy on the device and against torch: the workloads, the check, the clock.

The yardstick is a copy from one part of the device's memory to another (`COPY`), counted in bytes read and written, as
everything here is. A workload is a list of tensors in one call; the largest are far beyond any cache. Before its clock
starts, its results are compared with the reference on the CPU: random bit patterns, and both ends of every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ires_kernels.backends import native, reference, triton
from ires_kernels.backends.call import Call
from ires_kernels.bench.accelerator import Accelerator
from ires_kernels.bench.contenders import ALPHA, COMPILED, EAGER, FOREACH, UPCAST, compiled, expressions, foreach
from ires_kernels.bench.kernels import (
    BF16,
    CHECKED,
    E4M3,
    F16,
    F32,
    Case,
    VerificationError,
    any_bits,
    differing,
    fill,
    forced,
)
from ires_kernels.bench.measure import Times, Ways, interleave, reason
from ires_kernels.bench.result import Goal, Result
from ires_kernels.bench.synthetic import Shape

COPY = "device copy"
TORCH = (EAGER, UPCAST, COMPILED, FOREACH)
BACKENDS: Mapping[str, ModuleType] = {"native": native, "triton": triton}

_COPIED = 1 << 31  # bytes at most that COPY reads
_ENDS = 1 << 12  # elements compared at each end of a tensor

Way = Callable[[], object]
Shapes = Sequence[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Workload:
    """One operation in place on a list of tensors, with what is wanted of it."""

    case: Case
    shapes: Shapes
    label: str = ""
    gates: Mapping[str, float] = field(default_factory=dict)
    """Contender → the least wanted: bandwidth over that of COPY, speed over that of one of TORCH."""

    @property
    def name(self) -> str:
        return self.case.name + self.label

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def nbytes(self) -> int:
        """Read and written by a call."""
        return self.elements * self.case.bytes_per_element

    @property
    def copied(self) -> int:
        """Bytes that COPY reads and writes beside it."""
        return 2 * min(self.nbytes // 2, _COPIED)

    @property
    def on_device(self) -> int:
        """Bytes of its operands and of COPY's, without what torch's ways take."""
        return self.elements * sum(dtype.itemsize for dtype in self.case.dtypes[1:]) + self.copied


def workloads(elements: int, model: Shape, model_name: str) -> list[Workload]:
    """Single tensors of so many elements, then all tensors of a model in one call."""
    tensors = list(model.tensors().values())
    torch_gates = {UPCAST: 5.0, COMPILED: 1.0, FOREACH: 1.5}
    one = [(elements,)]
    bf16 = Case("add_difference bf16", "add_difference", (BF16,) * 4)
    return [
        Workload(bf16, one, gates={COPY: 0.92, **torch_gates}),
        Workload(Case("add_difference f16", "add_difference", (F16,) * 4), one, gates={COPY: 0.92}),
        Workload(Case("add_difference f32", "add_difference", (F32,) * 4), one, gates={COPY: 0.92}),
        Workload(Case("add bf16 + f32", "add", (BF16, BF16, F32)), one, gates={COPY: 0.92}),
        Workload(Case("add bf16 + e4m3", "add", (BF16, BF16, E4M3)), one, gates={COPY: 0.85}),
        Workload(
            Case("add_difference bf16 stochastic", "add_difference", (BF16,) * 4, stochastic=True),
            one,
            gates={COPY: 0.85},
        ),
        Workload(bf16, tensors, f", the {len(tensors)} tensors of {model_name}", gates={COPY: 0.90, **torch_gates}),
    ]


def available(place: torch.device) -> list[str]:
    """The backends that run there, fastest first."""
    return [name for name, backend in BACKENDS.items() if backend.status(place.type).available]


def verify(workload: Workload, device: Accelerator) -> int:
    """Compare every backend with the reference on random bit patterns; returns how many results were compared.

    Raises VerificationError.
    """
    case = workload.case
    _, operands = any_bits(case, CHECKED)
    wanted = [x.clone() for x in operands]
    with forced("reference"):
        case.run(wanted[0], wanted)
    names = available(device.place)
    for name in names:
        there = [x.to(device.place, copy=True) for x in operands]
        with forced(name):
            case.run(there[0], there)
        wrong = differing(there[0].cpu(), wanted[0])
        if wrong:
            raise _wrong(workload, name, wrong, CHECKED, "random bit patterns")
    return len(names)


def measure(workload: Workload, device: Accelerator, rounds: int, *, with_compiled: bool) -> Result:
    """Check the ends of the results, then time all contenders in one run. Raises VerificationError."""
    case = workload.case
    generator = torch.Generator().manual_seed(0)
    columns = []
    for dtype in case.dtypes[1:]:
        columns.append([torch.empty(shape, dtype=dtype, device=device.place) for shape in workload.shapes])
        for operand in columns[-1]:
            fill(operand, generator)
    source, destination = (torch.ones(workload.copied // 2, dtype=torch.uint8, device=device.place) for _ in range(2))
    ways: Ways = {COPY: lambda: destination.copy_(source)}
    for name in available(device.place):
        check_ends(workload, name, columns)
        ways[name] = _forced(name, partial(case.run, columns[0], columns))
    unavailable = {}
    for name, way in torch_ways(case, columns, with_compiled=with_compiled).items():
        try:
            way()
        except Exception as error:  # no room, no compiler: the report says which
            unavailable[name] = reason(error)
        else:
            ways[name] = way
            continue
        device.release()
    return result_of(workload, device.name, interleave(ways, rounds, timer=device.seconds), unavailable)


def result_of(workload: Workload, device: str, times: Times, unavailable: Mapping[str, str]) -> Result:
    """What was measured of a workload."""
    others = (COPY, *TORCH)
    facts = {**workload.case.facts(), "elements": workload.elements, "tensors": len(workload.shapes), "device": device}
    return Result(
        workload.name,
        facts,
        times,
        {name: workload.copied if name == COPY else workload.nbytes for name in times},
        by="speed",
        yardsticks=others,
        goals=[Goal(name, other, workload.gates.get(other)) for other in others for name in BACKENDS],
        unavailable=unavailable,
    )


def torch_ways(case: Case, columns: list[list[Tensor]], *, with_compiled: bool) -> Ways:
    """What people write in torch, tensor by tensor but for FOREACH; nothing has the bits of stochastic rounding."""
    if case.stochastic:
        return {}
    found = expressions(case.op)
    if with_compiled:
        torch.compiler.reset()  # or it gives up on compiling the same expression for other dtypes
        found[COMPILED] = compiled(found[UPCAST])

    def each(way: Callable[[Tensor, Sequence[Tensor]], object]) -> None:
        for row in zip(*columns, strict=True):
            way(row[0], row)

    ways: Ways = {name: partial(each, way) for name, way in found.items()}
    return {**ways, FOREACH: lambda: foreach(case.op, columns[0], columns)}


def check_ends(workload: Workload, name: str, columns: list[list[Tensor]]) -> None:
    """Run a backend once on all of the data, and compare both ends of every tensor with the reference.

    Raises VerificationError.
    """
    case = workload.case
    ends = [
        (i, start, [x.view(-1)[start : start + _ENDS].cpu().clone() for x in row])
        for i, row in enumerate(zip(*columns, strict=True))
        for start in sorted({0, max(0, row[0].numel() - _ENDS)})
    ]
    _forced(name, partial(case.run, columns[0], columns))()
    for i, start, operands in ends:
        reference.run(Call(case.op, [operands[0]], [tuple(operands)], (ALPHA,), case.stochastic, 0, [0], start, None))
        got = columns[0][i].view(-1)[start : start + _ENDS].cpu()
        wrong = differing(got, operands[0])
        if wrong:
            raise _wrong(workload, name, wrong, len(got), f"tensor {i} from element {start:,} on")


def _forced(name: str, run: Way) -> Way:
    def run_with() -> None:
        with forced(name):
            run()

    return run_with


def _wrong(workload: Workload, name: str, wrong: int, compared: int, where: str) -> VerificationError:
    return VerificationError(
        f"{workload.name}: {name} differs from the reference backend in {wrong:,} of {compared:,} elements ({where}). "
        "It was not timed."
    )
