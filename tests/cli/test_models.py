"""Models of the families people merge, made, saved and loaded back by transformers itself.

The wanted parameters are computed apart from everything under test: a float64 merge in numpy, rounded to bfloat16 once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import read_model
from torch import Tensor

import ires_kernels as ik
from ires_kernels.cli import main

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama untied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=False),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=16),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=16),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}


def save(folder: Path, config: Any, seed: int, parent: Any = None) -> Any:
    """A model with random weights, or weights a little off its parent's, in bfloat16 and several shards."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    if parent is not None:
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), parent.parameters(), strict=True):
                ours.copy_((theirs.float() + torch.randn(theirs.shape) * 2e-3).to(torch.bfloat16))
    model.generation_config.max_new_tokens = seed
    model.save_pretrained(folder, max_shard_size="10KB")
    return model


def to_float64(t: Tensor) -> np.ndarray:
    return (t.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded_once(x: np.ndarray) -> Tensor:
    """float64 to bfloat16, to nearest and ties to even: 8 significant bits (none of these weights is subnormal)."""
    fraction, exponent = np.frexp(x)
    rounded = np.ldexp(np.rint(np.ldexp(fraction, 8)), exponent - 8)
    return torch.from_numpy(rounded).to(torch.bfloat16)  # exact


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders base, instruct and target of a family, made when first asked for."""
    root = tmp_path_factory.mktemp("families")

    def make(family: str) -> Path:
        folder = root / family.replace(" ", "-")
        if not folder.exists():
            config = FAMILIES[family]()
            base = save(folder / "base", config, 1)
            save(folder / "instruct", config, 2, parent=base)
            save(folder / "target", config, 3, parent=base)
            (folder / "instruct" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
            (folder / "instruct" / "tokenizer.json").write_text('{"from": "instruct"}')
            (folder / "instruct" / "chat_template.jinja").write_text("{{ messages }}")
            (folder / "target" / "tokenizer.json").write_text('{"from": "target"}')
            (folder / "target" / "special_tokens_map.json").write_text("{}")
            (folder / "target" / "README.md").write_text("of the target")
        return folder

    return make


def load(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def write_reference(folder: Path, target: Path, wanted: dict[str, Tensor]) -> Path:
    """The target with other tensors in its shards, written by the safetensors library."""
    shutil.copytree(target, folder)
    for path in folder.glob("*.safetensors"):
        save_file({name: wanted[name] for name in load_file(path)}, path, metadata={"format": "pt"})
    return folder


def assert_equal_parameters(found: Any, wanted: Any) -> None:
    expected = dict(wanted.named_parameters())
    assert dict(found.named_parameters()).keys() == expected.keys()
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_merged_models_load_and_are_the_float64_merge_rounded_once(
    families: Callable[[str], Path], tmp_path: Path, family: str, alpha: float
) -> None:
    folder = families(family)
    base, instruct, target = folder / "base", folder / "instruct", folder / "target"
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(shards) > 2
    one, two, residual = tmp_path / "one", tmp_path / "two", tmp_path / "residual"
    common = ["--alpha", f"{alpha}", "--no-sync", "--quiet"]
    assert main(["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}", "-o", f"{one}", *common]) == 0
    ik.extract(base, instruct, residual, sync=False)
    ik.apply(target, residual, out=two, alpha=alpha, sync=False)

    t, i, b = ({name: to_float64(x) for name, x in read_model(path).items()} for path in (target, instruct, base))
    wanted = {name: rounded_once(t[name] + alpha * (i[name] - b[name])) for name in t}
    assert t.keys() == i.keys() == b.keys()
    for out in (one, two):
        assert sorted(path.name for path in out.glob("*.safetensors")) == shards
        assert (out / "config.json").read_bytes() == (target / "config.json").read_bytes()
        assert (
            json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
            == (json.loads((target / "model.safetensors.index.json").read_text())["weight_map"])
        )
        found = read_model(out)
        assert found.keys() == wanted.keys()
        for name, x in wanted.items():
            assert torch.equal(found[name], x), name
        assert ik.verify(out)

    reference = load(write_reference(tmp_path / "reference", target, wanted))
    merged, in_two_steps, before = load(one), load(two), load(target)
    assert_equal_parameters(merged, reference)
    assert_equal_parameters(in_two_steps, reference)
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        logits = merged(ids).logits
        assert torch.equal(logits, reference(ids).logits)
        assert torch.equal(logits, in_two_steps(ids).logits)
        assert not torch.equal(logits, before(ids).logits)
    assert merged.generation_config.max_new_tokens == 2, "that of the instruct model"


def test_where_the_other_files_come_from(families: Callable[[str], Path], tmp_path: Path) -> None:
    folder = families("llama untied")
    paths = [folder / name for name in ("base", "instruct", "target")]
    ik.extract(paths[0], paths[1], tmp_path / "residual", sync=False)
    ik.apply(paths[2], (paths[1], paths[0]), out=tmp_path / "one", sync=False)
    ik.apply(paths[2], tmp_path / "residual", out=tmp_path / "two", sync=False)
    for out in (tmp_path / "one", tmp_path / "two"):
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            assert (out / name).read_bytes() == (paths[1] / name).read_bytes()
        for name in ("README.md", "config.json"):
            assert (out / name).read_bytes() == (paths[2] / name).read_bytes()
        assert not (out / "special_tokens_map.json").exists(), "half of another tokenizer"


def test_a_residual_does_not_load_as_a_model(families: Callable[[str], Path], tmp_path: Path) -> None:
    folder = families("llama tied")
    ik.extract(folder / "base", folder / "instruct", tmp_path / "residual", sync=False)
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "residual")


def test_an_output_in_another_dtype_loads_in_it(families: Callable[[str], Path], tmp_path: Path) -> None:
    folder = families("qwen2")
    ik.apply(folder / "target", (folder / "instruct", folder / "base"), out=tmp_path / "out", dtype="f32", sync=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_a_killed_run_leaves_does_not_load(
    families: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ires_kernels.files import new_folder

    folder = families("mistral")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(new_folder.NewFolder, "add", killed)  # after the weights, before the side files
    monkeypatch.setattr(new_folder.NewFolder, "__exit__", lambda *_: None)  # as nobody cleans up after SIGKILL
    with pytest.raises(KeyboardInterrupt):
        ik.apply(folder / "target", (folder / "instruct", folder / "base"), out=tmp_path / "out", sync=False)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial").glob("*.safetensors"))
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out.partial")
