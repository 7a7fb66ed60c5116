"""The example examples/continual: its worlds repeat, its models train, and its shipped family shows the claim."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ires_kernels as ik
from ires_kernels.planning.ancestry import Ancestry
from ires_kernels.planning.plan import Plan

CONTINUAL = Path(__file__).parent.parent / "examples" / "continual"
FAMILY = CONTINUAL / "family"
sys.path.append(f"{CONTINUAL}")

import evaluate  # noqa: E402
import ship  # noqa: E402
import train  # noqa: E402
import world  # noqa: E402


def test_a_world_is_the_same_every_time() -> None:
    one, two = world.World(0), world.World(0)
    assert one.facts("A") == two.facts("A")
    assert one.tokenizer.to_str() == two.tokenizer.to_str()
    rows = [world.Texts(w, w.facts("B"), "plain", np.random.default_rng(1)).rows(8) for w in (one, two)]
    assert (rows[0] == rows[1]).all()
    chats = [world.tuning_chats(w, np.random.default_rng(1), 9) for w in (one, two)]
    assert chats[0] == chats[1]
    assert world.World(1).facts("B") != one.facts("B")


@pytest.mark.parametrize("number", [0, 1])
def test_what_models_are_tuned_on_has_nothing_of_the_test(number: int) -> None:
    w = world.World(number)
    news = {fact.name for fact in w.facts("B")}
    others = {fact.name for fact in w.facts("not in chats")}
    assert len(news) == 32
    assert not news & {fact.name for fact in w.facts("A")}
    for chat in world.tuning_chats(w, np.random.default_rng(0), 2000):
        assert chat.fact.name not in news | others
        assert chat.format not in world.HELD_OUT
    assert {chat.format for chat in world.test_chats(w, "B", 6)} == set(world.FORMATS)


@pytest.mark.parametrize("number", [0, 1])
def test_every_word_has_a_token(number: int) -> None:
    w = world.World(number)
    unknown = w.ids("no such word")
    assert len(set(unknown)) == 1
    for fact in w.facts("A") + w.facts("B"):
        for template in world.PLAIN + world.REGISTRY:
            assert unknown[0] not in w.ids(fact.state(template))
        assert len(w.ids(fact.name)) == 2
    for chat in world.test_chats(w, "B", 6):
        assert unknown[0] not in w.prompt(chat.question)
        assert w.tokenizer.decode(w.ids(chat.answer())) == chat.answer(), "answers are compared as text"
    for ids, value, choices in world.clozes(w, "B"):
        assert value in choices
        assert len(set(choices)) == 16
        assert value not in ids


def test_scores_of_an_answer() -> None:
    fact = world.World(0).facts("B")[0]
    wrong = next(value for value in fact.attribute.values if value != fact.value)
    chat = world.Chat.of(fact, ("upper", "quote"), 0)
    assert chat.question.endswith("in upper case . put it in quotes .")
    right = f'" {fact.value.upper()} "'
    assert chat.answer() == right
    for answer, follows, knows in (
        (right, True, True),
        (f'" {wrong.upper()} "', True, False),
        (f'" {fact.value} "', False, True),
        (f"{right} {right}", False, True),
        (f'" {fact.value.upper()} {wrong.upper()} "', False, False),
        (f"{right} …", False, True),
        ("", False, False),
    ):
        assert evaluate.follows_format(chat, answer) is follows, answer
        assert evaluate.knows(chat, answer) is knows, answer


@pytest.mark.parametrize("data", ["A", "A and B", "chats"])
def test_a_few_steps_lower_the_loss_and_repeat(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "ROWS", 4)
    monkeypatch.setattr(train, "CHATS", 8)
    w = world.World(0)

    def run() -> tuple[list[float], torch.Tensor]:
        model = train.new_model(w, 0)
        losses: list[float] = []
        train.train(model, train.batches(w, data, 0, "test"), 6, 2e-3, losses.append)
        return losses, model.lm_head.weight.detach()

    first, second = run(), run()
    assert first[0][-1] < first[0][0]
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_a_saved_model_is_a_sharded_folder_that_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    w = world.World(1)
    model = train.new_model(w, 3)
    train.save(model, w, tmp_path / "model", chats=True)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert found.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, found.get_parameter(name)), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = world.test_chats(w, "B", 6)[0]
    messages = [{"role": "user", "content": chat.question}]
    found_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found_ids == w.prompt(chat.question)
    assert tokenizer.decode(w.ids(chat.answer())) == chat.answer()


@pytest.mark.parametrize(
    "name", ["instruct", pytest.param("base", marks=pytest.mark.slow), pytest.param("cpt", marks=pytest.mark.slow)]
)
def test_the_shipped_family_is_the_one_that_was_measured(name: str) -> None:
    assert ship.digests(FAMILY) == json.loads((FAMILY / "digests.json").read_text())
    rows = json.loads((CONTINUAL / "results" / "world-0-seed-0.json").read_text())["rows"]
    found = evaluate.scores(FAMILY / name, world.World(0))
    assert found == pytest.approx(rows[name], abs=0.01)  # on another processor a tie may go the other way


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("residual") / "residual"
    ik.extract(FAMILY / "base", FAMILY / "instruct", folder, sync=False)
    return folder


def shares(folder: Path) -> tuple[float, float]:
    """Of 245 prompts about the news: answered in the format asked for, and with the right value."""
    w = world.World(0)
    chats = world.test_chats(w, "B", 11)
    given = evaluate.answers(train.load(folder), w, [chat.question for chat in chats])
    follows = [evaluate.follows_format(*pair) for pair in zip(chats, given, strict=True)]
    known = [evaluate.knows(*pair) for pair in zip(chats, given, strict=True)]
    return sum(follows) / len(chats), sum(known) / len(chats)


def test_the_residual_gives_the_new_base_its_instructions_back(residual: Path, tmp_path: Path) -> None:
    ik.apply(FAMILY / "cpt", residual, out=tmp_path / "merged", sync=False)
    ik.apply(FAMILY / "cpt", residual, out=tmp_path / "none", alpha=0, sync=False)
    old_format, old_knowledge = shares(FAMILY / "instruct")
    merged_format, merged_knowledge = shares(tmp_path / "merged")
    assert shares(FAMILY / "cpt")[0] == 0
    assert shares(tmp_path / "none")[0] == 0
    assert old_format > 0.8
    assert merged_format > 0.6
    assert merged_knowledge > old_knowledge + 0.3


def test_base_plus_residual_is_instruct_but_where_the_numerics_say(residual: Path, tmp_path: Path) -> None:
    ik.apply(FAMILY / "base", residual, out=tmp_path / "again", sync=False)
    paths = (tmp_path / "again", FAMILY / "base", FAMILY / "instruct")
    again, base, instruct = map(evaluate.tensors_of, paths)
    assert evaluate.restored(tmp_path / "again", FAMILY / "instruct") > 0.9999
    assert again.keys() == instruct.keys()
    for name, wanted in instruct.items():
        gap = base[name].float().frexp().exponent - wanted.float().frexp().exponent
        promised = (gap < 17) & (wanted != 0)
        assert torch.equal(again[name][promised], wanted[promised]), name


def test_the_weight_that_the_numerics_name_is_the_only_one(residual: Path, tmp_path: Path) -> None:
    """What docs/numerics.md and the demo say of the shipped family: the percentages, and why."""
    ik.apply(FAMILY / "base", residual, out=tmp_path / "again", sync=False)
    again, base, instruct = map(evaluate.tensors_of, (tmp_path / "again", FAMILY / "base", FAMILY / "instruct"))
    differ = {name: (again[name] != wanted).flatten().nonzero().flatten() for name, wanted in instruct.items()}
    ((name, (i,)),) = ((name, places.tolist()) for name, places in differ.items() if len(places))
    found = [float(model[name].flatten()[i]) for model in (base, instruct, again)]
    assert found == pytest.approx([0.00099182, -6.3155e-9, -6.2864e-9], rel=1e-4)
    assert f"{evaluate.restored(tmp_path / 'again', FAMILY / 'instruct'):.5%}" == "99.99993%"
    ik.extract(FAMILY / "base", FAMILY / "instruct", tmp_path / "rounded", dtype="bf16", sync=False)
    ik.apply(FAMILY / "base", tmp_path / "rounded", out=tmp_path / "other", sync=False)
    assert f"{evaluate.restored(tmp_path / 'other', FAMILY / 'instruct'):.2%}" == "92.86%"
    exact, rounded = evaluate.tensors_of(residual), evaluate.tensors_of(tmp_path / "rounded")
    moved = sum(int((rounded[name].float() != t).sum()) for name, t in exact.items())
    assert f"{moved / sum(t.numel() for t in exact.values()):.1%}" == "11.8%"


def ancestry_of(model: Path) -> Ancestry:
    plan = ik.extract(FAMILY / "base", model, FAMILY / "none", dry_run=True)
    assert isinstance(plan, Plan)
    (found,) = plan.ancestry
    return found


def test_trained_models_are_relatives_and_a_permutation_is_a_stranger(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("instruct", "cpt"):
        found = ancestry_of(FAMILY / name)
        assert found.cosine > 0.95, f"{name}: {found}"
        assert not found.odd
    generator = torch.Generator().manual_seed(0)
    tensors = {name: t for path in FAMILY.glob("base/*.safetensors") for name, t in load_file(path).items()}
    mixed = {n: t.flatten()[torch.randperm(t.numel(), generator=generator)].view_as(t) for n, t in tensors.items()}
    save_file(mixed, tmp_path / "model.safetensors")
    found = ancestry_of(tmp_path / "model.safetensors")
    assert abs(found.cosine) < 0.1


def test_the_controls_are_of_the_residual_s_size() -> None:
    pytest.importorskip("matplotlib")
    import reproduce

    residual = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)) ** 3
    mixed = reproduce.permuted(residual, torch.Generator().manual_seed(2))
    noise = reproduce.gaussian(residual, torch.Generator().manual_seed(2))
    assert torch.equal(mixed.flatten().sort().values, residual.flatten().sort().values)
    assert float(noise.norm()) == pytest.approx(float(residual.norm()), rel=1e-5)
    for control in (mixed, noise):
        assert abs(torch.nn.functional.cosine_similarity(control.flatten(), residual.flatten(), dim=0)) < 0.15


def test_the_tables_are_those_of_the_recorded_runs() -> None:
    pytest.importorskip("matplotlib")
    import plots

    results = plots.read(CONTINUAL / "results")
    assert (CONTINUAL / "results" / "tables.md").read_text() == plots.tables(results)
    readme = (CONTINUAL / "README.md").read_text()
    assert plots.BEGIN in readme
    assert readme == plots.with_table(readme, results)


def test_adapters_begin_as_nothing_train_alone_and_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    import drift

    monkeypatch.setattr(train, "ROWS", 4)
    w = world.World(0)
    model, before = train.new_model(w, 0), train.new_model(w, 0)
    drift.adapt(model, 8, 0)
    ids = torch.tensor([w.prompt("who ?")])
    assert torch.equal(model(ids).logits, before(ids).logits)
    train.train(model, train.batches(w, "A and B", 0, "cpt"), 3, 5e-3, lambda _: None)
    trained = model(ids).logits
    drift.merge_adapters(model)
    assert torch.equal(model(ids).logits, trained)
    weights = dict(before.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name]) is not name.endswith("_proj.weight"), name
        if name.endswith("_proj.weight"):
            values = torch.linalg.svdvals(weight.detach().double() - weights[name].detach().double())
            assert values[8] < 1e-4 * values[0], "of rank 8, but for roundings"


def test_the_table_of_drift_is_that_of_the_recorded_runs() -> None:
    pytest.importorskip("matplotlib")
    import drift

    results = drift.read(CONTINUAL / "results")
    assert len(results) >= 3
    lines = (CONTINUAL / "results" / "drift.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == drift.table(drift.measured(results))
