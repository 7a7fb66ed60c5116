"""Merges that a file of YAML asks for: mergekit's task arithmetic as mergekit defines it, our own keys, bad ones."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Tensors, normal, read_model, same, snapshot, tensors, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.cli import main
from ires_kernels.planning import recipe_files, recipe_weights
from ires_kernels.planning.rules import ArgumentError

CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 16),
    **{f"model.layers.{i}.{part}.weight": (24, 16) for i in range(4) for part in ("mlp", "self_attn.q_proj")},
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, two models that were trained further, and a target, in the current folder."""
    base = tensors(1, SHAPES)
    for seed, name in enumerate(("base", "chat", "code", "target")):
        own = {n: (t.float() + seed * normal(t.shape, seed, torch.float32, 1e-3)).to(t.dtype) for n, t in base.items()}
        write_model(tmp_path / name, own, config=CONFIG, files={"tokenizer_config.json": json.dumps({"of": name})})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(text: str, **options: Any) -> Path:
    """The output of a recipe."""
    Path("recipe.yml").write_text(text)
    shutil.rmtree("out", ignore_errors=True)
    ik.merge("recipe.yml", out="out", sync=False, **options)
    return Path("out")


def added(weights: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """base + weight · (model − base) of each model in float32, in their order; a weight is a function of the name."""
    base = read_model(Path("base"))
    models = {name: read_model(Path(name)) for name in weights}
    found = {}
    for name, t in base.items():
        value = t.float()
        for model, weight in weights.items():
            factor = weight(name) if callable(weight) else weight
            value = value + torch.tensor(factor, dtype=torch.float32) * (models[model][name].float() - t.float())
        found[name] = value.to(dtype)
    return found


def assert_equal(out: Path, right: Tensors) -> None:
    found = read_model(out)
    assert found.keys() == right.keys()
    assert [name for name in right if not same(found[name], right[name])] == []


TASK = "merge_method: task_arithmetic\nbase_model: base\n"


@pytest.mark.usefixtures("root")
def test_weights_are_numbers() -> None:
    out = merge(
        TASK + "models:\n- model: chat\n  parameters: {weight: 0.6}\n- {model: code, parameters: {weight: 4e-1}}\n"
    )
    assert_equal(out, added({"chat": 0.6, "code": 0.4}))
    assert (out / "tokenizer_config.json").read_text() == '{"of": "chat"}'
    assert ik.verify(out)
    entries = "models: [{model: base}, {model: chat}, {model: code, parameters: {weight: 1}}]\n"
    out = merge(TASK + entries + "parameters: {weight: 0.5, lambda: 0.5, normalize: false, int8_mask: true}\n")
    assert_equal(out, added({"chat": 0.25, "code": 0.5}))
    out = merge(TASK + entries + "parameters: {weight: 0.5, lambda: 0.75, normalize: true}\n")
    assert_equal(out, added({"chat": 0.5 / 1.5 * 0.75, "code": 1 / 1.5 * 0.75}))


@pytest.mark.usefixtures("root")
def test_gradients_and_filters() -> None:
    """As mergekit interpolates them: over the layers from 0 to 1; 0 for what is in none; the first filter decides."""
    out = merge(
        TASK
        + """
models:
  - model: chat
    parameters:
      weight:
        - {filter: mlp, value: [0.0, 0.3, 1.0]}
        - {filter: self_attn, value: 0.25}
        - value: [0.75, 0.1]
  - model: code
    parameters: {weight: [{filter: norm, value: 2}]}
parameters:
  weight: [1, 0]
""",
        dry_run=False,
    )

    def height(name: str) -> float:
        return int(name.split(".")[2]) / 3 if "layers" in name else 0.0

    def chat(name: str) -> float:
        at = 2 * height(name)
        low, values = int(at), [0.0, 0.3, 1.0]
        if "mlp" in name:
            return (1 - (at - low)) * values[low] + (at - low) * values[min(2, low + 1)]
        return 0.25 if "self_attn" in name else 0.75

    assert_equal(out, added({"chat": chat, "code": lambda name: 2.0 if "norm" in name else (1 - height(name)) * 1}))
    assert ik.verify(out)


def test_patterns_find_their_names_and_no_others() -> None:
    parts = ("mlp.up", "mlp.upper", "q", *(f"mlp.experts.{i}.w1" for i in range(30)))
    everything = [f"model.layers.{i}.{part}.weight" for i in range(90) for part in parts]
    by_name = {name: (2.0,) if ".up." in name else (1.0,) for name in everything}
    by_name["model.layers.3.q.weight"] = (2.0,)
    found = list(recipe_weights.patterns(by_name, (1.0,)))
    assert found == [(r"^(model\.layers\.\d+\.mlp\.up\.weight|model\.layers\.3\.q\.weight)$", (2.0,))]
    by_layer = {name: (int(name.split(".")[2]),) if "q" not in name else (-1,) for name in everything}
    by_layer["model.layers.7.mlp.experts.7.w1.weight"] = (-1,)
    for usual in ((0,), (-1,), (1,)):
        patterns = list(recipe_weights.patterns(by_layer, usual))
        assert sum(len(pattern) for pattern, _ in patterns) < 20_000
        for name, factors in by_layer.items():
            decided = [factors for pattern, factors in patterns if re.search(pattern, name)]
            assert decided == ([] if factors == usual else [factors])


@pytest.mark.usefixtures("root")
def test_dtypes() -> None:
    models = "models: [{model: chat, parameters: {weight: 0.3}}]\n"
    assert_equal(merge(TASK + models + "dtype: float32\n"), added({"chat": 0.3}, torch.float32))
    assert_equal(merge(TASK + models + "dtype: float32\nout_dtype: float16\n"), added({"chat": 0.3}, torch.float16))
    assert_equal(merge(TASK + models + "dtype: bfloat16\n"), added({"chat": 0.3}))


def test_our_own_keys(root: Path) -> None:
    """The same as apply with the arguments of these names."""
    out = merge(
        """
target: target
pairs:
  - {instruct: chat, base: base, alpha: 0.6}
  - {instruct: ./code, base: ROOT/base}
skip: [norm]
alphas: {lm_head: [0, 1], 'q_proj': [1, -1]}
rounding: stochastic
seed: 7
renames: {model.: model.}
""".replace("ROOT", f"{root}").replace("renames: {model.: model.}", "trust_names: true")
    )
    ik.apply(
        "target", [("chat", "base"), ("code", "base")], out="other", alpha=[0.6, 1], skip="norm", rounding="stochastic",
        alphas=[("lm_head", [0, 1]), ("q_proj", [1, -1])], seed=7, trust_names=True, sync=False,
    )  # fmt: skip
    assert_equal(out, read_model(root / "other"))
    ik.extract("base", "chat", "r", sync=False)
    out = merge("target: target\nresiduals:\n- r\n- {residual: r, alpha: [0.5, 1]}\n")
    ik.apply(
        "target", ["r", "r"], out="third", alpha=[1, 0.5], sync=False,
        alphas=[(f"layers.{i}", [1, 0.5 + 0.5 * i / 3]) for i in range(4)],
    )  # fmt: skip
    assert_equal(out, read_model(root / "third"))
    out = merge(TASK + "models: [{model: chat, parameters: {weight: 0.5}}]\ntarget: target\n")
    ik.apply("target", ("chat", "base"), out="fourth", alpha=0.5, sync=False)
    assert_equal(out, read_model(root / "fourth"))


@pytest.mark.usefixtures("root")
def test_whose_tokenizer() -> None:
    models = "models: [{model: chat, parameters: {weight: 0.5}}]\n"
    for source, whose in (("base", "target"), ("chat", "instruct")):
        plan = f"{TASK}{models}tokenizer_source: {source}\n"
        Path("recipe.yml").write_text(plan)
        assert recipe_files.read("recipe.yml").rules.vocabulary == whose
    Path("recipe.yml").write_text("target: target\npairs: [{instruct: chat, base: base}]\nvocabulary: rows\n")
    assert recipe_files.read("recipe.yml").rules.vocabulary == "rows"


def test_paths_begin_in_the_folder_of_the_recipe(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "deep").mkdir()
    (root / "deep/recipe.yml").write_text("target: ../target\npairs: [{instruct: ../chat, base: ../base}]\n")
    monkeypatch.chdir(root / "chat")
    assert main(["merge", "../deep/recipe.yml", "-o", "../out", "--no-sync", "--quiet"]) == 0
    ik.apply("../target", ("../chat", "../base"), out="../other", sync=False)
    assert_equal(root / "out", read_model(root / "other"))


def test_what_is_kept_and_done_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"target: {root}/target  # mine\npairs: [{{instruct: chat, base: '{root}/base', alpha: 0.6}}]\nskip: norm\n"
    out = merge(text)
    assert json.loads((out / "ires.json").read_text())["rules"]["recipe"] == text
    card = (out / "README.md").read_text()
    assert "ires merge recipe.yml -o OUT" in card
    assert "target: target  # mine\npairs: [{instruct: chat, base: 'base', alpha: 0.6}]\nskip: norm\n```" in card
    assert f"{root}" not in card
    assert main(["merge", "out/ires.json", "-o", "again", "--no-sync", "--quiet"]) == 0
    assert_equal(root / "again", read_model(out))
    one, two = (json.loads((root / name / "ires.json").read_text()) for name in ("out", "again"))
    assert one["id"] == two["id"]
    table = json.loads((out / "ires.json").read_text())
    table["rules"]["alpha"] = [0.5]
    (out / "ires.json").write_text(json.dumps(table))
    assert main(["merge", "out/ires.json", "-o", "third"]) == 2
    assert "was not signed with your key" in capsys.readouterr().err
    assert main(["merge", "out/ires.json", "-o", "third", "--trust-inputs", "--no-sync", "--quiet"]) == 0


def test_in_place_and_gone_on_with(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def give_up(done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    text = "target: target\npairs: [{instruct: chat, base: base}, {instruct: code, base: base, alpha: 0.5}]\n"
    right = read_model(merge(text))
    shutil.rmtree("out")
    with pytest.raises(KeyboardInterrupt):
        ik.merge("recipe.yml", out="out", progress=give_up)
    ik.resume("out")
    assert_equal(root / "out", right)
    assert json.loads((root / "out/ires.json").read_text())["rules"]["recipe"] == text
    with pytest.raises(KeyboardInterrupt):
        ik.merge("recipe.yml", in_place=True, progress=give_up)
    assert main(["merge", "recipe.yml", "--in-place", "--no-sync"]) == 2
    assert "ires resume" in capsys.readouterr().err
    assert main(["merge", "recipe.yml", "--in-place", "--quiet"]) == 0
    assert_equal(root / "target", right)
    Path("recipe.yml").write_text(f"# the same\n{text}")
    assert main(["merge", "recipe.yml", "--in-place", "--quiet"]) == 0
    assert_equal(root / "target", right)
    assert main(["merge", "target/ires.json", "-o", "other"]) == 2
    assert "update in place" in capsys.readouterr().err


SLICES = """merge_method: task_arithmetic
base_model: base
slices:
- sources: [{model: base, layer_range: [0, 4]},
    {model: chat, layer_range: [0, 4], parameters: {weight: 0.5}},
    {model: code, layer_range: [0, 4]}]
  parameters: {weight: [0.1, 0.4], normalize: false}
"""


@pytest.mark.usefixtures("root")
def test_a_slice_with_all_layers() -> None:
    """The same as its models without layers, as mergekit writes what it was asked for."""

    def code(name: str) -> float:
        height = int(name.split(".")[2]) / 3 if "layers" in name else 0.0
        return (1 - height) * 0.1 + height * 0.4

    assert_equal(merge(SLICES), added({"chat": 0.5, "code": code}))
    text = SLICES.replace("base_model: base\n", "").replace("task_arithmetic", "linear").replace("[0.1, 0.4]", "1.0")
    right = merge(
        "merge_method: linear\nmodels: [{model: base}, {model: chat, parameters: {weight: 0.5}}, {model: code}]\n"
        "parameters: {weight: 1, normalize: false}\n"
    )
    found = read_model(right)
    assert_equal(merge(text), found)
    for name in ("base", "chat"):
        config = json.loads(Path(name, "config.json").read_text())
        del config["num_hidden_layers"]
        Path(name, "config.json").write_text(json.dumps(config))
    with pytest.raises(ArgumentError, match="cannot be told from all layers"):
        merge(SLICES)


# What people have written for mergekit, by its kinds of keys.
WRITTEN = {
    """models: [{model: base, parameters: {weight: 1.0}}, {model: chat, parameters: {weight: 0.3}}]
merge_method: linear
dtype: float16
""": "",
    """models: [{model: chat, parameters: {weight: 1}}, {model: code, parameters: {weight: 1}}]
merge_method: linear
tokenizer_source: union
dtype: float16
""": "",
    """name: last-steps
merge_method: linear
base_model: code
models: [{model: chat, parameters: {weight: 1}}, {model: code, parameters: {weight: 2}}]
parameters: {normalize: true}
dtype: float32
out_dtype: bfloat16
""": "",
    """models: [{model: base}, {model: chat, parameters: {weight: 1}}, {model: code, parameters: {weight: .02}}]
merge_method: task_arithmetic
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float16
""": "",
    SLICES.replace("weight: [0.1, 0.4], ", "weight: 1, ") + "dtype: bfloat16\n": "",
    """merge_method: task_arithmetic
base_model: base
models: [{model: chat, parameters: {weight: 1.0}}]
parameters: {normalize: false}
tokenizer: {source: chat}
""": "",
    """merge_method: linear
slices:
- sources: [{model: chat, layer_range: [0, 2]}, {model: code, layer_range: [2, 4]}]
parameters: {weight: 0.8}
""": "slices[0].sources[1].layer_range: is [2, 4], wanted [0, 2]",
    TASK
    + "models: [{model: chat, parameters: {weight: 1}}]\nchat_template: auto\n": "chat_template: is not supported: ",
    "merge_method: task_arithmetic\nbase_model: base+org/lora\nmodels: [{model: chat}]\n": "adapters (after a +)",
    """name: first
merge_method: linear
models: [{model: chat}, {model: code}]
parameters: {weight: 0.5}
---
merge_method: slerp
""": "is no YAML",
}


@pytest.mark.usefixtures("root")
def test_what_people_have_written(capsys: pytest.CaptureFixture[str]) -> None:
    """It is done, or refused by the name of the key."""
    for number, (text, said) in enumerate(WRITTEN.items()):
        Path("recipe.yml").write_text(text)
        code = main(["merge", "recipe.yml", "-o", f"out-{number}", "--no-sync"])
        error = capsys.readouterr().err
        assert (code, said in error) == (2 if said else 0, True), text + error


MODELS = "models: [{model: chat, parameters: {weight: 1}}]\n"
REFUSED = {
    "merge_method: ties\nbase_model: base\n" + MODELS: "1: merge_method: is 'ties', wanted task_arithmetic or linear",
    MODELS: "recipe.yml:1: merge_method is missing",
    "merge_method: task_arithmetic\n" + MODELS: "recipe.yml:1: base_model is missing",
    TASK + MODELS + "slices: []\n": "recipe.yml:4: slices: is there beside models, wanted one of the two",
    TASK + MODELS + "slice: []\n": "recipe.yml:4: slice: is not supported; known here are merge_method,",
    TASK + MODELS + "modules: {}\n": "recipe.yml:4: modules: is not supported: give models",
    TASK + "slices: []\n": "3: slices: is a list, wanted a list of one slice",
    TASK + "slices: [{}, {}]\n": "3: slices: has several. Slices are taken here where there is one, with all layers",
    SLICES.replace("[0, 4]", "[2, 4]", 1): "4: slices[0].sources[0].layer_range: is [2, 4], wanted [0, 4]. Slices",
    SLICES.replace("[0, 4]", "[0, 3]", 1): "5: slices[0].sources[1].layer_range: is [0, 4], wanted [0, 3]. Slices",
    SLICES.replace("[0, 4]", "[0]"): "4: slices[0].sources[0].layer_range: is [0], wanted [0, 0]",
    SLICES.replace("[0, 4]", "[0, 3]"): "layer_range: has 3 layers, and ",
    SLICES.replace("[0, 4]", "[0, x]"): "layer_range[1]: is 'x', wanted a whole number",
    SLICES + "parameters: {weight: 1}\n": "7: slices[0].parameters: says what parameters says",
    SLICES.replace("weight: 0.5", "wieght: 1"): "slices[0].sources[1].parameters.wieght: is not supported",
    TASK + "models: [{model: chat, parameters: {weight: 1, density: 0.5}}]": "3: models[0].parameters.density: is not",
    TASK + "models: [{model: chat, parameters: {weight: 0}}]\nparameters:\n  normalize: true\n": "5: parameters: the "
    "weights, 0, add up to 0",
    TASK + MODELS + "tokenizer_source: union\n": "recipe.yml:4: tokenizer_source: is 'union', wanted base, or",
    TASK + MODELS + "tokenizer_source: base\nvocabulary: rows\n": "4: tokenizer_source: says what vocabulary",
    TASK + MODELS + "dtype: int8\n": "recipe.yml:4: dtype: is 'int8', wanted one of float32",
    TASK + "models: [{model: chat}]\n": "recipe.yml:3: models[0]: parameters.weight is missing, wanted a number",
    TASK + "models: [{model: chat, parameters: {weight: [{filter: mlp, value: 1}]}}]\n": "missing for lm_head",
    TASK + "models: [{model: chat, parameters: {weight: []}}]\n": "weight: is a list, wanted a number",
    TASK + "models: [{model: chat, parameters: {weight: '0.5'}}]\n": "weight: is '0.5', wanted a number",
    TASK + "models: [{model: chat, parameters: {weight: [1, x]}}]\n": "weight[1]: is 'x', wanted a number",
    TASK + "models: [{model: chat, parameters: {weight: [{filter: a}]}}]\n": "weight[0]: value is missing",
    TASK + "models: [{model: chat, parameters: {weight: .nan}}]\n": "weight: is '.nan', wanted a number",
    TASK + "models: [{model: chat, parameters: {weight: 1e300}}]\n": "recipe.yml: alpha is 1e+300, which is infinite",
    TASK + "models: [{model: chat, parameters: {weight: yes}}]\n": "weight: is 'yes', wanted a number",
    TASK + "models: [{model: base, parameters: {weight: 1}}]\n": "3: models: holds no other model than base_model",
    TASK + "models: chat\n": "recipe.yml:3: models: is 'chat', wanted a list of models",
    TASK + "models: [{model: chat+lora, parameters: {weight: 1}}]\n": "adapters (after a +) are not added here",
    TASK + "models: [{model: nowhere, parameters: {weight: 1}}]\n": "nowhere: no such file or folder",
    TASK + "models: [{model: {path: chat}, parameters: {weight: 1}}]\n": "models[0].model: is a table, wanted a model",
    "target: target\n": "recipe.yml:1: has nothing to add, wanted one of models, pairs and residuals",
    "target: target\nresiduals: [r]\npairs: []\n": "recipe.yml:1: has pairs and residuals, wanted one of",
    "pairs: [{instruct: chat, base: base}]\n": "recipe.yml:1: target is missing",
    "target: target\npairs: [{instruct: chat}]\n": "recipe.yml:2: pairs[0]: base is missing",
    "target: target\npairs: [{instruct: chat, base: base, alhpa: 1}]\n": "2: pairs[0].alhpa: is not supported",
    "target: target\npairs: [{instruct: chat, base: base}]\nparameters: {lambda: 1}\n": "parameters: goes with models",
    "target: target\nresiduals: [chat]\n": "is a model, wanted a residual",
    "target: target\npairs: [{instruct: chat, base: base}]\nseed: -1\n": "recipe.yml:3: seed: is '-1', wanted a whole",
    "target: target\npairs: [{instruct: chat, base: base}]\nrounding: up\n": 'rounding is \'up\', wanted "nearest"',
    "target: target\npairs: [{instruct: chat, base: base}]\nskip: [nothing]\n": "--skip 'nothing' matches no tensor",
    "target: target\npairs: [{instruct: chat, base: base}]\nalphas: {mlp: x}\n": "alphas.mlp: is 'x', wanted a number",
    "target: target\ntarget: base\n": "recipe.yml:2: target: is there twice",
    "target: &a target\npairs: [{instruct: *a, base: base}]\n": "recipe.yml:1: anchors are not read",
    "a: &a [*a]\n": "recipe.yml:1: anchors are not read",
    "target: !!python/object/apply:os.system [ls]\n": "recipe.yml:1: tags are not read",
    "target: [\n": "recipe.yml:2: is no YAML",
    "a: b: c\n": "recipe.yml:1: is no YAML",
    "target: a\n---\ntarget: b\n": "recipe.yml:2: is no YAML",
    "": "recipe.yml: is empty",
    "just words\n": "recipe.yml:1: is 'just words', wanted a table of merge_method",
    "[" * 60000: "recipe.yml:1: is nested more than 16 deep",
    "{" * 60000: "recipe.yml:1: is nested more than 16 deep",
    "- " * 30000: "recipe.yml:1: is nested more than 16 deep",
    "a: " + "x" * 70000: "has 70003 bytes, wanted at most 65536",
    "a: \0\n": "is no YAML",
    "? [a]\n: b\n": "recipe.yml:1: has a key that is no text",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:60])
def test_refused(root: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yml").write_text(text)
    before = snapshot(root)
    started = time.process_time()  # of this process alone, however busy the machine is
    assert main(["merge", "recipe.yml", "-o", "out"]) == 2
    assert time.process_time() - started < 5
    said = capsys.readouterr().err
    assert REFUSED[text] in said
    assert snapshot(root) == before


def test_what_is_no_recipe(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "recipe.yml").write_bytes(b"target: \xff\n")
    assert main(["merge", "recipe.yml", "-o", "out"]) == 2
    assert "recipe.yml: is no text in UTF-8 (byte 8)" in capsys.readouterr().err
    for nowhere in ("nowhere.yml", "recipe.yml/recipe.yml"):
        assert main(["merge", nowhere, "-o", "out"]) == 2
        assert f"{nowhere}: no such file. Check the path." in capsys.readouterr().err
    for elsewhere in ("https://u:s3cr3t@host/recipe.yml", "s3://models/out/ires.json"):
        assert main(["merge", elsewhere, "-o", "out"]) == 2
        said = capsys.readouterr().err
        assert f"{elsewhere.replace('u:s3cr3t@', '')}: recipes are read on this disk." in said
    assert main(["merge", "base", "-o", "out"]) == 2
    assert main(["merge", "nowhere.json", "-o", "out"]) == 2
    ik.extract("base", "chat", "r", sync=False)
    assert main(["merge", "r/residual.json", "-o", "out"]) == 2
    assert "is of extract, wanted the ires.json" in capsys.readouterr().err
    (root / "recipe.yml").write_text("target: org/name\npairs: [{instruct: chat, base: base}]\n")
    assert main(["merge", "recipe.yml", "--in-place"]) == 2
    assert "org/name: is on the Hub, whose cache is never written" in capsys.readouterr().err
    assert not (root / "out").exists()
    with pytest.raises(TypeError, match="recipe is int 5, wanted a path"):
        ik.merge(5, out="out")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="give either out"):
        ik.merge("recipe.yml")
    with pytest.raises((ArgumentError, CheckpointError)):
        ik.merge("recipe.yml", in_place=True)
