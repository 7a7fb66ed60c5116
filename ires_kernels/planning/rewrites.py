"""Other names: rules by which tensors of one model are called otherwise in another, with the same shapes.

A rule says which components of a name are others: ``model.`` is ``model.language_model.``, or ``ln_1`` is
``input_layernorm``. The one that explains most tensors is taken first, and the rest is looked at again in its light, so
that a changed prefix and a changed name within add up. Numbers stand for themselves on both sides. Values confirm a
rule, and decide between several; where neither values nor numbers of tensors do, nobody guesses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.planning.layout import Run, Runs, quoted

Digits = tuple[str, ...]
Components = tuple[str, ...]

_MOST_PAIRS = 20_000
"""Of kinds of one shape that are compared each with each: 200 ms. Beyond that their names must end alike."""
_ALIKE = 2  # components
_SAMPLED = 3
"""Tensors of a kind that are looked at before it is decided; all of them are when it is."""
_PLAIN = frozenset(("weight", "bias", "*"))
"""Components in which names agree though they say nothing."""


class Kind(NamedTuple):
    """What tensors of one kind share: their name but for its numbers, and their shape."""

    pattern: Components
    shape: tuple[int, ...]


class Judgement(NamedTuple):
    """What values say of a hypothesis."""

    verdicts: dict[str, bool | None]
    """By name of a source tensor; None: they say nothing."""
    distances: dict[str, float]
    """How far what was taken from it is from its own place, in units of its norm."""
    unseen: set[str]
    """Those of which some part that is taken was not looked at."""

    @property
    def agrees(self) -> bool | None:
        """Whether most of them that say something agree."""
        said = [verdict for verdict in self.verdicts.values() if verdict is not None]
        return 2 * sum(said) > len(said) if said else None


Judge = Callable[[Mapping[str, Runs]], Judgement]
"""Looks at the values of a few tensors, by name what they would be made of."""


class Rewrite(NamedTuple):
    """Components `old`, behind `after`, that are `new` in the other model."""

    after: str | None
    """None where that does not matter; "" at the beginning of a name."""
    old: Components
    new: Components

    def text(self) -> str:
        """The rule in words."""
        if self.after is None:
            return f"{quoted(['.'.join(self.old)])} is {quoted(['.'.join(self.new)])}"
        front = (self.after,) if self.after else ()
        one, other = ("".join(f"{part}." for part in (*front, *rest)) for rest in (self.old, self.new))
        return f"{quoted([one]) if one else 'no prefix'} is {quoted([other]) if other else 'no prefix'}"

    def option(self) -> str:
        """What to give --rename."""
        front = (self.after,) if self.after else ()
        return f"{'.'.join((*front, *self.old))}={'.'.join((*front, *self.new))}"

    def back(self, name: Components, known: Collection[Components]) -> Components:
        """The name that a tensor of the other model has in the one that gives the layout; itself where it has none.

        known  beginnings of the names there
        """
        front = (self.after,) if self.after else ()
        wanted = (*front, *self.new)
        for place in range(1 if self.after == "" else len(name) - len(wanted) + 1):
            if name[place : place + len(wanted)] == wanted:
                start = (*name[:place], *front, *self.old)
                rest = name[place + len(wanted) :]
                if (*start, *rest[:1]) in known:
                    return (*start, *rest)
        return name


class Pair(NamedTuple):
    """A kind of tensors that may be a kind of the other model."""

    mine: Kind
    theirs: Kind
    numbers: tuple[Digits, ...]
    """Of the tensors that both have."""


class Doubt(NamedTuple):
    """A kind of names that may be one of several others."""

    pattern: Components
    choices: tuple[str, ...]
    options: tuple[str, ...]
    """What --rename may be given."""


class Renamed(NamedTuple):
    """What was found."""

    names: dict[str, str]
    """Name in the model that gives the layout → name in the other."""
    rules: list[tuple[Rewrite, int]]
    """And how many tensors each explains."""
    words: dict[str, str]
    """Names of other tensors of the other model, in the words of the one that gives the layout → their own."""
    doubts: list[Doubt]


def split(name: str) -> tuple[Components, Digits]:
    """The components of a name, with ``*`` for numbers, and these."""
    components = tuple(name.split("."))
    digits = tuple(part for part in components if part.isdecimal())
    return (tuple("*" if part.isdecimal() else part for part in components) if digits else components), digits


def joined(pattern: Components, digits: Digits) -> str:
    """The name of a tensor of a kind."""
    if not digits:
        return ".".join(pattern)
    numbers = iter(digits)
    return ".".join(next(numbers) if part == "*" else part for part in pattern)


def kinds(refs: Mapping[str, Ref]) -> dict[Kind, dict[Digits, str]]:
    """Names by kind and number."""
    found: dict[Kind, dict[Digits, str]] = {}
    for name, ref in refs.items():
        pattern, digits = split(name)
        found.setdefault(Kind(pattern, ref.shape), {})[digits] = name
    return found


def difference(mine: Components, theirs: Components) -> Rewrite:
    """The rule by which one pattern is another: what is left when they agree in front and behind."""
    shortest = min(len(mine), len(theirs))
    front = 0
    while front < shortest and mine[front] == theirs[front]:
        front += 1
    behind = 0
    while behind < shortest - front and mine[-1 - behind] == theirs[-1 - behind]:
        behind += 1
    old, new = mine[front : len(mine) - behind], theirs[front : len(theirs) - behind]
    after = None if old and new else mine[front - 1] if front else ""
    return Rewrite(after, old, new)


class Renaming:
    """The search for rules among tensors that have no partner of their name."""

    def __init__(
        self,
        mine: Mapping[str, Ref],
        theirs: Mapping[str, Ref],
        known: Iterable[str],
        judge: Judge,
        tokens: tuple[Collection[int], Collection[int]] = ((), ()),
    ) -> None:
        """`known`: names of all tensors of the model that gives the layout. `tokens`: rows of embeddings, of both."""
        self.judge, self.tokens = judge, tokens
        patterns = {split(name)[0] for name in known}
        self.known = {pattern[:end] for pattern in patterns for end in range(1, len(pattern) + 1)}
        self.mine, self.theirs = kinds(mine), kinds(theirs)
        self.words = {kind: kind.pattern for kind in self.theirs}
        self.found = Renamed({}, [], {}, [])
        self._judged: dict[tuple[Kind, Kind], Judgement] = {}
        self._of_mine: dict[Kind, list[Pair]] = {}
        self._of_theirs: dict[Kind, list[Pair]] = {}

    def run(self) -> Renamed:
        """All rules, the one that explains most first."""
        while True:
            rules = self._rules()
            order = sorted(rules, key=lambda rule: (-_votes(rules[rule]), len(rule.old) + len(rule.new), rule.old))
            if not any(self._take(rule, rules) for rule in order):
                self._doubt(rules)
                break
        for kind, names in self.theirs.items():
            for digits, name in names.items():
                pattern = self.words[kind]
                fits = pattern.count("*") == len(digits)
                self.found.words.setdefault(joined(pattern, digits) if fits else name, name)
        return self.found

    def _rules(self) -> dict[Rewrite, list[Pair]]:
        """What each rule would explain of what is left."""
        by_shape: dict[tuple[int, ...], list[Kind]] = {}
        for kind in self.theirs:
            by_shape.setdefault(kind.shape, []).append(kind)
        mine_of: dict[tuple[int, ...], list[Kind]] = {}
        for kind in self.mine:
            mine_of.setdefault(kind.shape, []).append(kind)
        rules: dict[Rewrite, list[Pair]] = {}
        self._of_mine, self._of_theirs = {}, {}
        for shape, ours in mine_of.items():
            yours = by_shape.get(shape, [])
            if shape and shape[0] in self.tokens[0]:  # and of another number of tokens
                yours = [
                    *yours,
                    *(
                        other
                        for there, others in by_shape.items()
                        if there != shape and there[1:] == shape[1:] and there and there[0] in self.tokens[1]
                        for other in others
                    ),
                ]
            for one, other in self._candidates(ours, yours):
                rule = difference(one.pattern, self.words[other])
                if {one.pattern[-1], other.pattern[-1]} == {"weight", "bias"}:
                    continue  # what is added is never what is multiplied with
                if rule.old.count("*") == rule.new.count("*"):
                    have = self.theirs[other]
                    numbers = tuple(digits for digits in self.mine[one] if digits in have)
                    if numbers:
                        pair = Pair(one, other, numbers)
                        rules.setdefault(rule, []).append(pair)
                        self._of_mine.setdefault(one, []).append(pair)
                        self._of_theirs.setdefault(other, []).append(pair)
        return rules

    def _candidates(self, ours: list[Kind], yours: list[Kind]) -> Iterator[tuple[Kind, Kind]]:
        if len(ours) * len(yours) <= _MOST_PAIRS:
            yield from ((one, other) for one in ours for other in yours)
            return
        ends: dict[Components, list[Kind]] = {}
        for other in yours:
            ends.setdefault(self.words[other][-_ALIKE:], []).append(other)
        for one in ours:
            alike = ends.get(one.pattern[-_ALIKE:], [])
            if len(alike) * len(ours) <= _MOST_PAIRS:
                yield from ((one, other) for other in alike)

    def _take(self, rule: Rewrite, rules: Mapping[Rewrite, list[Pair]]) -> bool:
        """Accept a rule where it holds and no other could as well; whether it explains anything."""
        pairs = rules[rule]
        verdicts = {pair: self._of(pair).agrees for pair in pairs}
        agreed = sum(verdict is True for verdict in verdicts.values())
        denied = sum(verdict is False for verdict in verdicts.values())
        if denied > agreed or (not agreed and not all(_says_something(rule, pair) for pair in pairs)):
            return False
        votes = _votes(pairs)
        accepted = []
        for pair, verdict in verdicts.items():
            rivals = self._rivals(pair)
            if verdict is False:
                fits = not any(self._of(other).agrees for other in rivals)
            else:
                fits = all(self._is_nearer(pair, other) for other in rivals if self._strength(other, rules) >= votes)
            accepted += [pair] if fits else []
        for pair in accepted:
            ours, yours = self.mine[pair.mine], self.theirs[pair.theirs]
            for digits in pair.numbers:
                self.found.names[ours.pop(digits)] = yours.pop(digits)
            for table, kind in ((self.mine, pair.mine), (self.theirs, pair.theirs)):
                if not table[kind]:
                    del table[kind]
        if accepted:
            self._accept(rule, _votes(accepted))
        return bool(accepted)

    def _rivals(self, pair: Pair) -> list[Pair]:
        """Other ways to match one of the two."""
        return [o for o in self._of_mine[pair.mine] if o.theirs != pair.theirs] + [
            o for o in self._of_theirs[pair.theirs] if o.mine != pair.mine
        ]

    def _rule(self, pair: Pair) -> Rewrite:
        return difference(pair.mine.pattern, self.words[pair.theirs])

    def _strength(self, pair: Pair, rules: Mapping[Rewrite, list[Pair]]) -> int:
        return _votes(rules[self._rule(pair)])

    def _accept(self, rule: Rewrite, tensors: int) -> None:
        self.found.rules.append((rule, tensors))
        for kind, words in self.words.items():
            self.words[kind] = rule.back(words, self.known)

    def _of(self, pair: Pair) -> Judgement:
        """What the first, one in the middle and the last tensor say of it."""
        key = pair.mine, pair.theirs
        if key not in self._judged:
            chosen = sampled(pair.numbers)
            size = math.prod(pair.theirs.shape)
            ours, yours = self.mine[pair.mine], self.theirs[pair.theirs]
            self._judged[key] = self.judge({ours[d]: (Run(yours[d], 0, size),) for d in chosen} if size else {})
        return self._judged[key]

    def _is_nearer(self, pair: Pair, other: Pair) -> bool:
        """Whether values decide for a pair, and not for another with which it shares a kind."""
        mine, rival = self._of(pair), self._of(other)
        if mine.agrees and rival.agrees is False:
            return True
        if rival.agrees is False:
            return mine.agrees is None and not any(v is False for v in mine.verdicts.values())
        own, its = mean(mine.distances.values()), mean(rival.distances.values())
        return own is not None and its is not None and bool(mine.agrees) and 2 * own < its

    def _doubt(self, rules: Mapping[Rewrite, list[Pair]]) -> None:
        """Name what could be one of several, as far as values allow each."""
        ways: dict[Kind, list[Pair]] = {}
        for its in rules.values():
            for pair in its:
                if self._of(pair).agrees is not False and _says_something(self._rule(pair), pair):
                    ways.setdefault(pair.mine, []).append(pair)
        for kind, pairs in ways.items():
            if len(pairs) > 1:
                options = tuple(difference(pair.mine.pattern, pair.theirs.pattern).option() for pair in pairs)
                choices = tuple(".".join(pair.theirs.pattern) for pair in pairs)
                self.found.doubts.append(Doubt(kind.pattern, choices, options))


def mean(values: Iterable[float]) -> float | None:
    """Their mean; None of none."""
    listed = [*values]
    return sum(listed) / len(listed) if listed else None


def sampled(numbers: tuple[Digits, ...]) -> list[Digits]:
    """The first, one in the middle and the last."""
    places = {0, len(numbers) // 2, len(numbers) - 1}
    return [numbers[place] for place in sorted(places)][:_SAMPLED]


def _votes(pairs: Iterable[Pair]) -> int:
    return sum(len(pair.numbers) for pair in pairs)


def _says_something(rule: Rewrite, pair: Pair) -> bool:
    """Whether names have more in common than that they are weights: without values it takes that."""
    return bool({*pair.mine.pattern} - {*rule.old} - _PLAIN)
