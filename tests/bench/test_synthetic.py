"""Generated models: the shape of real ones, the same from the same seed, and accepted by transformers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from small_models import read_model

from ires_kernels.bench import synthetic
from ires_kernels.bench.synthetic import SHAPES, Shape, count_of, shape_of, write_triple
from ires_kernels.checkpoints.validation import open_checkpoint


def digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}".encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def test_presets_have_the_published_sizes():
    assert {name: shape.parameters for name, shape in SHAPES.items() if name != "tiny"} == {
        "llama-1b": 1_235_814_400,
        "llama-3b": 3_212_749_824,
        "llama-8b": 8_030_261_248,
    }
    assert len(SHAPES["llama-1b"].tensors()) == 146


@pytest.mark.parametrize("count", [400_000, 2_500_000, 10**7, 125 * 10**6, 10**9, 8 * 10**9])
def test_any_size(count):
    assert abs(Shape.of_parameters(count).parameters / count - 1) <= 1 / 8


def test_sizes_in_words():
    assert [count_of(text) for text in ("1000", "250M", "1.5G", "500MB", "16gb")] == [
        1000,
        250_000_000,
        1_500_000_000,
        250_000_000,
        8_000_000_000,
    ]
    assert shape_of("llama-3b") is SHAPES["llama-3b"]
    for text in ("llama-2", "-5M", "0", "nan", "infG", ""):
        with pytest.raises(ValueError, match="got size"):
            count_of(text)
    with pytest.raises(ValueError, match="at least"):
        shape_of("10K")


def test_a_seed_gives_the_same_files_and_another_other_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_triple(tmp_path / name, "tiny", seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a/base") != digest(tmp_path / "c/base")


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)]
)
def test_statistics(tmp_path, dtype, torch_dtype):
    triple = write_triple(tmp_path, "tiny", dtype=dtype)
    base, instruct, target = (read_model(folder) for folder in triple[:3])
    weight = "model.layers.1.mlp.up_proj.weight"
    assert {t.dtype for t in base.values()} == {torch_dtype}
    assert base[weight].double().std() == pytest.approx(0.02, rel=0.05)
    assert base["model.norm.weight"].double().mean() == pytest.approx(1, abs=0.02)
    for model, std in ((instruct, 2e-4), (target, 4e-4)):
        update = model[weight].double() - base[weight].double()
        assert update.std() == pytest.approx(std, rel=0.1)
    assert triple.nbytes == sum(t.nbytes for t in base.values())
    assert triple.parameters == sum(t.numel() for t in base.values())


def test_pieces_do_not_show(tmp_path, monkeypatch):
    """A tensor of many pieces is filled to its end, and pieces are not copies of each other."""
    monkeypatch.setattr(synthetic, "_PIECE", 1000)
    weight = read_model(write_triple(tmp_path, "tiny").base)["model.embed_tokens.weight"].flatten()
    assert (weight != 0).float().mean() > 0.99
    assert (
        len({tuple(row.tolist()) for row in weight[: len(weight) // 1000 * 1000].view(-1, 1000)}) == len(weight) // 1000
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_layout(tmp_path, shards):
    triple = write_triple(tmp_path, "tiny", shards=shards)
    for folder in triple[:3]:
        checkpoint = open_checkpoint(folder)
        assert len(checkpoint.shards) == shards
        assert list(checkpoint.tensors) == list(SHAPES["tiny"].tensors())
        assert {name: ref.shape for name, ref in checkpoint.tensors.items()} == SHAPES["tiny"].tensors()
        if shards > 1:
            assert checkpoint.index_metadata == {"total_size": triple.nbytes}


def test_untied(tmp_path):
    shape = Shape(64, 192, 1, 4, 2, 16, 512, tied=False)
    model = open_checkpoint(write_triple(tmp_path, shape).target)
    assert list(model.tensors)[-1] == "lm_head.weight"
    assert model.config is not None
    assert model.config["tie_word_embeddings"] is False


def test_transformers_loads_them(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    triple = write_triple(tmp_path, "tiny")
    text = "Grüß Gott, 你好!\n"
    for folder, end in ((triple.base, 257), (triple.instruct, 258), (triple.target, 257)):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert model.dtype == torch.bfloat16
        for name, tensor in read_model(folder).items():
            assert torch.equal(model.state_dict()[name], tensor)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(text, return_tensors="pt")
        assert tokens.input_ids.tolist() == [list(text.encode())]
        assert tokenizer.decode(tokens.input_ids[0]) == text
        assert tokenizer.eos_token_id == end
        with torch.no_grad():
            assert model(tokens.input_ids).logits.isfinite().all()
    chat = AutoTokenizer.from_pretrained(triple.instruct).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_existing_folders_are_left_alone(tmp_path, capsys):
    write_triple(tmp_path, "tiny")
    before = digest(tmp_path)
    with pytest.raises(FileExistsError):
        write_triple(tmp_path, "tiny", seed=5)
    with pytest.raises(SystemExit, match="2"):
        synthetic.main([f"{tmp_path}", "--shape", "tiny"])
    assert digest(tmp_path) == before
    assert "base" in capsys.readouterr().err


def test_command_line(tmp_path, capsys):
    assert synthetic.main([f"{tmp_path}", "--shape", "tiny", "--dtype", "f32", "--shards", "1", "--seed", "3"]) == 0
    assert "131,392 parameters" in capsys.readouterr().out
    assert json.loads((tmp_path / "target/config.json").read_text())["dtype"] == "float32"
    with pytest.raises(SystemExit, match="2"):
        synthetic.main([f"{tmp_path / 'x'}", "--shape", "huge"])
