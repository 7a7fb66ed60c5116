"""Models of more files than a process may have open."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_models import Tensors, normal, read_model, write_model

import ires_kernels as ik
from ires_kernels.files.slots import MOST_OPEN, Targets

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


@pytest.mark.parametrize("undo", ["ring", "all", "none"])
@pytest.mark.usefixtures("few_files")
def test_in_place(models: tuple[Path, Path, Path], tmp_path: Path, undo: str) -> None:
    base, instruct, target = models
    ik.apply(target, (instruct, base), out=tmp_path / "out", threads=2, sync=False)
    copy = tmp_path / "copy"
    shutil.copytree(target, copy)
    before = read_model(copy)
    ik.apply(copy, (instruct, base), in_place=True, threads=2, undo=undo, sync=undo == "ring")
    one, two = read_model(tmp_path / "out"), read_model(copy)
    assert all(torch.equal(one[name], two[name]) for name in one)
    if undo == "all":
        ik.rollback(copy)
        assert all(torch.equal(before[name], tensor) for name, tensor in read_model(copy).items())


def test_a_file_that_is_opened_again_is_the_same(tmp_path: Path) -> None:
    names = [f"{number:02}" for number in range(3 * MOST_OPEN)]
    for name in names:
        (tmp_path / name).write_bytes(b"old")
    targets = Targets(names, lambda name: os.open(tmp_path / name, os.O_RDWR), sync=True)
    (tmp_path / "other").write_bytes(b"new")
    os.rename(tmp_path / "other", tmp_path / names[0])
    with pytest.raises(OSError, match="moved or replaced it while it was changed"):
        targets.write(names[0], memoryview(b"xxx"), 0)
    targets.close()
    assert (tmp_path / names[0]).read_bytes() == b"new"


def test_what_was_written_is_durable_before_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number:02}" for number in range(MOST_OPEN + 2)]
    for name in names:
        (tmp_path / name).write_bytes(b"old")
    synced = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    targets = Targets(names, lambda name: os.open(tmp_path / name, os.O_RDWR), sync=True)
    for name in names:
        targets.write(name, memoryview(b"new"), 0)
    assert synced == names[:2]
    targets.make_durable()
    assert set(synced) == set(names)
    targets.close()
    assert all((tmp_path / name).read_bytes() == b"new" for name in names)
