"""`verify` finds every way in which output is not what its inputs give, and says where."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from selection import tiles
from small_models import normal, triple, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.planning.rules import ArgumentError

NORM = "model.norm.weight"


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with tiles(elements=64, copied=96):
        yield


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A merge with every kind of tensor in it, in shards, rounded at random."""
    files = {"tokenizer.json": "{}", "additional_chat_templates/rag.jinja": "x"}
    base, instruct, target = triple(tmp_path, shards=2, files=files)
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    rules: dict[str, Any] = {"alpha": 0.7, "alphas": [("layers.0", 0.3)], "skip": "layers.1.norm", "dtype": "f16"}
    ik.apply(target, tmp_path / "residual", out=tmp_path / "out", rounding="stochastic", seed=3, sync=False, **rules)
    return tmp_path / "out"


def set_bytes(folder: Path, name: str, offset: int, data: bytes) -> None:
    ref = open_checkpoint(folder).tensors[name]
    with open(ref.path, "r+b") as file:
        file.seek(ref.offset + offset)
        file.write(data)


def problems(folder: Path, **options: Any) -> list[str]:
    report = ik.verify(folder, trust_inputs=True, **options)
    assert report.ok == bool(report) == (not report.problems and not report.mismatches)
    return report.problems


@pytest.mark.parametrize("threads", [1, 3])
def test_good_output_passes(out: Path, threads: int) -> None:
    report = ik.verify(out, threads=threads)
    assert (report.ok, report.problems, report.mismatches, report.tensors) == (True, [], [], 7)
    assert "all 7 tensors are what the inputs give, bit for bit" in str(report)
    residual = ik.verify(out.parent / "residual", threads=threads)
    assert residual.ok
    assert residual.bytes_read == 2096 * (2 + 2 + 4)


@pytest.mark.parametrize("hashes_only", [False, True])
def test_another_header_is_found(out: Path, hashes_only: bool) -> None:
    path = sorted(out.glob("*.safetensors"))[0]
    raw = path.read_bytes()
    assert raw.count(b'"pt"') == 1
    path.write_bytes(raw.replace(b'"pt"', b'"pu"'))
    assert problems(out, hashes_only=hashes_only) == [f"{path.name} has another header than the manifest says"]


def test_hashes_need_no_inputs(out: Path) -> None:
    for name in ("base", "instruct", "target", "residual"):
        (out.parent / name).rename(out.parent / f"{name}-gone")
    report = ik.verify(out, hashes_only=True)
    assert report.ok
    assert "have the recorded hashes" in str(report)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        ik.verify(out)


def test_every_wrong_element_is_counted_and_the_first_is_shown(out: Path) -> None:
    name, width = "model.embed_tokens.weight", 16
    for row, column in ((30, 5), (2, 3), (39, 15)):
        set_bytes(out, name, 2 * (row * width + column), b"\x00\x3c")  # 1.0
    set_bytes(out, NORM, 0, b"\x00\x80")  # -0.0
    report = ik.verify(out)
    assert not report
    assert not report.problems
    found = {mismatch.tensor: mismatch for mismatch in report.mismatches}
    assert found.keys() == {name, NORM}
    assert (found[name].count, found[name].index, found[name].got) == (3, [2, 3], "1.0 (0x3c00)")
    assert (found[NORM].count, found[NORM].index, found[NORM].got) == (1, [0], "-0.0 (0x8000)")
    assert found[name].file == open_checkpoint(out).tensors[name].path.name
    assert "3 elements differ, the first at [2, 3]: got 1.0 (0x3c00), wanted" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["mismatches"][0]["count"] in (1, 3)
    assert len(problems(out, hashes_only=True)) == 2


def test_a_wrong_byte_in_a_copy_is_found(tmp_path: Path) -> None:
    nan = torch.tensor([float("nan"), 1, 2, float("nan")])
    write_model(tmp_path / "more", {"ids": torch.arange(50), "kept": nan, "a": normal((3,), 1)})
    write_model(tmp_path / "few", {"a": normal((3,), 2)})
    ik.apply(tmp_path / "more", (tmp_path / "few", tmp_path / "few"), out=tmp_path / "out", sync=False)
    assert ik.verify(tmp_path / "out")
    set_bytes(tmp_path / "out", "ids", 8 * 20, b"\x09")
    set_bytes(tmp_path / "out", "kept", 4 * 3, b"\x01")  # another NaN: in a copy every bit counts
    found = {m.tensor: (m.count, m.index, m.got, m.wanted) for m in ik.verify(tmp_path / "out").mismatches}
    assert found["ids"] == (1, [20], "9 (0x0000000000000009)", "20 (0x0000000000000014)")
    assert found["kept"] == (1, [3], "nan (0x7fc00001)", "nan (0x7fc00000)")


