"""One merge by the machines of a Ray cluster: they die, and stop; the output is that of one process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_models import triple

import ires_kernels as ik
from ires_kernels.files import trust
from ires_kernels.files.unfinished import notes
from ires_kernels.merging.planned import planned_again
from ires_kernels.new_folder import on_ray
from ires_kernels.new_folder.on_ray import Failure, Task, write_item
from ires_kernels.new_folder.workers import Joined
from ires_kernels.planning import workers
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.planning.workers import Cluster
from ires_kernels.records.report import Report
from ires_kernels.records.workers import Noted
from ires_kernels.streaming.options import Options

PAIRS = [6, 1]
"""Shards."""


class Merge:
    """A merge of three small models, and what one process makes of it."""

    def __init__(self, folder: Path, shards: int) -> None:
        self.base, self.instruct, self.target = triple(folder, shards=shards, files={"tokenizer.json": "{}"})
        self.out, self.partial, self.one = folder / "out", folder / "out.partial", folder / "one"
        ik.apply(self.target, (self.instruct, self.base), out=self.one, alpha=0.3)
        self.folder, self.names = folder, {path.name for path in folder.iterdir()}

    @property
    def plan(self) -> Plan:
        plan = ik.apply(self.target, (self.instruct, self.base), out=self.out, alpha=0.3, dry_run=True)
        assert isinstance(plan, Plan)
        return plan

    def on(self, cluster: Any, carry_out: Callable[[Task], object], progress: Any = None) -> Report:
        options = Options.of("cpu", 1, progress)
        return on_ray.write_on_ray(
            self.plan, self.out, options, Cluster(cluster.address, "cpu"), carry_out, sha256=False
        )

    def check(self) -> None:
        made, wanted = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (self.out, self.one))
        assert made.keys() == wanted.keys()
        assert [name for name in made if made[name] != wanted[name]] == []
        assert {path.name for path in self.folder.iterdir()} == self.names | {"out"}


@pytest.fixture(params=PAIRS)
def merge(request: pytest.FixtureRequest, tmp_path: Path) -> Merge:
    return Merge(tmp_path, request.param)


def test_without_ray_it_says_what_to_install(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ArgumentError, match=r"pip install 'ires_kernels\[ray\]'"):
        ik.apply(merge.target, (merge.instruct, merge.base), out=merge.out, workers="ray")
    assert {path.name for path in merge.folder.iterdir()} == merge.names
    assert workers.asked("ray:10.0.0.1:6379", "cuda:1") == Cluster("10.0.0.1:6379", "cuda")


def test_a_task_plans_again_and_writes_its_item(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "_joined", {})
    joined = Joined.of(merge.plan, merge.out, Options.of("cpu", 1, None), sha256=False)
    with joined.folder() as folder:
        tasks = on_ray._tasks(joined, folder, workers.items(joined.plan, 4), "cpu", 1)
        assert len(tasks) >= 4
        first, *others = tasks
        for task in (first, first, *others):
            found = write_item(task, planned_again)
            assert not isinstance(found, Failure)
    ik.finish(merge.out)
    merge.check()
    assert write_item(first, planned_again) == (0, 0)


def test_what_goes_wrong_in_a_task_is_told_here(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "_joined", {})
    task = Task(f"{merge.out}", "", ("model.safetensors", 0, 1), "item-0", "cpu", 1, True, "")
    ik.apply(merge.target, (merge.instruct, merge.base), out=merge.out, workers=(0, 3))
    min(merge.instruct.glob("*.safetensors")).touch()
    found = write_item(task, planned_again)
    assert isinstance(found, Failure)
    with pytest.raises(ValueError, match="its inputs are not what they were"):
        on_ray._raise(found)
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left: '/x'"):
        on_ray._raise(Failure("OSError", ("No space left",), 28, "/x"))


# What follows starts clusters of several machines on this one.


def slowly(task: Task) -> object:
    """Write an item with a pause before each write; it is sent to the machines as it stands here."""
    import time

    from ires_kernels.files import new_file
    from ires_kernels.merging.planned import planned_again
    from ires_kernels.new_folder import on_ray
    from ires_kernels.new_folder import workers as working

    working._SECONDS = 0.1
    if not hasattr(new_file, "quick"):
        new_file.quick = new_file.NewFile.write  # type: ignore[attr-defined]

    def write(self: Any, *arguments: Any) -> None:
        time.sleep(0.4)
        new_file.quick(self, *arguments)  # type: ignore[attr-defined]

    new_file.NewFile.write = write  # type: ignore[method-assign]
    return on_ray.write_item(task, planned_again)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ires_kernels[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    quick["health_check_timeout_ms"] = 1000
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
    )
    yield made
    made.shutdown()


def meanwhile(merge: Merge, deed: Callable[[list[Noted]], bool]) -> threading.Thread:
    """Do something as soon as tasks have noted how far they are, and it is done."""

    def look() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            found = [Noted.of(raw) for raw in notes(merge.partial).values()] if merge.partial.exists() else []
            if deed([each for each in found if each and each.done < each.todo]):
                return
            time.sleep(0.05)

    thread = threading.Thread(target=look)
    thread.start()
    return thread


@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("merge", [6], indirect=True)
def test_a_merge_by_a_cluster_of_one(merge: Merge, cluster: Any) -> None:
    report = ik.apply(
        merge.target, (merge.instruct, merge.base), out=merge.out, alpha=0.3, workers=f"ray:{cluster.address}"
    )
    assert isinstance(report, Report)
    assert report.tensors == 7
    merge.check()


ray_tests = [pytest.mark.slow, pytest.mark.filterwarnings("default"), pytest.mark.xdist_group("ray")]


def marked(test: Any) -> Any:
    for mark in ray_tests:
        test = mark(test)
    return test


@marked
@pytest.mark.parametrize("merge", [6], indirect=True)
def test_a_machine_is_killed(merge: Merge, cluster: Any) -> None:
    node, other = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)

    def kill(found: list[Noted]) -> bool:
        if len(found) == 3:
            cluster.remove_node(node, allow_graceful=False)
        return len(found) == 3

    thread = meanwhile(merge, kill)
    report = merge.on(cluster, slowly)
    thread.join()
    assert report.tensors == 7
    merge.check()
    cluster.remove_node(other, allow_graceful=False)


@marked
@pytest.mark.parametrize("merge", [1], indirect=True)
def test_a_machine_is_stopped(merge: Merge, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did is begun again, and it goes on when all is finished."""
    monkeypatch.setattr(on_ray, "_SILENT", 15.0)
    node = cluster.add_node(num_cpus=1)
    raylet = node.all_processes["raylet"][0].process.pid
    stopped: list[int] = []

    def stop(found: list[Noted]) -> bool:
        mine = [each.process for each in found if parent(each.process) == raylet]
        if mine:
            stopped.extend([raylet, *mine])
            for process in stopped:
                os.kill(process, signal.SIGSTOP)
        return bool(mine)

    thread = meanwhile(merge, stop)
    merge.on(cluster, slowly)
    thread.join()
    assert stopped
    merge.check()
    inodes = {path.name: path.stat().st_ino for path in merge.out.iterdir()}
    for process in stopped:
        os.kill(process, signal.SIGCONT)
    time.sleep(3)
    assert {path.name: path.stat().st_ino for path in merge.out.iterdir()} == inodes
    merge.check()
    cluster.remove_node(node, allow_graceful=False)


