"""The benchmark of a GPU machine, with a CPU and a clock of our own in place of the GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import ires_kernels as ik
from ires_kernels.backends import native
from ires_kernels.backends.call import Call
from ires_kernels.bench import __main__ as bench
from ires_kernels.bench import gpu, gpu_merges, loaders, measure, merges
from ires_kernels.bench.accelerator import open_cuda
from ires_kernels.bench.contenders import COMPILED, EAGER, FOREACH, UPCAST
from ires_kernels.bench.kernels import BF16, Case, VerificationError
from ires_kernels.bench.synthetic import SHAPES, write_triple

QUICK = ["gpu", "--size", "20K", "--list", "tiny", "--model", "tiny", "--rounds", "2", "--no-compile"]
TINY = SHAPES["tiny"]

needs_native = pytest.mark.skipif(not native.isas(), reason="without native kernels there is no backend to measure")


class Abacus:
    """An accelerator whose tensors are on the CPU, and on which every call takes a second."""

    place = torch.device("cpu")
    name = "Abacus (R) 9000"

    def __init__(self) -> None:
        self.calls = 0
        self.transferred: list[tuple[int, int]] = []

    def facts(self) -> dict[str, Any]:
        return {"name": self.name}

    def seconds(self, run: Callable[[], object]) -> float:
        self.calls += 1
        run()
        return 1.0

    def transfer(self, into: int, back: int) -> None:
        self.transferred.append((into, back))

    def release(self) -> None:
        pass


def loads(elements: int = 20_000) -> list[gpu.Workload]:
    return gpu.workloads(elements, TINY, "tiny")


def break_native(monkeypatch: pytest.MonkeyPatch, when: Callable[[Call], bool]) -> None:
    """From now on native kernels get the last element of the last tensor wrong by one bit."""
    right = native.run

    def wrong(call: Call) -> None:
        right(call)
        if when(call):
            call.outs[-1].view(-1)[-1:].view(torch.uint8)[0] ^= 1

    monkeypatch.setattr(native, "run", wrong)


def test_the_workloads_are_those_that_something_is_wanted_of() -> None:
    *single, model = gpu.workloads(1 << 30, SHAPES["llama-8b"], "llama-8b")
    assert [load.elements for load in single] == [1 << 30] * 6
    assert (len(model.shapes), model.elements) == (291, 8_030_261_248)
    assert model.name == "add_difference bf16, the 291 tensors of llama-8b"
    assert {load.name: load.gates[gpu.COPY] for load in (*single, model)} == {
        "add_difference bf16": 0.92,
        "add_difference f16": 0.92,
        "add_difference f32": 0.92,
        "add bf16 + f32": 0.92,
        "add bf16 + e4m3": 0.85,
        "add_difference bf16 stochastic": 0.85,
        model.name: 0.90,
    }
    for load in (single[0], model):
        assert {name: load.gates[name] for name in gpu.TORCH if name in load.gates} == {
            UPCAST: 5.0,
            COMPILED: 1.0,
            FOREACH: 1.5,
        }
    assert [load.nbytes >> 30 for load in single] == [8, 8, 16, 8, 5, 8]
    assert [load.on_device >> 30 for load in single] == [10, 10, 16, 10, 7, 10]  # 4 of them the copy's


@needs_native
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(bench, "machine", lambda: {**measure.machine(), "commit": "0123456789abcdef+"})
    device = Abacus()
    assert bench.main([*QUICK, "--gates", "--results", f"{results}", "--dir", f"{tmp_path}"], device) == 0
    (path,) = results.iterdir()
    assert path.name == "abacus-r-9000-0123456+.json"
    record = json.loads(path.read_text())
    assert record["gpu"] == {"name": device.name}
    assert [entry["what"] for entry in record["kernels"]] == [load.name for load in loads()]
    for entry in record["kernels"]:
        torch_ways = set() if "stochastic" in entry["what"] else {EAGER, UPCAST, FOREACH}
        assert set(entry["contenders"]) == {gpu.COPY, "native"} | torch_ways
        assert entry["unavailable"] == {}
        for contender in entry["contenders"].values():
            assert contender["seconds"] == [1.0, 1.0]
        assert entry["contenders"]["native"]["ratios"][gpu.COPY]["median"] == 1
    assert len(record["verified"]) == 2
    assert set(device.transferred) == {(6 * TINY.parameters, 2 * TINY.parameters), (6 * TINY.parameters, 0)}
    (merged,) = record["merges"]
    assert set(merged["contenders"]) == {
        merges.COPY,
        gpu_merges.READ,
        gpu_merges.PCIE,
        gpu_merges.PCIE_IN,
        gpu_merges.ON_CPU,
        gpu_merges.ON_GPU,
        gpu_merges.LOAD,
        gpu_merges.slower(gpu_merges.ON_GPU),
        gpu_merges.slower(gpu_merges.LOAD),
        loaders.PREAD,
        loaders.LOAD_FILE,
        loaders.SCRIPT,
    }
    assert merged["unavailable"] == {"fastsafetensors": "fastsafetensors is not installed"}
    printed = capsys.readouterr().out
    assert "add bf16 + f32, GB/s read and written: device copy 0, native 0\n" in printed
    table = printed[printed.index(device.name) :]  # the last table, and nothing after it
    assert table.count("wanted") == 1
    assert [each["wanted"] for each in merged["comparisons"]] == [1.25, 1.25, 1.25, None, None]
    rows = [row.strip() for row in table.splitlines()]
    for comparison in record["comparisons"]:
        (row,) = [row for row in rows if row.startswith(comparison["what"] + "  ")]
        assert (comparison["wanted"] is None) == (not {"≥", "≤"} & set(row))
    assert list(filter(None, rows))[-1].startswith(record["comparisons"][-1]["what"])
    assert list(tmp_path.iterdir()) == [results]


@needs_native
def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    device = Abacus()
    break_native(monkeypatch, lambda call: call.stochastic)
    assert bench.main(QUICK, device) == 1
    out, err = capsys.readouterr()
    assert "wrong result: add_difference bf16 stochastic: native differs from the reference backend in 1 of" in err
    assert device.calls == 0
    assert device.name not in out


@needs_native
def test_the_end_of_the_large_tensors_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the small ones were right."""
    device, single, model = Abacus(), loads(300_000)[0], loads()[-1]
    gpu.verify(single, device)
    break_native(monkeypatch, lambda call: call.outs[0].numel() == 300_000 or len(call.outs) > 1)
    with pytest.raises(
        VerificationError, match=r"native differs .* in 1 of 4,096 elements .tensor 0 from element 295,904 on"
    ):
        gpu.measure(single, device, 1, with_compiled=False)
    with pytest.raises(
        VerificationError, match=rf"native differs .* in 1 of .* elements .tensor {len(model.shapes) - 1} from"
    ):
        gpu.measure(model, device, 1, with_compiled=False)
    assert device.calls == 0


