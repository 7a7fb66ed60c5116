"""How far an unfinished merge has come."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_models import triple

import ires_kernels as ik
from ires_kernels.records.headway import Headway, of_new_folder, of_update


@pytest.mark.parametrize(
    ("headway", "wanted"),
    [
        (Headway(3_100_000_000, 12_000_000_000, 2, 7), "2 of 7 files, 3.1 of 12 GB"),
        (Headway(20_000_000, 12_000_000_000, 0, 7), "0 of 7 files, 0.02 of 12 GB"),
        (Headway(0, 999, 0, 1), "0 of 1 file, 0 of 999 B"),
        (Headway(1_000_000_000_000, 2_000_000_000_000), "1 of 2 TB"),
    ],
)
def test_in_words(headway: Headway, wanted: str) -> None:
    assert f"{headway}" == wanted


def test_what_is_reserved_is_not_written(tmp_path: Path) -> None:
    """A file that is being written counts by what was written to it."""
    mib = 1 << 20
    for name in ("model-00001-of-00002.safetensors", ".ires-model-00002-of-00002.safetensors.tmp"):
        fd = os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(fd, 0, 4 * mib)
        os.pwrite(fd, b"x" * mib, 2 * mib)
        os.fsync(fd)
        if os.lseek(fd, 0, os.SEEK_HOLE) == 4 * mib:
            pytest.skip("this file system does not tell what was written")
        os.close(fd)
    (tmp_path / ".ires-model-00001-of-00002.safetensors.done").touch()
    (tmp_path / "config.json").write_text("{}")
    sizes = {f"model-{i:05}-of-00002.safetensors": 4 * mib for i in (1, 2)}
    assert of_new_folder(tmp_path, sizes) == Headway(5 * mib, 8 * mib, 1, 2)


def test_an_update_in_place(tmp_path: Path) -> None:
    assert of_update([["a", 0, 10], ["a", 20, 30], ["b", 0, 5]], 2) == Headway(20, 25)
    base, instruct, target = triple(tmp_path)

    def give_up(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ik.apply(target, (instruct, base), in_place=True, undo="all", progress=give_up)
    found = ik.status(target)
    assert found.state == "unfinished"
    assert found.what.startswith("apply in place, ")
    assert found.what.endswith(" of 4.19 kB new")
    assert found.headway is not None
    assert found.headway.bytes_in_all == 4192
    assert any(f"instruct {instruct}" in line for line in found.details)
    ik.resume(target)
    assert ik.status(target).headway is None
