"""Folders and files become tensors with a place on disk, or are refused with a reason."""

from __future__ import annotations

import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId
from ires_kernels.checkpoints.header import CheckpointError, build_header, tensor_bytes
from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.files.plain import plain

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def write(path: Path, names: str, dtype: str = "BF16", shape: tuple[int, ...] = (2, 3)) -> None:
    """A shard with the tensors `names`, filled with their own first letter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(name[0].encode() * tensor_bytes(dtype, shape) for name in names.split())
    path.write_bytes(build_header([(name, dtype, shape) for name in names.split()], {"format": "pt"}) + data)


def write_json(path: Path, value: Any) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "folder"


@pytest.fixture
def sharded(folder: Path) -> Path:
    """Two shards and their index, whose order is not that of the files."""
    write(folder / A, "d c")
    write(folder / B, "b a")
    write_json(folder / INDEX, {"metadata": {"total_size": 48}, "weight_map": {"a": B, "c": A, "b": B, "d": A}})
    return folder


def refusal(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(plain(path)), "every refusal names the path first"
    assert message.endswith((".", "`.")), "and ends with the way out"
    assert len(message) < 1500
    return message


def stored(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The bytes of every tensor, read from where the checkpoint says that they are."""
    return {
        name: ref.path.read_bytes()[ref.offset : ref.offset + ref.nbytes] for name, ref in checkpoint.tensors.items()
    }


# ---------------------------------------------------------------------------------------------------------- accepted


def test_single_file_folder(folder: Path) -> None:
    write(folder / "model.safetensors", "b a")
    write_json(folder / "config.json", {"model_type": "llama", "time_step_limit": [0.0, float("inf")]})
    checkpoint = open_checkpoint(f"{folder}")
    assert (checkpoint.path, checkpoint.kind, checkpoint.index_name) == (folder, "model", None)
    assert checkpoint.index_metadata == {}
    assert checkpoint.config == {"model_type": "llama", "time_step_limit": [0.0, float("inf")]}
    assert checkpoint.manifest is None
    assert list(checkpoint.tensors) == ["b", "a"]
    ref = checkpoint.tensors["a"]
    assert (ref.name, ref.dtype, ref.shape, ref.nbytes, ref.numel) == ("a", "BF16", (2, 3), 12, 6)
    assert ref.path == folder / "model.safetensors"
    assert stored(checkpoint) == {"b": b"b" * 12, "a": b"a" * 12}
    assert checkpoint.shards[0].header.metadata == {"format": "pt"}
    assert checkpoint.shards[0].file_id == FileId.of(ref.path)


def test_sharded_folder(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert [shard.path.name for shard in checkpoint.shards] == [A, B]
    assert list(checkpoint.tensors) == ["d", "c", "b", "a"]
    assert (checkpoint.index_name, checkpoint.index_metadata) == (INDEX, {"total_size": 48})
    assert stored(checkpoint) == {name: name.encode() * 12 for name in "dcba"}


def test_wrong_total_size_and_extra_metadata_are_kept(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    for metadata in [{"total_size": 1, "total_parameters": 2.5}, {}]:
        write_json(sharded / INDEX, index | {"metadata": metadata})
        assert open_checkpoint(sharded).index_metadata == metadata
    write_json(sharded / INDEX, {"weight_map": index["weight_map"]})
    assert open_checkpoint(sharded).index_metadata == {}


def test_merged_model_has_a_manifest(sharded: Path) -> None:
    write_json(sharded / "ires.json", {"operation": "apply"})
    assert (open_checkpoint(sharded).manifest or Manifest()).operation == "apply"


def test_residual_folders(folder: Path) -> None:
    write(folder / "residual.safetensors", "a", "F32")
    write_json(folder / "residual.json", {"operation": "extract"})
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.kind, (checkpoint.manifest or Manifest()).operation) == ("residual", "extract")
    (folder / "residual.safetensors").rename(folder / "residual-00001-of-00001.safetensors")
    index = "residual.safetensors.index.json"
    write_json(folder / index, {"metadata": {}, "weight_map": {"a": "residual-00001-of-00001.safetensors"}})
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.kind, checkpoint.index_name, list(checkpoint.tensors)) == ("residual", index, ["a"])


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "my_merge.safetensors"])
def test_the_only_file_of_a_folder(folder: Path, name: str) -> None:
    write(folder / name, "a")
    write(folder / f"._{name}", "b")  # as macOS leaves them on foreign disks
    checkpoint = open_checkpoint(folder)
    assert checkpoint.shards[0].path == folder / name
    assert checkpoint.kind == "model"


