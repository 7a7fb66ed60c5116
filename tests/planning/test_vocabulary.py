"""Rows by token: which rows of embeddings and heads are added to, taken from instruct, or kept, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_models import Tensors, normal, read_model, same, write_model
from tokenizers import Tokenizer, models

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.cli import main
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rows import Donor, of_merge
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.records.report import Report

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
    slots = ["<|reserved_special_token_0|>", "<slot>", "<slot 2>"]
    family = Family(tmp_path, base=(24, slots), instruct=(24, [*CHAT, "<|tool|>"]), target=(24, slots))
    out = family.merged()
    family.check(out, "+" * 20 + "iii" + "+")
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


def test_what_is_left_out_and_lost_is_said(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(24, []), instruct=(24, CHAT), target=(24, ["<news>"]))
    assert "tokens of instruct that are left out: 20 '<|im_start|>', 21" in family.plan(vocabulary="target").notes[-1]
    (warning,) = (text for text in family.plan(vocabulary="instruct").warnings if "lost" in text)
    assert "1 tokens of the target are lost" in warning
    assert "20 '<news>' ('<|im_start|>' in instruct)" in warning
    (tmp_path / "instruct/tokenizer.json").write_text("{")
    for way in ("target", "instruct"):
        with pytest.raises(CheckpointError, match="tokens of instruct cannot be told"):
            family.plan(vocabulary=way)


def test_a_codebook_has_no_tokens(tmp_path: Path) -> None:
    """Whatever it is called: it has not as many rows as config.json says."""
    family = Family(tmp_path, base=(24, []), instruct=(24, CHAT), target=(24, []))
    for role in ("base", "instruct", "target"):
        made = family.tensors[role] | {"audio.embedding.weight": family.tensors[role][HEAD][:22].clone()}
        save_file(made, tmp_path / role / "model.safetensors", {"format": "pt"})
    made_by = {step.name: step.op for step in family.plan().steps if step.is_whole}
    assert made_by == {"audio.embedding.weight": "add_difference", MLP: "add_difference"}


def test_rows_by_number(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(22, []), instruct=(24, CHAT), target=(23, {"tokenizer.json": "{}"}))
    out = tmp_path / "out"
    ik.apply(tmp_path / "target", family.pair(), out=out, vocabulary="rows", sync=False)
    family.check(out, "+" * 22 + "t")
    ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / "residual", vocabulary="rows", sync=False)
    assert json.loads((tmp_path / "residual/residual.json").read_text())["by_token"][HEAD] == {
        "base": 22,
        "own": [[22, 2]],
    }


def test_tokens_in_the_last_rows_of_base_need_no_tokenizer_of_the_target(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(22, []), instruct=(22, CHAT), target=(22, None))
    out = family.merged()
    family.check(out, "+" * 20 + "ii")
    assert "<|im_end|>" in (out / "tokenizer.json").read_text()


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


def test_ids_beyond_the_rows(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(24, CHAT), instruct=(24, CHAT), target=(24, CHAT))
    (tmp_path / "instruct/generation_config.json").write_text(json.dumps({"eos_token_id": [1, 24]}))
    text = family.refused()
    assert "eos_token_id of generation_config.json is 24, and the embedding has 24 rows" in text
    (tmp_path / "target/config.json").write_text(json.dumps({**CONFIG, "pad_token_id": 24}))
    assert "eos_token_id of generation_config.json is 24, and the embedding has 24 rows" in family.plan().warnings


def test_ids_that_rows_by_number_leave_without_rows(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(22, []), instruct=(24, CHAT), target=(22, []))
    (tmp_path / "instruct/generation_config.json").write_text(json.dumps({"eos_token_id": 23}))
    assert "--vocabulary target" in family.refused(vocabulary="rows")
    family.check(family.merged(vocabulary="target"), "+" * 20 + "tt")


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


def test_another_order_brings_the_template_and_the_ids_of_its_tokens(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(22, CHAT), instruct=(22, CHAT), target=(22, CHAT))
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "instruct/chat_template.jinja").write_text(template)
    (tmp_path / "instruct/generation_config.json").write_text(json.dumps({"eos_token_id": [21, 3], "top_k": 4}))
    shuffled(family, "target", [*ORDER[:20], 21, 20], CHAT[::-1])
    out = family.merged()
    assert (out / "chat_template.jinja").read_text() == template
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [20, 16], "top_k": 4}


def test_values_that_deny_another_order(tmp_path: Path) -> None:
    """The tokenizer lies: the rows are where those of base are."""
    files = tokenizer(CHAT, [WORDS[i] for i in ORDER[:20]])
    family = Family(tmp_path, base=(22, CHAT), instruct=(22, CHAT), target=(22, files))
    text = family.refused()
    assert "target has another tokenizer than instruct: 20 of 20 tokens are at other ids, 0 'w0', 1 'w1'" in text
    assert re.search(r"rows of one token have a cosine of -?0\.\d\d", text)
    assert "--skip" in text
    plan = family.plan(trust_names=True)
    assert [step.op for step in plan.steps if step.name == HEAD] == ["add_difference"], "by the texts, then"
    out = tmp_path / "out"
    skip = re.search(r"--skip '(.*)'", text)
    assert skip
    report = ik.apply(tmp_path / "target", family.pair(), out=out, skip=skip[1], sync=False)
    assert isinstance(report, Report)
    assert report.copied.keys() == set(BY_TOKEN)
    assert (out / "tokenizer.json").read_text() == files["tokenizer.json"]


def test_another_order_with_tokens_that_the_target_lacks(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(20, []), instruct=(22, CHAT), target=(20, []))
    shuffled(family, "target", ORDER[:20])
    text = family.refused()
    assert "in another order than instruct and base, and lacks tokens of instruct: 20 '<|im_start|>'" in text
    assert "does not fit its rows" in family.refused(vocabulary="instruct")
    ik.apply(tmp_path / "target", family.pair(), out=tmp_path / "one", vocabulary="target", sync=False)
    found = read_model(tmp_path / "one")
    t, i, b = (family.tensors[role][HEAD].double() for role in ("target", "instruct", "base"))
    assert same(found[HEAD], (t + i[:20] - b).to(torch.bfloat16)[ORDER[:20]])


# --- other names


META = {EMBEDDING: "tok_embeddings.weight", HEAD: "output.weight", BIAS: "output.bias", MLP: "layers.0.mlp.weight"}


@pytest.mark.parametrize("roles", [("target",), ("instruct", "base"), ("base",)])
@pytest.mark.parametrize("words", ["prefix", "Meta"])
def test_other_names_and_other_rows_at_once(tmp_path: Path, roles: tuple[str, ...], words: str) -> None:
    family = Family(tmp_path, base=(22, []), instruct=(24, CHAT), target=(26, []))
    for role in roles:
        made = {
            META[name] if words == "Meta" else f"language_model.{name}": t for name, t in family.tensors[role].items()
        }
        save_file(made, tmp_path / role / "model.safetensors", {"format": "pt"})
    out = family.merged()
    found = {
        next((own for own, other in META.items() if name in (other, f"language_model.{own}")), name): t
        for name, t in read_model(out).items()
    }
    save_file(found, out / "model.safetensors", {"format": "pt"})
    family.check(out, "+" * 20 + "ii" + "tttt")


# --- heads, configs, several residuals


@pytest.mark.parametrize("target_is_tied", [True, False])
def test_tied_heads_grow_as_well(tmp_path: Path, target_is_tied: bool) -> None:
    """Sources that have one tensor for both; the target too, or one for each."""
    made = {}
    for seed, (role, rows, added) in enumerate((("base", 20, []), ("instruct", 22, CHAT), ("target", 20, []))):
        made[role] = {name: t for name, t in tensors(seed, rows).items() if name in (EMBEDDING, MLP)}
        tied = role != "target" or target_is_tied
        own = made[role] if tied else made[role] | {HEAD: tensors(9, rows)[EMBEDDING]}
        config = {**CONFIG, "tie_word_embeddings": tied, "text_config": {"vocab_size": rows, "bos_token_id": 2}}
        if role == "instruct":
            config |= {"bos_token_id": 3, "eos_token_id": 21}
        write_model(tmp_path / role, own, config=config, files=tokenizer(added))
        made[role] = own
    pair = (tmp_path / "instruct", tmp_path / "base")
    ik.apply(tmp_path / "target", pair, out=tmp_path / "out", vocabulary="instruct", sync=False)
    assert ik.verify(tmp_path / "out")
    found = read_model(tmp_path / "out")
    assert found.keys() == made["target"].keys()
    i, b = made["instruct"][EMBEDDING], made["base"][EMBEDDING]
    for name in found.keys() - {MLP}:
        wanted = (made["target"][name].double() + i[:20].double() - b.double()).to(torch.bfloat16)
        assert same(found[name], torch.cat([wanted, i[20:]]))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["text_config"] == {"vocab_size": 22, "bos_token_id": 3}
    assert config["eos_token_id"] == 21
    assert config["bos_token_id" if "bos_token_id" in config else "eos_token_id"] in (3, 21)


def test_several_pairs_bring_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of new tokens are those of the first model that has them, and the tokenizer is the one that has them all."""
    monkeypatch.chdir(tmp_path)
    models = {"base": (20, []), "instruct": (22, CHAT), "target": (20, []), "code": (20, []), "other": (21, ["<a>"])}
    made = Family(tmp_path, **models).tensors
    pairs = [("code", "base"), ("instruct", "base")]
    report = ik.apply("target", pairs, out="out", alpha=[0.5, 0.25], vocabulary="instruct", sync=False)
    found, t, b = read_model(tmp_path / "out")[HEAD], made["target"][HEAD].float(), made["base"][HEAD].float()
    code, chat = made["code"][HEAD].float(), made["instruct"][HEAD].float()
    assert same(found[:20], (t + 0.5 * (code - b) + 0.25 * (chat[:20] - b)).to(torch.bfloat16))
    assert same(found[20:], made["instruct"][HEAD][20:])
    assert (tmp_path / "out/tokenizer.json").read_text() == (tmp_path / "instruct/tokenizer.json").read_text()
    assert ik.verify("out")
    pairs = [("instruct", "base"), ("other", "base")]
    with pytest.raises(CheckpointError, match=r"20 is '<a>' in instruct-2, '<\|im_start\|>' in instruct-1"):
        ik.apply("target", pairs, out="refused")
    report = ik.apply("target", pairs, out="first", vocabulary="instruct", sync=False)
    assert isinstance(report, Report)
    assert "rows of instruct for its new tokens: 20 '<|im_start|>', 21 '<|im_end|>'" in report.notes
    assert same(read_model(tmp_path / "first")[HEAD][20:], made["instruct"][HEAD][20:])


