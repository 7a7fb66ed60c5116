# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The numerics contract (docs/numerics.md) in Triton: storage types to and from C, rounding, Philox, the operations.

Pointers carry the storage type, and 8-bit ones travel as integers, because not every target knows float8_e4m3fn:
uint8 is float8_e4m3fn, int8 is float8_e5m2. Conversions are done on the bits, which every target and Triton's
interpreter get right; CASTS says which of them the hardware does instead: 0 none, 1 to bfloat16, 2 float8_e4m3fn as
well. Never to float8_e5m2: that cast saturates, so its codes have to be corrected where they overflow, and the ptxas of
Triton 3.6 (12.8) reads such a code before it writes it when a pair of them is packed and taken apart (sm_90, operands
of different alignment: every odd element was another number).
Numbers go in as 64-bit integers, the factors as the bits of a float of type C, so that no value of one is compiled in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048  # elements of a program: for 128 threads 16 bytes each of the narrowest type
SLOTS = 5  # operands of a launch
ITEMS = 256  # tensors of a launch of `listed` at most
LISTED = 3  # operands of each
ROW = 8  # words of each in the table

# What differs from launch to launch, and must not make a kernel of its own.
_FLAT = ["f0", "f1", "f2", "f3", "n", "first", "stream", "seed"]
_STRIDED = [*_FLAT, "columns", "out_row", "out_column", "index_row", "index_column"]
_STRIDED += [f"x{i}_{step}" for i in range(SLOTS) for step in ("row", "column")]


NAMES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
}
"""The types of pointers that come out of a table."""