def test_the_only_index_of_a_folder(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "diffusion_pytorch_model.safetensors.index.json")
    assert open_checkpoint(sharded).index_name == "diffusion_pytorch_model.safetensors.index.json"


def test_single_files(sharded: Path, folder: Path) -> None:
    write_json(folder / "config.json", {})
    checkpoint = open_checkpoint(sharded / A)
    assert (checkpoint.path, checkpoint.kind, list(checkpoint.tensors)) == (sharded / A, "model", ["d", "c"])
    assert checkpoint.config is None, "a file on its own is not the model of its folder"
    for name in ["residual.safetensors", "residual-00001-of-00002.safetensors"]:
        write(folder / "residual" / name, "a")
        checkpoint = open_checkpoint(folder / "residual" / name)
        assert (checkpoint.kind, checkpoint.manifest) == ("residual", None)
    write_json(folder / "residual" / "residual.json", {"ires": "1"})
    alone = open_checkpoint(folder / "residual" / "residual.safetensors")
    assert (alone.manifest or Manifest()).version == "1"


def test_index_that_names_model_safetensors(folder: Path) -> None:
    write(folder / "model.safetensors", "a")
    write_json(folder / INDEX, {"weight_map": {"a": "model.safetensors"}})
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.index_name, list(checkpoint.tensors)) == (INDEX, ["a"])


def test_an_index_under_another_name_does_not_matter_beside_model_safetensors(folder: Path) -> None:
    write(folder / "model.safetensors", "a")
    write_json(folder / "other.safetensors.index.json", {"weight_map": {"z": "other.safetensors"}})
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.index_name, list(checkpoint.tensors)) == (None, ["a"])


def test_files_that_the_index_does_not_name_are_left_alone(sharded: Path) -> None:
    write(sharded / "consolidated.safetensors", "x")
    (sharded / "pytorch_model.bin").write_bytes(b"PK")
    assert set(open_checkpoint(sharded).tensors) == set("abcd")


