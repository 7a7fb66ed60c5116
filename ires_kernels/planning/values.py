"""What the values of two models say of tensors that are matched, region by region."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.planning.evidence import RUN, Likeness, Looks, likeness, through
from ires_kernels.planning.layout import Run, Runs
from ires_kernels.planning.rewrites import Judgement

UNLIKE = 0.25
"""Correlation below which a tensor is not what its name says. It lies below evidence.ALIKE, since heavy training of
what has the right name is likelier than an order of its rows that is half the same: what lies between rests on names.
What is made of parts of others has no name to rest on."""
PART = 0.2
"""Cosine of the least alike sampled row of tensors of a kind, in the median, below which these are not what they are
named, however their other rows are. Of relatives it was .86 and more."""
_SPOTS = (1, 9, 13, 15)
"""Sixteenths of a region where it is sampled, as `evidence.places` samples a tensor."""
_GOLDEN = (5**0.5 - 1) / 2
_FEW, _MANY = 8, 512
"""Regions of a tensor that are told apart, with several samples each; and those that are sampled at all, once each."""

Placed = tuple[Run, str, int]
"""A run of a source, the tensor that takes it, and where in that it goes."""


class Values:
    """The samples of a model and of the one that gives the layout, and what is asked of them."""

    def __init__(
        self, looks: Looks | None, role: str, other: str, mine: Mapping[str, Ref], theirs: Mapping[str, Ref]
    ) -> None:
        """Without `looks` they say nothing."""
        self.looks, self.role, self.other, self.mine, self.theirs = looks, role, other, mine, theirs

    @property
    def is_residual(self) -> bool:
        """Whether the other model is one, of whose base no more is known than samples at places of their own."""
        return self.looks is not None and self.looks.inputs[self.other].kind == "residual"

    def judge(self, runs: Mapping[str, Runs], strict: bool = False) -> Judgement:
        """What the tensors that some others are made of say of that.

        strict  whether no tensor rests on its name
        """
        judged = Judgement({}, {}, set())
        if self.looks is None:
            return judged
        compared: dict[str, list[Likeness]] = {}
        for name, places in self._sources(runs).items():
            compared[name] = self._compared(self.looks, name, places, judged.unseen)
            exact = strict or len(places) > 1
            verdicts = {verdict(found, exact) for found in compared[name]}
            judged.verdicts[name] = False if False in verdicts else True if True in verdicts else None
            far = [found.distance for found in compared[name] if math.isfinite(found.distance)]
            if far:
                judged.distances[name] = max(far)
        judged.verdicts.update(dict.fromkeys(self._odd(compared), False))
        return judged

    def cosine(self, name: str, runs: Runs) -> float:
        """How much a tensor has in common with what it is made of, at its worst."""
        if self.looks is None:
            return math.nan
        each = (self._compared(self.looks, source, its, set()) for source, its in self._sources({name: runs}).items())
        return min((found.cosine for likenesses in each for found in likenesses), default=math.nan)

    def _odd(self, compared: Mapping[str, Sequence[Likeness]]) -> set[str]:
        """Tensors of kinds of which some sampled rows are others: one alone may have learnt something."""
        kinds: dict[str, dict[str, float]] = {}
        for name, likenesses in compared.items():
            weakest = [found.weakest for found in likenesses if math.isfinite(found.weakest)]
            if weakest and len(self.theirs[name].shape) > 1 and not self.is_by_token(name):
                kinds.setdefault(names.pattern(name), {})[name] = min(weakest)
        return {name for kind in kinds.values() if statistics.median(kind.values()) < PART for name in kind}

    def is_by_token(self, name: str) -> bool:
        """Whether a source tensor has a row for each token, of which nobody may have trained some."""
        return self.looks is not None and names.is_by_token(self.theirs[name], self.looks.inputs[self.other])

    @staticmethod
    def _sources(runs: Mapping[str, Runs]) -> dict[str, list[Placed]]:
        found: dict[str, list[Placed]] = {}
        for target, its in runs.items():
            start = 0
            for run in its:
                found.setdefault(run.name, []).append((run, target, start))
                start += run.numel
        return found

    def _compared(self, looks: Looks, name: str, places: Sequence[Placed], unseen: set[str]) -> list[Likeness]:
        """How alike the regions of a source are to what was matched with them; what of them was `unseen` is added."""
        ref = self.theirs[name]
        run, target, _ = places[0]
        if len(places) == 1 and run.times == 1 and run.size > self.mine[target].numel:  # rows of more tokens
            run = run._replace(size=self.mine[target].numel)
            places = [(run, target, 0)]
        if len(places) == 1 and run.numel == ref.numel == self.mine[target].numel and run.times == 1:
            found = looks.compare(self.other, ref, self.role, self.mine[target])
            return [found] if found is not None else []
        if self.is_residual:
            sample = looks.of(self.other, ref)
            if sample is None:
                return []
            pieces = [
                (low, size, target, start + place)
                for run, target, start in places
                for first, count in sample.runs
                for low, size, place in run.meets(first, count)
            ]
            seen = {(target, place) for _, _, target, place in pieces}
            for run, target, start in places:
                if run.numel >= RUN and not any(t == target and start <= p < start + run.numel for t, p in seen):
                    unseen.add(name)
            values: list[float] = []
            ours: list[float] = []
            for low, size, target, place in pieces:
                values += through(sample, [(low, size, 0)])[0]
                met = looks.at(self.role, self.mine[target], ((place, size),))
                if met is None:
                    return []
                ours += met.values
            return [likeness(values, ours)] if values else []
        if len(places) <= _FEW:
            groups = [[spot for place in _places(placed[0]) for spot in _spot(placed, place)] for placed in places]
        else:
            chosen = places[:: -(-len(places) // _MANY)]
            groups = [[spot for i, placed in enumerate(chosen) for spot in _spot(placed, _places(placed[0])[i % 4])]]
        likenesses = (self._likeness(looks, ref, group) for group in groups)
        return [found for found in likenesses if found is not None]

    def _likeness(self, looks: Looks, ref: Ref, spots: Sequence[tuple[int, int, str, int]]) -> Likeness | None:
        spots = sorted(spots, key=lambda spot: spot[2])  # as they are read below, one target after the other
        sample = looks.at(self.other, ref, tuple((first, size) for first, size, _, _ in spots))
        ours: list[float] = []
        for target in dict.fromkeys(target for _, _, target, _ in spots):
            where = tuple((place, size) for _, size, other, place in spots if other == target)
            met = looks.at(self.role, self.mine[target], where)
            if met is None:
                return None
            ours += met.values
        return likeness(sample.values, ours) if sample is not None and ours else None


def _places(run: Run) -> Sequence[int]:
    """Where a run is sampled; of one that has many pieces many of them, at no regular distance."""
    if run.times <= len(_SPOTS):
        return [run.numel * share // 16 for share in _SPOTS]
    if run.times <= RUN:
        return [repeat * run.size for repeat in range(run.times)]
    return [int(i * _GOLDEN % 1 * run.times) * run.size for i in range(RUN)]


def _spot(placed: Placed, offset: int) -> Iterator[tuple[int, int, str, int]]:
    """Some elements of a run: where they begin in the source, how many, which tensor takes them, and where there."""
    run, target, start = placed
    offset = min(offset, max(run.numel - RUN, 0))
    left = min(RUN, run.numel)
    while left:
        repeat, inner = divmod(offset, run.size)
        size = min(left, run.size - inner)
        yield run.first + repeat * run.stride + inner, size, target, start + offset
        offset += size
        left -= size


def verdict(found: Likeness, exact: bool = False) -> bool | None:
    """Whether a tensor is what it was matched with; None where that rests on its name, unless it is to be `exact`."""
    return None if found.agrees is False and found.correlation >= UNLIKE and not exact else found.agrees
