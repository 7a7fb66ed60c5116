"""What it did to a residual that its target stays quantized: the noise of new codes, and how many scales are new."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ires_kernels.checkpoints.manifest import Requantized
from ires_kernels.planning.plan import Plan
from ires_kernels.streaming.outcome import Outcome

LOUD = 0.5
"""Noise in units of the update from which it is worth a warning. It ends at 1 where all is rounded to nearest, and all
of the update is lost; random rounding makes more of it, which is nothing on the average."""


def requantized(plan: Plan, outcome: Outcome) -> Requantized | None:
    """The sums of what was stored as codes; None where nothing was."""
    ratios: dict[str, float] = {}
    noise = norm = 0.0
    scales = new = 0
    for step in plan.steps:
        if step.output.encoding is None or step.is_scale:
            continue
        tally, counted = outcome.tallies.get(step.label), outcome.scales.get(step.label, (0, 0))
        scales, new = scales + counted[0], new + counted[1]
        if tally is not None and tally.norm2 > 0:
            ratios[step.name] = math.sqrt(tally.noise / tally.norm2)
            noise, norm = noise + tally.noise, norm + tally.norm2
        else:
            ratios[step.name] = 0.0
    if not ratios:
        return None
    worst = max(ratios, key=lambda name: ratios[name])
    loud = sum(ratio > LOUD for ratio in ratios.values())
    whole = math.sqrt(noise / norm) if norm else 0.0
    return Requantized(len(ratios), scales, new, whole, loud, worst, ratios[worst])


def row(found: Requantized) -> str:
    """What it comes to, for people."""
    return (
        f"{found.tensors} tensors, noise {found.noise:.3g} of the norm of the update, the most {found.most:.3g} in "
        f"{found.worst}; {found.new_scales:,} of {found.scales:,} scales are new"
    )


def warnings(found: Requantized | None, rounding: str) -> Iterable[str]:
    """A warning where codes lose much of an update, and what helps."""
    if found is None or not found.loud:
        return
    random = rounding == "stochastic"
    helps = "" if random else ", or round with --rounding stochastic, which loses nothing on the average"
    yield (
        f"new codes are off by more than {LOUD:g} of the norm of the update in {found.loud} of {found.tensors} "
        f"quantized tensors, by {found.most:.3g} in {found.worst}: write plain weights with --dtype bf16{helps}"
    )