def test_hub_cache_layout(sharded: Path) -> None:
    cache = sharded.parent / "models--org--name"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, file in enumerate(sharded.iterdir()):
        file.rename(cache / "blobs" / f"{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert set(open_checkpoint(snapshot).tensors) == set("abcd")
    assert "0123abcd" in refusal(cache)
    (cache / "blobs" / "0").unlink()
    assert re.search("missing|link to a file that is gone", refusal(snapshot))


def test_what_safetensors_torch_writes(folder: Path) -> None:
    folder.mkdir()
    tensors = {f"layer.{i}.weight": torch.randn(i, 3).to(torch.bfloat16) for i in range(5)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    got = stored(open_checkpoint(folder))
    assert got == {name: bytes(t.view(torch.uint8).flatten().tolist()) for name, t in tensors.items()}


def test_300_tensors_take_milliseconds(folder: Path) -> None:
    files = {f"model-0000{i}-of-00003.safetensors": [f"layers.{j}.w" for j in range(i, 300, 3)] for i in range(3)}
    for file, names in files.items():
        write(folder / file, " ".join(names))
    write_json(folder / INDEX, {"weight_map": {name: file for file, names in files.items() for name in names}})
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        assert len(open_checkpoint(folder).tensors) == 300
        best = min(best, time.perf_counter() - start)
    assert best < 0.05


def test_changed_files(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.changed() == ([], [])
    os.link(sharded / B, sharded / "linked")
    assert checkpoint.changed() == ([], [sharded / B])
    os.utime(sharded / A, ns=(1, 1))
    assert checkpoint.changed() == ([sharded / A], [sharded / B])
    (sharded / B).unlink()
    assert checkpoint.changed() == ([sharded / A, sharded / B], [])
    write(sharded / B, "b a")
    assert checkpoint.changed() == ([sharded / A, sharded / B], [])
    assert open_checkpoint(sharded).changed() == ([], [])


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors", "folder/../../evil.safetensors", "/etc/evil.safetensors", "sub/evil.safetensors",
        "./evil.safetensors", "..\\evil.safetensors", "sub\\evil.safetensors", "evil.safetensors/",
        "evil.safetensors\0", "evil\0.safetensors", "evil\n.safetensors", "\x1b[31mevil.safetensors",
        "\udc80.safetensors", ".safetensors", "..", ".", "", "evil", "evil.bin", None, 1, True,
        ["evil.safetensors"], {"evil.safetensors": 0},
    ],
)  # fmt: skip
def test_index_names_only_files_of_its_folder(sharded: Path, name: Any) -> None:
    for place in [sharded.parent, sharded, sharded / "sub"]:
        write(place / "evil.safetensors", "c")  # there and valid: only the name is at fault
    weight_map = {"a": B, "b": B, "d": A, "c": name}
    write_json(sharded / INDEX, {"weight_map": weight_map})
    message = refusal(sharded)
    assert "bare name of a .safetensors file" in message or "surrogates" in message
    assert "\x1b" not in message


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", r"got JSON \[\], wanted an object"),
        ("{}", "weight_map is None"),
        ('{"weight_map": {}}', "weight_map is {}"),
        ('{"weight_map": []}', r"weight_map is \[\]"),
        ('{"weight_map": ["a"]}', r"weight_map is \['a'\]"),
        (f'{{"weight_map": {{"a": "{A}"}}, "metadata": 5}}', "metadata is 5"),
        (f'{{"weight_map": {{"a": "{A}", "a": "{B}"}}}}', "duplicate key 'a'"),
        ('{"weight_map": {}, "weight_map": {}}', "duplicate key 'weight_map'"),
        ('{"weight_map": NaN}', "NaN is not JSON"),
        ('{"weight_map": ' + "[" * 100_000, "nested too deeply"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("<!DOCTYPE html>", "HTML"),
        ('\ufeff{"weight_map": {}}', "not valid JSON"),
    ],
)
def test_bad_index(sharded: Path, index: str, message: str) -> None:
    write_json(sharded / INDEX, index)
    assert re.search(message, refusal(sharded))
    assert str(sharded / INDEX) in refusal(sharded)


def test_index_and_shards_disagree(sharded: Path) -> None:
    def said(weight_map: dict[str, str]) -> str:
        write_json(sharded / INDEX, {"weight_map": weight_map})
        return refusal(sharded)

    good = {"a": B, "b": B, "c": A, "d": A}
    assert "'z' is not in " + A in said(good | {"z": A})
    assert f"'a' is in {B}, not in {A}" in said(good | {"a": A})
    del good["a"]
    assert f"'a' of {B} is not in the index" in said(good)
    message = said(good | {f"z{i}": A for i in range(30)})
    assert "'z9'" in message
    assert "'z10'" not in message
    assert message.count(" is not in ") == 10
    assert "and 21 more" in message


def test_tensor_in_two_shards(sharded: Path) -> None:
    write(sharded / A, "d c a")
    assert f"tensor 'a' is both in {A} and in {B}" in refusal(sharded)


def test_missing_shards(sharded: Path) -> None:
    (sharded / B).unlink()
    assert f"1 of the 2 files that {INDEX} names are missing: {B}." in refusal(sharded)
    (sharded / B).symlink_to("gone")
    assert f"missing: {B}" in refusal(sharded)
    index = {"weight_map": {f"{i}": f"model-{i:05}.safetensors" for i in range(12)} | {"x": "x" * 300 + ".safetensors"}}
    write_json(sharded / INDEX, index)
    message = refusal(sharded)
    assert "13 of the 13" in message
    assert "and 3 more" in message


