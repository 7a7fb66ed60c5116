"""Single tensors that are each other under other names: by their values, by the modules around, by what a user says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.planning.evidence import FAR, FEWEST
from ires_kernels.planning.layout import Runs, whole
from ires_kernels.planning.moved import bias_of
from ires_kernels.planning.rewrites import Judge, kinds, split
from ires_kernels.planning.wholes import Undecided

_MOST_TRIED = 4096
"""Pairs of tensors of one shape that are compared by their values: 200 ms."""
_MOST_PAIRS = 256
"""Of kinds of tensors that are compared by all of their rows."""


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


def following_modules(
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


def _around(name: str) -> str:
    """The module around a projection."""
    parts = name.split(".")
    return ".".join(parts[: -2 if parts[-1] in ("weight", "bias") else -1])


def left_alike(mine: Mapping[str, Ref], theirs: Mapping[str, Ref], words: Mapping[str, str]) -> list[Undecided]:
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


def renamed_by_user(name: str, old: str, new: str) -> list[str]:
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
