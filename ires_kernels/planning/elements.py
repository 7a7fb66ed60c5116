"""The numbers of a few stored elements, without torch: what samples are made of.

`backends` computes with whole tensors; here it is some hundred elements of each, for planning to look at. Of quantized
weights that is those formats of `ires_kernels.formats` whose rows follow each other and whose scales are a grid: of
others a few elements take many reads.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.dtypes import NUMBERS
from ires_kernels.formats import matrices, row_bytes

Read = Callable[[TensorRef, int, int], bytes]
"""Bytes of a tensor, from an offset in it on."""


def numbers(dtype: str, data: bytes) -> Sequence[float]:
    """The elements of one of FLOATS, or of F8_E8M0, that these bytes hold."""
    return _READERS[dtype](data)


def _unpacked(code: str) -> Callable[[bytes], Sequence[float]]:
    width = struct.calcsize(f"<{code}")
    return lambda data: struct.unpack(f"<{len(data) // width}{code}", data)


def _bfloat16(data: bytes) -> Sequence[float]:
    """A bfloat16 is the upper half of a float32."""
    wide = bytearray(2 * len(data))
    wide[2::4], wide[3::4] = data[::2], data[1::2]
    return struct.unpack(f"<{len(data) // 2}f", wide)


def _bytewise(table: Sequence[float]) -> Callable[[bytes], Sequence[float]]:
    """A reader of a dtype of one byte, by the numbers of all codes."""
    return lambda data: tuple([table[code] for code in data])


def _codes(name: str) -> list[float]:
    """The numbers of all codes of a dtype of one byte."""
    number = NUMBERS[name]
    table = []
    for code in range(256):
        bits = code & 0x7F
        exponent, fraction = bits >> number.fraction, bits & ((1 << number.fraction) - 1)
        whole = fraction + (bool(exponent) << number.fraction)
        value = math.ldexp(whole, max(exponent, 1) - number.bias - number.fraction)
        if bits > number.largest:
            value = math.inf if bits == number.infinity else math.nan
        table.append(math.copysign(value, -1 if code & 0x80 else 1))
    return table


_E4M3 = _codes("F8_E4M3")
_E2M1 = [sign * value for sign in (1, -1) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
_READERS: dict[str, Callable[[bytes], Sequence[float]]] = {
    "F64": _unpacked("d"),
    "F32": _unpacked("f"),
    "F16": _unpacked("e"),
    "BF16": _bfloat16,
    "F8_E4M3": _bytewise(_E4M3),
    "F8_E5M2": _bytewise(_codes("F8_E5M2")),
    "F8_E8M0": _bytewise([*(2.0 ** (code - 127) for code in range(255)), math.nan]),
}
_PART_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1}
_NEAR = 4096
"""Elements of a part that are read at once."""


def is_known(ref: QuantizedRef) -> bool:
    """Whether `decoded` knows the format of a weight."""
    parts = {part for part, _ in ref.parts}
    name, zeros = ref.format.name, ref.format.word("zero_point")
    if name in ("fp8-tensor", "fp8-channel", "fp8-block", "mxfp8", "mxfp4"):
        return parts == {"codes", "scale"}
    if name == "nvfp4":
        return parts == {"codes", "scale", "global"}
    integers = ("int8-tensor", "int8-channel", "int8-block", "pack-quantized")
    return name in integers and zeros in ("", "I8") and parts <= {"codes", "scale", "zero_point", "shape"}


def decoded(ref: QuantizedRef, first: int, count: int, read: Read) -> Sequence[float]:
    """The numbers of a run of elements of a weight whose format `is_known`, each rounded as it is when it is merged."""
    form, parts = ref.format, dict(ref.parts)
    begin, size = ref.span(first, count)
    stored = read(ref.codes, begin, size)
    segments = list(_segments(ref, ref.first + first, count))
    scales = _blocks(parts["scale"], form.word("scale"), segments, read)
    zeros = _blocks(parts["zero_point"], "I8", segments, read) if "zero_point" in parts else {}
    if form.name == "nvfp4":
        shared = numbers("F32", read(parts["global"], 0, parts["global"].nbytes))
    found: list[float] = []
    for segment in segments:
        position = segment.row * row_bytes(form, ref.full) * 8 + segment.column * form.bits - begin * 8
        codes: Sequence[int] = stored[position // 8 : position // 8 + segment.length]
        if form.bits < 8:
            places = range(position, position + segment.length * form.bits, form.bits)
            codes = [stored[place // 8] >> place % 8 & (1 << form.bits) - 1 for place in places]
        scale = scales[segment.block]
        values: Sequence[float]
        if form.name in ("nvfp4", "mxfp4"):
            values = [_E2M1[code] * 2.0 ** form.number("lift") for code in codes]
        elif form.name in ("fp8-tensor", "fp8-channel", "fp8-block", "mxfp8"):
            values = [_E4M3[code] for code in codes]
        else:
            middle = 1 << form.bits - 1
            signed = codes if form.name == "pack-quantized" else [code ^ middle for code in codes]
            values = [code - middle - zeros.get(segment.block, 0) for code in signed]
        if form.name == "nvfp4":
            one = shared[segment.row // (math.prod(ref.full[:-1]) // len(shared))]
            scale = _rounded([_divided(scale, one) if form.word("global") == "divide" else scale * one])[0]
        found += [value * scale for value in values]
    return _rounded(found)


class _Segment(NamedTuple):
    """Elements of a row that share a scale."""

    row: int
    """Among those of all matrices."""
    column: int
    """Of the first."""
    length: int
    block: int
    """Flat index of the scale."""


def _segments(ref: QuantizedRef, first: int, count: int) -> Iterator[_Segment]:
    """What a run of elements of the whole weight consists of."""
    many, height, width = matrices(ref.full)
    rows, columns = ref.format.number("rows", 1), ref.format.number("columns", 1)
    height = many * height if rows >= many * height else height
    down, across = -(-height // rows), -(-width // columns)
    stop = first + count
    while first < stop:
        row, column = divmod(first, width)
        length = min(stop - first, width - column, columns - column % columns)
        line = row // height * down + row % height // rows
        yield _Segment(row, column, length, line * across + column // columns)
        first += length


def _blocks(part: TensorRef, kind: str, segments: Sequence[_Segment], read: Read) -> dict[int, float]:
    """The elements of a part that segments need, by their flat index: read at once where they are near each other."""
    wanted = sorted({segment.block for segment in segments})
    width = _PART_BYTES[kind]
    found: dict[int, float] = {}
    while wanted:
        begin = wanted[0]
        near = [block for block in wanted if block < begin + _NEAR]
        data = read(part, begin * width, (near[-1] + 1 - begin) * width)
        values = [(byte ^ 128) - 128 for byte in data] if kind == "I8" else numbers(kind, data)
        found |= {block: values[block - begin] for block in near}
        wanted = wanted[len(near) :]
    return found


def _divided(scale: float, by: float) -> float:
    return scale / by if by else math.nan


def _rounded(values: Sequence[float]) -> Sequence[float]:
    """As float32: products and quotients of two of these are rounded once, though they pass through float64."""
    try:
        return struct.unpack(f"<{len(values)}f", struct.pack(f"<{len(values)}f", *values))
    except OverflowError:
        return array("f", values)
