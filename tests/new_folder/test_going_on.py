"""A new folder that was interrupted goes on where it was, or is taken back."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
from small_models import snapshot, triple

import ires_kernels as ik
from ires_kernels.checking import guards
from ires_kernels.files import new_file
from ires_kernels.files.ownership import StoreError


def test_a_new_folder_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path, shards=2, files={"tokenizer.json": "{}"})
    ik.apply(target, (instruct, base), out=tmp_path / "whole", alpha=0.3)
    write = new_file.NewFile.write
    seen: list[str] = []

    def failing(self: Any, *arguments: Any) -> None:
        if self.path.name.startswith("model-00002"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), f"{self.path}")
        seen.append(self.path.name)
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(new_file.NewFile, "write", failing)
        with pytest.raises(OSError, match="Input/output error"):
            ik.apply(target, (instruct, base), out=tmp_path / "out", alpha=0.3, threads=1)
    assert seen
    found = ik.status(tmp_path / "out")
    assert found.state == "unfinished"
    assert re.fullmatch(r"apply, 1 of 2 files, 2\.\d+ of 4\.\d+ kB", found.what)
    assert found.headway is not None
    assert (found.headway.files_done, found.headway.files_in_all) == (1, 2)
    assert found.to_dict()["headway"]["files_in_all"] == 2
    first = tmp_path / "out.partial" / "model-00001-of-00002.safetensors"
    stamp = first.stat()
    with pytest.raises(StoreError, match="holds 1 complete files of another operation"):
        ik.apply(target, (instruct, base), out=tmp_path / "out", alpha=0.5)
    assert first.stat() == stamp
    ik.resume(tmp_path / "out")
    assert (tmp_path / "out" / first.name).stat().st_ino == stamp.st_ino, "it was not written again"
    assert snapshot_content(tmp_path / "out") == snapshot_content(tmp_path / "whole")
    before = snapshot(tmp_path / "out")
    again = ik.apply(target, (instruct, base), out=tmp_path / "out", alpha=0.3)
    assert "nothing was done: this is the output of the same command" in f"{again}"
    assert snapshot(tmp_path / "out") == before
    with pytest.raises(StoreError, match="is not empty"):
        ik.apply(target, (instruct, base), out=tmp_path / "out", alpha=0.5)
    (instruct / "tokenizer.json").write_text("{   }")
    with pytest.raises(StoreError, match="is not empty"):
        ik.apply(target, (instruct, base), out=tmp_path / "out", alpha=0.3)


def snapshot_content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_unfinished_new_folder_can_be_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, _ = triple(tmp_path, shards=2, files={"tokenizer.json": "{}"})
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(guards, "check_unchanged", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ik.extract(base, instruct, tmp_path / "r")
    assert ik.status(tmp_path / "r").state == "unfinished"
    assert ik.rollback(tmp_path / "r") == f"{tmp_path}/r.partial: was removed."
    assert snapshot(tmp_path) == before
