"""Quantized models for tests: weights that are stored in one of the formats, and the numbers that a folder holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_models import Tensors, read_model
from torch import Tensor

from ires_kernels.backends import decoding
from ires_kernels.checkpoints.schemes import quantized
from ires_kernels.checkpoints.validation import open_checkpoint

F8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def numbers(folder: Path) -> Tensors:
    """All tensors by the names of their numbers: what is quantized in float32, all else as it is stored."""
    stored, found = read_model(folder), quantized(open_checkpoint(folder))
    assert not found.refused, found.refused
    tensors = {name: tensor for name, tensor in stored.items() if name not in found.parts}
    for name, ref in found.weights.items():
        parts = {part: raw(stored[each.name]) for part, each in ref.parts}
        out = torch.empty(ref.numel)
        size = ref.span(0, ref.numel)
        parts["codes"] = parts["codes"][size[0] : sum(size)]
        decoding.decode(ref.format, ref.full, 0, ref.numel, parts, out)
        tensors[name] = out.reshape(ref.shape)
    return tensors


def raw(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def expand(scale: Tensor, rows: int, columns: int, shape: torch.Size) -> Tensor:
    """A grid of scales over a matrix, cut at its edges."""
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def amax(w: Tensor, rows: int, columns: int) -> Tensor:
    """The largest |w| of each block."""
    down, across = -(-w.shape[0] // rows), -(-w.shape[1] // columns)
    padded = torch.zeros(down * rows, across * columns)
    padded[: w.shape[0], : w.shape[1]] = w.abs()
    return padded.reshape(down, rows, across, columns).amax((1, 3)).clamp(min=1e-6)


def fp8(rows: int, columns: int, suffix: str, scale: torch.dtype = torch.float32, scalar: bool = False) -> Any:
    """A maker of float8 weights with a scale for each block of so many rows and columns; 0 is all of them."""

    def make(name: str, weight: Tensor) -> Tensors:
        w = weight.float()
        r, c = rows or w.shape[0], columns or w.shape[1]
        s = amax(w, r, c) / 448
        if scale in (E8M0, torch.uint8):
            exponent = torch.ceil(torch.log2(s)) + 127
            s, stored = torch.exp2(exponent - 127), exponent.to(torch.uint8)
            stored = stored.view(E8M0) if scale == E8M0 else stored
        else:
            stored = s.to(scale)
            s = stored.float()
        codes = (w / expand(s, r, c, w.shape)).clamp(-448, 448).to(F8)
        return {name: codes, name.removesuffix("weight") + suffix: stored.reshape(()) if scalar else stored}

    return make


def int8(name: str, weight: Tensor) -> Tensors:
    w = weight.float()
    s = (amax(w, 1, w.shape[1]) / 127.5).bfloat16()
    codes = (w / s.float()).round().clamp(-128, 127).to(torch.int8)
    return {name: codes, f"{name}_scale": s}


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def four_bits(blocks: Tensor, scale: Tensor) -> Tensor:
    """The nearest of what four bits stand for, in pairs of which the first is in the low bits."""
    codes = ((blocks / scale[..., None])[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def exponents(blocks: Tensor) -> Tensor:
    return (torch.floor(torch.log2(blocks.abs().amax(-1).clamp(min=1e-6))) - 2).clamp(-127, 127)


def mxfp4(name: str, weight: Tensor) -> Tensors:
    """compressed-tensors, as Kimi has it."""
    blocks = weight.float().reshape(len(weight), -1, 32)
    exponent = exponents(blocks)
    codes = four_bits(blocks, torch.exp2(exponent)).reshape(len(weight), -1)
    return {f"{name}_packed": codes, f"{name}_scale": (exponent + 127).to(torch.uint8)}


def nvfp4(name: str, weight: Tensor) -> Tensors:
    blocks = weight.float().reshape(len(weight), -1, 16)
    whole = 2688 / weight.abs().max().float()
    scale = (blocks.abs().amax(-1) / 6 * whole).clamp(min=2**-9).to(F8)
    codes = four_bits(blocks, scale.float() / whole).reshape(len(weight), -1)
    return {f"{name}_packed": codes, f"{name}_scale": scale, f"{name}_global_scale": whole.reshape(1)}


def int4(name: str, weight: Tensor) -> Tensors:
    blocks = weight.float().reshape(len(weight), -1, 32)
    scale = (blocks.abs().amax(-1) / 7.5).bfloat16()
    codes = (blocks / scale.float()[..., None]).round().clamp(-8, 7).long().reshape(len(weight), -1, 8) + 8
    words = (codes << 4 * torch.arange(8)).sum(-1)
    words = torch.where(words < 2**31, words, words - 2**32).int()
    return {f"{name}_packed": words, f"{name}_scale": scale, f"{name}_shape": torch.tensor(weight.shape)}


def gpt_oss(name: str, weight: Tensor) -> Tensors:
    """Experts (in, out), stored as (out, in) in blocks of 32."""
    w = weight.float().transpose(1, 2)
    blocks = w.reshape(*w.shape[:2], -1, 32)
    exponent = exponents(blocks)
    codes = four_bits(blocks, torch.exp2(exponent))
    return {f"{name}_blocks": codes, f"{name}_scales": (exponent + 127).to(torch.uint8)}


def _fp8(*block: int) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": list(block) or None}


def ct(form: str, strategy: str, bits: int, kind: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return settings | {"quantization_status": "compressed", "ignore": ["lm_head"], "version": "0.15.0"}


Maker = Callable[[str, Tensor], Tensors]

ENCODED: dict[str, tuple[Maker, dict[str, Any]]] = {
    "fp8-block": (fp8(16, 16, "weight_scale_inv"), _fp8(16, 16)),
    "fp8-block bf16": (fp8(16, 16, "weight_scale_inv", torch.bfloat16), _fp8(16, 16)),
    "fp8-block e8m0": (fp8(16, 16, "weight_scale_inv", E8M0), _fp8(16, 16)),
    "fp8-channel": (fp8(1, 0, "weight_scale", torch.bfloat16), ct("float-quantized", "channel", 8, "float")),
    "fp8-tensor": (fp8(0, 0, "weight_scale_inv", scalar=True), _fp8()),
    "mxfp8": (fp8(1, 32, "weight_scale", torch.uint8), ct("mxfp8-quantized", "group", 8, "float", group_size=32)),
    "int8-channel": (int8, ct("int-quantized", "channel", 8, "int")),
}
DECODED: dict[str, tuple[Maker, dict[str, Any]]] = {
    "mxfp4": (mxfp4, ct("mxfp4-pack-quantized", "group", 4, "float", group_size=32)),
    "nvfp4": (nvfp4, ct("nvfp4-pack-quantized", "tensor_group", 4, "float", group_size=16)),
    "pack-quantized": (int4, ct("pack-quantized", "group", 4, "int", group_size=32)),
}
FORMATS = ENCODED | DECODED