def test_several_residuals_bring_tokens(tmp_path: Path) -> None:
    first = Family(tmp_path, base=(24, []), instruct=(24, CHAT), target=(24, []))
    again = Family(tmp_path / "again", base=(24, []), instruct=(24, ["<a>"]), target=(24, []))
    later = Family(tmp_path / "later", base=(24, []), instruct=(24, [*CHAT, "<tool>"]), target=(24, []))
    for family in (first, again, later):
        ik.extract(family.root / "base", family.root / "instruct", family.root / "residual", sync=False)
    both = [tmp_path / "residual", tmp_path / "again/residual"]
    with pytest.raises(CheckpointError, match=r"20 is '<a>' in residual-2, '<\|im_start\|>' in residual-1"):
        ik.apply(tmp_path / "target", both, out=tmp_path / "out")
    ik.apply(tmp_path / "target", both, out=tmp_path / "kept", vocabulary="target", alpha=[1, 0.5], sync=False)
    ik.apply(
        tmp_path / "target", [both[0], tmp_path / "later/residual"], out=tmp_path / "out", alpha=[1, 0.5], sync=False
    )
    found = read_model(tmp_path / "out")[HEAD]
    t, i, b, two = (first.tensors[r][HEAD] for r in ("target", "instruct", "base", "instruct"))
    assert same(found[20:22], i[20:22])
    assert same(found[22], later.tensors["instruct"][HEAD][22])
    wanted = t[:20].double() + i[:20].double() - b[:20].double() + 0.5 * (two[:20].double() - b[:20].double())
    assert torch.allclose(found[:20].double(), wanted, atol=1e-3)
    assert same(read_model(tmp_path / "kept")[HEAD][20], t[20])


