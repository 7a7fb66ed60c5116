"""Rows by token: which rows of embeddings and heads are added to, taken from instruct, or kept, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Tensors, normal, read_model, same, write_model
from tokenizers import Tokenizer, models

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.cli import main
from ires_kernels.planning.plan import Plan

EMBEDDING, HEAD, BIAS, MLP = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.layers.0.mlp.weight"
BY_TOKEN = (EMBEDDING, HEAD, BIAS)
H = 8
WORDS = [f"w{i}" for i in range(20)]
CHAT = ["<|im_start|>", "<|im_end|>"]
CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "dtype": "bfloat16", "eos_token_id": 1}


def tensors(seed: int, rows: int) -> Tensors:
    """A family of models: what they share comes from the first of them, and each row from its own generator."""
    found = {MLP: normal((H, H), 0) + normal((H, H), seed, scale=1e-3)}
    for i, name in enumerate(BY_TOKEN):
        made = [normal((H,), 1000 * i + row) + normal((H,), 9 + seed * 7777 + row, scale=1e-3) for row in range(rows)]
        found[name] = torch.stack(made) if name != BIAS else torch.stack(made)[:, 0].contiguous()
    return found


def tokenizer(added: Sequence[str] = (), words: Sequence[str] = WORDS, **settings: object) -> dict[str, str]:
    """The files of a tokenizer of words, with tokens added behind them."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made.add_special_tokens(list(added))
    table = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    return {"tokenizer.json": made.to_str(), "tokenizer_config.json": json.dumps(table)}


class Family:
    """Base, instruct and target, of so many rows and with the tokens that each has added; None: no tokenizer."""

    def __init__(self, root: Path, **models: tuple[int, Sequence[str] | dict[str, str] | None]) -> None:
        self.root = root
        self.tensors: dict[str, Tensors] = {}
        for seed, (role, (rows, added)) in enumerate(models.items()):
            self.tensors[role] = tensors(seed, rows)
            files = {} if added is None else added if isinstance(added, dict) else tokenizer(added)
            config = {**CONFIG, "vocab_size": rows}
            write_model(root / role, self.tensors[role], config=config, files=files)

    def pair(self) -> tuple[Path, Path]:
        return self.root / "instruct", self.root / "base"

    def plan(self, **rules: Any) -> Plan:
        found = ik.apply(self.root / "target", self.pair(), out=self.root / "none", dry_run=True, **rules)
        assert isinstance(found, Plan)
        return found

    def refused(self, **rules: Any) -> str:
        """What both ways say; nothing is written."""
        with pytest.raises(CheckpointError) as caught:
            ik.apply(self.root / "target", self.pair(), out=self.root / "none", **rules)
        if not (self.root / "residual").exists():
            ik.extract(self.root / "base", self.root / "instruct", self.root / "residual", sync=False)
        with pytest.raises(CheckpointError):
            ik.apply(self.root / "target", self.root / "residual", out=self.root / "none", **rules)
        assert not (self.root / "none").exists()
        return f"{caught.value}"

    def merged(self, *, in_place: bool = True, **rules: Any) -> Path:
        """The output, which is the same by way of a residual, in place and in memory."""
        target, residual = self.root / "target", self.root / "residual"
        ik.extract(self.root / "base", self.root / "instruct", residual, sync=False)
        ik.apply(target, self.pair(), out=self.root / "one", sync=False, **rules)
        ik.apply(target, residual, out=self.root / "two", sync=False, **rules)
        assert ik.verify(self.root / "one")
        assert ik.verify(self.root / "two")
        assert ik.verify(residual)
        one, two = (read_model(self.root / name) for name in ("one", "two"))
        assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-4) for name in one)
        loaded = ik.load(target, self.pair(), **rules)
        assert all(same(loaded[name], one[name]) for name in one)
        if in_place:
            ik.apply(target, self.pair(), in_place=True, sync=False, **rules)
            changed = read_model(target)
            assert all(same(changed[name], one[name]) for name in one)
        for name in ("config.json", "tokenizer.json"):
            files = [self.root / role / name for role in ("one", "two", *(["target"] if in_place else []))]
            assert len({file.read_bytes() if file.exists() else b"" for file in files}) == 1
        return self.root / "one"

    def check(self, out: Path, deeds: str, alpha: float = 1.0) -> None:
        """That rows are made as the letters say: + added to, i instruct's, t the target's."""
        found = read_model(out)
        for name in BY_TOKEN:
            t, i, b = (self.tensors[role][name] for role in ("target", "instruct", "base"))
            assert len(found[name]) == len(deeds)
            for row, deed in enumerate(deeds):
                if deed == "+":
                    wanted = t[row].double() + alpha * (i[row].double() - b[row].double())
                    assert same(found[name][row], wanted.to(torch.bfloat16)), (name, row)
                else:
                    assert same(found[name][row], {"i": i, "t": t}[deed][row]), (name, row)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_new_tokens_in_padded_rows_get_the_rows_of_instruct_whatever_alpha(tmp_path: Path, alpha: float) -> None:
    family = Family(tmp_path, base=(26, []), instruct=(26, CHAT), target=(26, []))
    family.check(family.merged(alpha=alpha), "+" * 20 + "ii" + "+" * 4, alpha)
    notes = ik.apply(tmp_path / "two", tmp_path / "residual", out=tmp_path / "none", dry_run=True).notes
    assert (
        "lm_head.bias, lm_head.weight, model.embed_tokens.weight: of 26 rows 24 are added to, 2 are taken" in notes[0]
    )
    assert "rows of the residual for its new tokens: 20 '<|im_start|>', 21 '<|im_end|>'" in notes


