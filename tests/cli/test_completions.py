"""Shells complete what the parser knows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ires_kernels.cli import main


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completions", shell]) == 0
    path = folder / f"ires.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (["ires", "ap"], ["apply"]),
        (["ires", ""], ["extract", "apply", "sha256", "publish", "completions", "--help"]),
        (["ires", "re"], ["resume"]),
        (["ires", "apply", "target", "--al"], ["--alpha", "--alpha-for", "--allow-missing"]),
        (["ires", "extract", "--dtype", "b"], ["bf16"]),
        (["ires", "extract", "base", "instruct", "-o", "r", "--rounding", ""], ["nearest", "stochastic"]),
        (["ires", "completions", ""], ["bash", "zsh", "fish"]),
        (["ires", "apply", "ta"], []),
        (["ires", "apply", "--instruct", "--a"], []),
    ],
)
def test_bash(line: list[str], wanted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script("bash", tmp_path, capsys)
    told = run(
        "bash", "--norc", "-uc",
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _ires; printf "%s\\n" "${COMPREPLY[@]}"',
        "-", f"{path}", *line,
    ).split()  # fmt: skip
    assert set(wanted) <= set(told)
    assert wanted or not told, "then bash completes names of files"


def test_fish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("no fish is installed")
    path = script("fish", tmp_path, capsys)
    ask = "source $argv[1]; complete -C $argv[2]"
    found = {
        text: run("fish", "--no-config", "-c", ask, f"{path}", text) for text in ("ires ap", "ires apply --dtype ")
    }
    assert found["ires ap"].startswith("apply\twrite target")
    assert [line.partition("\t")[0] for line in found["ires apply --dtype "].splitlines()] == [
        "bf16", "f16", "f32", "f64",
    ]  # fmt: skip


def test_zsh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("no zsh is installed")
    path = script("zsh", tmp_path, capsys)
    assert "_ires" in run("zsh", "-fc", f"ZDOTDIR={tmp_path}; source {path}; print -l ${{(k)_comps}} $_comps[ires]")


def test_every_command_and_option_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert {"apply", "publish"} <= set(commands)
    assert main(["completions", "bash"]) == 0
    bash = capsys.readouterr().out
    assert all(f"{command}:-*)" in bash for command in commands)