def test_a_head_that_is_left_out_cannot_stay_smaller(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(20, []), instruct=(24, CHAT), target=(20, []))
    with pytest.raises(CheckpointError, match=r"the embeddings get 24 rows, and lm_head\.weight would not"):
        family.plan(vocabulary="instruct", skip="lm_head.weight")


@pytest.mark.parametrize("rows", [[[18, 9]], [[21, 1], [20, 1]], [[20, 0]], [[-1, 2]], [[20]], {"20": 1}])
def test_own_rows_that_somebody_made_up(tmp_path: Path, rows: object) -> None:
    family = Family(tmp_path, base=(24, []), instruct=(24, CHAT), target=(24, []))
    ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / "residual", sync=False)
    path = tmp_path / "residual/residual.json"
    manifest = json.loads(path.read_text())
    assert manifest["by_token"] == {name: {"base": 24, "own": [[20, 2]]} for name in BY_TOKEN}
    path.write_text(json.dumps(manifest | {"by_token": {HEAD: {"base": 24, "own": rows}}}))
    with pytest.raises(CheckpointError, match=r"residual\.json: .*by_token"):
        ik.apply(family.root / "target", tmp_path / "residual", out=tmp_path / "out")


def test_a_resumed_merge_keeps_its_rule(tmp_path: Path) -> None:
    family = Family(tmp_path, base=(24, []), instruct=(24, CHAT), target=(24, ["<news>"]))

    def give_up(*_: int) -> None:
        raise KeyboardInterrupt

    for rules in ({"out": tmp_path / "out"}, {"in_place": True}):
        with pytest.raises(KeyboardInterrupt):
            ik.apply(tmp_path / "target", family.pair(), vocabulary="target", progress=give_up, sync=False, **rules)
        place = rules.get("out", tmp_path / "target")
        assert isinstance(place, Path)
        ik.resume(place)
        family.check(place, "+" * 20 + "tt++")


