"""Merges whose matrices are made of parts, as those of two vocabularies are: rows that are added to, copied, kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.planning import deeds
from ires_kernels.planning.findings import Findings
from ires_kernels.planning.steps import Operand, Step

KEPT = 2
"""Rows that every part which is kept has."""
_WHOLE = deeds.apply_steps


def steps_of_parts(ref: TensorRef, found: Findings, whole: Callable[..., list[Step]] = _WHOLE) -> list[Step]:
    """In place of `deeds.apply_steps`: rows kept, merged, copied, kept, merged in another order, and kept again."""
    (step,) = whole(ref, found)
    rows = ref.shape[0] if len(ref.shape) == 2 else 0
    if step.reason or rows < 4 * KEPT:
        return [step]
    row, left = ref.numel // rows, rows - 3 * KEPT
    other = "instruct" if "instruct" in found.inputs else step.operands[1].role
    there = next(operand.refs[0] for operand in step.operands if operand.role == other)
    parts: list[Step] = []

    def add(count: int, *operands: Operand, **changes: Any) -> None:
        parts.append(replace(step, first=at * row, count=count * row, operands=operands, **changes))

    at = 0
    for count, deed in zip((KEPT, left // 2, 1, KEPT, left - left // 2 - 1, KEPT), "kmckrk", strict=True):
        others = step.operands[1:]
        mine = Operand("target", (ref.run(at * row, count * row),))
        if deed == "k":
            add(count, mine, op="copy", factors=(), reason="the target's own")
        elif deed == "c":
            op = "copy" if there.dtype == step.dtype else "convert"
            add(count, Operand(other, (there.run(at * row, count * row),)), op=op, factors=())
        elif deed == "m":
            add(count, mine, *(Operand(o.role, (o.refs[0].run(at * row, count * row),)) for o in others))
        else:
            order = range(at + count - 1, at - 1, -1)
            add(count, mine, *(Operand(o.role, tuple(o.refs[0].run(r * row, row) for r in order)) for o in others))
        at += count
    return [part for part in parts if part.count]
