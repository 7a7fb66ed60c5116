"""Recipes of merge_method linear: models that make up another one, each with a weight, as mergekit defines it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import FORMATS, numbers
from small_models import Tensors, normal, read_model, same, snapshot, tensors, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.cli import main
from ires_kernels.planning import recipe_files
from ires_kernels.planning.rules import ArgumentError

CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 16),
    **{f"model.layers.{i}.{part}.weight": (24, 16) for i in range(3) for part in ("mlp", "self_attn.q_proj")},
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}
NAMES = ("one", "two", "three")
Weight = float | Callable[[str], float]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three models of one family, of which the second is in two files, in the current folder."""
    base = tensors(1, SHAPES)
    for seed, name in enumerate(NAMES, 1):
        own = {n: (t.float() + seed * normal(t.shape, seed, torch.float32, 1e-3)).to(t.dtype) for n, t in base.items()}
        files = {"tokenizer_config.json": json.dumps({"of": name})}
        write_model(tmp_path / name, own, config=CONFIG, files=files, shards=2 if name == "two" else 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(*weights: Any, more: str = "", names: tuple[str, ...] = NAMES) -> str:
    """A recipe of as many models as there are weights, which are YAML."""
    listed = "".join(f"- {{model: {n}, parameters: {{weight: {w}}}}}\n" for n, w in zip(names, weights, strict=False))
    return f"merge_method: linear\nmodels:\n{listed}{more}"


def write(text: str) -> Path:
    path = Path("recipe.yml")
    path.write_text(text)
    return path


def tokenizer(*words: str) -> str:
    return json.dumps({"model": {"type": "BPE", "vocab": {w: i for i, w in enumerate(words)}, "merges": []}})


def merge(text: str, **options: Any) -> Path:
    """The output of a recipe."""
    shutil.rmtree("out", ignore_errors=True)
    ik.merge(write(text), out="out", sync=False, **options)
    return Path("out")


def blend(weights: dict[str, Weight], dtype: torch.dtype = torch.bfloat16, mean: bool = True) -> Tensors:
    """weight · model + … in float32, in this order, rounded once; weights of a mean are divided by their sum before."""
    models = {name: numbers(Path(name)) for name in weights}
    found = {}
    for name in next(iter(models.values())):
        own = [weight(name) if callable(weight) else weight for weight in weights.values()]
        total = sum(own) if mean else 1.0
        terms = [
            torch.tensor(weight / total, dtype=torch.float32) * model[name].float()
            for weight, model in zip(own, models.values(), strict=True)
        ]
        found[name] = sum(terms[1:], terms[0]).to(dtype)
    return found


def assert_equal(out: Path, right: Tensors) -> None:
    found = read_model(out)
    assert found.keys() == right.keys()
    assert [name for name in right if not same(found[name], right[name])] == []


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    "weights", [(1, 3), (0.5, 0.3, 0.2), (1.0, 1.0, 1.0), (2, -0.5), (1e-30, 3e-30), (0, 1)], ids=str
)
def test_a_mean(weights: tuple[float, ...]) -> None:
    assert_equal(merge(recipe(*weights)), blend(dict(zip(NAMES, weights, strict=False))))
    assert ik.verify("out")


@pytest.mark.usefixtures("root")
def test_a_sum() -> None:
    out = merge(recipe(0.5, 0.25, -1, more="parameters: {normalize: false}\n"))
    assert_equal(out, blend({"one": 0.5, "two": 0.25, "three": -1}, mean=False))


@pytest.mark.usefixtures("root")
def test_models_of_one_number_are_that_number() -> None:
    """The mean of a model and itself is that model, whatever the weights, -0 included."""
    one = read_model(Path("one"))
    one["model.norm.weight"][3] = -0.0
    for folder in ("one", "two"):
        shutil.rmtree(folder)
        write_model(Path(folder), one, config=CONFIG)
    assert_equal(merge(recipe(0.3, 0.7)), one)
    assert_equal(merge(recipe(1, 2)), one)


