"""Quantized weights: which tensors are codes, on which arithmetic means nothing, and what belongs to them.

Tensors of 8 bits and fewer are numbers only where nothing speaks against it: neither a scale beside them, whatever it
is called, nor a quantization block in the settings of the model. So are integers of any width, and floats that merely
hold the bytes of codes. Everything that a module holds besides codes, but for its bias, belongs to them: scales, zero
points, shapes, the order of groups. A quantized module is one thing: no part of it is merged or skipped alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.dtypes import STORAGE
from ires_kernels.planning.rules import Rules

# What a scale is called by all quantizers seen so far, in its own part of the name: qscale_weight, _scale, SCB, …
_SCALE = re.compile(r"scale|absmax|amax|^SCB$|quant_map|quant_state|codebook|^centroids$", re.IGNORECASE)
_NO_QUANTIZER = re.compile(r"logit_scale|layer_?scale|scale_shift", re.IGNORECASE)
"""Trained numbers that have the word in their name: CLIP and Swin, ConvNeXt, diffusion transformers."""
# Codes by their name alone: GPTQ and AWQ, compressed-tensors, bitsandbytes, HQQ, torchao.
_PACKED = re.compile(r"^(qweight|qzeros|g_idx|weight_packed|W_q|Qidxs|_weight_qdata)$")
_BEHIND = re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.)")
# A scale of what goes in or comes out, beside the module that it is for: k_scale of attention.
_LOOSE = re.compile(r"(^|\.)((q|k|v|kv|prob|input|output|act|activation)_scale(_inv|_2|_ub)?|qscale_act|\w*_amax)$")


class Part(NamedTuple):
    """What makes a tensor a part of a quantized module."""

    module: str
    """Name of the module; of a scale that stands alone "", which is any module of the checkpoint."""
    code: str
    """Name of a tensor of the module that holds codes."""
    why: str
    """What that one is."""


def module(name: str) -> str:
    """The module that a tensor is a part of: what stands before ``.weight``, or else before the last dot.

    So ``a.weight``, ``a.weight_scale``, ``a.weight.absmax``, ``a.weight._data`` and ``a.weight_quantizer._scale`` all
    belong to ``a``.
    """
    name = re.sub(r"\.\w*quantizer\.(?=\w+$)", ".", re.sub(r"\.\w*centroids\.weight$", ".centroids", name))
    head, dot, _ = name.partition(".weight.")
    return head if dot else re.sub(r"(\._data)+$", "", head).rpartition(".")[0]


def is_bias(name: str) -> bool:
    """Whether this is the bias of a module, which quantizers leave in floating point."""
    own = name.rpartition(".")[2]
    return own == "bias" or (own.endswith("_bias") and own != "weight_bias")


def parts(checkpoint: Checkpoint) -> dict[str, Part]:
    """The tensors of a checkpoint that are codes of quantized weights or belong to some, by name."""
    members: dict[str, list[str]] = {}
    scales: dict[tuple[str, str], list[str]] = {}
    for name in (*checkpoint.tensors, *checkpoint.elsewhere):
        members.setdefault(module(name), []).append(name)
        own = name.rpartition(".")[2]
        if _SCALE.search(own) and not _NO_QUANTIZER.search(own):
            for key in _scaled_by(name):
                scales.setdefault(key, []).append(name)
    found: dict[str, Part] = {}
    for place, group in members.items():
        held = [checkpoint.tensors[name] for name in group if name in checkpoint.tensors]
        codes = {ref.name: why for ref in held if (why := _codes(checkpoint, ref, place, scales))}
        if codes:
            most = max(codes, key=lambda name: checkpoint.tensors[name].nbytes)
            part = Part(place, most, codes[most])
            found.update((name, part) for name in group if not is_bias(name) or name in codes)
            parent, _, last = place.rpartition(".")
            found.update((name, part) for name in scales.get((parent, last), []))
    if found or checkpoint.quantization:
        said = (None, f"a scale of quantized values, by {checkpoint.quantization}")
        code, why = next(((part.code, part.why) for part in found.values()), said)
        for name in checkpoint.tensors:
            if name not in found and _LOOSE.search(name):
                found[name] = Part("", code or name, why)
    return found


def _scaled_by(name: str) -> Iterable[tuple[str, str]]:
    """What a scale may be the scale of: a module, and the beginning of a name in it ("" for all of the module)."""
    parent, _, own = name.rpartition(".")
    for place in {module(name), parent}:
        yield place, ""
    word = _SCALE.search(own)
    if word is not None:  # the scale of `a.proj.weight` or of `a.proj` may be `a.proj_scale`, `a.proj_weight_scale`
        stem = own[: word.start()].rstrip("_.").removesuffix("_weight")
        if stem:
            yield parent, stem


def _codes(checkpoint: Checkpoint, ref: TensorRef, place: str, scales: dict[tuple[str, str], list[str]]) -> str | None:
    """Why the elements of `ref`, of the module `place`, are codes; None if they are numbers."""
    name, dtype = ref.name, ref.dtype
    own = name.rpartition(".")[2]
    if dtype == "BOOL" or _SCALE.search(own) or names.is_recomputed(ref):
        return None
    stored = STORAGE[dtype]
    narrow = stored.bits <= 8
    if narrow or stored.kind == "integer":
        parent, _, last = place.rpartition(".")
        beside = scales.get((place, ""), []) + scales.get((name, ""), []) + scales.get((parent, last), [])
        scale = min(beside, key=lambda each: (not each.startswith(name), bool(_LOOSE.search(each))), default=None)
        if scale is not None and (narrow or not _PACKED.search(own)):
            return f"{dtype} codes whose scale is {scale}"
        if _PACKED.search(own):
            return "packed quantized weights"
        if checkpoint.quantization and (narrow or (len(ref.shape) > 0 and ref.numel > 1)):
            return f"{dtype} codes, by {checkpoint.quantization}"
        return None
    behind = next((each for each in scales.get((place, ""), []) if _BEHIND.search(each)), None)
    if behind is not None and own == "weight":  # the bytes of codes in the clothes of floats
        return f"codes in {dtype} elements, by {behind}"
    return None


class Modules:
    """The modules that are quantized in one of the models of a merge, and so are one thing in all of them."""

    def __init__(self, inputs: Mapping[str, Checkpoint], codes: Mapping[str, Mapping[str, Part]], rules: Rules) -> None:
        """`codes`: the `parts` of the models that count, by role."""
        self.parts = codes
        self._target = next(iter(inputs)) if "target" in inputs else None
        self._first: dict[str, tuple[str, Part]] = {}
        for role, found in self.parts.items():
            for part in found.values():
                self._first.setdefault(part.module, (role, part))
        self._roles: dict[str, set[str]] = {}
        self._skipped: dict[str, str] = {}
        for role, checkpoint in inputs.items() if self._first else ():
            for name in checkpoint.tensors:
                place = self.of(name)
                if place is not None:
                    self._roles.setdefault(place, set()).add(role)
                    pattern = None if place in self._skipped else rules.skipped(name)
                    if pattern is not None:
                        self._skipped[place] = pattern
        if self._skipped and "" in self._first:
            self._skipped.setdefault("", next(iter(self._skipped.values())))

    def of(self, name: str) -> str | None:
        """The quantized module that a tensor is a part of, or would be if its model were quantized as another is."""
        for found in self.parts.values():
            if name in found:
                return found[name].module
        place = module(name)
        return place if place in self._first and not is_bias(name) else None

    def skipped(self, name: str) -> str | None:
        """The pattern by which a part of the tensor's module is left as it is, and so all of it."""
        place = self.of(name) if self._skipped else None
        return None if place is None else self._skipped.get(place)

    def shared(self, name: str) -> tuple[str, Part] | None:
        """The role and part that make a tensor one of a quantized module in which models would have to be added up."""
        place = self.of(name) if self._first else None
        if place is None:
            return None
        roles = self._roles[place]
        if len(roles) < 2 or (self._target is not None and self._target not in roles):
            return None
        return self._first[place]
