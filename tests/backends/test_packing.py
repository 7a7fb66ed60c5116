"""Old bits of a tensor, packed by what an update did to them, against a slow reading of the format of csrc/pack.h."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ires_kernels.backends import native, packing
from ires_kernels.dtypes import NUMBERS

pytestmark = pytest.mark.skipif(not native.isas(), reason="the extension was not built")
PACKED = ("BF16", "F16", "F32")
BLOCK, HEAD = 1 << 15, 24


def pack(dtype: str, old: Tensor, new: Tensor) -> bytearray:
    """The record of one tensor by another."""
    room = torch.full((packing.room(dtype, len(old)),), 0xA5, dtype=torch.uint8)
    size = packing.pack(dtype, old.data_ptr(), new.data_ptr(), len(old), room.data_ptr())
    assert size <= room.numel()
    return bytearray(room[:size].numpy().tobytes())


def unpack(dtype: str, record: bytearray, new: Tensor) -> Tensor:
    found = new.clone()
    packing.unpack(
        dtype, torch.frombuffer(record, dtype=torch.uint8).data_ptr() if record else 0, found.data_ptr(), len(new)
    )
    return found


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits_of(one), bits_of(other))


def by_definition(dtype: str, record: bytearray, new: Tensor) -> list[int]:
    """The old bits, one by one."""
    number, width = NUMBERS[dtype], new.element_size()
    size, at, old = 8 * width, 0, []
    bits = [int(x) & ((1 << size) - 1) for x in bits_of(new)]
    for block in (bits[i : i + BLOCK] for i in range(0, len(bits), BLOCK)):
        offset, words, kept, count = np.frombuffer(record, np.int32, 4, at).tolist()
        assert count == len(block)
        at += HEAD
        if offset == -1:
            old += block
        elif offset == -2:
            old += np.frombuffer(record, f"<u{width}", len(block), at).tolist()
            at += -(-len(block) * width // 8) * 8
        else:
            stream = int.from_bytes(record[at : at + 8 * words], "little")
            at += 8 * words
            exceptions = iter(np.frombuffer(record, f"<u{width}", kept, at).tolist())
            at += -(-kept * width // 8) * 8
            floor, most = max(0, offset - number.fraction - 6) << number.fraction, (1 << (size - 1)) - 1
            floor = min(floor, most)
            for x in block:
                bit_count = min(max(offset - ((x & most) >> number.fraction), 1), number.fraction + 4)
                code, stream = stream & ((1 << bit_count) - 1), stream >> bit_count
                if code == (1 << bit_count) - 1:
                    old.append(next(exceptions))
                elif code == 0:
                    old.append(x)
                else:
                    place = max((x & most) - floor, 0) * (-1 if x >> (size - 1) else 1)
                    place += -(code + 1) // 2 if code % 2 else code // 2
                    old.append((abs(place) + floor) | ((place < 0) << (size - 1)))
            assert next(exceptions, None) is None
    assert at == len(record)
    return old


def weights(dtype: str, count: int, update: float) -> tuple[Tensor, Tensor]:
    torch.manual_seed(count)
    old = (torch.randn(count) * 0.02).to(getattr(torch, NUMBERS[dtype].torch))
    return old, (old.float() + torch.randn(count) * update).to(old.dtype)


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77])
def test_the_old_bits_come_back(dtype: str, count: int) -> None:
    old, new = weights(dtype, count, 5e-4)
    record = pack(dtype, old, new)
    assert same(unpack(dtype, record, new), old)


@pytest.mark.parametrize("dtype", PACKED)
def test_the_format_is_what_is_written_of_it(dtype: str) -> None:
    old, new = weights(dtype, 3000, 1.4e-3)
    old[5::11], new[7::13], old[2::19] = -0.0, float("nan"), float("inf")
    wanted = [int(x) & ((1 << 8 * old.element_size()) - 1) for x in bits_of(old)]
    assert by_definition(dtype, pack(dtype, old, new), new) == wanted


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", PACKED)
def test_all_instruction_sets_write_the_same(monkeypatch: pytest.MonkeyPatch, dtype: str, isa: str) -> None:
    old, new = weights(dtype, BLOCK + 999, 7e-5)
    wanted = pack(dtype, old, new)
    monkeypatch.setenv("IRES_ISA", isa)
    assert pack(dtype, old, new) == wanted
    assert same(unpack(dtype, wanted, new), old)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(PACKED),
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(-40, 40) | st.integers(-(2**32), 2**32)), max_size=70),
    st.sampled_from(native.isas() or [""]),
)
def test_any_bits_come_back(dtype: str, pairs: list[tuple[int, int]], isa: str) -> None:
    """Whatever stands there: zeros of both signs, NaN of any kind, what overflows, and what an update does not do."""
    kind = np.dtype(f"<u{NUMBERS[dtype].bits // 8}")
    old = torch.from_numpy(np.array([old for old, _ in pairs], np.uint64).astype(kind).view(f"<i{kind.itemsize}"))
    moved = np.array([(old + step) % 2**32 for old, step in pairs], np.uint64).astype(kind)
    new = torch.from_numpy(moved.view(f"<i{kind.itemsize}"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("IRES_ISA", isa)
        record = pack(dtype, old, new)
        assert same(unpack(dtype, record, new), old)
    assert len(record) <= HEAD + old.nbytes + 8


@pytest.mark.parametrize(
    ("dtype", "update", "most"),
    [("BF16", 7e-5, 3.6), ("BF16", 5e-4, 6.4), ("BF16", 1.4e-3, 7.8), ("F16", 5e-4, 9.3), ("F32", 5e-4, 22.6)],
)
def test_what_it_takes(dtype: str, update: float, most: float) -> None:
    old, new = weights(dtype, 1 << 17, update)
    assert 8 * len(pack(dtype, old, new)) / len(old) < most


def test_what_stays_takes_nothing_and_what_has_nothing_to_do_with_it_no_more_than_a_copy() -> None:
    old, new = weights("BF16", 4 * BLOCK, 5e-4)
    new[: 2 * BLOCK] = old[: 2 * BLOCK]
    assert len(pack("BF16", old, old)) == 4 * HEAD
    assert len(pack("BF16", old, new)) < old.nbytes * 0.22
    others = torch.randint(-(2**15), 2**15, (2 * BLOCK,), dtype=torch.int16)
    assert len(pack("BF16", others, torch.flip(others, [0]))) <= others.nbytes + 2 * HEAD


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("count", [1, 3, 8, 33, BLOCK + 5])
def test_only_the_new_bits_fit(dtype: str, count: int) -> None:
    old, new = weights(dtype, count, 5e-4)
    record = torch.frombuffer(pack(dtype, old, new), dtype=torch.uint8)

    def fits(tensor: Tensor) -> bool:
        return packing.fits(dtype, record.data_ptr(), tensor.data_ptr(), count)

    assert fits(new)
    for place in {0, count // 2, count - 1}:
        for bit in (0, 3, 14):
            other = new.clone()
            bits_of(other)[place] ^= 1 << bit
            assert not fits(other)
    if count > 1 and not same(new, new.flip(0)):
        assert not fits(new.flip(0).contiguous())


def test_other_dtypes_are_not_packed() -> None:
    assert [name for name in NUMBERS if packing.packs(name)] == [name for name in NUMBERS if name in PACKED]