def test_link_to_a_file_that_is_gone(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("gone")
    assert "model.safetensors: is a link to a file that is gone" in refusal(folder)


def test_bad_shard_is_named(sharded: Path) -> None:
    whole = (sharded / B).read_bytes()
    (sharded / B).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"{B}: truncated: 1 bytes missing.*of {len(whole)} bytes, got"):
        open_checkpoint(sharded)
    (sharded / B).unlink()
    (sharded / B).mkdir()
    with pytest.raises(CheckpointError, match=f"{B}: is a folder"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "found nothing; wanted model.safetensors, or model.safetensors.index.json and its shards"),
        ([A, B], f"found {A}, {B} and no index"),
        (["x.safetensors", "y.safetensors"], "found x.safetensors, y.safetensors and no index"),
        ([A], f"found {A} and no index"),
        (["pytorch_model-00001-of-00002.bin", "config.json"], "its weights are in pytorch_model-00001-of-00002.bin"),
        (["model.pt"], "save_pretrained"),
        (["model-Q4_K_M.gguf"], "GGUF files are not read"),
        (["README.md", "tokenizer.json"], "found README.md, tokenizer.json; wanted"),
        (["residual.safetensors"], "residual.json is missing beside residual.safetensors"),
        (["residual.json"], "found residual.json; wanted residual.safetensors, or residual.safetensors.index.json"),
        (["residual.json", "other.safetensors"], "found other.safetensors and no index; wanted residual.safetensors"),
        (["residual.json", "residual-00001-of-00002.safetensors"], "and no index; wanted residual.safetensors"),
        (["residual.json", "residual.safetensors", "model.safetensors"], "a model (model.safetensors) and a residual"),
        (["x.safetensors.index.json", "y.safetensors.index.json"], "found the indexes x.safetensors.index.json, y"),
    ],
)  # fmt: skip
def test_folders_that_are_no_checkpoint(folder: Path, files: list[str], message: str) -> None:
    folder.mkdir()
    for name in files:
        if name.endswith(".safetensors"):
            write(folder / name, "a")
        else:
            write_json(folder / name, {})
    assert message in refusal(folder)


def test_index_beside_an_unnamed_model_file(sharded: Path) -> None:
    write(sharded / "model.safetensors", "a b c d")
    message = refusal(sharded)
    assert f"model.safetensors and {INDEX} are both there" in message
    assert "Delete the one that is out of date" in message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "config.json: not valid JSON"),
        ("config.json", "[]", r"config.json: got JSON \[\]"),
        ("config.json", "[" * 100_000, "config.json: JSON is nested too deeply: wanted at most 100 levels"),
        ("config.json", "version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("ires.json", '{"a": 1, "a": 2}', "ires.json: not valid JSON: duplicate key 'a'"),
    ],
)
def test_bad_side_files(sharded: Path, name: str, text: str, message: str) -> None:
    (sharded / name).write_text(text)
    assert re.search(message, refusal(sharded))
    (sharded / name).unlink()
    (sharded / name).symlink_to("gone")
    assert f"{sharded / name}: is a link to a file that is gone" in refusal(sharded)
    (sharded / name).unlink()
    (sharded / name).mkdir()
    assert f"{sharded / name}: is a folder, wanted a regular file" in refusal(sharded)


def test_paths_that_are_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal("models/llama") == "models/llama: no such file or folder. Check the path."
    (tmp_path / "link").symlink_to("gone")
    assert "is a link to something that is gone" in refusal("link")
    (tmp_path / "loop").symlink_to("loop")
    assert "Too many levels of symbolic links" in refusal("loop")
    assert "File name too long" in refusal("x" * 300)
    assert "null byte" in refusal("x\0y")
    (tmp_path / "file").write_text("hello there")
    assert "Not a directory" in refusal("file/x")
    assert "text, b'hello there'" in refusal("file")
    os.mkfifo(tmp_path / "fifo")
    assert "is a named pipe" in refusal("fifo")


def test_file_that_changes_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "model.safetensors"
    write(path, "a")
    pread = os.pread

    def grow(fd: int, size: int, at: int) -> bytes:
        raw = pread(fd, size, at)
        write(path, "a b")
        return raw

    monkeypatch.setattr(os, "pread", grow)
    assert "changed while its header was read" in refusal(path)


# --------------------------------------------------------------------------------------------------------------- fuzz


