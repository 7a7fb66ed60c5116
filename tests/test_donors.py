"""Whose tokenizer, chat template, generation settings and processors a merged model gets."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import triple

import ires_kernels as ik
from ires_kernels.checkpoint import open_checkpoint
from ires_kernels.plan import Plan, plan_apply
from ires_kernels.rules import Rules


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def one_pass(base: Path, instruct: Path, target: Path) -> Plan:
    inputs = {"target": target, "instruct": instruct, "base": base}
    return plan_apply({role: open_checkpoint(path) for role, path in inputs.items()}, Rules.of(1))


def owners(plan: Plan) -> dict[str, str]:
    return {file.name: file.role for file in plan.side_files}


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"],
)
def test_base_gives_nothing(tmp_path: Path, name: str) -> None:
    base, instruct, target = triple(tmp_path)
    write(base, **{name: "{}"})
    assert owners(one_pass(base, instruct, target)) == {"config.json": "target"}
    write(target, **{name: "{ }"})
    assert owners(one_pass(base, instruct, target))[name] == "target"
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    ik.apply(target, tmp_path / "residual", out=tmp_path / "out", sync=False)
    ik.apply(target, (instruct, base), in_place=True, sync=False)
    for folder in (tmp_path / "out", target):
        assert (folder / name).read_text() == "{ }"
