"""Tensors that are made of others: a whole and its parts, what is known of them, and how that is said.

A whole is made of parts in one of three ways: [q; k; v], one behind the other; the same by heads or by groups of heads,
each of which has its share of every part; and stacked, with all that an expert has of each part, expert by expert.
Reshaped tensors are wholes of a single part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.planning.layout import Runs, quoted
from ires_kernels.planning.rewrites import Digits, Kind, kinds


class Whole(NamedTuple):
    """A kind of tensors that may be made of others, which are in the other model, or the other way round."""

    kind: Kind
    parts: tuple[Kind, ...]
    """In their order."""
    groups: int
    """Each of which has a share of every part."""
    axis: int | None
    """Which of the numbers in the names of parts is that of an expert; None where they have no more than the whole."""


class Undecided(NamedTuple):
    """Tensors of the two models that may hold the same rows, in an order that was not found: a pair for each layer."""

    mine: tuple[tuple[str, ...], ...]
    theirs: tuple[tuple[str, ...], ...]
    stacked: bool


class Crossed(NamedTuple):
    """A whole that has as many elements as some parts, and other columns: perhaps it is stored transposed."""

    whole: str
    """The first of its kind."""
    shape: tuple[int, int]
    """Of what it has of the first expert."""
    parts: tuple[str, ...]
    """The first expert's."""
    names: tuple[str, ...]
    """Of all that it is about."""


class Fused(NamedTuple):
    """What was found."""

    runs: dict[str, Runs]
    """By name in the model that gives the layout, of names in the other."""
    wholes: list[tuple[Whole, int]]
    """And how many tensors each explains."""
    problems: dict[str, tuple[str, ...]]
    """What is missing, and the names of all tensors that it is about."""
    crossed: list[Crossed]
    copies: list[str]
    """What is stacked of parts that are too near to each other for values to confirm their order."""
    undecided: list[Undecided]
    """What fits by its shapes, and of which values allow no arrangement."""


class Side(NamedTuple):
    """The tensors of a model that have no partner yet."""

    kinds: dict[Kind, dict[Digits, str]]
    """By words that both models share as far as is known, and by number: names."""


def side(refs: Mapping[str, Ref], words: Mapping[str, str] | None = None) -> Side:
    """`words`: name in words of the other model → name, of all tensors that have such."""
    if words is None:
        return Side(kinds(refs))
    found = kinds({word: refs[name] for word, name in words.items() if name in refs})
    return Side({kind: {digits: words[word] for digits, word in names.items()} for kind, names in found.items()})


def heads(config: Mapping[str, object] | None) -> tuple[int, ...]:
    """In how many groups attention may be fused, as config.json has it: those of keys, and of queries."""
    table = dict(config or {})
    for key in ("text_config", "llm_config", "language_config"):
        inner = table.get(key)
        if isinstance(inner, dict):
            table = {**table, **inner}
    names = ("num_key_value_heads", "num_kv_heads", "num_attention_heads", "n_head", "num_heads")
    return tuple(dict.fromkeys(n for name in names if type(n := table.get(name)) is int and 1 < n < 1 << 16))


def text(whole: Whole, gathered: bool) -> tuple[str, str]:
    """A whole in words, before and behind where that is so."""
    name = quoted([".".join(whole.kind.pattern)])
    names = [".".join(part.pattern) for part in whole.parts]
    if whole.axis is not None:
        how = ", stacked by expert"
    else:
        how = f", in {whole.groups} groups" if whole.groups > 1 else ", one behind the other"
    if len(names) == 1 and whole.axis is None:
        one, other = (name, quoted(names)) if gathered else (quoted(names), name)
        return f"{one} is {other}", ", reshaped"
    if gathered:
        return f"{name} is {quoted(names)}", how
    return f"{quoted(names)} {'are' if len(names) > 1 else 'is'} {name}", how
