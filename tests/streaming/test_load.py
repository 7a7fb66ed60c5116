"""`load`: what `apply` would write, in memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from merges import assert_same
from selection import tiles
from small_models import Tensors, normal, read_model, snapshot, triple, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError, build_header
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.planning.steps import Operand, Output, Step
from ires_kernels.streaming import statedict

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def small_tiles() -> Iterator[None]:
    with tiles(elements=64, copied=96):
        yield


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"alpha": 0.7, "alphas": [("mlp", 0.2), ("norm", 0)]},
    "stochastic": {"alpha": 0.3, "rounding": "stochastic", "seed": 2**64 - 1},
    "converted": {"dtype": "f32", "skip": "layers.1"},
    "f16": {"dtype": "f16", "skip": ["norm", "lm_head"], "rounding": "stochastic", "seed": 4},
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("case", OPTIONS)
def test_the_tensors_are_those_that_apply_writes(tmp_path: Path, case: str, threads: int) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    options = OPTIONS[case]
    for residual in ((instruct, base), tmp_path / "residual", [tmp_path / "residual"]):
        ik.apply(target, residual, out=tmp_path / "out", sync=False, **options)
        before = snapshot(tmp_path)
        found = ik.load(target, residual, threads=threads, **options)
        assert_same(found, read_model(tmp_path / "out"))
        assert list(found) == list(open_checkpoint(tmp_path / "out").tensors)
        assert snapshot(tmp_path) == before
        for path in (tmp_path / "out").iterdir():
            path.unlink()


@pytest.mark.usefixtures("small_tiles")
def test_tensors_of_every_kind(tmp_path: Path) -> None:
    """Floats of every type and size are merged; what is kept is kept, whatever it is."""
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    others = [
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
        torch.uint64, torch.complex64,
    ]  # fmt: skip
    models: list[Tensors] = [{}, {}, {}]
    for number, size in enumerate([0, 1, 63, 64, 65, 333]):
        for role, model in enumerate(models):
            t = normal((size,), 10 * number + role, torch.float64, 1.0)
            model[f"t{number}"] = t.to(floats[(number + role) % len(floats)])
    for model in models:
        model["scalar"] = normal((), 77, torch.float32)
        model["kept.f8"] = normal((2, 50), 78, torch.float32, 1.0).to(torch.float8_e5m2)
        model["empty"] = torch.zeros(0, 3, dtype=torch.int32)
        for dtype in others:
            model[f"{dtype}"] = torch.ones(7, 31).to(dtype)
    target, instruct, base = (write_model(tmp_path / name, model) for name, model in zip("tib", models, strict=True))
    ik.apply(target, (instruct, base), out=tmp_path / "out", skip="kept", sync=False)
    found = ik.load(target, (instruct, base), skip="kept", threads=3)
    assert_same(found, read_model(tmp_path / "out"))
    assert all(t.is_contiguous() and not t.requires_grad for t in found.values())


def small(kind: str, **changes: Any) -> Any:
    return getattr(transformers, kind)(**SMALL, **changes)


@pytest.mark.filterwarnings("ignore:.* and base look unrelated")  # they are random
@pytest.mark.parametrize(
    ("kind", "tied"), [("LlamaConfig", True), ("LlamaConfig", False), ("Qwen2Config", True), ("MistralConfig", False)]
)
def test_the_result_is_a_state_dict_of_transformers(tmp_path: Path, kind: str, tied: bool) -> None:
    config = small(kind, tie_word_embeddings=tied)
    for seed, name in enumerate(("base", "instruct", "target")):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name, max_shard_size="10KB")
    pair = (tmp_path / "instruct", tmp_path / "base")
    ik.apply(tmp_path / "target", pair, out=tmp_path / "out", alpha=0.5, sync=False)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    state = ik.load(tmp_path / "target", pair, alpha=0.5)
    assert state.keys() == merged.state_dict().keys()
    assert_same(state, merged.state_dict())
    shared = state["lm_head.weight"] is state["model.embed_tokens.weight"]
    assert shared == tied

    model.load_state_dict(state)
    assert_same(model.state_dict(), state)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    empty.load_state_dict(state, assign=True)
    assert empty.model.embed_tokens.weight.data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    taken = type(merged).from_pretrained(None, config=config, state_dict=dict(state), dtype=torch.bfloat16)
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        assert torch.equal(taken.eval()(ids).logits, merged.eval()(ids).logits)


@pytest.mark.parametrize(
    ("embedding", "config", "head"),
    [
        ("model.embed_tokens.weight", {}, "lm_head.weight"),
        ("model.embed_tokens.weight", None, "lm_head.weight"),
        ("transformer.wte.weight", {"architectures": ["GPT2LMHeadModel"]}, "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", {}, "language_model.lm_head.weight"),
        ("model.language_model.embed_tokens.weight", {}, "lm_head.weight"),
        ("shared.weight", {"architectures": ["T5ForConditionalGeneration"]}, "lm_head.weight"),
        ("embed_tokens.weight", {"architectures": ["Qwen3Model"], "tie_word_embeddings": True}, None),
        ("model.embed_tokens.weight", {"tie_word_embeddings": False}, None),
        ("encoder.weight", {}, None),
    ],
)
def test_the_name_of_a_head_that_is_the_embedding(
    tmp_path: Path, embedding: str, config: dict[str, Any] | None, head: str | None
) -> None:
    models = [
        write_model(tmp_path / name, {embedding: normal((8, 4), seed)}, config=config)
        for seed, name in enumerate("tib")
    ]
    state = ik.load(models[0], (models[1], models[2]))
    assert list(state) == ([embedding] if head is None else [embedding, head])
    assert statedict.shared_head(open_checkpoint(models[0])) == (None if head is None else (head, embedding))


def test_refusals_are_those_of_apply(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    pair = (instruct, base)
    shifted = {name: t[:8] if name == "model.norm.weight" else t for name, t in read_model(base).items()}
    other = write_model(tmp_path / "other", {name: t.contiguous() for name, t in shifted.items()})
    ids = [
        write_model(tmp_path / f"ids{i}", {**read_model(path), "ids": torch.arange(i // 2, 3 + i // 2)})
        for i, path in enumerate((target, instruct, base))
    ]
    refused: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((target, (instruct, other)), {}, "has shape [8] in base"),
        ((target, pair), {"alpha": float("nan")}, "alpha is nan"),
        ((target, pair), {"skip": "typo"}, "'typo' matches no tensor"),
        ((target, pair), {"dtype": "int4"}, "dtype is 'int4'"),
        ((target, pair), {"threads": 0}, "threads is 0"),
        ((ids[0], (ids[1], ids[2])), {}, "'ids' is I64 in"),
    ]
    for arguments, options, text in refused:
        with pytest.raises((CheckpointError, ArgumentError), match=re.escape(text)) as ours:
            ik.load(*arguments, **options)
        with pytest.raises((CheckpointError, ArgumentError)) as theirs:
            ik.apply(*arguments, out=tmp_path / "out", **options)
        assert f"{ours.value}" == f"{theirs.value}"


def test_a_damaged_residual_and_a_changing_file(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    file = tmp_path / "residual" / "residual.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"tensor '.*' is damaged: its xxh3_128 is .*residual\.json says"):
        ik.load(target, tmp_path / "residual")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        ik.load(target, (instruct, base), progress=lambda *_: os.utime(target / "model.safetensors", ns=(5, 5)))


def test_a_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    for folder in (base, instruct, target):
        with open(folder / "extra.safetensors", "wb") as file:
            file.write(build_header([("six", "F6_E2M3", (4,))], {}) + b"abc")
        names = dict.fromkeys(open_checkpoint(folder / "model.safetensors").tensors, "model.safetensors")
        names["six"] = "extra.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(CheckpointError, match=r"tensor 'six' of .*extra.safetensors is F6_E2M3, for which torch"):
        ik.load(target, (instruct, base), skip="six")


def test_no_room(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    plan = ik.apply(target, (instruct, base), out=tmp_path / "out", dry_run=True)
    assert isinstance(plan, Plan)
    refs = [replace(step.inputs[0], shape=(1 << 40, 1 << 20)) for step in plan.steps]
    huge = [Step(Output(ref.name, ref.dtype, ref.shape), "copy", (Operand("target", (ref,)),)) for ref in refs]
    wanted = r"take 1.61e\+07 TB, and cpu has no room left at 'lm_head.weight': .*can't alloc"
    with pytest.raises(MemoryError, match=wanted):
        statedict.allocate(huge, torch.device("cpu"))


def test_in_inference_mode(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    with torch.inference_mode():
        found = ik.load(target, (instruct, base))
    assert_same(found, ik.load(target, (instruct, base)))


@pytest.mark.skipif(not ik.backends()["native"].available, reason="the reference backend needs memory for temporaries")
def test_there_is_one_copy_of_the_model(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "instruct", "target")):
        write_model(tmp_path / name, {f"t{i}": normal((1 << 22,), 10 * seed + i) for i in range(8)})  # 64 MiB a model
    program = f"""
        from pathlib import Path
        import ires_kernels as ik
        from ires_kernels.streaming import device, statedict  # and torch, and all that it loads

        def anonymous():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

        folder, before = Path({f"{tmp_path}"!r}), anonymous()
        seen = [before]
        watch = lambda *_: seen.append(anonymous())
        state = ik.load(folder / "target", (folder / "instruct", folder / "base"), threads=2, progress=watch)
        print(max(seen) - before, sum(t.numel() * t.element_size() for t in state.values()) // 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True,
        env={**os.environ, "IRES_BACKEND": "native"},
    )  # fmt: skip
    grown, model = map(int, done.stdout.split())
    assert model == 64 * 1024
    assert model * 0.9 < grown < model + 16 * 1024, f"{grown} KiB"
