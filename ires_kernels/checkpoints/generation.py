"""The chat template and the generation_config.json of a merged model: those of the instruct model, where they fit.

Both name tokens, by their texts or their ids, so whether they fit depends on the tokenizer that the model gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ires_kernels.checkpoints import endings
from ires_kernels.checkpoints.filenames import GENERATION
from ires_kernels.checkpoints.parents import Parent
from ires_kernels.checkpoints.sidefiles import SideFile
from ires_kernels.checkpoints.tokens import as_object


def fitting_template(own: Parent, giver: Parent, *, reordered: bool = False) -> list[SideFile]:
    """The giver's chat template for the target's tokenizer, if it has all marks of it at the same ids; or its own.

    reordered  whether the ids do not matter
    """
    text, mine, theirs = giver.template, own.tokens_or_none(), giver.tokens_or_none()
    if text is None:
        return own.files("template", f"not in {giver.role}")
    marks = endings.marks(text, theirs) if theirs else []
    ids = {mark: theirs.ids[mark] for mark in marks} if theirs and not reordered else {}
    if not mine or not theirs or not marks or any(ids.get(m, mine.ids.get(m)) != mine.ids.get(m, -1) for m in marks):
        return own.files("template", f"that of {giver.role} has marks that its tokenizer has not, or at other ids")
    return giver.templates()


def fitting_generation(
    own: Parent, donors: Sequence[Parent], giver: Parent | None = None, *, reordered: bool = False
) -> list[SideFile]:
    """generation_config.json, with the ids at which the first donor that says so ends.

    giver      the donor whose tokenizer is not taken: an id that is another token in the target's is not taken either
    reordered  whether ids become those of the same tokens there
    """
    for donor in donors:
        said, special = donor.json(GENERATION) or {}, donor.special_ids
        if donor.has("generation"):
            side = donor.file(GENERATION)
            if said.get("eos_token_id") is None and "eos_token_id" in special:
                content = endings.generation(said, special)
                side = donor.file(GENERATION, "with eos_token_id of its config.json", content)
            special = special | {key: value for key, value in said.items() if value is not None}
        elif "eos_token_id" in special:
            mine = own.json(GENERATION) or {}
            eos = mine.get("eos_token_id") or own.special_ids.get("eos_token_id")
            if endings.ids(eos) == endings.ids(special["eos_token_id"]):
                break
            why = f"{'that of the target' if mine else 'new'}, with eos_token_id of the config.json of {donor.role}"
            path = own.listing[GENERATION] if mine else donor.says_ids
            side = (own if mine else donor).file(GENERATION, why, endings.generation(mine, special), path)
        else:
            continue
        if giver is not None and reordered:
            table = _with_ids_of(as_object(side.read()) or {}, own, giver)
            if table is not None:
                content = endings.generation(table, {})
                return [replace(side, why="with the ids of its tokenizer", content=content)]
        if giver is not None and not _agree(special, own, giver):
            return own.files("generation", f"that of {donor.role} has ids of other tokens")
        return [side]
    return own.files("generation", f"not in {' and '.join(donor.role for donor in donors)}" if donors else "")


def _with_ids_of(generation: Mapping[str, Any], own: Parent, giver: Parent) -> dict[str, Any] | None:
    """The settings with the ids that their tokens have in another tokenizer; None where it lacks one of them."""
    mine, theirs = own.tokens_or_none(), giver.tokens_or_none()
    if mine is None or theirs is None:
        return None
    found = dict(generation)
    for key, value in generation.items():
        ids = endings.ids(value) if key.endswith("token_id") else []
        names = theirs.at(ids)
        new = [mine.ids.get(names.get(id_, ""), -1) for id_ in ids]
        if -1 in new:
            return None
        if new:
            found[key] = new if isinstance(value, list) else new[0]
    return found


def _agree(special: Mapping[str, Any], own: Parent, giver: Parent) -> bool:
    """Whether all special ids are the same tokens in two tokenizers."""
    mine, theirs = own.tokens_or_none(), giver.tokens_or_none()
    wanted = [id_ for key, value in special.items() if key.endswith("token_id") for id_ in endings.ids(value)]
    if mine is None or theirs is None:
        return False
    names = theirs.at(wanted)
    return all(id_ in names and mine.ids.get(names[id_]) == id_ for id_ in wanted)
