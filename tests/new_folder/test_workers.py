"""One merge by several processes, in one folder: they die, stop, and run twice; the output is that of one process."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import die, end_of, forked
from small_models import triple

import ires_kernels as ik
from ires_kernels import cli
from ires_kernels.files import new_file, new_folder, unfinished
from ires_kernels.files.ownership import StoreError
from ires_kernels.records.report import Report
from ires_kernels.records.workers import WorkerReport

SHARDS = (5, 1)
"""More files than workers, and one that all of them have to share."""


class Merge:
    """A merge of three small models, by one process and by several."""

    def __init__(self, folder: Path, shards: int) -> None:
        self.shards = shards
        self.base, self.instruct, self.target = triple(folder, shards=shards, files={"tokenizer.json": "{}"})
        self.out, self.partial, self.one = folder / "out", folder / "out.partial", folder / "one"
        self.inputs = {path.name for path in folder.iterdir()}
        self.folder = folder

    def work(self, rank: int, world: int, **more: Any) -> Report | WorkerReport:
        options = {"alpha": 0.3, "threads": 1, "rounding": "stochastic"} | more
        report = ik.apply(self.target, (self.instruct, self.base), out=self.out, workers=(rank, world), **options)
        assert isinstance(report, Report | WorkerReport)
        return report

    def check(self) -> None:
        """The output is what one process makes, and nothing is left beside it."""
        pair = (self.instruct, self.base)
        ik.apply(self.target, pair, out=self.one, alpha=0.3, rounding="stochastic", threads=2)
        made, wanted = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (self.out, self.one))
        assert made.keys() == wanted.keys()
        assert [name for name in made if made[name] != wanted[name]] == []
        modes, known = ({path.name: path.stat().st_mode for path in each.iterdir()} for each in (self.out, self.one))
        assert (modes, self.out.stat().st_mode) == (known, self.one.stat().st_mode)
        assert {path.name for path in self.folder.iterdir()} == self.inputs | {"out", "one"}


@pytest.fixture(params=SHARDS)
def merge(request: pytest.FixtureRequest, tmp_path: Path) -> Merge:
    return Merge(tmp_path, request.param)


@pytest.mark.parametrize("world", [1, 3, 9])
def test_workers_one_after_the_other(merge: Merge, world: int) -> None:
    ranks = random.Random(world).sample(range(world), world)
    reports = [merge.work(rank, world) for rank in ranks]
    *others, last = reports
    assert isinstance(last, Report)
    for rank, report in zip(ranks, others, strict=False):
        assert isinstance(report, WorkerReport)
        assert (report.rank, report.world, report.files + len(report.missing)) == (rank, world, merge.shards)
    merge.check()
    assert ik.verify(merge.out)


def test_an_extract_by_workers(tmp_path: Path) -> None:
    base, instruct, _ = triple(tmp_path, shards=2)
    for rank in range(3):
        ik.extract(base, instruct, tmp_path / "out", workers=(rank, 3))
    ik.extract(base, instruct, tmp_path / "one")
    made, wanted = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "one"))
    assert made == wanted


def test_workers_at_the_same_time(merge: Merge) -> None:
    children = [forked(lambda rank=rank: merge.work(rank, 4)) for rank in range(4)]  # type: ignore[misc]
    assert [end_of(child) for child in children] == [0] * 4
    merge.check()


def in_the_middle(deed: Callable[[], object]) -> Callable[[], None]:
    """A patch after which the second write of a process is preceded by `deed`."""
    write, writes = new_file.NewFile.write, [0]

    def patched(self: Any, *arguments: Any) -> None:
        writes[0] += 1
        if writes[0] == 2:
            deed()
        write(self, *arguments)

    return lambda: setattr(new_file.NewFile, "write", patched)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def started(merge: Merge, rank: int, world: int, patch: Callable[[], None]) -> int:
    """A worker in a process of its own, with a patch."""

    def work() -> None:
        patch()
        merge.work(rank, world)

    return forked(work)


def test_a_worker_is_killed_and_started_again(merge: Merge) -> None:
    assert end_of(started(merge, 0, 2, in_the_middle(die))) == -signal.SIGKILL
    assert ik.status(merge.out).state == "unfinished"
    merge.work(1, 2)
    with pytest.raises(StoreError, match=r"cannot be finished: \d of \d files are not complete"):
        ik.finish(merge.out)
    merge.work(0, 2)
    merge.check()


def test_the_same_rank_twice_at_once(merge: Merge) -> None:
    """One of the two stops in the middle of a file, and goes on when the other one has finished the folder."""
    child = started(merge, 0, 1, in_the_middle(stop))
    os.waitpid(child, os.WUNTRACED)
    found = ik.status(merge.out)
    assert found.state == "running"
    assert f"process {child} (" in found.what
    with pytest.raises(StoreError, match="another process is writing it"):
        ik.rollback(merge.out)
    assert isinstance(merge.work(0, 1), Report)
    inodes = {path.name: path.stat().st_ino for path in merge.out.iterdir()}
    os.kill(child, signal.SIGCONT)
    assert end_of(child) == 0
    assert {path.name: path.stat().st_ino for path in merge.out.iterdir()} == inodes
    merge.check()


@pytest.mark.parametrize(("rank", "other"), [(rank, other) for rank in range(3) for other in range(3) if rank != other])
def test_the_same_rank_twice_at_once_of_shared_files(tmp_path: Path, rank: int, other: int) -> None:
    """A file of which it writes a range is completed by others, and the folder is not: it goes on with the rest."""
    merge = Merge(tmp_path, 5)
    child = started(merge, rank, 3, in_the_middle(stop))
    os.waitpid(child, os.WUNTRACED)
    merge.work(other, 3)
    merge.work(rank, 3)
    assert not merge.out.exists()
    os.kill(child, signal.SIGCONT)
    assert end_of(child) == 0
    merge.work(3 - rank - other, 3)
    merge.check()


def test_two_of_a_rank_that_end_together(merge: Merge) -> None:
    """Whoever is last to rename has the file, and each of them has a record."""
    children = [forked(lambda: merge.work(0, 2)) for _ in range(3)]
    assert [end_of(child) for child in children] == [0] * 3
    merge.work(1, 2)
    merge.check()


def test_who_finishes_dies(merge: Merge) -> None:
    merge.work(1, 2)
    for step in ("commit", "add"):
        child = started(merge, 0, 2, lambda step=step: setattr(new_folder.NewFolder, step, lambda *_: die()))  # type: ignore[misc]
        assert end_of(child) == -signal.SIGKILL
        assert not merge.out.exists()
        assert any("`ires finish" in line for line in ik.status(merge.out).next)
    report = ik.finish(merge.out)
    assert report.bytes_written == 0
    merge.check()
    assert "finished before" in f"{ik.finish(merge.out)}"
    with pytest.raises(StoreError, match="nothing is unfinished there"):
        ik.finish(merge.target)


def test_workers_and_one_process_go_on_with_each_other(merge: Merge) -> None:
    merge.work(1, 3)
    done = {path.name: path.stat().st_ino for path in merge.partial.glob("*.safetensors")}
    child = forked(lambda: (in_the_middle(die)(), ik.resume(merge.out, threads=1)))
    assert end_of(child) == -signal.SIGKILL
    for rank in range(2):
        merge.work(rank, 2)
    assert {name: (merge.out / name).stat().st_ino for name in done} == done
    merge.check()


def test_one_process_finishes_what_workers_have_begun(merge: Merge) -> None:
    merge.work(0, 3)
    ik.resume(merge.out)
    merge.check()


def test_another_number_of_workers_goes_on(merge: Merge) -> None:
    merge.work(2, 7)
    assert end_of(started(merge, 1, 3, in_the_middle(die))) in (0, -signal.SIGKILL)
    for rank in range(2):
        merge.work(rank, 2)
    merge.check()


def test_a_folder_of_something_else_is_refused(merge: Merge) -> None:
    merge.work(0, 2)
    before = sorted(merge.partial.iterdir())
    with pytest.raises(StoreError, match=r"holds the files of another operation.*ires rollback"):
        merge.work(1, 2, alpha=0.4)
    with pytest.raises(StoreError, match="was begun without --sha256"):
        merge.work(1, 2, sha256=True)
    shard = min(merge.instruct.glob("*.safetensors"))
    time_before, content = shard.stat().st_mtime_ns, shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(shard, ns=(time_before, time_before))
    with pytest.raises(StoreError, match="is not the file of the instruct that other workers have"):
        merge.work(1, 2)
    shard.write_bytes(content)
    os.utime(shard, ns=(time_before, time_before))
    assert sorted(merge.partial.iterdir()) == before
    merge.work(1, 2)
    merge.check()


def test_two_operations_that_begin_at_once(merge: Merge) -> None:
    def work(alpha: float) -> None:
        try:
            merge.work(0, 2, alpha=alpha)
        except StoreError:
            os._exit(2)

    children = [forked(lambda alpha=alpha: work(alpha)) for alpha in (0.3, 0.5)]  # type: ignore[misc]
    assert sorted(map(end_of, children)) == [0, 2]


def test_inputs_that_change_on_the_way_are_in_no_record(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = min(merge.instruct.glob("*.safetensors"))
    time_before = shard.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(new_file.NewFile, "write", new_file.NewFile.write)
        in_the_middle(lambda: os.utime(shard))()
        with pytest.raises(ValueError, match="changed while it was read"):
            merge.work(0, 1)
    assert not list(merge.folder.glob("out/*"))
    os.utime(shard, ns=(time_before, time_before))
    merge.work(0, 1)
    merge.check()


def test_a_worker_that_is_refused_leaves_nothing(merge: Merge) -> None:
    with pytest.raises(ValueError, match="no tensor would be merged"):
        merge.work(0, 2, skip=".")
    assert {path.name for path in merge.folder.iterdir()} == merge.inputs


def test_a_worker_that_fails_leaves_nothing_of_a_folder_that_it_began(
    merge: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(new_file.NewFile, "write", failing)
        with pytest.raises(OSError, match="Input/output error"):
            merge.work(0, 1)
    assert {path.name for path in merge.folder.iterdir()} == merge.inputs


def test_without_links_and_without_locks(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", link)
    for rank in range(3):
        merge.work(rank, 3, lock=False)
    merge.check()


def test_bytes_at_the_ends_of_ranges_are_read_again(tmp_path: Path) -> None:
    """As on NFS two machines may write to one page: what one of them undoes is found, and made again."""
    merge = Merge(tmp_path, 1)
    merge.work(0, 2)
    (temporary,) = merge.partial.glob(".ires-model.safetensors.tmp")
    part = next(path.name for path in merge.partial.glob("*.part"))
    place = int(part.removesuffix(".part").split("-")[-2])
    with open(temporary, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(OSError, match=r"are not those that were written"):
        merge.work(1, 2)
    merge.work(0, 2)
    merge.work(1, 2)
    merge.check()


def test_what_is_torn_or_not_ours_is_no_record(merge: Merge) -> None:
    merge.work(0, 2)
    records = [path for path in merge.partial.iterdir() if path.suffix in (".done", ".part")]
    assert records
    for path in records:
        path.write_bytes(path.read_bytes()[:-1])
    merge.work(1, 2)
    with pytest.raises(StoreError, match="are not complete"):
        ik.finish(merge.out)
    merge.work(0, 2)
    merge.check()


def test_status_tells_of_each_worker(merge: Merge) -> None:
    merge.work(1, 3)
    found = ik.status(merge.out)
    assert found.state == "unfinished"
    assert found.headway is not None
    assert found.headway.files_in_all == merge.shards
    assert 0 < found.headway.bytes_done < found.headway.bytes_in_all
    assert "rank 1 of 3: " in found.details[-1]
    assert f"process {os.getpid()}" in found.details[-1]
    (merge.partial / ".ires-working-2-of-3").write_text('{"done": "x"}')
    (merge.partial / ".ires-working-\x1b").write_text("[]")
    assert len(ik.status(merge.out).details) == len(found.details)
    assert unfinished.notes(merge.out) == {}, "which is not there yet"


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    merge = Merge(tmp_path, 1)

    def ires(*arguments: object, **environment: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            code = cli.main([f"{argument}" for argument in arguments])
        return code, *capsys.readouterr()

    pair = ["--instruct", merge.instruct, "--base", merge.base, "--alpha", 0.3, "--rounding", "stochastic"]
    command = ["apply", merge.target, *pair, "-o", merge.out]
    code, out, err = ires(*command, "--workers", "env", RANK="1", WORLD_SIZE="2")
    assert (code, err) == (0, "")
    assert "rank 1 of 2: its share is done" in out
    assert "0 of 1 files" in out
    code, _, err = ires("finish", merge.out)
    assert code == 2
    assert "Start the workers again that have not ended well" in err
    code, out, _ = ires(*command, "--rank", 0, "--world", 2, "--json", RANK="7", WORLD_SIZE="2")
    assert (code, json.loads(out)["operation"]) == (0, "apply")
    merge.check()
    assert ires("finish", merge.out)[0] == 0
    for wrong in (["--rank", 1], ["--world", 2]):
        assert "--rank and --world go together" in ires(*command, *wrong)[2]
    code, _, err = ires(*command, "--workers", "env", RANK="", WORLD_SIZE="2")
    assert (code, "RANK is '' in the environment" in err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_workers_die_at_any_time(merge: Merge, seed: int) -> None:
    """Ranks are started, twice as well, and killed, whatever they are doing, until one of them has finished it."""
    chance, world = random.Random(seed), 3

    def work(rank: int) -> None:
        slow = chance.random() / 20
        in_the_middle(lambda: time.sleep(slow))()
        merge.work(rank, world)

    for _ in range(200):
        children = [forked(lambda rank=rank: work(rank)) for rank in chance.choices(range(world), k=3)]  # type: ignore[misc]
        for child in children:
            time.sleep(chance.random() / 8)
            if chance.random() < 0.6:
                os.kill(child, signal.SIGKILL)
        ends = [end_of(child) for child in children]
        assert set(ends) <= {0, -signal.SIGKILL}
        if merge.out.exists():
            break
    ik.finish(merge.out)  # as the last one may have been killed as it removed what nobody needs any more
    merge.check()


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    merge = Merge(tmp_path, 1)
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--no-python"]
    command = [sys.executable, "-m", "ires_kernels", "apply", merge.target, "--instruct", merge.instruct, "--base"]
    command += [merge.base, "-o", merge.out, "--alpha", "0.3", "--rounding", "stochastic", "--workers", "env"]
    subprocess.run([*program, *map(str, command)], check=True, capture_output=True)
    merge.check()
