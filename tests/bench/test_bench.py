"""The benchmark: it measures what it says, in the promised form, and times nothing that is wrong."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ires_kernels.backends import native, reference
from ires_kernels.backends.call import Call
from ires_kernels.bench import __main__ as bench
from ires_kernels.bench import arguments as arguments_of
from ires_kernels.bench import floor, fp8, kernels, mappings, merges, outlook, parts, quantized, start
from ires_kernels.bench.contenders import CHUNKED, COMPILED, EAGER, UPCAST, torch_contenders
from ires_kernels.bench.measure import Quartiles, interleave, machine, private_memory, ratio, watch
from ires_kernels.bench.synthetic import SHAPES, Shape, write_triple

QUICK = ["--threads", "1", "--rounds", "2", "--no-compile"]
BF16 = ["--cases", "^add_difference bf16$", "--size", "20K"]


def break_native(monkeypatch, op):
    """From now on native kernels get the last element of every `op` wrong by one bit."""
    right = native.run

    def wrong(call: Call) -> None:
        right(call)
        if call.op == op:
            call.outs[0].view(-1)[-1:].view(torch.uint8)[0] ^= 1

    monkeypatch.setattr(native, "run", wrong)


def quartiles_of(contender, other):
    found = contender["ratios"][other]
    assert 0 < found["low"] <= found["median"] <= found["high"]
    return found


def test_kernels(tmp_path, capsys):
    path = tmp_path / "k.json"
    assert bench.main(["kernels", *QUICK, "--size", "20K", "--gates", "--json", f"{path}"]) == 0
    record = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert "equal the reference bit for bit" in printed
    assert record["verified"][0] in printed
    assert [entry["case"] for entry in record["kernels"]] == [case.name for case in kernels.CASES]
    assert record["merges"] == []
    for entry in record["kernels"]:
        assert entry["elements"] == 20_000
        assert entry["case"] in printed
        wanted = {*kernels.ours(), CHUNKED} | ({kernels.MEMORY} if native.isas() else set())
        wanted |= set() if "stochastic" in entry["case"] else {EAGER, UPCAST}
        assert set(entry["contenders"]) == wanted
        for contender in entry["contenders"].values():
            assert len(contender["seconds"]) == 2
            quartiles_of(contender, CHUNKED)
            if native.isas():
                quartiles_of(contender, kernels.MEMORY)
        for comparison in entry["comparisons"]:
            assert set(comparison) == {"what", "measured", "wanted", "reach", "at_most"}
            assert comparison in record["comparisons"]
            assert not comparison["at_most"]
            assert comparison["what"] in printed
    bf16 = record["kernels"][0]["comparisons"]
    whats = [f"add_difference bf16, threads 1: {kernels.ours()[0]}, speed / {name}" for name in (EAGER, CHUNKED)]
    assert [each["what"] for each in bf16][-2:] == whats
    assert [(each["wanted"], each["reach"]) for each in bf16][-2:] == [(3.5, 4.5), (2.5, 3.4)]
    assert set(record["machine"]) >= {"cpu", "flags", "cores", "memory_bytes", "kernel", "versions", "commit", "load"}


def test_quantized_weights(tmp_path):
    path = tmp_path / "q.json"
    assert bench.main(["quantized", *QUICK, "--size", "500K", "--json", f"{path}"]) == 0
    record = json.loads(path.read_text())
    assert record["kernels"] == []
    assert [entry["case"] for entry in record["quantized"]] == [case.name for case in quantized.CASES]
    for entry in record["quantized"]:
        assert entry["elements"] == 500_000 // quantized.WIDTH * quantized.WIDTH
        for contender in entry["contenders"].values():
            if native.isas():
                quartiles_of(contender, kernels.MEMORY)
    if native.isas():
        assert record["quantized"][0]["bytes_per_element"] == 6


def test_merges(tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    arguments = ["merge", "--size", "tiny", "--sizes", "500K", "--rounds", "1", "--dir", f"{work}", "--json", "-"]
    assert bench.main(arguments) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert "equal the reference bit for bit" in err
    assert record["kernels"] == []
    first, second = record["merges"]
    assert first["parameters"] == 131_392
    assert first["model_bytes"] == 2 * 131_392
    floor = [merges.FLOOR] if native.isas() else []
    jobs = [
        merges.COPY, *floor, merges.ONE_PASS, merges.BARE, merges.SYNCED, merges.EXTRACT, merges.APPLY, merges.RING,
        merges.RING_SYNCED,
    ]  # fmt: skip
    assert list(first["contenders"]) == jobs
    assert list(second["contenders"]) == jobs[: 3 + len(floor)]
    for entry in record["merges"]:
        assert entry["contenders"][merges.ONE_PASS]["private_memory_bytes"] > 0
        for contender in entry["contenders"].values():
            quartiles_of(contender, merges.COPY)
    of_floor = [1.5] if floor else []
    wanted = [256, 1.0, *of_floor, 0.6, 256, 1.0, *of_floor, 0.6, 0.15]
    assert [comparison["wanted"] for comparison in record["comparisons"]] == wanted
    assert all(comparison["at_most"] for comparison in record["comparisons"])
    assert list(work.iterdir()) == []


def test_fp8(tmp_path):
    path = tmp_path / "f.json"
    arguments = ["fp8", "--size", "tiny", "--rounds", "2", "--dir", f"{tmp_path}", "--json", f"{path}"]
    assert bench.main(arguments) == 0
    (entry,) = json.loads(path.read_text())["fp8"]
    ours, by_hand = [fp8.ONE_PASS, fp8.BARE, fp8.RING], [fp8.BY_HAND, fp8.TO_BF16, fp8.BY_HAND_TO_BF16]
    assert list(entry["contenders"]) == ours + by_hand
    assert 0 < entry["compared"] < entry["parameters"]
    assert entry["fp8_bytes"] < entry["model_bytes"]
    assert [each["wanted"] for each in entry["comparisons"]] == [0.1, 0.1]
    assert [each.name for each in tmp_path.iterdir()] == ["f.json"]


def test_mapped(tmp_path, capsys):
    path = tmp_path / "m.json"
    arguments = ["mapped", "--size", "tiny", "--rounds", "2", "--dir", f"{tmp_path}", "--json", f"{path}"]
    assert bench.main(arguments) == 0
    out, _ = capsys.readouterr()
    assert "bytes equal those that apply makes" in out
    (entry,) = json.loads(path.read_text())["mapped"]
    assert entry["model_bytes"] == 2 * 131_392
    assert list(entry["contenders"]) == [name for name in mappings.JOBS if name != merges.FLOOR or native.isas()]
    for contender in entry["contenders"].values():
        quartiles_of(contender, merges.BARE)
    assert [each["wanted"] for each in entry["comparisons"]] == [1.0, *([1.5] if native.isas() else [])]
    assert [each.name for each in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize(("what", "text"), [("compare", "as by the definition"), ("live", "and those from before")])
def test_compare_and_live(tmp_path, capsys, what, text):
    path = tmp_path / "c.json"
    assert bench.main([what, "--size", "tiny", "--rounds", "1", "--dir", f"{tmp_path}", "--json", f"{path}"]) == 0
    assert text in capsys.readouterr().out
    (entry,) = json.loads(path.read_text())["looked"]
    assert entry["model_bytes"] == 2 * 131_392
    assert all(len(each["seconds"]) == 1 for each in entry["contenders"].values())
    assert [each.name for each in tmp_path.iterdir()] == ["c.json"]


def test_start(tmp_path, monkeypatch, capsys):
    every = start.commands
    few = (start.TORCH, "ires --help", "ires apply --in-place --dry-run")
    monkeypatch.setattr(start, "commands", lambda *where: {name: every(*where)[name] for name in few})
    path = tmp_path / "s.json"
    assert bench.main(["start", "--rounds", "1", "--dir", f"{tmp_path}", "--json", f"{path}"]) == 0
    (entry,) = json.loads(path.read_text())["start"]
    assert "3 commands end as they should" in capsys.readouterr().out
    torch_only, *peaks = (contender["peak_memory_bytes"] for contender in entry["contenders"].values())
    assert len(peaks) == 2
    assert 2 * max(peaks) < torch_only
    assert [each["wanted"] for each in entry["comparisons"]] == 2 * [start.SECONDS, start.MEGABYTES]
    assert [each.name for each in tmp_path.iterdir()] == ["s.json"]


def test_commands_that_end_otherwise_are_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(start, "commands", lambda *_: {"help": start.Command(("--help",), 2)})
    assert bench.main(["start", "--dir", f"{tmp_path}"]) == 1
    assert "help ended with 0, wanted 2" in capsys.readouterr().err


def test_wrong_mapping_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mappings, "change", lambda *_, **__: None)
    assert bench.main(["mapped", "--size", "tiny", "--dir", f"{tmp_path}"]) == 1
    assert "differs from what apply makes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_it_takes_is_said_first_and_all_of_it_is_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(start, "commands", lambda *_: {start.TORCH: start.Command(("--version",))})
    path = tmp_path / "p.svg"
    assert bench.main(["all", *QUICK, *BF16, "--size", "tiny", "--dir", f"{tmp_path}", "--plot", f"{path}"]) == 0
    assert path.read_text().count("<svg") == 1
    said = capsys.readouterr().out.partition("verified")[0].splitlines()[-5:]
    assert [line.partition(", where")[0] for line in said] == [
        "kernels: 1 of 131,392 elements, threads [1]: less than a minute, 0.00315 GB of memory",
        "quantized: 4 formats of 131,392 elements, threads [1]: less than a minute, 0.000526 GB of memory",
        f"merge: models of 0.000263 GB: less than a minute, 0.0021 GB of disk in {tmp_path}",
        f"mapped: models of 0.000263 GB: less than a minute, 0.00171 GB of disk in {tmp_path}",
        "start: commands that have little to do: less than a minute",
    ]
    assert all(line.endswith(" GB are free") for line in said[2:4])


def test_quick(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arguments_of, "_QUICK_ELEMENTS", 1 << 16)
    monkeypatch.setattr(arguments_of, "_QUICK_MODEL", 300_000)
    path = tmp_path / "r.json"
    assert bench.main(["--quick", "--threads", "1", "--dir", f"{tmp_path}", "--json", f"{path}"]) == 0
    out = capsys.readouterr().out
    assert "kernels: 2 of 65,536 elements, threads [1]: less than a minute" in out
    assert "Wanted, hoped for" not in out, "gates are for developers"
    report = json.loads(path.read_text())
    assert [entry["what"] for entry in report["kernels"]] == [
        "add_difference bf16, threads 1",
        "add bf16 + f32, threads 1",
    ]
    assert len(report["merges"]) == 1
    assert [] == report["mapped"] == report["start"] == report["quantized"]
    assert report["comparisons"], "JSON has them all the same"


def test_quick_takes_what_it_says():
    asked = arguments_of.parse(["--quick"])
    ahead = [*parts.ahead(asked)]
    assert sum(each.seconds for each in ahead) < 25
    assert sum(each.memory for each in ahead) + sum(each.disk for each in ahead) < 2e9
    assert asked.rounds == 3
    assert arguments_of.parse(["--quick", "--rounds", "5"]).rounds == 5


def test_minutes():
    large, small = SHAPES["llama-1b"], SHAPES["tiny"]
    assert (
        outlook.of_merges([large, small], 7)
        .line("/")
        .startswith("merge: models of 2.47, 0.000263 GB: about 4 minutes, ")
    )
    assert ": about 1 minute, " in outlook.of_merges([large], 2).line("/")
    with_compiler, without = (outlook.of_kernels(kernels.CASES, 1 << 27, [1, 2], 7, compiled=x) for x in (True, False))
    assert with_compiler.seconds - without.seconds == 200


def test_the_disk_is_that_of_the_largest_moment(tmp_path):
    shape = Shape.of_parameters(2_500_000)
    triple = write_triple(tmp_path, shape)

    def used():
        return sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))

    with merges.contenders(triple, tmp_path) as ways:
        ways[merges.EXTRACT]()
        assert used() == pytest.approx(outlook.of_merges([shape], 1).disk, rel=0.01)
        shutil.rmtree(tmp_path / "out")
    with mappings.contenders(triple, tmp_path, 1):
        assert used() == pytest.approx(outlook.of_mapped([shape], 1).disk - triple.nbytes / shape.shards, rel=0.01)


@pytest.mark.skipif(not native.isas(), reason="the floor is a compiled loop")
@pytest.mark.parametrize("size", [2, 1 << 20, (9 << 20) + 130])
def test_the_floor_reads_and_writes_all_of_it(tmp_path, size):
    inputs = [tmp_path / name for name in "abc"]
    for number, each in enumerate(inputs):
        each.write_bytes(bytes([1 << number]) * size)
    floor.new_file(inputs, tmp_path / "out", 2)
    floor.over([inputs], 2)
    for made in (tmp_path / "out", inputs[0]):
        assert made.stat().st_size == size
        whole = size // 2 // 64 * 128  # the loop takes 64 elements a step
        assert made.read_bytes()[: min(whole, 1 << 20)] == bytes([7]) * min(whole, 1 << 20)


def test_merges_from_the_disk(tmp_path):
    path = tmp_path / "m.json"
    arguments = ["merge", "--size", "tiny", "--rounds", "1", "--cold", "--dir", f"{tmp_path}", "--json", f"{path}"]
    assert bench.main(arguments) == 0
    record = json.loads(path.read_text())
    assert record["merges"][0]["cold"] is True
    assert [each["wanted"] for each in record["comparisons"]] == [256]  # the others are about a warm cache


@pytest.mark.skipif(not native.isas(), reason="without native kernels there is nothing to hold against the reference")
class TestVerification:
    def test_a_wrong_kernel_is_not_timed(self, monkeypatch, capsys, tmp_path):
        break_native(monkeypatch, "add_difference")
        path = tmp_path / "k.json"
        assert bench.main(["kernels", *QUICK, *BF16, "--json", f"{path}"]) == 1
        out, err = capsys.readouterr()
        assert "wrong result: add_difference bf16: " in err
        assert "differs from the reference backend in 1 of" in err
        assert "memory loop" not in out
        assert not path.exists()

    def test_other_kernels_are_not_blamed(self, monkeypatch):
        break_native(monkeypatch, "scale")
        assert bench.main(["kernels", *QUICK, *BF16]) == 0

    def test_wrong_quantized_weights_are_not_timed(self, monkeypatch, capsys):
        right = native.run_decoded

        def wrong(call: Call, coded) -> bool:
            done = right(call, coded)
            call.outs[0].view(-1)[-1:].view(torch.uint8)[0] ^= 1
            return done

        monkeypatch.setattr(native, "run_decoded", wrong)
        assert bench.main(["quantized", *QUICK, "--size", "10K"]) == 1
        assert "wrong result: add_difference bf16, of fp8-block" in capsys.readouterr().err

    def test_a_wrong_merge_is_not_timed(self, monkeypatch, capsys, tmp_path):
        break_native(monkeypatch, "add_difference")
        assert bench.main(["merge", "--size", "tiny", "--dir", f"{tmp_path}"]) == 1
        out, err = capsys.readouterr()
        assert "differs from the reference backend in 1 of" in err
        assert "model.embed_tokens.weight" in err
        assert "cat + cp" not in out
        assert list(tmp_path.iterdir()) == []

    def test_every_instruction_set_is_checked(self):
        case = kernels.CASES[0]
        assert kernels.verify(case, [1, 2]) == 2 * 2 * len(native.isas())


@pytest.mark.parametrize("case", [case for case in kernels.CASES if not case.stochastic], ids=lambda case: case.name)
def test_torch_contenders_do_the_same_work(case):
    """They may round more than once or fuse, so to within a few units in the last place of float32 or bfloat16."""
    out, operands = kernels.make(case, 70_001)
    wanted = out.clone() if case.op == "subtract" else operands[0].clone()
    case.run(wanted, [wanted, *operands[1:]] if case.op != "subtract" else operands)
    for name, run in torch_contenders(case.op, case.stochastic, 1 << 14).items():
        if name == COMPILED:
            continue
        copies = [operand.clone() for operand in operands]
        got = out.clone() if case.op == "subtract" else copies[0]
        run(got, copies)
        tolerance = 2e-3 if name == EAGER else 2**-8 * 0.1
        torch.testing.assert_close(got.float(), wanted.float(), rtol=2**-7, atol=tolerance, msg=f"{case.name}: {name}")


def test_chunked_stochastic_rounding_is_a_neighbour():
    case = next(case for case in kernels.CASES if case.stochastic)
    out, operands = kernels.make(case, 70_001)
    exact = out.double() + kernels.ALPHA * (operands[1].double() - operands[2].double())
    torch_contenders(case.op, True, 1 << 14)[CHUNKED](out, operands)
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-7 + 1e-8).all()


def test_an_unavailable_compiler_is_reported(monkeypatch, capsys, tmp_path):
    def refuse(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    path = tmp_path / "k.json"
    assert bench.main(["kernels", "--threads", "1", "--rounds", "1", *BF16, "--json", f"{path}"]) == 0
    (entry,) = json.loads(path.read_text())["kernels"]
    assert entry["unavailable"] == {COMPILED: "RuntimeError: no C++ compiler"}
    assert "not measured: compiled: RuntimeError: no C++ compiler" in capsys.readouterr().out


def test_without_native_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "isas", list)
    path = tmp_path / "k.json"
    assert bench.main(["kernels", *QUICK, *BF16, "--json", f"{path}"]) == 0
    (entry,) = json.loads(path.read_text())["kernels"]
    assert "reference" in entry["contenders"]
    assert kernels.MEMORY in entry["unavailable"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "--size", "much"], "got size 'much'"),
        (["merge", "--size", "1K"], "at least"),
        (["merge", "--sizes", "tiny,10"], "at least"),
        (["kernels", "--rounds", "0"], "got 0, wanted 1 or more"),
        (["kernels", "--threads", "1,0"], "got 0, wanted 1 or more"),
        (["kernels", "--cases", "("], "unterminated"),
        (["kernels", "--cases", "bf17"], "--cases bf17: got a pattern of no case, wanted one of ['add_"),
        (["all", "--cases", "bf17"], "--cases bf17: got a pattern of no case"),
        (["merge", "--cases", "bf16"], "--cases bf16: chooses kernels, for kernels, all and gpu; merge has none"),
        (["mapped", "--cases", "bf16"], "mapped has none"),
        (["merge", "--dir", "/no/such/folder"], "--dir /no/such/folder: wanted a folder that exists"),
        (["everything"], "invalid choice: 'everything' (choose from"),
        (["start", "--quick"], "--quick is of kernels and merge, not of start"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_other_devices(capsys):
    assert bench.main(["kernels", "--device", "cuda"]) == 2
    assert "cuda" in capsys.readouterr().err
    assert bench.main(["kernels", "--device", "abacus"]) == 2
    assert "abacus" in capsys.readouterr().err


def test_as_a_module_without_matplotlib():
    code = """
