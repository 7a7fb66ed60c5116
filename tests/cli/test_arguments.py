"""What merges are asked for: factors that mean one thing, types that are named, paths that begin with a dash."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_models import snapshot, triple

import ires_kernels as ik
from ires_kernels import cli


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base, instruct, target, and two residuals, one of them named like an option."""
    triple(tmp_path)
    for name in ("-res", "other"):
        ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / name, sync=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def factors(out: Path) -> list[float]:
    found: list[float] = json.loads((out / "ires.json").read_text())["rules"]["alpha"]
    return found


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["target", "-o", "out", "--", "-res"], [1]),
        (["target", "-o", "out", "--", "-res:-0.5", "other"], [-0.5, 1]),
        (["-o", "out", "target", "other", "--", "-res:.25"], [1, 0.25]),
        (["-o", "out", "--alpha", "2", "--", "target", "-res"], [2]),
        (["target", "--", "-res", "other"], None),  # no -o: what follows -- is no option
    ],
    ids=str,
)
def test_what_follows_two_dashes_is_a_path(
    arguments: Any, wanted: list[float] | None, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if wanted is None:
        with pytest.raises(SystemExit):
            cli.main(["apply", *arguments])
        assert "--in-place is required" in capsys.readouterr().err
        return
    assert cli.main(["apply", *arguments]) == 0
    assert factors(root / "out") == wanted
    assert ik.verify(root / "out")


def test_of_every_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "--", "-res"]) == 0
    assert "-res" in capsys.readouterr().out
    (root / "base").rename(root / "-base")
    assert cli.main(["extract", "-o", "again", "--", "-base", "instruct"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "other -res --alpha-for mlp=0.25",
            "alpha of 'mlp': got 1 factor(s) for 2 residuals, which may differ in sign. Give one for each, in "
            "their order: --alpha-for mlp=0.25,0.25, in Python alphas=[('mlp', [0.25, 0.25])].",
        ),
        ("other:abc", "other:abc: 'abc' is no factor of other, wanted a number, as other:0.5, or nothing."),
        ("other:", "other:: '' is no factor of other"),
        ("other:.5 --alpha .3", "other:.5 has a factor of its own, and --alpha 0.3 is for residuals that have none."),
        ("nowhere:abc", "nowhere:abc: no such file or folder"),
    ],
)
def test_factors_that_mean_nothing_or_two_things(
    arguments: str, message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(root)
    options = arguments.split(" ")
    names = [text for text in options if text == "-res"]
    code = cli.main(["apply", "target", *(x for x in options if x != "-res"), "-o", "out", "--", *names])
    assert (code, message in capsys.readouterr().err) == (2, True)
    assert snapshot(root) == before


def test_the_ways_out_that_are_printed(root: Path) -> None:
    command = ["apply", "target", "other:.5", "-o", "one", "--alpha-for", "mlp=0.25,0.25", "--", "-res:-.5"]
    assert cli.main(command) == 0
    alphas = [("mlp", [0.25, 0.25])]
    ik.apply("target", ["other", "-res"], out="two", alpha=[0.5, -0.5], alphas=alphas, sync=False)
    assert (root / "one" / "model.safetensors").read_bytes() == (root / "two" / "model.safetensors").read_bytes()
    assert cli.main(["apply", "target", "other:0.5", "-o", "three"]) == 0
    assert cli.main(["apply", "target", "other", "--alpha", ".3", "-o", "four"]) == 0
    assert [factors(root / name) for name in ("three", "four")] == [[0.5], [0.3]]


PAIRS = "wanted pairs of a regular expression and factors, as [('mlp', 0.5)] or {'mlp': 0.5}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alphas": ["x", 0.2]}, f"alphas[0] is str 'x', {PAIRS}"),
        ({"alphas": ["ab"]}, f"alphas[0] is str 'ab', {PAIRS}"),
        ({"alphas": [("x", 0.2, 0.3)]}, f"alphas[0] is tuple ('x', 0.2, 0.3), {PAIRS}"),
        ({"alphas": "mlp=0.2"}, f"alphas is str 'mlp=0.2', {PAIRS}"),
        ({"alphas": 0.2}, f"alphas is float 0.2, {PAIRS}"),
        ({"alphas": [(5, 0.2)]}, "alphas[0][0] is int 5, wanted a regular expression as str"),
        ({"alphas": {"mlp": "0.2"}}, "alpha of 'mlp' is str '0.2', wanted a real number"),
        ({"skip": 5}, "skip is int 5, wanted a regular expression or a list of them"),
        ({"skip": None}, "skip is NoneType None, wanted a regular expression or a list of them"),
        ({"skip": ["mlp", b"norm"]}, "skip[1] is bytes b'norm', wanted a regular expression as str"),
        ({"residual": 5}, "residual is int 5, wanted the path of a residual, a list of them, or the tuple of models"),
        ({"residual": None}, "residual is NoneType None, wanted the path of a residual"),
        ({"residual": b"other"}, "residual is bytes b'other', wanted the path of a residual"),
        ({"residual": {"base"}}, "residual is set "),
        ({"residual": ["other", 1]}, "residual[1] is int 1, wanted a path as str or pathlib.Path"),
        ({"target": None}, "target is NoneType None, wanted a path as str or pathlib.Path"),
        ({"out": 5}, "out is int 5, wanted a path as str or pathlib.Path"),
        ({"threads": "2"}, "threads is str '2', wanted an integer"),
        ({"threads": 2.0}, "threads is float 2.0, wanted an integer"),
        ({"progress": 5}, "progress is int 5, wanted a function of two numbers"),
        ({"follow_links": "no"}, "follow_links is str 'no', wanted True or False"),
    ],
    ids=str,
)
def test_arguments_of_a_wrong_type_are_named(arguments: dict[str, Any], message: str, root: Path) -> None:
    before = snapshot(root)
    with pytest.raises(TypeError) as raised:
        ik.apply(**{"target": "target", "residual": "other", "out": "out", **arguments})
    assert f"{raised.value}".startswith(message)
    if "out" not in arguments:
        with pytest.raises(TypeError) as raised:
            ik.load(**{"target": "target", "residual": "other", **arguments})
        assert f"{raised.value}".startswith(message)
    assert snapshot(root) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tag": 5}, "tag is int 5, wanted a text"),
        ({"sync": "no"}, "sync is str 'no', wanted True or False"),
        ({"sync": 0}, "sync is int 0, wanted True or False"),
        ({"sha256": None}, "sha256 is NoneType None, wanted True or False"),
        ({"dry_run": "yes"}, "dry_run is str 'yes', wanted True or False"),
        ({"in_place": 1}, "in_place is int 1, wanted True or False"),
    ],
    ids=str,
)
def test_arguments_that_would_be_recorded(arguments: dict[str, Any], message: str, root: Path) -> None:
    """An update in place that began with these could neither be gone on with nor be taken back."""
    before = snapshot(root)
    with pytest.raises(TypeError, match=re.escape(message)):
        ik.apply(**{"target": "target", "residual": "other", "in_place": True, **arguments})
    assert snapshot(root) == before
    assert ik.status("target").state == "none"


@pytest.mark.parametrize("name", ["base", "instruct", "out"])
def test_arguments_of_extract(name: str, root: Path) -> None:
    paths: dict[str, Any] = {"base": "base", "instruct": "instruct", "out": "out", name: 7}
    with pytest.raises(TypeError, match=f"{name} is int 7, wanted a path as str or pathlib.Path"):
        ik.extract(**paths)
    assert not (root / "out").exists()
