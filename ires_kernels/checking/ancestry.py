"""Whether two models descend from one: the cosine between a few weights of each, at the same places.

Fine-tuning and continual pre-training move weights by little, so a model keeps pointing where its ancestor did; models
trained from different random weights are orthogonal, however alike they are in shape, norm and behaviour. A residual
added to a stranger does harm or nothing, and no shape or name gives it away. So `extract` can keep a sketch of the base
in residual.json, and `apply` compares the target with it, or with the base itself. Of strangers the difference is no
residual, so `extract` and `apply` compare instruct with base as well:

    table["ancestry"] = ancestry.sketch(inputs["base"])                      # a key of the manifest, in extract
    found = ancestry.compare(target, ancestry.sketch(base))                  # apply with instruct and base
    found = ancestry.compare(target, residual.manifest.ancestry)             # apply with a residual
    if found is not None and not found.related:
        warnings.append(found.warning("target", "base"))

A sketch takes 64 elements each of 256 tensors at most: 33 kB of a bfloat16 model, and less than 70 kB of JSON.
"""

from __future__ import annotations

import base64
import math
import statistics
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul, sub
from typing import Any

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.sources import Files

TENSORS, BLOCKS, BLOCK = 256, 4, 16  # sampled tensors at most; runs of elements in each; elements of a run
THRESHOLD = 0.5
"""Models with a lower cosine are taken for strangers. It lies in the middle of what was measured on trained models
(examples/continual/README.md): 0.96 and more among relatives, -0.1 to 0.1 among strangers."""
ROWS = 37
"""How far from the usual places a second look is taken. Those lie where heads of attention begin, in most models, and
of the rows of a head the first and the last stay where they are when all others change places (rotary order)."""
ODD = 0.25
"""Tensors of one kind of related models that have less in common, in the median, are not the same rows. It lies
below THRESHOLD since one tensor alone tells less: its 64 elements give a cosine that is 0.1 off, now and then 0.25."""

_MEANS = {
    "target": "A residual works only on models trained further from the base it was taken from",
    "instruct": "Their difference holds what an instruct model has learnt only if it was trained from that base",
}
_CODES = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H"}
"""How `struct` reads elements of a dtype. It has no bfloat16, of which it gets the bits."""


@dataclass(frozen=True, slots=True)
class Ancestry:
    """How much a model and a base have in common."""

    cosine: float
    """Median over the tensors of the cosine between the sampled elements of the two: 1 the same, 0 strangers."""
    distance: float
    """Median over the tensors of the norm of their difference, in units of the base's norm."""
    tensors: int
    """That were compared."""
    odd: dict[str, float]
    """Kinds of tensors of related models that have next to nothing in common, and their median cosine."""

    @property
    def related(self) -> bool:
        """Whether the residual of the base is likely to mean something to the model."""
        return self.cosine >= THRESHOLD

    def warning(self, model: str, base: str) -> str:
        """What to say of a model, target or instruct, that is not related to what is called `base`."""
        return (
            f"{model} and {base} look unrelated: the median cosine of {self.tensors} sampled tensors is "
            f"{self.cosine:.2f} (related models: {THRESHOLD:g} to 1), their distance {self.distance:.2f} times the "
            f"base's norm. {_MEANS[model]}"
        )


