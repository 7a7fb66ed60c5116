"""Recipes: a merge in a file of YAML, as mergekit writes it, or in words of our own.

Of mergekit's methods this has two, and computes all of both in float32 and rounds once, whatever dtype is named:
``task_arithmetic``, base_model + lambda * (weight * (model - base_model) + …), and ``linear``, the mean of models by
their weights, or with ``normalize: false`` the sum weight * model + …. What a weight is: see recipe_weights.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ires_kernels.checkpoints import hub, manifest, roles
from ires_kernels.checkpoints.addresses import Address, is_address
from ires_kernels.dtypes import number_of
from ires_kernels.files.opening import read_bytes
from ires_kernels.files.plain import without_secrets
from ires_kernels.planning.inputs import StrPath
from ires_kernels.planning.recipe_models import Places, added_to_target, blended, check_blend
from ires_kernels.planning.recipe_slices import check_layers, without_slices
from ires_kernels.planning.recipe_weights import Shared, factors
from ires_kernels.planning.rules import DTYPES, VOCABULARIES, ArgumentError, Rules
from ires_kernels.planning.yamls import LONGEST, Node, parse

_MERGEKIT = (
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
)
_RULES = ("alphas", "skip", "rounding", "seed", "vocabulary", "renames", "trust_names", "allow_missing")
_KEYS = (*_MERGEKIT, "target", "pairs", "residuals", *_RULES, "name")
_NOT_HERE = {
    "modules": "is not supported: give models, which are merged with all of their parts.",
    "chat_template": "is not supported: the output has that of the model whose tokenizer it gets. Leave it out, or put "
    "another one into the folder of that model.",
}
_METHODS = ("task_arithmetic", "linear")


class Merge(NamedTuple):
    """What a recipe asks for."""

    paths: dict[str, StrPath]
    """Of the models, by role; those on the Hub are in its cache."""
    rules: Rules
    made: manifest.Manifest | None = None
    """Of the output that is to be made again."""


def read(
    path: StrPath,
    *,
    in_place: bool = False,
    stream: bool = False,
    trust_inputs: bool = False,
    follow_links: bool = False,
) -> Merge:
    """What the recipe in a file asks for, or the recipe of the output whose ires.json this is.

    in_place  the target is to be changed: one on the Hub is refused, before anything is downloaded
    stream    the weights of models on the Hub are to be read where they are

    Raises ArgumentError with file, line and key; CheckpointError for models that cannot be read; and OSError.
    """
    if is_address(path):
        raise ArgumentError(f"{Address.of(path)}: recipes are read on this disk. Have a copy of that file here.")
    if Path(path).suffix == ".json":
        return _again(Path(path), trust_inputs, stream)
    try:
        raw = read_bytes(path, LONGEST)
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(f"{os.fspath(path)}: no such file. Check the path.") from None
    root, layers = without_slices(parse(raw, os.fspath(path)))
    for key, text in _NOT_HERE.items():
        if key in (root.table or {}):
            raise (root.table or {})[key].error(text)
    table = root.fields(_KEYS)
    places = Places(Path(path).absolute().parent, stream)
    method = _method(root, table)
    shared = _shared(root, table, method)
    options = _options(table) | {"dtype": _dtype(table), "recipe": without_secrets(raw.decode())}
    if method == "linear":
        check_blend(root, table, places, in_place)
        options["vocabulary"] = _vocabulary_of_blend(table, places)
        added = blended(table, places)
        target = added[0].paths[0]
        named = roles.of_models(len(added))
    else:
        changed = table.get("target", table.get("base_model")) if in_place else None
        if changed is not None and not os.path.lexists(places.folder / changed.word()):
            hub.check_local(changed.word())
        target, added = added_to_target(root, table, places)
        options["vocabulary"] = _vocabulary(table)
        named = roles.of_residuals(len(added)) if len(added[0].paths) == 1 else roles.of_pairs(len(added))
    check_layers(layers, target, follow_links)
    alpha, by_name = factors(target, added, shared, follow_links)
    paths = dict(zip(named, (path for each in added for path in each.paths), strict=True))
    alphas = [*_alphas(table.get("alphas")), *by_name]
    try:
        rules = Rules.of(len(added), alpha=alpha, alphas=alphas, **options)
    except ArgumentError as error:
        raise ArgumentError(f"{os.fspath(path)}: {error}") from None
    return Merge({"target": target, **paths}, rules)


def _again(path: Path, trust_inputs: bool, stream: bool) -> Merge:
    """What the manifest of an output says that it is made of."""
    found = manifest.read(path)
    if found is None:
        raise ArgumentError(f"{path}: no such file. Check the path.")
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
    as_is = hub.streamed if stream else str
    paths = {role: hub.local(as_is(entry.path)) for role, entry in made_of.items()}
    return Merge(paths, Rules.from_dict(found.table["rules"]), found)


def _method(root: Node, table: Mapping[str, Node]) -> str:
    """How models are merged; empty for keys of our own."""
    method = table.get("merge_method")
    if method is not None and method.word() not in _METHODS:
        raise method.wrong(" or ".join(_METHODS))
    if "name" in table:
        table["name"].word()  # which the text has, and nobody else
    ways = [key for key in ("models", "pairs", "residuals") if key in table]
    if len(ways) != 1:
        raise root.error(f"has {' and '.join(ways) or 'nothing to add'}, wanted one of models, pairs and residuals.")
    if ways == ["models"] and method is None:
        raise root.error(f"merge_method is missing, wanted {' or '.join(_METHODS)}.")
    for key in ("merge_method", "base_model", "parameters", "tokenizer_source", "tokenizer"):
        if key in table and ways != ["models"]:
            raise table[key].error(f"goes with models, and not with {ways[0]}.")
    return "" if method is None else method.word()


def _shared(root: Node, table: Mapping[str, Node], method: str) -> Shared:
    """What the parameters of all models say, but for a weight."""
    if "parameters" not in table:
        return Shared(root, is_mean=method == "linear", is_whole=method == "linear")
    given = table["parameters"].fields(("weight", "lambda", "normalize", "int8_mask"))
    if "int8_mask" in given:
        given["int8_mask"].flag()  # without consensus there is no mask
    if method == "linear" and "lambda" in given:
        raise given["lambda"].error("goes with task_arithmetic: a mean has no differences to scale.")
    return Shared(
        table["parameters"],
        (given["lambda"],) if "lambda" in given else (),
        given["normalize"].flag() if "normalize" in given else method == "linear",
        method == "linear",
    )


def _dtype(table: Mapping[str, Node]) -> str | None:
    names = [_short(node) for key in ("out_dtype", "dtype") if (node := table.get(key)) is not None]
    return names[0] if names else None


def _short(node: Node) -> str:
    """A dtype, however it is spelt."""
    number = number_of(node.word())
    if number is None or number.name not in DTYPES.values():
        raise node.wrong("one of float32, bfloat16, float16, float64")
    return number.name.lower()


def _tokenizer(table: Mapping[str, Node]) -> Node | None:
    """Whose tokenizer the output is to have, by either of mergekit's keys."""
    source, longer = table.get("tokenizer_source"), table.get("tokenizer")
    if source is not None and longer is not None:
        raise longer.error("says what tokenizer_source says. Leave one of the two out.")
    return source if longer is None else longer.fields(("source",), ["source"])["source"]


def _vocabulary(table: Mapping[str, Node]) -> str | None:
    own, source = table.get("vocabulary"), _tokenizer(table)
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


def _vocabulary_of_blend(table: Mapping[str, Node], places: Places) -> str | None:
    own, source = table.get("vocabulary"), _tokenizer(table)
    if own is not None and own.word() != "rows":
        raise own.wrong("rows, or nothing: models that make up another one have the same tokens")
    if source is not None:
        first = table["models"].several("a list of models")[0].fields(None)["model"]
        giver = table.get("base_model", first)
        same = {"union"} if table.keys().isdisjoint(("skip", "vocabulary")) else set()  # where all tokens have to be
        same |= {"base"} if "base_model" in table else set()
        if source.word() not in same and places.name(source) != places.name(giver):
            raise source.wrong(
                f"{giver.word()}, whose tokenizer the output gets: to have another one's, name that as base_model"
            )
    return None if own is None else own.word()


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