@needs_native
def test_what_has_no_room_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 16.00 GiB.\nmore")

    monkeypatch.setattr(torch, "_foreach_add_", no_room)
    result = gpu.measure(loads()[-1], Abacus(), 1, with_compiled=False)
    assert result.unavailable == {FOREACH: "OutOfMemoryError: Tried to allocate 16.00 GiB."}
    assert FOREACH not in result.times
    of_native = [each.what.rpartition(" ")[2] for each in result.comparisons() if ": native," in each.what]
    assert of_native == ["copy", "eager", "f32"]


def test_ratios_are_of_bandwidths_and_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_COPIED", 750)
    load = gpu.Workload(Case("it", "add", (BF16,) * 3), [(1000,)], gates={gpu.COPY: 0.9, UPCAST: 5})
    times = {gpu.COPY: [1.0, 2.0], "native": [4.0, 8.0], "triton": [2.0, 4.0], UPCAST: [12.0, 24.0], EAGER: [4.0, 4.0]}
    result = gpu.result_of(load, "a GPU", times, unavailable={})
    assert result.gb_per_second(gpu.COPY) == 1500 / 1.5 / 1e9
    found = {each.what: (each.measured.median, each.wanted, each.at_most) for each in result.comparisons()}
    assert found == {
        "it: native, speed / device copy": (1.0, 0.9, False),
        "it: triton, speed / device copy": (2.0, 0.9, False),
        "it: native, speed / eager": (0.75, None, False),
        "it: triton, speed / eager": (1.5, None, False),
        "it: native, speed / eager f32": (3.0, 5, False),
        "it: triton, speed / eager f32": (6.0, 5, False),
    }


