"""Recipes that cut models into slices, as far as it is one slice with all layers of each model: a merge of models.

mergekit writes many of its recipes so. Slices of some layers make models of other shapes, which is not done here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.planning.inputs import StrPath
from ires_kernels.planning.yamls import Node

_ALL = (
    "Slices are taken here where there is one, with all layers of each model: these are merged, and none are stacked."
)
_NUMBERS = ("num_hidden_layers", "n_layer", "num_layers")


class Layers(NamedTuple):
    """How many layers a recipe takes for all of them."""

    at: Node
    number: int


def without_slices(root: Node) -> tuple[Node, Layers | None]:
    """The recipe with models in place of its slice, and the number of layers to be checked; None without slices."""
    table = dict(root.table or {})
    slices = table.pop("slices", None)
    if slices is None:
        return root, None
    if "models" in table:
        raise slices.error("is there beside models, wanted one of the two.")
    if len(slices.several("a list of one slice")) > 1:
        raise slices.error(f"has several. {_ALL}")
    (only,) = slices.several("a list of one slice")
    fields = only.fields(("sources", "parameters"), ["sources"])
    if "parameters" in fields and "parameters" in table:
        raise fields["parameters"].error("says what parameters says. Write all of it there.")
    table |= {key: node for key, node in fields.items() if key == "parameters"}
    entries, found = [], set()
    for source in fields["sources"].several("a list of models and their layers"):
        own = source.fields(("model", "layer_range", "parameters"), ["model", "layer_range"])
        layers = own["layer_range"]
        numbers = [each.whole() for each in layers.several("two numbers of layers, as [0, 32]")]
        found.add(numbers[-1])
        if len(numbers) != 2 or numbers[0] or len(found) > 1:
            raise layers.error(f"is {numbers}, wanted [0, {min(found)}]. {_ALL}")
        entries.append(replace(source, table={key: node for key, node in own.items() if key != "layer_range"}))
    table["models"] = replace(fields["sources"], items=tuple(entries))
    return replace(root, table=table), Layers(layers, numbers[-1])


def check_layers(layers: Layers | None, target: StrPath, follow_links: bool) -> None:
    """Refuse slices without some of the layers of the models."""
    if layers is None:
        return
    config = open_checkpoint(target, follow_links=follow_links).config or {}
    text = config.get("text_config")
    tables = [config, text if isinstance(text, dict) else {}]
    known = next((table[key] for table in tables for key in _NUMBERS if isinstance(table.get(key), int)), None)
    if known is None:
        raise layers.at.error(
            f"cannot be told from all layers: config.json of {target} does not say how many it has. "
            "Give the models as a list of models, without slices."
        )
    if known != layers.number:
        raise layers.at.error(f"has {layers.number} layers, and {target} has {known}. {_ALL}")