@triton.jit
def widen(x, DOUBLE: tl.constexpr, CASTS: tl.constexpr):
    """Storage type to C, exactly."""
    if x.dtype == tl.uint8:
        if CASTS >= 2:
            y = x.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        else:
            # As the top bits of a float32 the number is too small by the difference of the biases, 2^120.
            magnitude = (x & 0x7F).to(tl.uint32)
            number = ((magnitude << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36).to(tl.uint32, bitcast=True)
            number = tl.where(magnitude == 0x7F, 0x7FC00000, number) | ((x & 0x80).to(tl.uint32) << 24)
            y = number.to(tl.float32, bitcast=True)
    elif x.dtype == tl.int8:
        # float8_e5m2 is the upper half of a float16.
        y = (x.to(tl.uint8, bitcast=True).to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        y = x.to(tl.float32)
    else:
        y = x
    if DOUBLE:
        y = y.to(tl.float64)
    return y


@triton.jit
def round_to_odd(x):
    """float64 to float32; rounded further, to 22 bits or fewer, it is as if x had been (Boldo, Melquiond, 2008)."""
    y = x.to(tl.float32)
    bits = y.to(tl.uint32, bitcast=True)
    back = y.to(tl.float64)
    bits = tl.where(tl.abs(back) > tl.abs(x), bits - 1, bits)  # truncated; an infinity becomes the largest finite
    bits = tl.where((back != x) & (x == x), bits | 1, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def nearest_float8(x, FRACTION: tl.constexpr, MIN_EXP: tl.constexpr, OVERFLOW: tl.constexpr, INFINITY: tl.constexpr):
    """Code of the nearest number, ties to even. OVERFLOW: bits of the least float32 that is stored as INFINITY."""
    DROP: tl.constexpr = 23 - FRACTION
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    half_less_one = ((magnitude >> DROP) & 1) + ((1 << (DROP - 1)) - 1)
    normal = ((magnitude + half_less_one) >> DROP) - ((126 + MIN_EXP) << FRACTION)
    # Below the smallest normal one float32 addition rounds, whose unit in the last place is the smallest subnormal.
    UNIT: tl.constexpr = 2.0 ** (MIN_EXP - FRACTION + 23)
    UNIT_BITS: tl.constexpr = (150 + MIN_EXP - FRACTION) << 23
    subnormal = (magnitude.to(tl.float32, bitcast=True) + UNIT).to(tl.uint32, bitcast=True) - UNIT_BITS
    code = tl.where(magnitude < ((127 + MIN_EXP) << 23), subnormal, normal)
    code = tl.where(magnitude < OVERFLOW, code, INFINITY)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def nearest(x, dtype: tl.constexpr, CASTS: tl.constexpr):
    """C to a storage type, to nearest, ties to even."""
    if x.dtype == dtype:
        y = x
    elif dtype == tl.float32:
        y = x.to(tl.float32)
    else:
        if x.dtype == tl.float64:
            x = round_to_odd(x)
        if dtype == tl.float16:
            y = x.to(tl.float16)
        elif dtype == tl.bfloat16:
            if CASTS >= 1:
                y = x.to(tl.bfloat16)
            else:
                bits = x.to(tl.uint32, bitcast=True)
                code = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
                y = code.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        elif dtype == tl.uint8:
            if CASTS >= 2:
                y = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            else:
                y = nearest_float8(x, 3, -6, 0x43E80001, 0x7E)  # 464 is a tie and goes to 448
        else:
            # 61440 is a tie between 57344 and the next step, which is infinity.
            y = nearest_float8(x, 2, -14, 0x47700000, 0x7C).to(tl.int8, bitcast=True)
    return y


@triton.jit
def stochastic_code(
    x,
    word,
    FRACTION: tl.constexpr,
    MIN_EXP: tl.constexpr,
    LARGEST: tl.constexpr,
    INFINITY: tl.constexpr,
    NAN: tl.constexpr,
    SIGN: tl.constexpr,
):
    """Code of one of the two neighbours: the significand is shifted so that what is dropped is a 32-bit fraction, the
    random word is added to it, and the carry goes into the kept bits. A finite number stays finite."""
    if x.dtype == tl.float64:
        bits = x.to(tl.uint64, bitcast=True)
        sign = (bits >> 63).to(tl.uint32)
        field = ((bits >> 52) & 0x7FF).to(tl.int32)
        implicit = tl.where(field > 0, 1, 0).to(tl.uint64) << 52
        # 53 bits and at least 29 of them dropped: 3 bits to the left and 29 fewer to the right stay within 64.
        significand = ((bits & 0xFFFFFFFFFFFFF) | implicit) << 3
        exponent = tl.maximum(field, 1) - (1023 + MIN_EXP)
        drop = 52 - FRACTION - 29
        infinite = (bits << 1) == 0xFFE0000000000000
    else:
        bits = x.to(tl.uint32, bitcast=True)
        sign = bits >> 31
        field = ((bits >> 23) & 0xFF).to(tl.int32)
        implicit = tl.where(field > 0, 1, 0).to(tl.uint32) << 23
        significand = ((bits & 0x7FFFFF) | implicit).to(tl.uint64) << 32
        exponent = tl.maximum(field, 1) - (127 + MIN_EXP)
        drop = 23 - FRACTION
        infinite = (bits << 1) == 0xFF000000
    # Here exponent counts from the smallest normal number; below it more is dropped. 64 bits or more are all of it.
    drop = tl.minimum(drop + tl.maximum(-exponent, 0), 63).to(tl.uint64)
    kept = (((significand >> drop) + word) >> 32).to(tl.uint32)
    above = tl.minimum(tl.maximum(exponent, 0), 256).to(tl.uint32)  # 256: beyond every type, and fits
    # The implicit bit is among the kept ones and adds the last one to the exponent.
    code = tl.minimum((above << FRACTION) + kept, LARGEST)
    code = tl.where(infinite, INFINITY, code)
    code = tl.where(x == x, code, NAN)
    return code | (sign << SIGN)


@triton.jit
def stochastic(x, word, dtype: tl.constexpr):
    """C to a narrower storage type, up or down by the element's random word."""
    if dtype == tl.float32:
        code = stochastic_code(x, word, 23, -126, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 31)
        y = code.to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        code = stochastic_code(x, word, 10, -14, 0x7BFF, 0x7C00, 0x7E00, 15)
        y = code.to(tl.uint16).to(tl.float16, bitcast=True)
    elif dtype == tl.bfloat16:
        if x.dtype == tl.float64:
            code = stochastic_code(x, word, 7, -126, 0x7F7F, 0x7F80, 0x7FC0, 15)
        else:
            # The same exponents as float32: the bits as they are.
            bits = x.to(tl.uint32, bitcast=True)
            magnitude = bits & 0x7FFFFFFF
            code = tl.minimum((magnitude + (word >> 16)) >> 16, 0x7F7F)
            code = tl.where(magnitude < 0x7F800000, code, 0x7F80)
            code = tl.where(x == x, code, 0x7FC0) | ((bits >> 16) & 0x8000)
        y = code.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.uint8:
        y = stochastic_code(x, word, 3, -6, 0x7E, 0x7E, 0x7F, 7).to(tl.uint8)
    else:
        y = stochastic_code(x, word, 2, -14, 0x7B, 0x7C, 0x7F, 7).to(tl.uint8).to(tl.int8, bitcast=True)
    return y


@triton.jit
def philox(index, stream, seed):
    """Philox4x32-10 (Salmon et al., SC'11): the four random words of the elements 4i … 4i + 3 that `index` is in."""
    block = index.to(tl.uint64) >> 2
    stream = stream.to(tl.uint64)
    seed = seed.to(tl.uint64)
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = stream.to(tl.uint32)
    c3 = (stream >> 32).to(tl.uint32)
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words_of_run(first, stream, seed, BLOCK: tl.constexpr):
    """The words of BLOCK elements from index `first` on, a multiple of 4: one Philox block for every four of them."""
    w0, w1, w2, w3 = philox(first + tl.arange(0, BLOCK // 4) * 4, stream, seed)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def words_of(index, stream, seed):
    """The words of any elements: a Philox block for each of them."""
    w0, w1, w2, w3 = philox(index, stream, seed)
    lane = index & 3
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def factor(bits, DOUBLE: tl.constexpr):
    # To 64 bits, because the interpreter takes a small integer for one of 32.
    bits = bits.to(tl.int64)
    return bits.to(tl.float64, bitcast=True) if DOUBLE else bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def element(
    out,
    x0,
    x1,
    x2,
    x3,
    x4,
    f0,
    f1,
    f2,
    f3,
    mask,
    word,
    OP: tl.constexpr,
    OPERANDS: tl.constexpr,
    DOUBLE: tl.constexpr,
    RANDOM: tl.constexpr,
    CASTS: tl.constexpr,
):
    """One operation: load, compute in C, round, store. `out` and x0 … are pointers to every element."""
    y = widen(tl.load(x0, mask=mask), DOUBLE, CASTS)
    if OP == "scale":
        y = factor(f0, DOUBLE) * y
    elif OP == "subtract":
        y = y - widen(tl.load(x1, mask=mask), DOUBLE, CASTS)
    elif OP == "add_difference":
        x = widen(tl.load(x1, mask=mask), DOUBLE, CASTS)
        y = y + factor(f0, DOUBLE) * (x - widen(tl.load(x2, mask=mask), DOUBLE, CASTS))
        if OPERANDS > 3:
            x = widen(tl.load(x3, mask=mask), DOUBLE, CASTS)
            y = y + factor(f1, DOUBLE) * (x - widen(tl.load(x4, mask=mask), DOUBLE, CASTS))
    else:
        y = y + factor(f0, DOUBLE) * widen(tl.load(x1, mask=mask), DOUBLE, CASTS)
        if OPERANDS > 2:
            y = y + factor(f1, DOUBLE) * widen(tl.load(x2, mask=mask), DOUBLE, CASTS)
        if OPERANDS > 3:
            y = y + factor(f2, DOUBLE) * widen(tl.load(x3, mask=mask), DOUBLE, CASTS)
        if OPERANDS > 4:
            y = y + factor(f3, DOUBLE) * widen(tl.load(x4, mask=mask), DOUBLE, CASTS)
    dtype: tl.constexpr = out.dtype.scalar.element_ty
    y = stochastic(y, word, dtype) if RANDOM else nearest(y, dtype, CASTS)
    tl.store(out, y, mask=mask)


@triton.jit(do_not_specialize=_FLAT)
def flat(
    out,
    x0,
    x1,
    x2,
    x3,
    x4,
    f0: tl.int64,
    f1: tl.int64,
    f2: tl.int64,
    f3: tl.int64,
    n: tl.int64,
    first: tl.int64,
    stream: tl.int64,
    seed: tl.int64,
    OP: tl.constexpr,
    OPERANDS: tl.constexpr,
    DOUBLE: tl.constexpr,
    RANDOM: tl.constexpr,
    CASTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """n contiguous elements; slots past OPERANDS are not read. RANDOM wants `first`, the flat index, divisible by 4."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    o, p0, p1, p2, p3, p4 = (
        out + start + at,
        x0 + start + at,
        x1 + start + at,
        x2 + start + at,
        x3 + start + at,
        x4 + start + at,
    )
    word = words_of_run(first + start, stream, seed, BLOCK) if RANDOM else None
    # A mask that is not a multiple of 16 bytes would make every access scalar: only the last block has one.
    if start + BLOCK <= n:
        element(o, p0, p1, p2, p3, p4, f0, f1, f2, f3, None, word, OP, OPERANDS, DOUBLE, RANDOM, CASTS)
    else:
        element(o, p0, p1, p2, p3, p4, f0, f1, f2, f3, at < n - start, word, OP, OPERANDS, DOUBLE, RANDOM, CASTS)


@triton.jit
def pointer(row, K: tl.constexpr, DTYPE: tl.constexpr):
    """The K-th pointer of a row, at a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(row + K).to(tl.pointer_type(DTYPE)), 16)


@triton.jit(do_not_specialize=["f0", "f1", "first", "seed"])
def listed(
    table,
    f0: tl.int64,
    f1: tl.int64,
    first: tl.int64,
    seed: tl.int64,
    OUT: tl.constexpr,
    X0: tl.constexpr,
    X1: tl.constexpr,
    X2: tl.constexpr,
    OP: tl.constexpr,
    OPERANDS: tl.constexpr,
    DOUBLE: tl.constexpr,
    RANDOM: tl.constexpr,
    CASTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ITEMS: tl.constexpr,
    ROW: tl.constexpr,
):
    """`flat` for up to ITEMS tensors of one mix of dtypes, all at multiples of 16 bytes, and no more than 3 operands.

    The table, of int64: a running count of blocks for each tensor, then a row for each: pointers of out and the three
    operands, the number of elements, the stream. Which tensor a block belongs to takes one load of all counts.
    """
    block = tl.program_id(0).to(tl.int64)
    ends = tl.load(table + tl.arange(0, ITEMS))
    item = tl.sum((ends <= block).to(tl.int32), 0)
    start = (block - tl.max(tl.where(ends <= block, ends, 0), 0)) * BLOCK
    row = table + ITEMS + item * ROW
    n = tl.load(row + 4)
    stream = tl.load(row + 5)
    at = tl.arange(0, BLOCK)
    o = pointer(row, 0, OUT) + start + at
    p0 = pointer(row, 1, X0) + start + at
    p1 = pointer(row, 2, X1) + start + at
    p2 = pointer(row, 3, X2) + start + at
    word = words_of_run(first + start, stream, seed, BLOCK) if RANDOM else None
    if start + BLOCK <= n:
        element(o, p0, p1, p2, p2, p2, f0, f1, f1, f1, None, word, OP, OPERANDS, DOUBLE, RANDOM, CASTS)
    else:
        element(o, p0, p1, p2, p2, p2, f0, f1, f1, f1, at < n - start, word, OP, OPERANDS, DOUBLE, RANDOM, CASTS)


@triton.jit(do_not_specialize=_STRIDED)
def strided(
    out,
    x0,
    x1,
    x2,
    x3,
    x4,
    f0: tl.int64,
    f1: tl.int64,
    f2: tl.int64,
    f3: tl.int64,
    n: tl.int64,
    first: tl.int64,
    stream: tl.int64,
    seed: tl.int64,
    columns: tl.int64,
    out_row: tl.int64,
    out_column: tl.int64,
    x0_row: tl.int64,
    x0_column: tl.int64,
    x1_row: tl.int64,
    x1_column: tl.int64,
    x2_row: tl.int64,
    x2_column: tl.int64,
    x3_row: tl.int64,
    x3_column: tl.int64,
    x4_row: tl.int64,
    x4_column: tl.int64,
    index_row: tl.int64,
    index_column: tl.int64,
    OP: tl.constexpr,
    OPERANDS: tl.constexpr,
    DOUBLE: tl.constexpr,
    RANDOM: tl.constexpr,
    CASTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """n elements in rows of `columns`; operands, and the flat index from `first` on, have a step along either."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    row = at // columns
    column = at - row * columns
    index = first + row * index_row + column * index_column
    element(
        out + row * out_row + column * out_column,
        x0 + row * x0_row + column * x0_column,
        x1 + row * x1_row + column * x1_column,
        x2 + row * x2_row + column * x2_column,
        x3 + row * x3_row + column * x3_column,
        x4 + row * x4_row + column * x4_column,
        f0,
        f1,
        f2,
        f3,
        mask,
        words_of(index, stream, seed) if RANDOM else None,
        OP,
        OPERANDS,
        DOUBLE,
        RANDOM,
        CASTS,
    )


_DECODED = ["n", "first", "skipped", "columns", "row_bytes", "rows", "block_rows", "block_columns"]
_DECODED += ["grid_rows", "grid_columns", "each"]


@triton.jit(do_not_specialize=_DECODED)
def decoded(
    out,
    codes,
    scale,
    over,
    table,
    n: tl.int64,
    first: tl.int64,
    skipped: tl.int64,
    columns: tl.int64,
    row_bytes: tl.int64,
    rows: tl.int64,
    block_rows: tl.int64,
    block_columns: tl.int64,
    grid_rows: tl.int64,
    grid_columns: tl.int64,
    each: tl.int64,
    CODES: tl.constexpr,
    E8M0: tl.constexpr,
    SECOND: tl.constexpr,
    CASTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Numbers [first, first + n) of a quantized tensor without zeros, as csrc/coded.h has them.

    `codes` begin `skipped` bytes into their tensor; CODES and SECOND are its CodeType and Second. `table` has what
    nibbles stand for, the low one first; `over` is one second scale, or one for each matrix, `each` being 0 or 1.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    row = (first + at) // columns
    column = first + at - row * columns
    matrix = row // rows
    cell = (matrix * grid_rows + (row - matrix * rows) // block_rows) * grid_columns + column // block_columns
    stored = tl.load(scale + cell, mask=mask, other=0)
    if E8M0:
        bits = stored.to(tl.uint32) << 23
        bits = tl.where(stored == 0, 0x00400000, tl.where(stored == 255, 0x7FC00000, bits))
        s = bits.to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        s = widen(stored, False, CASTS)
    if SECOND == 1:
        s = s * tl.load(over + matrix * each, mask=mask, other=1.0)
    elif SECOND == 2:
        s = tl.div_rn(s, tl.load(over + matrix * each, mask=mask, other=1.0))
    if CODES == 4:
        byte = tl.load(codes + (row * row_bytes - skipped) + column // 2, mask=mask, other=0).to(tl.int32)
        x = tl.load(table + ((byte >> ((column & 1) * 4).to(tl.int32)) & 15), mask=mask, other=0.0)
    else:
        byte = tl.load(codes + (row * row_bytes - skipped) + column, mask=mask, other=0)
        if CODES == 0:
            x = widen(byte, False, CASTS)
        elif CODES == 2:
            x = byte.to(tl.int8, bitcast=True).to(tl.float32)
        else:
            x = (byte.to(tl.int32) - 128).to(tl.float32)
    tl.store(out + at, x * s, mask=mask)