def sketch(checkpoint: Checkpoint, rows: int = 0) -> dict[str, str]:
    """Matrices of a model by name: how many elements, and the sampled ones as bfloat16, little-endian, in base64.

    rows  how many rows behind the usual places to look
    Vectors are left out: norms are near 1 in all models. Raises OSError, and CheckpointError for a file that changed.
    """
    refs = {name: ref for name, ref in checkpoint.tensors.items() if _is_sampled(ref)}
    chosen = sorted(refs)
    chosen = [chosen[i * len(chosen) // TENSORS] for i in range(TENSORS)] if len(chosen) > TENSORS else chosen
    values = _sample(checkpoint, {name: refs[name] for name in chosen}, rows)
    return {name: f"{refs[name].numel} {base64.b64encode(_bfloat16(v)).decode()}" for name, v in values.items()}


def compare(target: Checkpoint, sketch: object, rows: int = 0) -> Ancestry | None:
    """Compare a model with the sketch of another, of the same `rows`; None where nothing can be compared.

    Tensors that the target lacks or has with another size are passed over, and so is what is no sketch: it may come
    from a manifest that somebody edited. Raises as `sketch` does.
    """
    wanted = _decoded(sketch)
    found = {name: names.lookup(target, name) for name in wanted}
    refs = {n: ref for n, ref in found.items() if ref is not None and _is_sampled(ref) and ref.numel == wanted[n][0]}
    cosines: dict[str, list[float]] = {}
    distances: list[float] = []
    for name, t in _sample(target, refs, rows).items():
        b = wanted[name][1]
        norms = math.hypot(*t) * math.hypot(*b)
        cosine = sum(map(mul, t, b)) / norms if norms else math.nan  # a tensor of zeros points nowhere
        if math.isfinite(cosine):
            cosines.setdefault(names.pattern(name), []).append(cosine)
            distances.append(math.hypot(*map(sub, t, b)) / math.hypot(*b))
    if not cosines:
        return None
    median = statistics.median(cosine for kind in cosines.values() for cosine in kind)
    medians = {kind: statistics.median(of_kind) for kind, of_kind in cosines.items()}
    odd = {kind: cosine for kind, cosine in medians.items() if cosine < ODD and median >= THRESHOLD}
    return Ancestry(median, statistics.median(distances), len(distances), odd)


def _is_sampled(ref: TensorRef) -> bool:
    return ref.dtype in _CODES and len(ref.shape) > 1 and ref.numel >= BLOCKS * BLOCK


def _sample(checkpoint: Checkpoint, refs: Mapping[str, TensorRef], rows: int) -> dict[str, Sequence[float]]:
    """BLOCKS runs of BLOCK elements, evenly spread over each tensor, at places that follow from its size and `rows`."""
    files = Files(checkpoint.file_ids, (ref.path for ref in refs.values()))
    values: dict[str, Sequence[float]] = {}
    try:
        for name, ref in refs.items():
            width = struct.calcsize(_CODES[ref.dtype])
            data = bytearray(BLOCKS * BLOCK * width)
            for i, view in enumerate(_runs(memoryview(data))):
                start = (2 * i + 1) * (ref.numel - BLOCK) // (2 * BLOCKS) + rows * math.prod(ref.shape[1:])
                start %= ref.numel - BLOCK + 1
                files.open(ref.path).read_into(view, ref.offset + start * width)
            files.release(ref.path)
            values[name] = _numbers(data, _CODES[ref.dtype])
    finally:
        files.close()
    return values


def _runs(data: memoryview) -> list[memoryview]:
    size = len(data) // BLOCKS
    return [data[i * size : (i + 1) * size] for i in range(BLOCKS)]


def _numbers(data: bytes | bytearray, code: str) -> tuple[float, ...]:
    """What BLOCKS runs hold, little-endian; a bfloat16 is the upper half of a float32."""
    count = BLOCKS * BLOCK
    numbers = struct.unpack(f"<{count}{code}", data)
    if code != "H":
        return numbers
    return struct.unpack(f"<{count}f", struct.pack(f"<{count}I", *(bits << 16 for bits in numbers)))


def _bfloat16(values: Sequence[float]) -> bytes:
    """Numbers rounded by way of float32 to the nearest bfloat16, ties to even; little-endian."""
    codes = array("I", array("f", values).tobytes())  # an array, unlike struct, lets what is too large be infinite
    rounded = (x + 0x7FFF + (x >> 16 & 1) >> 16 if x & 0x7FFFFFFF <= 0x7F800000 else 0x7FC0 for x in codes)
    return struct.pack(f"<{len(codes)}H", *rounded)


def _decoded(sketch: object) -> dict[str, tuple[int, Sequence[float]]]:
    """Elements of the whole tensor and the sampled ones, by name."""
    entries: Mapping[Any, Any] = sketch if isinstance(sketch, Mapping) else {}
    found: dict[str, tuple[int, Sequence[float]]] = {}
    for name, entry in entries.items():
        try:
            count, text = entry.split(" ")
            numel, data = int(count), base64.b64decode(text, validate=True)
        except (AttributeError, ValueError):
            continue
        if len(data) == 2 * BLOCKS * BLOCK:
            found[name] = numel, _numbers(data, "H")
    return found
