"""Recipes: a merge in a file of YAML, as mergekit writes its task arithmetic, or in words of our own.

Of mergekit's this has ``merge_method: task_arithmetic``: base_model + lambda * (weight * (model - base_model) + …), of
which everything is computed in float32 and rounded once, whatever dtype is named. A weight is a number, a gradient over
the layers (numbers at equal distances, between which it is interpolated), or a list of {filter, value}, of which the
first decides whose filter is a part of the tensor's name. Weights become factors of single tensors of the target.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ires_kernels.checkpoints import hub, manifest, names, roles
from ires_kernels.checkpoints.checkpoint import open_checkpoint
from ires_kernels.dtypes import number_of
from ires_kernels.files.opening import read_bytes
from ires_kernels.files.plain import without_secrets
from ires_kernels.planning.inputs import StrPath
from ires_kernels.planning.numbers import numbers
from ires_kernels.planning.rules import DTYPES, VOCABULARIES, ArgumentError, Rules
from ires_kernels.planning.yamls import LONGEST, Node, parse

_MERGEKIT = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
_RULES = ("alphas", "skip", "rounding", "seed", "vocabulary", "renames", "trust_names", "allow_missing")
_KEYS = (*_MERGEKIT, "target", "pairs", "residuals", *_RULES)
_WEIGHT = "a number, a list of numbers as a gradient over the layers, or a list of tables {filter, value}"
_LAYER = re.compile(r"(?P<stack>.*?)(?:^|\.)(?P<layer>\d+)(?=\.)")
_ROOM = 8000  # characters of a pattern


class Merge(NamedTuple):
    """What a recipe asks for."""

    paths: dict[str, StrPath]
    """Of the models, by role; those on the Hub are in its cache."""
    rules: Rules
    made: manifest.Manifest | None = None
    """Of the output that is to be made again."""


class _Added(NamedTuple):
    """A residual or a pair of models, and its factor: what was found first decides, and all of `times` multiply it."""

    paths: tuple[StrPath, ...]
    factor: tuple[Node, ...]
    otherwise: float | None
    """Where none of `factor` says anything; None: that is an error."""
    at: Node


def read(path: StrPath, *, in_place: bool = False, trust_inputs: bool = False, follow_links: bool = False) -> Merge:
    """What the recipe in a file asks for, or the recipe of the output whose ires.json this is.

    in_place  the target is to be changed: one on the Hub is refused, before anything is downloaded

    Raises ArgumentError with file, line and key; CheckpointError for models that cannot be read; and OSError.
    """
    if Path(path).suffix == ".json":
        return _again(Path(path), trust_inputs)
    raw = read_bytes(path, LONGEST)
    root = parse(raw, os.fspath(path))
    table = root.fields(_KEYS)
    folder = Path(path).absolute().parent
    _check_method(root, table)
    changed = table.get("target", table.get("base_model")) if in_place else None
    if changed is not None and not os.path.lexists(folder / changed.word()):
        hub.check_local(changed.word())
    target, added = _models(root, table, folder)
    general = (
        table["parameters"].fields(("weight", "lambda", "normalize", "int8_mask")) if "parameters" in table else {}
    )
    if "normalize" in general and general["normalize"].flag():
        raise general["normalize"].error("true is not supported: factors are taken as they are. Divide them yourself.")
    if "int8_mask" in general:
        general["int8_mask"].flag()  # without consensus there is no mask
    lambdas = (general["lambda"],) if "lambda" in general else ()
    alpha, by_name = _factors(target, added, lambdas, follow_links)
    given = [] if len(added[0].paths) == 2 else roles.of_residuals(len(added))
    named = given or roles.of_pairs(len(added))
    paths = dict(zip(named, (path for each in added for path in each.paths), strict=True))
    options = _options(table) | {
        "dtype": _dtype(table),
        "vocabulary": _vocabulary(table),
        "recipe": without_secrets(raw.decode()),
    }
    alphas = [*_alphas(table.get("alphas")), *by_name]
    try:
        rules = Rules.of(len(added), alpha=alpha, alphas=alphas, **options)
    except ArgumentError as error:
        raise ArgumentError(f"{os.fspath(path)}: {error}") from None
    return Merge({"target": target, **paths}, rules)


def _again(path: Path, trust_inputs: bool) -> Merge:
    """What the manifest of an output says that it is made of."""
    found = manifest.read(path)
    if found is None:
        raise ArgumentError(f"{path}: no such file.")
    made_of = found.made_of()
    if found.operation != "apply" or found.in_place:
        what = "an update in place, whose target is no longer what it was" if found.in_place else found.operation
        raise ArgumentError(f"{path}: is of {what}, wanted the ires.json of a new folder that apply or merge wrote.")
    if not (trust_inputs or found.is_mine):
        raise ArgumentError(
            f"{path}: was not signed with your key, so it is not believed where its inputs are: a stranger's may name "
            "any file. Look at it, then give --trust-inputs (trust_inputs=True)."
        )
    gone = [entry.path for entry in made_of.values() if not (os.path.lexists(entry.path) or hub.is_remote(entry.path))]
    if gone and not os.path.isabs(gone[0]):
        raise ArgumentError(
            f"{path}: was published, and has no paths; missing here: {', '.join(gone)}. Give the command in the folder "
            "where its models lie, under these names."
        )
    paths = {role: hub.local(entry.path) for role, entry in made_of.items()}
    return Merge(paths, Rules.from_dict(found.table["rules"]), found)


def _check_method(root: Node, table: Mapping[str, Node]) -> None:
    method = table.get("merge_method")
    if method is not None and method.word() == "linear":
        raise method.error(
            "'linear' is not computed here, where what is added are differences. As merge_method: task_arithmetic with "
            "one of two models as base_model, and the other's share as its weight, it is the same but for the last "
            "bits of float32."
        )
    if method is not None and method.word() != "task_arithmetic":
        raise method.wrong("task_arithmetic")
    ways = [key for key in ("models", "pairs", "residuals") if key in table]
    if len(ways) != 1:
        raise root.error(f"has {' and '.join(ways) or 'nothing to add'}, wanted one of models, pairs and residuals.")
    if ways == ["models"] and method is None:
        raise root.error("merge_method is missing, wanted task_arithmetic.")
    for key in ("merge_method", "base_model", "parameters", "tokenizer_source"):
        if key in table and ways != ["models"]:
            raise table[key].error(f"goes with models, and not with {ways[0]}.")


def _models(root: Node, table: Mapping[str, Node], folder: Path) -> tuple[StrPath, list[_Added]]:
    """The target, and what is added to it."""
    if "models" in table:
        fields = root.fields(_KEYS, ["base_model"])
        base = fields["base_model"].word("a model")
        below = _path(fields["base_model"], folder)
        target = _path(fields["target"], folder) if "target" in fields else below
        added = []
        for entry in fields["models"].several("a list of models"):
            own = entry.fields(("model", "parameters"), ["model"])
            if own["model"].word("a model") == base:
                continue  # its difference to itself
            given = own["parameters"].fields(("weight",)) if "parameters" in own else {}
            everywhere = fields["parameters"].table if "parameters" in fields else None
            weights = (given.get("weight"), (everywhere or {}).get("weight"))
            added.append(
                _Added((_path(own["model"], folder), below), tuple(w for w in weights if w is not None), None, entry)
            )
        if not added:
            raise fields["models"].error("holds no other model than base_model.")
        return target, added
    fields = root.fields(_KEYS, ["target"])
    if "pairs" in fields:
        known: tuple[str, ...] = ("instruct", "base", "alpha")
        entries = [(each, each.fields(known, known[:2])) for each in fields["pairs"].several("a list of pairs")]
    else:
        known = ("residual", "alpha")
        listed = fields["residuals"].several("a list of residuals")
        entries = [(e, {"residual": e} if e.text is not None else e.fields(known, known[:1])) for e in listed]
    added = [
        _Added(
            tuple(_path(own[key], folder) for key in known if key != "alpha"),
            (own["alpha"],) if "alpha" in own else (),
            1.0,
            entry,
        )
        for entry, own in entries
    ]
    return _path(fields["target"], folder), added


def _path(node: Node, folder: Path) -> StrPath:
    """The path of a model: from the recipe's folder on, or in the cache of the Hub."""
    text = node.word("the path of a model, or its name on the Hub")
    here = folder / os.path.expanduser(text)
    if "+" in text and not os.path.lexists(here):
        raise node.wrong("a model: adapters (after a +) are not added here")
    return hub.local(text) if hub.is_remote(text) and not os.path.lexists(here) else here


