"""What belongs to a tensor of the output, and that all which follows from it is read off the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_models import normal, triple, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.inputs import open_inputs
from ires_kernels.planning.layout import cut
from ires_kernels.planning.matching import Match, Matcher
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import Rules

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_and_untied(tmp_path: Path) -> dict[str, Path]:
    """A target with a head of its own, and two models whose head is their embedding."""
    target = write_model(tmp_path / "target", {EMBED: normal((8, 4), 0), HEAD: normal((8, 4), 1)})
    tied = [
        write_model(tmp_path / role, {EMBED: normal((8, 4), seed)}, config={"tie_word_embeddings": True})
        for seed, role in enumerate(("instruct", "base"), 2)
    ]
    return {"target": target, "instruct": tied[0], "base": tied[1]}


def test_a_head_belongs_to_an_embedding_where_there_is_no_other(tmp_path: Path) -> None:
    inputs = open_inputs(tied_and_untied(tmp_path))
    matcher = Matcher(inputs, {})
    refs = {role: checkpoint.tensors for role, checkpoint in inputs.items()}
    assert matcher.of("target", refs["target"][HEAD]) == (
        Match(
            0,
            {
                "target": (refs["target"][HEAD],),
                "instruct": (refs["instruct"][EMBED],),
                "base": (refs["base"][EMBED],),
            },
            (),
        ),
    )
    other = TensorRef("other.weight", "BF16", (8,), Path("f"), 0, 16)
    assert matcher.find("instruct", other) == ()
    copied = Matcher(inputs, {"other.weight": EMBED})
    assert copied.find("instruct", other) == (refs["instruct"][EMBED],)
    assert matcher.of("target", other) == (Match(0, {"target": (other,)}, ("instruct", "base")),)


def test_the_plan_keeps_what_was_matched(tmp_path: Path) -> None:
    plan = plan_apply(open_inputs(tied_and_untied(tmp_path)), Rules.of(1))
    assert plan.matched() == [(HEAD, "instruct", EMBED), (HEAD, "base", EMBED)]
    assert f"matched    {HEAD} with {EMBED} of instruct\n" in f"{plan}"
    (head,) = (tensor for tensor in plan.to_dict()["tensors"] if tensor["name"] == HEAD)
    assert {role: found["name"] for role, found in head["inputs"].items()} == {
        "target": HEAD,
        "instruct": EMBED,
        "base": EMBED,
    }


def in_two(matcher: Matcher, role: str, ref: TensorRef, whole: Any = Matcher.of) -> tuple[Match, ...]:
    """Every tensor of more than one row in two runs of rows, the first of one row."""
    (match,) = whole(matcher, role, ref)
    if len(ref.shape) < 2 or match.absent:
        return (match,)
    row, rest = ref.numel // ref.shape[0], ref.numel - ref.numel // ref.shape[0]
    runs = ((0, row), (row, rest))
    return tuple(
        Match(first, {r: cut(refs, first, count) for r, refs in match.refs.items()}, ()) for first, count in runs
    )


@pytest.mark.parametrize(
    "options", [{}, {"rounding": "stochastic", "seed": 3}, {"dtype": "f16", "skip": "mlp"}], ids=str
)
def test_matches_in_parts_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    """And are followed by all that comes after: the folder, its manifest, the same command given again, verify."""
    base, instruct, target = triple(tmp_path, shards=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ik.apply(target, (instruct, base), out=whole, **options)
    monkeypatch.setattr(Matcher, "of", in_two)
    plan = ik.apply(target, (instruct, base), out=parts, dry_run=True, **options)
    assert isinstance(plan, Plan)
    assert {step.first for step in plan.steps if len(step.shape) == 2 and not step.reason} > {0}
    ik.apply(target, (instruct, base), out=parts, **options)
    tables = [json.loads((out / "ires.json").read_bytes()) for out in (whole, parts)]
    files = [path for path in sorted(whole.iterdir()) if path.name not in ("ires.json", "README.md")]  # which have ids
    assert len(files) > 3
    for path in files:
        assert (parts / path.name).read_bytes() == path.read_bytes(), path.name
    digests = [{name: entry["xxh3_128"] for name, entry in table["tensors"].items()} for table in tables]
    assert digests[0] == digests[1]
    assert tables[0]["report"]["lost"] == tables[1]["report"]["lost"]
    assert tables[0]["id"] != tables[1]["id"]
    report = ik.verify(parts)
    assert report.ok, f"{report}"
    again = ik.apply(target, (instruct, base), out=parts, **options)
    assert not isinstance(again, Plan)
    assert again.seconds == 0
    loaded = ik.load(target, (instruct, base), **options)
    assert loaded.keys() == digests[0].keys()


def test_matches_in_parts_change_no_byte_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    options: Any = {"rounding": "stochastic", "seed": 3, "skip": "norm"}
    ik.apply(target, (instruct, base), out=tmp_path / "whole", **options)
    monkeypatch.setattr(Matcher, "of", in_two)
    ik.apply(target, (instruct, base), in_place=True, **options)
    for path in target.glob("*.safetensors"):
        assert (tmp_path / "whole" / path.name).read_bytes() == path.read_bytes(), path.name
