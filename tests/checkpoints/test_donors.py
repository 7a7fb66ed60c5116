"""Whose tokenizer, chat template, generation settings and processors a merged model gets, and where it stops."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_models import triple
from tokenizers import Tokenizer, models

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import Rules

CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
WORDS = [f"w{i}" for i in range(34)]
CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def write(folder: Path, **files: object) -> None:
    """Files of a folder; `__` in a name is a dot."""
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))


def tokenizer(folder: Path, *added: str, words: list[str] = WORDS, **settings: object) -> None:
    """A tokenizer of words with tokens added, and its settings."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made.add_special_tokens(list(added))
    made.save(f"{folder / 'tokenizer.json'}")
    write(folder, tokenizer_config__json={"tokenizer_class": "PreTrainedTokenizerFast"} | settings)


def one_pass(base: Path, instruct: Path, target: Path, **rules: Any) -> Plan:
    inputs = {"target": target, "instruct": instruct, "base": base}
    return plan_apply({role: open_checkpoint(path) for role, path in inputs.items()}, Rules.of(1, **rules))


def owners(plan: Plan) -> dict[str, str]:
    return {file.name: file.role for file in plan.side_files}


def outputs(base: Path, instruct: Path, target: Path, **rules: Any) -> list[Path]:
    """The same merge in one pass, by way of a residual, and in place."""
    folder = base.parent
    ik.extract(base, instruct, folder / "residual", sync=False)
    ik.apply(target, (instruct, base), out=folder / "one", sync=False, **rules)
    ik.apply(target, folder / "residual", out=folder / "two", sync=False, **rules)
    assert ik.verify(folder / "one")
    assert ik.verify(folder / "two")
    ik.apply(target, (instruct, base), in_place=True, sync=False, **rules)
    return [folder / "one", folder / "two", target]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def stops(folder: Path) -> Any:
    """The ids at which transformers stops."""
    path = folder / "generation_config.json"
    return read(path if path.exists() else folder / "config.json").get("eos_token_id")


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    ],
)  # fmt: skip
def test_base_gives_nothing(tmp_path: Path, name: str) -> None:
    base, instruct, target = triple(tmp_path)
    write(base, **{name: "{}"})
    assert owners(one_pass(base, instruct, target)) == {"config.json": "target"}
    write(target, **{name: "{ }"})
    assert owners(one_pass(base, instruct, target))[name] == "target"
    for out in outputs(base, instruct, target):
        assert (out / name).read_text() == "{ }"


