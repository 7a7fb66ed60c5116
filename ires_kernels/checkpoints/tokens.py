"""The tokens of a tokenizer and their ids, read from its files without any library, and what two of them disagree on.

A row of the embedding belongs to an id, and an id means what the tokenizer says. So a model whose tokenizer is replaced
by another loses every token that the other does not have at the same id. The formats are those that models come in:
tokenizer.json, tekken.json, a sentencepiece or tiktoken file, vocab.json and vocab.txt, each with the tokens that
tokenizer_config.json and added_tokens.json put on top of it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ires_kernels.checkpoints.header import CheckpointError, check_depth
from ires_kernels.files.opening import MAX_CONFIG, read_bytes

MAX_TOKENIZER = 1 << 28
"""Bytes of a file of tokens; the largest that are known, with 262,145 tokens and their merges, have 33 MB."""

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Rows that nobody has trained are named so that they can be renamed: a name that is gone is then no loss.
_FREE = re.compile(r"[<\[(|]+\w*(reserved|unused|placeholder|dummy)\w*[>\])|]+", re.IGNORECASE)
_RENAMED = 0.05  # of base's tokens: where instruct renamed more, it has not named free rows, it has another tokenizer


@dataclass(frozen=True, slots=True)
class Tokens:
    """Which id each token has."""

    ids: dict[str, int]
    """In the order of the file. Tokens of bytes are written as byte-level tokenizers write them."""
    added: frozenset[str] = frozenset()
    """Those that were added to the vocabulary or are special, as the marks of a chat are."""
    settings: dict[str, Any] = field(default_factory=dict)
    """tokenizer_config.json."""
    odd: str = ""
    """What is wrong with the ids, in words: two tokens with one, or a file that gives others than loaders do."""

    def at(self, ids: Iterable[int]) -> dict[int, str]:
        """The tokens at these ids; the added one where there are two."""
        wanted = set(ids)
        found = {id_: token for token, id_ in self.ids.items() if id_ in wanted and token not in self.added}
        return found | {self.ids[token]: token for token in self.added if self.ids[token] in wanted}


def read(files: Mapping[str, Path]) -> Tokens:
    """The tokens of a tokenizer from its files, by name. Raises CheckpointError for what cannot be read."""
    settings = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    for pattern, parse in _FORMATS.items():
        name = next((name for name in sorted(files) if re.fullmatch(pattern, name)), None)
        if name is not None:
            path = files[name]
            try:
                table = parse(path)
                found = _with_added(table, files, settings, fast=name == "tokenizer.json")
                return replace(found, odd=f"{path}: {found.odd}") if found.odd else found
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(f"{path}: its tokens cannot be read: {error!r}. Download it again.") from None
    raise CheckpointError(f"{', '.join(sorted(files))}: is no tokenizer whose tokens can be read.")


def lost(target: Tokens, donor: Tokens, base: Tokens | Mapping[str, int] | None) -> list[str]:
    """The target's tokens that would be gone, or mean another row, with the donor's tokenizer; sorted by id.

    base  the tokenizer of the base, or what `renamed` says of it. A name that it has where the donor has a new one is
          the name of a free row, and no loss
    """
    names = renamed(base, donor) if isinstance(base, Tokens) else (base or {})
    apart = target.ids.items() - donor.ids.items()
    found = [token for token, id_ in apart if names.get(token) != id_ and not _FREE.fullmatch(token)]
    return sorted(found, key=target.ids.__getitem__)


def renamed(base: Tokens, donor: Tokens) -> dict[str, int]:
    """Tokens of base in whose rows the donor has new ones; none where they are so many that all of it is another."""
    new = {donor.ids[token] for token in donor.ids.keys() - base.ids.keys()}
    gone = {token: base.ids[token] for token in sorted(base.ids.keys() - donor.ids.keys(), key=base.ids.__getitem__)}
    found = {token: id_ for token, id_ in gone.items() if id_ in new and not _FREE.fullmatch(token)}
    words = [token for token in found if token not in base.added]  # else it is a slot, and there may be many
    return found if len(words) <= _RENAMED * len(base.ids) else {}


def read_json(path: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """A JSON object as loaders read it. Raises CheckpointError for anything else."""
    raw = read_bytes(path, limit)
    check_depth(raw, f"{path}")
    try:
        table = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}. Correct it or download it again.") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: wanted a JSON object. Download it again.")
    return table


def as_object(raw: bytes) -> dict[str, Any] | None:
    """A JSON object from its text; None for anything else."""
    try:
        check_depth(raw, "")
        table = json.loads(raw)
    except ValueError:  # CheckpointError is one
        return None
    return table if isinstance(table, dict) else None


def text_of(token: object) -> str | None:
    """A token of tokenizer_config.json, which is a string or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def special(settings: Mapping[str, Any]) -> list[str]:
    """The special tokens that tokenizer_config.json or special_tokens_map.json names."""
    found = [settings.get(key) for key in _SPECIAL]
    for key in _LISTS:
        more = settings.get(key)
        found += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    return [text for token in found if (text := text_of(token)) is not None]


