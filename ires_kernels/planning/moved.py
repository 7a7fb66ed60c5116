"""Tensors that are not what their names and structure say: where their rows are instead, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ires_kernels.planning.layout import Rule, Runs, compressed, quoted
from ires_kernels.planning.rewrites import Judgement, kinds, split
from ires_kernels.planning.search import Found, Tensor, search
from ires_kernels.planning.values import Values
from ires_kernels.planning.wholes import Undecided

_MOST_RUNS = 1 << 14
"""Of one tensor: whole rows of a large matrix are some thousand."""
_MOST_LAYERS = 8
"""In which rows are looked for anew, where they are not in the order of another layer."""


class Group(NamedTuple):
    """Tensors of the same kinds in several layers, and which may hold their rows."""

    mine: tuple[tuple[str, ...], ...]
    theirs: tuple[tuple[str, ...], ...]
    stacked: bool = False


class Moved:
    """The search for rows, and what it adds to what was matched."""

    def __init__(self, values: Values, runs: dict[str, Runs], judged: Judgement, rules: list[Rule]) -> None:
        self.values, self.runs, self.judged, self.rules = values, runs, judged, rules

    def search(self, pairs: Mapping[str, Runs], undecided: Iterable[Undecided], causes: dict[str, str]) -> None:
        """Look for the rows of what has failed, and of what is undecided; say of the others what is the matter."""
        if self.values.looks is None or self.values.looks.inputs[self.values.other].kind == "residual":
            return  # of whose base no more is known than samples
        for group in (*self._failed(pairs), *(Group(*each) for each in undecided)):
            of_tokens = any(map(self.values.is_by_token, group.theirs[0])) if group.theirs else False
            if group.mine and not of_tokens and len(self.values.mine[group.mine[0][0]].shape) > 1:
                self._look(group, causes)

    def _failed(self, pairs: Mapping[str, Runs]) -> Iterable[Group]:
        """What has one partner, whose values deny it."""
        single = {name: runs[0].name for name, runs in {**pairs, **self.runs}.items() if len(runs) == 1}
        denied = {
            name: partner
            for name, partner in single.items()
            if self.judged.verdicts.get(partner) is False
            and not self.values.is_by_token(partner)
            and self.values.theirs[partner].numel == self.values.mine[name].numel
        }
        for names in kinds({name: self.values.mine[name] for name in denied}).values():
            mine = tuple((name,) for name in names.values())
            yield Group(mine, tuple((denied[name],) for (name,) in mine))

    def _look(self, group: Group, causes: dict[str, str]) -> None:
        open_layers = [
            (mine, theirs)
            for mine, theirs in zip(group.mine, group.theirs, strict=True)
            if not any(self._is_settled(name) for name in mine)
        ]
        found = Found()
        looked = count = 0
        for mine, theirs in open_layers:
            if not found.rows or not self._take(found, mine, theirs):
                if looked >= _MOST_LAYERS or (looked and not found.rows):
                    break
                looked += 1
                found = self._find(mine, theirs, group.stacked)
                if not found.rows or not self._take(found, mine, theirs):
                    causes.update(dict.fromkeys(mine, found.cause))
                    continue
            count += len(mine)
        if found.cause:
            causes.update((name, found.cause) for mine, _ in open_layers for name in mine)
        if count:
            one, other = ([".".join(split(name)[0]) for name in side] for side in (group.mine[0], group.theirs[0]))
            how = ", its rows in another order" if one == other else ", row by row"
            self.rules.append(Rule(f"{quoted(one)} {'are' if len(one) > 1 else 'is'} {quoted(other)}", how, count))

    def _is_settled(self, name: str) -> bool:
        runs = self.runs.get(name)
        return runs is not None and all(self.judged.verdicts.get(run.name) is not False for run in runs)

    def _find(self, mine: tuple[str, ...], theirs: tuple[str, ...], stacked: bool) -> Found:
        assert self.values.looks is not None
        role, other = self.values.role, self.values.other
        ours = [Tensor(role, self.values.mine[name]) for name in mine]
        yours = [Tensor(other, self.values.theirs[name]) for name in theirs]
        found = search(self.values.looks, ours[:1], yours[:1]) if stacked else search(self.values.looks, ours, yours)
        return Found(cause=found.cause) if stacked else found

    def _take(self, found: Found, mine: tuple[str, ...], theirs: tuple[str, ...]) -> bool:
        """Make tensors of the rows that were found, if values confirm it; and their biases of the same."""
        made = self._made(found, mine, theirs)
        if made is None:
            return False
        judged = self.values.judge(made, strict=True)
        if not judged.agrees or False in judged.verdicts.values():
            return False
        self.runs.update(made)
        self.judged.verdicts.update(judged.verdicts)
        biases = [tuple(bias_of(name) for name in side) for side in (mine, theirs)]
        if all(name in self.values.mine for name in biases[0]) and all(n in self.values.theirs for n in biases[1]):
            self.runs.update(self._made(found, *biases) or {})
        return True

    def _made(self, found: Found, mine: tuple[str, ...], theirs: tuple[str, ...]) -> dict[str, Runs] | None:
        """What tensors of these rows are made of; of stacked experts each has the order of the first."""
        refs, others = [self.values.mine[name] for name in mine], [self.values.theirs[name] for name in theirs]
        alone = len(refs) == 1 == len(others) and len(refs[0].shape) == len(others[0].shape)
        stack = refs[0].shape[0] if alone and len(refs[0].shape) == 3 else 1
        width, rest = divmod(sum(ref.numel for ref in refs), stack * len(found.rows))
        if rest or any(ref.numel % width for ref in (*refs, *others)):
            return None
        runs: list[Runs] = []
        start = 0
        for ref in refs:
            rows = found.rows[start : start + ref.numel // width // stack]
            start += len(rows)
            runs.append(
                compressed(
                    (theirs[which], (each * len(rows) + row) * width, width)
                    for each in range(stack)
                    for which, row in rows
                )
            )
        if any(sum(run.times for run in its) > _MOST_RUNS for its in runs):
            return None
        return dict(zip(mine, runs, strict=True))


def bias_of(name: str) -> str:
    """The name of the bias of a weight."""
    return f"{name.removesuffix('weight')}bias" if name.endswith("weight") else f"{name}_bias"
