"""Sources of bytes: read by position, opened once, and known by their stamp to be what was validated."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ires_kernels.checkpoints import sources
from ires_kernels.checkpoints.checkpoint import FileId
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.sources import Files, LocalFile, Source


def test_a_file_is_read_by_position(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(100)))
    source: Source = LocalFile(path)
    try:
        found = bytearray(5)
        source.read_into(memoryview(found), 90)
        assert found == bytes(range(90, 95))
        with pytest.raises(OSError, match=r"the file ends at byte 100: it shrank.*bytes'"):
            source.read_into(memoryview(found), 96)
        assert source.path == path
        assert source.stamp() == FileId.of(path)
        path.write_bytes(bytes(100))
        os.utime(path, (1, 1))
        assert source.stamp() == FileId.of(path)  # of what is open: it is the file that has changed
    finally:
        source.close()


def test_a_source_with_another_stamp_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(8))
    known = {path: FileId.of(path)}
    path.write_bytes(bytes(9))
    files = Files(known, [path])
    with pytest.raises(CheckpointError, match="bytes: changed after it was validated"):
        files.open(path)
    files.close()


def test_sources_in_use_stay_open_and_others_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_OPEN", 2)
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode())
    files = Files({path: FileId.of(path) for path in paths}, [*paths, paths[0]])
    held, idle = files.hold(paths[0]), files.open(paths[1])
    assert files.open(paths[1]) is idle
    third = files.open(paths[2])
    assert files.open(paths[0]) is held
    for source, wanted in ((held, b"a"), (third, b"c")):
        found = bytearray(1)
        source.read_into(memoryview(found), 0)
        assert found == wanted
    assert files.open(paths[1]) is not idle
    files.release(paths[0])
    assert files.open(paths[0]) is held  # it has another use
    files.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        held.read_into(memoryview(bytearray(1)), 0)
