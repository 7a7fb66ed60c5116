"""How much of a residual finds a place, where tensors are missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ires_kernels.checkpoints import roles
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.dtypes import FLOATS
from ires_kernels.planning.findings import Findings
from ires_kernels.planning.steps import Output, Step, operands

_LEFT_OVER = 0.1
"""Of the elements of a residual, what --allow-missing leaves out without being told so."""
_ANY = (
    "It leaves out a tenth at most: where what is missing belongs to the model, mend that first; "
    'to go on all the same, give --allow-missing=any (allow_missing="any").'
)


class Share(NamedTuple):
    """How much of the residual finds a place, where tensors are missing."""

    tensors: int
    all_tensors: int
    elements: int
    all_elements: int
    left: tuple[Step, ...]
    """What finds none: steps that make its update of itself, and so tell its norm."""
    known: bool
    """Whether all of that has an update; where base or instruct lacks a tensor there is none to take."""
    of: str = "residual"
    """What it is a share of."""

    @property
    def left_over(self) -> float:
        """The part of the elements that finds no place."""
        return 1 - self.elements / self.all_elements if self.all_elements else 0.0

    def text(self, norm: float | None = None) -> str:
        """The warning; `norm` is the part of the update's norm that went in, None where that is not known."""
        whose = "its" if self.of == "residual" else "their"
        part = f"{_percent(self.elements, self.all_elements)} of {whose} elements"
        part += "" if norm is None else f" and {_percent(norm, 1)} of {whose} norm"
        return f"of the {self.of} {self.tensors} of {self.all_tensors} tensors went in, {part}"


def _percent(part: float, whole: float) -> str:
    """A percentage that is 0 or 100 only if it is."""
    text = f"{part / whole:.2%}" if whole else "100.00%"
    if part < whole and text == "100.00%":
        return "more than 99.99%"
    return "less than 0.01%" if part > 0 and text == "0.00%" else text


def share(steps: Iterable[Step], found: Findings) -> Share | None:
    """How much of the residual, stored or taken on the way, finds a place; None where nothing is missing."""
    if not found.missing:
        return None
    given = [each[0] for each in roles.added(found.inputs)]
    each = [operand for step in steps if not step.reason for operand in step.operands]
    used = {(operand.role, name) for operand in each for name in operand.tensors}
    inside = [found.inputs[role].tensors[name] for role, name in used if role in given]
    outside: list[TensorRef] = []
    left = []
    for absence in found.missing:
        name = absence.name
        refs = {r: ref for r in found.inputs if r in absence.present and (ref := found.inputs[r].tensors.get(name))}
        lost = {r: ref for r, ref in refs.items() if r in given and (r, name) not in used and ref.dtype in FLOATS}
        outside += lost.values()
        if lost:
            left += _update(name, lost | {r: ref for r, ref in refs.items() if roles.is_base(r)}, found)
    elements = sum(ref.numel for ref in inside)
    everything = elements + sum(ref.numel for ref in outside)
    known = {step.name for step in left} == {ref.name for ref in outside}
    of = "models" if found.is_blend else "residual"
    return Share(len(inside), len(inside) + len(outside), elements, everything, tuple(left), known, of)


def checked_share(steps: Iterable[Step], found: Findings) -> Share | None:
    """How much of the residual finds a place; refuses to go on where that is too little to be meant."""
    placed = share(steps, found)
    if placed is not None and found.rules.allow_missing is True and placed.left_over > _LEFT_OVER:
        found.explains = True
        found.problem(f"--allow-missing would leave out too much: {placed.text()}", _ANY)
    return placed


def _update(name: str, refs: Mapping[str, TensorRef], found: Findings) -> list[Step]:
    """The update that a tensor would make, on top of itself; nothing where there is no difference to take."""
    if (
        found.is_blend
        or len({ref.shape for ref in refs.values()}) > 1
        or not all(ref.dtype in FLOATS for ref in refs.values())
    ):
        return []
    whole = [each for each in roles.added(found.inputs) if all(role in refs for role in each)]
    if not whole:
        return []
    first, *_ = given = operands({role: (refs[role],) for each in whole for role in each})
    factors, op = found.added(name, refs)
    return [Step(Output(name, "F32", first.refs[0].shape), op, (first, *given), factors)]
