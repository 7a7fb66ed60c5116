"""The models of a recipe: where they are, and which of them is what.

Either there is a target, and differences or residuals are added to it; or models make up the result, each with a
weight: a blend. Of these the first is called the target as well, for the output gets from it all that is not computed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ires_kernels.checkpoints import hub
from ires_kernels.checkpoints.addresses import is_address
from ires_kernels.planning.inputs import StrPath
from ires_kernels.planning.recipe_weights import Added
from ires_kernels.planning.yamls import Node

_STREAM = "hf+stream:"


class Places(NamedTuple):
    """Where the models of a recipe are."""

    folder: Path
    """From which paths begin."""
    stream: bool
    """Whether the weights of models on the Hub are read where they are."""

    def path(self, node: Node) -> StrPath:
        """The path of a model: from the recipe's folder on, or in the cache of the Hub."""
        text = node.word("the path of a model, or its name on the Hub")
        here = self.folder / os.path.expanduser(text)
        if os.path.lexists(here):
            return here
        if "+" in text.removeprefix(_STREAM) and not is_address(text):
            raise node.wrong("a model: adapters (after a +) are not added here")
        if not hub.is_remote(text):
            return here
        return hub.local(hub.streamed(text) if self.stream else text)

    def name(self, node: Node) -> str:
        """What tells a model from others, before anything is downloaded."""
        text = node.word("a model")
        here = self.folder / os.path.expanduser(text)
        return os.path.realpath(here) if os.path.lexists(here) else text


def added_to_target(root: Node, table: Mapping[str, Node], places: Places) -> tuple[StrPath, list[Added]]:
    """The target, and what is added to it."""
    if "models" in table:
        fields = root.fields(None, ["base_model"])
        base = fields["base_model"].word("a model")
        below = places.path(fields["base_model"])
        target = places.path(fields["target"]) if "target" in fields else below
        added = []
        for entry in fields["models"].several("a list of models"):
            own = entry.fields(("model", "parameters"), ["model"])
            if own["model"].word("a model") == base:
                continue  # its difference to itself
            added.append(Added((places.path(own["model"]), below), _weights(entry, table), None, entry))
        if not added:
            raise fields["models"].error("holds no other model than base_model.")
        return target, added
    fields = root.fields(None, ["target"])
    if "pairs" in fields:
        known: tuple[str, ...] = ("instruct", "base", "alpha")
        entries = [(each, each.fields(known, known[:2])) for each in fields["pairs"].several("a list of pairs")]
    else:
        known = ("residual", "alpha")
        listed = fields["residuals"].several("a list of residuals")
        entries = [(e, {"residual": e} if e.text is not None else e.fields(known, known[:1])) for e in listed]
    added = [
        Added(
            tuple(places.path(own[key]) for key in known if key != "alpha"),
            (own["alpha"],) if "alpha" in own else (),
            1.0,
            entry,
        )
        for entry, own in entries
    ]
    return places.path(fields["target"]), added


def check_blend(root: Node, table: Mapping[str, Node], places: Places, in_place: bool) -> None:
    """Refuse what has no meaning where models make up the result, and are not added to one of them."""
    if in_place:
        raise root.error("merge_method linear makes a new model of several: write a new folder, with -o OUT (out=…).")
    for key in ("target", "alphas"):
        if key in table:
            raise table[key].error(
                "goes with task_arithmetic, where something is added to a model. Here models and their weights are all."
            )
    seen: dict[str, Node] = {}
    for entry in table["models"].several("a list of models"):
        model = entry.fields(("model", "parameters"), ["model"])["model"]
        if seen.setdefault(places.name(model), model) is not model:
            raise model.error("is there twice. Give it once, with the sum of its weights.")
        _weights(entry, table)  # before anything is downloaded
    if len(seen) < 2:
        raise table["models"].error("holds one model, wanted two or more.")
    if "base_model" in table and places.name(table["base_model"]) not in seen:
        raise table["base_model"].error(
            "is none of the models, wanted the one whose config.json and tokenizer the output gets. For those of "
            "another, add it to the models with a weight of 0."
        )


def blended(table: Mapping[str, Node], places: Places) -> list[Added]:
    """The models of a mean and their weights, first the one that gives the output all that is not computed."""
    entries = list(table["models"].several("a list of models"))
    if "base_model" in table:
        first = places.name(table["base_model"])
        entries.sort(key=lambda entry: places.name(entry.fields(None)["model"]) != first)
    return [Added((places.path(e.fields(None)["model"]),), _weights(e, table), None, e) for e in entries]


def _weights(entry: Node, table: Mapping[str, Node]) -> tuple[Node, ...]:
    """What is said of the weight of a model: there, and then for all of them."""
    own = entry.fields(None)
    given = own["parameters"].fields(("weight",)) if "parameters" in own else {}
    everywhere = table["parameters"].table if "parameters" in table else None
    weights = (given.get("weight"), (everywhere or {}).get("weight"))
    return tuple(weight for weight in weights if weight is not None)
