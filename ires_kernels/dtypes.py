"""The one table of storage types: what safetensors, torch and csrc call them, how wide they are, and what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Dtype:
    """A storage type."""

    name: str
    """Of safetensors."""
    bits: int
    kind: Literal["truth", "integer", "float", "complex"]
    torch: str
    """The attribute of torch, which older versions may lack; empty where no version has it."""


@dataclass(frozen=True, slots=True)
class Number(Dtype):
    """A storage type that arithmetic is defined on, with its bit patterns without the sign bit."""

    csrc: int
    """Its DType in csrc/arith.h."""
    fraction: int
    """Stored significand bits."""
    bias: int
    """Of the exponent."""
    largest: int
    """Code of the largest finite value."""
    infinity: int
    """Code that overflow and infinity get."""
    nan: int

    @property
    def limit(self) -> float:
        """Half a step beyond the largest finite value, where rounding to nearest begins to overflow."""
        significand = (1 << self.fraction) + (self.largest & ((1 << self.fraction) - 1))
        return (significand + 0.5) * 2.0 ** ((self.largest >> self.fraction) - self.bias - self.fraction)

    @property
    def limit_overflows(self) -> bool:
        """Whether `limit` itself overflows: a tie goes to the even one of its neighbours."""
        return self.largest % 2 == 1


STORAGE: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype("BOOL", 8, "truth", "bool"),
        Dtype("F4", 4, "float", ""),  # torch has pairs of them, which give a tensor another shape
        Dtype("F6_E2M3", 6, "float", ""),
        Dtype("F6_E3M2", 6, "float", ""),
        Dtype("U8", 8, "integer", "uint8"),
        Dtype("I8", 8, "integer", "int8"),
        Number("F8_E5M2", 8, "float", "float8_e5m2", 5, 2, 15, 0x7B, 0x7C, 0x7E),
        Number("F8_E4M3", 8, "float", "float8_e4m3fn", 4, 3, 7, 0x7E, 0x7E, 0x7F),  # has no infinity: saturates
        Dtype("F8_E8M0", 8, "float", "float8_e8m0fnu"),
        Dtype("F8_E4M3FNUZ", 8, "float", "float8_e4m3fnuz"),
        Dtype("F8_E5M2FNUZ", 8, "float", "float8_e5m2fnuz"),
        Dtype("I16", 16, "integer", "int16"),
        Dtype("U16", 16, "integer", "uint16"),
        Number("F16", 16, "float", "float16", 2, 10, 15, 0x7BFF, 0x7C00, 0x7E00),
        Number("BF16", 16, "float", "bfloat16", 3, 7, 127, 0x7F7F, 0x7F80, 0x7FC0),
        Dtype("I32", 32, "integer", "int32"),
        Dtype("U32", 32, "integer", "uint32"),
        Number("F32", 32, "float", "float32", 1, 23, 127, 0x7F7FFFFF, 0x7F800000, 0x7FC00000),
        Dtype("C64", 64, "complex", "complex64"),
        Number("F64", 64, "float", "float64", 0, 52, 1023, (0x7FF << 52) - 1, 0x7FF << 52, 0x7FF8 << 48),
        Dtype("I64", 64, "integer", "int64"),
        Dtype("U64", 64, "integer", "uint64"),
    )
}
"""Every dtype of safetensors 0.8, by name. A tensor must fill whole bytes."""

NUMBERS = {
    dtype.name: dtype
    for dtype in sorted((d for d in STORAGE.values() if isinstance(d, Number)), key=lambda number: number.csrc)
}
"""Those of them that arithmetic is defined on, in csrc's order."""

FLOATS = {number.name: number.bits // 8 for number in NUMBERS.values()}
"""Their widths in bytes."""

_SPELLINGS = {
    spelling: number.name
    for number in NUMBERS.values()
    for spelling in (number.name.lower(), number.torch, f"torch.{number.torch}", f"fp{number.name[1:]}".lower())
}


def number_of(dtype: object) -> Number | None:
    """The number that a dtype is, however it is spelt: f32, F32, fp32, float32 or torch.float32, or torch's itself.

    >>> number_of("torch.bfloat16").name, number_of("int8")
    ('BF16', None)
    """
    text = dtype if isinstance(dtype, str) else f"{dtype}" if type(dtype).__name__ == "dtype" else ""
    return NUMBERS.get(_SPELLINGS.get(text.lower(), ""))
