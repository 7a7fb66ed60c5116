"""Quantized targets that are updated in place: new scales are found and kept first, and all is as in a new folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import DECODED, ENCODED, FORMATS
from safetensors.torch import save_file
from selection import tiles
from small_models import normal, read_model, same, snapshot, write_model
from updated import Cut, apply, copy, cut_off, files_of, manifest, visible

import ires_kernels as ik
from ires_kernels.backends import encoding
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.cli import main
from ires_kernels.files import journal, transfer
from ires_kernels.files.ownership import StoreError
from ires_kernels.in_place import cuts, scales
from ires_kernels.in_place.cuts import Sizes
from ires_kernels.planning.plan import Plan

SHAPES = {
    "model.embed_tokens.weight": (20, 32),
    "model.layers.0.mlp.up_proj.weight": (24, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 64),
    "model.layers.0.norm.weight": (32,),
}
QUANTIZED = [name for name in SHAPES if "proj" in name]
BLOCK = "fp8-block"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A dozen windows or more in every tensor of codes."""
    monkeypatch.setattr(cuts, "SIZES", Sizes(window=256, unit=64, gap=16))
    with tiles(elements=32, copied=32):
        yield


def triple(root: Path, *formats: str, shards: int = 3, scale: float = 4e-3) -> tuple[Path, Path, Path]:
    """Folders target, in a format, instruct and base, in formats or bfloat16; scales lie in other shards than codes."""
    paths = []
    for seed, (role, format) in enumerate(zip_longest(("target", "instruct", "base"), formats)):
        stored: dict[str, Any] = {}
        config: dict[str, Any] = {"model_type": "llama", "torch_dtype": "bfloat16"}
        for i, (name, shape) in enumerate(SHAPES.items()):
            weight = normal(shape, i, torch.float32) + normal(shape, 100 * seed + i, torch.float32, scale)
            make, settings = FORMATS[format or BLOCK]
            quantized = format is not None and name in QUANTIZED
            stored |= make(name, weight.bfloat16()) if quantized else {name: weight.bfloat16()}
            config |= {"quantization_config": settings} if format is not None else {}
        count = shards if role == "target" else 1
        paths.append(write_model(root / role, stored, config=config, shards=count))
    target, instruct, base = paths
    return target, instruct, base


CASES: dict[str, dict[str, Any]] = {
    "nearest": {"alpha": 0.7},
    "stochastic": {"rounding": "stochastic", "seed": 9, "alphas": [("up_proj", -1.5)]},
    "some": {"skip": "up_proj"},
}


@pytest.mark.parametrize("format", ENCODED)
def test_the_files_are_those_of_a_new_folder(tmp_path: Path, format: str) -> None:
    target, instruct, base = triple(tmp_path, format)
    place = {name: path for path in target.glob("*.safetensors") for name in _names(path)}
    assert any(place[name] != place[_scale(place, name)] for name in QUANTIZED)
    for threads, undo, (case, options) in zip((1, 3, 2), ("ring", "all", "none"), CASES.items(), strict=True):
        out, other = tmp_path / f"out {case}", copy(target, case)
        new = ik.apply(target, (instruct, base), out=out, sync=False, **options)
        before = files_of(other)
        report = apply(other, (instruct, base), threads=threads, undo=undo, sync=False, **options)
        assert visible(other) == visible(out)
        assert not isinstance(new, Plan)
        assert report.numbers() == new.numbers() == manifest(other)["report"]
        assert report.requantized is not None
        assert report.warnings == new.warnings
        one, two = manifest(other)["tensors"], manifest(out)["tensors"]
        changed = {name: entry["xxh3_128"] for name, entry in two.items() if "copied" not in entry}
        assert {name: one[name]["xxh3_128"] for name in changed} == changed
        assert ik.verify(other, inputs={"target": target})
        assert "nothing was done" in f"{apply(other, (instruct, base), undo=undo, sync=False, **options)}"
        kept = [path.name for path in other.iterdir() if path.name.startswith(".")]
        assert kept == ([".ires-undo-1"] if undo == "all" else [])
        if undo == "all":
            assert not (other / ".ires-undo-1" / "scales").exists()
            ik.rollback(other)
            assert files_of(other) == before


