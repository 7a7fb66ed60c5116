"""What is given as a model and is none, or not a whole one, is called what it is, with what to do about it."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import Tensors, normal, read_model, tensors, triple, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.cli import main

Q = "model.layers.{}.self_attn.q_proj"


def refused(target: Path, instruct: Path, base: Path, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        ik.apply(target, (instruct, base), out=target.parent / "out", sync=False, **options)  # type: ignore[arg-type]
    assert not (target.parent / "out").exists()
    return f"{caught.value}"


# --- adapters


def factors(kind: str) -> Tensors:
    parts = {
        "lora": ("lora_A.weight", "lora_B.weight"),
        "dora": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
        "kohya": ("lora_down.weight", "lora_up.weight"),
        "ia3": ("ia3_l",),
        "vera": ("vera_lambda_b", "vera_lambda_d"),
        "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        "lokr": ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
        "oft": ("oft_R",),
    }[kind]
    return {f"base_model.model.{Q.format(i)}.{part}": normal((4, 4), i) for i in range(2) for part in parts}


@pytest.mark.parametrize("kind", ["lora", "dora", "kohya", "ia3", "vera", "loha", "lokr", "oft"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "lora.safetensors"])
def test_an_adapter_is_called_one_in_every_role(tmp_path: Path, kind: str, file: str) -> None:
    base, instruct, target = triple(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(factors(kind), adapter / file)
    (adapter / "adapter_config.json").write_text("{}")
    for path in (adapter, adapter / file):
        assert ik.inspect(path)["kind"] == "adapter"
        for paths in ((path, instruct, base), (target, path, base), (target, instruct, path)):
            text = refused(*paths)
            assert "is an adapter" in text
            assert "merge_and_unload" in text
        for call in (
            lambda path=path: ik.extract(base, path, tmp_path / "out"),
            lambda path=path: ik.extract(path, instruct, tmp_path / "out"),
            lambda path=path: ik.apply(target, path, out=tmp_path / "out"),
            lambda path=path: ik.load(target, path),
        ):
            with pytest.raises(CheckpointError, match="is an adapter"):
                call()


def test_the_command_line_says_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _, target = triple(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(factors("lora"), adapter / "adapter_model.safetensors")
    code = main(["apply", f"{target}", "--instruct", f"{adapter}", "--base", f"{base}", "-o", f"{tmp_path / 'out'}"])
    assert code == 2
    assert f"{adapter}: is an adapter" in capsys.readouterr().err
    assert main(["inspect", f"{adapter}"]) == 0
    assert capsys.readouterr().out.startswith("adapter ")


def test_a_model_with_an_adapter_beside_it_is_two_things(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    save_file(factors("lora"), instruct / "adapter_model.safetensors")
    (instruct / "adapter_config.json").write_text("{}")
    text = refused(target, instruct, base)
    assert "holds a model (model.safetensors) and an adapter (adapter_model.safetensors)" in text
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (instruct / name).rename(tmp_path / name)
    assert ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)


def test_factors_inside_a_model_are_no_weights(tmp_path: Path) -> None:
    """As peft keeps a model before merging; and Phi-4-multimodal, for good. The weights below merge by themselves."""
    paths = []
    for seed, role in enumerate(("target", "instruct", "base")):
        made = tensors(seed)
        for i in range(2):
            made |= {f"{Q.format(i)}.base_layer.weight": normal((8, 8), seed + 10)}
            made |= {f"{Q.format(i)}.lora_{x}.vision.weight": normal((8, 8), seed + 20) for x in "AB"}
        paths.append(write_model(tmp_path / role, made))
    text = refused(*paths)
    assert f"target ({paths[0]}) holds an adapter that is not merged in: 4 tensors such as" in text
    assert "lora_A.vision.weight" in text
    assert len(ik.inspect(paths[0])["adapter"]) == 4
    assert ik.inspect(paths[0])["kind"] == "model"
    ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False, skip="lora_")
    own, found = read_model(paths[0]), read_model(tmp_path / "out")
    changed = {name for name in own if not torch.equal(own[name], found[name])}
    assert changed == {name for name in own if "lora_" not in name}


@pytest.mark.parametrize("name", ["x.w_lora.lora.0.weight", "x.q_a_proj.weight", "x.adapter_down.weight"])
def test_trained_weights_are_no_factors(tmp_path: Path, name: str) -> None:
    """Some models have low-rank weights of their own: RWKV, DeepSeek."""
    for seed, role in enumerate(("target", "instruct", "base")):
        write_model(tmp_path / role, {name: normal((8, 8), seed)})
    report = ik.apply(tmp_path / "target", (tmp_path / "instruct", tmp_path / "base"), out=tmp_path / "out", sync=False)
    assert report.tensors == 1  # type: ignore[union-attr]


# --- tensors without elements


@pytest.mark.parametrize("shape", [(0,), (0, 16), (40, 0)])
@pytest.mark.parametrize("roles", [("target",), ("instruct",), ("base",), ("target", "instruct", "base")])
def test_empty_weights_are_refused(tmp_path: Path, shape: tuple[int, ...], roles: tuple[str, ...]) -> None:
    """All three broken alike is broken as well; and a target keeps its hole whatever is skipped."""
    name = "model.embed_tokens.weight"
    for role in ("target", "instruct", "base"):
        hole = {name: torch.zeros(shape).bfloat16()} if role in roles else {}
        write_model(tmp_path / role, tensors(1) | hole)
    paths = (tmp_path / "target", tmp_path / "instruct", tmp_path / "base")
    text = refused(*paths)
    for role in roles:
        assert f"{name!r} of {role} ({tmp_path / role}/model.safetensors) is empty: shape {list(shape)}" in text
        assert ik.inspect(tmp_path / role)["empty"] == [name]
    assert "ZeRO-3" in text
    if "target" in roles:
        assert "ZeRO-3" in refused(*paths, skip="embed")
    else:
        with pytest.raises(CheckpointError, match="ZeRO-3"):
            ik.extract(paths[2], paths[1], tmp_path / "out")
    if "target" not in roles:
        ik.apply(paths[0], paths[1:], out=tmp_path / "out", sync=False, skip="embed")
        assert torch.equal(read_model(tmp_path / "out")[name], tensors(1)[name])


def test_many_empty_weights_are_one_line(tmp_path: Path) -> None:
    made = tensors(1) | {f"model.layers.{i}.up.weight": torch.zeros(0) for i in range(300)}
    for role in ("target", "instruct", "base"):
        write_model(tmp_path / role, made if role == "instruct" else tensors(1))
    text = refused(tmp_path / "target", tmp_path / "instruct", tmp_path / "base")
    assert "300 tensors model.layers.*.up.weight of instruct" in text
    assert "are empty: shape [0]" in text
    assert len(text.splitlines()) == 3


def test_buffers_without_elements_are_kept_with_a_warning(tmp_path: Path) -> None:
    made = {"w": normal((4, 4), 1), "cache": torch.zeros(0, 4)}
    for role in ("target", "instruct", "base"):
        write_model(tmp_path / role, made)
    report = ik.apply(tmp_path / "target", (tmp_path / "instruct", tmp_path / "base"), out=tmp_path / "out", sync=False)
    assert "'cache' of the target has no elements" in f"{report}"
    assert read_model(tmp_path / "out")["cache"].shape == (0, 4)
    # what others have with elements is missing here
    write_model(tmp_path / "full", made | {"cache": torch.zeros(2, 4)})
    with pytest.raises(CheckpointError, match=r"'cache' of target .* is empty"):
        ik.apply(tmp_path / "target", (tmp_path / "full", tmp_path / "base"), out=tmp_path / "out2")


def test_integers_without_elements_are_equal(tmp_path: Path) -> None:
    made = {"w": normal((4, 4), 1), "ids": torch.zeros(0, dtype=torch.int64)}
    for role in ("target", "instruct", "base"):
        write_model(tmp_path / role, made)
    report = ik.apply(tmp_path / "target", (tmp_path / "instruct", tmp_path / "base"), out=tmp_path / "out", sync=False)
    assert report.copied == {"ids": "I64, equal in instruct and base"}  # type: ignore[union-attr]
    ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / "residual", sync=False)


def test_inspect_says_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / "m", tensors(1) | {"lm_head.weight": torch.zeros(0)})
    assert main(["inspect", f"{path}"]) == 0
    assert "1 tensor without elements, such as lm_head.weight: saved under ZeRO-3" in capsys.readouterr().out


# --- folders


VALUE_HEAD = {"v_head.summary.weight": normal((1, 16), 1)}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["pytorch_model.bin", "value_head.safetensors"], "its weights are in pytorch_model.bin"),
        (["pytorch_model.bin", "adapter_model.safetensors"], "its weights are in pytorch_model.bin"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "x.safetensors"], "its weights are in"),
        (["model.ckpt", "vae.safetensors"], "its weights are in model.ckpt"),
        (["weights.pt", "x.safetensors"], "its weights are in weights.pt"),
        (["consolidated.00.pth", "params.json"], "in Meta's original format (consolidated.00.pth)"),
        (["consolidated.00.pth", "consolidated.01.pth", "x.safetensors"], "in Meta's original format"),
        (["__0_0.distcp", "__1_0.distcp", ".metadata"], "a distributed checkpoint of a trainer (__0_0.distcp"),
        (["__0_0.distcp", "x.safetensors"], "a distributed checkpoint of a trainer"),
        (["global_step100/mp_rank_00_model_states.pt", "config.json"], "a distributed checkpoint of a trainer (glo"),
        (["pytorch_model_fsdp_0/__0_0.distcp", "config.json"], "a distributed checkpoint of a trainer (pyt"),
        (["adapter_model.bin", "adapter_config.json"], "holds an adapter, and no model"),
        (["model_index.json", "unet/diffusion_pytorch_model.safetensors"], "a pipeline of several models, unet"),
        (["modules.json", "0_Transformer/model.safetensors"], "holds folders with weights, 0_Transformer"),
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"], "holds a variant of a model"),
    ],
)
def test_folders_without_a_model_say_what_they_hold(tmp_path: Path, files: list[str], says: str) -> None:
    folder = tmp_path / "folder"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(VALUE_HEAD, folder / name)
        else:
            (folder / name).write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert says in f"{caught.value}"
    if "x.safetensors" in files and "pytorch_model.bin" in files:
        assert open_checkpoint(folder / "x.safetensors").tensors.keys() == VALUE_HEAD.keys()


@pytest.mark.parametrize("name", ["optimizer.pt", "training_args.bin", "rng_state_0.pth", "scheduler.pt", "scaler.pt"])
def test_what_trainers_leave_is_no_model(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(VALUE_HEAD, folder / "weights.safetensors")
    (folder / name).write_bytes(b"")
    assert open_checkpoint(folder).tensors.keys() == VALUE_HEAD.keys()


def test_the_way_out_of_a_variant(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    for i, name in enumerate("ab", 1):
        save_file({name: normal((2,), i)}, folder / f"model.fp16-0000{i}-of-00002.safetensors")
    table = {"weight_map": {n: f"model.fp16-0000{i}-of-00002.safetensors" for i, n in enumerate("ab", 1)}}
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    command = f"{caught.value}".rpartition(": ")[2]
    assert shlex.split(command)[0] == "cp"
    subprocess.run(command, shell=True, check=True)
    assert open_checkpoint(folder).tensors.keys() == {"a", "b"}


def test_a_shard_alone_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, instruct, target = triple(tmp_path, shards=3)
    shard = instruct / "model-00002-of-00003.safetensors"
    text = refused(target, shard, base)
    assert f"instruct ({shard}) is shard 2 of 3, and " in text
    assert f"Give the folder of the model, {instruct}," in text
    assert "--allow-missing" not in text
    assert main(["inspect", f"{instruct / 'model-00001-of-00003.safetensors'}"]) == 0
    out = capsys.readouterr().out
    assert "1 of 3: the other tensors of the model are not in this file" in out
    assert "embedding" not in out


def test_two_spellings_of_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    for path in (base, instruct, target):
        save_file(VALUE_HEAD, path / "consolidated.safetensors")
    report = ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    assert report.tensors == len(tensors(1))  # type: ignore[union-attr]
    assert f"{target}: consolidated.safetensors was not read, but model.safetensors.index.json" in f"{report}"
    assert main(["inspect", f"{target}"]) == 0
    assert "consolidated.safetensors" in capsys.readouterr().out
