"""Codes of 8 and 4 bits with a scale beside them, of which dtype and shape tell the format."""

from __future__ import annotations

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.codes import EXPONENTS, FLOAT_SCALES, Codes, Undecided, check
from ires_kernels.checkpoints.grids import grid
from ires_kernels.checkpoints.quantized import QuantizedRef

SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight")
OTHER_SCALES = ("scale", "SCB")
"""Names that other tensors have as well, and so count only where there is none of the first."""
FUSED_SCALES = ("scale_inv", "scale", *SCALES)


def scaled(codes: Codes) -> QuantizedRef:
    """A weight whose codes are bytes, in a tensor of its shape or of half as many columns. Raises Undecided."""
    ref, scale = codes.ref, _scale(codes)
    if scale.name == f"{codes.stem}scale" and not codes.is_fused and scale.dtype != "F8_E8M0":
        # TransformerEngine writes by this name what codes are divided by, others what they are multiplied with.
        raise Undecided(f"{scale.name} is {scale.dtype}, wanted F8_E8M0, or another name: not decoded")
    if len(ref.shape) < 2:
        raise Undecided(f"{ref.name} has the shape {list(ref.shape)}, wanted that of a matrix")
    if ref.dtype == "F8_E4M3":
        return _fp8(codes, scale)
    if ref.dtype == "U8" and scale.dtype == "F8_E4M3":
        return _nvfp4(codes, scale)
    if ref.dtype == "I8" and scale.name == f"{codes.stem}SCB":
        codes.add("scale", check(scale, ref.shape[:1], "F32"))
        return codes.weight("bnb-int8", ref.shape, {"rows": 1, "columns": ref.shape[1], "scale": "F32"})
    if scale.dtype == "F8_E8M0" or (scale.dtype == "U8" and ref.dtype == "U8"):
        return _mxfp4(codes, scale)
    if ref.dtype == "I8" and scale.dtype in FLOAT_SCALES:
        return _int8(codes, scale)
    raise Undecided(f"{ref.name} has {ref.dtype} codes with a scale of {scale.dtype}, {scale.name}: not decoded")


def blocks(codes: Codes) -> QuantizedRef:
    """MXFP4 of gpt-oss, whose numbers are transposed. Raises Undecided."""
    shape = codes.ref.shape
    scale = codes.add("scale", codes.wanted("_scales"))
    if len(shape) < 3 or shape[-1] != 16:
        raise Undecided(f"{codes.ref.name} has the shape {list(shape)}, wanted [experts, out, in/32, 16]")
    check(scale, shape[:-1], *EXPONENTS)
    full = (*shape[:-3], 32 * shape[-2], shape[-3])
    return codes.weight("mxfp4-transposed", full, {"rows": 1, "columns": 32, "scale": "F8_E8M0"})


def _scale(codes: Codes) -> TensorRef:
    names = FUSED_SCALES if codes.is_fused else SCALES
    found = [name for name in names if codes.beside(name)] or [name for name in OTHER_SCALES if codes.beside(name)]
    if len(found) > 1:
        raise Undecided(
            f"{codes.ref.name} has the scales {' and '.join(codes.stem + name for name in found)}, wanted one"
        )
    return codes.wanted(*(found or (*names, *OTHER_SCALES)))


def _fp8(codes: Codes, scale: TensorRef) -> QuantizedRef:
    full, said = codes.ref.shape, codes.claims.of("fp8", "mxfp8")
    codes.confirm("fp8", "fp8", "mxfp8")  # before its sides, of which other settings say nothing
    codes.add("scale", check(scale, None, *FLOAT_SCALES, *EXPONENTS))
    read = "F8_E8M0" if scale.dtype in EXPONENTS else scale.dtype
    grouped = full[-1] % 32 == 0 and scale.shape == (*full[:-1], full[-1] // 32)
    if read == "F8_E8M0" and grouped and (full[-1] > 32 or codes.claims.of("mxfp8")):
        return codes.weight("mxfp8", full, {"rows": 1, "columns": 32, "scale": read})
    kind, rows, columns = grid(full, scale, said, codes.claims.where)
    return codes.weight(f"fp8-{kind}", full, {"rows": rows, "columns": columns, "scale": read})


def _int8(codes: Codes, scale: TensorRef) -> QuantizedRef:
    full = codes.ref.shape
    codes.add("scale", scale)
    kind, rows, columns = grid(full, scale, codes.claims.of("int8"), codes.claims.where)
    settings: dict[str, int | str] = {"rows": rows, "columns": columns, "scale": scale.dtype}
    zero = codes.beside("weight_zero_point", "zero_point")
    if zero is not None:
        codes.add("zero_point", check(zero, scale.shape, "I8"))
        settings["zero_point"] = "I8"
    return codes.weight(f"int8-{kind}", full, settings)


def _nvfp4(codes: Codes, scale: TensorRef) -> QuantizedRef:
    shared = [name for name in ("weight_scale_2", "scale_2", "weight_global_scale") if codes.beside(name)]
    if len(shared) != 1:
        raise Undecided(
            f"{codes.ref.name} has a scale of F8_E4M3 for each block, and {len(shared)} for all of it, wanted one: "
            f"{codes.stem}weight_scale_2 or {codes.stem}weight_global_scale"
        )
    full = _halved(codes, scale, 16)
    second = codes.wanted(*shared)
    if second.dtype != "F32" or second.numel not in (1, *full[:-2][:1]):
        raise Undecided(f"{second.name} is {second.dtype} {list(second.shape)}, wanted one F32 number")
    codes.add("scale", scale)
    codes.add("global", second)
    how = "divide" if shared[0] == "weight_global_scale" else "multiply"
    return codes.weight("nvfp4", full, {"rows": 1, "columns": 16, "scale": "F8_E4M3", "global": how})


def _mxfp4(codes: Codes, scale: TensorRef) -> QuantizedRef:
    full = _halved(codes, scale, 32)
    codes.add("scale", scale)
    lift = {"lift": codes.claims.lift} if codes.claims.lift else {}
    return codes.weight("mxfp4", full, {"rows": 1, "columns": 32, "scale": "F8_E8M0", **lift})


def _halved(codes: Codes, scale: TensorRef, size: int) -> tuple[int, ...]:
    """The shape of the numbers of which each byte of codes holds two, where so many of a row share a scale."""
    shape = codes.ref.shape
    full = (*shape[:-1], 2 * shape[-1])
    if full[-1] % size or scale.shape != (*full[:-1], full[-1] // size):
        across = scale.shape[-2:] == (2 * shape[-2] // size, shape[-1])
        more = ", which is that of a weight packed along its rows: not decoded" if across else ""
        wanted = ", ".join(map(str, (*full[:-1], f"{full[-1]}/{size}")))
        found = f"{scale.name} has the shape {list(scale.shape)}"
        raise Undecided(f"{found} for codes of the shape {list(shape)}, wanted [{wanted}]{more}")
    return full
