"""Tensors of one merge on several devices: where they are to be, and stand-ins that compute at the same time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from selection import tiles
from small_models import same, triple
from torch import Tensor

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.live import placing
from ires_kernels.live.placing import places
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.planning.steps import Output
from ires_kernels.streaming import device
from ires_kernels.streaming.ring import Ring

COUNT = 3


class Queue:
    """One of a device, whose work is done by the thread that asks for it, and noted there."""

    def __init__(self, done: Callable[[], None]) -> None:
        self.done = done

    def call(self, work: Callable[[int, int], Any]) -> Any:
        return work(0, 0)

    def submit(self, work: Callable[[], None]) -> None:
        self.done()
        work()

    def wait(self) -> None:
        """All is done."""


class StandIn:
    """A GPU with a ring of its own."""

    native = False
    device = torch.device("cpu")

    def __init__(self, done: Callable[[], None]) -> None:
        self.done = done
        self.ring = Ring(self.pinned, lambda _: None, piece=2048, pieces=2)

    def queue(self) -> Queue:
        return Queue(self.done)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def settle(self) -> None:
        """Nothing was queued."""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], None]]]:
    """So many of them; what each does with each tile can be changed."""
    does: list[Callable[[], None]] = [lambda: None] * COUNT
    made = [StandIn(lambda number=number: does[number]()) for number in range(COUNT)]  # type: ignore[misc]
    given = cycle(made)
    monkeypatch.setattr(placing, "all_gpus", lambda: (torch.device("cpu"),) * COUNT)
    monkeypatch.setattr(device, "processors", lambda _: partial(device.on_gpu, next(given)))
    with tiles(elements=80, on_gpu=64, copied=96):
        yield does


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    assert [name for name, tensor in wanted.items() if not same(found[name], tensor)] == []


@pytest.mark.parametrize("threads", [None, 1, 7])
def test_all_compute_at_the_same_time(tmp_path: Path, gpus: list[Callable[[], None]], threads: int | None) -> None:
    base, instruct, target = triple(tmp_path)
    rules: dict[str, Any] = {"alpha": 0.7, "rounding": "stochastic", "seed": 3}
    wanted = ik.load(target, (instruct, base), **rules)
    met = threading.Barrier(COUNT)
    first = threading.local()
    seen: list[set[str]] = [set() for _ in range(COUNT)]

    def meet(number: int) -> None:
        seen[number].add(threading.current_thread().name)
        if len(seen[number]) == 1 and not getattr(first, "met", False):
            first.met = True
            met.wait(20)  # nobody goes on before each has begun

    for number in range(COUNT):
        gpus[number] = partial(meet, number)
    told: list[tuple[int, int]] = []
    found = ik.load(
        target, (instruct, base), device="cuda:all", threads=threads, progress=lambda *each: told.append(each), **rules
    )
    assert_same(found, wanted)
    assert all(seen)
    assert told[-1][0] == told[-1][1] > 0


@pytest.mark.usefixtures("gpus")
def test_a_residual_is_checked_on_all(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    ik.extract(base, instruct, tmp_path / "residual")
    assert len(ik.load(target, tmp_path / "residual", device="cuda:all")) == 7
    with open(tmp_path / "residual/residual.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"abc")
    with pytest.raises(CheckpointError, match="is damaged"):
        ik.load(target, tmp_path / "residual", device="cuda:all")


def test_the_first_error_ends_all(tmp_path: Path, gpus: list[Callable[[], None]]) -> None:
    base, instruct, target = triple(tmp_path)

    def fail() -> None:
        raise RuntimeError("no memory left")

    gpus[1] = fail
    with pytest.raises(RuntimeError, match="no memory left"):
        ik.load(target, (instruct, base), device="cuda:all")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("ires-", "device-"))]


@pytest.mark.usefixtures("gpus")
def test_an_interrupt_ends_all(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ik.load(target, (instruct, base), device="cuda:all", progress=lambda *_: signal.raise_signal(signal.SIGINT))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("ires-", "device-"))]


def outputs(*sizes: int) -> list[tuple[Output, int]]:
    return [(Output(f"layers.{number}.weight", "F32", (size // 4,)), size) for number, size in enumerate(sizes)]


def test_tensors_that_follow_each_other_are_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "all_gpus", lambda: (torch.device("cpu"),) * COUNT)
    found = places("cuda:all", outputs(*[40] * 9))
    assert [*found.by_name.values()] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    sizes = [400, 4, 4, 4, 120, 120, 120, 4, 0, 400]
    numbers = [*places("cuda:all", outputs(*sizes)).by_name.values()]
    assert numbers == sorted(numbers)
    loads = [sum(s for s, n in zip(sizes, numbers, strict=True) if n == number) for number in range(COUNT)]
    assert max(loads) - min(loads) <= max(sizes)
    assert set(places("cuda:all", outputs(0, 0)).by_name.values()) == {0}


def test_the_longest_beginning_of_a_name_counts() -> None:
    cpu = torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "resolve", lambda name: torch.device(name))
        wanted = {"layers.1": 0, "layers.1.weight": "cuda:1", "": "cpu", "layers.10": torch.device("cuda", 2)}
        found = places(wanted, outputs(*[4] * 12))
    where = {name: found.devices[number] for name, number in found.by_name.items()}
    assert where.pop("layers.1.weight") == torch.device("cuda", 1)
    assert where.pop("layers.10.weight") == torch.device("cuda", 2)
    assert set(where.values()) == {cpu}
    with pytest.raises(ArgumentError, match=r"no place for 'layers\.0\.weight'"):
        places({"layers.1": "cpu"}, outputs(4, 4))


def test_without_gpus_it_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    base, instruct, target = triple(tmp_path)
    with pytest.raises(ArgumentError, match="torch sees no CUDA device"):
        ik.load(target, (instruct, base), device="cuda:all")
    assert len(ik.load(target, (instruct, base), device={"": "cpu"})) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_the_gpus_that_there_are(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    rules: dict[str, Any] = {"alpha": 0.7, "rounding": "stochastic", "seed": 3}
    wanted = ik.load(target, (instruct, base), **rules)
    found = ik.load(target, (instruct, base), device="cuda:all", **rules)
    assert {tensor.device.index for tensor in found.values()} <= {*range(torch.cuda.device_count())}
    assert_same({name: tensor.cpu() for name, tensor in found.items()}, wanted)
    other = ik.load(
        target, (instruct, base), device={"model.layers": torch.cuda.device_count() - 1, "": "cpu"}, **rules
    )
    assert_same({name: tensor.cpu() for name, tensor in other.items()}, wanted)
    assert other["lm_head.weight"].device.type == "cpu"
