"""Merging while loading: into a module that has no memory yet, and tensor by tensor."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from small_models import read_model, same, tensors, triple, write_model
from torch import Tensor, nn

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.live import loading
from ires_kernels.planning.rules import ArgumentError

LLAMA: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not same(found[name], tensor)] == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_transformers_without_memory(tmp_path: Path, tied: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for role in ("base", "target"):
        model.save_pretrained(tmp_path / role)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.004)
    model.save_pretrained(tmp_path / "instruct")
    pair = (tmp_path / "instruct", tmp_path / "base")
    ik.apply(tmp_path / "target", pair, out=tmp_path / "out", alpha=0.7)
    wanted = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with accelerate.init_empty_weights():
        empty = transformers.LlamaForCausalLM(config).eval()
    empty.model.norm.weight.requires_grad_(False)
    found = ik.load(tmp_path / "target", pair, alpha=0.7, module=empty)
    assert_same(dict(empty.state_dict()), dict(wanted.state_dict()))
    assert_same(found, dict(wanted.state_dict()))
    assert (empty.lm_head.weight is empty.model.embed_tokens.weight) == tied
    assert empty.model.embed_tokens.weight.requires_grad
    assert not empty.model.norm.weight.requires_grad
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(empty(ids).logits, wanted(ids).logits)
    with torch.device("meta"):
        all_meta = transformers.LlamaForCausalLM(config)
    with pytest.raises(ArgumentError, match=r"inv_freq' is a buffer on the meta device that no file holds"):
        ik.load(tmp_path / "target", pair, module=all_meta)


def pair_for(folder: Path, model: nn.Module) -> tuple[Path, Path]:
    """Files of instruct and base for a module."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_model(folder / "base", base)
    write_model(folder / "instruct", {name: tensor + 0.25 * tensor for name, tensor in base.items()})
    return folder / "instruct", folder / "base"


def test_other_modules_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    instruct, base = pair_for(tmp_path, nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)))
    with torch.device("meta"):
        fewer, more = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2), nn.Linear(2, 2))
        wider = nn.Sequential(nn.Linear(8, 5), nn.Linear(4, 2))
    for module, message in (
        (fewer, "'1.weight' is not in the module"),
        (more, "'2.weight' is in no file"),
        (wider, r"'0.weight' has shape \[5, 8\] in the module, \[4, 8\] in the files"),
    ):
        with pytest.raises(ArgumentError, match=message):
            ik.load(base, (instruct, base), module=module, progress=lambda *_: pytest.fail("computed"))
        assert all(parameter.is_meta for parameter in module.parameters())
    with pytest.raises(TypeError, match=r"wanted a torch\.nn\.Module"):
        ik.load(base, (instruct, base), module="model")  # type: ignore[arg-type]


def test_what_a_module_ties_and_files_do_not(tmp_path: Path) -> None:
    torch.manual_seed(1)
    instruct, base = pair_for(tmp_path, nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)))
    with torch.device("meta"):
        tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ArgumentError, match=r"'0\.weight' and '1\.weight' are one in the module, and two in the files"):
        ik.load(base, (instruct, base), module=tied)
    assert tied[0].weight.is_meta


def test_weights_come_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path, shards=3)
    ik.apply(target, (instruct, base), out=tmp_path / "out", alpha=0.7, dtype="f16")
    names = []
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names += [*opened.keys()]
    monkeypatch.setattr(loading, "BATCH", 2048)
    found = ik.weights(target, (instruct, base), alpha=0.7, dtype="f16")
    assert sorted(found.metadata) == sorted(names)
    assert (len(found), found.nbytes) == (7, sum(t.nbytes for t in read_model(tmp_path / "out").values()))
    for _ in range(2):
        computed = dict(found)
        assert {name: (t.dtype, tuple(t.shape)) for name, t in computed.items()} == found.metadata
        assert list(computed) == list(found.metadata)
        assert_same(computed, read_model(tmp_path / "out"))


def test_weights_that_were_taken_are_not_held(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    held = []
    for _, tensor in ik.weights(target, (instruct, base)):
        held.append(weakref.ref(tensor))
        del tensor
        assert all(reference() is None for reference in held)


def test_a_damaged_residual_ends_the_weights(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    ik.extract(base, instruct, tmp_path / "residual")
    with open(tmp_path / "residual/residual.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"abc")
    weights = iter(ik.weights(target, tmp_path / "residual"))
    assert len([next(weights) for _ in range(7)]) == 7
    with pytest.raises(CheckpointError, match="is damaged"):
        next(weights)


def test_a_server_that_loads_pairs(tmp_path: Path) -> None:
    """What a server does with names and tensors: it looks up its own parameter and copies."""
    base, instruct, target = triple(tmp_path)
    wanted = ik.load(target, (instruct, base))
    server = {name: torch.empty_like(tensor) for name, tensor in tensors(9).items()}
    for name, tensor in ik.weights(target, (instruct, base)):
        server[name].copy_(tensor)
    assert_same(server, wanted)
