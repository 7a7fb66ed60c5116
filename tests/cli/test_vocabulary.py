"""One word for one thing in Python and on the command line: what it is called here, it is called there."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import read_model, triple

import ires_kernels as ik
from ires_kernels.cli import main
from ires_kernels.command_line.parser import make_parser
from ires_kernels.dtypes import number_of
from ires_kernels.planning.rules import ArgumentError

COMMANDS = (
    "extract",
    "apply",
    "merge",
    "compare",
    "inspect",
    "verify",
    "resume",
    "finish",
    "rollback",
    "status",
    "sha256",
    "publish",
)
OTHERWISE = {
    "sync": "--no-sync",
    "lock": "--no-lock",
    "residual": "--instruct",  # or what has no name, or --pair
    "inputs": "--target",  # and those of the other roles
}
"""Parameters whose option is called otherwise, and for a reason."""
NONE = {"progress", "curve"}
"""Those that have none: a bar is there on a terminal, and a curve where a picture is asked for."""


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (each for each in make_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_is_an_option_of_its_name(name: str) -> None:
    parser = commands()[name]
    known = {text for action in parser._actions for text in (*action.option_strings, action.dest)}
    for parameter in inspect.signature(getattr(ik, name)).parameters:
        if parameter not in NONE:
            option = OTHERWISE.get(parameter, f"--{parameter.replace('_', '-')}")
            assert option in known or parameter in known, f"{name}: {parameter} is no option"


@pytest.mark.parametrize(
    "spelling", ["f32", "F32", "fp32", "float32", "torch.float32", torch.float32], ids=lambda spelling: f"{spelling!r}"
)
def test_dtypes_are_taken_as_they_are_spelt(tmp_path: Path, spelling: Any) -> None:
    base, instruct, target = triple(tmp_path)
    ik.apply(target, (instruct, base), out=tmp_path / "one", dtype=spelling)
    if isinstance(spelling, str):
        pair = ["--instruct", f"{instruct}", "--base", f"{base}", "-o", f"{tmp_path / 'two'}"]
        assert main(["apply", f"{target}", *pair, "--dtype", spelling, "--quiet"]) == 0
        assert (tmp_path / "two/ires.json").read_text().count('"dtype": "F32"')
    assert {tensor.dtype for tensor in read_model(tmp_path / "one").values()} == {torch.float32}
    a = torch.ones(3, dtype=torch.bfloat16)
    assert ik.subtract(a, a, dtype=spelling).dtype == torch.float32


def test_what_is_no_dtype_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, instruct, target = triple(tmp_path)
    for wrong in ("int8", torch.int8, "f8_e4m3", 32, ["f32"]):
        with pytest.raises(ArgumentError, match=r"dtype is .*, wanted one of f64, f32, f16, bf16"):
            ik.apply(target, (instruct, base), out=tmp_path / "out", dtype=wrong)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="2"):
        main(["extract", f"{base}", f"{instruct}", "-o", f"{tmp_path / 'out'}", "--dtype", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err
    assert number_of("double") is None


def test_other_words_for_the_same(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    pair = ["--instruct", f"{instruct}", "--base", f"{base}"]
    for i, words in enumerate((["--alpha-for", "mlp=0.5"], ["--alphas", "mlp=0.5"])):
        assert (
            main(["apply", f"{target}", *pair, "-o", f"{tmp_path / str(i)}", *words, "--renames", "a=b", "--quiet"])
            == 2
        )
        assert main(["apply", f"{target}", *pair, "-o", f"{tmp_path / str(i)}", *words, "--quiet"]) == 0
    one, two = (read_model(tmp_path / name) for name in "01")
    assert all(torch.equal(one[name], two[name]) for name in one)
    for tag, words in (("a", ["--undo", "all"]), ("b", ["--keep-undo"])):
        assert main(["apply", f"{target}", *pair, "--in-place", *words, "--tag", tag, "--quiet"]) == 0
    for _ in range(2):
        assert main(["rollback", f"{target}", "--quiet"]) == 0
    with ik.mapped(target, write=True, undo="all"):
        pass
