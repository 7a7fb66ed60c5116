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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.files.store import read_into
from ires_kernels.streaming.reader import Files

TENSORS, BLOCKS, BLOCK = 256, 4, 16  # sampled tensors at most; runs of elements in each; elements of a run
THRESHOLD = 0.5
"""Models with a lower cosine are taken for strangers. It lies in the middle of what was measured on trained models
(examples/continual/README.md): 0.96 and more among relatives, -0.1 to 0.1 among strangers."""

_MEANS = {
    "target": "A residual works only on models trained further from the base it was taken from",
    "instruct": "Their difference holds what an instruct model has learnt only if it was trained from that base",
}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Ancestry:
    """How much a model and a base have in common."""

    cosine: float
    """Median over the tensors of the cosine between the sampled elements of the two: 1 the same, 0 strangers."""
    distance: float
    """Median over the tensors of the norm of their difference, in units of the base's norm."""
    tensors: int
    """That were compared."""

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


def sketch(checkpoint: Checkpoint) -> dict[str, str]:
    """Matrices of a model by name: how many elements, and the sampled ones as bfloat16, little-endian, in base64.

    Vectors are left out: norms are near 1 in all models. Raises OSError, and CheckpointError for a file that changed.
    """
    refs = {name: ref for name, ref in checkpoint.tensors.items() if _is_sampled(ref)}
    chosen = sorted(refs)
    chosen = [chosen[i * len(chosen) // TENSORS] for i in range(TENSORS)] if len(chosen) > TENSORS else chosen
    values = _sample(checkpoint, {name: refs[name] for name in chosen})
    raw = {name: v.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes() for name, v in values.items()}
    return {name: f"{refs[name].numel} {base64.b64encode(data).decode()}" for name, data in raw.items()}


def compare(target: Checkpoint, sketch: object) -> Ancestry | None:
    """Compare a model with the sketch of another; None where nothing can be compared.

    Tensors that the target lacks or has with another size are passed over, and so is what is no sketch: it may come
    from a manifest that somebody edited. Raises as `sketch` does.
    """
    wanted = _decoded(sketch)
    found = {name: names.lookup(target, name) for name in wanted}
    refs = {n: ref for n, ref in found.items() if ref is not None and _is_sampled(ref) and ref.numel == wanted[n][0]}
    pairs = [(v.double(), wanted[name][1].double()) for name, v in _sample(target, refs).items()]
    # A tensor of zeros points nowhere: its cosine is not finite.
    cosines = [float(t @ b / (t.norm() * b.norm())) for t, b in pairs]
    distances = [float((t - b).norm() / b.norm()) for t, b in pairs]
    finite = [(c, d) for c, d in zip(cosines, distances, strict=True) if math.isfinite(c)]
    if not finite:
        return None
    return Ancestry(statistics.median(c for c, _ in finite), statistics.median(d for _, d in finite), len(finite))


def _is_sampled(ref: TensorRef) -> bool:
    return ref.dtype in _DTYPES and len(ref.shape) > 1 and ref.numel >= BLOCKS * BLOCK


def _sample(checkpoint: Checkpoint, refs: Mapping[str, TensorRef]) -> dict[str, Tensor]:
    """BLOCKS runs of BLOCK elements, evenly spread over each tensor, at places that follow from its size alone."""
    files = Files(checkpoint.file_ids, (ref.path for ref in refs.values()))
    values = {}
    try:
        for name, ref in refs.items():
            dtype = _DTYPES[ref.dtype]
            data = bytearray(BLOCKS * BLOCK * dtype.itemsize)
            for i, view in enumerate(_runs(memoryview(data))):
                start = (2 * i + 1) * (ref.numel - BLOCK) // (2 * BLOCKS)
                read_into(files.open(ref.path), view, ref.offset + start * dtype.itemsize, ref.path)
            files.release(ref.path)
            values[name] = torch.frombuffer(data, dtype=dtype)
    finally:
        files.close()
    return values


def _runs(data: memoryview) -> list[memoryview]:
    size = len(data) // BLOCKS
    return [data[i * size : (i + 1) * size] for i in range(BLOCKS)]


def _decoded(sketch: object) -> dict[str, tuple[int, Tensor]]:
    """Elements of the whole tensor and the sampled ones, by name."""
    entries: Mapping[Any, Any] = sketch if isinstance(sketch, Mapping) else {}
    found = {}
    for name, entry in entries.items():
        try:
            count, text = entry.split(" ")
            numel, data = int(count), base64.b64decode(text, validate=True)
        except (AttributeError, ValueError):
            continue
        if len(data) == 2 * BLOCKS * BLOCK:
            bits = torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16))
            found[name] = numel, bits.view(torch.bfloat16)
    return found
