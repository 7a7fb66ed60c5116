"""Tokens and their ids are those that the tokenizers library gives, in every format that models come in."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ires_kernels.checkpoints import tokens
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.tokens import Tokens

TEXT = ["the cat sat on the mat", "naïve café — 12 345", "日本語 and more text", "a b c d e f g"] * 3


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    )
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    )
    return made


MAKERS = {"byte-level": byte_level, "unigram": unigram, "wordpiece": word_piece}


def write(folder: Path, name: str, content: object) -> dict[str, Path]:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_trained_tokenizer(tmp_path: Path, kind: str) -> None:
    made = MAKERS[kind]()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<news>", normalized=False), "the"])
    found = tokens.read(write(tmp_path, "tokenizer.json", made.to_str()))
    assert found.ids == made.get_vocab(with_added_tokens=True)
    assert {"<|im_start|>", "<|im_end|>", "<news>"} <= found.added
    assert found.at([made.token_to_id("<|im_end|>")]) == {made.token_to_id("<|im_end|>"): "<|im_end|>"}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("case", ["reversed", "far", "holes in the vocabulary", "the last one added"])
def test_the_ids_that_files_give_to_added_tokens_are_not_the_ones_they_get(
    tmp_path: Path, kind: str, case: str
) -> None:
    table = json.loads(MAKERS[kind]().to_str())
    size = len(table["model"]["vocab"])
    names = ["<b>", "<a>", "<c>", "<a>"]
    ids = {"reversed": [size + 2, size + 1, size, size + 1], "far": [size + 900, 5 * size, 7, 1]}.get(case, [size] * 4)
    if case != "reversed" and isinstance(table["model"]["vocab"], dict):
        vocab = table["model"]["vocab"]
        last = max(vocab, key=vocab.__getitem__)
        vocab[last] = 2 * size
        if case == "the last one added":
            names.insert(1, last)
            ids.insert(1, 2 * size)
        table["model"]["merges"] = [m for m in table["model"].get("merges", []) if "".join(m) != last]
        table["model"] = {k: v for k, v in table["model"].items() if k != "merges" or kind == "byte-level"}
    made_of = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    table["added_tokens"] = [{"id": i, "content": name, **made_of} for i, name in zip(ids, names, strict=True)]
    files = write(tmp_path, "tokenizer.json", table)
    theirs = Tokenizer.from_file(f"{tmp_path}/tokenizer.json").get_vocab(with_added_tokens=True)
    assert tokens.read(files).ids == theirs


def test_what_tokenizer_config_adds(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer.json", byte_level().to_str())
    decoder = {"400": {"content": "<late>"}, "350": {"content": "<early>"}}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<early>",
        "added_tokens_decoder": decoder,
    }  # fmt: skip
    files = write(tmp_path, "tokenizer_config.json", settings)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found = tokens.read(files)
    assert found.ids == theirs.get_vocab()
    assert found.ids["<end>"] == theirs.eos_token_id
    assert found.settings == settings


def varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 127 else bytes([value])


def protobuf(pieces: list[str]) -> bytes:
    """A sentencepiece model: pieces with score and type, then the settings of a trainer."""
    raw = b""
    for piece in pieces:
        text = piece.encode()
        message = b"\x0a" + varint(len(text)) + text + b"\x15\x00\x00\x80\x3f" + b"\x18\x01"
        raw += b"\x0a" + varint(len(message)) + message
    return raw + b"\x12\x04\x0a\x02in" + b"\x18\x96\x01"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_trained_sentencepiece_model(tmp_path: Path, kind: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    raw = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=raw, model_type=kind, vocab_size=58, minloglevel=2,
        user_defined_symbols=["<|im_start|>"], byte_fallback=False, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(raw.getvalue())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=raw.getvalue())
    found = tokens.read({"tokenizer.model": tmp_path / "tokenizer.model"})
    assert found.ids == {theirs.id_to_piece(id_): id_ for id_ in range(theirs.get_piece_size())}
    assert not found.odd


def test_other_formats(tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "▁the", "x" * 200, "é"]

    def files(name: str, content: bytes | object) -> dict[str, Path]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(raw)
        return {name: folder / name}

    spm = files("tokenizer.model", protobuf(pieces))
    assert tokens.read(spm) == Tokens({piece: i for i, piece in enumerate(pieces)})
    added = spm | files("added_tokens.json", {"<news>": 9})
    assert tokens.read(added).ids["<news>"] == 9
    by_id = files("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<law>"}}, "bos_token": "<s>"})
    assert tokens.read(spm | by_id).ids["<law>"] == 7
    assert tokens.read(spm | by_id).added == {"<law>", "<s>"}
    assert tokens.read(files("vocab.txt", b"[PAD]\n[UNK]\r\nthe\n")).ids == {"[PAD]": 0, "[UNK]": 1, "the": 2}
    assert tokens.read(files("vocab.json", {"a": 1, "b": 0})).ids == {"a": 1, "b": 0}
    made = byte_level()
    raw = "".join(f"{base64.b64encode(made.decode([id_]).encode()).decode()} {id_}\n" for id_ in (64, 70, 220))
    for name in ("qwen.tiktoken", "tokenizer.model"):
        assert tokens.read(files(name, raw.encode())).ids == {made.id_to_token(id_): id_ for id_ in (64, 70, 220)}
    assert tokens.read(files("x.tiktoken", b"5pelCg== 3\n")).ids == {"æĹ¥Ċ": 3}, "as byte-level tokenizers write it"
    tekken = {
        "config": {"default_vocab_size": 4, "default_num_special_tokens": 2},
        "special_tokens": [{"rank": 0, "token_str": "<s>"}, {"rank": 1, "token_str": "</s>"}],
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(b).decode()} for i, b in enumerate((b"a", b" b", b"c"))],
    }
    assert tokens.read(files("tekken.json", tekken)).ids == {"<s>": 0, "</s>": 1, "a": 2, "Ġb": 3}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": -1}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": true}}}'),
        ("tokenizer.json", b'{"model": {"vocab": [1]}}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{}]}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"content": 1}]}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"content": null}]}'),
        ("tokenizer.json", b'{"model": {"vocab": [[1, 0.5]]}}'),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.json", b"[" * 5000),
        ("tokenizer.model", b"\x0a"),
        ("tokenizer.model", b"\x0a\x05ab"),
        ("tokenizer.model", b"\x0a\x80\x80\x80"),
        ("tokenizer.model", b"\x0a\x03\x0a\x01\xff"),
        ("tokenizer.model", b"not one"),
        ("tokenizer.model", b"\x0a\x02\x0f\x00"),
        ("tokenizer.model", b"\x0a\x05\x15\x00\x00\x00\x00"),
        ("tokenizer.model", b"\x0a" + b"\x80" * 10_000_000),
        ("vocab.json", b'{"a": {"b": 1}}'),
        ("vocab.txt", b"\xff"),
        ("tekken.json", b"{}"),
        ("bpe.codes", b""),
    ],
)
def test_what_cannot_be_read_says_which_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        tokens.read({name: tmp_path / name})


def table(*names: str, **more: int) -> Tokens:
    return Tokens({name: i for i, name in enumerate(names)} | more)


def test_which_tokens_are_lost() -> None:
    base = table(*(f"w{i}" for i in range(40)), "<|reserved_0|>", "slot")
    donor = table(*(f"w{i}" for i in range(40)), "<|im_start|>", "<|im_end|>")
    assert tokens.lost(base, donor, base) == [], "instruct has named free rows"
    assert tokens.lost(base, donor, tokens.renamed(base, donor)) == [], "the same by way of a residual"
    assert tokens.lost(base, donor, None) == ["slot"], "nobody knows whether it was free"
    target = Tokens(base.ids | {"<news>": 42, "<law>": 43})
    assert tokens.lost(target, donor, base) == ["<news>", "<law>"]
    moved: dict[str, Any] = donor.ids | {"w0": 1, "w1": 0}
    assert tokens.lost(base, Tokens(moved), base) == ["w0", "w1"], "at other ids"
    other = table(*(f"z{i}" for i in range(42)))
    assert len(tokens.lost(base, other, base)) == 41, "another tokenizer altogether"
    assert tokens.lost(donor, Tokens(donor.ids | {"<more>": 50}), base) == []