def _names(path: Path) -> list[str]:
    raw = path.read_bytes()
    return list(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


def _scale(names: Any, name: str) -> str:
    return next(each for each in names if each.startswith(f"{name}_scale"))


@pytest.mark.parametrize(("format", "rounding"), [*zip(ENCODED, ["nearest", "stochastic"] * 4, strict=False)])
def test_a_residual_of_zero_leaves_every_byte(tmp_path: Path, format: str, rounding: str) -> None:
    target, instruct, _ = triple(tmp_path, format, shards=1)
    stored = read_model(target)
    for name in QUANTIZED:
        stored[name].view(torch.uint8).reshape(-1)[:256] = torch.arange(256).to(torch.uint8)
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    before = read_model(target)
    apply(target, (instruct, instruct), rounding=rounding, sync=False, trust_names=True)
    after = read_model(target)
    assert all(same(before[name], after[name]) for name in before if "proj" in name)


def test_several_pairs_residuals_and_the_target_as_an_input(tmp_path: Path) -> None:
    target, instruct, base = triple(tmp_path, BLOCK, "nvfp4", "fp8-channel")
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "pairs": ([(instruct, base), (base, instruct)], {"alpha": [0.5, -0.25]}),
        "residuals": ([tmp_path / "residual"] * 2, {"alpha": [0.5, 3.0]}),
    }
    for name, (residual, options) in ways.items():
        ik.apply(target, residual, out=tmp_path / f"out {name}", sync=False, **options)
        other = copy(target, name)
        apply(other, residual, sync=False, **options)
        assert visible(other) == visible(tmp_path / f"out {name}")
    ik.apply(target, (instruct, target), out=tmp_path / "out", sync=False)
    for number in (1, 40, 90):
        other = copy(target, f"own {number}")
        with pytest.MonkeyPatch.context() as patch:
            cut_off(patch, journal.Journal, "write", number)
            with pytest.raises(Cut):
                apply(other, (instruct, other), threads=1)
        ik.resume(other)
        assert visible(other) == visible(tmp_path / "out"), "what was the base as well is decoded by its old scales"


STRIDES = {"pwrite": 11, "fdatasync": 9, "fsync": 1, "rename": 1, "posix_fallocate": 1, "preadv": 23}
"""Calls of which every so many-th is cut off, at great length."""


def test_cut_off_at_some_calls_and_gone_on_with(tmp_path: Path) -> None:
    _cut_off(tmp_path, BLOCK, "pwrite", 97, "all")


@pytest.mark.torture
@pytest.mark.parametrize("undo", ["ring", "all"])
@pytest.mark.parametrize("call", STRIDES)
@pytest.mark.parametrize("format", [BLOCK, "mxfp8"])
def test_cut_off_at_any_call_and_gone_on_with(tmp_path: Path, format: str, call: str, undo: str) -> None:
    states = _cut_off(tmp_path, format, call, STRIDES[call], undo)
    assert "none" in states or call == "fdatasync"
    assert "unfinished" in states or call == "posix_fallocate"


def _cut_off(tmp_path: Path, format: str, call: str, stride: int, undo: str) -> set[str]:
    """The states that are met when every so many-th call is the last one."""
    target, instruct, base = triple(tmp_path, format)
    options: dict[str, Any] = {"rounding": "stochastic", "threads": 2, "undo": undo}
    whole = copy(target, "whole")
    numbers = apply(whole, (instruct, base), **options).numbers()
    before, wanted = files_of(target), visible(whole)
    states: set[str] = set()
    for number in range(0, 10**6, stride):
        other = copy(target, f"cut{number}")
        with pytest.MonkeyPatch.context() as patch:
            cut_off(patch, os, call, number)
            try:
                apply(other, (instruct, base), **options)
                return states
            except Cut:
                pass
        found = ik.status(other)
        states.add(found.state)
        if found.state == "none":
            assert files_of(other) == before, "in the first pass nothing is changed"
        if found.state == "unfinished" and undo == "all" and number % 2:
            ik.rollback(other)
            assert files_of(other) == before
        if found.state == "unfinished" and (other / ".ires-unfinished").exists():
            report = ik.resume(other)
        else:
            report = apply(other, (instruct, base), **options)
        assert visible(other) == wanted, number
        assert report.numbers() == numbers, number
        assert ik.verify(other, hashes_only=True)
        shutil.rmtree(other)
    raise AssertionError("the calls never end")


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    """Each run is cut off a few writes further on; scales that are new already are not taken for old ones."""
    target, instruct, base = triple(tmp_path, BLOCK)
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    ends = 0
    for _ in range(100):
        with pytest.MonkeyPatch.context() as patch:
            cut_off(patch, journal.Journal, "write", 19)
            try:
                apply(target, (instruct, base), threads=1, sync=False)
                break
            except Cut:
                ends += 1
    assert ends > 4
    assert visible(target) == visible(tmp_path / "out")