@marked
@pytest.mark.parametrize("merge", [6], indirect=True)
def test_a_process_is_stopped_and_its_item_is_given_out_once_more(
    merge: Merge, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "_SILENT", 3.0)
    node = cluster.add_node(num_cpus=1)
    stopped: list[int] = []

    def stop(found: list[Noted]) -> bool:
        if found:
            stopped.append(found[0].process)
            os.kill(found[0].process, signal.SIGSTOP)
        return bool(found)

    thread = meanwhile(merge, stop)
    merge.on(cluster, slowly)
    thread.join()
    merge.check()
    cluster.remove_node(node, allow_graceful=False)


@marked
@pytest.mark.parametrize("merge", [6], indirect=True)
def test_it_is_interrupted_and_goes_on(merge: Merge, cluster: Any) -> None:
    def interrupt(done: int, todo: int) -> None:
        if todo < 2 * done < 2 * todo:
            os.kill(os.getpid(), signal.SIGINT)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        merge.on(cluster, slowly, interrupt)
    assert ik.status(merge.out).state == "unfinished"
    left = [path.name for path in merge.folder.glob("out.partial/*.tmp")]
    assert left == [name for name in left if name.endswith(".safetensors.tmp")], "which all of them share"
    told: list[int] = []
    merge.on(cluster, slowly, lambda done, todo: told.append(100 * done // todo))
    assert told == sorted(told)
    assert told[-1] == 100
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    merge.check()


@marked
@pytest.mark.parametrize("merge", [6], indirect=True)
def test_the_command_line_on_ray(merge: Merge, cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ires_kernels import cli

    monkeypatch.setenv(trust.VARIABLE, f"{tmp_path}/../key-{tmp_path.name}")
    pair = ["--instruct", f"{merge.instruct}", "--base", f"{merge.base}", "--alpha", "0.3", "-o", f"{merge.out}"]
    assert cli.main(["apply", f"{merge.target}", *pair, "--engine", "ray", "--address", cluster.address]) == 0
    made, wanted = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (merge.out, merge.one))
    assert [name for name in made if made[name] != wanted[name]] == ["ires.json"], "which another key has signed"
    command = ["apply", f"{merge.target}", *pair[:-1], f"{tmp_path}/other", "--engine", "ray"]
    assert cli.main([*command, "--address", "127.0.0.1:1"]) == 3
    assert cli.main([*command, "--address", cluster.address, "--device", "cuda"]) == 2
    assert cli.main([*command, "--rank", "0", "--world", "2"]) == 2


def parent(process: int) -> int:
    with open(f"/proc/{process}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])
