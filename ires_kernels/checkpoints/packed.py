"""Codes that are packed into words or a flat stream, with the settings that it takes to unpack them."""

from __future__ import annotations

import json
import math
import struct
from typing import Any, TypeGuard

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.claims import Claim
from ires_kernels.checkpoints.codes import FLOAT_SCALES, Codes, Undecided, check
from ires_kernels.checkpoints.grids import grid, group
from ires_kernels.checkpoints.quantized import QuantizedRef


def packed(codes: Codes) -> QuantizedRef:
    """Integers in the 32-bit words of compressed-tensors. Raises Undecided."""
    if len(codes.ref.shape) < 2:
        raise Undecided(f"{codes.ref.name} has the shape {list(codes.ref.shape)}, wanted that of a matrix")
    lead = codes.ref.shape[:-1]
    scale = codes.add("scale", check(codes.wanted("weight_scale"), None, *FLOAT_SCALES))
    if stated := codes.beside("weight_shape"):
        codes.add("shape", check(stated, (len(codes.ref.shape),), "I64", "I32"))
    codes.confirm("pack-quantized", "pack-quantized", "int8")
    said = codes.claims.of("pack-quantized", "int8")
    width, bits = _width(codes, scale, stated, said)
    full = (*lead, width)
    kind, rows, columns = grid(full, scale, [c for c in said if c.bits in (bits, None)], codes.claims.where)
    settings: dict[str, int | str] = {"bits": bits, "rows": rows, "columns": columns, "scale": scale.dtype}
    zero = codes.beside("weight_zero_point")
    if zero is not None:
        down, across = -(-lead[-1] // rows), -(-width // columns)
        shape = (*lead[:-1], down if zero.dtype == "I8" else -(-down * bits // 32), across)
        codes.add("zero_point", check(zero, scale.shape if kind == "tensor" else shape, "I8", "I32"))
        settings["zero_point"] = "I8" if zero.dtype == "I8" else "packed"
    order = codes.beside("weight_g_idx")
    if order is not None:
        codes.add("g_idx", check(order, (width,), "I32"))
    return codes.weight("pack-quantized", full, settings)


def _width(codes: Codes, scale: TensorRef, stated: TensorRef | None, said: list[Claim]) -> tuple[int, int]:
    """Columns of the numbers and bits of a code: by the settings where they leave no doubt, or else by the file."""
    words, groups = codes.ref.shape[-1], scale.shape[-1] if len(scale.shape) > 1 else 1
    widths = {(words * 32 // claim.bits, claim.bits): claim.columns for claim in said if claim.bits in (2, 4, 8)}
    fits = [each for each, columns in widths.items() if columns and groups > 1 and columns * groups == each[0]]
    if len(fits) == 1:
        return fits[0]
    if stated is None:
        raise Undecided(f"there is no {codes.stem}weight_shape in any file, which tells the columns of the weight")
    shape = _stated_shape(codes, stated)
    possible = [bits for bits in (2, 4, 8) if -(-shape[-1] * bits // 32) == words]
    told = [bits for bits in possible if bits in {claim.bits for claim in said}] or possible
    if not told:
        raise Undecided(f"{codes.ref.name} has {words} words for {shape[-1]} columns, wanted 2, 4 or 8 bits for each")
    if len(told) > 1:  # of at most 8 columns
        raise Undecided(f"{codes.ref.name} has one word for {shape[-1]} columns, and nothing tells the bits of each")
    return shape[-1], told[0]


def _stated_shape(codes: Codes, stated: TensorRef) -> tuple[int, ...]:
    count = len(codes.ref.shape)
    shape = struct.unpack(f"<{count}{'q' if stated.dtype == 'I64' else 'i'}", codes.read(stated))
    if shape[:-1] != codes.ref.shape[:-1] or not 0 < shape[-1] <= 32 * codes.ref.shape[-1]:
        raise Undecided(f"{stated.name} says {list(shape)}, and the codes have the shape {list(codes.ref.shape)}")
    return shape


def gptq_or_awq(codes: Codes) -> QuantizedRef:
    """Integers in 32-bit words along the other dimension than their numbers are. Raises Undecided."""
    scale = codes.add("scale", check(codes.wanted("scales"), None, *FLOAT_SCALES))
    zero = codes.add("zero_point", codes.wanted("qzeros"))
    order = codes.beside("g_idx")
    if order is not None:
        codes.add("g_idx", order)
    if len(codes.ref.shape) != 2 or len(scale.shape) != 2:
        shapes = f"{list(codes.ref.shape)} and {list(scale.shape)}"
        raise Undecided(f"{codes.ref.name} and {scale.name} have the shapes {shapes}, wanted those of matrices")
    down, words = codes.ref.shape
    groups, out = scale.shape
    where = codes.claims.where
    if order is None and out == 8 * words and not codes.claims.of("gptq"):
        size = group(down, groups, codes.claims.of("awq"), scale, where)
        check(zero, (groups, words), "I32")
        return codes.weight("awq", (out, down), {"bits": 4, "rows": 1, "columns": size, "scale": scale.dtype})
    codes.confirm("gptq", "gptq")
    claim = next(iter(codes.claims.of("gptq")), Claim("gptq"))
    if claim.bits not in (2, 3, 4, 8):
        found = f"{where} says {claim.bits} bits" if where else "there is no quantization_config in a config.json"
        raise Undecided(f"{codes.ref.name} has GPTQ codes, and {found}: wanted one that says 2, 3, 4 or 8 bits")
    width = down * 32 // claim.bits
    size = group(width, groups, [claim], scale, where)
    check(scale, (groups, words), scale.dtype)
    check(zero, (groups, out * claim.bits // 32), "I32")
    if order is not None:
        check(order, (width,), "I32")
    zeros = "middle" if claim.symmetric else "v2" if claim.variant == "gptq_v2" else "v1"
    settings: dict[str, int | str] = {"bits": claim.bits, "rows": 1, "columns": size, "scale": scale.dtype}
    settings["zeros"] = zeros
    return codes.weight("gptq", (out, width), settings)


def bnb_4bit(codes: Codes) -> QuantizedRef:
    """A flat stream of nf4 or fp4 of bitsandbytes, of which a companion says the shape. Raises Undecided."""
    state = codes.wanted("quant_state.bitsandbytes__nf4" if not codes.beside(_FP4) else _FP4)
    codes.others.append(state.name)
    said = _state(codes, state)
    full, block = said.get("shape"), said.get("blocksize")
    if not (isinstance(full, list) and full and all(map(_is_count, full)) and _is_count(block)):
        raise Undecided(f"{state.name} says no shape and blocksize")
    count, nested = math.prod(full), codes.beside("nested_absmax") is not None
    if codes.ref.nbytes != -(-count // 2):
        raise Undecided(f"{codes.ref.name} has {codes.ref.nbytes} bytes, wanted {-(-count // 2)} for {full}")
    blocks = -(-count // block)
    codes.add("absmax", check(codes.wanted("absmax"), (blocks,), "U8" if nested else "F32"))
    codes.add("quant_map", check(codes.wanted("quant_map"), (16,), "F32"))
    settings: dict[str, int | str] = {"columns": block}
    if nested:
        size, offset = said.get("nested_blocksize"), said.get("nested_offset")
        if not _is_count(size) or not isinstance(offset, float) or not math.isfinite(offset):
            raise Undecided(f"{state.name} says no nested_blocksize and nested_offset")
        codes.add("nested_absmax", check(codes.wanted("nested_absmax"), (-(-blocks // size),), "F32"))
        codes.add("nested_quant_map", check(codes.wanted("nested_quant_map"), (256,), "F32"))
        settings |= {"nested": size, "offset": offset.hex()}
    return codes.weight("bnb-4bit", tuple(full), settings)


_FP4 = "quant_state.bitsandbytes__fp4"


def _state(codes: Codes, state: TensorRef) -> dict[str, Any]:
    try:
        said = json.loads(codes.read(state)) if state.nbytes < 1 << 16 else None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise Undecided(f"{state.name} is not a JSON object")
    return said


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 1 << 31
