"""Models of more files than a process may have open."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_models import Tensors, normal, read_model, write_model

import ires_kernels as ik
from ires_kernels import cli

SHARDS = 120


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    place = tmp_path_factory.mktemp("many")
    names = [f"model.layers.{i:03}.weight" for i in range(2 * SHARDS)]
    made = []
    for seed, role in enumerate(("base", "instruct", "target")):
        tensors: Tensors = {name: normal((4, 8), 7 * i + seed) for i, name in enumerate(names)}
        if role == "instruct":  # another layout: every file is used again and again
            tensors = {name: tensors[name] for name in [*names[::2], *names[1::2]]}
        made.append(write_model(place / role, tensors, shards=SHARDS))
    base, instruct, target = made
    return base, instruct, target


@pytest.fixture
def few_files() -> Iterator[None]:
    """A limit of 64 files beside those that are open already."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(map(int, os.listdir("/proc/self/fd"))) + 50
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_files")
def test_a_new_folder_and_its_verification(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, target = models
    ik.apply(target, (instruct, base), out=tmp_path / "out", threads=2, sync=False)
    assert ik.verify(tmp_path / "out", threads=2)
    ik.extract(base, instruct, tmp_path / "residual", threads=2, sync=False)
    ik.apply(target, tmp_path / "residual", out=tmp_path / "two", threads=2, sync=False)
    one, two = read_model(tmp_path / "out"), read_model(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert len(os.listdir("/proc/self/fd")) < limit - 40, "they were closed"
    assert len(ik.load(target, (instruct, base), threads=2)) == 2 * SHARDS


@pytest.mark.usefixtures("few_files")
def test_in_place_the_limit_is_raised_as_far_as_it_may(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, target = models
    ik.apply(target, (instruct, base), out=tmp_path / "out", threads=2, sync=False)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in target.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    ik.apply(copy, (instruct, base), in_place=True, threads=2, sync=False)
    one, two = read_model(tmp_path / "out"), read_model(copy)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_in_place_a_hard_limit_is_named(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, instruct, target = models
    program = (
        "import resource, sys; from ires_kernels import cli; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}", "--threads", "2"]
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--in-place"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "files have to be open at once, and the limit is 64: raise it (`ulimit -n " in done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "-o", f"{tmp_path / 'out'}", "--no-sync"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert cli.main(["verify", f"{tmp_path / 'out'}", "--quiet"]) == 0
