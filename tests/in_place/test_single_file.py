"""A model that is one file: what is said of the files beside it, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

from small_models import triple

import ires_kernels as ik


def test_in_place_nothing_beside_it_is_copied_or_said_to_be(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, files={"tokenizer.json": "{}"})
    (instruct / "tokenizer.json").write_text('{"x": 1}')
    file = target / "model.safetensors"
    before = {path.name: path.read_bytes() for path in target.iterdir() if path != file}
    plan = ik.apply(file, (instruct, base), in_place=True, sync=False, dry_run=True)
    assert "from instruct" not in f"{plan}"
    assert "new files  model.safetensors.ires.json" in f"{plan}"
    report = ik.apply(file, (instruct, base), in_place=True, sync=False, sha256=True)
    assert report.to_dict()["side_files"] == {}
    assert "from instruct" not in f"{report}"
    records = {"model.safetensors.ires.json", "model.safetensors.sha256"}
    after = {path.name: path.read_bytes() for path in target.iterdir() if path != file}
    assert {name: raw for name, raw in after.items() if name not in records} == before
    # What was recorded of the file is not true of a model that is made of it.
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    assert not records & {path.name for path in (tmp_path / "out").iterdir()}
