"""A new folder whose files are written one by one, by processes that hold no lock."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from small_models import triple

import ires_kernels as ik
from ires_kernels.files.store import StoreError
from ires_kernels.new_folder import run
from ires_kernels.planning.plan import Plan
from ires_kernels.records.report import Report
from ires_kernels.streaming.options import Options

OPTIONS = Options.of("cpu", None, None)
WRITE = """
    import sys
    from pathlib import Path
    import ires_kernels as ik
    from ires_kernels.new_folder import run
    from ires_kernels.streaming.options import Options

    target, instruct, base, out, name = sys.argv[1:]
    plan = ik.apply(target, (instruct, base), out=f"{out}-not", dry_run=True)
    print(len(run.write_file(plan, name, Path(out), Options.of("cpu", 1, None)).outputs))
"""


@pytest.fixture
def planned(tmp_path: Path) -> tuple[Path, Path, Path, Plan]:
    """Target, instruct and base of three shards, and what merges them."""
    base, instruct, target = triple(tmp_path, shards=3)
    plan = ik.apply(target, (instruct, base), out=tmp_path / "out", dry_run=True)
    assert isinstance(plan, Plan)
    return target, instruct, base, plan


def test_files_that_are_written_one_by_one_are_those_of_one_run(
    tmp_path: Path, planned: tuple[Path, Path, Path, Plan]
) -> None:
    target, instruct, base, plan = planned
    out = tmp_path / "out"
    with run.begin(plan, out, OPTIONS, sync=True, sha256=False) as begun:
        begun.folder.leave_to_others()
    assert len(begun.missing) == 3
    for name in begun.missing:
        program = [sys.executable, "-c", textwrap.dedent(WRITE), *map(str, (target, instruct, base, out, name))]
        done = subprocess.run(program, capture_output=True, text=True, check=True)
        assert int(done.stdout) == sum(step.file == name for step in plan.steps)
    assert ik.status(out).state == "unfinished"
    report = run.write_folder(plan, out, OPTIONS, sync=True, sha256=False)
    assert isinstance(report, Report)
    assert report.bytes_written == 0, "all of it was there"
    ik.apply(target, (instruct, base), out=tmp_path / "one")
    made, one = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "ires.json"}
        for folder in (out, tmp_path / "one")
    )
    assert made == one
    assert ik.verify(out)


def test_a_file_that_is_not_there_to_be_written(tmp_path: Path, planned: tuple[Path, Path, Path, Plan]) -> None:
    target, instruct, base, plan = planned
    out, name = tmp_path / "out", plan.files[0].name
    with pytest.raises(FileNotFoundError):
        run.write_file(plan, name, out, OPTIONS)
    with run.begin(plan, out, OPTIONS, sync=True, sha256=False) as begun:
        begun.folder.leave_to_others()
    other = ik.apply(target, (instruct, base), out=tmp_path / "not", alpha=0.5, dry_run=True)
    assert isinstance(other, Plan)
    with pytest.raises(StoreError, match="is of another operation"):
        run.write_file(other, name, out, OPTIONS)
    run.write_file(plan, name, out, OPTIONS)
    with pytest.raises(StoreError, match=f"{name} is complete, or was not reserved"):
        run.write_file(plan, name, out, OPTIONS)
    with pytest.raises(StoreError, match=r"no\.safetensors is no file of this plan"):
        run.write_file(plan, "no.safetensors", out, OPTIONS)
