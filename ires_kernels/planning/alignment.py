"""Which tensors of one model are those of another: by names, by structure, and as far as values confirm it.

In this order, and what is found is not looked for again: buffers that loaders compute again are left aside; what the
user says of names; tensors of one name; names that are rewritten by rules; weights that one model has fused and another
split; rows that are elsewhere. The values of every tensor are compared with those of what it was matched with, also
where names agree, since equal names and equal shapes prove nothing. Models of which next to nothing agrees are
strangers: of these names decide, and that they are strangers is said elsewhere, once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.planning.embeddings import partners
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.fusions import Fusing
from ires_kernels.planning.layout import Layout, Rule, Runs, quoted, whole
from ires_kernels.planning.moved import Moved
from ires_kernels.planning.pairing import by_values, following_modules, is_reshaped, left_alike, renamed_by_user
from ires_kernels.planning.rewrites import Doubt, Judgement, Renaming, kinds, split
from ires_kernels.planning.search import Tensor, crossed
from ires_kernels.planning.values import Values
from ires_kernels.planning.wholes import Crossed, Undecided, heads, side
from ires_kernels.planning.wholes import text as fused_text

STRANGERS = 0.1
"""Share of the matrices that agree below which models are strangers, of which no tensor is told apart from others."""
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
                partner = next((to for to in renamed_by_user(name, old, new) if to in self.theirs), None)
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
        partners |= following_modules(partners, ours, yours, self.values.judge)
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
        self.undecided += left_alike(ours, {word: self.theirs[name] for word, name in words.items()}, words)
        theirs_left = {name: self.theirs[name] for name in words.values()}
        following = following_modules(partners, ours, theirs_left, self.values.judge, self.runs)
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


def _kinds_of(pairs: Mapping[str, str]) -> Counter[tuple[str, str]]:
    return Counter((names.pattern(one), names.pattern(other)) for one, other in pairs.items())


def _layer(name: str) -> str:
    """The layer that a tensor is in: its name up to the first number; "" where there is none."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdecimal()), "")


def _tick(name: str) -> str:
    return quoted([name])
