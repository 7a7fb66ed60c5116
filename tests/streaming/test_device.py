"""Merges through a device: all but the calls of torch.cuda, on stand-ins for its streams, and those where a GPU is."""

from __future__ import annotations

import doctest
import errno
import json
import os
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from threading import current_thread
from typing import Any

import made_of_parts
import pytest
import torch
from quantized_models import FORMATS
from selection import tiles
from small_models import Tensors, normal, read_model, snapshot, triple, write_model
from torch import Tensor

import ires_kernels as ik
from ires_kernels.backends import decoding, native
from ires_kernels.checkpoints import sources
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.cli import main
from ires_kernels.in_place.cuts import SIZES
from ires_kernels.planning import deeds
from ires_kernels.planning.box import Box
from ires_kernels.planning.boxes import within
from ires_kernels.planning.findings import Findings
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.steps import Operand, Output, Step
from ires_kernels.records.report import Report
from ires_kernels.streaming import device, statedict, stream
from ires_kernels.streaming.failures import ComputeError
from ires_kernels.streaming.ring import PIECE, PIECES, Ring
from ires_kernels.streaming.tiles import TILES

Work = Callable[[], None]
needs_native = pytest.mark.skipif(not native.status("cpu").available, reason="the extension is not there")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Late:
    """A queue as slow as can be: it does nothing before somebody waits for it."""

    def __init__(self, log: list[tuple[str, int]]) -> None:
        self.log = log
        self.works: list[Work] = []

    def call(self, work: Callable[[int, int], Any]) -> Any:
        return work(0, 0)

    def submit(self, work: Work) -> None:
        self.works.append(work)
        self.log.append(("submit", id(self)))

    def wait(self) -> None:
        self.log.append(("wait", id(self)))
        while self.works:
            self.works.pop(0)()


class Beside:
    def call(self, work: Callable[[int, int], Any]) -> Any:
        return work(0, 0)

    """A queue that works in a thread of its own, with pauses that make every order happen."""

    def __init__(self, _: object) -> None:
        self.works: queue.SimpleQueue[Work | threading.Event] = queue.SimpleQueue()
        self.error: RuntimeError | None = None
        self.random = random.Random(7)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            work = self.works.get()
            if isinstance(work, threading.Event):
                work.set()
                continue
            if self.random.random() < 0.3:
                time.sleep(self.random.random() * 2e-3)
            try:
                work()
            except RuntimeError as error:
                self.error = self.error or error

    def submit(self, work: Work) -> None:
        self.works.put(work)

    def wait(self) -> None:
        done = threading.Event()
        self.works.put(done)
        done.wait()
        if self.error is not None:
            raise self.error


class Host:
    """A queue that is done with everything at once, and that the native backend can work in."""

    def __init__(self, log: list[tuple[str, int]]) -> None:
        self.log = log

    def submit(self, work: Work) -> None:
        work()

    def call(self, work: Callable[[int, int], Any]) -> Any:
        try:
            return work(native.HOST, 0)
        finally:
            if isinstance(work, partial):  # a load, and not pinning
                self.log.append(("submit", id(self)))

    def wait(self) -> None:
        self.log.append(("wait", id(self)))


class StandIn:
    """A device that is the CPU. Memory comes with rubbish in it."""

    def __init__(self, kind: Callable[[Any], device.Queue], piece: int = 2048) -> None:
        self.piece = piece
        self.device = torch.device("cpu")
        self.log: list[tuple[str, int]] = []
        self.kind = kind
        self.native = kind is Host
        self.settled = 0

    def queue(self) -> device.Queue:
        return self.kind(self.log)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    @cached_property
    def ring(self) -> Ring:
        return Ring(self.pinned, lambda _: None, piece=self.piece)

    def settle(self) -> None:
        self.settled += 1


@pytest.fixture
def small_tiles() -> Iterator[None]:
    with tiles(elements=80, on_gpu=64, copied=96):
        yield


