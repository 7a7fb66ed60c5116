"""Several pairs of models in one pass: target + a1 · (x1 − y1) + a2 · (x2 − y2), rounded once, by every way in."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import FORMATS, numbers
from small_models import Tensors, normal, read_model, same, snapshot, tensors, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.cli import main
from ires_kernels.planning.rules import ArgumentError

EMBEDDING, NORM, MLP = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.weight"
CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
MLP_UP = "model.layers.0.mlp.up_proj.weight"


def moved(start: Tensors, seed: int) -> Tensors:
    return {name: (t.float() + normal(t.shape, seed, torch.float32, 1e-3)).to(t.dtype) for name, t in start.items()}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two experts of one base, one of another base, and a target, in the current folder."""
    base = tensors(1)
    other = moved(base, 11)
    made = {"base": base, "target": moved(base, 3), "i1": moved(base, 4), "i2": moved(base, 5)}
    made |= {"b2": other, "x2": moved(other, 6)}
    for name, each in made.items():
        files = {"chat_template.jinja": f"of {name}"} if name in ("i2", "x2") else {}
        write_model(tmp_path / name, each, config=CONFIG, shards=2, files=files)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PAIRS = [("i1", "base"), ("x2", "b2")]


def wanted(pairs: list[tuple[str, str]], alpha: list[float]) -> Tensors:
    """The formula in float32, operation by operation, and rounded once."""
    read = {name: read_model(Path(name)) for name in {"target", *(model for pair in pairs for model in pair)}}
    found = {}
    for name, t in read["target"].items():
        value = t.float()
        for (instruct, base), a in zip(pairs, alpha, strict=True):
            value = value + torch.tensor(a, dtype=torch.float32) * (
                read[instruct][name].float() - read[base][name].float()
            )
        found[name] = value.to(torch.bfloat16)
    return found


def assert_equal(found: Tensors, right: Tensors) -> None:
    assert found.keys() == right.keys()
    assert [name for name in right if not same(found[name], right[name])] == []


@pytest.mark.parametrize("pairs", [PAIRS, [("i1", "base"), ("i2", "base")], [*PAIRS, ("i2", "base")]], ids=len)
def test_every_way_in(root: Path, pairs: list[tuple[str, str]]) -> None:
    alpha = [0.6, -0.4, 0.3][: len(pairs)]
    right = wanted(pairs, alpha)
    report = ik.apply("target", pairs, out="out", alpha=alpha, sync=False)
    assert_equal(read_model(root / "out"), right)
    assert_equal(ik.load("target", pairs, alpha=alpha), right)
    assert ik.verify("out")
    asked = ", ".join(f"{a:g}" for a in alpha)
    assert f"alphas {asked}" in f"{report}"
    shutil.copytree("target", "changed")
    ik.apply("changed", pairs, in_place=True, alpha=alpha, sync=False, undo="all")
    assert_equal(read_model(root / "changed"), right)
    assert ik.verify("changed", inputs={"target": "target"})
    ik.apply("changed", pairs, in_place=True, alpha=alpha, sync=False, undo="all")  # the same again changes nothing
    assert_equal(read_model(root / "changed"), right)
    ik.rollback("changed")
    assert_equal(read_model(root / "changed"), read_model(root / "target"))


def test_a_list_of_one_pair_is_that_pair(root: Path) -> None:
    ik.apply("target", ("i1", "base"), out="one", alpha=0.5, sync=False)
    ik.apply("target", [("i1", "base")], out="two", alpha=0.5, sync=False)
    assert (root / "one/ires.json").read_bytes() == (root / "two/ires.json").read_bytes()
    with pytest.raises(ArgumentError, match="i1 is a model, base is a model; wanted"):
        ik.apply("target", ["i1", "base"], out="three")


@pytest.mark.parametrize(
    "words",
    [
        ["--pair", "i1:base:0.6", "--pair", "x2:b2:-0.4"],
        ["--pair", "i1:base", "--pair", "x2:b2:-0.4", "--alpha", "0.6"],
        ["--pair", "./i1:{root}/base:6e-1", "--pair=x2:b2:-.4"],
    ],
)
def test_the_command(root: Path, words: list[str]) -> None:
    words = [word.replace("{root}", f"{root}") for word in words]
    assert main(["apply", "target", *words, "-o", "out", "--no-sync", "--quiet"]) == 0
    assert_equal(read_model(root / "out"), wanted(PAIRS, [0.6, -0.4]))
    (root / "x2").rename(root / "y:2")
    assert main(["verify", "out", "--quiet"]) == 2
    assert main(["verify", "out", "--quiet", "--pair", "i1:base", "--pair", "y:2:b2"]) == 0