def _of_tokenizer_json(path: Path) -> Tokens:
    raw = read_bytes(path, MAX_TOKENIZER)
    try:
        return _in_tokenizer_json(raw)
    except (CheckpointError, json.JSONDecodeError):
        read_json(path, MAX_TOKENIZER)  # which says what is wrong, and where
        raise


@lru_cache(maxsize=3)
def _in_tokenizer_json(raw: bytes) -> Tokens:
    """Models of a merge often have one tokenizer, of 150,000 tokens that take a seventh of a second each time."""
    check_depth(raw, "")
    table = json.loads(raw)
    vocab = table["model"]["vocab"]
    if isinstance(vocab, list):  # Unigram: pieces with their scores
        vocab = {piece: id_ for id_, (piece, _) in enumerate(vocab)}
    listed = table.get("added_tokens") or []
    added = [token["content"] for token in listed]
    _check_ids(vocab | dict.fromkeys(added, 0))
    found = _append(Tokens(vocab), added)
    said = ((token["content"], token.get("id")) for token in listed)
    other = next(((text, id_) for text, id_ in said if id_ not in (None, found.ids[text])), None)
    if other is None:
        return found
    text, id_ = other
    return replace(found, odd=f"{text!r:.120} has the id {id_!r:.20}, and loaders give it {found.ids[text]}")


def _of_tekken(path: Path) -> Tokens:
    table = read_json(path, MAX_TOKENIZER)
    config = table["config"]
    count = config["default_num_special_tokens"]
    ids = {token["token_str"]: token["rank"] for token in table.get("special_tokens") or []}
    special = frozenset(ids)
    for token in table["vocab"][: config["default_vocab_size"] - count]:
        ids[_byte_level(base64.b64decode(token["token_bytes"]))] = token["rank"] + count
    _check_ids(ids)
    return Tokens(ids, special)


def _of_pieces(path: Path) -> Tokens:
    """A sentencepiece model, or a tiktoken file under the same name."""
    raw = read_bytes(path, MAX_TOKENIZER)
    return Tokens({piece: id_ for id_, piece in enumerate(_pieces(raw))} if raw[:1] == b"\x0a" else _ranks(raw))


def _of_ranks(path: Path) -> Tokens:
    return Tokens(_ranks(read_bytes(path, MAX_TOKENIZER)))


def _of_vocab_json(path: Path) -> Tokens:
    ids = read_json(path, MAX_TOKENIZER)
    _check_ids(ids)
    return Tokens(ids)


def _of_vocab_txt(path: Path) -> Tokens:
    lines = read_bytes(path, MAX_TOKENIZER).decode().split("\n")
    return Tokens({line.rstrip("\r"): id_ for id_, line in enumerate(lines[:-1] if lines[-1] == "" else lines)})


_FORMATS = {
    r"tokenizer\.json": _of_tokenizer_json,
    r"tekken\.json": _of_tekken,
    r"(tokenizer|spiece|spm|source)\.(model|spm)": _of_pieces,
    r"vocab\.json": _of_vocab_json,
    r"vocab\.txt": _of_vocab_txt,
    r".*\.tiktoken|tiktoken\.model": _of_ranks,
}
"""By pattern of the file's name, the first one found being what loaders take."""