def _dtype(table: Mapping[str, Node]) -> str | None:
    names = [_short(node) for key in ("out_dtype", "dtype") if (node := table.get(key)) is not None]
    return names[0] if names else None


def _short(node: Node) -> str:
    """A dtype, however it is spelt."""
    number = number_of(node.word())
    if number is None or number.name not in DTYPES.values():
        raise node.wrong("one of float32, bfloat16, float16, float64")
    return number.name.lower()


def _vocabulary(table: Mapping[str, Node]) -> str | None:
    own, source = table.get("vocabulary"), table.get("tokenizer_source")
    if own is not None and source is not None:
        raise source.error("says what vocabulary says. Leave one of the two out.")
    if own is not None and own.word() not in VOCABULARIES:
        raise own.wrong(f"one of {', '.join(VOCABULARIES)}")
    if own is not None or source is None:
        return None if own is None else own.word()
    base = table["base_model"].word()
    target = table["target"].word() if "target" in table else base
    first = next(each.fields(None)["model"].word() for each in table["models"].several("a list of models"))
    whose = {target: "target", first: "instruct", **({"base": "target"} if target == base else {})}.get(source.word())
    if whose is None:
        raise source.wrong("base, or one of the target and the first of the models: others are not supported")
    return whose


def _options(table: Mapping[str, Node]) -> dict[str, Any]:
    """What apply has arguments of the same names for."""
    found: dict[str, Any] = {}
    for key in ("skip", "renames"):
        node = table.get(key)
        if node is not None and node.table is not None and key == "renames":
            found[key] = {a: b.word() for a, b in node.table.items()}
        elif node is not None:
            found[key] = [node.word()] if node.items is None else [each.word() for each in node.items]
    if "rounding" in table:
        found["rounding"] = table["rounding"].word()
    if "seed" in table:
        found["seed"] = table["seed"].whole()
    if "trust_names" in table:
        found["trust_names"] = table["trust_names"].flag()
    if "allow_missing" in table:
        node = table["allow_missing"]
        found["allow_missing"] = "any" if node.text == "any" else node.flag()
    return found


