"""How much of each alpha is in the stored result: the groups of tensors that were given one, and what helps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ires_kernels.backends.call import Tally
from ires_kernels.checkpoints import roles
from ires_kernels.checkpoints.header import brief
from ires_kernels.checkpoints.manifest import Strength
from ires_kernels.files.plain import several
from ires_kernels.planning.plan import Plan
from ires_kernels.streaming.outcome import Outcome

OFF = 0.01
"""Part of an alpha that may be missing in the result, or too much, before a hint says what helps."""


@dataclass
class _Group:
    """The tensors that one pattern decides about, or none."""

    names: set[str] = field(default_factory=set)
    tally: Tally = field(default_factory=Tally)


def strengths(plan: Plan, outcome: Outcome) -> tuple[Strength, ...]:
    """A strength for each pattern and its factors: first of the tensors that no pattern is for, then by pattern."""
    patterns = {pattern: at for at, (pattern, _) in reversed([*enumerate(plan.rules.alphas, 1)])}
    groups: dict[tuple[int, str, tuple[float, ...]], _Group] = {}
    for step in plan.steps:
        tally = outcome.tallies.get(step.label)
        if tally is None or step.op == "convert" or not step.factors:
            continue
        pattern = plan.rules.decided_by(step.name)
        group = groups.setdefault((patterns.get(pattern, 0), pattern, step.factors), _Group())
        group.tally += tally
        if not step.is_scale:
            group.names.add(step.name)
    found = []
    for (_, pattern, factors), group in sorted(groups.items(), key=lambda each: each[0]):
        tally = group.tally
        ratio = tally.dot / tally.norm2 if tally.norm2 else math.nan
        realised = ratio if math.isfinite(ratio) else None
        blended = roles.are_blended(plan.inputs)
        found.append(Strength(factors, tally.elements, realised, len(group.names), pattern, blended))
    return tuple(found)


def rows(found: Sequence[Strength]) -> list[tuple[str, str]]:
    """A line for each group: its alphas, what is left of them, and which tensors it is; of a blend its weights."""
    return [
        (_title(each), f"{'' if each.weights else _left(each)}{_which(each, len(found))}".removeprefix(" in "))
        for each in found
    ]


def hints(found: Iterable[Strength], plan: Plan) -> Iterable[str]:
    """What helps where more than `OFF` of an alpha is not in the result; of several groups for the worst one."""
    off = {each: abs(each.realised - 1) for each in found if each.realised is not None and not each.weights}
    worst = max(off, key=lambda each: off[each], default=None)
    if worst is None or off[worst] <= OFF:
        return
    assert worst.realised is not None
    of = f"{_title(worst)}{_which(worst, len(off))}"
    more = sum(value > OFF for value in off.values()) - 1
    dtype = "bf16" if any(step.output.encoding for step in plan.steps) else "f32"
    keeps = f"a new folder with --dtype {dtype}" if plan.in_place else f"--dtype {dtype}"
    keeps += " keeps more of it" if dtype == "bf16" else " keeps all of it"
    if plan.rules.rounding == "stochastic":
        text = f"{worst.realised:.1%} of {of} is in the result: its noise is as large as that. {keeps}"
    else:
        text = f"rounding to nearest leaves {worst.realised:.1%} of {of}: --rounding stochastic keeps it on average"
        text += f", and {keeps}"
    yield text + (f". So with {more} more" if more else "")


def _title(each: Strength) -> str:
    what = "weights" if each.weights else "alphas" if len(each.factors) > 1 else "alpha"
    return f"{what} {', '.join(f'{factor:g}' for factor in each.factors)}"


def _left(each: Strength) -> str:
    if each.realised is None:
        return "no update" if not any(each.factors) else "no update: the residual is 0"
    if each.effective_alpha is None:
        return f"{each.realised:.4%} of the update is in the result"
    return f"effective {each.effective_alpha:.6g}"


def _which(each: Strength, groups: int) -> str:
    if not each.tensors:  # of a manifest that does not say
        return ""
    if each.pattern:
        return f" in {several(each.tensors, 'tensor')} that match{'es' * (each.tensors == 1)} {brief(each.pattern)}"
    return f" in {several(each.tensors, 'other tensor' if groups > 1 else 'tensor')}"
