"""How a turn ends: what generation_config.json, config.json, the tokenizer and the chat template say of it.

Loaders stop at the eos_token_id of generation_config.json, or of config.json where that file is missing; vLLM and
others stop at the tokenizer's eos_token as well. A model whose files do not agree may talk on where it should stop.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ires_kernels.checkpoints.header import brief
from ires_kernels.checkpoints.tokens import Tokens, text_of


def ids(value: object) -> list[int]:
    """The ids of an eos_token_id, which is a number or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [id_ for id_ in values if type(id_) is int]


def generation(own: Mapping[str, Any], special: Mapping[str, Any]) -> bytes:
    """generation_config.json `own` with the special ids of a config.json."""
    table = dict(own) | dict(special)
    table.pop("_from_model_config", None)  # which says that config.json has the same
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def default_template(template: object) -> str | None:
    """The text of a chat_template, which may be a list of several with their names."""
    if isinstance(template, list):
        named = {f"{entry.get('name')}": entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None


def marks(template: str, tokens: Tokens) -> list[str]:
    """The tokens that a chat template sets apart messages with: those that stand in it, and its eos_token."""
    settings = tokens.settings
    begin, end = (text_of(settings.get(key)) for key in ("bos_token", "eos_token"))
    # An added token may also be a word or blanks, which any text has.
    if len(tokens.added) > _MARKS or len(template) > _TEMPLATE:  # whatever they are
        return []
    found = {token for token in tokens.added if _MARK.fullmatch(token) and token in template} - {begin}
    if end in tokens.ids and re.search(r"\beos_token\b", template):
        found.add(end)
    return sorted(found, key=tokens.ids.__getitem__)


def warning(
    generation: Mapping[str, Any], config: Mapping[str, Any], tokens: Tokens | None, template: str | None
) -> str | None:
    """What to say where the output's files do not agree how a turn ends; None where they do, or do not say.

    generation, config  the special ids that the two files have
    tokens, template    of the tokenizer that the output gets, where it can be read
    """
    of_config, of_generation = ids(config.get("eos_token_id")), ids(generation.get("eos_token_id"))
    stops = set(of_generation or of_config)
    said = [f"generation_config.json {_list(of_generation, tokens)}"] if of_generation else []
    said += [f"config.json {_list(of_config, tokens)}"] if of_config else []
    agree = not of_config or not stops.isdisjoint(of_config)
    if tokens is not None:
        eos = text_of(tokens.settings.get("eos_token"))
        if eos is not None:
            said.append(f"the tokenizer {_list([tokens.ids[eos]], tokens) if eos in tokens.ids else repr(eos)}")
            agree &= tokens.ids.get(eos) in stops
        named = [tokens.ids[token] for token in marks(template or "", tokens)]
        if named:
            said.append(f"the chat template has {_list(named, tokens)}")
            agree &= not stops.isdisjoint(named)
    if agree or not stops:
        return None
    where = "generation_config.json" if of_generation else "config.json"
    return (
        f"the files of the output do not agree how a turn ends: {'; '.join(said)}. transformers stops at what {where} "
        "says, vLLM also at the tokenizer's token; if answers do not end, correct eos_token_id there"
    )


def beyond(
    rows: int, generation: Mapping[str, Any], config: Mapping[str, Any], tokens: Tokens | None, template: str | None
) -> dict[int | str, str]:
    """What has an id beyond the rows of an embedding, by the id or by what has it; other arguments as of `warning`."""
    found: dict[int | str, str] = {}
    for file, table in (("generation_config.json", generation), ("config.json", config)):
        for key, value in table.items():
            for id_ in ids(value) if key.endswith("token_id") else []:
                if id_ >= rows:
                    text = f"{key} of {file} is {_list([id_], tokens)}, and the embedding has {rows} rows"
                    found.setdefault(id_, text)
    if tokens is not None:
        eos = text_of(tokens.settings.get("eos_token"))
        needed = {tokens.ids[token] for token in (*marks(template or "", tokens), eos) if token in tokens.ids}
        words = {id_ for token, id_ in tokens.ids.items() if id_ >= rows and token not in tokens.added}
        for what, named in (("the chat template", needed), ("the tokenizer", words)):
            outside = sorted(id_ for id_ in named if id_ >= rows and id_ not in found)
            if outside:
                more = f" and {len(outside) - _SHOWN} more" if len(outside) > _SHOWN else ""
                found[what] = f"{what} has {_list(outside[:_SHOWN], tokens)}{more}, and the embedding has {rows} rows"
    return found


def _list(ids: Iterable[int], tokens: Tokens | None) -> str:
    table = tokens.at(ids) if tokens else {}
    return ", ".join(f"{id_} {brief(table[id_])}" if id_ in table else f"{id_}" for id_ in ids)


_SHOWN = 5
_MARKS, _TEMPLATE = 10_000, 1 << 17  # added tokens and characters; the most that are known are some 1,000 and 30,000
_MARK = re.compile(r"(?=.*\W)\S{3,}")
