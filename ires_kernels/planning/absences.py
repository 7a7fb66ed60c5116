"""Tensors that only some of the models have: what each is a case of, and the way out that is right for it.

Names that find no partner have few causes, and one advice for all would be wrong for most. What is told apart here, by
names, shapes and numbers of elements alone: a shard that was given alone; other prefixes; weights that one model has
fused and another split; parts that a model does not have at all, such as a vision tower; and tensors that are missing.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef, shard_number
from ires_kernels.checkpoints.header import brief
from ires_kernels.checkpoints.names import pattern

Refs = Mapping[str, TensorRef]

_NAMES = (
    "Neither structure nor values tell how such tensors belong together: save all models again with one class of one "
    "library, so that their names agree. With transformers 5 and the class that config.json names: "
    "CLASS.from_pretrained(PATH, dtype='auto').save_pretrained(NEW, save_original_format=False)."
)
_DEPTH, _PREFIXES = 4, 8  # components of a prefix; prefixes of one kind of name that are looked at
_WORDS = 20  # of a pattern


class Absence(NamedTuple):
    """A tensor that some of the models have and others have not."""

    name: str
    present: tuple[str, ...]
    """The roles of those that have it."""
    absent: tuple[str, ...]
    advice: str = ""
    """The way out, where it is known already."""

    @property
    def where(self) -> str:
        return f"in {' and '.join(self.present)} and not in {' and '.join(self.absent)}"

    def __str__(self) -> str:
        return f"{brief(self.name)} is {self.where}"


class Cause(NamedTuple):
    """Why tensors are missing, and the way out."""

    text: str
    advice: str
    names: tuple[str, ...]


class Match(NamedTuple):
    """Tensors of one model that seem to be tensors of another under other names."""

    text: str
    names: list[str]
    partners: list[str]


def grouped(absences: Iterable[Absence]) -> list[str]:
    """A line for each kind of name."""
    groups: dict[tuple[str, str], list[Absence]] = {}
    for absence in absences:
        groups.setdefault((pattern(absence.name), absence.where), []).append(absence)
    return [
        f"{group[0]}" if len(group) == 1 else f"{len(group)} tensors {kind} are {where}"
        for (kind, where), group in groups.items()
    ]


def explain(inputs: Mapping[str, Checkpoint], absences: Iterable[Absence]) -> list[Cause]:
    """The causes of all absences, in their order."""
    groups: dict[tuple[tuple[str, ...], tuple[str, ...], str], list[str]] = {}
    for name, present, absent, advice in absences:
        groups.setdefault((present, absent, advice), []).append(name)
    causes: list[Cause] = []
    explained: dict[str, set[str]] = {}  # by role, what was found to be another name of something
    for (present, absent, advice), found in groups.items():
        if advice:
            causes += [Cause(f"{Absence(name, present, absent)}", advice, (name,)) for name in found]
            continue
        others = inputs[absent[0]]
        whose = next(role for role in present if found[0] in inputs[role].tensors)
        mine = {n: ref for n in found if n not in explained.get(whose, ()) and (ref := inputs[whose].tensors.get(n))}
        if not mine:
            continue
        where = Absence("", present, absent).where
        number = shard_number(others.path)
        if number is not None and number[1] > 1:
            causes.append(_shard(others, absent[0], number, mine))
            continue
        theirs = {n: ref for n, ref in others.tensors.items() if n not in inputs[whose].tensors}
        here, there = " and ".join(present), " and ".join(absent)
        for find in (_prefixes, _fused):
            matches = list(find(mine, theirs, here, there))
            causes += [Cause(match.text, _NAMES, tuple(match.names)) for match in matches]
            known = {name for match in matches for name in match.names}
            partners = {name for match in matches for name in match.partners}
            for role in present:
                explained.setdefault(role, set()).update(known)
            for role in absent:
                explained.setdefault(role, set()).update(partners)
            mine = {n: ref for n, ref in mine.items() if n not in known}
            theirs = {n: ref for n, ref in theirs.items() if n not in partners}
        if mine:
            causes += _parts(mine, inputs[whose], others, where, "target" in absent)
    return causes


def _shard(checkpoint: Checkpoint, role: str, number: tuple[int, int], mine: Refs) -> Cause:
    return Cause(
        f"{role} ({checkpoint.path}) is shard {number[0]} of {number[1]}, and {_count(mine)} of the others are in the "
        "rest of its model",
        f"Give the folder of the model, {checkpoint.path.parent}, in place of one of its shards.",
        tuple(mine),
    )


def _prefixes(mine: Refs, theirs: Refs, here: str, there: str) -> Iterable[Match]:
    """What has another prefix in the other model, and else its name and shape."""
    ends: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, ref in theirs.items():
        for prefix, end in _splits(name):
            prefixes = ends.setdefault((end, ref.shape), [])
            if len(prefixes) < _PREFIXES:
                prefixes.append(prefix)
    candidates = {
        name: [
            (prefix, other)
            for prefix, end in _splits(name)
            for other in ends.get((end, ref.shape), [])
            if end.count(".") or not prefix or not other
        ]
        for name, ref in mine.items()
    }
    votes = Counter(rule for rules in candidates.values() for rule in rules)
    taken: dict[tuple[str, str], dict[str, str]] = {}
    used: set[str] = set()
    for name, rules in candidates.items():
        for prefix, other in sorted(rules, key=lambda rule: -votes[rule]):
            partner = other + name[len(prefix) :]
            if partner not in used:
                used.add(partner)
                taken.setdefault((prefix, other), {})[name] = partner
                break
    for (prefix, other), pairs in taken.items():
        one, two = next(iter(pairs.items()))
        text = (
            f"other prefix: {_quoted(prefix)} in {here} is {_quoted(other)} in {there}, for {_count(pairs)}, "
            f"as {brief(one)} is {brief(two)}"
        )
        yield Match(text, list(pairs), list(pairs.values()))


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """Prefixes of a name without numbers in them, and what comes after each."""
    yield "", name
    components = name.split(".")
    for i in range(1, min(_DEPTH, len(components) - 1) + 1):
        if components[i - 1].isdigit():
            break
        yield ".".join(components[:i]) + ".", ".".join(components[i:])


def _fused(mine: Refs, theirs: Refs, here: str, there: str) -> Iterable[Match]:
    """What has as many elements in one place in both models, though in other tensors."""
    left, others = mine, theirs
    for place in (_container, _layer):
        ours, yours = _places(left, place), _places(others, place)
        kinds: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
        for key, names in ours.items():
            partners = yours.get(key, [])
            if key and partners and sum(left[n].numel for n in names) == sum(others[n].numel for n in partners):
                kind = kinds.setdefault((*_kinds(names), "", *_kinds(partners)), ([], []))
                kind[0].extend(names)
                kind[1].extend(partners)
        for names, partners in kinds.values():
            what = "other names" if len(names) == len(partners) else "fused or split weights"
            text = f"{what}: {_listed(names)} in {here} have as many elements as {_listed(partners)} in {there}"
            yield Match(text, names, partners)
        used = {name for names, partners in kinds.values() for name in (*names, *partners)}
        left = {n: ref for n, ref in left.items() if n not in used}
        others = {n: ref for n, ref in others.items() if n not in used}


def _places(refs: Refs, place: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in refs:
        found.setdefault(place(name), []).append(name)
    return found


def _container(name: str) -> str:
    """What a fused weight would be in as well: all experts of a layer, or the module around a projection."""
    components = name.split(".")
    return ".".join(components[: components.index("experts") + 1] if "experts" in components else components[:-2])


def _layer(name: str) -> str:
    """The layer, or what stands before the first number."""
    found = re.match(r"(.*?\.)?\d+(?=\.)", name)
    return re.sub(r"^(model|transformer|language_model)\.", "", found[0]) if found else name.rpartition(".")[0]


def by_module(mine: Iterable[str], others: Iterable[str]) -> dict[str, list[str]]:
    """Names by the outermost module that has no other tensors than these; `others` are all other names."""
    inner = {n[: m.start()] for n in others for m in re.finditer(r"\.|$", n)}
    roots: dict[str, list[str]] = {}
    for name in mine:
        ends = (name[: m.start()] for m in re.finditer(r"\.|$", name))
        roots.setdefault(next((end for end in ends if end not in inner), name), []).append(name)
    return roots


def _parts(mine: Refs, model: Checkpoint, others: Checkpoint, where: str, left_out: bool) -> Iterable[Cause]:
    """What the other model does not have at all, module by module."""
    roots = by_module(mine, [*others.tensors, *(name for name in model.tensors if name not in mine)])
    kinds: dict[str, list[str]] = {}
    for root in roots:
        kinds.setdefault(pattern(root), []).append(root)
    skip = skip_pattern(roots, {*mine}, {*model.tensors, *others.tensors})
    advice = (
        f"What the target lacks is left out with --skip {skip}, or with --allow-missing whatever it is; where the "
        "target should have it, download or save it again."
        if left_out
        else f"What other models lack is copied from the target with --skip {skip}, or with --allow-missing whatever "
        "it is; where they should have it, download or save them again."
    )
    for kind, found in kinds.items():
        names = [name for root in found for name in roots[root]]
        if len(names) == 1:
            text = f"{brief(names[0])} is {where}{_prediction(found[0], model)}"
        elif names == found:
            text = f"{len(names)} tensors {kind} are {where}"
        else:
            nbytes = sum(mine[name].nbytes for name in names)
            what = f"{brief(kind if len(found) > 1 else found[0])} ({len(names)} tensors, {nbytes:,} bytes)"
            text = f"a part that not all models have: {what} is {where}{_prediction(found[0], model)}"
        yield Cause(text, advice, tuple(names))


def skip_pattern(roots: Iterable[str], wanted: set[str], everything: set[str]) -> str:
    """A regular expression, for a shell, that finds the `wanted` names, those below `roots`, and no others."""
    kinds: dict[str, list[str]] = {}
    for root in roots:
        kinds.setdefault(pattern(root), []).append(root)
    words: list[str] = []
    for kind, found in kinds.items():
        short = re.escape(kind).replace(r"\*", r"\d+")
        like = re.compile(rf"^{short}(\.|$)")
        is_short = len(found) > 1 and all(name in wanted for name in everything if like.search(name))
        words += [short] if is_short else [re.escape(root) for root in found]
        if len(words) > _WORDS:
            return "REGEX, for patterns of their names"
    return shlex.quote(rf"^({'|'.join(words)})(\.|$)" if len(words) > 1 else rf"^{words[0]}(\.|$)")


def _prediction(root: str, model: Checkpoint) -> str:
    """What to add of layers behind the last: they predict further tokens, and many models come without them."""
    config = model.config or {}
    text = config.get("text_config")
    layers = config.get("num_hidden_layers", text.get("num_hidden_layers") if isinstance(text, dict) else None)
    number = re.search(r"(^|\.)layers\.(\d+)$", root)
    if "mtp" in root.split(".") or (number and isinstance(layers, int) and int(number[2]) >= layers):
        behind = f", behind the {layers} of num_hidden_layers" if number else ""
        return f": multi-token prediction{behind}"
    return ""


def _kinds(names: Iterable[str]) -> list[str]:
    return sorted({pattern(name) for name in names})


def _listed(names: list[str]) -> str:
    kinds = _kinds(names)
    more = f" and {len(kinds) - 3} other kinds" if len(kinds) > 3 else ""
    return f"{_count(names)} ({', '.join(kinds[:3])}{more})"


def _count(names: Iterable[str]) -> str:
    count = len(list(names))
    return f"{count} tensor{'s' * (count != 1)}"


def _quoted(prefix: str) -> str:
    return brief(prefix) if prefix else "no prefix"