def _unfinished(tmp_path: Path, number: int = 60, **options: Any) -> Path:
    target, instruct, base = triple(tmp_path, BLOCK)
    with pytest.MonkeyPatch.context() as patch:
        cut_off(patch, journal.Journal, "write", number)
        with pytest.raises(Cut):
            apply(target, (instruct, base), threads=1, **options)
    assert ik.status(target).state == "unfinished"
    return target


@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_scales_that_are_not_what_was_kept(tmp_path: Path, how: str) -> None:
    target = _unfinished(tmp_path, undo="all")
    file = target / ".ires-unfinished" / "scales"
    raw = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(raw[:-1] if how == "cut" else bytes([raw[0] ^ 1]) + raw[1:])
    with pytest.raises(StoreError, match=r"scales: is gone or was changed.* `ires rollback .*` takes it back"):
        ik.resume(target)
    assert ik.status(target).next == (f"`ires rollback {target}` takes it back.",)
    assert "is what it was before" in ik.rollback(target)


def test_inputs_that_changed_between_the_passes(tmp_path: Path) -> None:
    """Of another file every tensor that the first pass read must have its hash, though no window has read it yet."""
    target = _unfinished(tmp_path, 0)
    file = tmp_path / "instruct" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    place = len(raw) // 2
    raw[place] ^= 1
    file.write_bytes(raw)
    with pytest.raises(StoreError, match="not the file of the instruct that this was begun with"):
        ik.resume(target)
    raw[place] ^= 1
    file.write_bytes(raw)
    ik.resume(target)
    assert ik.verify(target)


@pytest.mark.parametrize("undo", ["ring", "all"])
def test_an_input_that_changes_in_the_second_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undo: str) -> None:
    """Nothing mends codes of one file and scales of another: what is said is the way back, whatever is put back."""
    target, instruct, base = triple(tmp_path, BLOCK)
    before = files_of(target)
    file = instruct / "model.safetensors"
    good = file.read_bytes()
    complete = journal.Journal.complete

    def exchange(self: journal.Journal, number: int, record: bytes) -> None:
        complete(self, number, record)
        if number == 2:
            file.write_bytes(good[: len(good) // 2] + bytes(len(good) - len(good) // 2))

    monkeypatch.setattr(journal.Journal, "complete", exchange)
    way = {"all": f"take the update back with `ires rollback {target}`", "ring": "and copy the model again"}[undo]
    says = f"was another when it was read for the second time.*{way}"
    with pytest.raises(StoreError, match=says):
        apply(target, (instruct, base), threads=1, undo=undo, sync=False)
    monkeypatch.undo()
    for content in (None, good):
        if content is not None:
            file.write_bytes(content)
        assert main(["resume", f"{target}", "--quiet"]) == {"all": 2, "ring": 3}[undo]
        with pytest.raises(StoreError, match=says):
            ik.resume(target)
    if undo == "all":
        ik.rollback(target)
        assert files_of(target) == before


def test_a_target_that_changes_while_scales_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, instruct, base = triple(tmp_path, BLOCK)
    measure = encoding.measure_results

    def meddling(*arguments: Any) -> None:
        measure(*arguments)
        os.utime(next(target.glob("*.safetensors")))

    monkeypatch.setattr(encoding, "measure_results", meddling)
    before = files_of(target)
    with pytest.raises(CheckpointError, match="changed"):
        apply(target, (instruct, base))
    assert files_of(target) == before
    assert ik.status(target).state == "none"
    assert not (target / ".ires-unfinished").exists()


def test_a_full_disk_or_a_broken_one_in_the_first_pass_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, instruct, base = triple(tmp_path, BLOCK)
    before = snapshot(target)
    allocate, write_all = transfer.allocate, transfer.write_all

    def full(fd: int, size: int, path: Path) -> None:
        if path.name == "scales":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{path}")
        allocate(fd, size, path)

    def broken(fd: int, data: bytes, offset: int, path: Path) -> None:
        if path.name == "scales" and offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO), f"{path}")
        write_all(fd, data, offset, path)

    for name, function, error in (("allocate", full, "No space left"), ("write_all", broken, "Input/output error")):
        with monkeypatch.context() as patch:
            patch.setattr(transfer, name, function)
            with pytest.raises(OSError, match=error):
                apply(target, (instruct, base))
        assert snapshot(target) == before


