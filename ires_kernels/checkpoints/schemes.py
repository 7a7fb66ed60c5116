"""Quantized weights of a checkpoint by the names and shapes of their numbers: what is stored of each, in which format.

Tensors tell first: the dtype and shape of codes and of what is beside them. Settings confirm it, and say what tensors
leave open; where the two contradict each other, nothing is guessed. Headers are read, and where they leave the shape of
a weight open, the few bytes that tell it.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.claims import claims
from ires_kernels.checkpoints.codes import Codes, Undecided
from ires_kernels.checkpoints.packed import bnb_4bit, gptq_or_awq, packed
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.checkpoints.scaled import FUSED_SCALES, OTHER_SCALES, SCALES, blocks, scaled
from ires_kernels.checkpoints.sources import Files

_NARROW = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8"}
_OTHERS = (
    *("input_scale", "input_scale_ub", "input_zero_point", "input_global_scale", "activation_scale", "qscale_act"),
    *("output_scale", "weight_format"),
)
"""What belongs to a weight and is not for its numbers: scales of what goes in and out, and a mark of bitsandbytes."""
_TOO_MUCH = ("pre_quant_scale", "svdquant_lora_a", "lora_a")
"""What changes weights besides their scales."""
_FAMILIES = {
    **dict.fromkeys(("fp8-tensor", "fp8-channel", "fp8-block"), ("fp8",)),
    **dict.fromkeys(("int8-tensor", "int8-channel", "int8-block"), ("int8",)),
    **dict.fromkeys(("bnb-4bit", "bnb-int8"), ("bnb",)),
    "pack-quantized": ("pack-quantized", "int8"),
    "mxfp4-transposed": ("mxfp4",),
}
"""What settings may call a format, where that is not its own name."""


@dataclass
class Quantized:
    """The quantized weights of a checkpoint."""

    weights: dict[str, QuantizedRef] = field(default_factory=dict)
    """Those that can be decoded, by the name of the weight."""
    refused: dict[str, str] = field(default_factory=dict)
    """The others by name, and why not: what was found, and what is wanted."""
    parts: dict[str, str] = field(default_factory=dict)
    """All stored tensors that belong to a weight of either kind, with the name of that weight."""


_known: WeakKeyDictionary[Checkpoint, Quantized] = WeakKeyDictionary()


def quantized(checkpoint: Checkpoint) -> Quantized:
    """The quantized weights of a checkpoint; nothing for one that is not quantized."""
    if checkpoint not in _known:
        _known[checkpoint] = _search(checkpoint)
    return _known[checkpoint]


def _search(checkpoint: Checkpoint) -> Quantized:
    found, said = Quantized(), claims(checkpoint)
    some = [name for name in checkpoint.tensors if name.endswith((*_OTHERS, *_TOO_MUCH))]
    endings = [ending for ending in (*_OTHERS, *_TOO_MUCH) if any(name.endswith(ending) for name in some)]
    with closing(Files(checkpoint.file_ids, ())) as files:
        for ref in checkpoint.tensors.values():
            place = _place(checkpoint, ref, bool(said.of("fp8", "mxfp8")))
            if place is None:
                continue
            codes = Codes(checkpoint, said, files, ref, *place)
            codes.others += [name for name in map(codes.stem.__add__, endings) if name in checkpoint.tensors]
            try:
                found.weights[codes.name] = _weight(codes)
            except Undecided as why:
                found.refused[codes.name] = said.refused or f"{why}"
                found.weights.pop(codes.name, None)  # of another tensor by the same name
            belong = [ref.name, *(part.name for _, part in codes.parts), *codes.others]
            found.parts.update(dict.fromkeys(belong, codes.name))
    return found


def _place(checkpoint: Checkpoint, ref: TensorRef, fp8: bool) -> tuple[str, str] | None:
    """The name of the weight of which a tensor holds the codes, and what those of its companions begin with.

    None for all other tensors. `fp8`: by the settings, weights are float8 with scales.
    """
    module, dot, own = ref.name.rpartition(".")
    stem = module + dot

    def there(stem: str, *endings: str) -> bool:
        names = (stem + ending for ending in endings)
        return any(name in checkpoint.tensors or name in checkpoint.elsewhere for name in names)

    if own == "weight_packed" or (own == "qweight" and ref.dtype == "I32"):
        return f"{stem}weight", stem
    if own.endswith("_blocks") and ref.dtype == "U8":
        name = ref.name.removesuffix("_blocks")
        return (name, name) if there(name, "_scales") else None
    if own == "weight" and there(ref.name, ".absmax", ".quant_map"):
        return ref.name, f"{ref.name}."
    if ref.dtype not in _NARROW:
        return None
    if own == "weight":
        meant = (fp8 and ref.dtype == "F8_E4M3") or there(stem, *SCALES, *OTHER_SCALES)
        return (ref.name, stem) if meant else None
    return (ref.name, f"{ref.name}_") if there(f"{ref.name}_", *FUSED_SCALES) else None


def _weight(codes: Codes) -> QuantizedRef:
    """The weight in its format. Raises Undecided."""
    ref, own = codes.ref, codes.ref.name.rpartition(".")[2]
    if not ref.numel:
        raise Undecided(f"{ref.name} has no elements")
    if own == "qweight":
        weight = gptq_or_awq(codes)
    elif codes.stem == codes.name:
        weight = blocks(codes)
    elif codes.stem == f"{codes.name}.":
        weight = bnb_4bit(codes)
    elif own == "weight_packed" and ref.dtype == "I32":
        weight = packed(codes)
    else:
        weight = scaled(codes)
    if codes.claims.refused:
        raise Undecided(codes.claims.refused)
    if ref.name != codes.name and codes.name in codes.checkpoint.tensors:
        raise Undecided(f"both {codes.name} and {ref.name} are in the model, wanted one of them")
    odd = next((name for name in codes.others if name.removeprefix(codes.stem) in _TOO_MUCH), None)
    if odd is not None:
        raise Undecided(f"{odd} changes the weight besides its scale: not decoded")
    codes.confirm(f"{weight.format}", *_FAMILIES.get(weight.format.name, (weight.format.name,)))
    return weight
