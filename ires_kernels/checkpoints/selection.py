"""Which of the files beside the weights belong to a merged model, and from which of its parents each one comes.

The target gives config.json and whatever else its folder holds. What makes a model answer as the instruct model does
comes from there: the tokenizer, the chat template, generation_config.json, the processors of images and sounds. A
tokenizer is several files that fit only each other, so it comes from one parent as a whole; and it stays the target's
where another would lose tokens of the target's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ires_kernels.checkpoints import configs, endings, references, roles, tokens
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.filenames import GENERATION, JINJA, Group, group_of, is_weights, names_others
from ires_kernels.checkpoints.generation import fitting_generation, fitting_template
from ires_kernels.checkpoints.parents import Parent, have_same_files
from ires_kernels.checkpoints.sidefiles import SideFile, listing, tree
from ires_kernels.checkpoints.tokenizers import clashes, fullest
from ires_kernels.checkpoints.tokens import as_object
from ires_kernels.files.opening import MAX_CONFIG


@dataclass(slots=True)
class Chosen:
    """The files of a merged model beside its weights, and what to say of them."""

    files: list[SideFile]
    left: list[str]
    """What is not copied of the target's folder: sub-folders, weights in other formats, what is no regular file, and
    parts of a tokenizer, template or processor that another replaces."""
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Why a model with these files would not work."""


def of_model(
    inputs: Mapping[str, Checkpoint],
    *,
    own_tokenizer: bool = False,
    vocabulary: str | None = None,
    reordered: bool = False,
    config: Mapping[str, Any] | None = None,
    rows: int | None = None,
) -> Chosen:
    """Files for a merged model: those of the target, the first of `inputs`, and of the instruct model or a residual.

    The first donor that has them gives the tokenizer, the chat template, generation_config.json and the processors, and
    the target what no donor has; of tokenizers one that has all tokens of the others goes first. Base gives nothing: it
    is subtracted. With `own_tokenizer`, and where a donor's would lose tokens of its own, the target keeps its
    tokenizer, and with it all that holds ids of which the two differ.

    vocabulary  "target" or "instruct" where it was decided whose tokenizer it gets: see `Rules.vocabulary`
    reordered   whether the target has its tokens in another order, so that the same text has another id
    config      config.json of the merged model
    rows        of its embedding
    """
    parents = {role: Parent(role, checkpoint) for role, checkpoint in inputs.items()}
    own, *others = parents.values()
    blended = roles.are_blended(inputs)  # whose first model gives it all
    donors = [parent for parent in others if not (roles.is_base(parent.role) or blended)]
    said: list[str] = []

    def first(group: Group) -> Parent | None:
        return next((donor for donor in donors if donor.has(group)), None)

    giver = fullest([donor for donor in donors if donor.has("tokenizer")])
    base = parents.get(roles.base_of((giver or donors[0]).role)) if donors else None
    if giver is None and base is not None and base.has("tokenizer") and not own.has("tokenizer"):
        said.append("neither instruct nor the target has a tokenizer, and that of base is not taken")
    said += _lacking(own, others) if blended else []
    absent = "" if blended else f"not in {' and '.join(donor.role for donor in donors)}"
    holder, why = giver or own, "" if giver else absent
    if own_tokenizer:
        holder, why = own, "its vocabulary is another"
        groups = [own.files("template", why), own.files("generation", why)]
    elif giver is not None and reordered:
        holder, why = own, "its tokens are in another order"
        groups = [fitting_template(own, giver, reordered=True), fitting_generation(own, donors, giver, reordered=True)]
    elif giver is not None and (vocabulary == "target" or clashes(own, giver, base, vocabulary, said)):
        holder, why = own, "as --vocabulary says" if vocabulary == "target" else "it has tokens of its own"
        groups = [fitting_template(own, giver), fitting_generation(own, donors, giver)]
    elif giver is not None:
        groups = [
            giver.files("template") if giver.has_template else own.templates(absent),
            fitting_generation(own, donors),
        ]
    else:
        groups = [(first("template") or own).files("template"), fitting_generation(own, donors)]
    groups.append(holder.files("tokenizer", why))
    keeps = holder is own and giver is not None and own.has("processor")
    source = None if keeps else first("processor")
    groups.append(
        source.files("processor") if source else own.files("processor", "as its tokenizer" if keeps else absent)
    )

    found: dict[str, SideFile] = {}
    for side in (side for group in [*groups, own.files("model")] for side in group):
        found.setdefault(side.name, side)
    _add_named(found, parents, said)
    folders = {name.partition("/")[0] + "/" for name in found}
    left = sorted(
        [name for name in own.left if name not in folders] + [name for name in own.listing if name not in found]
    )
    files = sorted(found.values(), key=lambda side: side.name)
    special, table, template = configs.special_ids(config), holder.tokens_or_none(), _template_of(files, holder)
    generation = _generation_of(files)
    ending = endings.warning(generation, special, table, template)
    said += [ending] if ending else []
    problems: list[str] = []
    if rows is not None:
        mine = own.json(GENERATION) or {}, own.special_ids, own.tokens_or_none(), own.template
        before = endings.beyond(rows, *mine)
        for key, text in endings.beyond(rows, generation, special, table, template).items():
            # What the target lives with is no fault of the merge.
            (said if key in before else problems).append(text)
    return Chosen(files, left, said, problems)