def test_that_base_alone_has_a_tokenizer_is_said(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    tokenizer(base)
    assert "that of base is not taken" in one_pass(base, instruct, target).warnings[0]


@pytest.mark.parametrize(
    "name",
    [
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "processing_x.py",
        "image_processing_x.py", "feature_extraction_x.py", "image_processor_config.json", "video_processor.json",
    ],
)  # fmt: skip
def test_processors_come_along(tmp_path: Path, name: str) -> None:
    base, instruct, target = triple(tmp_path)
    write(instruct, **{name: "{}"})
    assert owners(one_pass(base, instruct, target))[name] == "instruct"
    write(target, **{name: "{ }"})
    assert owners(one_pass(base, instruct, target))[name] == "instruct"
    for out in outputs(base, instruct, target):
        assert (out / name).read_text() == "{}"


def test_plan_and_report_say_whose_and_why(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    tokenizer(instruct)
    write(target, generation_config__json={"temperature": 0.5})
    report = ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    for said in (f"{one_pass(base, instruct, target)}", f"{report}"):
        assert re.search(r"from instruct +tokenizer.json, tokenizer_config.json\n", said)
        assert re.search(r"from target +config.json\n", said)
        assert re.search(r"from target +generation_config.json \(not in instruct\)$", said, re.MULTILINE)
    for table in (one_pass(base, instruct, target).to_dict(), report.to_dict()):
        assert table["side_files"]["generation_config.json"] == "target"
        assert table["side_files_why"] == {"generation_config.json": "not in instruct"}


# --- where a turn ends


@pytest.mark.parametrize("eos", [5, [5, 6]])
@pytest.mark.parametrize("where", ["config.json", "text_config"])
@pytest.mark.parametrize("own", [None, {"eos_token_id": 3, "temperature": 0.7, "_from_model_config": True}])
def test_the_end_of_turn_is_that_of_the_config_of_instruct(tmp_path: Path, eos: Any, where: str, own: Any) -> None:
    base, instruct, target = triple(tmp_path, config={**CONFIG, "eos_token_id": 3})
    ids = {"eos_token_id": eos, "pad_token_id": 4}
    write(instruct, config__json=CONFIG | (ids if where == "config.json" else {where: ids}))
    if own is not None:
        write(target, generation_config__json=own)
    text = f"{one_pass(base, instruct, target)}"
    assert "eos_token_id of the config.json of instruct" in text
    for out in outputs(base, instruct, target):
        assert stops(out) == eos
        wanted = {"eos_token_id": eos, "pad_token_id": 4} | ({"temperature": 0.7} if own else {})
        assert read(out / "generation_config.json") == wanted
        assert read(out / "config.json")["eos_token_id"] == 3, "of the target"


def test_a_generation_config_that_names_no_end(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, config={**CONFIG, "eos_token_id": 3})
    write(instruct, config__json=CONFIG | {"eos_token_id": 5}, generation_config__json={"top_p": 0.5})
    write(target, generation_config__json={"eos_token_id": 3})
    for out in outputs(base, instruct, target):
        assert read(out / "generation_config.json") == {"top_p": 0.5, "eos_token_id": 5}


def test_models_that_agree_get_no_new_file(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, config={**CONFIG, "eos_token_id": 3})
    assert owners(one_pass(base, instruct, target)) == {"config.json": "target"}
    write(instruct, generation_config__json={"eos_token_id": [5, 3]})
    for out in outputs(base, instruct, target):
        assert (out / "generation_config.json").read_bytes() == (instruct / "generation_config.json").read_bytes()


@pytest.mark.parametrize(
    ("generation", "config", "eos", "template", "said"),
    [
        ([34, 35], 35, "<|im_end|>", CHAT, ""),
        (35, 34, "<|im_end|>", CHAT, "generation_config.json 35 '<|im_end|>'; config.json 34 '<|im_start|>'"),
        (33, 33, "<|im_end|>", None, "config.json 33 'w33'; the tokenizer 35 '<|im_end|>'"),
        (33, 33, None, CHAT, "the chat template has 34 '<|im_start|>', 35 '<|im_end|>'"),
        (33, 33, "w33", "{{ m }}{{ eos_token }}", ""),
        (35, 35, "<|im_end|>", "{{ m }}{{ eos_token }}", ""),
        (None, 33, "<|im_end|>", None, "config.json 33 'w33'; the tokenizer 35 '<|im_end|>'"),
        (33, 33, "<gone>", None, "the tokenizer 36 '<gone>'"),
        (35, None, "<|im_end|>", "{{ messages }}", ""),
        (None, None, "<|im_end|>", CHAT, ""),
    ],
)
def test_files_that_do_not_agree_how_a_turn_ends(
    tmp_path: Path, generation: Any, config: Any, eos: str | None, template: str | None, said: str
) -> None:
    base, instruct, target = triple(tmp_path, config={**CONFIG, "eos_token_id": config})
    settings = ({"eos_token": eos} if eos else {}) | ({"chat_template": template} if template else {})
    tokenizer(instruct, "<|im_start|>", "<|im_end|>", **settings)
    if generation is not None:
        write(instruct, generation_config__json={"eos_token_id": generation})
    warnings = one_pass(base, instruct, target).warnings
    assert [said in text for text in warnings] == ([True] if said else [])
    if said:
        assert "do not agree how a turn ends" in warnings[0]


# --- tokens of the target's own


def test_a_target_with_tokens_of_its_own_keeps_its_tokenizer(tmp_path: Path) -> None:
    """The rows that instruct uses for its marks: they mean something else in the target."""
    base, instruct, target = triple(tmp_path)
    tokenizer(base)
    tokenizer(instruct, "<|im_start|>", "<|im_end|>", eos_token="<|im_end|>", chat_template=CHAT)
    write(instruct, generation_config__json={"eos_token_id": 35})
    tokenizer(target, *(f"<news {i}>" for i in range(12)))
    write(target, generation_config__json={"eos_token_id": 33}, preprocessor_config__json="{}")
    write(instruct, preprocessor_config__json="{ }")
    kept = {path.name: path.read_bytes() for path in target.glob("*.json")}
    with pytest.raises(CheckpointError, match=r"added other tokens at the same ids: 34 is '<.im_start.>'"):
        one_pass(base, instruct, target)
    plan = one_pass(base, instruct, target, vocabulary="rows")
    assert set(owners(plan).values()) == {"target"}
    (warning,) = (text for text in plan.warnings if "keeps its tokenizer" in text)
    assert "lacks 12 of its tokens" in warning
    assert (
        "34 '<news 0>' ('<|im_start|>' in instruct), 35 '<news 1>' ('<|im_end|>' in instruct), 36 '<news 2>'" in warning
    )
    assert warning.count("<news") == 10
    assert "and 2 more" in warning
    for out in outputs(base, instruct, target, vocabulary="target"):
        assert {name: (out / name).read_bytes() for name in kept if name != "ires.json"} == kept
        assert not (out / "chat_template.jinja").exists()


@pytest.mark.parametrize("inside", [True, False])
def test_chat_template_and_end_come_along_where_their_tokens_are_the_same(tmp_path: Path, inside: bool) -> None:
    """A family whose base has the marks already, and a target that was trained with one more token."""
    base, instruct, target = triple(tmp_path)
    marks = ("<|im_start|>", "<|im_end|>")
    template: dict[str, Any] = {"chat_template": [{"name": "default", "template": CHAT}]} if inside else {}
    tokenizer(base, *marks, eos_token="w33")
    tokenizer(instruct, *marks, eos_token="<|im_end|>", **template)
    if not inside:
        write(instruct, chat_template__jinja=CHAT)
    write(instruct, generation_config__json={"eos_token_id": [35, 33]})
    tokenizer(target, *marks, "<news>", eos_token="w33")
    write(target, generation_config__json={"eos_token_id": 33}, chat_template__jinja="old")
    tokens = (target / "tokenizer.json").read_bytes()
    for out in outputs(base, instruct, target):
        assert (out / "tokenizer.json").read_bytes() == tokens
        assert (out / "chat_template.jinja").read_text() == CHAT
        assert stops(out) == [35, 33]


def test_a_renamed_free_row_is_no_loss(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    tokenizer(base, "<|reserved_special_token_0|>", "<|slot|>")
    tokenizer(target, "<|reserved_special_token_0|>", "<|slot|>")
    tokenizer(instruct, "<|im_start|>", "<|im_end|>", eos_token="<|im_end|>")
    tokens = (instruct / "tokenizer.json").read_bytes()
    for out in outputs(base, instruct, target):
        assert (out / "tokenizer.json").read_bytes() == tokens


@pytest.mark.parametrize("words", [[f"z{i}" for i in range(34)], WORDS[::-1]])
def test_another_tokenizer_of_the_same_size(tmp_path: Path, words: list[str]) -> None:
    base, instruct, target = triple(tmp_path)
    tokenizer(base)
    tokenizer(instruct)
    tokenizer(target, words=words)
    tokens = (target / "tokenizer.json").read_bytes()
    with pytest.raises(CheckpointError, match="34 of 34 tokens are at other ids"):
        one_pass(base, instruct, target)
    plan = one_pass(base, instruct, target, vocabulary="rows")
    assert "keeps its tokenizer, for that of instruct lacks 34" in plan.warnings[0]
    for out in outputs(base, instruct, target, vocabulary="rows"):
        assert (out / "tokenizer.json").read_bytes() == tokens


def test_settings_without_a_vocabulary_do_not_replace_one(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    write(instruct, tokenizer_config__json={"chat_template": "x"})
    tokenizer(target)
    plan = one_pass(base, instruct, target)
    assert "no vocabulary: the target keeps its tokenizer" in plan.warnings[0]
    assert owners(plan)["tokenizer.json"] == "target"


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    tokenizer(target)
    write(instruct, tokenizer__json="{}")
    with pytest.raises(CheckpointError, match=r"tokens of instruct cannot be told: .*instruct/tokenizer.json"):
        one_pass(base, instruct, target)
    plan = one_pass(base, instruct, target, vocabulary="rows")
    assert re.search("tokens of target and instruct cannot be compared, .*instruct/tokenizer.json", plan.warnings[0])
    write(target, tokenizer__json="{}")
    assert not one_pass(base, instruct, target).warnings, "the same bytes"


def test_the_template_of_the_target_stays_where_instruct_has_none(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    tokenizer(instruct)
    tokenizer(target, chat_template="{{ mine }}")
    for out in outputs(base, instruct, target):
        assert (out / "chat_template.jinja").read_text() == "{{ mine }}"


def test_a_template_inside_of_a_tokenizer_comes_with_it(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    tokenizer(instruct, chat_template="{{ theirs }}")
    tokenizer(target)
    write(target, chat_template__jinja="{{ mine }}")
    for out in outputs(base, instruct, target):
        assert not (out / "chat_template.jinja").exists(), "it would override the other"
        assert read(out / "tokenizer_config.json")["chat_template"] == "{{ theirs }}"


def test_what_is_made_is_no_more_open_than_what_it_is_made_of(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, config={**CONFIG, "eos_token_id": 3})
    write(instruct, config__json=CONFIG | {"eos_token_id": 5})
    (instruct / "config.json").chmod(0o600)
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    assert (tmp_path / "out/generation_config.json").stat().st_mode & 0o077 == 0


def test_a_template_of_any_size_is_looked_at_or_not_in_no_time(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    tokenizer(instruct, *(f"<{i}>" for i in range(20_000)), eos_token="w1", chat_template="<x>" * 1_000_000)
    write(instruct, generation_config__json={"eos_token_id": 1})
    assert not one_pass(base, instruct, target).warnings


def test_a_single_file_gets_no_side_files_in_place(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    tokenizer(instruct)
    file = target / "model.safetensors"
    plan = ik.apply(file, (instruct, base), in_place=True, dry_run=True)
    report = ik.apply(file, (instruct, base), in_place=True, sync=False)
    assert plan.to_dict()["side_files"] == report.to_dict()["side_files"] == {}
    assert "tokenizer.json" not in f"{plan}{report}"
    assert not (target / "tokenizer.json").exists()


def test_what_came_in_place_is_told_after_a_resume_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ires_kernels.in_place import finish

    base, instruct, target = triple(tmp_path)
    tokenizer(base)
    tokenizer(instruct, "<|im_start|>")
    tokenizer(target, "<news>")
    write(instruct, preprocessor_config__json="{}")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "_write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ik.apply(target, (instruct, base), in_place=True, sync=False, vocabulary="rows")
    report = ik.resume(target)
    assert report.side_files == {"preprocessor_config.json": "instruct"}
    assert [text for text in report.warnings if "keeps its tokenizer" in text]
