"""An input is who it is by its content: equal names, sizes and times do not make one model pass for another."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import read_model, triple
from safetensors.torch import save_file

import ires_kernels as ik
from ires_kernels import stream
from ires_kernels.checkpoint import open_checkpoint
from ires_kernels.header import CheckpointError
from ires_kernels.rules import ArgumentError


def before_window(monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], object]) -> None:
    """Do something before the window with this number is read."""
    read, calls = stream.read_into, iter(range(10**6))

    def read_into(*arguments: Any) -> None:
        if next(calls) == at:
            action()
        read(*arguments)

    monkeypatch.setattr(stream, "read_into", read_into)


def flip(file: Path, at: int = -1) -> None:
    """Change a byte, and set the time back to what it was."""
    times = file.stat()
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    with open(file, "r+b") as stream_:
        stream_.write(raw)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_name_or_a_mode_that_an_input_gets_meanwhile_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    files = sorted(base.glob("*.safetensors"))

    def touch() -> None:
        os.link(files[0], tmp_path / "linked")
        files[1].chmod(0o400)

    before_window(monkeypatch, 1, touch)
    where: dict[str, Any] = {"in_place": True} if in_place else {"out": tmp_path / "out"}
    ik.apply(target, (instruct, base), sync=False, threads=1, **where)
    assert ik.verify(target if in_place else tmp_path / "out")


@pytest.mark.parametrize("where", ["header", "tensor"])
def test_an_input_that_is_written_meanwhile_is_found_though_its_time_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    base, instruct, target = triple(tmp_path)
    file = base / "model.safetensors"
    at = 12 if where == "header" else open_checkpoint(base).tensors["lm_head.weight"].offset
    before_window(monkeypatch, 20, lambda: flip(file, at))
    with pytest.raises(CheckpointError, match=f"{file}: (changed while it was read|tensor)"):
        ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False, threads=1)
    assert not (tmp_path / "out").exists()


def test_a_new_folder_takes_nothing_that_belongs_to_an_update_in_place(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    for ignored in ({"undo": "all"}, {"undo": "none"}, {"tag": "x"}):
        with pytest.raises(ArgumentError, match="undo and tag go with in_place=True"):
            ik.apply(target, (instruct, base), out=tmp_path / "out", **ignored)
    assert not (tmp_path / "out").exists()


def triple_with_numbers(folder: Path) -> tuple[Path, Path, Path]:
    """Models with a tensor of whole numbers, the same in all, which is compared and copied."""
    paths = triple(folder)
    for path in paths:
        model = read_model(path) | {"position_ids": torch.arange(12)}
        save_file(model, path / "model.safetensors", metadata={"format": "pt"})
    return paths


def test_the_target_as_instruct_with_numbers_that_are_compared(tmp_path: Path) -> None:
    base, _, target = triple_with_numbers(tmp_path)
    ik.apply(target, (target, base), out=tmp_path / "out", sync=False)
    ik.apply(target, (target, base), in_place=True, sync=False)
    out, mine = read_model(tmp_path / "out"), read_model(target)
    assert all(torch.equal(out[name], mine[name]) for name in out)
