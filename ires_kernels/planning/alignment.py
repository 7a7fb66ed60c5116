"""Which tensors of one model are those of another: by names, by structure, and as far as values confirm it.

In this order, and what is found is not looked for again: buffers that loaders compute again are left aside; what the
user says of names; tensors of one name; names that are rewritten by rules; weights that one model has fused and another
split; rows that are elsewhere. The values of every tensor are compared with those of what it was matched with, also
where names agree, since equal names and equal shapes prove nothing. Models of which next to nothing agrees are
strangers: of these names decide, and that they are strangers is said elsewhere, once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.planning.embeddings import partners
from ires_kernels.planning.evidence import FAR, FEWEST, Looks
from ires_kernels.planning.fusions import Crossed, Fusing, Undecided, heads, side
from ires_kernels.planning.fusions import text as fused_text
from ires_kernels.planning.layout import Layout, Rule, Run, Runs, quoted
from ires_kernels.planning.moved import Moved, bias_of
from ires_kernels.planning.rewrites import Doubt, Judge, Judgement, Renaming, kinds, split
from ires_kernels.planning.search import Tensor, crossed
from ires_kernels.planning.values import Values

STRANGERS = 0.1
"""Share of the matrices that agree below which models are strangers, of which no tensor is told apart from others."""
_MOST_TRIED = 4096
"""Pairs of tensors of one shape that are compared by their values: 200 ms."""
_MOST_PAIRS = 256
"""Of kinds of tensors that are compared by all of their rows."""
_TRANSPOSED = "Rows alone can be put into another order: take models that one exporter has saved."
_COMPLETE = "Download or save that model again, with all its parts."
_LEFT_IN_PART = (
    "Leave out all of it, with --skip and its name in the model that has it in one piece, or nothing of it. Or, where "
    "a model lacks parts, download or save that model again."
)
_RENAME = "Each of these is to give every tensor another one: correct --rename."


@dataclass
class Aligned:
    """How a model fits the one that gives the layout."""

    layout: Layout = field(default_factory=Layout)
    agreed: int = 0
    """Tensors of which values say that they are what they were matched with."""
    failed: dict[str, float] = field(default_factory=dict)
    """By name in the model that gives the layout: those of which values deny it, and their cosine."""
    silent: set[str] = field(default_factory=set)
    """Those of which values say nothing."""
    causes: dict[str, str] = field(default_factory=dict)
    """Of some of these what is the matter with them."""
    problems: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    """What is not there or cannot be decided, the way out, and the names of what it is about."""
    renamed: set[tuple[str, str]] = field(default_factory=set)
    """Of what the user says of names, what gave a tensor a partner."""
    passed: set[str] = field(default_factory=set)
    """Names of what problems would be about, if anybody asked for what is made of them."""
    notes: list[str] = field(default_factory=list)
    strangers: bool = False


def align(
    looks: Looks | None,
    role: str,
    other: str,
    models: Mapping[str, Checkpoint],
    *,
    copies: Mapping[str, str],
    left: Callable[[str], bool],
    renames: Sequence[tuple[str, str]] = (),
) -> Aligned:
    """Match the tensors of `role`, which gives the layout, with those of `other`.

    looks    None: names are trusted, and no values are compared
    copies   second copies of an embedding, and its name
    left     whether nobody asks for a tensor; one of `role` is matched all the same, for its partner is not left over
    renames  what the user says of names
    """
    aligning = _Aligning(looks, role, other, models, copies, left, renames)
    found = aligning.run()
    if found.strangers and looks is not None:  # by names alone, then
        found = _Aligning(None, role, other, models, copies, left, renames).run()
        found.strangers = True
    return found


class _Aligning:
    def __init__(
        self,
        looks: Looks | None,
        role: str,
        other: str,
        models: Mapping[str, Checkpoint],
        copies: Mapping[str, str],
        left: Callable[[str], bool],
        renames: Sequence[tuple[str, str]],
    ) -> None:
        self.role, self.other, self.models = role, other, models
        self.copies, self.left, self.renames = copies, left, renames
        self.mine: Mapping[str, Ref] = models[role].tensors
        self.theirs: Mapping[str, Ref] = models[other].tensors
        self.values = Values(looks, role, other, self.mine, self.theirs)
        self.runs: dict[str, Runs] = {}
        self.rules: list[Rule] = []
        self.found = Aligned()
        self.judged = Judgement({}, {}, set())
        self.undecided: list[Undecided] = []
        self.doubts: list[Doubt] = []

    def run(self) -> Aligned:
        self._rename()
        pairs: dict[str, Runs] = {}
        for name, ref in self.mine.items():
            if name in self.theirs and name not in self.runs and not self.left(name):
                other = self.theirs[name]
                if other.shape == ref.shape:
                    pairs[name] = whole(name, other)
                elif is_reshaped(ref.shape, other.shape):
                    self.runs[name] = whole(name, other)
        self._judge(pairs)
        odd = self._odd(pairs)
        taken = {run.name for runs in self.runs.values() for run in runs}
        ours = {n: ref for n, ref in self.mine.items() if n in odd or self._is_open(n, ref, self.theirs)}
        yours = {
            n: ref
            for n, ref in self.theirs.items()
            if n in odd or (n not in taken and self._is_open(n, ref, self.mine))
        }
        if ours and yours:
            self._match(ours, yours)
        self._judge(self.runs)
        self._follow_layers(pairs)
        if not self._are_strangers():
            Moved(self.values, self.runs, self.judged, self.rules).search(pairs, self.undecided, self.found.causes)
        self._pair_embeddings()
        self._doubt(ours, yours)
        self._cover(pairs)
        self._conclude(pairs)
        self._pass_over()
        self.found.layout = Layout(self.runs, tuple(self.rules))
        return self.found

    def _is_open(self, name: str, ref: Ref, others: Mapping[str, Ref]) -> bool:
        """Whether a tensor has no partner of its name, and could have one of another."""
        return not (
            name in others
            or name in self.runs
            or name in self.copies
            or not ref.numel
            or (others is self.mine and self.left(name))
            or (isinstance(ref, TensorRef) and names.is_recomputed(ref))
        )

    def _follow_layers(self, pairs: Mapping[str, Runs]) -> None:
        """Let tensors without a say, as norms are, follow a layer that is another layer of the other model."""
        moved: dict[str, set[str]] = {}
        for name in pairs:
            if self.judged.verdicts.get(name) is not None or name in self.runs:
                layer = _layer(name)
                moved.setdefault(layer, set()).update(_layer(run.name) for run in self.runs.get(name) or pairs[name])
        for name in pairs:
            layer = _layer(name)
            there = moved.get(layer, set()) if layer and name not in self.runs else set()
            if len(there) == 1 and layer not in there:
                partner = next(iter(there)) + name[len(layer) :]
                if partner in self.theirs and self.theirs[partner].shape == self.mine[name].shape:
                    self.runs[name] = whole(partner, self.theirs[partner])

    def _pair_embeddings(self) -> None:
        """Match what has a row for each token and is left: other names, and other numbers of rows or another order.

        What the rows have to do with each other is for their tokens to say.
        """
        taken = {run.name for runs in self.runs.values() for run in runs}
        ours = {name: ref for name, ref in self.mine.items() if self._is_open(name, ref, self.theirs)}
        yours = {n: ref for n, ref in self.theirs.items() if n not in taken and self._is_open(n, ref, self.mine)}
        for name, partner in partners(ours, yours, self.models[self.role], self.models[self.other]).items():
            self.runs[name] = whole(partner, self.theirs[partner])
            self.rules.append(Rule(f"{quoted([name])} is {quoted([partner])}", ", whatever rows they have", 1))

    def _pass_over(self) -> None:
        """Leave out what is wrong with tensors that nobody asks for."""
        for problem in [*self.found.problems]:
            asked = [name for name in problem[2] if name in self.mine]
            if asked and all(map(self.left, asked)):
                self.found.problems.remove(problem)
                self.found.passed.update(problem[2])
        for name in [*filter(self.left, self.found.failed)]:
            del self.found.failed[name]

    def _rename(self) -> None:
        """Match what the user says belongs to each other."""
        for old, new in self.renames:
            count = 0
            for name, ref in self.mine.items():
                if name in self.runs:
                    continue
                partner = next((to for to in _renamed(name, old, new) if to in self.theirs), None)
                if partner is not None and self.theirs[partner].numel == ref.numel:
                    self.runs[name] = whole(partner, self.theirs[partner])
                    count += 1
            if count:
                self.rules.append(Rule(f"{quoted([old])} is {quoted([new])}", ", as --rename says", count))
                self.found.renamed.add((old, new))

    def _judge(self, runs: Mapping[str, Runs]) -> None:
        found = self.values.judge(runs)
        self.judged.verdicts.update(found.verdicts)
        self.judged.distances.update(found.distances)

    def _odd(self, pairs: Mapping[str, Runs]) -> set[str]:
        """Tensors of one name whose values are not the same, in all or most of their kind: perhaps they are others'."""
        if False not in self.judged.verdicts.values():
            return set()
        found: set[str] = set()
        for each in kinds({name: self.mine[name] for name in pairs}).values():
            denied = [name for name in each.values() if self.judged.verdicts.get(name) is False]
            if 2 * len(denied) > len(each):
                found.update(denied)
        return found

    def _match(self, ours: dict[str, Ref], yours: dict[str, Ref]) -> None:
        """Find partners of other names, and what is made of several tensors."""
        tokens = [{r.shape[0] for r in t.values() if r.shape and names.is_vocabulary(r.name)} for t in (ours, yours)]
        renamed = Renaming(ours, yours, self.mine, self.values.judge, (tokens[0], tokens[1])).run()
        self.rules += [Rule(rule.text(), "", count) for rule, count in renamed.rules]
        partners = renamed.names
        ours = {name: ref for name, ref in ours.items() if name not in partners}
        used = set(partners.values())
        alike = by_values(ours, {n: ref for n, ref in yours.items() if n not in used}, self._judge_strictly)
        partners |= alike
        for (one, other), count in _kinds_of(alike).items():
            self.rules.append(Rule(f"{quoted([one])} is {quoted([other])}", ", by their values", count))
        partners |= _following(partners, ours, yours, self.values.judge)
        for name, partner in partners.items():
            self.runs[name] = whole(partner, self.theirs[partner])
        ours = {name: ref for name, ref in ours.items() if name not in partners}
        used = set(partners.values())
        words = {word: name for word, name in renamed.words.items() if name not in used}
        lacking = _LEFT_IN_PART if any(map(self.left, self.theirs)) else _COMPLETE
        groups = heads(self.models[self.role].config) or heads(self.models[self.other].config)
        for gathered in (True, False):
            sides = side(ours), side(yours, words)
            fusing = Fusing(
                *(sides if gathered else sides[::-1]),
                self._judge_strictly,
                gathered=gathered,
                groups=groups,
                trusted=self.values.looks is None,
                where=f" in {self.other if gathered else self.role}",
            )
            fused = fusing.run()
            self.runs.update(fused.runs)
            for each, count in fused.wholes:
                self.rules.append(Rule(*fused_text(each, gathered), count))
            for crossed_with in fused.crossed:
                self._cross(crossed_with, gathered)
            self.found.notes += [
                f"experts of {quoted([kind])} are near copies of each other in {self.other}: taken by index, as values "
                "cannot confirm their order"
                for kind in fused.copies
            ]
            self.found.problems += [(text, lacking, about) for text, about in fused.problems.items()]
            gone = {run.name for its in fused.runs.values() for run in its}
            ours = {name: ref for name, ref in ours.items() if name not in fused.runs}
            words = {word: name for word, name in words.items() if name not in gone}
            self.undecided += fused.undecided
        self.undecided += _alike(ours, {word: self.theirs[name] for word, name in words.items()}, words)
        theirs_left = {name: self.theirs[name] for name in words.values()}
        following = _following(partners, ours, theirs_left, self.values.judge, self.runs)
        self.runs.update((name, whole(partner, self.theirs[partner])) for name, partner in following.items())
        self.doubts = renamed.doubts

    def _cross(self, crossed_with: Crossed, gathered: bool) -> None:
        """Say of a whole that it is stored transposed, where its values tell."""
        if self.values.looks is None or self.values.is_residual:
            return
        sides = (self.role, self.mine), (self.other, self.theirs)
        (role, wholes), (other, parts) = sides if gathered else sides[::-1]
        whole_there = Tensor(role, wholes[crossed_with.whole])
        causes = [
            crossed(self.values.looks, whole_there, crossed_with.shape, Tensor(other, parts[name]))
            for name in crossed_with.parts
        ]
        if causes[0]:
            theirs = quoted(names.pattern(name) for name in crossed_with.parts)
            text = f"{quoted([names.pattern(crossed_with.whole)])} of {role} {causes[0]}, against {theirs} of {other}"
            self.found.problems.append((text, _TRANSPOSED, crossed_with.names))

    def _judge_strictly(self, runs: Mapping[str, Runs]) -> Judgement:
        return self.values.judge(runs, strict=True)

    def _doubt(self, ours: Mapping[str, Ref], yours: Mapping[str, Ref]) -> None:
        """Say what may be one of several."""
        ours = {name: ref for name, ref in ours.items() if name not in self.runs}
        open_kinds = {split(name)[0] for name in ours}
        for doubt in self.doubts:
            if doubt.pattern in open_kinds:
                what = f"two ways to match {quoted(['.'.join(doubt.pattern)])} with a tensor of {self.other}"
                text = f"{what}: {' or '.join(map(_tick, doubt.choices))}, and their values are too alike to tell"
                advice = f"Say which it is: --rename {' or --rename '.join(doubt.options)}."
                mine = [name for name in ours if split(name)[0] == doubt.pattern]
                theirs = [name for name in yours if ".".join(split(name)[0]) in doubt.choices]
                self.found.problems.append((text, advice, (*mine, *theirs)))

    def _matrices(self) -> list[bool]:
        """What values say of matrices: norms are alike in all models."""
        said = self.judged.verdicts.items()
        return [each for name, each in said if each is not None and len(self.theirs[name].shape) > 1]

    def _are_strangers(self) -> bool:
        matrices = self._matrices()
        return sum(matrices) < STRANGERS * len(matrices)

    def _cover(self, pairs: Mapping[str, Runs]) -> None:
        """See that nothing is taken twice, and nothing by half."""
        used: Counter[str] = Counter()
        for runs in self.runs.values():
            for run in runs:
                used[run.name] += run.numel
        for name in pairs:
            if name in used and name not in self.runs:  # its partner of the same name was another's
                self.runs[name] = ()
        for name, count in used.items():
            size = self.theirs[name].numel
            if count > size:
                takers = [taker for taker, runs in self.runs.items() if any(run.name == name for run in runs)]
                self.found.problems.append(
                    (f"{quoted(takers[:4])} would all be made of {name} of {self.other}", _RENAME, ())
                )
            elif count < size:
                self.found.problems.append(
                    (f"{name} of {self.other} would be taken by half: {count} of {size} elements", _COMPLETE, ())
                )

    def _conclude(self, pairs: Mapping[str, Runs]) -> None:
        """Say what was confirmed, and what denied."""
        self.found.strangers = self._are_strangers()
        if self.found.strangers:
            return
        self.found.agreed = sum(self._matrices())
        for name, runs in {**pairs, **self.runs}.items():
            said = {self.judged.verdicts.get(run.name) for run in runs}
            if said <= {None}:
                self.found.silent.add(name)
            elif False in said and len(self.mine[name].shape) > 1:
                self.found.failed[name] = self.values.cosine(name, runs)


