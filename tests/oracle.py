"""The numerics contract a second time, by other means than the code under test: tables of values and comparisons.

A store looks the two neighbours of a value up in the sorted table of everything its type can hold. The tables come from
the definition of the formats, the arithmetic is numpy's, and the random words are those of Philox in Python integers.
Everything here is float64 or integers, where each step is exact.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

STORAGE = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
NARROW = STORAGE[2:]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# exponent bits, fraction bits
_FIELDS = {torch.float16: (5, 10), torch.bfloat16: (8, 7), torch.float8_e4m3fn: (4, 3), torch.float8_e5m2: (5, 2)}


def short(dtype: torch.dtype) -> str:
    """A name for test ids: bf16, f32, e4m3fn."""
    return str(dtype).removeprefix("torch.").replace("float8_", "").replace("bfloat", "bf").replace("float", "f")


def codes(t: Tensor) -> np.ndarray:
    """The bit patterns, in row-major order, as unsigned integers."""
    flat = t.detach().reshape(-1).view(INTEGERS[t.element_size()]).numpy()
    return flat.view(f"u{t.element_size()}")


def from_codes(patterns: np.ndarray, dtype: torch.dtype) -> Tensor:
    width = torch.empty(0, dtype=dtype).element_size()
    signed = np.ascontiguousarray(patterns.astype(f"u{width}")).view("u1" if width == 1 else f"i{width}")
    return torch.from_numpy(signed.copy()).view(dtype)


@cache
def values(dtype: torch.dtype) -> np.ndarray:
    """What each bit pattern of an 8- or 16-bit type means, as float64."""
    exponent_bits, fraction_bits = _FIELDS[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    pattern = np.arange(2 ** (1 + exponent_bits + fraction_bits))
    fraction = pattern % 2**fraction_bits
    exponent = pattern // 2**fraction_bits % 2**exponent_bits
    normal = np.ldexp(2.0**fraction_bits + fraction, exponent - bias - fraction_bits)
    magnitude = np.where(exponent == 0, np.ldexp(1.0 * fraction, 1 - bias - fraction_bits), normal)
    if dtype == torch.float8_e4m3fn:
        magnitude[pattern % 128 == 127] = np.nan
    else:
        last = exponent == 2**exponent_bits - 1
        magnitude[last] = np.where(fraction[last] == 0, np.inf, np.nan)
    return np.where(pattern < len(pattern) // 2, magnitude, -magnitude)


@cache
def magnitudes(dtype: torch.dtype) -> np.ndarray:
    """The finite values from 0 up; the place of each is its bit pattern."""
    positive = values(dtype)[: len(values(dtype)) // 2]
    return positive[np.isfinite(positive)]


def widen(t: Tensor) -> np.ndarray:
    """The values of a tensor, in row-major order."""
    if t.dtype in (torch.float32, torch.float64):
        return t.detach().reshape(-1).numpy()
    return values(t.dtype)[codes(t)]


def compute_type(out: torch.dtype, inputs: list[Tensor]) -> type:
    return np.float64 if torch.float64 in {out, *(x.dtype for x in inputs)} else np.float32


@np.errstate(all="ignore")
def compute(op: str, inputs: list[Tensor], factors: tuple[float, ...], out: torch.dtype) -> np.ndarray:
    """The value before the store, in the compute type."""
    real = compute_type(out, inputs)
    x = [widen(t).astype(real) for t in inputs]
    f = [real(factor) for factor in factors]
    if op == "subtract":
        return x[0] - x[1]
    if op == "scale":
        return f[0] * x[0]
    if op == "add_difference":
        x = [x[0], *(a - b for a, b in zip(x[1::2], x[2::2], strict=True))]
    total = x[0]
    for factor, residual in zip(f, x[1:], strict=True):
        total = total + factor * residual
    return total


def neighbours(x: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For finite |x| as float64: the pattern of the largest magnitude not above it, its value, the next value.

    Above the largest finite value, the next one is where the following step would be.
    """
    if dtype == torch.float32:
        low = x.astype(np.float32)
        low = np.where(low > x, np.nextafter(low, np.float32(0)), low).astype(np.float32)
        low = np.minimum(low, np.finfo(np.float32).max)
        exponent = np.where(low == 0, -125, np.frexp(low.astype(np.float64))[1])
        step = np.ldexp(1.0, np.maximum(exponent, -125) - 24)
        return low.view(np.uint32).astype(np.int64), low.astype(np.float64), low + step
    table = magnitudes(dtype)
    table = np.append(table, 2 * table[-1] - table[-2])
    low = np.minimum(np.searchsorted(table, x, side="right") - 1, len(table) - 2)
    return low, table[low], table[low + 1]


