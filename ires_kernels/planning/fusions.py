"""Weights that one model has fused and another split: which parts make a whole, in which order and in what groups.

What is looked at are shapes and names: rows have to add up, columns to be equal, experts to be all from 0 on. Which of
what is possible holds is for values to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations

from ires_kernels.planning.layout import Runs, compressed, quoted
from ires_kernels.planning.places import ORDER, Place, anywhere, fits, is_bias, layer_of, module_of, rank_of, stem_of
from ires_kernels.planning.rewrites import Components, Digits, Judge, Judgement, Kind, joined, sampled
from ires_kernels.planning.wholes import Crossed, Fused, Side, Undecided, Whole

_MOST_PARTS = 4
_MOST_KINDS = 12
"""Of one layer that are tried as the parts of a whole, where names do not tell which."""
_MOST_IN_ALL = 100
"""Kinds of parts among which those of a whole are looked for."""


class Fusing:
    """The search for wholes and parts among tensors that have no partner, in one of the two directions."""

    def __init__(
        self,
        wholes: Side,
        parts: Side,
        judge: Judge,
        *,
        gathered: bool,
        groups: Sequence[int],
        trusted: bool = False,
        where: str = "",
    ) -> None:
        """`gathered`: wholes are of the model that gives the layout. `trusted`: without values, names decide."""
        self.wholes, self.parts, self.judge = wholes.kinds, parts.kinds, judge
        self.gathered, self.groups, self.trusted, self.where = gathered, groups, trusted, where
        self._incomplete: dict[str, tuple[str, ...]] = {}
        self._there: dict[Components, list[Kind]] = {}
        self._in_module: dict[Components, list[Kind]] = {}
        for part in self.parts:
            self._in_module.setdefault(module_of(part.pattern), []).append(part)
        self.found = Fused({}, [], {}, [], [], [])
        self._experts_of: dict[tuple[Kind, int], dict[Digits, dict[str, str]]] = {}
        self._arranged: dict[tuple[Components, frozenset[str]], tuple[tuple[str, ...], int]] = {}

    def run(self) -> Fused:
        """All that can be told, weights before biases, which follow them; and wholes of which parts are missing."""
        order = sorted(self.wholes, key=lambda kind: (is_bias(kind.pattern), -math.prod(kind.shape)))
        for place in (module_of, layer_of, anywhere):
            self._there = {}
            for part in self.parts:
                self._there.setdefault(place(part.pattern), []).append(part)
            for kind in order:
                if kind in self.wholes:
                    self._look(kind, place)
        for kind in self.wholes:
            self._lacks(kind)
            self.found.crossed.extend(self._crossed(kind))
        return self.found

    def _crossed(self, kind: Kind) -> Iterator[Crossed]:
        """What it could be made of, but for its columns: stacked experts."""
        stars = kind.pattern.count("*")
        there = self._in_module.get(module_of(kind.pattern), [])
        there = [p for p in there if p in self.parts and len(p.shape) == 2 and p.pattern.count("*") == stars + 1]
        for axis in range(stars + 1) if len(kind.shape) in (2, 3) else ():
            for part in there:
                count = self._experts(kind, part, axis)
                alike = [
                    p for p in there if p != part and p.shape == part.shape and self._experts(kind, p, axis) == count
                ]
                for parts in ((part,), *((part, other) for other in alike)):
                    if fits(kind, part) or count * sum(math.prod(p.shape) for p in parts) != math.prod(kind.shape):
                        continue
                    digits = next(d for d in self.wholes[kind] if d in self._by_expert(part, axis))
                    first = (*digits[:axis], "0", *digits[axis:])
                    if all(first in self.parts[each] for each in parts):
                        names = [self.wholes[kind].values(), *(self.parts[each].values() for each in parts)]
                        yield Crossed(
                            self.wholes[kind][digits],
                            (math.prod(kind.shape) // count // kind.shape[-1], kind.shape[-1]),
                            tuple(self.parts[each][first] for each in parts),
                            tuple(name for each in names for name in each),
                        )

    def _lacks(self, kind: Kind) -> None:
        """Say of a whole that some of its parts are there, and others not."""
        stars, rows = kind.pattern.count("*"), math.prod(kind.shape)
        parts = [
            part
            for part in self._in_module.get(module_of(kind.pattern), [])
            if part in self.parts and part.pattern.count("*") == stars and part.pattern[-1] == kind.pattern[-1]
        ]
        fit = [
            part for part in parts if part.shape[1:] == kind.shape[1:] and rank_of(stem_of(part.pattern)) < len(ORDER)
        ]
        have = sum(math.prod(part.shape) for part in fit)
        if fit and have < rows and {*self.parts[fit[0]]} & {*self.wholes[kind]} and not self._is_undecided(kind):
            left = f"{(rows - have) // math.prod(kind.shape[1:])} of {kind.shape[0]} rows"
            text = (
                f"{quoted(['.'.join(kind.pattern)])} has more than {quoted('.'.join(part.pattern) for part in fit)}: "
                f"of {left} the other part is missing{self.where}"
            )
            about = [*self.wholes[kind].values(), *(name for part in fit for name in self.parts[part].values())]
            self.found.problems[text] = tuple(about)

    def _is_undecided(self, kind: Kind) -> bool:
        names = {*self.wholes[kind].values()}
        sides = (side for each in self.found.undecided for side in (*each.mine, *each.theirs))
        return any(name in names for side in sides for name in side)

    def _look(self, kind: Kind, place: Place) -> None:
        rejected = []
        self._incomplete = {}
        for axis, parts in self._possible(kind, place):
            chosen = self._arrange(kind, parts, axis, place is module_of)
            if chosen is not None:
                self._take(chosen)
                return
            rejected.append(Whole(kind, parts, 1, axis))
        if not rejected:
            self.found.problems.update(self._incomplete)
        self.found.undecided.extend(map(self._undecided, rejected))

    def _undecided(self, whole: Whole) -> Undecided:
        layers = [digits for digits in self.wholes[whole.kind] if self._has(whole, digits)]
        wholes = tuple((self.wholes[whole.kind][digits],) for digits in layers)
        parts = tuple(tuple(self._names(whole, digits)) for digits in layers)
        mine, theirs = (wholes, parts) if self.gathered else (parts, wholes)
        return Undecided(mine, theirs, whole.axis is not None)

    def _possible(self, kind: Kind, place: Place) -> Iterator[tuple[int | None, tuple[Kind, ...]]]:
        """Kinds of parts whose rows add up to the whole's, with the place of the experts' number."""
        stars = kind.pattern.count("*")
        candidates = self._there.get(place(kind.pattern), [])
        if len(candidates) > _MOST_IN_ALL:
            return
        there = [part for part in candidates if part in self.parts and fits(kind, part)]
        same = [part for part in there if part.pattern.count("*") == stars]
        for parts in self._subsets(kind, same, 1):
            if parts[0].shape != kind.shape and any(digits in self.parts[parts[0]] for digits in self.wholes[kind]):
                yield None, parts
        more = [part for part in there if part.pattern.count("*") == stars + 1]
        self._incomplete = {}
        for axis in reversed(range(stars + 1)):
            counts = {p: self._experts(kind, p, axis) for p in more}
            for count in sorted({c for c in counts.values() if c}):
                alike = [p for p in more if counts[p] == count]
                for parts in self._subsets(kind, alike, count):
                    if self._complete(kind, parts, axis, count):
                        yield axis, parts

    def _by_expert(self, part: Kind, axis: int) -> dict[Digits, dict[str, str]]:
        """The names of a kind of parts by the numbers that the whole has, and by expert."""
        if (part, axis) not in self._experts_of:
            table: dict[Digits, dict[str, str]] = {}
            for d, name in self.parts[part].items():
                table.setdefault((*d[:axis], *d[axis + 1 :]), {})[d[axis]] = name
            self._experts_of[part, axis] = table
        return self._experts_of[part, axis]

    def _experts(self, kind: Kind, part: Kind, axis: int) -> int:
        """How many experts the whole has of this part; 0 if none."""
        table = self._by_expert(part, axis)
        numbers = [max(map(int, table[digits])) for digits in self.wholes[kind] if digits in table]
        if not numbers or len(kind.shape) == len(part.shape) + 1:
            return kind.shape[0] if numbers else 0
        return max(numbers) + 1

    def _complete(self, kind: Kind, parts: Sequence[Kind], axis: int, count: int) -> bool:
        """Whether experts are all there, from 0 on; says so where some are missing."""
        wanted = {f"{expert}" for expert in range(count)}
        for digits in self.wholes[kind]:
            for part in parts:
                have = self._by_expert(part, axis).get(digits, {}).keys()
                if have and have != wanted:
                    lacking, more = sorted(wanted - have, key=int), sorted(have - wanted, key=int)
                    if 2 * len(lacking) < count:
                        listed = ", ".join((lacking or more)[:10]) + " …" * (len(lacking or more) > 10)
                        text = (
                            f"{quoted([joined(kind.pattern, digits)])} holds experts 0 to {count - 1}, and of "
                            f"{quoted(['.'.join(part.pattern)])} {listed} {'is missing' if lacking else 'is there too'}"
                            f"{self.where}"
                        )
                        about = (kind, self.wholes), *((each, self.parts) for each in parts)
                        names = tuple(name for each, table in about for name in table[each].values())
                        self._incomplete[text] = names
                    return False
        return True

    def _subsets(self, kind: Kind, parts: list[Kind], count: int) -> Iterator[tuple[Kind, ...]]:
        """Up to four kinds of parts, of each `count`."""
        parts = [part for part in parts if is_bias(part.pattern) == is_bias(kind.pattern)]
        if len(parts) > _MOST_KINDS:
            return
        wanted = math.prod(kind.shape)
        for size in range(1, min(_MOST_PARTS, len(parts)) + 1):
            for chosen in combinations(parts, size):
                if count * sum(math.prod(part.shape) for part in chosen) == wanted:
                    yield chosen

    def _arrange(self, kind: Kind, parts: tuple[Kind, ...], axis: int | None, near: bool) -> Whole | None:
        """The order and the groups that values confirm, or that names tell where values tell nothing."""
        stems = {part: stem_of(part.pattern) for part in parts}
        known = self._arranged.get((module_of(kind.pattern), frozenset(stems.values())))
        if known is not None and is_bias(kind.pattern):
            by_stem = {stem: part for part, stem in stems.items()}
            follows = Whole(kind, tuple(by_stem[stem] for stem in known[0]), known[1], axis)
            return follows if self._of(follows).agrees is not False else None
        usual = sorted(parts, key=lambda part: rank_of(stems[part]))
        orders = [tuple(usual), *(order for order in permutations(usual) if order != tuple(usual))]
        rows = math.gcd(*(part.shape[0] for part in parts if part.shape)) if axis is None and len(parts) > 1 else 1
        first = [g for g in (1, *self.groups, rows) if rows % g == 0]
        rest = [g for g in range(2, rows) if rows % g == 0 and g not in first]
        silent = True
        for numbers in (first, rest):
            survivors = []
            unseen = False
            for groups in dict.fromkeys(numbers):
                for order in orders:
                    whole = Whole(kind, order, groups, axis)
                    judged = self._of(whole)
                    silent = silent and judged.agrees is None
                    if judged.agrees and False not in judged.verdicts.values() and self._holds(whole):
                        survivors.append(whole)
                        unseen = unseen or bool(judged.unseen)
            if survivors:
                return None if len(survivors) > 1 and unseen else survivors[0]
            if silent:
                break
        sure = all(rank_of(stem) < len(ORDER) for stem in stems.values()) or len(parts) == 1
        attention = any(rank_of(stem) < ORDER.index("gate") for stem in stems.values()) and len(parts) > 1
        if silent and near and sure and (self.trusted or not attention):
            return Whole(kind, tuple(usual), 1, axis)
        return None

    def _of(self, whole: Whole, all_sampled: bool = False) -> Judgement:
        numbers = tuple(d for d in self.wholes[whole.kind] if self._has(whole, d))
        chosen = sampled(numbers) if numbers else []
        runs: dict[str, Runs] = {}
        for digits in chosen if all_sampled else chosen[:1]:
            runs |= self._runs(whole, digits)
        return self.judge(runs)

    def _holds(self, whole: Whole) -> bool:
        return False not in self._of(whole, all_sampled=True).verdicts.values()

    def _is_any_order(self, whole: Whole) -> bool:
        """Whether experts could as well be in another order, as far as values tell: the first two changed about."""
        digits = next(digits for digits in self.wholes[whole.kind] if self._has(whole, digits))
        names = self._names(whole, digits)
        size = len(whole.parts)
        if len(names) < 2 * size:
            return False
        turned = [*names[size : 2 * size], *names[:size], *names[2 * size :]]
        judged = self.judge(self._runs(whole, digits, turned))
        return bool(judged.agrees) and False not in judged.verdicts.values()

    def _names(self, whole: Whole, digits: Digits) -> list[str]:
        """The names of the parts of a whole, in their order; experts one behind the other."""
        if whole.axis is None:
            return [self.parts[part].get(digits, "") for part in whole.parts]
        tables = [self._by_expert(part, whole.axis).get(digits, {}) for part in whole.parts]
        return [table.get(f"{expert}", "") for expert in range(len(tables[0])) for table in tables]

    def _has(self, whole: Whole, digits: Digits) -> bool:
        names = self._names(whole, digits)
        return bool(names) and all(names)

    def _runs(self, whole: Whole, digits: Digits, names: list[str] | None = None) -> dict[str, Runs]:
        """Of what the tensors of the model that gives the layout are made; `names` in place of those of the parts."""
        name, names = self.wholes[whole.kind][digits], names or self._names(whole, digits)
        sizes = [math.prod(part.shape) // whole.groups for part in whole.parts]
        pieces = [
            (part, group * size, size)
            for group in range(whole.groups)
            for part, size in zip(names, sizes * (len(names) // len(sizes)), strict=True)
        ]
        if self.gathered:
            return {name: compressed(pieces)}
        places: dict[str, list[tuple[str, int, int]]] = {}
        end = 0
        for part, _, size in pieces:
            places.setdefault(part, []).append((name, end, size))
            end += size
        return {part: compressed(where) for part, where in places.items()}

    def _take(self, whole: Whole) -> None:
        table, count = self.wholes[whole.kind], 0
        near_copies = whole.axis is not None and self._is_any_order(whole)
        gone: set[str] = set()
        for digits in [digits for digits in table if self._has(whole, digits)]:
            found = self._runs(whole, digits)
            self.found.runs.update(found)
            count += len(found)
            gone.update(self._names(whole, digits))
            del table[digits]
        for part in whole.parts:
            self.parts[part] = {digits: name for digits, name in self.parts[part].items() if name not in gone}
        self._experts_of.clear()
        for place, kind in ((self.wholes, whole.kind), *((self.parts, part) for part in whole.parts)):
            if not place[kind]:
                del place[kind]
        self.found.wholes.append((whole, count))
        if whole.axis is not None and near_copies:
            self.found.copies.append(".".join(whole.kind.pattern))
        stems = tuple(stem_of(part.pattern) for part in whole.parts)
        self._arranged[module_of(whole.kind.pattern), frozenset(stems)] = stems, whole.groups