@contextmanager
def through(runtime: device.Runtime) -> Iterator[None]:
    """Compute on a stand-in, not on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "processors", lambda _: partial(device.on_gpu, runtime))
        yield


def models(folder: Path, *, special: bool) -> tuple[Path, Path, Path]:
    """Target, instruct and base with all float types, sizes around a window, things to keep, and special values."""
    names = list(DTYPES)
    made: list[Tensors] = [{}, {}, {}]
    for number, size in enumerate([0, 1, 15, 63, 64, 65, 128, 1000]):
        for role, model in enumerate(made):
            t = normal((size,), 10 * number + role, torch.float64, 50.0)
            if special:
                t[5 + role :: 50] = float("nan") if role else float("inf")
                t[7::50] = 1e300
            model[f"t{number}"] = t.to(DTYPES[names[(number + role) % len(names)]])
    for model in made:
        model["scalar"] = normal((), 77, torch.float32)
        model["kept.bf16"] = normal((9, 50), 78, torch.float32, 1e30).to(torch.bfloat16)
        model["ids"] = torch.arange(100)
    first, second, third = (write_model(folder / name, m) for name, m in zip("tib", made, strict=True))
    return first, second, third


def numbers(report: Any) -> dict[str, Any]:
    """What a report says of the elements; the sums, which are added in no fixed order, roughly."""
    assert isinstance(report, Report)
    table = report.numbers()
    for strength in table["strengths"]:
        for key in ("realised", "effective_alpha"):
            strength[key] = strength[key] and pytest.approx(strength[key], rel=1e-5)
    return table


CASES: dict[str, dict[str, Any]] = {
    "nearest": {"alpha": 0.7},
    "stochastic": {"alpha": 0.3, "rounding": "stochastic", "seed": 9, "alphas": [("t[1-4]", -1.5)]},
    "converted": {"alpha": 1.0, "dtype": "f16"},
    "converted at random": {"alpha": -0.2, "dtype": "bf16", "rounding": "stochastic"},
}


def everything(root: Path, out: Path, case: str, threads: int, place: str) -> tuple[dict[str, Any], Tensors]:
    """Every function on one device: all files but manifests, what these and reports tell, and tensors in memory."""
    out.mkdir()
    target, instruct, base = (root / name for name in "tib")
    options = {"skip": "kept|t5", "threads": threads, "device": place, **CASES[case]}
    several = {"alphas": [(pattern, [factor] * 2) for pattern, factor in options.get("alphas", ())]}
    rounding = {key: value for key, value in options.items() if key in ("rounding", "seed", "threads", "device")}
    reports = [
        ik.extract(base, instruct, out / "r", sync=False, **rounding),
        ik.extract(base, target, out / "r2", sync=False, dtype="bf16", **rounding),
        ik.apply(target, (instruct, base), out=out / "one", sync=False, **options),
        ik.apply(target, [out / "r", out / "r2"], out=out / "two", sync=False, **options | several),
    ]
    found: dict[str, Any] = {"reports": [numbers(report) for report in reports]}
    for folder in ("r", "r2", "one", "two"):
        assert ik.verify(out / folder, threads=threads, device=place), folder
        for path in sorted((out / folder).iterdir()):
            content: Any = path.read_bytes()
            if path.name in ("ires.json", "residual.json"):
                content = json.loads(content)["tensors"]
            found[f"{folder}/{path.name}"] = content
    state = ik.load(target, [out / "r", out / "r2"], **options | several)
    return found, state


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("queues", [Late, Beside, pytest.param(Host, marks=needs_native)])
@pytest.mark.parametrize("case", CASES)
def test_all_is_as_on_the_cpu(tmp_path: Path, case: str, queues: Callable[[Any], device.Queue], threads: int) -> None:
    models(tmp_path, special=True)
    wanted, state = everything(tmp_path, tmp_path / "cpu", case, threads, "cpu")
    runtime = StandIn(queues)
    with through(runtime):
        found, other = everything(tmp_path, tmp_path / "gpu", case, threads, "cpu")
    assert found == wanted
    assert other.keys() == state.keys()
    for name, t in state.items():
        assert torch.equal(other[name].reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8)), name
        assert torch.equal(t.reshape(-1).view(torch.uint8), read_model(tmp_path / "gpu" / "two")[name].reshape(-1)
                           .view(torch.uint8))  # fmt: skip
    assert sum(report["overflow"] for report in found["reports"]) > 0
    assert runtime.settled >= 5


@pytest.mark.usefixtures("small_tiles")
def test_what_is_compared_is_as_on_the_cpu(tmp_path: Path) -> None:
    target, instruct, base = models(tmp_path, special=True)
    options: dict[str, Any] = {"skip": "kept|t5", "compare": True, "sync": False}
    wanted = ik.apply(target, (instruct, base), out=tmp_path / "cpu", **options)
    with through(StandIn(Beside)):
        found = ik.apply(target, (instruct, base), out=tmp_path / "gpu", **options)
    assert isinstance(wanted, Report)
    assert isinstance(found, Report)
    assert wanted.fit is not None
    assert found.fit is not None
    assert found.fit.tensors.keys() == wanted.fit.tensors.keys()
    for name, fit in wanted.fit.tensors.items():
        other = found.fit.tensors[name]
        assert (other.elements, other.both, other.within) == (fit.elements, fit.both, fit.within)
        assert other.cross == pytest.approx(fit.cross)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("queues", [Late, Beside, pytest.param(Host, marks=needs_native)])
@pytest.mark.parametrize(
    ("format", "own", "known"),
    [("fp8-block", False, True), ("fp8-block", True, True), ("nvfp4", False, True), ("pack-quantized", False, False)],
)
def test_quantized_weights_are_as_on_the_cpu(
    tmp_path: Path,
    format: str,
    queues: Callable[[Any], device.Queue],
    threads: int,
    own: bool,
    known: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decoded on the device where it has a kernel, and where the target stays quantized computed by the CPU."""
    decode, decoded = decoding.decode_on_device, []

    def on_device(*arguments: Any) -> bool:
        decoded.append(arguments[0].name)
        return known and decode(*arguments)

    monkeypatch.setattr(decoding, "decode_on_device", on_device)
    make, settings = FORMATS[format]
    paths, quantized = [], 1 - own
    for seed, role in enumerate(("target", "instruct", "base")):
        made = {
            "norm.weight": normal((70,), seed),
            **{f"{n}.weight": normal((48, 64), 10 + i) for i, n in enumerate("ab")},
        }
        coded = {part: each for name, t in made.items() if "norm" not in name for part, each in make(name, t).items()}
        stored = {**made, **coded} if format == "fp8-block" else {"norm.weight": made["norm.weight"], **coded}
        chosen = seed >= quantized
        config = {"quantization_config": settings} if chosen else {}
        paths.append(write_model(tmp_path / role, stored if chosen else made, config=config))
    wanted = ik.load(paths[0], (paths[1], paths[2]), threads=threads)
    with through(StandIn(queues)):
        found = ik.load(paths[0], (paths[1], paths[2]), threads=threads)
        ik.apply(paths[0], (paths[1], paths[2]), out=tmp_path / "out", sync=False, threads=threads)
    assert_equal(found, wanted)
    assert_equal(read_model(tmp_path / "out"), wanted)
    assert set(decoded) == (set() if own else {format})


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["fp8-block", "nvfp4"])
def test_quantized_weights_on_a_gpu(tmp_path: Path, format: str) -> None:
    make, settings = FORMATS[format]
    plain = {"a.weight": normal((256, 512), 1), "norm.weight": normal((512,), 2)}
    coded = {"norm.weight": plain["norm.weight"], **make("a.weight", plain["a.weight"])}
    config = {"quantization_config": settings}
    target, other = write_model(tmp_path / "target", plain), write_model(tmp_path / "other", coded, config=config)
    pairs = [(target, (other, target)), *([(other, (target, other))] if format == "fp8-block" else [])]
    for one, pair in pairs:
        wanted, found = (ik.load(one, pair, alpha=0.5, device=place) for place in ("cpu", "cuda"))
        assert {t.device.type for t in found.values()} == {"cuda"}
        assert_equal({name: t.cpu() for name, t in found.items()}, wanted)


