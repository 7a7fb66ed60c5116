"""What is predicted of many machines, and processes behind links that are held against it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from ires_kernels.bench import __main__ as bench
from ires_kernels.bench import nodes, scale
from ires_kernels.bench.result import Result
from ires_kernels.bench.scale import Cluster, Costs, Work, predicted
from ires_kernels.bench.synthetic import write_triple

EVEN = Work("even", {f"{file}": {f"{file}.{i}": 1 << 20 for i in range(64)} for file in range(16)})
FREE = Costs(start=0.0, planning=0.0, finishing=0.0, node=math.inf)
WIDE = Cluster(math.inf, math.inf, math.inf, math.inf, FREE)


@pytest.mark.parametrize("world", [1, 2, 8, 64])
def test_the_largest_share(world: int) -> None:
    assert EVEN.largest(world) == 1 / world


def test_a_tensor_that_is_too_large_is_the_largest_share() -> None:
    assert Work("one", {"a": {"large": 60, "small": 4}, "b": {"other": 36}}).largest(50) == 0.6


@pytest.mark.parametrize(
    ("cluster", "limit", "seconds"),
    [
        (replace(WIDE, into=1e6), "link of a node", EVEN.read / 8 / 1e6),
        (replace(WIDE, out=1e5), "link of a node", EVEN.written / 8 / 1e5),
        (replace(WIDE, source=2e6), "source", EVEN.read / 2e6),
        (replace(WIDE, shared=1e6), "file system", EVEN.written / 1e6),
        (replace(WIDE, shared=1e6, is_far=False), "file system", (EVEN.read + EVEN.written) / 1e6),
        (replace(WIDE, costs=replace(FREE, node=1e6)), "node", (EVEN.read + EVEN.written) / 8 / 1e6),
        (
            replace(WIDE, costs=replace(FREE, start=2.0, planning=1e-3, finishing=2e-3)),
            "start and end",
            2.0 + 3 * 1.024,
        ),
        (replace(WIDE, into=1e6, latency=0.1), "link of a node", EVEN.read / 8 / 1e6 + 32),
    ],
)
def test_the_slowest_link_is_the_limit(cluster: Cluster, limit: str, seconds: float) -> None:
    found = predicted(EVEN, 8, cluster)
    assert found.limit == limit
    assert found.seconds == pytest.approx(seconds)


def test_efficiency() -> None:
    assert scale.efficiency(EVEN, 16, replace(WIDE, into=1e6)) == pytest.approx(1)
    assert scale.efficiency(EVEN, 16, replace(WIDE, source=1e6)) == pytest.approx(1 / 16)


def test_the_models_of_the_tables() -> None:
    sizes = {work.name: work.written for work in scale.works()}
    assert sizes["8B"] == 2 * 8_030_261_248
    assert sizes["70B"] == 2 * 70_553_706_496
    assert sizes["405B"] == pytest.approx(2 * 405.85e9, rel=1e-4)
    assert sizes["1T, 384 experts"] == pytest.approx(2e12, rel=0.05)
    assert all(max(works) <= 1.1 for works in ([64 * work.largest(64)] for work in scale.works()[1:]))


def test_processes_behind_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each gets through its link no more than its rate, and its share alone; the output is that of one process."""
    times = {name: [1.0] for name in (nodes.ONE, nodes.ALONE, nodes.TWO)}
    local = Result("merges", {}, times, dict.fromkeys(times, 1 << 30), by="time", yardsticks=(nodes.ONE,))
    monkeypatch.setattr(nodes, "locally", lambda *_: local)
    monkeypatch.setattr(nodes, "costs", lambda *_: replace(FREE, node=1e9))
    monkeypatch.setattr(nodes, "LAYERS", 1)
    monkeypatch.setattr(nodes, "LINK", 30e6)
    monkeypatch.setattr(nodes, "SHORT", (2, 1))
    path = tmp_path / "s.json"
    asked = ["scale", "--nodes", "1,2", "--size", "300K", "--rounds", "1", "--dir", f"{tmp_path}", "--json", f"{path}"]
    assert bench.main(asked) == 0
    record = json.loads(path.read_text())
    assert set(record["workers"][0]["contenders"]) == set(times)
    one, two, short = record["scale"]["simulated"]
    assert [one["limit"], two["limit"], short["limit"]] == ["link of a node", "link of a node", "source"]
    for run in (one, two, short):
        assert len(run["read"]) == run["nodes"]
        weights = sum(run["read"]) - sum(run["planning"])
        assert weights == pytest.approx(run["weights"], rel=0.01)
        assert max(run["planning"]) < 0.1 * run["weights"] / run["nodes"]
        assert run["seconds"] > 0.9 * run["predicted"]
        assert run["off"] == run["seconds"] / run["predicted"] - 1
    assert one["efficiency"] == 1
    printed = capsys.readouterr().out
    assert "2 workers behind links write the bytes of one process" in printed
    assert scale.table(scale.STORE).splitlines()[2] in printed
    assert not list(tmp_path.glob("ires-bench-*"))


@pytest.mark.slow
def test_what_workers_cost_here(tmp_path: Path) -> None:
    triple = write_triple(tmp_path / "models", "20MB")
    local = nodes.locally(triple, tmp_path, 1)
    assert set(local.times) == {nodes.ONE, nodes.ALONE, nodes.TWO}
    known = nodes.costs(tmp_path, 1, local)
    assert 0 < known.planning < 0.1
    assert 0 <= known.finishing < 0.1
    assert known.start > 0
    assert known.node > 1e5