def test_an_interrupt_in_the_first_pass_is_as_if_nothing_had_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, instruct, base = triple(tmp_path, BLOCK)
    before, seen = snapshot(target), []
    find = scales.find

    def interrupted(*arguments: Any) -> Any:
        seen.append(ik.status(target))
        find(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(scales, "find", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply(target, (instruct, base))
    assert snapshot(target) == before
    assert seen[0].state == "running"
    assert "the first pass of an update in place, which has changed nothing yet" in seen[0].what


def test_progress_goes_on_from_one_pass_to_the_next(tmp_path: Path) -> None:
    target, instruct, base = triple(tmp_path, BLOCK)
    told: list[tuple[int, int]] = []
    report = apply(target, (instruct, base), sync=False, progress=lambda *numbers: told.append(numbers))
    done = [numbers[0] for numbers in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1]
    coded = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    assert report.bytes_read > 2 * coded, "the report tells of both"


def test_a_dry_run_says_that_there_are_two_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, instruct, base = triple(tmp_path, BLOCK)
    before = snapshot(target)
    command = ["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}", "--in-place", "--dry-run"]
    assert main(command) == 0
    assert "2: one finds the scales that new codes need, and changes nothing" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passes"] == 2
    assert main([*command, "--skip", "proj", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passes"] == 1
    assert snapshot(target) == before
    program = f"import sys; from ires_kernels.cli import main; main({command!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize("format", DECODED)
def test_what_is_only_decoded_is_refused_with_the_way_out(tmp_path: Path, format: str) -> None:
    target, instruct, base = triple(tmp_path, format, shards=1)
    before = snapshot(target)
    with pytest.raises(CheckpointError, match="-o OUT --dtype bf16"):
        apply(target, (instruct, base))
    with pytest.raises(CheckpointError, match=rf"is {format}.* would become BF16, which takes other bytes.* -o OUT"):
        apply(target, (instruct, base), dtype="bf16")
    assert snapshot(target) == before
    ik.apply(target, (instruct, base), out=tmp_path / "out", dtype="bf16", sync=False)
    assert ik.verify(tmp_path / "out")


def test_a_quantized_target_gets_no_plain_weights_in_place(tmp_path: Path) -> None:
    target, instruct, base = triple(tmp_path, BLOCK)
    before = snapshot(target)
    with pytest.raises(CheckpointError, match="Leave --dtype out, and it stays quantized"):
        apply(target, (instruct, base), dtype="bf16")
    assert snapshot(target) == before


@pytest.mark.parametrize("name", ["params.json", "hf_quant_config.json"])
def test_settings_that_stay_beside_a_hidden_model(tmp_path: Path, name: str) -> None:
    """They say what the codes are, and the model's files alone are hidden."""
    target, instruct, base = triple(tmp_path, BLOCK)
    config = json.loads((target / "config.json").read_text())
    block = config.pop("quantization_config")
    if name == "params.json":
        (target / name).write_text(json.dumps({"quantization": block}))
        (target / "config.json").unlink()
    else:
        (target / name).write_text(json.dumps({"quantization": block}))
        (target / "config.json").write_text(json.dumps(config))
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    apply(target, (instruct, base), sync=False)
    assert visible(target) == visible(tmp_path / "out")


def test_a_single_file(tmp_path: Path) -> None:
    target, instruct, base = triple(tmp_path, BLOCK, shards=1)
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    file = target / "model.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        cut_off(patch, journal.Journal, "write", 40)
        with pytest.raises(Cut):
            apply(file, (instruct, base), threads=1)
    ik.resume(file)
    assert file.read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
