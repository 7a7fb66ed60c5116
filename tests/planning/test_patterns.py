"""Regular expressions over names: none may take for ever, whoever wrote it."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest
from small_models import triple

import ires_kernels as ik
from ires_kernels import cli
from ires_kernels.checkpoints import names as names_of
from ires_kernels.checkpoints.header import build_header
from ires_kernels.planning import patterns
from ires_kernels.planning.patterns import LIMIT, PatternError, unmatched, ways
from ires_kernels.planning.rules import ArgumentError, Rules

USUAL = [
    "norm", "embed_tokens|lm_head", r"layers\.\d+\.mlp", r"layers\.([0-9]|1[0-5])\.", "^(?!.*norm).*$", r"(q|k|v)_proj",
    r"^(a\.\d+\.lm_head)(\.|$)", r"layers\..*\.(mlp|self_attn)\..*weight", r"(?i)NORM",
    r"^model\.layers\.(1|2|3|27)\..*",
    ".*experts.*gate.*weight", r"(?<!_)bias$", r"(mlp|attn)?\.weight", r"layers\.\d{1,2}\.",
]  # fmt: skip
NAME = "model.language_model.layers.31.block_sparse_moe.experts.127.down_proj.weight_scale_inv"
BAD = [
    "(a+)+$", "(a|a)*b", "(a|aa)+$", "(.*a){12}", r"(\w+\s?)*!", "a*a*a*a*a*a*a*a*b", "(?:(?:a?){9}){9}", "(a*)*b",
    "(?=(a+)+b)a", "(?:.*.*)+x", r"([a-z]+)*\d", "(x+x+)+y",
]  # fmt: skip


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_are_taken(pattern: str) -> None:
    assert ways(pattern, len(NAME)) <= LIMIT
    assert unmatched([pattern], [NAME, "a.1.lm_head"]) in ([], [pattern])
    assert patterns.matches(pattern, NAME) == (re.search(pattern, NAME) is not None)


@pytest.mark.parametrize("pattern", BAD)
def test_patterns_that_may_take_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError, match="may take for ever on a name of 86 characters"):
        unmatched([pattern], ["a" * 86])


def test_what_is_taken_is_fast() -> None:
    """The bound holds: no pattern that it lets pass takes more than a moment on the worst of names."""
    draw = random.Random(1)

    def piece(depth: int) -> str:
        kind = draw.randrange(6 if depth else 2)
        one = draw.choice(["a", ".", r"\w", "[ab]", "b"])
        if kind < 3:
            return one + draw.choice(["", "", "*", "+", "?", "{0,9}", "*?"])
        inner = "".join(piece(depth - 1) for _ in range(draw.randrange(1, 4)))
        other = "".join(piece(depth - 1) for _ in range(draw.randrange(1, 3)))
        return f"({draw.choice([inner, f'{inner}|{other}'])}){draw.choice(['', '*', '{2}'])}"

    taken = 0
    for _ in range(2000):
        pattern = "".join(piece(2) for _ in range(draw.randrange(1, 5))) + "!"
        if ways(pattern, 40) > 5.5:
            continue
        taken += 1
        started = time.process_time()  # some 20 ms; what is not refused though it should be takes hours
        assert not patterns.matches(pattern, "a" * 40)
        assert time.process_time() - started < 10, pattern
    assert taken > 500


def test_all_patterns_together_have_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.0)
    with pytest.raises(ArgumentError, match=r"take more than 0 s for 3 names, as 'a' does"):
        Rules.of(1, skip="a").unmatched(["a", "b", "c"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "not a regular"), ("a" * 20_000, "20000 char"), ("a{99999999999999}", "not a regular")],
)
def test_what_is_no_pattern(pattern: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Rules.of(1, skip=pattern)


def test_parentheses_nested_deeper_than_any_stack() -> None:
    with pytest.raises(ArgumentError, match="nested too deeply"):
        Rules.of(1, skip="(" * 4000 + "a" + ")" * 4000)


def test_a_strangers_patterns_do_not_hang_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, instruct, target = triple(tmp_path)
    out = tmp_path / "out"
    ik.apply(target, (instruct, base), out=out, skip="norm", alphas=[("mlp", 0.5)], sync=False)
    path = out / "ires.json"
    inputs = [f"--target={target}", f"--instruct={instruct}", f"--base={base}"]
    for key, value in (("skip", [r"^(\w+\.?)*$!"]), ("alphas", [[r"^(\w+\.?)*$!", [1.0]]])):
        table = json.loads(path.read_text())
        table["rules"][key] = value
        path.write_text(json.dumps(table))
        assert cli.main(["verify", f"{out}", *inputs]) == 2
        assert "may take for ever" in capsys.readouterr().err
    pair = ["--instruct", f"{instruct}", "--base", f"{base}"]
    assert cli.main(["apply", f"{target}", *pair, "-o", f"{tmp_path / 'new'}", "--skip", "(.+)+!"]) == 2
    assert "may take for ever" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, None])
def test_planning_takes_time_as_there_are_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool | None
) -> None:
    """Every head asks for the embedding, and every embedding may be copied: that must not be each for each."""
    looks, embedding = [0], names_of._EMBEDDING

    class Counting:
        def search(self, name: str) -> re.Match[str] | None:
            looks[0] += 1
            return embedding.search(name)

    monkeypatch.setattr(names_of, "_EMBEDDING", Counting())
    count = 400
    head = [f"a.{i}.lm_head.weight" for i in range(count // 2)]
    names = [*head, *(f"a.{i}.embed_tokens.weight" for i in range(count // 2))]
    models = []
    for role in ("base", "instruct", "target"):
        folder = tmp_path / role
        folder.mkdir()
        raw = build_header([*((name, "BF16", (1, 4)) for name in names), ("z", "BF16", (2,))], {})
        (folder / "model.safetensors").write_bytes(raw + random.Random(role).randbytes(8 * count) + bytes(4))
        (folder / "config.json").write_text(json.dumps({} if tied is None else {"tie_word_embeddings": tied}))
        models.append(folder)
    base, instruct, target = models
    plan = ik.apply(target, (instruct, base), out=tmp_path / "out", dry_run=True, skip=[f"x{i}|z" for i in range(9)])
    f"{plan}"
    ik.extract(base, instruct, tmp_path / "residual", dry_run=True)
    assert looks[0] < 100 * count, "one for each of the three models, in each of some twenty places"
