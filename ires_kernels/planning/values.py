"""What the values of two models say of tensors that are matched, region by region."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.planning.evidence import Likeness, Looks, likeness, through
from ires_kernels.planning.layout import Run, Runs
from ires_kernels.planning.rewrites import Judgement

UNLIKE = 0.25
"""Correlation below which a tensor is not what its name says. It lies below evidence.ALIKE, since heavy training of
what has the right name is likelier than an order of its rows that is half the same: what lies between rests on names.
"""
PART = 0.2
"""Cosine of the least alike sampled row of tensors of a kind, in the median, below which these are not what they are
named, however their other rows are. Of relatives it was .86 and more."""


class Values:
    """The samples of a model and of the one that gives the layout, and what is asked of them."""

    def __init__(
        self, looks: Looks | None, role: str, other: str, mine: Mapping[str, Ref], theirs: Mapping[str, Ref]
    ) -> None:
        """Without `looks` they say nothing."""
        self.looks, self.role, self.other, self.mine, self.theirs = looks, role, other, mine, theirs

    def judge(self, runs: Mapping[str, Runs]) -> Judgement:
        """What the tensors that some others are made of say of that."""
        compared = self.compare(runs)
        odd = self._odd(compared)
        return Judgement(
            {name: False if name in odd else verdict(found) for name, found in compared.items()},
            {name: found.distance for name, found in compared.items() if math.isfinite(found.distance)},
        )

    def _odd(self, compared: Mapping[str, Likeness]) -> set[str]:
        """Tensors of kinds of which some sampled rows are others: one alone may have learnt something."""
        kinds: dict[str, dict[str, float]] = {}
        for name, found in compared.items():
            if math.isfinite(found.weakest) and len(self.theirs[name].shape) > 1 and not self.is_by_token(name):
                kinds.setdefault(names.pattern(name), {})[name] = found.weakest
        return {name for kind in kinds.values() if statistics.median(kind.values()) < PART for name in kind}

    def is_by_token(self, name: str) -> bool:
        """Whether a source tensor has a row for each token, of which nobody may have trained some."""
        return self.looks is not None and names.is_by_token(self.theirs[name], self.looks.inputs[self.other])

    def compare(self, runs: Mapping[str, Runs]) -> dict[str, Likeness]:
        """How alike the sampled elements of every source tensor are to what was matched with them."""
        if self.looks is None:
            return {}
        sources: dict[str, list[tuple[Run, str, int]]] = {}
        for target, its in runs.items():
            start = 0
            for run in its:
                sources.setdefault(run.name, []).append((run, target, start))
                start += run.numel
        found = {}
        for name, places in sources.items():
            alike = self._likeness(self.looks, name, places)
            if alike is not None:
                found[name] = alike
        return found

    def cosine(self, name: str, runs: Runs) -> float:
        """How much a tensor has in common with what it is made of, all in all."""
        found = [alike.cosine for alike in self.compare({name: runs}).values()]
        return min(found, default=math.nan)

    def _likeness(self, looks: Looks, name: str, places: Iterable[tuple[Run, str, int]]) -> Likeness | None:
        sample = looks.of(self.other, self.theirs[name])
        if sample is None:
            return None
        pieces: dict[str, list[tuple[int, int, int]]] = {}
        for run, target, start in places:
            for first, count in sample.runs:
                for low, size, place in run.meets(first, count):
                    pieces.setdefault(target, []).append((low, size, start + place))
        ours: list[float] = []
        yours: list[float] = []
        for target, its in pieces.items():
            numbers, where = through(sample, its)
            met = looks.at(self.role, self.mine[target], where)
            if met is None:
                return None
            yours += numbers
            ours += met.values
        return likeness(yours, ours) if yours else None


def verdict(found: Likeness) -> bool | None:
    """Whether a tensor is what it was matched with; None where that rests on its name."""
    return None if found.agrees is False and found.correlation >= UNLIKE else found.agrees