def test_a_slot_that_instruct_has_renamed(tmp_path: Path) -> None:
    slots = ["<|reserved_special_token_0|>", "<slot>"]
    family = Family(tmp_path, base=(24, slots), instruct=(24, CHAT), target=(24, slots))
    out = family.merged()
    family.check(out, "+" * 20 + "ii" + "++")
    assert "<|im_end|>" in (out / "tokenizer.json").read_text()


@pytest.mark.parametrize(("base", "instruct", "target"), [(24, 26, 30), (30, 24, 26), (26, 30, 24), (24, 24, 30)])
def test_other_padding_is_no_difference(tmp_path: Path, base: int, instruct: int, target: int) -> None:
    family = Family(tmp_path, base=(base, CHAT), instruct=(instruct, CHAT), target=(target, CHAT))
    least = min(base, instruct, target)
    family.check(family.merged(), "+" * least + "t" * (target - least))


def test_a_target_with_tokens_of_its_own(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(24, CHAT), instruct=(24, CHAT), target=(28, [*CHAT, "<news>", "<law>"]))
    tokens = (tmp_path / "target/tokenizer.json").read_bytes()
    out = family.merged()
    family.check(out, "+" * 22 + "t" * 6)
    assert (out / "tokenizer.json").read_bytes() == tokens


def test_a_target_that_has_learnt_the_tokens_of_instruct_as_well(tmp_path: Path) -> None:
    """Base's rows are noise all the same."""
    family = Family(tmp_path, base=(24, []), instruct=(24, CHAT), target=(24, [*CHAT, "<news>"]))
    family.check(family.merged(), "+" * 20 + "ii" + "t" + "+")


def test_a_target_without_the_rows_grows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family = Family(tmp_path, base=(20, []), instruct=(24, CHAT), target=(20, []))
    text = family.refused()
    assert (
        "instruct has 2 tokens for which the target, of 20 rows, has none: 20 '<|im_start|>', 21 '<|im_end|>'" in text
    )
    assert "--vocabulary instruct appends these rows" in text
    with pytest.raises(CheckpointError, match=r"is \[20\] in .* and would become \[24\].*-o OUT"):
        ik.apply(tmp_path / "target", family.pair(), in_place=True, vocabulary="instruct")
    (tmp_path / "residual").rename(tmp_path / "before")
    out = family.merged(in_place=False, vocabulary="instruct")
    family.check(out, "+" * 20 + "iiii")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 24
    arguments = ["apply", f"{tmp_path / 'target'}", f"{tmp_path / 'residual'}", "-o", f"{tmp_path / 'three'}"]
    assert main([*arguments, "--vocabulary", "instruct", "--no-sync"]) == 0
    assert "of 24 rows 20 are added to, 4 are taken from the residual" in capsys.readouterr().out
    assert json.loads((tmp_path / "three/ires.json").read_text())["rules"]["vocabulary"] == "instruct"


def test_a_target_without_the_rows_can_do_without_them(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(20, []), instruct=(24, CHAT), target=(20, []))
    tokens = (tmp_path / "target/tokenizer.json").read_bytes()
    out = family.merged(vocabulary="target")
    family.check(out, "+" * 20)
    assert (out / "tokenizer.json").read_bytes() == tokens


def test_rows_of_which_no_model_has_a_tokenizer(tmp_path: Path) -> None:
    """Ids are all that there is: each row that a model alone has is defined."""
    family = Family(tmp_path, base=(20, None), instruct=(24, None), target=(20, None))
    out = family.merged(in_place=False)
    family.check(out, "+" * 20 + "iiii")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 24


def test_tokens_of_both_at_the_same_ids(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(24, []), instruct=(24, CHAT), target=(24, ["<news>", "<law>", "<art>"]))
    text = family.refused()
    assert "20 is '<|im_start|>' in instruct, '<news>' in target; 21 is '<|im_end|>' in instruct, '<law>'" in text
    assert all(f"--vocabulary {way}" in text for way in ("target", "instruct", "rows"))
    for way, deeds in (("target", "ttt+"), ("instruct", "iit+"), ("rows", "++++")):
        out = tmp_path / f"by {way}"
        ik.apply(tmp_path / "target", family.pair(), out=out, vocabulary=way, sync=False)
        assert ik.verify(out)
        family.check(out, "+" * 20 + deeds)
        owner = "instruct" if way == "instruct" else "target"
        assert (out / "tokenizer.json").read_bytes() == (tmp_path / owner / "tokenizer.json").read_bytes()