def _alphas(node: Node | None) -> list[tuple[str, list[float]]]:
    """Patterns and their factors, as a table."""
    entries = {} if node is None else node.fields(None)
    return [
        (pattern, [each.number() for each in (value.items if value.items is not None else (value,))])
        for pattern, value in entries.items()
    ]


Factors = tuple[float, ...]


def _factors(
    target: StrPath, added: Sequence[_Added], lambdas: tuple[Node, ...], follow_links: bool
) -> tuple[Factors, list[tuple[str, Factors]]]:
    """One factor for each that is added; and where they depend on the tensor, patterns of names and their factors."""
    for node in [*lambdas, *(node for each in added for node in each.factor)]:
        _check_setting(node)
    plain = all(node.is_number for node in [*lambdas, *(node for each in added for node in each.factor)])
    if plain:
        return tuple(_factor(each, lambdas, "", 0.0) for each in added), []
    everything = list(numbers(open_checkpoint(target, follow_links=follow_links)).model.tensors)
    heights = _heights(everything)
    by_name = {name: tuple(_factor(each, lambdas, name, heights[name]) for each in added) for name in everything}
    (usual, _), *_ = Counter(by_name.values()).most_common(1)
    return usual, list(_patterns(by_name, usual))


def _factor(added: _Added, lambdas: tuple[Node, ...], name: str, height: float) -> float:
    weight = _first(added.factor, name, height)
    if weight is None:
        weight = added.otherwise
    if weight is None:
        raise added.at.error(f"parameters.weight is missing{f' for {name}' if name else ''}, wanted {_WEIGHT}.")
    whole = _first(lambdas, name, height)
    return weight if whole is None else weight * whole


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


def _patterns(by_name: Mapping[str, Factors], usual: Factors) -> Iterable[tuple[str, Factors]]:
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