import runpy, sys
sys.argv[1:] = ["kernels", "--threads", "1", "--rounds", "1", "--no-compile", "--cases", "^subtract", "--size", "10K",
                "--json", "-"]
try:
    runpy.run_module("ires_kernels.bench", run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
assert not {"matplotlib", "transformers", "pytest", "safetensors"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["kernels"][0]["case"] == "subtract f32 = bf16 - bf16"


class TestMeasure:
    def test_contenders_take_turns_and_the_slow_sit_out(self, monkeypatch):
        clock, log = [0.0], []
        monkeypatch.setattr("ires_kernels.bench.measure.time.perf_counter", lambda: clock[0])

        def way(name, seconds):
            def run():
                log.append(name)
                clock[0] += seconds

            return run

        cleared = []
        times = interleave({"a": way("a", 1), "b": way("b", 2), "c": way("c", 9)}, 5, after=cleared.append)
        assert "".join(log) == "abc" + "bca" + "cab" + "ab" + "ba"
        assert cleared == log
        assert times == {"a": [1.0] * 5, "b": [2.0] * 5, "c": [9.0] * 3}
        assert ratio(times, "c", "a") == Quartiles(9, 9, 9, 3)
        assert ratio(times, "a", "missing") is None

    def test_who_is_out_stays_out(self):
        of_a = [1, 1, 1, 5, 5, 5, 5, 5, 5]
        seconds = {"a": iter(of_a), "b": iter([9] * 9)}
        times = interleave({name: name.__str__ for name in seconds}, 9, timer=lambda run: next(seconds[run()]))
        assert times == {"a": of_a, "b": [9] * 3}

    def test_ratios_are_of_the_same_round(self):
        assert ratio({"a": [2, 40, 8], "b": [1, 10, 1]}, "a", "b") == Quartiles(3, 4, 6, 3)

    def test_private_memory_of_a_process(self):
        done = watch([sys.executable, "-c", "x = bytearray(100_000_000); import time; time.sleep(0.2); print('done')"])
        assert 100_000_000 <= done.peak < 150_000_000
        assert (done.code, done.output) == (0, "done\n")
        assert done.seconds > 0.2
        assert private_memory() > 1_000_000
        assert private_memory(2**30) == 0

    def test_pages_of_files_are_not_private(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(bytes(50_000_000))
        code = (
            "import mmap, sys, time; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
        )
        code += "sum(m[i] for i in range(0, len(m), 4096)); time.sleep(0.1)"
        assert watch([sys.executable, "-c", code, f"{path}"]).peak < 30_000_000

    def test_a_failing_process(self):
        assert watch([sys.executable, "-c", "raise SystemExit('why')"])[2:] == (1, "why\n")

    def test_machine_is_json(self):
        assert json.loads(json.dumps(machine()))["cores"] >= 1


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(f"{Path(__file__).parents[2] / 'bench'}")
    return importlib.import_module("peers")


class TestPeers:
    """bench/peers.py, whose reference judges everyone's results."""

    def test_rounds_once(self, peers):
        rng = np.random.default_rng(0)
        spread = rng.standard_normal(100_000) * 10.0 ** rng.uniform(-44, 37, 100_000)
        halves = (rng.integers(0, 0x7F7F, 100_000).astype(np.uint32) << 16 | 0x8000).view(np.float32).astype(np.float64)
        near = [halves, -halves, np.nextafter(halves, np.inf), np.nextafter(halves, 0)]
        for x in (spread, *near):
            wanted = reference.round_to(torch.from_numpy(x), torch.bfloat16)
            assert np.array_equal(peers.to_bf16(x).view(np.int16), wanted.view(torch.int16).numpy())

    def test_differing_counts_values(self, peers):
        a = np.array([0x0000, 0x8000, 0x3F80, 0x3F80], np.uint16)
        b = np.array([0x8000, 0x8000, 0x3F80, 0x3F81], np.uint16)
        assert peers.differing(a, b) == 1

    def test_checks_every_element(self, peers, tmp_path):
        triple, out, reference = write_triple(tmp_path, "tiny"), tmp_path / "out", tmp_path / "reference"
        peers.write_reference(triple, reference)
        ours, *_, loop = peers.list_contenders(triple, out, None)
        peers.check(ours, triple, reference, out)
        assert (ours.failure, ours.elements, ours.differs, ours.missing) == ("", 131_392, 0, [])
        codes = np.fromfile(reference, np.uint16)
        codes[[0, -1]] ^= 1
        codes.tofile(reference)
        peers.check(loop, triple, reference, out)
        assert (loop.failure, loop.elements, loop.differs, loop.missing) == ("", 131_392, 2, [])
        ours.command[-1] = "--no-such-option"
        peers.check(ours, triple, reference, out)
        assert "exited with 2" in ours.failure
        assert not out.exists()

    @pytest.mark.slow
    def test_run(self, peers, monkeypatch, tmp_path, capsys):
        path = tmp_path / "p.json"
        arguments = ["peers.py", "--no-mergekit", "--size", "tiny", "--rounds", "1", "--dir", f"{tmp_path}"]
        monkeypatch.setattr(sys, "argv", [*arguments, "--json", f"{path}"])
        assert peers.main() == 0
        record = json.loads(path.read_text())
        (entry,) = record["merges"]
        assert entry["unavailable"] == {}
        copied, *merged = entry["contenders"].values()
        assert len(merged) == 4
        assert {(each["elements"], each["differs"], len(each["missing"])) for each in merged} == {(131_392, 0, 0)}
        assert "differs" not in copied
        assert [entry.name for entry in tmp_path.iterdir()] == ["p.json"]
        assert "PyTorch loop" in capsys.readouterr().out