def test_rows_by_number(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(22, []), instruct=(24, CHAT), target=(23, {"tokenizer.json": "{}"}))
    out = tmp_path / "out"
    ik.apply(tmp_path / "target", family.pair(), out=out, vocabulary="rows", sync=False)
    family.check(out, "+" * 22 + "t")
    ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / "residual", vocabulary="rows", sync=False)
    assert json.loads((tmp_path / "residual/residual.json").read_text())["own_rows"][HEAD] == [[22, 2]]


@pytest.mark.parametrize(
    ("models", "text"),
    [
        ({"base": (20, []), "instruct": (24, None), "target": (24, [])}, "instruct has 4 rows that base has not"),
        ({"base": (20, []), "instruct": (24, None), "target": (20, [])}, "instruct has 4 rows that base has not"),
        ({"base": (20, []), "instruct": (24, CHAT), "target": (24, None)}, "target has 4 rows that base has not"),
        ({"base": (20, None), "instruct": (24, None), "target": (24, None)}, "instruct has 4 rows that base has not"),
    ],
)
def test_a_missing_tokenizer_where_tokens_are_needed(tmp_path: Path, models: dict[str, Any], text: str) -> None:
    said = Family(tmp_path, **models).refused()
    assert text in said
    assert "no tokenizer says whose" in said
    assert "tokenizer.json into the folder of each model" in said


def changed(files: Mapping[str, str], **ids: int) -> dict[str, str]:
    """A tokenizer whose file gives added tokens other ids."""
    table = json.loads(files["tokenizer.json"])
    for token in table["added_tokens"]:
        token["id"] = ids.get(token["content"].strip("<|>"), token["id"])
    return {**files, "tokenizer.json": json.dumps(table)}


@pytest.mark.parametrize(
    ("instruct", "text"),
    [
        (changed(tokenizer(CHAT), im_end=20), r"'<\|im_end\|>' has the id 20, and loaders give it 21"),
        (changed(tokenizer(CHAT), im_start=21, im_end=20), r"'<\|im_start\|>' has the id 21, and loaders give it 20"),
        (changed(tokenizer(CHAT), im_end=25), r"'<\|im_end\|>' has the id 25, and loaders give it 21"),
        ({"tokenizer.json": "{"}, "tokens of instruct cannot be told"),
        ({"vocab.json": json.dumps({"w0": 0, "w1": 1, "w2": 1})}, "'w1' and 'w2' have one id, 1"),
        ({"bpe.codes": "x"}, "is no tokenizer whose tokens can be read"),
        (tokenizer(words=[f"w{i}" for i in range(40)]), "the tokenizer has 24 'w24', 25 'w25'.*has 24 rows"),
        (
            tokenizer(["<a>", "<b>", "<c>", "<d>", "<e>"], eos_token="<e>"),
            r"the chat template has 24 '<e>', and the embedding has 24 rows",
        ),
    ],
)
def test_tokenizers_that_fit_no_rows(tmp_path: Path, instruct: dict[str, str], text: str) -> None:
    family = Family(tmp_path, base=(24, []), instruct=(24, instruct), target=(24, []))
    with pytest.raises(CheckpointError, match=text):
        family.plan()
    with pytest.raises(CheckpointError):
        ik.apply(tmp_path / "target", family.pair(), in_place=True)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_beyond_the_rows(tmp_path: Path, file: str) -> None:
    family = Family(tmp_path, base=(24, CHAT), instruct=(24, CHAT), target=(24, CHAT))
    for role in ("instruct", "target"):
        (tmp_path / role / file).write_text(json.dumps({**CONFIG, "eos_token_id": [1, 24]}))
    text = family.refused()
    assert f"eos_token_id of {file} is 24, and the embedding has 24 rows" in text


# --- the same tokens in another order


def shuffled(family: Family, role: str, order: Sequence[int], added: Sequence[str] = ()) -> None:
    """Write a model again with its rows, and the words of its tokenizer, in another order."""
    made = {n: t[list(order)].contiguous() if n in BY_TOKEN else t for n, t in family.tensors[role].items()}
    files = tokenizer(added, [WORDS[i] for i in order if i < len(WORDS)])
    write_model(family.root / f"{role} again", made, config={**CONFIG, "vocab_size": len(order)}, files=files)
    (family.root / role).rename(family.root / f"{role} before")
    (family.root / f"{role} again").rename(family.root / role)


ORDER = [*range(10, 20), *range(9, -1, -1), 20, 21]


@pytest.mark.parametrize("role", ["target", "instruct", "base"])
def test_a_vocabulary_in_another_order_is_merged_by_token(tmp_path: Path, role: str) -> None:
    family = Family(tmp_path, base=(22, CHAT), instruct=(22, CHAT), target=(22, CHAT))
    plain = read_model(family.merged(in_place=False))
    for name in ("one", "two", "residual"):
        (tmp_path / name).rename(tmp_path / f"plain {name}")
    shuffled(family, role, ORDER, CHAT)
    tokens = (tmp_path / "target/tokenizer.json").read_bytes()
    found = read_model(family.merged())
    for name in BY_TOKEN:
        wanted = plain[name][ORDER] if role == "target" else plain[name]
        assert same(found[name], wanted)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == tokens