@pytest.mark.usefixtures("root")
def test_gradients_and_filters() -> None:
    """Each tensor's weights are divided by their own sum."""
    first = "[{filter: mlp, value: [0.0, 1.0]}, {filter: norm, value: -3}, {value: 0.25}]"
    out = merge(recipe(first, 1, "[1, 0.5, 0]"))

    def height(name: str) -> float:
        return int(name.split(".")[2]) / 2 if "layers" in name else 0.0

    def one(name: str) -> float:
        return height(name) if "mlp" in name else -3 if "norm" in name else 0.25

    assert_equal(out, blend({"one": one, "two": 1.0, "three": lambda name: 1 - height(name)}))
    assert ik.verify("out")


@pytest.mark.usefixtures("root")
def test_base_model_gives_what_is_not_computed() -> None:
    """The layout, config.json and the tokenizer, as in mergekit; without it the first model does."""
    out = merge(recipe(0.5, 0.3, 0.2))
    assert (out / "tokenizer_config.json").read_text() == '{"of": "one"}'
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["model.safetensors"]
    for more in (
        "base_model: two\n",
        "base_model: ./two\ntokenizer_source: base\n",
        "base_model: two\ntokenizer: {source: two}\n",
    ):
        out = merge(recipe(0.5, 0.3, 0.2, more=more))
        assert_equal(out, blend({"two": 0.3, "one": 0.5, "three": 0.2}))
        assert (out / "tokenizer_config.json").read_text() == '{"of": "two"}'
        assert len(list(out.glob("*.safetensors"))) == 2