def test_any_nan_serves_where_one_is_due(tmp_path: Path) -> None:
    nan = torch.full((100,), float("nan"), dtype=torch.bfloat16)
    paths = [write_model(tmp_path / name, {"a": t}) for name, t in (("t", nan), ("m", torch.ones_like(nan)))]
    ik.apply(paths[0], (paths[1], paths[1]), out=tmp_path / "out", sync=False)
    set_bytes(tmp_path / "out", "a", 0, b"\xc3\xff")
    report = ik.verify(tmp_path / "out")
    assert not report.mismatches
    assert report.problems == ["a has another hash than the manifest says"]


def test_files_that_changed_or_are_gone(out: Path) -> None:
    (out / "tokenizer.json").write_text("{ }")
    (out / "additional_chat_templates" / "rag.jinja").unlink()
    wanted = ["additional_chat_templates/rag.jinja is gone", "tokenizer.json has changed since the merge"]
    assert problems(out) == wanted
    assert problems(out, hashes_only=True) == wanted


def test_inputs_that_changed(out: Path) -> None:
    set_bytes(out.parent / "target", NORM, 0, b"\x80\x3f")
    report = ik.verify(out)
    assert report.problems == [f"{NORM} of target is not the one that was merged: it has another hash"]
    assert [mismatch.tensor for mismatch in report.mismatches] == [NORM]


def test_inputs_that_moved(out: Path) -> None:
    (out.parent / "target").rename(out.parent / "moved")
    with pytest.raises(CheckpointError, match=r"no such file or folder.*this is the target.*with --target \(in Python"):
        ik.verify(out)
    assert ik.verify(out, inputs={"target": out.parent / "moved"})
    with pytest.raises(ArgumentError, match="was not made of instruct but of target, residual"):
        ik.verify(out, inputs={"instruct": out.parent / "instruct"})


def edit_manifest(folder: Path, change: Any) -> None:
    path = folder / "ires.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def test_the_manifest_and_the_files_must_agree(out: Path) -> None:
    edit_manifest(out, lambda table: table["tensors"][NORM].update(xxh3_128="0" * 32))
    assert problems(out) == [f"{NORM} has another hash than the manifest says"]
    edit_manifest(out, lambda table: table["tensors"][NORM].update(dtype="F32"))
    assert f"{NORM} is F16 [16], wanted F32 [16]" in problems(out)
    edit_manifest(out, lambda table: table["tensors"].update(more=table["tensors"].pop(NORM)))
    found = problems(out)
    assert f"{NORM} of {open_checkpoint(out).tensors[NORM].path.name} is not in the manifest" in found
    assert "more is gone" in found
    assert "more is in the manifest and not in the plan" in found


def test_another_order_of_tensors_is_a_difference(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    shapes = {name: ref.shape for name, ref in open_checkpoint(target).tensors.items()}
    same = [name for name, shape in shapes.items() if shape == shapes[NORM]]
    file = tmp_path / "out" / "model.safetensors"
    raw = file.read_bytes()
    first, second = f'"{same[0]}"'.encode(), f'"{same[1]}"'.encode()
    start = 8 + int.from_bytes(raw[:8], "little")
    file.write_bytes(raw[:start].replace(first, b"?").replace(second, first).replace(b"?", second) + raw[start:])
    report = ik.verify(tmp_path / "out")
    assert {mismatch.tensor for mismatch in report.mismatches} == set(same[:2])
    assert report.problems[0] == "model.safetensors holds other tensors, or in another order, than the plan says"


@pytest.mark.parametrize("damage", ["no manifest", "not JSON", "no tensors", "entry", "operation", "rules"])
def test_manifests_that_cannot_be_used(out: Path, damage: str) -> None:
    if damage == "no manifest":
        (out / "ires.json").unlink()
    elif damage == "not JSON":
        (out / "ires.json").write_text("{")
    elif damage == "rules":
        edit_manifest(out, lambda table: table["rules"].update(alpha="x"))
    else:
        key, value = {"no tensors": ("tensors", []), "entry": ("tensors", {"a": {}}), "operation": ("operation", "x")}[
            damage
        ]
        edit_manifest(out, lambda table: table.update({key: value}))
    with pytest.raises((CheckpointError, ArgumentError), match=r"ires\.json|manifest"):
        ik.verify(out)


def test_a_model_that_no_merge_made(tmp_path: Path) -> None:
    base, *_ = triple(tmp_path)
    for path in (base, base / "model.safetensors"):
        with pytest.raises(CheckpointError, match="wanted the output of a merge"):
            ik.verify(path)


def test_files_are_closed(out: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    ik.verify(out)
    assert len(os.listdir("/proc/self/fd")) == before
