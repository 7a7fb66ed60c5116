"""What a checkpoint is, in a few numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ires_kernels.checkpoints import hub, names, schemes
from ires_kernels.checkpoints.checkpoint import is_factor, is_shard, shard_number
from ires_kernels.checkpoints.standins import shown
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.files.hidden import foreign
from ires_kernels.planning import quantized
from ires_kernels.planning.inputs import StrPath

_CONFIG = ("architectures", "model_type", "dtype", "torch_dtype", "tie_word_embeddings", "vocab_size")


def inspect(path: StrPath, *, follow_links: bool = False) -> dict[str, Any]:
    """Describe a model or residual, a folder or one .safetensors file, in JSON types; only headers are read.

    The parameters of quantized weights are their numbers, of which there may be more than elements of their codes. What
    it takes to count them is read as well: at most some hundred bytes of each.

    >>> found = ik.inspect("target/")
    >>> found["kind"], found["parameters_by_dtype"]
    ('model', {'BF16': 2096})

    follow_links  accept files of the folder that are links out of it
    Raises CheckpointError for what cannot be used, and says why.
    """
    checkpoint = open_checkpoint(hub.local(path), follow_links=follow_links)
    refs = checkpoint.tensors.values()
    found = schemes.quantized(checkpoint)
    elements: Counter[str] = Counter()
    for ref in refs:
        if found.parts.get(ref.name) not in found.weights:
            elements[ref.dtype] += ref.numel
    for weight in found.weights.values():
        elements[weight.format.name] += weight.numel
    manifest = checkpoint.manifest.table if checkpoint.manifest else {}
    return {
        "path": shown(checkpoint.path),
        "hub": f"{hub.repo_of(checkpoint.path) or ''}" or None,
        "kind": checkpoint.kind,
        "tensors": len(refs),
        "parameters": sum(elements.values()),
        "bytes": sum(ref.nbytes for ref in refs),
        "parameters_by_dtype": dict(elements.most_common()),
        "index": checkpoint.index_name,
        "files": [
            {
                "name": shard.path.name,
                "size": shard.file_id.size,
                "tensors": len(shard.header.tensors),
                "metadata": shard.header.metadata,
            }
            for shard in checkpoint.shards
        ],
        "beside": list(checkpoint.beside),
        "shard": list(shard_number(checkpoint.path) or []) or None,
        "head_is_embedding": not is_shard(checkpoint.path) and names.is_tied(checkpoint),
        "empty": [ref.name for ref in names.empty(checkpoint)],
        "adapter": [name for name in checkpoint.tensors if is_factor(name)],
        "quantized": {name: part.why for name, part in quantized.parts(checkpoint).items()},
        "formats": dict(Counter(f"{weight.format}" for weight in found.weights.values()).most_common()),
        "not_decoded": found.refused,
        "config": {key: value for key, value in (checkpoint.config or {}).items() if key in _CONFIG},
        "notes": list(foreign(checkpoint.path).values()),
        "made_by": {key: manifest[key] for key in ("operation", "id", "digest", "rules", "inputs") if key in manifest},
        "all_tensors": [
            {"name": ref.name, "dtype": ref.dtype, "shape": list(ref.shape), "file": ref.path.name}
            | _numbers(found, ref.name)
            for ref in refs
        ],
    }


def _numbers(found: schemes.Quantized, name: str) -> dict[str, Any]:
    """Of a stored part of a quantized weight the name of that; of its codes the format and the shape of the numbers."""
    owner = found.parts.get(name)
    if owner is None:
        return {}
    weight = found.weights.get(owner)
    if weight is None or weight.codes.name != name:
        return {"weight": owner}
    settings = {key: value for key, value in weight.format.settings if value != ""}
    return {"weight": owner, "format": f"{weight.format}", "settings": settings, "numbers": list(weight.shape)}
