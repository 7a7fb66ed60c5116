"""The card of a merged model: what the Hub shows of it, and how to make it again. It names no path of this machine.

Keys are those of the Hub's metadata: `base_model` has the models that are known there, by their ids. A licence is taken
over where all models with a card say the same one; else the card says which model says what, and leaves it to a person.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ires_kernels.checkpoints import hub, roles
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files.opening import MAX_CONFIG, check_link, read_bytes
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import DTYPES, Rules
from ires_kernels.records.report import Report
from ires_kernels.version import VERSION

NAME = "README.md"
BESIDE = "README.ires.md"
"""Where the target has a card, which is kept."""
_LICENCE = ("license", "license_name", "license_link")
_PATH = re.compile(r"(?<![^\s'\"\[{,])(?:/|~|\.\.?/)[^\n'\",\]}#]*[^\s'\",\]}#]")
"""A path in a recipe that does not begin with a name, to the end of what it may be."""
_ADDRESS = re.compile(r"(?:https?|s3|gs|az)://[^\s'\",\]}#]+", re.IGNORECASE)
"""Or an address, whose query may hold a secret."""
_RESIDUAL = "target + alpha × (instruct − base), the instruction residual of Jindal et al. (arXiv 2410.10739)"
_BLEND = "the sum of the models, each times its weight"
_ROWS = ("merged", "lost to rounding", "compared", "warning")


def name(plan: Plan) -> str:
    """The file that the card becomes: none that there is already."""
    return BESIDE if any(side.name == NAME for side in plan.side_files) else NAME


def own(folder: Path, others: Container[str]) -> str | None:
    """The name of the card that a merge has written into a folder; None where there is none.

    others  the files that the manifest knows, among which ours is not: who publishes the model goes on writing it
    """
    return next((name for name in (BESIDE, NAME) if name not in others and _is_plain(folder / name)), None)


def _is_plain(path: Path) -> bool:
    """Whether this is a file, and no link to one."""
    return path.is_file() and not path.is_symlink()


def build(plan: Plan, report: Report, digests: Mapping[str, str | None]) -> bytes:
    """The card of what a plan of `apply` makes; `digests` of its inputs by role, as far as all of them was read."""
    cards = {role: _card(checkpoint) for role, checkpoint in plan.inputs.items()}
    licences = {role: found for role, card in cards.items() if (found := _licence(card))}
    ids = list(dict.fromkeys(id_ for checkpoint in plan.inputs.values() for id_ in _ids(checkpoint)))
    lines = ["---", *_listed("base_model", ids), "base_model_relation: merge", "library_name: transformers"]
    is_blend = roles.are_blended(plan.inputs)
    lines += _listed("tags", ["merge", "linear" if is_blend else "instruction-residual", "ires_kernels"])
    agreed = {tuple(found.items()) for found in licences.values()}
    if len(agreed) == 1:
        lines += [f"{key}: {_scalar(value)}" for key, value in next(iter(agreed))]
    lines += ["---", "", f"# {_cell(_pinned(plan.inputs['target']).partition('@')[0])}, merged", ""]
    lines += [
        f"A merge of checkpoints, computed exactly and rounded once: {_BLEND if is_blend else _RESIDUAL}.",
        "",
        "| role | model | digest (xxh3_128) |",
        "| --- | --- | --- |",
    ]
    for role, checkpoint in plan.inputs.items():
        lines.append(f"| {role} | {_cell(_pinned(checkpoint))} | {digests.get(role) or 'not all of it was read'} |")
    paths = [f"{checkpoint.path}" for checkpoint in plan.inputs.values()]
    lines += ["", "```sh", command(plan), "```", "", *_recipe(plan.rules.recipe, paths)]
    for key, value in report.rows():
        if key in _ROWS or key.startswith(("alpha", "weights")):
            for checkpoint in plan.inputs.values():
                value = value.replace(f"{checkpoint.path}", _pinned(checkpoint))
            lines.append(f"- {key}: {_cell(value)}")
    lines += _licences(licences) if len(agreed) > 1 else []
    lines += [
        "",
        f"Made with ires_kernels {VERSION}; `ires.json` has the digests of all tensors and of all that went in, and "
        "`ires verify` compares them.",
        "",
    ]
    return "\n".join(lines).encode(errors="replace")


def command(plan: Plan) -> str:
    """The command that makes it again, with ids or names of folders in place of paths."""
    if plan.rules.recipe:
        return "ires merge recipe.yml -o OUT"
    named = {role: shlex.quote(_pinned(checkpoint)) for role, checkpoint in plan.inputs.items()}
    rules = plan.rules
    words = ["ires", "apply", named["target"]]
    if "instruct" in named:
        words += ["--instruct", named["instruct"], "--base", named["base"], "--alpha", f"{rules.alpha[0]:g}"]
    else:
        for each, factor in zip(roles.added(named), rules.alpha, strict=True):
            words += ["--pair"] if len(each) == 2 else []
            words.append(":".join([*(named[role] for role in each), f"{factor:g}"]))
    return " ".join([*words, *_options(rules), "-o", "OUT"])


def _recipe(text: str, known: Iterable[str]) -> list[str]:
    """The text that asked for it, with names of folders in place of paths of this machine."""
    if not text:
        return []
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return ["with recipe.yml:", "", f"{fence}yaml", without_paths(text, known).rstrip("\n"), fence, ""]


def without_paths(recipe: str, known: Iterable[str]) -> str:
    """A recipe with names of folders in place of paths of this machine: the `known` ones, and what looks like one."""
    for path in sorted(known, key=len, reverse=True):
        if path.startswith("/"):
            recipe = recipe.replace(path, path.rstrip("/").rpartition("/")[2])
    return _PATH.sub(_last_part, _ADDRESS.sub(_last_part, recipe))


def _last_part(match: re.Match[str]) -> str:
    return match[0].partition("?")[0].rstrip("/").rpartition("/")[2]


def _options(rules: Rules) -> list[str]:
    words: list[str] = []
    for pattern, factors in rules.alphas:
        words += ["--alpha-for", shlex.quote(f"{pattern}=" + ",".join(f"{factor:g}" for factor in factors))]
    for pattern in rules.skip:
        words += ["--skip", shlex.quote(pattern)]
    if rules.dtype is not None:
        words += ["--dtype", next(short for short, dtype in DTYPES.items() if dtype == rules.dtype)]
    if rules.allow_missing:
        words.append("--allow-missing=any" if rules.allow_missing == "any" else "--allow-missing")
    if rules.vocabulary is not None:
        words += ["--vocabulary", rules.vocabulary]
    if rules.rounding != "nearest":
        words += ["--rounding", rules.rounding, "--seed", f"{rules.seed}"]
    return words


def _pinned(checkpoint: Checkpoint) -> str:
    """A model on the Hub with its commit, or the name of its folder."""
    repo = hub.repo_of(checkpoint.path)
    return f"{repo}" if repo else checkpoint.path.resolve().name


def _ids(checkpoint: Checkpoint) -> list[str]:
    """The ids of a model, or of the models that a residual was made of, as far as they are known."""
    repo = hub.repo_of(checkpoint.path)
    if repo is not None:
        return [repo.id]
    if checkpoint.kind != "residual" or checkpoint.manifest is None:
        return []
    return list(_ids_in(checkpoint.manifest.table.get("inputs")))


def _ids_in(inputs: object) -> Iterator[str]:
    """The ids in a table of inputs, and in those of the residuals among them, however deep."""
    tables = [inputs]
    while tables:
        table = tables.pop()
        for entry in table.values() if isinstance(table, dict) else ():
            if isinstance(entry, dict):
                repo = entry.get("hub")
                if isinstance(repo, dict) and isinstance(repo.get("id"), str):
                    yield repo["id"]
                tables.append(entry.get("made_of"))


def _card(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The metadata of the card of a model; empty where there is none that can be read."""
    path = checkpoint.path / NAME
    try:
        if not checkpoint.path.is_dir() or not path.is_file():
            return {}
        if not checkpoint.follow_links:
            check_link(path, checkpoint.path)
        text = read_bytes(path, MAX_CONFIG).decode(errors="replace")
    except (OSError, CheckpointError):
        return {}
    head, _, rest = text.replace("\r\n", "\n").partition("---\n")
    if head.strip():
        return {}
    import yaml

    try:
        table = yaml.safe_load(rest.partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def _licence(card: Mapping[str, Any]) -> dict[str, str]:
    return {key: card[key] for key in _LICENCE if isinstance(card.get(key), str)}


def _licences(found: Mapping[str, dict[str, str]]) -> list[str]:
    """What to say where models are under different licences."""
    lines = ["", "**Licences differ**, and which terms a merge is under is for a person to decide:", ""]
    return lines + [f"- {role}: {', '.join(licence.values())}" for role, licence in found.items()]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _scalar(text: str) -> str:
    """A text as YAML and JSON both write it."""
    return json.dumps(text, ensure_ascii=False)


def _listed(key: str, items: list[str]) -> list[str]:
    return [f"{key}:", *(f"- {_scalar(item)}" for item in items)] if items else []
