"""Updates in place for tests: the models, what is looked at before and after, and a run that is cut off."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ires_kernels as ik
from ires_kernels.checkpoints.header import build_header
from ires_kernels.files import journal
from ires_kernels.records.report import Report

SIDE = {
    "instruct": {"tokenizer.json": "{}", "chat_template.jinja": "{{ chat }}", "generation_config.json": '{"eos": 1}'},
    "target": {
        "tokenizer.json": "{ }",
        "vocab.json": "old",
        "README.md": "mine",
        "generation_config.json": '{"eos": 1}',
    },
}


def copy(target: Path, name: str) -> Path:
    shutil.copytree(target, target.with_name(name))
    return target.with_name(name)


def apply(target: Path, residual: Any, **options: Any) -> Report:
    report = ik.apply(target, residual, in_place=True, **options)
    assert isinstance(report, Report)
    return report


def visible(folder: Path) -> dict[str, bytes]:
    """What everybody sees, but for the manifest, and the card that a new folder alone has; of an index, which that
    writes anew, what it says.
    """
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "ires.json"}
    files = {name: raw for name, raw in files.items() if b"\nMade with ires_kernels " not in raw}
    return {
        name: json.dumps(json.loads(raw), sort_keys=True).encode() if name.endswith(".index.json") else raw
        for name, raw in files.items()
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything that is not hidden."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def manifest(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "ires.json").read_text())
    return table


class Cut(BaseException):
    """The end of a process, as far as Python lets one simulate it."""


def cut_off(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int) -> None:
    """Let everything from the given call of a function on do nothing but fail, as after the death of the process."""
    real, calls = getattr(module, name), iter(range(10**6))
    state = {"dead": False}

    def replacement(*arguments: Any, **options: Any) -> Any:
        state["dead"] = state["dead"] or next(calls) == number
        if state["dead"]:
            raise Cut
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, replacement)


def unfinished(models: tuple[Path, Path, Path], **options: Any) -> Path:
    """A target whose update ended in the middle."""
    base, instruct, target = models
    with pytest.MonkeyPatch.context() as patch:
        cut_off(patch, journal.Journal, "write", 20)
        with pytest.raises(Cut):
            apply(target, (instruct, base), threads=1, **options)
    assert ik.status(target).state == "unfinished"
    return target


def save_again(path: Path, *, backwards: bool = False, **metadata: str) -> None:
    """The same tensors of bfloat16, as another program writes them."""
    tensors = sorted(load_file(path).items(), reverse=backwards)
    header = build_header(((name, "BF16", tuple(t.shape)) for name, t in tensors), {"format": "pt", **metadata})
    path.write_bytes(header + b"".join(t.view(torch.int16).numpy().tobytes() for _, t in tensors))


def hard_link(target: Path) -> Path:
    file = next(target.glob("*.safetensors"))
    os.link(file, target.parent / "another.safetensors")
    return target