def whole(name: str, ref: Ref) -> Runs:
    """All elements of a tensor."""
    return (Run(name, 0, ref.numel),)


def is_reshaped(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether tensors of these shapes may hold the same bytes: rows that are flat or not, or a stack that is."""
    sizes = []
    for shape in (one, other):
        size = 1
        for length in shape:
            size *= length
        sizes.append(size)
    if sizes[0] != sizes[1] or not one or not other:
        return False
    squeezed = [tuple(length for length in shape if length > 1) for shape in (one, other)]
    return squeezed[0] == squeezed[1] or (len(one) != len(other) and (one[0] == other[0] or one[-1] == other[-1]))


def by_values(mine: Mapping[str, Ref], theirs: Mapping[str, Ref], judge: Judge) -> dict[str, str]:
    """Tensors of one shape that values alone tell to be each other, the one and no other; first of the same numbers."""
    found: dict[str, str] = {}
    for with_numbers in (True, False):
        groups: dict[tuple[object, ...], tuple[list[str], list[str]]] = {}
        for which, tensors in enumerate((mine, theirs)):
            for name, ref in tensors.items():
                if name not in (found, found.values())[which] and ref.numel >= FEWEST:
                    key = (ref.shape, name.rpartition(".")[2] == "bias", split(name)[1] if with_numbers else ())
                    groups.setdefault(key, ([], []))[which].append(name)
        for ours, yours in groups.values():
            if 0 < len(ours) * len(yours) <= _MOST_TRIED:
                found |= _mutual(ours, {name: theirs[name] for name in yours}, judge)
    return found


def _mutual(mine: Sequence[str], theirs: Mapping[str, Ref], judge: Judge) -> dict[str, str]:
    """The pairs that are nearer to each other than half as far as to any other, and agree."""
    near: dict[tuple[str, str], float] = {}
    for one in mine:
        for other, ref in theirs.items():
            judged = judge({one: whole(other, ref)})
            if judged.agrees and (len(ref.shape) > 1 or judged.distances.get(other, math.inf) < FAR):
                near[one, other] = judged.distances.get(other, math.inf)
    found = {}
    for (one, other), distance in near.items():
        rivals = [far for (a, b), far in near.items() if (a == one) != (b == other)]
        if all(2 * distance < far for far in rivals):
            found[one] = other
    return found


def _kinds_of(pairs: Mapping[str, str]) -> Counter[tuple[str, str]]:
    return Counter((names.pattern(one), names.pattern(other)) for one, other in pairs.items())


def _following(
    partners: Mapping[str, str],
    mine: Mapping[str, Ref],
    theirs: Mapping[str, Ref],
    judge: Judge,
    fused: Mapping[str, Runs] | None = None,
) -> dict[str, str]:
    """What is left of modules whose other tensors have partners, in the modules of those: a bias with its weight."""
    modules: dict[str, set[str]] = {}
    if mine.keys() <= partners.keys():
        return {}
    for name, partner in partners.items():
        one, other = name.split("."), partner.split(".")
        while one and other and one[-1] == other[-1]:
            one, other = one[:-1], other[:-1]
            modules.setdefault(".".join(one), set()).add(".".join(other))
        modules.setdefault(bias_of(name).rpartition(".")[0], set()).add(bias_of(partner).rpartition(".")[0])
    for name, runs in (fused or {}).items():
        for source in {run.name for run in runs}:
            modules.setdefault(_around(name), set()).add(_around(source))
    used = {*partners.values()}
    found: dict[str, str] = {}
    for name, ref in mine.items():
        if name in partners:
            continue
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            there = modules.get(".".join(parts[:end]))
            if there:
                wanted = [f"{module}." if module else "" for module in there]
                names = [n for w in wanted if (n := w + ".".join(parts[end:])) in theirs and n not in used]
                if len(names) == 1 and theirs[names[0]].shape == ref.shape:
                    judged = judge({name: whole(names[0], theirs[names[0]])})
                    if judged.agrees is not False:
                        found[name] = names[0]
                        used.add(names[0])
                break
    return found


def _layer(name: str) -> str:
    """The layer that a tensor is in: its name up to the first number; "" where there is none."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdecimal()), "")


def _around(name: str) -> str:
    """The module around a projection."""
    parts = name.split(".")
    return ".".join(parts[: -2 if parts[-1] in ("weight", "bias") else -1])


def _alike(mine: Mapping[str, Ref], theirs: Mapping[str, Ref], words: Mapping[str, str]) -> list[Undecided]:
    """Kinds of tensors that are left, of one shape and the same numbers: some may be others by their rows."""
    ours, yours = kinds(mine), kinds(theirs)
    if len(ours) * len(yours) > _MOST_PAIRS:
        return []
    found = []
    for one, tensors in ours.items():
        for other, its in yours.items():
            if one.shape == other.shape and len(one.shape) > 1 and tensors.keys() == its.keys():
                found.append(
                    Undecided(
                        tuple((name,) for name in tensors.values()),
                        tuple((words[its[digits]],) for digits in tensors),
                        stacked=False,
                    )
                )
    return found


def _renamed(name: str, old: str, new: str) -> list[str]:
    """What a name may be where its components `old`, with ``*`` for numbers, are `new`."""
    parts, wanted, given = name.split("."), _components(old), _components(new)
    found = []
    for place in range(len(parts) - len(wanted) + 1):
        inner = parts[place : place + len(wanted)]
        if all(
            one in (other, "*") and (one != "*" or other.isdecimal()) for one, other in zip(wanted, inner, strict=True)
        ):
            numbers = iter([part for part, one in zip(inner, wanted, strict=True) if one == "*"])
            made = [next(numbers, part) if part == "*" else part for part in given]
            found.append(".".join([*parts[:place], *made, *parts[place + len(wanted) :]]))
        if not wanted:
            break
    return found


def _components(text: str) -> list[str]:
    return [part for part in text.split(".") if part]


def _tick(name: str) -> str:
    return quoted([name])