@pytest.mark.usefixtures("small_tiles")
def test_the_next_window_is_started_before_the_last_is_waited_for(tmp_path: Path) -> None:
    size = 64 * 7
    paths = [write_model(tmp_path / name, {"a": normal((size,), seed)}) for seed, name in enumerate("tib")]
    runtime = StandIn(Late)
    with through(runtime):
        ik.load(paths[0], (paths[1], paths[2]), threads=1)
    under_way = 0
    seen = []
    for what, _ in runtime.log:
        under_way += 1 if what == "submit" else -1
        seen.append(under_way)
    assert max(seen) == device.SLOTS == 2
    assert seen == [1, 2] + [1, 2] * 5 + [1, 0]
    queues = [number for what, number in runtime.log if what == "submit"]
    assert queues == [queues[0], queues[1]] * 3 + [queues[0]], "in turn"


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("queues", [Late, Beside])
@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_on_the_device_names_its_tensor_and_waits_for_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queues: Callable[[Any], device.Queue], threads: int
) -> None:
    base, instruct, target = triple(tmp_path)
    before = snapshot(tmp_path)
    compute = device.compute

    def broken(step: Any, operands: Any, out: Tensor, first: int, *rest: Any) -> None:
        if step.name == "model.layers.0.mlp.weight" and first >= 128:
            raise RuntimeError("CUDA error: an illegal memory access")
        compute(step, operands, out, first, *rest)

    monkeypatch.setattr(device, "compute", broken)
    text = rf"tensor 'model.layers.0.mlp.weight' of {target}/model.safetensors: CUDA error: an illegal memory access"
    with through(StandIn(queues)):
        with pytest.raises(ComputeError, match=text):
            ik.apply(target, (instruct, base), out=tmp_path / "out", threads=threads, sync=False)
        assert snapshot(tmp_path) == before
        with pytest.raises(ComputeError, match=text):
            ik.load(target, (instruct, base), threads=threads)
        arguments = ["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}", "-o", f"{tmp_path}/out"]
        assert main(arguments) == 3
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("small_tiles")
def test_nothing_is_under_way_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a device may still write to would be given to somebody else."""
    base, instruct, target = triple(tmp_path)
    runtime = StandIn(Late)

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    def assert_all_waited_for() -> None:
        for number in {number for _, number in runtime.log}:
            assert [what for what, each in runtime.log if each == number][-1] == "wait"
        runtime.log.clear()

    with through(runtime), pytest.raises(KeyboardInterrupt):
        ik.load(target, (instruct, base), threads=1, progress=interrupt)
    assert_all_waited_for()

    reads, read = iter(range(100)), sources.read_into

    def broken(*arguments: Any) -> None:
        if current_thread().name.startswith("ires-") and next(reads) == 8:  # of the engine
            raise OSError(5, "Input/output error", "a disk")
        read(*arguments)

    monkeypatch.setattr(sources, "read_into", broken)
    with through(runtime), pytest.raises(OSError, match="Input/output"):
        ik.load(target, (instruct, base), threads=1)
    assert sum(what == "submit" for what, _ in runtime.log) == 2
    assert_all_waited_for()


def test_no_room_for_the_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    runtime = StandIn(Late)

    def no_room(_: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(runtime, "pinned", no_room)
    text = "no 2.05 kB of host memory could be pinned for a tile: CUDA error: out of memory. Fewer --threads"
    before = snapshot(tmp_path)
    with through(runtime), pytest.raises(ComputeError, match=text):
        ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    assert snapshot(tmp_path) == before


def test_buffers_are_no_larger_than_the_tensors_and_aligned(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    plan = ik.apply(target, (instruct, base), out=tmp_path / "out", dry_run=True)
    assert isinstance(plan, Plan)
    gpu = device.Gpu(StandIn(Late, 1 << 20), plan.steps, plan.rules, True)
    assert gpu.tile == 640
    assert gpu.sizes == [(1 << 20) - 3 * 1280, 1280, 1280, 1280]
    assert not any(length % 16 for length in gpu.sizes)
    assert gpu.copy == TILES.copied
    copies = [replace(step, op="copy") for step in plan.steps]
    gpu = device.Gpu(StandIn(Late, 1 << 20), copies, plan.rules, True)
    assert (gpu.tile, gpu.copy, gpu.sizes) == (16, 1 << 20, [1 << 20, 0])


@pytest.mark.parametrize(("dtype", "width"), [("F8_E4M3", 4), ("BF16", 8), ("F32", 16), ("F64", 32)])
def test_a_window_is_as_large_as_a_piece_of_the_ring_holds(tmp_path: Path, dtype: str, width: int) -> None:
    """And goes into the stops of an update, as a power of two."""
    base, instruct, target = triple(tmp_path)
    plan = ik.apply(target, (instruct, base), out=tmp_path / "out", dry_run=True)
    assert isinstance(plan, Plan)
    large = [replace(ref, dtype=dtype, shape=(1 << 22,)) for ref in plan.steps[0].inputs]
    operands = tuple(Operand(o.role, (ref,)) for o, ref in zip(plan.steps[0].operands, large, strict=True))
    step = Step(Output("large", dtype, (1 << 22,)), "add_difference", operands, (1.0,))
    gpu = device.Gpu(StandIn(Late, PIECE), [step], plan.rules, True)
    assert gpu.tile == PIECE // width
    assert sum(gpu.sizes) == PIECE
    assert SIZES.unit % gpu.tile == 0


# --- loads through one call of the extension for each tile

Loaded = list[tuple[list[tuple[int, ...]], list[tuple[Any, ...]]]]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loaded]:
    """The reads and the items of all calls; pieces need not be large."""
    calls: Loaded = []
    load = native.load

    def noted(reads: Any, op: int, items: Any, *arguments: Any, **options: Any) -> Any:
        calls.append((reads, items))
        return load(reads, op, items, *arguments, **options)

    monkeypatch.setattr(native, "load", noted)
    with tiles(copied=96):
        yield calls


def many(folder: Path, sizes: list[int]) -> tuple[Path, tuple[Path, Path]]:
    """A target and (instruct, base), of tensors of these sizes."""
    target, instruct, base = (
        write_model(folder / name, {f"t{i}": normal((n,), 3 * i + role) for i, n in enumerate(sizes)})
        for role, name in enumerate("tib")
    )
    return target, (instruct, base)


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert torch.equal(found[name].view(torch.int16), t.view(torch.int16)), name


@needs_native
def test_small_tensors_share_a_tile(tmp_path: Path, loaded: Loaded) -> None:
    """Those that follow each other, have one operation with the same factors, and fit; each keeps its random bits."""
    target, pair = many(tmp_path, [100, 3, 0, 50, 5000, 8, 9, 10, 11])
    options: dict[str, Any] = {"alphas": [("t6", 0.3)], "rounding": "stochastic", "seed": 5, "threads": 1}
    wanted = ik.load(target, pair, **options)
    with through(StandIn(Host, 1 << 15)):
        found = ik.load(target, pair, **options)
    assert_equal(found, wanted)
    assert [[item[0] for item in items] for _, items in loaded] == [[100, 3, 50], [4096], [904], [8], [9], [10, 11]]
    assert [len(reads) for reads, _ in loaded] == [9, 3, 3, 3, 3, 6]
    assert not any(address % 16 for reads, _ in loaded for _, _, *addresses, _ in reads for address in addresses[1:])


@needs_native
def test_a_tile_is_no_larger_than_a_piece(tmp_path: Path, loaded: Loaded) -> None:
    """600 bytes of a tensor are 608 in a tile: of 2048 bytes three fit."""
    target, pair = many(tmp_path, [100] * 10)
    wanted = ik.load(target, pair)
    with through(StandIn(Host, 2048)):
        assert_equal(ik.load(target, pair, threads=1), wanted)
    assert [len(items) for _, items in loaded] == [3, 3, 3, 1]


@needs_native
def test_copies_share_a_tile_and_go_straight_to_their_place(tmp_path: Path, loaded: Loaded) -> None:
    target, pair = many(tmp_path, [100, 3, 50])
    with through(StandIn(Host, 1 << 16)):
        found = ik.load(target, pair, skip="t[01]", threads=1)
    assert_equal(found, ik.load(target, pair, skip="t[01]"))
    assert [(len(reads), len(items)) for reads, items in loaded] == [(2, 0), (3, 1)]
    assert [reads[i][3] for i, reads in enumerate([loaded[0][0]] * 2)] == [found[f"t{i}"].data_ptr() for i in (0, 1)]


@needs_native
@pytest.mark.usefixtures("loaded")
def test_a_tile_is_started_before_the_last_is_waited_for(tmp_path: Path) -> None:
    target, pair = many(tmp_path, [1024 * 7])
    runtime = StandIn(Host, 1 << 13)
    with through(runtime):
        ik.load(target, pair, threads=1)
    seen = list(accumulate(1 if what == "submit" else -1 for what, _ in runtime.log))
    assert seen == [1, 2] + [1, 2] * 5 + [1, 0]


@needs_native
@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("sizes", "culprit"), [([100, 3, 50], "t1"), ([100, 30_000], "t1")])
def test_what_cannot_be_read_is_named(tmp_path: Path, sizes: list[int], culprit: str) -> None:
    """The tensor and the file of the very read, also in a tile of several; and nothing is under way afterwards."""
    target, pair = many(tmp_path, sizes)
    file = pair[1] / "model.safetensors"
    load = native.load
    runtime = StandIn(Host, 1 << 16)
    faults = (("a folder", errno.EISDIR, "Is a directory"), ("short", errno.EIO, "the file ends"))
    for fault, errno_wanted, text in faults:

        def broken(reads: Any, *arguments: Any, fault: str = fault, **options: Any) -> Any:
            """The third read of the culprit goes wrong."""
            index = 5 if len(reads) > 3 else 2
            if len(reads) > 3 or reads[0][4] > 200:
                fd, offset, *rest = reads[index]
                folder = os.open(tmp_path, os.O_RDONLY) if fault == "a folder" else fd
                reads[index] = (folder, offset if fault == "a folder" else 1 << 40, *rest)
            return load(reads, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch, through(runtime):
            patch.setattr(native, "load", broken)
            with pytest.raises(OSError, match=f"{text}.* .tensor '{culprit}'.*") as caught:
                ik.load(target, pair, threads=1)
        assert (caught.value.errno, caught.value.filename) == (errno_wanted, f"{file}")
        for queue_of in {number for _, number in runtime.log}:
            assert [what for what, each in runtime.log if each == queue_of][-1] == "wait"


@needs_native
def test_an_error_of_the_device_in_a_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, pair = many(tmp_path, [100])

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("copying 200 bytes to device 0: CUDA error 700 (an illegal memory access)")

    monkeypatch.setattr(native, "load", broken)
    text = re.escape(f"tensor 't0' of {target}/model.safetensors: copying 200 bytes to device 0: CUDA error 700")
    with through(StandIn(Host)), pytest.raises(ComputeError, match=text):
        ik.load(target, pair)


@needs_native
@pytest.mark.parametrize("threads", [1, 4])
def test_damage_of_a_residual_is_found_in_a_load(tmp_path: Path, threads: int) -> None:
    """Its bytes are hashed as they went to the device, those of small tensors that share a tile as well."""
    target, (instruct, base) = many(tmp_path, [100, 3, 50, 7000])
    ik.extract(base, instruct, tmp_path / "r", sync=False)
    file = tmp_path / "r" / "residual.safetensors"
    with through(StandIn(Host, 1 << 14)):
        ik.load(target, tmp_path / "r", threads=threads)
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError):
            ik.load(target, tmp_path / "r", threads=threads)


def in_reverse(ref: TensorRef, found: Findings) -> list[Step]:
    """The rows of instruct and base in reverse order: a run each."""
    (step,) = apply_steps(ref, found)
    row = ref.numel // ref.shape[0]
    own, *others = step.operands
    runs = [Operand(o.role, tuple(o.refs[0].run(r * row, row) for r in reversed(range(ref.shape[0])))) for o in others]
    return [replace(step, operands=(own, *runs))]


apply_steps = deeds.apply_steps


@pytest.mark.filterwarnings("ignore:.* look unrelated")  # as the rows do
@pytest.mark.parametrize("kind", [Late, pytest.param(Host, marks=needs_native)])
@pytest.mark.parametrize("steps", [in_reverse, made_of_parts.steps_of_parts])
def test_operands_in_many_runs(
    tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, kind: Any, steps: Any
) -> None:
    """Each is copied to the device at once, whatever it was read from."""
    base, instruct, target = triple(tmp_path)
    monkeypatch.setattr(deeds, "apply_steps", steps)
    options: Any = {"rounding": "stochastic", "seed": 3}
    wanted = ik.load(target, (instruct, base), **options)
    with through(StandIn(kind, 4096)):
        assert_equal(ik.load(target, (instruct, base), threads=2, **options), wanted)
        ik.apply(target, (instruct, base), out=tmp_path / "out", **options)
        ik.apply(target, (instruct, base), in_place=True, **options)
    assert_equal(read_model(tmp_path / "out"), wanted)
    assert_equal(read_model(target), wanted)
    if kind is Host:
        pieces = [read for reads, _ in loaded for read in reads if not read[3]]
        together = [read for reads, _ in loaded for read in reads if read[0] == -1]
        assert len(pieces) > 10 * len(together) > 0
        assert sum(read[4] for read in pieces) == sum(read[4] for read in together)


@needs_native
@pytest.mark.usefixtures("loaded")
@pytest.mark.filterwarnings("ignore:.* look unrelated")
def test_a_piece_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    monkeypatch.setattr(deeds, "apply_steps", in_reverse)
    load = native.load

    def broken(reads: Any, *arguments: Any, **options: Any) -> Any:
        """The last piece of base goes wrong."""
        reads[-2] = (reads[-2][0], 1 << 40, *reads[-2][2:])
        return load(reads, *arguments, **options)

    monkeypatch.setattr(native, "load", broken)
    with through(StandIn(Host, 1 << 14)), pytest.raises(OSError, match="the file ends") as caught:
        ik.load(target, (instruct, base), threads=1)
    assert caught.value.filename == f"{base / 'model.safetensors'}"


# --- the ring


class Pins:
    """Pins memory of the stand-in kind, and tells what it did."""

    def __init__(self) -> None:
        self.pinned: list[int] = []
        self.unpinned: list[int] = []

    def pin(self, nbytes: int) -> Tensor:
        memory = torch.zeros(nbytes, dtype=torch.uint8)
        self.pinned.append(memory.data_ptr())
        return memory

    def unpin(self, memory: Tensor) -> None:
        self.unpinned.append(memory.data_ptr())


def test_the_ring_of_a_gpu_is_128_mib() -> None:
    assert PIECE * PIECES == 128 << 20
    assert Ring(torch.empty, lambda _: None).piece == PIECE
    assert device.free() == 0
    (example,) = doctest.DocTestFinder(recurse=False).find(device.free, "free")
    assert doctest.DocTestRunner().run(example) == (0, 2)


def test_a_ring_is_pinned_when_used_kept_and_freed_on_request(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    pins, runtime = Pins(), StandIn(Late)
    ring = runtime.ring = Ring(pins.pin, pins.unpin, piece=2048)
    with through(runtime):
        wanted = ik.load(target, (instruct, base), threads=1)
        assert 1 <= len(pins.pinned) <= device.SLOTS
        before = list(pins.pinned)
        again = ik.load(target, (instruct, base), threads=1)
        assert pins.pinned == before, "the second load pins nothing"
        assert pins.unpinned == []
        assert ring.free() == 2048 * len(before)
        assert pins.unpinned == before
        assert ring.free() == 0
        ik.load(target, (instruct, base), threads=1)
    assert len(pins.pinned) > len(before)
    for name, t in wanted.items():
        assert torch.equal(t, again[name])


def test_a_thread_pins_its_second_window_after_it_has_read_the_first(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / name, {"a": normal((5000,), seed)}) for seed, name in enumerate("tib")]
    runtime, order = StandIn(Late), []
    runtime.ring = Ring(lambda n: order.append("pin") or torch.zeros(n, dtype=torch.uint8), lambda _: None, piece=2048)
    with pytest.MonkeyPatch.context() as patch, tiles(copied=96), through(runtime):
        read = sources.read_into
        patch.setattr(sources, "read_into", lambda *arguments: (order.append("read"), read(*arguments)))
        ik.load(paths[0], (paths[1], paths[2]), threads=1)
    order = order[order.index("pin") :]  # before it samples are read, of what the models have in common
    assert order[:9] == ["pin", "read", "read", "read", "pin", "read", "read", "read", "read"]


def test_threads_beyond_the_pieces_wait_and_the_work_is_done(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    wanted = ik.load(target, (instruct, base))
    pins, runtime = Pins(), StandIn(Beside)
    runtime.ring = Ring(pins.pin, pins.unpin, piece=2048, pieces=3)
    with tiles(copied=96), through(runtime):
        found = ik.load(target, (instruct, base), threads=12)
        assert 1 <= len(pins.pinned) <= 3
        assert len(runtime.ring.borrow(9)) == 3, "all came back"
    assert all(torch.equal(t, found[name]) for name, t in wanted.items())


def test_pieces_come_back_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    runtime = StandIn(Late)

    read = sources.read_into

    def broken(*arguments: Any) -> None:
        if current_thread().name.startswith("ires-"):  # of the engine
            raise OSError(5, "Input/output error", "a disk")
        read(*arguments)

    monkeypatch.setattr(sources, "read_into", broken)
    with through(runtime), pytest.raises(OSError, match="Input/output"):
        ik.load(target, (instruct, base), threads=4)
    assert len(runtime.ring.borrow(99)) == PIECES


# --- which device


@pytest.mark.parametrize("wrong", ["", "gpu", "cuda:x", "xpu", "meta", "mps:0", "cuda:-2"])
def test_a_device_that_is_none(tmp_path: Path, wrong: str) -> None:
    base, instruct, target = triple(tmp_path)
    before = snapshot(tmp_path)
    text = re.escape(f"--device {wrong}: wanted cpu, cuda, or cuda:N")
    with pytest.raises(ArgumentError, match=text):
        ik.apply(target, (instruct, base), out=tmp_path / "out", device=wrong)
    with pytest.raises(ArgumentError, match=text):
        ik.load(target, (instruct, base), device=wrong)
    assert snapshot(tmp_path) == before


def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base, instruct, target = triple(tmp_path)
    ik.extract(base, instruct, tmp_path / "r", sync=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = snapshot(tmp_path)
    for arguments in (
        ["extract", f"{base}", f"{instruct}", "-o", f"{tmp_path}/out"],
        ["apply", f"{target}", f"{tmp_path}/r", "-o", f"{tmp_path}/out"],
        ["apply", f"{target}", f"{tmp_path}/r", "-o", f"{tmp_path}/out", "--dry-run"],
        ["verify", f"{tmp_path}/r"],
    ):
        assert main([*arguments, "--device", "cuda"]) == 2
        assert "ires: --device cuda: torch sees no CUDA device (" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match="torch sees no CUDA device"):
        ik.load(target, tmp_path / "r", device="cuda")
    assert snapshot(tmp_path) == before


def test_the_device_of_the_calling_thread_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(device, "choose", lambda _: None)
    assert device.resolve("cuda") == torch.device("cuda:2")
    assert device.resolve(torch.device("cuda:1")) == torch.device("cuda:1")
    with pytest.raises(ArgumentError, match="--device cuda:3: torch sees 3 CUDA devices, the last is cuda:2"):
        device.resolve("cuda:3")


def test_a_device_without_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("IRES_BACKEND", "reference")
    with pytest.raises(ArgumentError, match="--device cuda:0: IRES_BACKEND=reference: not available for cuda tensors"):
        device.resolve("cuda:0")


# --- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gives_what_the_cpu_gives(tmp_path: Path, case: str, threads: int) -> None:
    """But for payloads of NaN, which are not defined: these models have none."""
    models(tmp_path, special=False)
    wanted, state = everything(tmp_path, tmp_path / "cpu", case, threads, "cpu")
    found, other = everything(tmp_path, tmp_path / "gpu", case, threads, "cuda")
    assert found == wanted
    assert {t.device.type for t in other.values()} == {"cuda"}
    for name, t in state.items():
        assert torch.equal(other[name].cpu().reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8)), name


@pytest.mark.gpu
@needs_gpu
def test_full_windows_through_a_gpu(tmp_path: Path) -> None:
    """More than two tiles of the real size a thread, on a stream that is not the default, from used memory."""
    paths = [write_model(tmp_path / n, {"a": normal((5 * TILES.on_gpu + 7,), i)}) for i, n in enumerate("tib")]
    options: dict[str, Any] = {"alpha": 0.3, "rounding": "stochastic", "seed": 3, "threads": 2}
    wanted = ik.load(paths[0], (paths[1], paths[2]), **options)["a"]
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        used = torch.zeros(wanted.shape, dtype=wanted.dtype, device="cuda")
        for _ in range(50):
            used += 1
        del used  # its memory goes to the result while the additions may still run
        found = ik.load(paths[0], (paths[1], paths[2]), device="cuda", **options)["a"]
        assert torch.equal(found.cpu().view(torch.int16), wanted.view(torch.int16))


@pytest.mark.gpu
@needs_gpu
def test_no_room_on_a_gpu(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    plan = ik.apply(target, (instruct, base), out=tmp_path / "out", dry_run=True)
    assert isinstance(plan, Plan)
    ref = replace(plan.steps[0].inputs[0], shape=(1 << 40,))
    step = Step(Output("huge", ref.dtype, ref.shape), "copy", (Operand("target", (ref,)),))
    with pytest.raises(MemoryError, match="cuda:0 has no room left"):
        statedict.allocate([step], torch.device("cuda:0"))


BLOCKS = {
    "rows": Box((12, 50), (3, 0), (6, 50)),
    "columns": Box((12, 50), (0, 10), (12, 25)),
    "both": Box((12, 50), (5, 49), (7, 1)),
    "last": Box((12, 50), (11, 0), (1, 50)),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", [Late, Beside, pytest.param(Host, marks=needs_native)])
@pytest.mark.usefixtures("small_tiles")
def test_blocks_have_the_random_bits_of_the_whole(
    tmp_path: Path, kind: Callable[[Any], device.Queue], block: str
) -> None:
    box = BLOCKS[block]
    steps, ids, wanted = [], {}, {}
    models = {
        role: open_checkpoint(
            write_model(tmp_path / role, {n: normal(box.shape, 10 * i + j) for j, n in enumerate("ab")})
        )
        for i, role in enumerate(("target", "residual"))
    }
    for name in "ab":
        operands = tuple(Operand(role, (model.tensors[name],)) for role, model in models.items())
        steps.append(Step(Output(name, "BF16", box.shape), "add", operands, (0.7,), 5))
        wanted[name] = torch.empty(box.shape, dtype=torch.bfloat16)
    for model in models.values():
        ids |= model.file_ids
    rules = Rules.of(1, rounding="stochastic", seed=9)
    stream.fill(wanted, steps, ids, rules, hashed=())
    made = [step for each in within(steps, dict.fromkeys("ab", box), numbered=True) for step in each]
    found = {name: torch.empty(box.size, dtype=torch.bfloat16) for name in "ab"}
    stream.fill(found, made, ids, rules, hashed=(), processors=partial(device.on_gpu, StandIn(kind)))
    for name, tensor in found.items():
        rows, columns = (slice(first, first + size) for first, size in zip(box.first, box.size, strict=True))
        assert torch.equal(tensor, wanted[name][rows, columns])
