"""Operands that are read and computed in one call, piece by piece: the bits of the operation, and what errors leave."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ires_kernels as ik
from ires_kernels.backends import native, packing
from ires_kernels.backends.native import Operand
from ires_kernels.checkpoints.sources import IN_MEMORY, LocalFile, Read
from ires_kernels.live.snapshot import Snapshot
from ires_kernels.tensors import ops

pytestmark = pytest.mark.skipif(not native.isas(), reason="without the extension")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SIZES = [0, 1, 97, 43008, 43009, 150_001]  # a piece of three operands of 16 bits has 43008
FACTORS = {"subtract": (), "add": (0.3, -2.0), "add_difference": (0.7,)}


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "numbers", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def numbers(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def raw(t: Tensor) -> bytes:
    return t.view(torch.uint8).numpy().tobytes()


def stretches(
    fd: int, operand: Tensor, parts: int, seed: int
) -> tuple[list[tuple[int, int, int, int, int, int]], list[Tensor]]:
    """An operand cut at random bytes, every other part of which lies at the end of the file; and those in memory."""
    chance = random.Random(seed)
    data = torch.frombuffer(bytearray(raw(operand)) or bytearray(1), dtype=torch.uint8)[: operand.nbytes]
    cuts = [0, *sorted(chance.choices(range(operand.nbytes + 1), k=parts - 1)), operand.nbytes]
    found, kept = [], []
    for i in range(parts):
        part = data[cuts[i] : cuts[i + 1]].clone()
        if i % 2:
            kept.append(part)
            found.append((IN_MEMORY, part.data_ptr(), part.nbytes, 0, 0, -1))
        else:
            at = os.lseek(fd, 3, os.SEEK_END)
            os.pwrite(fd, part.numpy().data, at)
            found.append((fd, at, part.nbytes, 0, 0, -1))
    return found, kept


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(
    ("op", "dtypes"),
    [
        ("add_difference", (BF16, BF16, BF16, BF16)),
        ("add_difference", (F16, F16, F32, torch.float8_e4m3fn)),
        ("add", (BF16, BF16, F32, F16)),
        ("subtract", (F32, BF16, F16)),
        ("subtract", (torch.float64, torch.float64, F32)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{each}"[6:] for each in value),
)
def test_the_bits_of_the_operation(file: int, op: str, dtypes: tuple[torch.dtype, ...], stochastic: bool) -> None:
    options = {"rounding": "stochastic", "seed": 9, "stream": 5, "offset": 77} if stochastic else {}
    for count in SIZES:
        inputs = [numbers(dtype, count, seed) for seed, dtype in enumerate(dtypes[1:])]
        t, *others = inputs
        wanted = torch.empty(count, dtype=dtypes[0])
        if op == "subtract":
            ops.subtract(t, others[0], out=wanted, **options)
        elif op == "add":
            ops.add(t, others, FACTORS[op], out=wanted, **options)
        else:
            ops.add_difference(t, *others, FACTORS[op], out=wanted, **options)
        out, kept = torch.empty(count, dtype=dtypes[0]), [torch.zeros(x.nbytes, dtype=torch.uint8) for x in inputs]
        for parts in (1, 2, 7):
            placed = [stretches(file, x, parts, seed) for seed, x in enumerate(inputs)]
            operands: list[Operand] = [
                (runs, kept[k].data_ptr() if k == 1 else 0) for k, (runs, _) in enumerate(placed)
            ]
            item = native.item(count, 5, (out.data_ptr(), *(0 for _ in inputs)), dtypes)
            unread = native.run_fused(
                op, item, tuple(operands), FACTORS[op], stochastic=stochastic, seed=9, offset=77 * stochastic
            )
            assert unread is None
            assert raw(out) == raw(wanted)
            assert raw(kept[1]) == raw(inputs[1])
            out.zero_()


def test_what_is_the_same_for_each_piece(file: int) -> None:
    values, count = numbers(F32, 200_000, 1), 200_000
    zeros = torch.full((native.CONSTANT,), -0.0)
    out = torch.empty(count, dtype=BF16)
    item = native.item(count, 0, (out.data_ptr(), 0, 0), (BF16, F32, F32))
    runs, _ = stretches(file, values, 1, 1)
    operands: tuple[Operand, ...] = zeros.data_ptr(), (runs, 0)
    assert native.run_fused("add", item, operands, (1.0,), stochastic=False, seed=0, offset=0) is None
    assert raw(out) == raw(values.to(BF16))


@pytest.mark.parametrize("aligned", [True, False])
def test_what_is_kept_when_a_file_ends(file: int, aligned: bool) -> None:
    """In place: of the elements that have changed the old bits are there, and so many of them are counted."""
    count, there = 200_000, 100_000
    target, residual = numbers(BF16, count, 1), numbers(BF16, there, 2)
    before, at = target.clone(), 0 if aligned else 3
    os.pwrite(file, raw(residual), at)
    keep, kept = torch.zeros(count + 8, dtype=BF16)[at:][:count], ctypes.c_int64(0)
    operands: tuple[Operand, ...] = (
        ([(IN_MEMORY, target.data_ptr(), target.nbytes, keep.data_ptr(), ctypes.addressof(kept), -1)], 0),
        ([(file, at, target.nbytes, 0, 0, -1)], 0),
    )
    item = native.item(count, 0, (target.data_ptr(), 0, 0), (BF16, BF16, BF16))
    unread = native.run_fused("add", item, operands, (0.5,), stochastic=False, seed=0, offset=0)
    assert unread == (1, 0, 0, at + 2 * there)
    done = kept.value // 2
    assert 65_536 <= done <= 131_072
    assert raw(keep[:done]) == raw(before[:done])
    assert not keep[done:].any()
    changed = int((target != before).nonzero().max()) + 1
    assert 60_000 < changed <= min(done, there)
    wanted = before[:changed] + 0.5 * residual[:changed].float()
    assert raw(target[:changed]) == raw(wanted.to(BF16))
    target.view(torch.int16)[:done] = keep.view(torch.int16)[:done]
    assert raw(target) == raw(before)


def test_what_is_packed_when_a_file_ends(file: int) -> None:
    """In place: what has changed comes back from the record, which is of that alone."""
    count, there = 200_000, 100_000
    target, residual = numbers(BF16, count, 1), numbers(BF16, there, 2)
    before = target.clone()
    os.pwrite(file, raw(residual), 0)
    room, counts = torch.zeros(packing.room("BF16", count), dtype=torch.uint8), (ctypes.c_int64 * 2)()
    number, place = packing.number("BF16"), ctypes.addressof(counts)
    operands: tuple[Operand, ...] = (
        ([(IN_MEMORY, target.data_ptr(), target.nbytes, room.data_ptr(), place, number)], 0),
        ([(file, 0, target.nbytes, 0, 0, -1)], 0),
    )
    item = native.item(count, 0, (target.data_ptr(), 0, 0), (BF16, BF16, BF16))
    unread = native.run_fused("add", item, operands, (0.01,), stochastic=False, seed=0, offset=0)
    assert unread == (1, 0, 0, 2 * there)
    done = counts[0] // 2
    assert 60_000 < done <= there
    assert 0 < counts[1] < 0.6 * counts[0]
    wanted = before[:done] + 0.01 * residual[:done].float()
    assert raw(target[:done]) == raw(wanted.to(BF16))
    assert raw(target[done:]) == raw(before[done:])
    assert packing.fits("BF16", room.data_ptr(), target.data_ptr(), done)
    packing.unpack("BF16", room.data_ptr(), target.data_ptr(), done)
    assert raw(target) == raw(before)


def test_operands_that_are_too_short_are_refused() -> None:
    out = torch.zeros(8)
    item = native.item(8, 0, (out.data_ptr(), 0, 0), (F32, F32, F32))
    short: Operand = [(IN_MEMORY, out.data_ptr(), 28, 0, 0, -1)], 0
    with pytest.raises(ValueError, match="as many bytes as elements"):
        native.run_fused("add", item, (short, short), (1.0,), stochastic=False, seed=0, offset=0)
    with pytest.raises(ValueError, match="number of operands"):
        native.run_fused("add", item, (short,), (1.0,), stochastic=False, seed=0, offset=0)


def test_a_file_that_ends_in_the_middle_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names tensor and file, and the module has the bits from before, some of which were changed by then."""
    base = numbers(BF16, 1 << 20, 1).view(1024, 1024)
    for name, values in (("base", base), ("instruct", base * 1.1)):
        (tmp_path / name).mkdir()
        save_file({"0.weight": values}, tmp_path / name / "model.safetensors", {"format": "pt"})
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024, bias=False, dtype=BF16)).eval()
    weight = model[0].weight.detach()
    before, changed = weight.copy_(base * 1.01).clone(), 0
    reads, cut, put_back = LocalFile.reads, tmp_path / "instruct/model.safetensors", Snapshot.put_back

    def cut_off(file: LocalFile, offset: int, size: int) -> list[Read]:
        if size and file.path == cut:
            os.truncate(cut, cut.stat().st_size - (1 << 20))
        return reads(file, offset, size)

    def seen(*arguments: Any) -> None:
        nonlocal changed
        changed = int((weight != before).sum())
        put_back(*arguments)

    monkeypatch.setattr(LocalFile, "reads", cut_off)
    monkeypatch.setattr(Snapshot, "put_back", seen)
    with pytest.raises(OSError, match=r"ends .*'0\.weight'.*instruct.model\.safetensors"):
        ik.apply_(model, (tmp_path / "instruct", tmp_path / "base"), threads=1)
    assert 1 << 18 < changed < 1 << 20
    assert raw(weight) == raw(before)


def test_nothing_holds_what_was_loaded(tmp_path: Path) -> None:
    """Memory of a model is free when its tensors are, and not when the collector has come by."""
    values = numbers(BF16, 1 << 16, 1).view(256, 256)
    for name, factor in (("base", 1.0), ("instruct", 1.01), ("target", 1.02)):
        (tmp_path / name).mkdir()
        save_file({"0.weight": values * factor}, tmp_path / name / "model.safetensors", {"format": "pt"})
    gc.disable()
    try:
        loaded = ik.load(tmp_path / "target", (tmp_path / "instruct", tmp_path / "base"))
        left = weakref.ref(loaded["0.weight"].untyped_storage())
        assert left() is not None
        del loaded
        assert left() is None
    finally:
        gc.enable()
