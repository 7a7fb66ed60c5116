"""Weights of recipes: what each tensor of the models is multiplied by.

A weight is a number, a gradient over the layers (numbers at equal distances, between which it is interpolated), or a
list of {filter, value}, of which the first decides whose filter is a part of the tensor's name. They become factors of
all tensors, and regular expressions for those that have others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.planning.inputs import StrPath
from ires_kernels.planning.numbers import numbers
from ires_kernels.planning.yamls import Node

_WEIGHT = "a number, a list of numbers as a gradient over the layers, or a list of tables {filter, value}"
_LAYER = re.compile(r"(?P<stack>.*?)(?:^|\.)(?P<layer>\d+)(?=\.)")
_ROOM = 8000  # characters of a pattern
_CANCELLED = 1e-6
"""Of the sizes of weights, what their sum must be at least to divide by it: below, it is little more than rounding."""

Factors = tuple[float, ...]


class Added(NamedTuple):
    """What has a factor, a residual, a pair of models or a model, and which: what says something first decides."""

    paths: tuple[StrPath, ...]
    factor: tuple[Node, ...]
    otherwise: float | None
    """Where none of `factor` says anything; None: that is an error."""
    at: Node


class Shared(NamedTuple):
    """What is done to the weights of all models."""

    at: Node
    """Where these stand."""
    lambdas: tuple[Node, ...] = ()
    """What all are multiplied by, where one says something."""
    is_mean: bool = False
    """Whether they are divided by their sum, tensor by tensor."""
    is_whole: bool = False
    """Whether what they are of makes up the result, and nothing is there that it is added to."""


def factors(
    layout: StrPath, added: Sequence[Added], shared: Shared, follow_links: bool
) -> tuple[Factors, list[tuple[str, Factors]]]:
    """One factor for each that is added; and where they depend on the tensor, patterns of names and their factors.

    layout  the model whose tensors are asked about, where they have a say
    """
    settings = [*shared.lambdas, *(node for each in added for node in each.factor)]
    for node in settings:
        _check_setting(node)
    if all(node.is_number for node in settings):
        return _factors(added, shared, "", 0.0), []
    everything = list(numbers(open_checkpoint(layout, follow_links=follow_links)).model.tensors)
    heights = _heights(everything)
    by_name = {name: _factors(added, shared, name, heights[name]) for name in everything}
    (usual, _), *_ = Counter(by_name.values()).most_common(1)
    return usual, list(patterns(by_name, usual))


def _factors(added: Sequence[Added], shared: Shared, name: str, height: float) -> Factors:
    """The factors of a tensor; of all of them, where the name says nothing."""
    weights = [_weight(each, name, height) for each in added]
    total = sum(weights)
    if shared.is_mean and not abs(total) > _CANCELLED * sum(map(abs, weights)):  # nor infinity, nor no number
        problem = f"add up to {total:g}, by which they would be divided. normalize: false leaves them as they are."
        raise shared.at.error(_of(name, weights, problem))
    if shared.is_whole and not any(weights):
        raise shared.at.error(_of(name, weights, "are all 0. Leave tensors as they are in the first model with skip."))
    if shared.is_mean:
        weights = [weight / total for weight in weights]
    whole = _first(shared.lambdas, name, height)
    return tuple(weights if whole is None else [weight * whole for weight in weights])


def _weight(added: Added, name: str, height: float) -> float:
    weight = _first(added.factor, name, height)
    if weight is None:
        weight = added.otherwise
    if weight is None:
        raise added.at.error(f"parameters.weight is missing{f' for {name}' if name else ''}, wanted {_WEIGHT}.")
    return weight


def _of(name: str, weights: Sequence[float], problem: str) -> str:
    """What is wrong with the weights of a tensor."""
    listed = ", ".join(f"{weight:g}" for weight in weights)
    return f"the weights{f' of {name}' if name else ''}, {listed}, {problem}"


def _first(settings: Iterable[Node], name: str, height: float) -> float | None:
    """What the first setting says that says something of a tensor."""
    return next((value for each in settings if (value := _value(each, name, height)) is not None), None)


def _check_setting(node: Node) -> None:
    if node.text is not None:
        node.number(_WEIGHT)
        return
    items = node.several(_WEIGHT)
    if items[0].table is None:
        for item in items:
            item.number("a number: all of a gradient are")
        return
    for item in items:
        value = item.fields(("filter", "value"), ["value"])["value"]
        if "filter" in item.fields(None):
            item.fields(None)["filter"].word("a part of names")
        for number in (value,) if value.text is not None else value.several("a number or a list of them"):
            number.number()


def _value(node: Node, name: str, height: float) -> float | None:
    """What a setting says of a tensor at such a height, from 0, the first layer, to 1, the last one."""
    if node.items is None:
        return node.number()
    if node.items[0].table is None:
        last = len(node.items) - 1
        at = height * last
        low = int(at)
        share = at - low
        return (1 - share) * node.items[low].number() + share * node.items[min(last, low + 1)].number()
    for item in node.items:
        fields = item.fields(None)
        wanted = "*" if "filter" not in fields else fields["filter"].word()
        if wanted == "*" or wanted in name:
            return _value(fields["value"], name, height)
    return None


def _heights(everything: Iterable[str]) -> dict[str, float]:
    """How high the layers of tensors are in their stack. What is in none is at 0, as is the layer of one alone at 1."""
    found = {name: _LAYER.match(name) for name in everything}
    last: dict[str, int] = {}
    for match in found.values():
        if match:
            last[match["stack"]] = max(last.get(match["stack"], 0), int(match["layer"]))
    heights = {}
    for name, match in found.items():
        highest = last[match["stack"]] if match else 0
        heights[name] = 0.0 if not match else int(match["layer"]) / highest if highest else 1.0
    return heights


def patterns(by_name: Mapping[str, Factors], usual: Factors) -> Iterable[tuple[str, Factors]]:
    """Regular expressions for the tensors that have not the usual factors, as short as kinds of names allow."""
    owners: dict[str, set[Factors]] = {}
    for name, factors in by_name.items():
        for kind in _kinds(name):
            owners.setdefault(kind, set()).add(factors)
    groups: dict[Factors, dict[str, None]] = {}
    for name, factors in by_name.items():
        if factors != usual:
            kind = next((kind for kind in _kinds(name) if len(owners[kind]) == 1), name)
            groups.setdefault(factors, {})[re.escape(kind).replace(r"\*", r"\d+")] = None
    for factors, kinds in groups.items():
        words = list(kinds)
        while words:
            count = 1
            while count < len(words) and sum(map(len, words[: count + 1])) + count < _ROOM:
                count += 1
            yield f"^({'|'.join(words[:count])})$" if count > 1 else f"^{words[0]}$", factors
            words = words[count:]


def _kinds(name: str) -> Iterable[str]:
    """A name with any numbers, with any but that of its layer, and as it is."""
    yield names.pattern(name)
    match = _LAYER.match(name)
    if match:
        yield name[: match.end()] + names.pattern(name[match.end() :])
    yield name
