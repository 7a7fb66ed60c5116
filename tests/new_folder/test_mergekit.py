"""Recipes give what mergekit gives, which is installed into a virtual environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from small_models import normal, read_model

import ires_kernels as ik

# With what it needs and tests have not; torch and transformers are those of the tests.
PACKAGES = ["mergekit==0.1.5", "immutables", "click", "pydantic", "pydantic-core", "annotated-types"]
PACKAGES += ["typing-inspection", "accelerate", "peft"]
FLOAT32 = "dtype: float32\nout_dtype: bfloat16\n"
TASK = "merge_method: task_arithmetic\nbase_model: base\n"
LINEAR = "merge_method: linear\nbase_model: base\n"
GRADIENT = "{weight: [{filter: mlp, value: [0.1, 0.9, 0.4]}, {filter: norm, value: -1.5}, {value: [0.6, 0.3]}]}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mergekit")
    venv.create(folder, with_pip=True)
    found = folder / "bin/python"
    done = subprocess.run(
        [found, "-m", "pip", "install", "-q", "--no-deps", *PACKAGES], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        pytest.skip(f"mergekit cannot be installed: {done.stderr[-300:]}")
    (library,) = folder.glob("lib/python*/site-packages")
    (library / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    done = subprocess.run([found, "-c", "import mergekit.merge"], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"mergekit cannot be imported: {done.stderr[-300:]}")
    return found


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama of four layers and two models that were trained further, in the current folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    base = {name: t.clone() for name, t in model.state_dict().items()}
    for seed, name in enumerate(("base", "chat", "code")):
        for i, (key, t) in enumerate(model.state_dict().items()):
            t.copy_((base[key].float() + seed * normal(t.shape, 100 * seed + i, torch.float32, 1e-3)).to(t.dtype))
        model.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Both compute base + weight · (model − base) in float32, operation by operation, and round once. With several models
# they differ where sums in float32 do: mergekit adds up the differences, multiplies that sum by lambda and adds it to
# base; here each goes on top of base in its turn, and lambda is a part of its factor. After rounding to bfloat16 few
# elements show it.
TASKS = {
    "number": ("models: [{model: chat, parameters: {weight: 0.3}}]\n", 0),
    "gradient": (f"models: [{{model: chat, parameters: {GRADIENT}}}]\n", 0),
    "several": (
        f"models: [{{model: chat, parameters: {GRADIENT}}}, {{model: code, parameters: {{weight: [0.2, 0.7]}}}}]\n"
        "parameters: {lambda: 0.7}\n",
        1 / 1000,
    ),
    "normalized": (
        "models: [{model: chat, parameters: {weight: 0.5}}, {model: code, parameters: {weight: 1.5}}]\n"
        "parameters: {normalize: true}\n",
        1 / 1000,
    ),
}
# Equal where nothing is divided, or by a power of two: both multiply and add up in float32, in one order. Else mergekit
# divides the sum, and here the weights were divided before. Of models that are few units in the last place apart many a
# mean lies midway between two of bfloat16, and then the last bit of float32 decides.
MEANS = {
    "equal": (("1.0", "1.0"), "", 0),
    "not normalized": (("0.5", "1", "-0.25"), "parameters: {normalize: false}\n", 0),
    "gradients": (("[0.1, 0.9, 0.4]", "0.7", "0.2"), "parameters: {normalize: false}\n", 0),
    "percent": (("0.45", "0.35", "0.2"), "", 1 / 20),  # which is not 1 as mergekit adds it up, in float32
    "thirds": (("1", "1", "1"), "", 1 / 200),
    "negative": (("1.3", "-0.4"), "", 1 / 200),
    "divided": (("[0.1, 0.9, 0.4]", GRADIENT.removeprefix("{weight: ").removesuffix("}")), "", 1 / 20),
}
SCRIPT = """
import sys
from mergekit.scripts.run_yaml import main
for name in sys.argv[1:]:
    options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    main([f"{name}.yml", f"theirs {name}", *options], standalone_mode=False)
"""


def mean(weights: tuple[str, ...], more: str) -> str:
    each = zip(("base", "chat", "code"), weights, strict=False)
    listed = ", ".join(f"{{model: {model}, parameters: {{weight: {weight}}}}}" for model, weight in each)
    return f"models: [{listed}]\n{more}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_same_as_mergekit(models: Path, python: Path) -> None:
    """All in one process of mergekit. Where it says 0 no element differs, else at most such a part of them, none by
    more than one unit in the last place; or, where terms cancel, than the last bits of these in float32."""
    texts = {name: (TASK + text, limit) for name, (text, limit) in TASKS.items()}
    texts |= {name: (LINEAR + mean(weights, more), limit) for name, (weights, more, limit) in MEANS.items()}
    for name, (text, _) in texts.items():
        (models / f"{name}.yml").write_text(FLOAT32 + text)
    # Whether torch rounds a product before it is added depends on the processor, but for this one.
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    command = [python, "-c", SCRIPT, *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=models, env=environment)
    assert done.returncode == 0, done.stderr
    for name, (_, limit) in texts.items():
        ik.merge(f"{name}.yml", out=f"ours {name}", sync=False)
        theirs, ours = read_model(models / f"theirs {name}"), read_model(models / f"ours {name}")
        assert theirs.keys() == ours.keys()
        assert {t.dtype for t in theirs.values()} == {torch.bfloat16}
        count = 0
        for key, t in theirs.items():
            one, two = t.float(), ours[key].float()
            assert ((one - two).abs() <= one.abs() / 128 + 1e-7).all(), (name, key)
            count += int((one != two).sum())
        elements = sum(t.numel() for t in theirs.values())
        print(f"{name}: {count} of {elements}")
        assert count <= limit * elements, name