def test_a_merge_is_held_against_the_slower_floor_of_its_round(tmp_path: Path) -> None:
    times = {
        merges.COPY: [1.0, 4.0, 2.0],
        gpu_merges.PCIE: [2.0, 1.0, 2.0],
        gpu_merges.READ: [1.0, 1.0, 1.0],
        gpu_merges.PCIE_IN: [0.5, 0.5, 0.5],
        gpu_merges.ON_GPU: [2.0, 8.0, 6.0],
        gpu_merges.LOAD: [1.5, 1.5, 1.5],
        loaders.PREAD: [1.0, 1.0, 0.75],
        loaders.SCRIPT: [6.0, 4.5, 6.0],
    }
    result = gpu_merges.result_of(write_triple(tmp_path, "tiny"), "a GPU", "native", times)
    applied, loaded, of_reading, of_script = result.comparisons()
    assert (of_reading.wanted, of_reading.measured.median) == (1.25, 1.5)
    assert (of_script.wanted, of_script.measured.median) == (None, 0.25)
    assert result.traffic[loaders.SCRIPT] == result.traffic[gpu_merges.LOAD]
    assert applied.measured[1:] == (2.0, 2.5, 3)
    assert loaded.measured.median == 1.5
    assert applied.at_most
    assert applied.what.endswith("apply, time / cat + cp or PCIe")
    assert "PCIe in" in loaded.what


def test_the_script_gives_what_load_gives(tmp_path: Path) -> None:
    """But for its roundings: two where there is one."""
    triple = write_triple(tmp_path, "tiny")
    wanted = ik.load(triple.target, (triple.instruct, triple.base))
    found = loaders.script(triple, torch.device("cpu"))
    assert found.keys() >= wanted.keys() - {"lm_head.weight"}
    for name in found:
        assert (found[name].float() - wanted[name].float()).abs().max() <= 2.0**-8 * wanted[name].float().abs().max()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_floor_of_a_load_reads_all_bytes(tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "_PIECE", 1000)
    triple = write_triple(tmp_path, "tiny")
    files = [path for folder in (triple.target, triple.instruct, triple.base) for path in merges.weights(folder)]
    assert loaders.pread(triple, threads) == sum(path.stat().st_size for path in files)


def test_fastsafetensors_takes_part_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triple = write_triple(tmp_path, "tiny")
    opened: list[list[str]] = []

    class Opened:
        def __init__(self, filenames: list[str], nogds: bool, device: str, debug_log: bool) -> None:
            assert (nogds, device, debug_log) == (True, "cpu", False)
            opened.append(filenames)

        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *_: object) -> None: ...

        def get_keys(self) -> list[str]:
            return ["a"]

        def get_tensor(self, name: str) -> Tensor:
            assert name == "a"
            return torch.zeros(3)

    module = ModuleType("fastsafetensors")
    module.__spec__ = ModuleSpec("fastsafetensors", None)
    module.__dict__["fastsafe_open"] = Opened
    monkeypatch.setitem(sys.modules, "fastsafetensors", module)
    ways, unavailable = loaders.ways(triple, torch.device("cpu"))
    assert not unavailable
    ways[loaders.FAST]()
    folders = (triple.target, triple.instruct, triple.base)
    assert opened == [[str(path) for path in merges.weights(folder)] for folder in folders]


