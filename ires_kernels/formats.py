"""The one table of formats of quantized weights: what is stored of a weight, and the number that an element is.

A weight of the logical shape (…, out, in) is stored as a tensor of codes and the tensors that belong to them, its
parts. RN is one rounding to float32, to nearest even; everything else in a formula is exact. `q` is the value of the
element's code, `s` its scale.

| name | codes | number | other parts |
|---|---|---|---|
| fp8-tensor, fp8-channel, fp8-block, mxfp8 | F8_E4M3 (…, out, in) | RN(q · s) | scale |
| int8-tensor, int8-channel, int8-block | I8 (…, out, in) | RN((q − z) · s) | scale, maybe zero_point |
| pack-quantized | I32 (…, out, words), or bytes | RN((q − z) · s) | scale, maybe zero_point, g_idx, shape |
| mxfp4 | U8 or I8 (…, out, in / 2) | RN(q · s · 2^lift) | scale |
| mxfp4-transposed | U8 (…, in, out / 2), also as (…, in, blocks, 16) | RN(q · s) | scale |
| nvfp4 | U8 (…, out, in / 2) | RN(q · RN(s / g)) or RN(q · RN(s · g)) | scale, global |
| gptq | I32 (in · bits / 32, out) | RN((q − z) · s) | scale, zero_point, maybe g_idx |
| awq | I32 (in, out · bits / 32) | RN((q − z) · s) | scale, zero_point |
| bnb-4bit | bytes, flat | RN(quant_map[code] · absmax) | quant_map, absmax, maybe nested_absmax, nested_quant_map |
| bnb-int8 | I8 (out, in) | RN(RN(q · s) · 0.007874015718698502) | scale |

Settings, those that a format has:

bits              width of a code: of pack-quantized, gptq and awq; the other names say theirs.
rows, columns     sides of the block of one matrix, the last two dimensions, that shares a scale. Scales are a grid
                  (…, ⌈out/rows⌉, ⌈in/columns⌉), in row-major order whatever their own shape; the last blocks are cut.
                  Where `rows` is the product of all dimensions but the last, one scale serves all matrices. Of
                  mxfp4-transposed they are the sides in the stored matrix (in, out): 1 × 32. Of bnb-4bit `columns` is
                  the size of a block of the flat weight.
scale             how the bytes of a scale are read: F32, F16, BF16, F8_E4M3 or F8_E8M0, of which
                  byte b is 2^(b − 127): 0 is 2^−127, a subnormal number, and 255 is NaN.
zero_point        how zero points are read: "I8", a grid like that of the scales; "packed", I32 words along dimension 0
                  of the grid, minus 2^(bits − 1). Without it z is 0.
zeros             of gptq: "v1", where z is (stored + 1) modulo 2^bits; "v2", where it is what is stored; "middle", of a
                  symmetric quantizer, where z is 2^(bits − 1), whichever of the two is stored.
lift              of mxfp4: what the exponents that are stored were written too low by.
global            of nvfp4: "divide" or "multiply"; one number for all, or one for every matrix of the first dimension.
nested, offset    of bnb-4bit with nested_absmax: the size of its blocks, and the hexadecimal float that is added.

Codes: E2M1, of 4 bits, is 0, .5, 1, 1.5, 2, 3, 4, 6 and, from 8 on, the same with a minus, 8 being −0. Element 2i of
two in a byte is in its low bits; of bnb-4bit in its high ones. pack-quantized codes are a little-endian stream of bits
in each row of words, and stand for themselves minus 2^(bits − 1). gptq's are such a stream down each column. Of awq,
the nibbles of a word, from the low ones on, are the columns 0 2 4 6 1 3 5 7, of codes and of zero points. g_idx
(columns of a matrix) gives the group of each column, the column of the grid of scales; where it is all −1, groups
follow each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WIDTHS = {
    "fp8-tensor": 8,
    "fp8-channel": 8,
    "fp8-block": 8,
    "mxfp8": 8,
    "int8-tensor": 8,
    "int8-channel": 8,
    "int8-block": 8,
    "pack-quantized": 0,
    "mxfp4": 4,
    "mxfp4-transposed": 4,
    "nvfp4": 4,
    "gptq": 0,
    "awq": 0,
    "bnb-4bit": 4,
    "bnb-int8": 8,
}
"""Every format by name, and the width of its codes in bits; 0 where `bits` of the settings says it."""

ACROSS = {"mxfp4-transposed", "gptq", "awq"}
"""Formats in which a run of numbers lies all over its matrix, so that whole matrices are read."""

ENCODED = {"fp8-tensor", "fp8-channel", "fp8-block", "mxfp8", "int8-tensor", "int8-channel", "int8-block"}
"""Formats in which new numbers can be stored: with the scale that is there where that serves, and no zero points."""


@dataclass(frozen=True, slots=True)
class Format:
    """How the numbers of a weight are made of codes."""

    name: str
    """One of `WIDTHS`."""
    settings: tuple[tuple[str, int | str], ...] = ()
    """What the format leaves open, by name."""

    def number(self, setting: str, default: int = 0) -> int:
        """A setting that is a number."""
        return int(dict(self.settings).get(setting, default))

    def word(self, setting: str) -> str:
        """A setting that is a word; "" where there is none."""
        return str(dict(self.settings).get(setting, ""))

    @property
    def bits(self) -> int:
        """The width of a code."""
        return WIDTHS[self.name] or self.number("bits")

    @property
    def is_encoded(self) -> bool:
        """Whether new numbers can be stored in it."""
        return self.name in ENCODED and not self.word("zero_point")

    def __str__(self) -> str:
        """The name and what matters of the settings, for people: ``fp8-block 128 × 128``."""
        bits = f" {self.bits} bits" if not WIDTHS[self.name] else ""
        rows, columns = self.number("rows"), self.number("columns")
        if self.name in ("fp8-block", "int8-block"):
            return f"{self.name} {rows} × {columns}"
        grouped = self.name in ("pack-quantized", "gptq", "awq", "bnb-4bit") and columns
        return f"{self.name}{bits}" + (f" in groups of {columns}" if grouped else "")


def matrices(full: tuple[int, ...]) -> tuple[int, int, int]:
    """How many matrices a weight of this shape is, with their rows and columns; a vector is one row."""
    height = full[-2] if len(full) > 1 else 1
    return math.prod(full[:-2]), height, full[-1] if full else 1


def row_bytes(format: Format, full: tuple[int, ...]) -> int:
    """Bytes of the codes of one row of a matrix, of formats whose rows follow each other."""
    width = matrices(full)[2]
    if format.name == "pack-quantized":
        return -(-width * format.bits // 32) * 4
    return width * format.bits // 8


def span(format: Format, full: tuple[int, ...], first: int, count: int) -> tuple[int, int]:
    """Which bytes of the codes `count` > 0 numbers from the flat index `first` on need: where they begin, and how many.

    Of the codes that share a byte with others, the whole byte; of the formats in `ACROSS`, whole matrices.
    """
    _, height, width = matrices(full)
    bits, last = format.bits, first + count - 1
    if format.name in ACROSS:
        size = height * width * bits // 8  # of GPTQ and AWQ, rows or columns fill whole words
        begin = first // (height * width)
        return begin * size, (last // (height * width) + 1 - begin) * size
    if format.name == "bnb-4bit":
        return first // 2, last // 2 + 1 - first // 2
    stride = row_bytes(format, full)
    begin = first // width * stride + first % width * bits // 8
    return begin, last // width * stride + last % width * bits // 8 + 1 - begin