def mutate(rng: random.Random, text: str) -> str:
    """A few changes to the JSON of an index: names exchanged, doubled or made hostile, characters added and dropped."""
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        kind = rng.randrange(5)
        at = rng.randrange(len(text) + 1)
        if kind == 0:
            names = [
                A,
                B,
                "model.safetensors",
                "extra.safetensors",
                "../evil.safetensors",
                "evil.safetensors",
                "a",
                "x",
            ]
            text = text.replace(rng.choice(names), rng.choice(names), rng.choice([1, -1]))
        elif kind == 1:
            text = (
                text[:at]
                + rng.choice(['"', "{", "}", ",", ":", "\\", "/", "\\u0000", "\\ud800", "..", "0"])
                + text[at:]
            )
        elif kind == 2:
            text = text[:at] + text[at + rng.choice([1, 2, 20]) :]
        elif kind == 3:
            pairs = re.findall(r'"\w": "[^"]*"', text)
            if pairs:
                text = text.replace(rng.choice(pairs), rng.choice(pairs), 1)
        else:
            odd = rng.choice(["null", "1", "{}", "[]", "NaN", '""', '"."', '"/etc/passwd"', f'"{A}"'])
            texts = list(re.finditer(r'"[^"]*"', text))
            if texts:
                start, end = rng.choice(texts).span()
                text = text[:start] + odd + text[end:]
    return text


def agrees(text: str, contents: dict[str, str]) -> bool:
    """Whether JSON that anyone would read says about the shards what they contain."""
    try:
        index = json.loads(text)
        weight_map = index["weight_map"]
        truth = {name: file for file in weight_map.values() for name in contents[file].split()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return truth == weight_map and bool(truth) and type(index.get("metadata", {})) is dict


def fuzz_index(folder: Path, rounds: int, seed: int) -> dict[str, int]:
    """Open `folder` under mutated indexes: opened where index and shards agree, elsewhere refused with a reason."""
    rng = random.Random(seed)
    write(folder.parent / "evil.safetensors", "a")
    write(folder / "extra.safetensors", "x")
    contents = {A: "d c", B: "b a", "extra.safetensors": "x"}
    text = json.dumps({"metadata": {"total_size": 48}, "weight_map": {"a": B, "c": A, "b": B, "d": A}})
    counts = {"opened": 0, "refused": 0}
    for _ in range(rounds):
        mutated = mutate(rng, text)
        (folder / INDEX).write_text(mutated, "utf-8", "surrogatepass")
        refused = ""
        try:
            checkpoint = open_checkpoint(folder)
        except CheckpointError as error:
            refused = str(error)
        if refused:
            counts["refused"] += 1
            assert refused.startswith(str(folder)), mutated
            assert not agrees(mutated, contents) or re.search("duplicate|surrogates|is not JSON", refused), mutated
        else:
            counts["opened"] += 1
            assert agrees(mutated, contents), mutated
            weight_map = json.loads(mutated)["weight_map"]
            assert {name: ref.path for name, ref in checkpoint.tensors.items()} == {
                name: folder / file for name, file in weight_map.items()
            }
            assert stored(checkpoint) == {name: name.encode() * 12 for name in weight_map}
    return counts


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from([A, B]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd") | st.text(max_size=3), inner),
    max_leaves=10,
)
FILES = st.sampled_from([A, B, f"../{A}", f"./{A}", f"sub/{A}", "", "."])


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {}, optional={"weight_map": st.dictionaries(st.sampled_from("abcde"), FILES | JSON) | JSON, "metadata": JSON}
    )
    | JSON
)
def test_any_json_as_an_index(sharded: Path, index: Any) -> None:
    """It is opened where it says what is so, and refused elsewhere."""
    text = json.dumps(index)
    (sharded / INDEX).write_text(text)
    if agrees(text, {A: "d c", B: "b a"}):
        assert set(open_checkpoint(sharded).tensors) == set(index["weight_map"])  # one shard may be all it names
    else:
        refusal(sharded)


def test_fuzz_index(sharded: Path) -> None:
    counts = fuzz_index(sharded, 1_000, seed=1)
    assert min(counts.values()) > 150


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(10))
def test_fuzz_index_long(sharded: Path, seed: int) -> None:
    counts = fuzz_index(sharded, 20_000, seed)
    assert min(counts.values()) > 3_000