@pytest.mark.parametrize("load", [load for load in loads(5000) if not load.case.stochastic], ids=lambda load: load.name)
def test_torch_contenders_do_the_same_work(load: gpu.Workload) -> None:
    """They may round more than once, so to within some units in the last place."""
    generator = torch.Generator().manual_seed(3)
    columns = [
        [(torch.randn(shape, generator=generator) * 0.02).to(dtype) for shape in load.shapes]
        for dtype in load.case.dtypes[1:]
    ]
    wanted = [[x.clone() for x in column] for column in columns]
    load.case.run(wanted[0], wanted)
    ways = gpu.torch_ways(load.case, columns, with_compiled=False)
    assert list(ways) == [EAGER, UPCAST, FOREACH]
    before = [x.clone() for x in columns[0]]
    for name, way in ways.items():
        for x, y in zip(columns[0], before, strict=True):
            x.copy_(y)
        way()
        for got, want in zip(columns[0], wanted[0], strict=True):
            torch.testing.assert_close(got.float(), want.float(), rtol=2**-6, atol=2e-3, msg=f"{load.name}: {name}")


def test_ends_are_compared_at_their_own_random_numbers() -> None:
    """With the reference held against itself, element by element of the whole tensor."""
    load = next(load for load in loads(9000) if load.case.stochastic)
    columns = [[torch.full((9000,), 1.0 + i / 300, dtype=BF16)] for i in range(3)]
    gpu.check_ends(load, "reference", columns)
    assert columns[0][0].unique().numel() == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "sees 0 CUDA devices; run this on a GPU machine"),
        ("cuda:3", "cuda:3: torch .* sees 0 CUDA devices"),
        ("cpu", "cpu: measures tensors on a GPU only; wanted cuda, or cuda:N"),
        ("abacus", "abacus: no such device; wanted cuda, or cuda:N"),
    ],
)
def test_without_a_gpu(device: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=message):
        open_cuda(device)
    assert bench.main(["gpu", "--device", device]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu", "--size", "much"], "got size 'much'"),
        (["gpu", "--model", "1K"], "at least"),
        (["gpu", "--list", "llama-9b"], "invalid choice"),
        (["gpu", "--cases", "bf17"], "--cases bf17: got a pattern of no case, wanted one of ['add_"),
        (["gpu", "--results", "/no/such/folder"], "--results /no/such/folder: wanted a folder"),
        (["kernels", "--results", "."], "only for gpu"),
        (["gpu", "--plot", "x.png"], "--plot draws"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_the_file_is_named_after_the_gpu_and_the_commit() -> None:
    assert bench._file_name("NVIDIA H200", "1a2b3c4d5e6f") == "nvidia-h200-1a2b3c4"
    assert bench._file_name("NVIDIA H100 80GB HBM3", "1a2b3c4d5e6f+") == "nvidia-h100-80gb-hbm3-1a2b3c4+"
    assert bench._file_name("NVIDIA H200", None) == "nvidia-h200-unknown"


def test_the_commit_outside_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(measure.subprocess, "run", no_git)
    monkeypatch.delenv("IRES_COMMIT", raising=False)
    assert measure.machine()["commit"] is None
    monkeypatch.setenv("IRES_COMMIT", "1a2b3c4")
    assert measure.machine()["commit"] == "1a2b3c4"


@pytest.mark.gpu
def test_the_clock_of_a_gpu() -> None:
    device = open_cuda("cuda")
    x = torch.ones(1 << 26, device=device.place)
    short, long = (device.seconds(lambda n=n: [x.add_(1) for _ in range(n)]) for n in (1, 10))
    assert 0 < 4 * short < long < 30 * short
    assert int(x[0]) == 1 + 5 * 11
    assert {"name", "memory_bytes", "capability"} <= set(device.facts())
    device.transfer(1 << 28, 1 << 20)


@pytest.mark.gpu
def test_a_small_run_on_a_gpu(tmp_path: Path) -> None:
    assert bench.main([*QUICK, "--results", f"{tmp_path}"]) == 0
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert {tuple(entry["unavailable"]) for entry in record["kernels"]} == {()}