def _with_added(tokens: Tokens, files: Mapping[str, Path], settings: dict[str, Any], *, fast: bool) -> Tokens:
    """With what stands in other files than the vocabulary; a `fast` tokenizer gives these tokens ids of its own."""
    decoder = settings.get("added_tokens_decoder") or {}
    more = {text: int(id_) for id_, token in decoder.items() if (text := text_of(token)) is not None}
    if not decoder and "added_tokens.json" in files:
        more = read_json(files["added_tokens.json"])
        _check_ids(more)
    listed = special(settings)
    if "special_tokens_map.json" in files:
        listed += special(read_json(files["special_tokens_map.json"]))
    if fast:
        tokens = _append(tokens, [*sorted(more, key=more.__getitem__), *listed])
    else:
        added = tokens.added.union(more, (text for text in listed if text in tokens.ids))
        tokens = Tokens(tokens.ids | more, added)
    return Tokens(tokens.ids, tokens.added, settings, tokens.odd or _twice(tokens.ids))


def _twice(ids: Mapping[str, int]) -> str:
    """Two tokens with one id, in words; "" where there are none."""
    if len(set(ids.values())) == len(ids):
        return ""
    seen: dict[int, str] = {}
    one, two = next((token, seen[id_]) for token, id_ in ids.items() if seen.setdefault(id_, token) != token)
    return f"{two!r:.120} and {one!r:.120} have one id, {ids[one]}"


def _append(tokens: Tokens, more: Iterable[str]) -> Tokens:
    """Add tokens as the tokenizers library does: what files say of their ids counts only where it agrees with this.

    A token of the vocabulary keeps its id; the others get the next ones, counted from the size of the vocabulary on.
    """
    ids, added = dict(tokens.ids), set(tokens.added)
    for token in more:
        if token:
            ids.setdefault(token, len(ids))
            added.add(token)
    return Tokens(ids, frozenset(added), tokens.settings, tokens.odd)


def _check_ids(ids: Mapping[str, Any]) -> None:
    for token, id_ in ids.items():
        if type(token) is not str or type(id_) is not int or id_ < 0:
            raise ValueError(f"token {token!r:.120} has the id {id_!r:.120}")


def _pieces(raw: bytes) -> Iterator[str]:
    """The pieces of a sentencepiece model in order: field 1 of each field 1 of a protobuf."""
    for number, message in _fields(raw):
        if number == 1:
            piece = next((text for inner, text in _fields(message) if inner == 1), None)
            if piece is None:
                raise ValueError("it has a piece without a text")
            yield piece.decode()


def _fields(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of the fields of a protobuf; of a number, which has no bytes of that kind, none."""
    place = 0
    while place < len(raw):
        key, place = _varint(raw, place)
        kind, size = key & 7, 0
        if kind == 0:
            _, place = _varint(raw, place)
        elif kind == 2:
            size, place = _varint(raw, place)
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        else:
            raise ValueError("it is no sentencepiece model")
        if place + size > len(raw):
            raise ValueError("it ends too early")
        yield key >> 3, raw[place : place + size] if kind == 2 else b""
        place += size


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while raw[place] & 0x80:
        value |= (raw[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if shift > 63:
            raise ValueError("it has a number that is too long")
    return value | raw[place] << shift, place + 1


def _ranks(raw: bytes) -> dict[str, int]:
    """A tiktoken file: the bytes of a token in base64 and its id, a line each."""
    pairs = (line.split() for line in raw.splitlines() if line)
    return {_byte_level(base64.b64decode(token, validate=True)): int(rank) for token, rank in pairs}


def _byte_level(raw: bytes) -> str:
    """Bytes as byte-level tokenizers write them: printable characters of Latin-1 as they are, others from 256 on."""
    return raw.decode("latin-1").translate(_LETTERS)


_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_LETTERS = {byte: 256 + i for i, byte in enumerate(sorted(set(range(256)) - set(_PRINTED)))}