def test_factors_for_some_tensors_and_those_of_0(root: Path) -> None:
    alphas = [("mlp", [0.0, 1.0]), ("norm", [0.0, 0.0])]
    ik.apply("target", PAIRS, out="out", alpha=[0.6, 0.4], alphas=alphas, skip="lm_head", sync=False)
    found, target = read_model(root / "out"), read_model(root / "target")
    assert same(found[MLP], wanted(PAIRS, [0.0, 1.0])[MLP])
    assert same(found[NORM], target[NORM])
    assert same(found["lm_head.weight"], target["lm_head.weight"])
    assert same(found[EMBEDDING], wanted(PAIRS, [0.6, 0.4])[EMBEDDING])


def test_what_is_told(root: Path) -> None:
    """Plan, manifest, card and side files: of the first instruct model that has them."""
    plan = f"{ik.apply('target', PAIRS, out='out', alpha=[0.6, 0.4], dry_run=True)}"
    assert "+ (0.6, 0.4) * (instruct - base)" in plan
    assert [line.split()[0] for line in plan.splitlines()[1:6]] == [
        "target",
        "instruct-1",
        "base-1",
        "instruct-2",
        "base-2",
    ]
    for model, base in (("instruct-1", "base-1"), ("target", "base-1"), ("instruct-2", "base-2"), ("target", "base-2")):
        assert f"{model} descends from {base}" in plan
    ik.apply("target", PAIRS, out="out", alpha=[0.6, 0.4], sync=False)
    assert (root / "out/chat_template.jinja").read_text() == "of x2"
    manifest = json.loads((root / "out/ires.json").read_text())
    assert list(manifest["inputs"]) == ["target", "instruct-1", "base-1", "instruct-2", "base-2"]
    assert manifest["rules"]["alpha"] == [0.6, 0.4]
    card = (root / "out/README.md").read_text()
    assert "ires apply target --pair i1:base:0.6 --pair x2:b2:0.4 -o OUT" in card
    shutil.copytree("target", "twice")
    ik.apply("twice", PAIRS, in_place=True, alpha=[0.6, 0.4], sync=False)
    report = ik.apply("twice", PAIRS, in_place=True, alpha=[0.1, 0.2], sync=False)
    said = "\n".join(report.warnings + report.notes)
    assert f"instruct {root}/i1 - base {root}/base is in this model with alpha 0.7 in all: 0.6 + 0.1" in said


