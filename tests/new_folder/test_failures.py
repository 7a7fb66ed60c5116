"""What stops a merge on its way, and that nothing is left of it then."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from merges import before_window, merge
from small_models import triple

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files.new_folder import NewFolder
from ires_kernels.files.ownership import StoreError
from ires_kernels.streaming import cpu
from ires_kernels.tensors import ops


def assert_nothing_is_left(root: Path) -> None:
    assert {path.name for path in root.iterdir()} == {"base", "instruct", "target"}


def test_a_file_that_shrinks_under_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    file = instruct / "model.safetensors"
    before_window(monkeypatch, 1, lambda: os.truncate(file, 100))
    with pytest.raises(OSError, match="it shrank while it was read") as caught:
        merge(target, (instruct, base), out=tmp_path / "out", threads=1)
    assert caught.value.filename == str(file)
    assert "tensor '" in str(caught.value)
    assert_nothing_is_left(tmp_path)


def test_a_file_that_changes_before_or_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    files = sorted(base.glob("*.safetensors"))
    before_window(monkeypatch, 1, lambda: os.utime(files[1], ns=(5, 5)))
    with pytest.raises(CheckpointError, match=f"{files[1]}: changed after it was validated"):
        merge(target, (instruct, base), out=tmp_path / "out", threads=1)
    assert_nothing_is_left(tmp_path)
    before_window(monkeypatch, 20, lambda: os.utime(files[1], ns=(6, 6)))
    with pytest.raises(CheckpointError, match=f"{files[1]}: changed while it was read"):
        merge(target, (instruct, base), out=tmp_path / "out", threads=1)
    assert_nothing_is_left(tmp_path)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_in_one_thread_stops_all_and_names_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    base, instruct, target = triple(tmp_path)

    def broken(*_: Any, offset: int, **__: Any) -> None:
        if offset >= 128:
            raise RuntimeError("the abacus is broken")

    monkeypatch.setattr(ops, "add_difference", broken)
    with pytest.raises(RuntimeError, match=rf"tensor '.*' of {target}/model.safetensors: the abacus is broken"):
        merge(target, (instruct, base), out=tmp_path / "out", threads=threads)
    assert_nothing_is_left(tmp_path)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ires-")]


def test_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    pwrite, calls = os.pwrite, iter(range(100))

    def failing_write(fd: int, data: Any, offset: int) -> int:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing_write)
    with pytest.raises(OSError, match=r"No space left on device \(tensor '.*'\)") as caught:
        merge(target, (instruct, base), out=tmp_path / "out")
    assert caught.value.filename == f"{tmp_path}/out.partial/model.safetensors"
    assert_nothing_is_left(tmp_path)


def test_an_interrupt_from_the_progress(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)

    def interrupt(_: int, __: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(target, (instruct, base), out=tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ires-")]


@pytest.mark.usefixtures("small_tiles")
def test_an_interrupt_does_not_wait_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    before_window(monkeypatch, 3, lambda: time.sleep(0.3))
    computed: list[int] = []
    compute = cpu.compute
    monkeypatch.setattr(cpu, "compute", lambda *args: (computed.append(1), compute(*args)))

    def interrupt(_: int, __: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(target, (instruct, base), out=tmp_path / "out", progress=interrupt, threads=1)
    assert len(computed) < 5
    assert_nothing_is_left(tmp_path)


def test_a_damaged_residual_is_found_by_its_hashes(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    file = tmp_path / "residual" / "residual.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"tensor '.*' is damaged: its xxh3_128 is .*residual\.json says"):
        ik.apply(target, tmp_path / "residual", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_two_merges_into_one_folder_at_once(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    with NewFolder(tmp_path / "out", "another", b""), pytest.raises(StoreError, match="another process is writing it"):
        ik.apply(target, (instruct, base), out=tmp_path / "out")
    merge(target, (instruct, base), out=tmp_path / "out")


def test_an_interrupt_while_waiting_leaves_no_thread_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)

    def slow(*_: Any, **__: Any) -> None:
        time.sleep(0.4)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "add_difference", slow)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.15)
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(target, (instruct, base), out=tmp_path / "out", threads=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ires-")]
    assert_nothing_is_left(tmp_path)
