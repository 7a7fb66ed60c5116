"""Models as tensors over the pages of their files: what they are, and what cannot be done to them."""

from __future__ import annotations

import copy
import doctest
import errno
import gc
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import ends
from safetensors.torch import load_file, save_file
from small_models import normal, raw, read_model, same, snapshot, triple, write_model, write_raw

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.tensors import regions

SHAPES = {"a.weight": (24, 16), "b.weight": (7, 3), "c.bias": (5,), "scalar": (), "empty": (0, 4)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tensors = {name: normal(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
    return write_model(tmp_path / "model", tensors, config={"model_type": "llama"})


# What is served


@pytest.mark.parametrize("shards", [1, 3])
def test_serves_every_tensor_in_the_order_of_the_files(tmp_path: Path, shards: int) -> None:
    path, *_ = triple(tmp_path, shards=shards)
    wanted = {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}
    with ik.mapped(path) as model:
        assert list(model) == list(model.checkpoint.tensors)
        assert set(model) == set(wanted)
        assert len(model) == 7
        assert all(same(model[name], wanted[name]) for name in wanted)
        assert "lm_head.weight" in model
        assert "other" not in model
        assert model.get("other") is None
        with pytest.raises(KeyError, match="'other' is not in"):
            model["other"]
        assert model != ik.mapped(path), "comparing would compare tensors"


def test_serves_a_single_file(model: Path) -> None:
    file = model / "model.safetensors"
    with ik.mapped(f"{file}") as served:
        assert {name: t.shape for name, t in served.items()} == {n: torch.Size(s) for n, s in SHAPES.items()}
        assert all(same(served[name], t) for name, t in load_file(file).items())


def test_serves_the_dtypes_of_safetensors_that_torch_has(tmp_path: Path) -> None:
    dtypes = [
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "complex64",
        "float8_e5m2fnuz", "bool", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
    ]  # fmt: skip
    tensors = {}
    for name in dtypes:
        dtype = getattr(torch, name)
        values = torch.arange(24) % (2 if name == "bool" else 250)
        tensors[name] = values.to(torch.uint8).repeat_interleave(dtype.itemsize).view(dtype).view(2, 3, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    wanted = load_file(tmp_path / "model.safetensors")
    with ik.mapped(tmp_path) as served:
        assert all(same(served[name], t) for name, t in wanted.items())
        assert all(not t.data_ptr() % t.element_size() for t in served.values())


def test_serves_what_torch_has_no_dtype_for_as_bytes(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"w": ("F4", [2, 8], bytes(range(8)))})
    with ik.mapped(tmp_path) as served:
        assert same(served["w"], torch.arange(8, dtype=torch.uint8))
        with pytest.raises(TypeError, match=r"t has dtype torch.uint8, .*; it is 'w' of .*, whose F4 torch does not"):
            ik.scale(served["w"], 2.0)
    with pytest.raises(TypeError, match=r"float8_e5m2$"):
        ik.scale(torch.ones(3, dtype=torch.uint8), 2.0)


@pytest.mark.parametrize("pad", range(8))
def test_serves_any_offset(tmp_path: Path, pad: int) -> None:
    tensors = {
        "byte": torch.ones(1, dtype=torch.int8),
        "half": normal((5,), 1),
        "float": normal((3, 2), 2, torch.float32),
        "double": normal((4,), 3, torch.float64),
    }
    codes = {"byte": "I8", "half": "BF16", "float": "F32", "double": "F64"}
    entries = {name: (codes[name], list(t.shape), raw(t)) for name, t in tensors.items()}
    write_raw(tmp_path / "model.safetensors", entries, pad=pad)
    with ik.mapped(tmp_path) as served:
        for name, t in tensors.items():
            assert same(served[name], t)
            assert not served[name].data_ptr() % t.element_size()
            with pytest.raises(RuntimeError, match=r"inference tensor|mapped read-only"):
                ik.scale_(served[name], 2.0) if name != "byte" else served[name].zero_()


def test_reads_nothing_before_it_is_touched(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "model.safetensors", {"w": ("U8", [1 << 24], bytes(1 << 24))})
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    with ik.mapped(file) as served:
        before = resident()
        w = served["w"]
        assert w.shape == (1 << 24,)
        assert resident() - before < 1 << 20
        assert not w.any()
        assert resident() - before > 1 << 23


def resident() -> int:
    """Bytes of files in the memory of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssFile"))


# What is refused


def test_validates_headers_as_everywhere(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated: 1 bytes missing"):
        ik.mapped(model)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        ik.mapped(model / "other")


def test_looks_at_the_file_that_is_mapped(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ires_kernels.memory import mapping

    def opened_late(path: Path) -> int:
        os.truncate(path, 8)
        return os.open(path, os.O_RDONLY)

    monkeypatch.setattr(mapping, "open_file", opened_late)
    with pytest.raises(CheckpointError, match="changed while it was opened"):
        ik.mapped(model)


def test_our_operations_do_not_write_what_is_read_only(model: Path, backend: str) -> None:
    before = snapshot(model)
    with ik.mapped(model) as served:
        t, ordinary = served["a.weight"], normal((24, 16), 5)
        message = r"t is 'a.weight' of .*model.safetensors, which is mapped read-only"
        for write in (
            lambda: ik.add_(t, ordinary),
            lambda: ik.add_difference_(t, ordinary, ordinary),
            lambda: ik.scale_(t, 2.0),
            lambda: ik.scale_(t[3:, ::2], 2.0),
            lambda: ik.scale_(t.detach(), 2.0),
        ):
            with pytest.raises(RuntimeError, match=message):
                write()
        with pytest.raises(RuntimeError, match=r"out is 'a.weight'.*mapped read-only"):
            ik.add(ordinary, ordinary, out=t)
        with pytest.raises(RuntimeError, match=r"t\[1\] is 'b.weight'"):
            ik.add_([ordinary, served["b.weight"]], [ordinary, served["b.weight"]])
        with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
            ik.scale_(t, 2.0)
        assert same(t, load_file(model / "model.safetensors")["a.weight"])
    assert snapshot(model) == before, backend


def test_torch_does_not_write_what_is_read_only(model: Path) -> None:
    with ik.mapped(model) as served:
        t = served["a.weight"]
        for write in (
            lambda: t.add_(1),
            lambda: t.__setitem__(0, 1),
            lambda: t.view(-1).zero_(),
            lambda: torch.add(t, t, out=t),
            lambda: torch._foreach_add_([t], 1.0),
            lambda: t.copy_(t.clone()),
        ):
            with pytest.raises(RuntimeError, match="inference tensor"):
                write()


def test_what_gets_past_torch_stays_in_the_process(model: Path) -> None:
    before = snapshot(model)
    with ik.mapped(model) as served:
        t = served["a.weight"]
        t.detach().zero_()
        t.view(torch.uint8).numpy()[:] = 7
        with torch.inference_mode():
            t.add_(1)
    assert snapshot(model) == before
    with ik.mapped(model) as served:
        assert same(served["a.weight"], load_file(model / "model.safetensors")["a.weight"])


def test_says_that_a_file_changed_meanwhile(model: Path) -> None:
    file = model / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"model.safetensors: changed or went away"), ik.mapped(model):
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ZeroDivisionError), ik.mapped(model):  # the error that ends a block is the one that is told
        divide(len(os.listdir(model)), file.unlink())


def divide(number: int, _: None) -> float:
    return number / 0


# Operations


@pytest.mark.parametrize("listed", [False, True])
def test_operations_take_mapped_operands(tmp_path: Path, backend: str, listed: bool) -> None:
    paths = triple(tmp_path, shards=2)
    base, instruct, target = (
        {k: t for f in sorted(p.glob("*.safetensors")) for k, t in load_file(f).items()} for p in paths
    )
    wanted = {name: ik.add_difference(target[name], instruct[name], base[name], 0.7) for name in base}
    with ik.mapped(paths[0]) as b, ik.mapped(paths[1]) as i:
        if listed:
            ik.add_difference_([target[n] for n in b], [i[n] for n in b], [b[n] for n in b], 0.7)
        for name in b:
            if not listed:
                ik.add_difference_(target[name], i[name], b[name], 0.7)
            assert same(target[name], wanted[name]), backend
            assert not ik.subtract(i[name], b[name]).is_inference()


def test_ordinary_tensors_come_of_clones(model: Path) -> None:
    with ik.mapped(model) as served:
        t = served["a.weight"].clone()
        assert not t.is_inference()
        assert not served["a.weight"].to(torch.float32).is_inference()
    ik.scale_(t, 2.0)
    assert torch.equal(t, 2 * load_file(model / "model.safetensors")["a.weight"])


def test_a_file_that_is_cut_is_an_error_of_our_operations(tmp_path: Path) -> None:
    # In a child: what touches the memory without looking first is killed by SIGBUS.
    file = write_model(tmp_path / "model", {"w": normal((1 << 16,), 1)}) / "model.safetensors"

    def use() -> None:
        w = ik.mapped(file)["w"]
        os.truncate(file, 4096)
        with pytest.raises(OSError, match="cannot be read or written where it is mapped: it was cut") as caught:
            ik.subtract(w, torch.ones(1 << 16))
        assert caught.value.filename == f"{file}"

    assert ends(use) == 0


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    ik.apply(target, (instruct, base), alpha=0.7, out=tmp_path / "wanted")
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(ik.mapped, "mapped", globs={"ik": ik})
    assert len(example.examples) == 1
    assert doctest.DocTestRunner().run(example).failed == 0
    assert all(same(t, read_model(tmp_path / "wanted")[name]) for name, t in read_model(target).items())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("part", [100, 1500, 5000])
def test_much_is_done_in_parts(
    tmp_path: Path, backend: str, rounding: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ires_kernels.tensors import launch

    base, instruct, _ = triple(tmp_path)
    with ik.mapped(base) as b, ik.mapped(instruct) as i:
        operands = [[x[name] for name in b] for x in (i, b)]
        apart = [[x.clone() for x in column] for column in operands]
        options = {"rounding": rounding, "seed": 3, "offset": 5, "dtype": torch.bfloat16}
        tally, wanted_tally = ik.Tally(), ik.Tally()
        with monkeypatch.context() as patch:
            patch.setattr(regions, "is_any", lambda: False)
            wanted = ik.subtract(*apart, tally=wanted_tally, **options)
            ik.scale_(apart[0], 0.7, rounding=rounding)
        monkeypatch.setattr(launch, "_PART", part)
        found = ik.subtract(*operands, tally=tally, **options)
        assert all(same(x, y) for x, y in zip(found, wanted, strict=True)), backend
        counts = ("elements", "updates", "lost", "nan_in")
        assert [getattr(tally, name) for name in counts] == [getattr(wanted_tally, name) for name in counts]
        assert ik.subtract([], []) == []
        ordinary = [x.clone() for x in operands[0]]
        ordinary[1] = ordinary[1].t().contiguous().t()  # this one is not cut
        ik.scale_(ordinary, 0.7, rounding=rounding)
        assert all(same(x, y) for x, y in zip(ordinary, apart[0], strict=True))


# Afterwards


def test_tensors_that_are_held_after_closing(model: Path) -> None:
    with ik.mapped(model) as served:
        t = served["a.weight"]
    assert served.closed
    assert "closed" in repr(served)
    served.close()
    with pytest.raises(ValueError, match="was asked for after it was closed"):
        served["a.weight"]
    with pytest.raises(ValueError, match="is closed"), served:
        pass
    for use in (lambda: ik.scale_(t, 2.0), lambda: ik.scale(t, 2.0), lambda: ik.subtract(normal((24, 16), 1), t)):
        with pytest.raises(RuntimeError, match=r"is 'a.weight' of .*, which is closed"):
            use()
    assert same(t, load_file(model / "model.safetensors")["a.weight"])


def test_memory_goes_with_its_last_tensor(model: Path) -> None:
    gc.collect()
    known = len(regions._known[1])
    served = ik.mapped(model)
    t = served["a.weight"][1:]
    served.close()
    del served
    assert len(regions._known[1]) == known + 1
    assert maps(model)
    address = t.data_ptr()
    del t
    gc.collect()
    assert len(regions._known[1]) == known
    assert not maps(model)
    assert regions.problem(address, True) is None


def maps(model: Path) -> bool:
    return f"{model}" in Path("/proc/self/maps").read_text()


def test_is_neither_copied_nor_sent(model: Path) -> None:
    with ik.mapped(model) as served:
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or sent; map"):
                copied(served)


def test_takes_no_descriptors(model: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with ik.mapped(model):
        assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_crashes_as_the_interpreter_ends(model: Path) -> None:
    program = (
        "import sys, ires_kernels as ik\n"
        "m = ik.mapped(sys.argv[1])\n"
        "held = [m, m['a.weight'], ik.mapped(sys.argv[1])['b.weight']]\n"
        "class Late:\n"
        "    def __del__(self): print(float(held[1].float().sum()))\n"
        "late = Late()\n"
        "import atexit; atexit.register(lambda: print(held[2].shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, f"{model}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_regions_are_found_by_address() -> None:
    class Region:
        def __init__(self, start: int, stop: int) -> None:
            self.start, self.stop = start, stop

        def problem(self, address: int, written: bool) -> str | None:
            return f"{self.start}+{address - self.start}" if written else None

        def note(self, address: int) -> str | None:
            return f"{address}"

        def populate(self, address: int, nbytes: int, written: bool) -> None:
            if nbytes == 3:
                raise OSError(errno.EIO, "cut")
            populated.append((address, nbytes, written))

    populated: list[tuple[int, int, bool]] = []
    found = [Region(start, start + 4) for start in (32, 8, 16)]
    for region in found:
        regions.add(region)
    try:
        told = [regions.problem(address, True) for address in (7, 8, 11, 12, 16, 35, 36)]
        assert told == [None, "8+0", "8+3", None, "16+0", "32+3", None]
        assert regions.problem(8, False) is None
        assert regions.is_any()
        piece = regions._PIECE
        for threads in (1, 3):
            populated.clear()
            regions.populate([(9, 2, True), (12, 1, True), (16, 3 * piece + 5, False)], threads)
            pieces = [(16 + k * piece, piece if k < 3 else 5, False) for k in range(4)]
            assert sorted(populated) == [(9, 2, True), *pieces]
        with pytest.raises(OSError, match="cut"):
            regions.populate([(8, 3, False), *[(16, 4 * piece, False)] * 9], 3)
    finally:
        for region in found:
            regions.remove(region)
    assert regions.problem(8, True) is None


def test_what_torch_does_with_them(tmp_path: Path) -> None:
    base, instruct, _ = triple(tmp_path)
    name = "model.embed_tokens.weight"
    with ik.mapped(instruct) as i, ik.mapped(base) as b:
        wanted = ik.subtract(i[name], b[name])
        assert torch.equal(torch.compile(ik.subtract, backend="eager")(i[name], b[name]), wanted)
        module = torch.nn.Linear(16, 40, bias=False, dtype=torch.bfloat16)
        module.load_state_dict({"weight": i[name]})
        assert same(module.weight.detach(), i[name])
        file = io.BytesIO()
        torch.save(i[name], file)
        assert len(file.getvalue()) < 2 * i[name].nbytes + 2048  # and not all of the model
        shared = torch.from_dlpack(i[name])
        with pytest.raises(RuntimeError, match="mapped read-only"):
            ik.scale_(shared, 2.0)