@pytest.mark.parametrize("in_place", [False, True])
def test_gone_on_with(root: Path, in_place: bool) -> None:
    def give_up(done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    where: dict[str, Any] = {"in_place": True} if in_place else {"out": "out"}
    right = wanted(PAIRS, [0.6, 0.4])
    with pytest.raises(KeyboardInterrupt):
        ik.apply("target", PAIRS, alpha=[0.6, 0.4], progress=give_up, **where)
    place = "target" if in_place else "out"
    assert ik.status(place).state == "unfinished"
    ik.resume(place)
    assert_equal(read_model(root / place), right)
    assert ik.verify(place)


def test_a_tensor_that_a_pair_lacks_takes_what_the_others_add(root: Path) -> None:
    rest = {name: t for name, t in read_model(root / "b2").items() if name != NORM}
    shutil.rmtree("b2")
    write_model(root / "b2", rest, config=CONFIG)
    with pytest.raises(
        CheckpointError, match=rf"'{NORM}' is in target and instruct-1 and base-1 and instruct-2 and not"
    ):
        ik.apply("target", PAIRS, out="out", alpha=[0.6, 0.4])
    report = ik.apply("target", PAIRS, out="out", alpha=[0.6, 0.4], allow_missing=True, sync=False)
    found, target = read_model(root / "out"), read_model(root / "target")
    assert same(found[NORM], wanted([("i1", "base")], [0.6])[NORM])
    assert not same(found[NORM], target[NORM])
    assert any("of the residual" in text for text in report.warnings)
    assert ik.verify("out")


def test_rows_of_tokens_of_two_models(root: Path) -> None:
    """The second base has other numbers of rows: what is added there are the rows that it has."""
    for name in ("b2", "x2"):
        own = read_model(root / name)
        shutil.rmtree(name)
        cut = {key: t[:32] if key in (EMBEDDING, "lm_head.weight") else t for key, t in own.items()}
        write_model(root / name, cut, config=CONFIG)
    ik.apply("target", PAIRS, out="out", alpha=[0.6, 0.4], sync=False)
    found = read_model(root / "out")[EMBEDDING]
    full, t = wanted([("i1", "base")], [0.6])[EMBEDDING], read_model(root / "target")[EMBEDDING][:32].float()
    i1, b1, x2, b2 = (read_model(root / name)[EMBEDDING][:32].float() for name in ("i1", "base", "x2", "b2"))
    both = (t + torch.tensor(0.6) * (i1 - b1) + torch.tensor(0.4) * (x2 - b2)).to(torch.bfloat16)
    assert same(found[:32], both)
    assert same(found[32:], full[32:])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pair", "i1"], "i1: is no pair, wanted INSTRUCT:BASE or INSTRUCT:BASE:ALPHA"),
        (["--pair", "i1:0.5"], "i1:0.5: is no pair"),
        (["--pair", "i1:base:x"], "i1:base:x: is no pair"),
        (["--pair", "i1:nowhere:1"], "nowhere: no such file or folder"),
        (["--pair", "i1:base:nan"], "alpha is nan, wanted a finite number"),
        (["--pair", "i1:base:1", "--alpha", "2"], "i1:base:1 has a factor of its own"),
        (["--pair", "i1:r"], "r: is a residual, wanted a model as base"),
        (["--pair", "i1:base", "--instruct", "i1", "--base", "base"], "or one or more --pair"),
        (["r", "--pair", "i1:base"], "or one or more --pair"),
    ],
)
def test_refused(root: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    ik.extract("base", "i1", "r", sync=False)
    before = snapshot(root)
    try:
        code = main(["apply", "target", *words, "-o", "out"])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert said in capsys.readouterr().err
    assert snapshot(root) == before


def test_residuals_and_pairs_are_not_mixed(root: Path) -> None:
    before = snapshot(root / "target")
    ik.extract("base", "i1", "r", sync=False)
    with pytest.raises(ArgumentError, match=re.escape("residual[0] is 'r', wanted a pair of models (instruct, base)")):
        ik.apply("target", ["r", ("i2", "base")], out="out")
    with pytest.raises(ArgumentError, match="alpha: got 3 factors for 2 residuals"):
        ik.apply("target", PAIRS, in_place=True, alpha=[1, 2, 3])
    assert snapshot(root / "target") == before


def test_quantized_models(tmp_path: Path) -> None:
    """Codes of pairs are decoded, and a quantized target gets new ones: with a factor of 0 those of the other pair."""
    shapes = {EMBEDDING: (40, 64), MLP_UP: (64, 64)}
    base = tensors(1, shapes)
    for name, each, form in (
        ("t", moved(base, 2), "fp8-block"), ("i1", moved(base, 3), "fp8-channel"), ("b", base, None),
        ("i2", moved(base, 4), "nvfp4"), ("b2", base, "int8-channel"),
    ):  # fmt: skip
        stored, config = dict(each), dict(CONFIG)
        if form is not None:
            make, settings = FORMATS[form]
            stored = {EMBEDDING: each[EMBEDDING]} | make(MLP_UP, each[MLP_UP])
            config |= {"quantization_config": settings}
        write_model(tmp_path / name, stored, config=config)
    t, i1, b, i2, b2 = (numbers(tmp_path / name) for name in ("t", "i1", "b", "i2", "b2"))
    pairs = [(tmp_path / "i1", tmp_path / "b"), (tmp_path / "i2", tmp_path / "b2")]
    ik.apply(tmp_path / "t", pairs, out=tmp_path / "plain", alpha=[0.5, 0.25], dtype="bf16", sync=False)
    found = read_model(tmp_path / "plain")
    for name, value in t.items():
        first = value.float() + 0.5 * (i1[name].float() - b[name].float())
        assert same(found[name], (first + 0.25 * (i2[name].float() - b2[name].float())).to(torch.bfloat16))
    ik.apply(tmp_path / "t", pairs[0], out=tmp_path / "one", alpha=0.5, sync=False)
    ik.apply(tmp_path / "t", pairs, out=tmp_path / "two", alpha=[0.5, 0.0], sync=False)
    ik.apply(tmp_path / "t", pairs, out=tmp_path / "both", alpha=[0.5, 0.25], sync=False)
    one, two, both = (read_model(tmp_path / name) for name in ("one", "two", "both"))
    assert one.keys() == two.keys() == both.keys()
    assert all(torch.equal(raw(one[name]), raw(two[name])) for name in one)
    assert not torch.equal(raw(one[MLP_UP]), raw(both[MLP_UP]))
    assert ik.verify(tmp_path / "both")


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
