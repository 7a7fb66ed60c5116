"""What a copied file names comes with it: folders of sentence-transformers, packages of custom code, data by path."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from small_models import triple

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import Rules

PARTS = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]
SENTENCES = {
    "modules.json": PARTS,
    "config_sentence_transformers.json": {"prompts": {}},
    "1_Pooling/config.json": {"pooling_mode_lasttoken": True},
    "2_Dense/config.json": {"in_features": 16},
    "2_Dense/model.safetensors": "weights",
    "3_Unnamed/config.json": {},
}
CODE = {
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["words.Slow", None]}},
    "words.py": "from .pieces.table import rows\nfrom . import (\n    marks as m,\n)\n",
    "marks.py": "from .other import gone\nimport json\n",
    "pieces/__init__.py": "",
    "pieces/table.py": "from ..below import deep\nfrom .a.b.c import x\n",
    "pieces/a/b/c.py": "x = 1",
    "pieces/.hidden": "h",
    "pieces/__pycache__/table.pyc": "c",
    "below.py": "",
    "not_needed.py": "",
    "unrelated/code.py": "",
}


def put(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def one_pass(base: Path, instruct: Path, target: Path) -> Plan:
    inputs = {"target": target, "instruct": instruct, "base": base}
    return plan_apply({role: open_checkpoint(path) for role, path in inputs.items()}, Rules.of(1))


def owners(plan: Plan) -> dict[str, str]:
    return {file.name: file.role for file in plan.side_files}


def below(folder: Path) -> set[str]:
    """Files of a folder beside weights, manifest, config and card."""
    names = {f"{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()}
    made = {"model.safetensors", "ires.json", "residual.json", "residual.safetensors", "config.json", "README.md"}
    return names - made


def test_the_parts_of_a_sentence_model(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    put(target, SENTENCES)
    put(instruct, SENTENCES)
    plan = one_pass(base, instruct, target)
    assert set(owners(plan).values()) == {"target"}
    assert plan.not_copied == ("3_Unnamed/",)
    folders = "1_Pooling/config.json, 2_Dense/config.json, 2_Dense/model.safetensors"
    assert re.search(rf"from target +{folders} \(modules.json names it\)\n", f"{plan}")
    assert plan.warnings == (
        "2_Dense/model.safetensors: these weights are copied from target as they are, and not merged",
    )
    report = ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    assert below(tmp_path / "out") == SENTENCES.keys() - {"3_Unnamed/config.json"}
    assert (tmp_path / "out/1_Pooling/config.json").read_bytes() == (target / "1_Pooling/config.json").read_bytes()
    assert report.not_copied == ("3_Unnamed/",)
    assert ik.verify(tmp_path / "out")
    (tmp_path / "out/2_Dense/model.safetensors").write_text("other")
    assert ik.verify(tmp_path / "out").problems == ["2_Dense/model.safetensors has changed since the merge"]


@pytest.mark.parametrize("role", ["target", "instruct"])
def test_packages_of_custom_code(tmp_path: Path, role: str) -> None:
    base, instruct, target = triple(tmp_path)
    put(tmp_path / role, CODE)
    needed = {
        "tokenizer_config.json", "words.py", "marks.py", "pieces/__init__.py", "pieces/table.py", "pieces/a/b/c.py",
        "below.py",
    }  # fmt: skip
    if role == "target":  # whose own modules are all copied
        needed |= {"not_needed.py"}
        assert one_pass(base, instruct, target).not_copied == ("unrelated/",)
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    assert below(tmp_path / "residual") == (needed if role == "instruct" else set())
    for residual in ((instruct, base), tmp_path / "residual"):
        out = tmp_path / f"out-{isinstance(residual, tuple)}"
        ik.apply(target, residual, out=out, sync=False)
        assert below(out) == needed
        assert ik.verify(out)


def test_packages_come_and_go_in_place(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    put(instruct, CODE)
    before = below(target)
    ik.apply(target, (instruct, base), in_place=True, undo="all", sync=False)
    assert (target / "pieces/a/b/c.py").read_text() == "x = 1"
    ik.rollback(target)
    assert below(target) == before
    assert not (target / "pieces").exists()


def test_code_of_the_target_is_not_replaced_by_other_code_of_the_same_name(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    put(instruct, CODE)
    put(target, {"below.py": "mine = 1", "marks.py": CODE["marks.py"]})
    plan = one_pass(base, instruct, target)
    assert owners(plan)["below.py"] == "target"
    assert plan.warnings == ("below.py of instruct, which pieces/table.py names, is not copied: target has another",)


def test_settings_that_hold_paths(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    put(
        target,
        {
            "speakers.json": {"one": {"prompt": "voices/one.npy"}, "two": ["voices/two.npy"]},
            "voices/one.npy": "1",
            "other/x": "x",
            "checkpoints/model/x": "x",
            "trainer_state.json": {"best_model_checkpoint": "checkpoints/model"},
            "extra.json": {"_name_or_path": "other/x", "up": "../other/x", "root": "/other"},
        },
    )
    plan = one_pass(base, instruct, target)
    assert "voices/one.npy" in owners(plan)
    assert plan.not_copied == ("checkpoints/", "other/")


def test_an_adapter_config_is_left_out(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    put(target, {"adapter_config.json": {"r": 8}})
    put(instruct, {"adapter_config.json": {"r": 8}})
    plan = one_pass(base, instruct, target)
    assert "adapter_config.json" not in owners(plan)
    assert plan.not_copied == ("adapter_config.json",)
    assert re.search(r"not copied +adapter_config.json\n", f"{plan}")


@pytest.mark.parametrize("kind", ["link out", "linked folder", "pipe", "dangling", "deep"])
def test_what_cannot_be_copied_of_a_needed_folder_is_refused(tmp_path: Path, kind: str) -> None:
    base, instruct, target = triple(tmp_path)
    put(target, SENTENCES)
    place, secret = target / "1_Pooling" / "x", tmp_path / "secret"
    secret.write_text("key")
    if kind == "link out":
        place.symlink_to(secret)
    elif kind == "linked folder":
        place.symlink_to(target / "2_Dense")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "dangling":
        place.symlink_to("nothing")
    else:
        (place / "/".join("d" * 20)).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="1_Pooling"):
        one_pass(base, instruct, target)


def test_code_and_settings_that_cannot_be_read_name_nothing(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    put(
        target,
        {
            "a.json": "[" * 50_000,
            "b.json": '{"x": ',
            "c.py": "from .... import far\nfrom . import *\nfrom .1 import x\n" + "(" * 50_000,
            "dots.py": "from " + "." * 2_000_000 + "\n",
            "brackets.py": "from . import (\n" * 200_000,
            "d.json": '"' + "x/" * 5_000 + '"',
        },
    )
    (target / "e.py").write_bytes(b"from .\xff import \xfe\n")
    with open(target / "f.json", "wb") as file:
        file.truncate(1 << 25)  # data, not settings
    assert {"a.json", "b.json", "c.py", "d.json", "e.py", "f.json"} <= owners(one_pass(base, instruct, target)).keys()