@np.errstate(all="ignore")
def store(x: np.ndarray, dtype: torch.dtype, words: np.ndarray | None) -> Tensor:
    """Round float32 or float64 values to a storage type once."""
    if dtype == torch.float64 or (dtype == torch.float32 and x.dtype == np.float32):
        return torch.from_numpy(x.copy()).to(dtype)
    magnitude = np.abs(x.astype(np.float64))
    finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
    pattern, low, high = neighbours(finite, dtype)
    largest = 0x7F7FFFFF if dtype == torch.float32 else len(magnitudes(dtype)) - 1
    infinity = largest if dtype == torch.float8_e4m3fn else largest + 1
    if words is None:
        middle = low + (high - low) / 2
        pattern = pattern + ((finite > middle) | ((finite == middle) & (pattern % 2 == 1)))
        pattern = np.minimum(pattern, infinity)
    else:
        # up with probability (x - low) / (high - low), decided by a 32-bit number
        part = (finite - low) / (high - low) * 2.0**32
        pattern = pattern + ((part >= 2.0**32 - words) & (pattern < largest))
    pattern = np.where(np.isinf(magnitude), infinity, pattern)
    pattern = np.where(
        np.isnan(magnitude), 0x7FC00000 if dtype == torch.float32 else len(values(dtype)) // 2 - 1, pattern
    )
    sign_bit = 1 << (torch.empty(0, dtype=dtype).element_size() * 8 - 1)
    return from_codes(np.where(np.signbit(x), pattern + sign_bit, pattern), dtype)


def rounds(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10: four 32-bit words from a counter of four and a key of two."""
    for _ in range(10):
        left, right = divmod(0xD2511F53 * counter[0], 2**32), divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [right[0] ^ counter[1] ^ key[0], right[1], left[0] ^ counter[3] ^ key[1], left[1]]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def philox(seed: int, stream: int, index: int) -> int:
    """The random word of one element."""
    counter = [(index >> 2) & 0xFFFFFFFF, index >> 34, stream & 0xFFFFFFFF, stream >> 32]
    return rounds(counter, [seed & 0xFFFFFFFF, seed >> 32])[index % 4]


@cache
def words(seed: int, stream: int, offset: int, count: int) -> np.ndarray:
    return np.array([philox(seed, stream, (offset + i) % 2**64) for i in range(count)], dtype=np.float64)


def expected(
    op: str,
    inputs: list[Tensor],
    factors: tuple[float, ...],
    out: torch.dtype,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    stream: int = 0,
    offset: int = 0,
) -> Tensor:
    value = compute(op, inputs, factors, out)
    random = words(seed, stream, offset, value.size) if rounding == "stochastic" else None
    return store(value, out, random).view(inputs[0].shape)


def assert_same(got: Tensor, wanted: Tensor, what: str = "") -> None:
    """Equal bit for bit, except that any NaN is as good as any other."""
    assert got.dtype == wanted.dtype, f"{what}: {got.dtype}, wanted {wanted.dtype}"
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    a, b = codes(got), codes(wanted)
    wrong = np.flatnonzero(a != b)
    if wrong.size:
        wrong = wrong[
            ~(np.isnan(widen(from_codes(a[wrong], got.dtype))) & np.isnan(widen(from_codes(b[wrong], got.dtype))))
        ]
    if wrong.size:
        i = int(wrong[0])
        raise AssertionError(f"{what}: {wrong.size} of {a.size} differ, first at {i}: got {a[i]:#x}, wanted {b[i]:#x}")


@cache
@np.errstate(all="ignore")
def specials(dtype: torch.dtype) -> Tensor:
    """±0, every power of two near a border of some type with its neighbours, largest values, infinities, NaN."""
    if dtype in _FIELDS:
        if dtype.itemsize == 1:
            return from_codes(np.arange(256), dtype)
        exponent_bits, fraction_bits = _FIELDS[dtype]
        fractions = [0, 1, 2, 2 ** (fraction_bits - 1), 2**fraction_bits - 1]
        patterns = [e << fraction_bits | f for e in range(2**exponent_bits) for f in fractions]
        return from_codes(np.array([sign << 15 | p for sign in (0, 1) for p in patterns]), dtype)
    real = np.float32 if dtype == torch.float32 else np.float64
    info = np.finfo(real)
    points = [
        0.0,
        info.max,
        np.inf,
        np.nan,
        info.smallest_subnormal,
        info.smallest_normal,
        1 / 3,
        65504,
        65520,
        448,
        464,
    ]
    borders = (
        -1074,
        -1022,
        -150,
        -149,
        -134,
        -133,
        -127,
        -126,
        -25,
        -24,
        -17,
        -16,
        -15,
        -14,
        -10,
        -9,
        -7,
        -6,
        0,
        8,
        15,
        127,
    )
    for e in borders:
        points += [
            np.ldexp(m, e) for m in (1.0, 1.25, 1.5, 1.75, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 2 - 2.0**-9)
        ]
    array = np.array(points).astype(real)
    array = np.concatenate([array, np.nextafter(array, real(0)), np.nextafter(array, real(np.inf))])
    return torch.from_numpy(np.concatenate([array, -array]))


@np.errstate(all="ignore")
def sample(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """A mixture that meets every branch: special values, weights of a model, random bit patterns."""
    generator = np.random.default_rng([seed, STORAGE.index(dtype)])
    width = dtype.itemsize
    special = codes(specials(dtype))[generator.integers(len(specials(dtype)), size=count)]
    weights = codes(store(generator.normal(0, 0.02, count), dtype, None))
    patterns = generator.integers(0, 256**width - 1, count, dtype=f"u{width}", endpoint=True)
    if width == 8:  # most float64 exponents are beyond all other types: keep to those around them
        patterns = np.ldexp(generator.uniform(-2, 2, count), generator.integers(-160, 135, count)).view("u8")
    which = generator.integers(0, 4, count)
    return from_codes(np.choose(which, [special, weights, weights, patterns]), dtype)
