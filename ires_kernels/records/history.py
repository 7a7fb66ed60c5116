"""What updates in place have made of a model together: alphas of one residual add up, whoever asked for which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ires_kernels.checkpoints import roles
from ires_kernels.checkpoints.manifest import Input, Stamp, Update

_MOST = 5  # updates that are listed


class Part(NamedTuple):
    """What an update has added: alpha times a residual, or times the difference of two models."""

    what: str
    sources: tuple[Input, ...]
    alpha: float
    own_factors: bool
    """Whether some tensors have another alpha."""


def on_top(updates: Sequence[Update]) -> tuple[str, ...]:
    """What to say of the last of several updates of a model: which it stands on, and what was added more than once."""
    before = updates[:-1]
    if not before:
        return ()
    listed = [f"{each.id} ({_described(each)})" for each in before[-_MOST:]]
    listed += [f"and {len(before) - _MOST} before these"] if before[_MOST:] else []
    count = f"{len(before)} earlier update{'s' if before[1:] else ''}"
    return (f"on top of {count}: {', '.join(listed)}", *_sums(updates))


def parts(update: Update) -> list[Part]:
    """What an update has added, in its order."""
    inputs = update.inputs
    ordered = sorted(inputs, key=lambda role: (len(role), role))
    added = [tuple(inputs[role] for role in each if role in inputs) for each in roles.added(ordered)]
    alphas = update.rules.alpha if update.rules else ()
    own = bool(update.rules and update.rules.alphas)
    return [Part(_named(sources), sources, alpha, own) for sources, alpha in zip(added, alphas, strict=False)]


def _named(sources: Sequence[Input]) -> str:
    """What an update has added, in words."""
    kinds = ("instruct", "base") if len(sources) > 1 else ("residual",)
    return " - ".join(f"{kind} {source.path}" for kind, source in zip(kinds, sources, strict=True))


def _described(update: Update) -> str:
    others = ", others for some tensors"
    found = [f"{part.what}, alpha {part.alpha:g}{others * part.own_factors}" for part in parts(update)]
    return "; ".join(found) or "written by hand"


def _sums(updates: Iterable[Update]) -> list[str]:
    """What was added more than once, and how much of it there is in all."""
    groups: list[list[Part]] = []
    for part in (part for update in updates for part in parts(update)):
        group = next((group for group in groups if _same(group[0], part)), None)
        if group is None:
            groups.append([part])
        else:
            group.append(part)
    found = []
    for group in groups:
        if len(group) > 1:
            terms = " + ".join(f"{part.alpha:g}" for part in group)
            text = f"{group[-1].what} is in this model with alpha {sum(part.alpha for part in group):g} in all: {terms}"
            own = any(part.own_factors for part in group)
            found.append(f"{text}{', but for tensors that had factors of their own' * own}")
    return found


def _same(one: Part, other: Part) -> bool:
    """Whether two updates have added the same: as far as contents were recorded by these, or else by the files."""
    return len(one.sources) == len(other.sources) and all(
        _same_input(*pair) for pair in zip(one.sources, other.sources, strict=True)
    )


def _same_input(one: Input, other: Input) -> bool:
    if one.digest and other.digest:
        return one.digest == other.digest
    if one.read and one.read == other.read:
        return True
    return (
        bool(one.files)
        and one.files.keys() == other.files.keys()
        and all(_same_file(stamp, other.files[name]) for name, stamp in one.files.items())
    )


def _same_file(one: Stamp, other: Stamp) -> bool:
    """By what stays the same for as long as nobody writes it."""
    wanted = (other.dev, other.ino, other.size, other.mtime_ns)
    return one.ino is not None and (one.dev, one.ino, one.size, one.mtime_ns) == wanted
