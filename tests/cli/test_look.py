"""How results look on a terminal: lines of its width with whole words, and warnings in colour."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_models import SHAPES, normal, tensors, triple, write_model

from ires_kernels.cli import main
from ires_kernels.files.plain import folded

PAIR = ["--instruct", "instruct", "--base", "base"]
COMMANDS = {
    "inspect": ["inspect", "made"],
    "tensors": ["inspect", "made", "--tensors"],
    "plan": ["apply", "target", *PAIR, "-o", "out", "--dry-run"],
    "report": ["apply", "target", *PAIR, "-o", "out", "--alpha", "0.01", "--alpha-for", "mlp|norm=0.02"],
    "compare": ["compare", "target", *PAIR, "--alpha", "0.01"],
    "status": ["status", "target"],
    "verify": ["verify", "made"],
    "refused": ["apply", "target", *PAIR, "-o", "out", "--skip", "no such tensor", "--alpha-for", "nor this one=0.5"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with long names of tensors, of which one has NaN."""
    folder = tmp_path_factory.mktemp("models")
    triple(folder / "short", files={"README.md": "A model.", "notes-about-the-training-of-this-model.txt": ""})
    for role in ("base", "instruct", "target"):
        shutil.copytree(folder / "short" / role, folder / role)
        (folder / role / "model.safetensors").unlink()
    shapes = {name.replace("model.", "model.language_model.text_decoder."): shape for name, shape in SHAPES.items()}
    base = tensors(1, shapes)
    for seed, role in enumerate(("base", "instruct", "target")):
        changed = {name: t + normal(t.shape, seed, torch.bfloat16, 1e-3 * seed) for name, t in base.items()}
        if role == "instruct":
            changed["lm_head.weight"][0, 0] = float("nan")
        shutil.rmtree(folder / "made", ignore_errors=True)
        write_model(folder / "made", changed)
        (folder / "made/model.safetensors").rename(folder / role / "model.safetensors")
        shutil.rmtree(folder / "made")
    assert main(["apply", *(f"{folder / role}" for role in ("target",)), "--instruct", f"{folder / 'instruct'}",
                 "--base", f"{folder / 'base'}", "-o", f"{folder / 'made'}", "--quiet"]) == 0  # fmt: skip
    return folder


@pytest.mark.parametrize("what", COMMANDS)
def test_80_columns(
    folder: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    shown = []
    for columns in ("", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        shutil.rmtree("out", ignore_errors=True)
        assert main(COMMANDS[what]) == (2 if what == "refused" else 0)
        captured = capsys.readouterr()
        shown.append(captured.out + captured.err)
    whole, lines = shown[0], shown[1].rstrip("\n").split("\n")
    assert all(len(line) <= 80 or len(line.split()) == 1 for line in lines)
    steady = [[word for word in text.split() if not word[0].isdigit()] for text in shown]
    assert steady[0] == steady[1], "the same words, whole"
    if what in ("plan", "report", "tensors"):
        assert max(map(len, whole.split("\n"))) > 80
    assert "…" not in shown[1]


@pytest.mark.parametrize(
    ("line", "width", "wanted"),
    [
        ("warning  one two three", 18, "warning  one two\n         three"),
        ("one two three", 8, "one two\n  three"),
        ("         one two three", 18, "         one two\n         three"),
        ("a `b c d` e", 8, "a\n  `b c d`\n  e"),
        ("a  long/path/that/is/longer b", 10, "a  long/path/that/is/longer\n   b"),
        ("one  two", 80, "one  two"),
        ("日本語 日本語", 10, "日本語\n  日本語"),
        ("a sentence with two  blanks far behind", 20, "a sentence with two\n  blanks far behind"),
        ("path  with/two  blanks in it that is kept", 30, "path  with/two  blanks in it\n      that is kept"),
    ],
)
def test_lines_are_folded_between_words(line: str, width: int, wanted: str) -> None:
    assert folded(line, width) == wanted


class Terminal(io.StringIO):
    """One that can be read."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_warnings_are_coloured_on_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch, no_color: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    shutil.rmtree("out", ignore_errors=True)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(COMMANDS["report"]) == 0
    told = terminal.getvalue()
    assert "NaN in the inputs of 1 tensor: lm_head.weight" in " ".join(told.split())
    if no_color:
        assert "\x1b" not in " ".join(told.split())
        return
    lines = told.split("\n")
    (first,) = [at for at, line in enumerate(lines) if line.startswith("\x1b[33mwarning ")]
    assert told.count("\x1b[33m") == told.count("\x1b[0m") == 1
    assert not any("\x1b" in line for line in lines[:first])
    monkeypatch.setattr(sys, "stdout", json := Terminal())
    assert main(["inspect", "target", "--json"]) == 0
    assert "\x1b" not in json.getvalue()