def _lacking(first: Parent, others: Iterable[Parent]) -> list[str]:
    """What to say where the first model of a blend, which gives all files, has not what another has."""
    models = [first, *others]
    owners = {
        "tokenizer": [model for model in models if model.has("tokenizer")],
        "chat template": [model for model in models if model.has_template],
    }
    return [
        f"{first.role} has no {what}, and so the output has none: {those[0].role} has one. Where that model is "
        "base_model, its files are taken"
        for what, those in owners.items()
        if those and first not in those
    ]


def of_residual(giver: Checkpoint, role: str = "instruct") -> list[SideFile]:
    """What a residual keeps of the instruct model for `of_model`, or of another residual.

    Never config.json: a residual must not load.
    """
    parent = Parent(role, giver)
    found = {name: parent.file(name) for name in parent.listing if group_of(name) != "model"}
    _add_named(found, {role: parent}, [])
    return sorted(found.values(), key=lambda side: side.name)


def record(base: Checkpoint, instruct: Checkpoint) -> dict[str, Any]:
    """What residual.json keeps of the two models, for `of_model` and `configs`, besides these files."""
    renamed: dict[str, int] = {}
    parents = [Parent("base", base), Parent("instruct", instruct)]
    if not have_same_files(*parents):
        one, two = (parent.tokens_or_none() for parent in parents)
        renamed = tokens.renamed(one, two) if one and two else {}
    return {
        "config": {"base": configs.fields(base.config), "instruct": configs.fields(instruct.config)},
        "special_ids": configs.special_ids(instruct.config),
        "renamed_tokens": renamed,
    }


def replaced_by(target: Checkpoint, chosen: Iterable[SideFile]) -> list[str]:
    """The files of the target that have no place beside the `chosen` ones: parts of a tokenizer that is not theirs."""
    names = {file.name for file in chosen}
    return [name for name in listing(target)[0] if name not in names and group_of(name) != "model"]


def _generation_of(files: Iterable[SideFile]) -> dict[str, Any]:
    """What the chosen generation_config.json says."""
    found = next((side for side in files if side.name == GENERATION), None)
    return (as_object(found.read()) if found else None) or {}


def _template_of(files: Iterable[SideFile], holder: Parent) -> str | None:
    """The chat template of the chosen files, which may be inside of the tokenizer of their holder."""
    found = next((side for side in files if side.name == JINJA), None)
    return found.read().decode(errors="replace") if found else holder.template


def _add_named(found: dict[str, SideFile], parents: Mapping[str, Parent], said: list[str]) -> None:
    """Add what the files `found` name, and what that names in turn, each from the parent of the file that names it."""
    queue = [side for side in found.values() if names_others(side.name)]
    seen: set[tuple[str, str]] = set()
    while queue:
        side = queue.pop()
        if side.file_id.size > MAX_CONFIG:
            continue  # data, and not settings or code
        folder = parents[side.role].checkpoint.path
        for part in sorted(references.named_by(side.name, side.read())):
            if (side.role, part) in seen:
                continue
            seen.add((side.role, part))
            for name, path in tree(folder, part).items():
                new = parents[side.role].file(name, f"{side.name} names it", path=path)
                there = found.setdefault(name, new)
                if there is new:
                    queue += [new] if names_others(name) else []
                    if is_weights(name):
                        said.append(f"{name}: these weights are copied from {side.role} as they are, and not merged")
                elif there.role != side.role and not new.is_at(there.source):
                    said.append(
                        f"{name} of {side.role}, which {side.name} names, is not copied: {there.role} has another"
                    )
