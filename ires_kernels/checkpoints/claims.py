"""What the settings of a model claim of its quantized weights, which their tensors have to bear out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import brief

# The formats of compressed-tensors by their names; a name that is not here says less than the weights' own settings.
_FORMATS = {
    "float-quantized": "fp8",
    "int-quantized": "int8",
    "pack-quantized": "pack-quantized",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "mxfp8-quantized": "mxfp8",
}
_FORMATS_NOT_DECODED = {"mxfp6-pack-quantized", "sparse-24-bitmask", "sparse-bitmask", "marlin-24"}
_ALGORITHMS = {"FP8_PB_WO": "fp8", "MXFP8": "mxfp8", "W4A16_NVFP4": "nvfp4", "W4A8_MXFP4_FP8": "mxfp4"}
"""Of ModelOpt, besides those that begin with the name of their format."""


class Claim(NamedTuple):
    """A format that weights may have by the settings, with what else is said of it."""

    family: str
    """A name of `formats`; "fp8" and "int8" stand for their three, "bnb" for both."""
    bits: int | None = None
    rows: int | None = None
    """Sides of a block that shares a scale; 0 is the whole side, None where nothing is said."""
    columns: int | None = None
    symmetric: bool | None = None
    variant: str = ""
    """Of gptq its checkpoint_format."""

    def __str__(self) -> str:
        bits = f" of {self.bits} bits" if self.bits else ""
        sides = [side or "all" for side in (self.rows, self.columns)]
        return f"{self.family}{bits}" + ("" if self.rows is None else f" in blocks of {sides[0]} × {sides[1]}")


@dataclass(frozen=True)
class Claims:
    """All that the settings claim."""

    where: str = ""
    """Which settings; "" where there are none."""
    formats: tuple[Claim, ...] = ()
    """Empty where nothing is said that could be contradicted."""
    refused: str = ""
    """Why no weight can be decoded by them."""
    lift: int = 0
    """What the exponents of MXFP4 scales were written too low by."""

    def of(self, *families: str) -> list[Claim]:
        """The claims of formats."""
        return [claim for claim in self.formats if claim.family in families]


def claims(checkpoint: Checkpoint) -> Claims:
    """What the settings of a checkpoint say."""
    found: list[Claim] = []
    open_ended, refused, lift = False, "", 0
    for where, block in checkpoint.blocks.items():
        method = _method(where, block)
        reason = _refusal(method, block)
        if reason:
            refused = refused or f"{where} has {reason}"
            continue
        said = list(_READERS[method](block))
        open_ended |= not said
        found += [claim for claim in said if claim not in found]
        if str(block.get("expert_dtype")) == "fp4":
            found.append(Claim("mxfp4"))
        if method == "compressed-tensors":
            lift = lift or _lift(block)
    where = " and ".join(checkpoint.blocks)
    return Claims(where, () if open_ended else tuple(found), refused, lift)


def _method(where: str, block: Mapping[str, Any]) -> str:
    """The quantizer, by what it says of itself or by the file that its settings are in."""
    said = str(block.get("quant_method") or "").lower().replace("_", "-")
    if said:
        return "modelopt" if said.startswith("modelopt") else said
    if where == "quantize_config.json":
        return "gptq"
    if where.endswith("hf_quant_config.json") or "quant_algo" in block:
        return "modelopt"
    if "qformat_weight" in block:
        return "mistral"
    return "compressed-tensors" if "config_groups" in block else "fp8" if "weight_block_size" in block else ""


def _refusal(method: str, block: Mapping[str, Any]) -> str:
    """What speaks against decoding, whatever the tensors look like."""
    if method not in _READERS:
        return f"the quant_method {brief(block.get('quant_method'))}, which is not decoded"
    if block.get("transform_config"):
        return "a transform_config: the weights are rotated, and are not those of a model that is not"
    sparsity = _table(block.get("sparsity_config"))
    named = [block, sparsity, *_groups(block)]
    strange = next((each["format"] for each in named if str(each.get("format")) in _FORMATS_NOT_DECODED), None)
    if strange is not None:
        return f"the format {brief(strange)}, which is not decoded"
    if method == "fp8" and "e5m2" in str(block.get("fmt")).lower():
        return f"the fmt {brief(block['fmt'])}, which is not decoded"
    if method == "awq" and str(block.get("version", "gemm")).lower() != "gemm":
        return f"the AWQ version {brief(block['version'])}, of which only gemm is decoded"
    if method == "gptq" and str(block.get("checkpoint_format") or "gptq") not in ("gptq", "gptq_v2"):
        return f"the checkpoint_format {brief(block['checkpoint_format'])}, which is not decoded"
    return ""


def _fp8(block: Mapping[str, Any]) -> Iterator[Claim]:
    sides = _sides(block.get("weight_block_size"))
    yield Claim("mxfp8" if sides == (1, 32) else "fp8", 8, *sides)


def _compressed_tensors(block: Mapping[str, Any]) -> Iterator[Claim]:
    for group in _groups(block):
        weights = _table(group.get("weights"))
        if not weights:
            continue
        bits, strategy = _whole(weights.get("num_bits")), str(weights.get("strategy"))
        size = _whole(weights.get("group_size")) or 0
        known: dict[str, tuple[int, int]] = {"tensor": (0, 0), "channel": (1, 0)}
        known |= {"group": (1, size), "tensor_group": (1, size)}
        rows, columns = known.get(strategy, _sides(weights.get("block_structure")))
        family = _FORMATS.get(str(group.get("format") or block.get("format")))
        if family is None:
            family = _family(str(weights.get("type")), bits, size)
        yield Claim(family, bits, rows, columns, _truth(weights.get("symmetric")))


def _family(kind: str, bits: int | None, size: int) -> str:
    if kind == "float":
        return {(8, 32): "mxfp8", (4, 16): "nvfp4", (4, 32): "mxfp4"}.get((bits or 0, size), "fp8")
    return "int8"


def _modelopt(block: Mapping[str, Any]) -> Iterator[Claim]:
    layers = _table(block.get("quantized_layers")).values()
    for algorithm in {str(each.get("quant_algo")) for each in [block, *map(_table, layers)]} - {"None"}:
        if algorithm != "MIXED_PRECISION":
            known = (each for each in ("nvfp4", "mxfp8", "mxfp4", "fp8") if algorithm.lower().startswith(each))
            sides = (128, 128) if algorithm == "FP8_PB_WO" else (None, None)
            yield Claim(_ALGORITHMS.get(algorithm) or next(known, algorithm), None, *sides)


def _gptq(block: Mapping[str, Any]) -> Iterator[Claim]:
    size = _whole(block.get("group_size"))
    variant = str(block.get("checkpoint_format") or "gptq")
    columns = None if size is None else max(size, 0)
    yield Claim("gptq", _whole(block.get("bits")), 1, columns, _truth(block.get("sym")), variant)


def _awq(block: Mapping[str, Any]) -> Iterator[Claim]:
    size = _whole(block.get("group_size", block.get("q_group_size")))
    yield Claim("awq", _whole(block.get("bits", block.get("w_bit"))), 1, None if size is None else max(size, 0))


_READERS: dict[str, Callable[[Mapping[str, Any]], Iterator[Claim]]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "mistral": lambda _: iter([Claim("fp8", 8)]),
    "fbgemm-fp8": lambda _: iter([Claim("fp8", 8)]),
    "mxfp4": lambda _: iter([Claim("mxfp4", 4)]),
    "mxfp8": lambda _: iter([Claim("mxfp8", 8)]),
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": lambda _: iter([Claim("bnb")]),
    "quark": lambda _: iter([Claim("fp8")]),
    "": lambda _: iter(()),
}
"""What each quantizer says; one that says nothing leaves it to the tensors."""


def _lift(block: Mapping[str, Any]) -> int:
    """compressed-tensors before 0.14 wrote the exponents of MXFP4 scales 2 too low."""
    found = re.match(r"0\.(\d+)(\.|$)", str(block.get("version")))
    return 2 if found and int(found[1]) < 14 else 0


def _sides(value: object) -> tuple[int, int] | tuple[None, None]:
    """The sides of a block, as [128, 128] or "128x128"; or nothing."""
    sides = [int(side) for side in re.findall(r"\d{1,9}", value)] if isinstance(value, str) else value
    if isinstance(sides, list) and len(sides) == 2 and all((_whole(side) or 0) > 0 for side in sides):
        return sides[0], sides[1]
    return None, None


def _groups(block: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [_table(group) for group in _table(block.get("config_groups")).values()]


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _whole(value: object) -> int | None:
    return value if type(value) is int and abs(value) < 1 << 31 else None


def _truth(value: object) -> bool | None:
    return value if type(value) is bool else None
