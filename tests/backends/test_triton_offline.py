"""What Triton makes of the kernels for GPUs that are not there: wide accesses, no fused products, no spills.

Everything is compiled through the backend itself, up to the launch, in a process for every GPU (triton_compiled.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ires_kernels.backends import triton as backend
from ires_kernels.backends.call import Call

triton = pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.xdist_group("triton offline")  # what is compiled is compiled once
RELEASE = backend._release()
WIDTH = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "e4m3": 1, "e5m2": 1}
Case = dict[str, Any]
Launch = dict[str, Any]

NEAREST: list[Case] = [
    {"op": "add", "dtypes": ["bf16", "bf16", "bf16"]},
    {"op": "subtract", "dtypes": ["f32", "bf16", "bf16"]},
    {"op": "add_difference", "dtypes": ["bf16", "bf16", "bf16", "bf16"]},
    {"op": "add", "dtypes": ["bf16", "bf16", "f32"]},
    {"op": "add", "dtypes": ["e4m3", "e4m3", "e4m3"]},
    {"op": "scale", "dtypes": ["e5m2", "e5m2"]},
    {"op": "add", "dtypes": ["f32", "f32", "f32"]},
    {"op": "add", "dtypes": ["f16", "bf16", "f64"]},
]
MORE: list[Case] = [
    {"op": "add", "dtypes": ["f64", "f64", "f64"]},
    {"op": "add", "dtypes": ["f16", "f16", "e5m2"]},
    {"op": "add", "dtypes": ["bf16", "bf16", "bf16", "f32", "e4m3", "f16"]},
    {"op": "add_difference", "dtypes": ["e4m3", "e4m3", "e5m2", "e4m3"]},
]
RANDOM: list[Case] = [
    {"op": "add", "dtypes": ["bf16", "bf16", "bf16"], "random": True},
    {"op": "scale", "dtypes": ["e4m3", "e4m3"], "random": True},
    {"op": "subtract", "dtypes": ["f16", "f64", "f32"], "random": True},
]
SLOW_PATHS: list[Case] = [
    {"op": "add", "dtypes": ["bf16", "bf16", "f32"], "odd": True},
    {"op": "add", "dtypes": ["bf16", "bf16", "f32"], "step": 2},
    {"op": "add", "dtypes": ["bf16", "bf16", "f32"], "offset": 5, "random": True},
]
# Operands that are read in different ways: where a thread holds elements that the store takes from others, pairs of
# casts are packed, shifted and exchanged.
MIXED: list[Case] = [
    {"op": "add_difference", "dtypes": [out, out, x, y], "odd": [True, True, *odd]}
    for out, x, y, odd in (
        ("e5m2", "bf16", "bf16", [True, False]),
        ("e5m2", "f32", "f16", [True, False]),
        ("e5m2", "e5m2", "f32", [True, False]),
        ("e5m2", "f16", "e4m3", [False, True]),
        ("e4m3", "bf16", "bf16", [True, False]),
        ("e4m3", "f32", "e4m3", [False, True]),
    )
]
# One kernel, whatever the numbers: 2^31 elements and more, 1, multiples of 16, seeds of 64 bits, any factor.
SAME: list[Case] = [
    {"op": "scale", "dtypes": ["e4m3", "e4m3"], "random": True} | numbers
    for numbers in (
        {"n": 2**31 + 5},
        {"n": 1, "seed": 2**64 - 1, "offset": 2**64 - 4},
        {"n": 2**20, "seed": 2**31, "offset": 16, "factor": 1.0},
        {"n": 2**20 + 1, "seed": 1, "offset": 2**40, "factor": -(2.0**-149)},
    )
]
LISTS: list[Case] = [
    case | {"sizes": [5000, 3, 4096, 2**31 + 5]}
    for case in (*NEAREST[:6], RANDOM[0], {"op": "add", "dtypes": ["bf16", "bf16", "f32", "e4m3"]})
]
CASES = {
    "cuda:90": NEAREST + MORE + RANDOM + SLOW_PATHS + MIXED + SAME + LISTS,
    "cuda:80": NEAREST[:6] + RANDOM[:1] + LISTS[:1],
    "cuda:100": NEAREST[:6] + RANDOM + LISTS[:2],
    "hip:gfx942": NEAREST[:6] + RANDOM[:1] + LISTS[:1],
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The launches of a case on a GPU. All are compiled at once, two processes at a time."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("IRES_", "TRITON_"))}
    environment = keep | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}

    def compiled(target: str) -> list[list[Launch]]:
        run = subprocess.run(
            [sys.executable, Path(__file__).parents[1] / "triton_compiled.py", target],
            input="".join(json.dumps(case) + "\n" for case in CASES[target]),
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-5000:]
        return [json.loads(line) for line in run.stdout.splitlines()]

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(CASES, pool.map(compiled, CASES), strict=True))

    def of(target: str, case: Case) -> list[Launch]:
        return found[target][CASES[target].index(case)]

    return of


def name(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    words = [value["op"], *value["dtypes"], *(f"{k}={v}" for k, v in value.items() if k not in ("op", "dtypes"))]
    return "-".join(words)


def cases(*kinds: list[Case], gpus: str) -> pytest.MarkDecorator:
    found = [
        (target, case)
        for target in CASES
        for kind in kinds
        for case in kind
        if gpus in target and case in CASES[target]
    ]
    return pytest.mark.parametrize(("target", "case"), found, ids=name)


def count(code: dict[str, int], pattern: str) -> int:
    return sum(number for instruction, number in code.items() if re.fullmatch(pattern, instruction))


def skip_if_fused(target: str) -> None:
    if target == "cuda:100" and RELEASE < (3, 7):
        pytest.skip("this release fuses there, and the backend refuses it")


@cases(NEAREST, MORE, RANDOM, gpus="cuda")
def test_128_bits_at_a_time(target: str, case: Case, launches: Any) -> None:
    """16 elements a thread: an operand of w bytes each takes w loads. The masked copy of the code has none."""
    (launch,) = launches(target, case)
    out, *operands = (WIDTH[dtype] for dtype in case["dtypes"])
    assert launch["kernel"] == "flat"
    assert launch["code"]["LDG.E.128"] == sum(operands)
    assert launch["code"]["STG.E.128"] == out
    assert count(launch["ptx"], r"ld\.global\.(v4\.b32|v2\.b64)") == sum(operands)
    assert count(launch["ptx"], r"st\.global\.(v4\.b32|v2\.b64)") == out
    # What is narrower belongs to the masked copy: one access for every element of a thread.
    assert count(launch["code"], r"LDG\.E(?!\.128).*") == 16 * len(operands)
    assert count(launch["code"], r"STG\.E(?!\.128).*") == 16


@cases(LISTS, gpus="cuda")
def test_a_list_takes_one_launch(target: str, case: Case, launches: Any) -> None:
    """With the accesses of single tensors, although its pointers come out of a table; its counts take one more."""
    (launch,) = launches(target, case)
    assert launch["kernel"] == "listed"
    assert launch["grid"] == [sum(-(-n // 2048) for n in case["sizes"])]
    out, *operands = (WIDTH[dtype] for dtype in case["dtypes"])
    assert launch["code"]["LDG.E.128"] == sum(operands) + 1
    assert launch["code"]["STG.E.128"] == out


@cases(NEAREST, MORE, RANDOM, SLOW_PATHS, MIXED, LISTS, gpus="cuda")
def test_each_step_is_rounded(target: str, case: Case, launches: Any) -> None:
    """No fused multiply-add, and no flushing of subnormals, in PTX or in machine code."""
    skip_if_fused(target)
    for launch in launches(target, case):
        ptx = launch["ptx"]
        assert not count(ptx, r"fma\..*|mad\.(rn|f).*|.*\.ftz.*|.*approx.*")
        assert not count(launch["code"], r"[FD]FMA.*|FADD\.FTZ.*|FMUL\.FTZ.*")
        real = "f64" if "f64" in case["dtypes"] else "f32"
        residuals = {"add": len(case["dtypes"]) - 2, "scale": 0}.get(case["op"], 1)
        sums = count(ptx, rf"(add|sub)(\.rn)?\.{real}(\.f16)?")  # .f16: a sum with a float16, widened first
        pairs = count(ptx, rf"(add|sub)(\.rn)?\.{real}x2")
        assert sums + 2 * pairs >= 16 * residuals
        if RELEASE >= (3, 7):  # older ones leave the rounding mode out
            assert not count(ptx, r"(add|sub|mul)\.f(32|64)(x2)?")


@cases(NEAREST, MORE, RANDOM, SLOW_PATHS, MIXED, LISTS, gpus="cuda")
def test_nothing_is_spilled(target: str, case: Case, launches: Any) -> None:
    for launch in launches(target, case):
        assert launch["spilled"] == 0
        assert not count(launch["code"], r"LDL.*|STL.*")


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100"])
def test_conversions_of_the_hardware(target: str, launches: Any) -> None:
    """To nearest even in one step from float32, where the GPU has it; elsewhere, and to e5m2, on the bits."""
    bf16, e4m3, e5m2 = (launches(target, NEAREST[i])[0]["ptx"] for i in (0, 4, 5))
    assert count(bf16, r"cvt\.rn\.bf16(x2)?\.f32") > 0
    float8 = target != "cuda:80"
    assert (count(e4m3, r"cvt\.rn\.satfinite\.e4m3x2\.f32") > 0) == float8
    assert (count(e4m3, r"cvt\.rn\.f16x2\.e4m3x2") > 0) == float8
    assert not count(e5m2, r"cvt\.rn\.satfinite\.e5m2x2\..*")


@cases(NEAREST, MORE, RANDOM, SLOW_PATHS, MIXED, LISTS, gpus="cuda")
def test_no_cast_is_packed_and_taken_apart(target: str, case: Case, launches: Any) -> None:
    """Where it is, the ptxas of Triton 3.6 gave every odd element another number."""
    assert [launch["taken_apart"] for launch in launches(target, case)] == [0]


@pytest.mark.parametrize("case", SLOW_PATHS, ids=name)
def test_slow_paths(case: Case, launches: Any) -> None:
    """Odd addresses are read element by element by the same kernel; strides and odd offsets by the other one."""
    (launch,) = launches("cuda:90", case)
    assert launch["kernel"] == ("flat" if "odd" in case else "strided")
    assert not count(launch["code"], r"(LDG|STG).*\.(64|128)")


def test_the_sweep_over_alignments_runs() -> None:
    """The program that test_triton_gpu.py starts on a GPU, on a few of its mixes in the interpreter."""
    program = [sys.executable, str(Path(__file__).parents[1] / "triton_alignments.py"), "3", "200"]
    run = subprocess.run(program, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "5\n"), run.stderr[-5000:]


class TestWhatGoesIntoATable:
    """By the numbers of the items; nothing is launched here."""

    def works(self, rows: list[tuple[torch.Tensor, ...]], **changes: Any) -> list[list[int]]:
        factors = (0.5,) * (len(rows[0]) - 1)
        call = Call("add", [row[0] for row in rows], rows, factors, False, 0, [0] * len(rows), 0, None)
        return [items for items, _ in backend._works(call._replace(**changes), backend._Target(0, 4))]

    def test_tensors_of_one_mix_of_dtypes(self) -> None:
        mixes = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
        rows = [tuple(torch.zeros(n, dtype=dtype) for dtype in mixes[n % 2]) for n in range(7)]
        assert self.works(rows) == [[1, 3, 5], [2, 4, 6]]

    def test_not_those_that_are_alone_odd_or_strided(self) -> None:
        x = [torch.zeros(64) for _ in range(4)]
        odd, strided = (x[1][1:],) * 2, (x[2][::2],) * 2
        rows: list[tuple[torch.Tensor, ...]] = [(x[0], x[0]), odd, strided, (x[3].half(), x[3]), (x[3], x[3])]
        assert self.works(rows) == [[0, 4], [1], [2], [3]]

    def test_no_more_than_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend.kernels, "ITEMS", 3)
        assert self.works([(torch.zeros(4),) * 2] * 7) == [[0, 1, 2], [3, 4, 5], [6]]

    def test_not_more_operands_than_a_row_has(self) -> None:
        assert self.works([(torch.zeros(4),) * 3] * 2) == [[0, 1]]
        assert self.works([(torch.zeros(4),) * 4] * 2) == [[0], [1]]

    def test_not_at_an_offset_within_four_random_words(self) -> None:
        rows = [(torch.zeros(4),) * 2] * 2
        assert self.works(rows, stochastic=True, offset=8) == [[0, 1]]
        assert self.works(rows, stochastic=True, offset=9) == [[0], [1]]

    def test_a_list_makes_ready_for_a_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel for one tensor is loaded with the first list of a kind: not while a graph is captured."""
        loaded: list[tuple[int, ...]] = []

        def item(_call: Any, _target: Any, out: torch.Tensor, operands: tuple[torch.Tensor, ...], *_: Any) -> None:
            loaded.append((out.numel(), *(x.numel() for x in operands)))

        class Kernel:
            def __getitem__(self, grid: tuple[int]) -> Any:
                return lambda *_, **__: None

        monkeypatch.setattr(backend, "_ALONE", set())
        monkeypatch.setattr(backend, "_may_be_captured", lambda _: True)
        monkeypatch.setattr(backend, "_item", item)
        monkeypatch.setattr(backend.kernels, "listed", Kernel())
        for dtype in (torch.float32, torch.float32, torch.bfloat16):
            rows = [(torch.zeros(2, 4, dtype=dtype),) * 2] * 2
            call = Call("add", [row[0] for row in rows], rows, (0.5,), False, 0, [0] * 2, 0, None)
            for _, work in backend._works(call, backend._Target(0, 4)):
                work()
        assert loaded == [(0, 0, 0)] * 2

    def test_not_in_a_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It would read the table again when it is replayed."""
        monkeypatch.setattr(backend, "_is_captured", lambda _: True)
        assert self.works([(torch.zeros(4),) * 2] * 2) == [[0], [1]]


def test_numbers_compile_nothing(launches: Any) -> None:
    found = [launch for case in SAME for launch in launches("cuda:90", case)]
    assert len({launch["number"] for launch in found}) == 1
    for case, launch in zip(SAME, found, strict=True):
        assert launch["grid"] == [-(-case["n"] // 2048)]
        *_, n, first, stream, seed = launch["scalars"]
        assert n == case["n"]
        assert (first % 2**64, stream % 2**64, seed % 2**64) == (case.get("offset", 0), *(case.get("seed", 0),) * 2)


def test_dimensions_that_are_one() -> None:
    """Tensors of equal strides are as good as flat ones, in any order of their dimensions, but for random bits."""
    x = torch.zeros(6, 5, 4)
    sizes_and_steps = backend._dims
    assert sizes_and_steps([x, x], indexed=True) == [(120, (1, 1, 1))]
    assert sizes_and_steps([x.permute(2, 0, 1), x.permute(2, 0, 1)], indexed=False) == [(120, (1, 1))]
    assert sizes_and_steps([x.transpose(0, 2)] * 2, indexed=True) == [
        (6, (20, 20, 1)),
        (5, (4, 4, 6)),
        (4, (1, 1, 30)),
    ]
    assert sizes_and_steps([x[:, :, 1:], x[:, :, :3]], indexed=True) == [(30, (4, 4, 3)), (3, (1, 1, 1))]
    assert sizes_and_steps([x[:, 0], x[0, 0].expand(6, 4)], indexed=False) == [(6, (20, 0)), (4, (1, 1))]
    assert backend._split(sizes_and_steps([x.permute(2, 1, 0)], indexed=True)) == (
        [(4, (1, 30))],
        (6, (20, 1)),
        (5, (4, 6)),
    )


@pytest.mark.parametrize(
    ("version", "capability", "available"),
    [("3.6.0", (10, 0), False), ("3.6.0", (9, 0), True), ("3.7.1", (10, 0), True), ("3.10.0+git", (12, 0), True)],
)
def test_a_release_that_fuses_is_refused(
    version: str, capability: tuple[int, int], available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
    monkeypatch.setattr(triton.backends, "backends", {"nvidia": active})
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability if i else (8, 0))
    status = backend.status.__wrapped__("cuda")
    assert status.available == available
    assert ("wanted 3.7 or later" in status.detail) != available
    assert not backend.status.__wrapped__("xpu").available


class TestErrors:
    """What is said when the second of three launches fails; no launch happens here."""

    def fail(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> str:
        launched: list[torch.Tensor] = []

        def launch(out: torch.Tensor, *_: Any) -> None:
            launched.append(out)
            if len(launched) == 2:
                raise error

        monkeypatch.setattr(backend, "_target", lambda _: backend._Target(0, 4))
        monkeypatch.setattr(backend, "_launch", launch)
        rows = [(torch.zeros(n + 1, dtype=torch.bfloat16)[1:], torch.zeros(n)) for n in (0, 3, 5, 7)]
        call = Call("add", [row[0] for row in rows], rows, (0.5,), False, 0, [0] * 4, 0, None)
        with pytest.raises(RuntimeError) as raised:
            backend.run(call)
        assert len(launched) == 2
        assert raised.value.__cause__ is error
        assert isinstance(raised.value, torch.OutOfMemoryError) == isinstance(error, torch.OutOfMemoryError)
        return str(raised.value)

    def test_an_error_of_the_launch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.fail(ValueError("Triton Error [CUDA]: invalid argument"), monkeypatch) == (
            "add of 4 tensor(s) on cpu, at tensor 2 of 5 elements, bfloat16 from bfloat16 float32, others are queued, "
            "its own target may have changed: ValueError: Triton Error [CUDA]: invalid argument"
        )

    def test_an_error_of_a_list(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the second of two launches for tensors that are in two tables."""
        launched: list[list[int]] = []

        def launch(_call: Any, _target: Any, items: list[int]) -> None:
            launched.append(items)
            if len(launched) == 2:
                raise ValueError("no")

        monkeypatch.setattr(backend, "_target", lambda _: backend._Target(0, 4))
        monkeypatch.setattr(backend, "_listed", launch)
        monkeypatch.setattr(backend.kernels, "ITEMS", 2)
        rows = [(torch.zeros(n), torch.zeros(n)) for n in (0, 3, 5, 7, 9)]
        call = Call("add", [row[0] for row in rows], rows, (0.5,), False, 0, [0] * 5, 0, None)
        with pytest.raises(RuntimeError) as raised:
            backend.run(call)
        assert launched == [[1, 2], [3, 4]]
        assert str(raised.value) == (
            "add of 5 tensor(s) on cpu, at tensor 3 of 7 elements and 1 more, float32 from float32 float32, others are "
            "queued, its own target may have changed: ValueError: no"
        )

    def test_no_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the kind that torch raises, so that programs which look for it find it."""
        message = self.fail(torch.OutOfMemoryError("Tried to allocate 2.00 GiB"), monkeypatch)
        assert message.endswith("its own target may have changed: OutOfMemoryError: Tried to allocate 2.00 GiB")


@cases(NEAREST, RANDOM, gpus="hip")
def test_amd(target: str, case: Case, launches: Any) -> None:
    (launch,) = launches(target, case)
    code = launch["code"]
    out, *operands = (WIDTH[dtype] for dtype in case["dtypes"])
    assert count(code, r"(global|buffer)_load_dwordx4") == sum(operands)
    assert count(code, r"(global|buffer)_store_dwordx4") == out
    assert not count(code, r"v_(pk_)?(fma|fmac|mad|mac)_(mix\w*_)?(legacy_)?f(16|32|64)\w*")
    assert launch["spilled"] == 0
    assert launch["denormals"] == [3, 3]  # kept: of float32, and of float16 and float64