@pytest.mark.usefixtures("root")
def test_dtypes_and_rules() -> None:
    right = {"one": 0.5, "two": 0.3, "three": 0.2}
    assert_equal(merge(recipe(0.5, 0.3, 0.2, more="dtype: float32\n")), blend(right, torch.float32))
    text = recipe(0.5, 0.3, 0.2, more="dtype: float32\nout_dtype: float16\nskip: norm\nname: mine\n")
    wanted = blend(right, torch.float16)
    wanted["model.norm.weight"] = read_model(Path("one"))["model.norm.weight"].half()
    assert_equal(merge(text), wanted)
    merge(recipe(0.5, 0.3, 0.2, more="rounding: stochastic\nseed: 5\n"))
    assert ik.verify("out")
    one, two = read_model(Path("out")), read_model(merge(recipe(0.5, 0.3, 0.2)))
    assert any(not same(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("more", ["", "rounding: stochastic\n", "dtype: float32\n"], ids=str.strip)
def test_reference_gives_the_same(more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = recipe(0.5, "[0.3, 1]", -0.2, more=more)
    right = read_model(merge(text))
    monkeypatch.setenv("IRES_BACKEND", "reference")
    assert_equal(merge(text), right)


def test_what_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yml").write_text(recipe("[{filter: mlp, value: 3}, {value: 1}]", 1))
    Path("one/generation_config.json").write_text('{"eos_token_id": 2}')
    before = snapshot(root)
    assert main(["merge", "recipe.yml", "-o", "out", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert snapshot(root) == before
    assert "model-2      " in said
    assert "6 tensors    0.5 * target + 0.5 * model-2, BF16 → BF16" in said
    assert "3 tensors    0.75 * target + 0.25 * model-2, BF16 → BF16, by " in said
    assert main(["merge", "recipe.yml", "-o", "out", "--no-sync"]) == 0
    said = capsys.readouterr().out
    rows = dict(re_split(line) for line in said.splitlines())
    assert rows["weights 0.5, 0.5"] == "6 other tensors"
    assert rows["weights 0.75, 0.25"] == r"3 tensors that match '^model\\.layers\\.\\d+\\.mlp\\.weight$'"
    assert rows["ancestry"].startswith("model-2 is related to target: ")
    assert rows["from target"] == "config.json, generation_config.json, tokenizer_config.json"
    assert "alpha" not in said
    assert "lost to rounding" not in said
    card = (root / "out/README.md").read_text()
    assert "the sum of the models, each times its weight." in card
    assert "residual" not in card
    assert "| model-2 | two | " in card
    assert "- weights 0.5, 0.5: 6 other tensors" in card
    table = json.loads((root / "out/ires.json").read_text())
    assert list(table["inputs"]) == ["target", "model-2"]
    assert table["report"]["strengths"][0]["weights"] is True
    assert main(["merge", "recipe.yml", "-o", "out", "--no-sync"]) == 0  # as it is there already
    assert "weights 0.5, 0.5" in capsys.readouterr().out
    assert main(["merge", "out/ires.json", "-o", "again", "--no-sync"]) == 0
    assert "all tensors are those of" in capsys.readouterr().out
    (root / "two").rename(root / "moved")
    assert main(["verify", "out", "--model", "moved"]) == 0
    assert main(["verify", "out"]) == 2
    ik.publish("out")
    assert ik.verify("out", inputs={"target": "one", "model-2": "moved"})


def re_split(line: str) -> tuple[str, str]:
    """Key and value of a line of a table."""
    key, _, value = line.partition("  ")
    return key, value.strip()


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("format", ["fp8-block", "nvfp4"])
def test_quantized_models(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are decoded first. The format of the first model is kept where there is an encoder for it."""
    make, settings = FORMATS[format]
    name = "model.layers.0.mlp.up_proj.weight"
    for seed, folder in enumerate(NAMES):
        shutil.rmtree(folder)
        weight = normal((64, 64), 7, torch.float32) + normal((64, 64), seed, torch.float32, 1e-3)
        plain = {"model.embed_tokens.weight": normal((40, 64), 8).bfloat16()}
        stored = {name: weight.bfloat16()} if folder == "two" else make(name, weight)
        config = CONFIG | ({} if folder == "two" else {"quantization_config": settings})
        write_model(Path(folder), stored | plain, config=config)
    weights: dict[str, Weight] = {"one": 0.5, "two": 0.3, "three": 0.2}
    assert_equal(merge(recipe(0.5, 0.3, 0.2, more="dtype: float32\n")), blend(weights, torch.float32))
    if format == "nvfp4":
        with pytest.raises(CheckpointError, match=r"is nvfp4 in the target[\s\S]*--dtype bf16"):
            merge(recipe(0.5, 0.3, 0.2))
        return
    out = merge(recipe(0.5, 0.3, 0.2))
    stored = read_model(out)
    monkeypatch.setenv("IRES_BACKEND", "reference")
    assert_equal(merge(recipe(0.5, 0.3, 0.2)), stored)
    found, right = numbers(out)[name], blend(weights, torch.float32)[name]
    assert found.sub(right).norm() < 0.03 * right.norm()
    assert json.loads((out / "config.json").read_text())["quantization_config"] == settings
    assert ik.verify(out)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("format", ["fp8-block", "int8-channel"])
def test_what_cancels_is_zero_in_codes(
    format: str, rounding: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the weights are those of the first model with the other sign: none of them keeps the code that it had."""
    monkeypatch.setenv("IRES_BACKEND", backend)
    make, settings = FORMATS[format]
    name, config = "model.layers.0.mlp.up_proj.weight", CONFIG | {"quantization_config": settings}
    embedding = {"model.embed_tokens.weight": normal((40, 64), 8).bfloat16()}
    stored = make(name, normal((64, 64), 7, torch.float32))
    for folder in ("one", "two"):
        shutil.rmtree(folder)
    one = numbers(write_model(Path("one"), stored | embedding, config=config))[name]
    other = torch.where(torch.arange(64) < 32, -one, one)
    write_model(Path("two"), {name: other} | embedding, config=CONFIG)
    found = numbers(merge(recipe(0.5, 0.5, more=f"rounding: {rounding}\ntrust_names: true\n")))[name]
    assert torch.equal(found, torch.where(torch.arange(64) < 32, 0.0, one))


def test_gone_on_with_and_by_workers(root: Path) -> None:
    def give_up(done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    right = blend({"two": 0.3, "one": 0.5, "three": 0.2})
    Path("recipe.yml").write_text(recipe(0.5, 0.3, 0.2, more="base_model: two\n"))
    with pytest.raises(KeyboardInterrupt):
        ik.merge("recipe.yml", out="out", progress=give_up)
    ik.resume("out")
    assert_equal(root / "out", right)
    for rank in range(2):
        ik.merge("recipe.yml", out="shared", workers=(rank, 2))
    assert_equal(root / "shared", right)


def test_models_that_do_not_fit(root: Path) -> None:
    """A tensor that one lacks, or that has another shape, or that is no number."""
    two = read_model(root / "two")
    shutil.rmtree("two")
    lacking = {name: t for name, t in two.items() if "layers.1.mlp" not in name}
    write_model(root / "two", lacking, config=CONFIG)
    with pytest.raises(
        CheckpointError, match=r"'model.layers.1.mlp.weight' is in target and model-3 and not in model-2"
    ):
        merge(recipe(1, 1, 1))
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.weight' is in target and not in model-2"):
        merge(recipe(1, 1))  # which nobody but the first has
    name = "model.layers.1.mlp.weight"
    for weights in ((1, 1, 1), (1, 1)):
        out = merge(recipe(*weights, more="allow_missing: true\n"))
        assert same(read_model(out)[name], read_model(root / "one")[name])
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.weight' is in model-2 and not in target"):
        merge(recipe(1, 1, names=("two", "one")))
    shutil.rmtree("two")
    write_model(root / "two", two | {"lm_head.weight": two["lm_head.weight"][:38]}, config=CONFIG)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' has shape \[38, 16\] in model-2 "):
        merge(recipe(1, 1))
    assert (merge(recipe(1, 1, more="skip: lm_head\n")) / "model.safetensors").exists()
    for name, value in (("two", 3), ("one", 3)):
        shutil.rmtree(name)
        write_model(root / name, two | {"steps": torch.tensor([value])}, config=CONFIG)
    assert read_model(merge(recipe(1, 1)))["steps"].item() == 3
    shutil.rmtree("two")
    write_model(root / "two", two | {"steps": torch.tensor([4])}, config=CONFIG)
    with pytest.raises(CheckpointError, match="'steps'"):
        merge(recipe(1, 1))


def test_any_layout(root: Path) -> None:
    """What one model has in other parts and under other names, another has in its own."""
    shapes = {f"model.layers.{i}.self_attn.{part}_proj.weight": (64, 64) for i in range(2) for part in "qkv"}
    base = tensors(3, shapes | {"model.embed_tokens.weight": (40, 64)})
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 64}
    models = [
        {n: (t.float() + normal(t.shape, seed, torch.float32, 1e-3)).to(t.dtype) for n, t in base.items()}
        for seed in (1, 2)
    ]
    fused = {"model.embed_tokens.weight": models[1]["model.embed_tokens.weight"]}
    for i in range(2):
        at = f"model.layers.{i}.self_attn."
        fused[f"{at}qkv_proj.weight"] = torch.cat([models[1][f"{at}{part}_proj.weight"] for part in "qkv"])
    for name, each in zip(
        NAMES, (models[0], models[1], {f"language_model.{n}": t for n, t in fused.items()}), strict=True
    ):
        shutil.rmtree(root / name)
        write_model(root / name, each, config=CONFIG | heads)
    right = read_model(merge(recipe(0.3, 0.7)))
    assert_equal(merge(recipe(0.3, 0.7, names=("one", "three"))), right)
    assert ik.verify("out")
    found = read_model(merge(recipe(0.7, 0.3, names=("three", "one"))))
    name = "model.layers.1.self_attn."
    parts = torch.cat([right[f"{name}{part}_proj.weight"] for part in "qkv"])
    assert same(found[f"language_model.{name}qkv_proj.weight"], parts)


def test_heads_that_are_embeddings(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head of a tied model is its embedding; a tied first model has no place for the heads of others."""
    two = read_model(root / "two")
    shutil.rmtree("two")
    tied = {name: t for name, t in two.items() if name != "lm_head.weight"}
    write_model(root / "two", tied, config=CONFIG | {"tie_word_embeddings": True})
    found = read_model(merge(recipe(0.5, 0.5)))
    one = read_model(root / "one")["lm_head.weight"].float()
    assert same(found["lm_head.weight"], (0.5 * one + 0.5 * two["model.embed_tokens.weight"].float()).bfloat16())
    Path("recipe.yml").write_text(recipe(1, 1, names=("two", "one")))
    assert main(["merge", "recipe.yml", "-o", "tied"]) == 2
    assert "'lm_head.weight' is in model-2 and not in target, whose head is its embedding" in capsys.readouterr().err
    assert "lm_head.weight" not in read_model(merge(recipe(1, 1, names=("two", "one"), more="skip: lm_head\n")))


def test_strangers_are_warned_of(root: Path) -> None:
    shutil.rmtree("two")
    write_model(root / "two", tensors(99, SHAPES), config=CONFIG)
    Path("recipe.yml").write_text(recipe(1, 1))
    report: Any = ik.merge("recipe.yml", out="out")
    (said,) = report.warnings
    assert "model-2 and target look unrelated" in said
    assert "have no mean that is one" in said


def test_files_that_the_first_model_lacks(root: Path) -> None:
    """A warning says whose they could be, and what to do for it."""
    (root / "two/tokenizer.json").write_text(tokenizer("a", "b"))
    (root / "three/chat_template.jinja").write_text("{{ chat }}")
    report: Any = ik.merge(write(recipe(1, 1, 1)), out="out")
    assert [text.partition(". ")[0] for text in report.warnings] == [
        "target has no chat template, and so the output has none: model-3 has one",
    ]
    for folder in ("one", "three"):
        (root / folder / "tokenizer_config.json").unlink()
    report = ik.merge(write(recipe(1, 1, 1)), out="other")
    assert "target has no tokenizer, and so the output has none: model-2 has one. Where" in report.warnings[0]
    merge(recipe(1, 1, 1, more="base_model: three\n"))
    assert (root / "out/chat_template.jinja").read_text() == "{{ chat }}"


def test_other_tokens(root: Path) -> None:
    """Rows of one number that are of other tokens have no mean, unless rows are what is asked for."""

    words = [f"w{i}" for i in range(40)]
    (root / "one/tokenizer.json").write_text(tokenizer(*words))
    (root / "two/tokenizer.json").write_text(tokenizer(*words))
    right = blend({"one": 1, "two": 1})
    assert_equal(merge(recipe(1, 1)), right)
    assert_equal(merge(recipe(1, 1, more="tokenizer_source: union\n")), right)
    (root / "two/tokenizer.json").write_text(tokenizer(*words[:39], "other"))
    with pytest.raises(CheckpointError, match="model-2 has other tokens than the target"):
        merge(recipe(1, 1, more="tokenizer_source: union\n"))
    with pytest.raises(CheckpointError, match=r"model-2 has other tokens than the target[\s\S]*vocabulary: rows"):
        merge(recipe(1, 1))
    assert_equal(merge(recipe(1, 1, more="vocabulary: rows\n")), right)
    merge(recipe(1, 1, more="skip: [embed, lm_head]\n"))
    assert same(read_model(root / "out")["lm_head.weight"], read_model(root / "one")["lm_head.weight"])


REFUSED = {
    recipe(1, -1): "recipe.yml:1: the weights, 1, -1, add up to 0, by which they would be divided",
    recipe(0.1, 0.2, -0.3): "the weights, 0.1, 0.2, -0.3, add up to 5.55112e-17, by which",
    recipe("[{filter: norm, value: -1}, {value: 1}]", 1): "the weights of model.norm.weight, -1, 1, add up to 0",
    recipe("1e999", 1): "add up to inf",
    recipe("1e999", "-1e999"): "add up to nan",
    recipe(0, 0, more="parameters:\n  normalize: false\n"): "recipe.yml:6: parameters: the weights, 0, 0, are all 0.",
    recipe(".nan", 1): "models[0].parameters.weight: is '.nan', wanted a number",
    recipe("1e300", 1, more="parameters: {normalize: false}\n"): "alpha is 1e+300, which is infinite",
    recipe(1): "recipe.yml:3: models: holds one model, wanted two or more",
    recipe(1, 1, names=("one", "./one")): "recipe.yml:4: models[1].model: is there twice. Give it once",
    recipe(1, 1, more="base_model: three\n"): "recipe.yml:5: base_model: is none of the models",
    recipe(1, 1, more="target: one\n"): "recipe.yml:5: target: goes with task_arithmetic",
    recipe(1, 1, more="alphas: {mlp: [1, 1]}\n"): "recipe.yml:5: alphas: goes with task_arithmetic",
    recipe(1, 1, more="parameters: {lambda: 2}\n"): "parameters.lambda: goes with task_arithmetic",
    recipe(1, 1, more="parameters: {normalize: 1}\n"): "parameters.normalize: is '1', wanted true or false",
    recipe(1, 1, more="parameters: {density: 1}\n"): "parameters.density: is not supported",
    recipe(1, 1, more="tokenizer_source: two\n"): "tokenizer_source: is 'two', wanted one, whose tokenizer",
    recipe(1, 1, more="tokenizer_source: base\n"): "tokenizer_source: is 'base', wanted one, whose tokenizer",
    recipe(1, 1, more="tokenizer: {source: union}\nskip: norm\n"): "tokenizer.source: is 'union', wanted one, whose",
    recipe(1, 1, more="tokenizer: {source: one, tokens: {}}\n"): "tokenizer.tokens: is not supported",
    recipe(1, 1, more="tokenizer: {source: one}\ntokenizer_source: one\n"): "tokenizer: says what tokenizer_source",
    recipe(1, 1, more="vocabulary: target\n"): "vocabulary: is 'target', wanted rows, or nothing",
    recipe(1, 1, more="chat_template: auto\n"): "recipe.yml:5: chat_template: is not supported: the output has that of",
    recipe(1, "[]"): "models[1].parameters.weight: is a list, wanted a number",
    "merge_method: linear\nmodels: [{model: one}, {model: two}]\n": "models[0]: parameters.weight is missing, wanted",
    "merge_method: linear\nmodels: [{model: one, weight: 1}, {model: two}]\n": "models[0].weight: is not supported",
    "merge_method: linear\npairs: [{instruct: one, base: two}]\ntarget: one\n": "merge_method: goes with models",
    recipe(1, 1, names=("one", "org/two+lora")): "adapters (after a +) are not added here",
    recipe(1, 1, names=("one", "nowhere")): "nowhere: no such file or folder",
}  # fmt: skip


def test_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, said in REFUSED.items():
        Path("recipe.yml").write_text(text)
        before = snapshot(root)
        assert main(["merge", "recipe.yml", "-o", "out"]) == 2, text
        assert said in capsys.readouterr().err, text
        assert snapshot(root) == before


@pytest.mark.usefixtures("root")
def test_not_in_place() -> None:
    Path("recipe.yml").write_text(recipe(1, 1))
    with pytest.raises(ArgumentError, match="merge_method linear makes a new model of several: write a new folder"):
        ik.merge("recipe.yml", in_place=True)


def test_manifests_of_no_blend(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Roles with gaps, and factors for other numbers of models."""
    merge(recipe(1, 1, 1))
    right = json.loads((root / "out/ires.json").read_text())
    rules = right["rules"]
    for inputs, alpha, said in (
        (["target", "model-3"], [0.5, 0.5], "inputs are ['target', 'model-3'], wanted"),
        (["model-2", "model-3"], [0.5, 0.5], "inputs are"),
        (["target", "model-2", "model-3"], [0.5, 0.5], "rules.alpha has not 3 factors"),
    ):
        table = {
            **right,
            "inputs": {role: right["inputs"][role] for role in inputs},
            "rules": {**rules, "alpha": alpha},
        }
        (root / "out/ires.json").write_text(json.dumps(table))
        for command in (["merge", "out/ires.json", "-o", "again"], ["verify", "out"]):
            assert main([*command, "--trust-inputs"]) == 2
            assert said in capsys.readouterr().err
    assert not (root / "again").exists()


def test_a_residual_is_no_model(root: Path) -> None:
    ik.extract("one", "two", "r", sync=False)
    Path("recipe.yml").write_text(recipe(1, 1, names=("one", "r")))
    with pytest.raises(CheckpointError, match="is a residual, wanted a model as model-2"):
        ik.merge("recipe.yml", out="out")
    assert not (root / "out").exists()
    assert recipe_files.read("recipe.yml").paths == {"target": root / "one", "model-2": root / "r"}