def test_extract_knows_no_target(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match='extract takes "rows" alone'):
        ik.extract(tmp_path / "a", tmp_path / "b", tmp_path / "c", vocabulary="target")
    with pytest.raises(ArgumentError, match="wanted one of target, instruct, rows"):
        Rules.of(vocabulary="base")


# --- against a plain loop over the rows


@settings(max_examples=200, deadline=None)
@given(
    counts=st.fixed_dictionaries({role: st.integers(1, 9) for role in ("target", "instruct", "base")}),
    new=st.dictionaries(st.integers(0, 8), st.just("x"), max_size=3),
    lost=st.sets(st.integers(0, 8), max_size=3),
    further=st.booleans(),
)
def test_rows_one_by_one(counts: dict[str, int], new: dict[int, str], lost: set[int], further: bool) -> None:
    new = {row: token for row, token in new.items() if row < counts["instruct"]}
    apart = {*new, *range(counts["base"], counts["instruct"])}
    rows = max(counts["target"], counts["instruct"]) if further else counts["target"]
    found = of_merge(
        counts, [Donor("instruct", counts["instruct"], counts["base"], new, apart, lost, "base")], rows, {}
    )
    made: list[tuple[str, dict[str, int]]] = []
    for piece in found.pieces:
        each = {role: [r for first, n in runs for r in range(first, first + n)] for role, runs in piece.rows.items()}
        assert all(len(places) == piece.count for places in each.values())
        assert piece.first == len(made)
        made += [(piece.deed, {role: places[i] for role, places in each.items()}) for i in range(piece.count)]
    for row, done in enumerate(made):
        own = row < counts["target"]
        there = row < counts["instruct"] and not (own and row in lost)
        if there and (row in new or not own):
            assert done == ("taken", {"instruct": row})
        elif there and row < counts["base"]:
            assert done == ("added", {"target": row, "instruct": row, "base": row})
        else:
            assert done == ("kept", {"target": row})
    assert len(made) == rows


def test_rows_that_nobody_has_trained_speak_against_no_head(tmp_path: Path) -> None:
    """Of one name and shape in all models, where the last rows are noise, each model's own."""
    made = {
        "tok_embeddings.weight": normal((64, 64), 1),
        "output.weight": normal((64, 64), 2),
        "w": normal((64, 64), 3),
    }
    for seed, role in enumerate(("base", "instruct", "target")):
        own = {name: t + normal(t.shape, 50 * seed, scale=1e-3) for name, t in made.items()}
        own["output.weight"][56:] = normal((8, 64), 7 + seed)
        write_model(tmp_path / role, own, config={"vocab_size": 64, "tie_word_embeddings": False})
    plan = ik.apply(tmp_path / "target", (tmp_path / "instruct", tmp_path / "base"), out=tmp_path / "o", dry_run=True)
    assert isinstance(plan, Plan)
    assert {step.op for step in plan.steps} == {"add_difference"}
    assert not plan.warnings
