"""What the files around the weights say of them: settings of quantization, adapters, other shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ires_kernels.checkpoints.checkpoint import Checkpoint, is_factor, is_shard
from ires_kernels.checkpoints.documents import INDEX, read_config, read_index
from ires_kernels.checkpoints.folders import ADAPTER_NAME
from ires_kernels.files.opening import check_link

_QUANTIZATION: dict[str, tuple[str, ...]] = {
    "params.json": ("quantization", "quantization_config"),
    "hf_quant_config.json": ("quantization",),
    "quantize_config.json": (),
}
"""Settings of Mistral's own format, ModelOpt and GPTQ, and what in them says that the weights are quantized.

Those of Mistral are for consolidated*.safetensors, beside which the same model may lie in another form and dtype.
"""


def with_settings(checkpoint: Checkpoint) -> Checkpoint:
    """A model with what the files beside it say of its weights, also where one of them was given alone."""
    if checkpoint.kind == "residual":
        return checkpoint
    if _is_adapter(checkpoint):
        return replace(checkpoint, kind="adapter")
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent

    def read(name: str) -> dict[str, Any] | None:
        if not checkpoint.follow_links and os.path.exists(folder / name):
            check_link(folder / name, folder)
        return read_config(folder / name)

    config = (checkpoint.config if folder == checkpoint.path else read("config.json")) or {}
    blocks = {f"{place} in config.json": block for place, block in _quantization_blocks(config, "")}
    own = {shard.path.name for shard in checkpoint.shards}
    mistral = not config or any(name.startswith("consolidated") for name in own)
    for name, keys in _QUANTIZATION.items():
        table = (read(name) if mistral or name != "params.json" else None) or {}
        found = {f"{key} in {name}": table[key] for key in keys if table.get(key)}
        blocks |= found or ({name: table} if table and not keys else {})
    said = {place: block if isinstance(block, dict) else {"quant_method": block} for place, block in blocks.items()}
    if config.get("expert_dtype"):
        said = {place: {"expert_dtype": config["expert_dtype"], **block} for place, block in said.items()}
    others = sorted(path.name for path in folder.glob("[!.]*.safetensors") if path.name not in own)
    beside = tuple(others if folder == checkpoint.path else ())
    return replace(checkpoint, blocks=said, beside=beside, elsewhere=_in_other_shards(checkpoint))


def _quantization_blocks(config: dict[str, Any], place: str) -> Iterator[tuple[str, Any]]:
    """The quantization blocks of a config, or of those of the parts of a multimodal model, by their places."""
    for key, value in config.items():
        if key in ("quantization_config", "compression_config") and value:
            yield f"{place}{key}", value
        elif isinstance(value, dict):
            yield from _quantization_blocks(value, f"{place}{key}.")


def _is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether the weights are those of an adapter alone. A model with one inside has the weights it is for as well."""
    if any(ADAPTER_NAME.fullmatch(shard.path.name) for shard in checkpoint.shards):
        return True
    factors = sum(map(is_factor, checkpoint.tensors))
    return 2 * factors > len(checkpoint.tensors) and not any(".base_layer." in name for name in checkpoint.tensors)


def _in_other_shards(checkpoint: Checkpoint) -> frozenset[str]:
    """The names of the tensors in the other shards of the model that a file is a shard of, as its index has them."""
    path = checkpoint.path
    found: set[str] = set()
    for index in sorted(path.parent.glob(f"*{INDEX}")) if is_shard(path) else ():
        if not checkpoint.follow_links:
            check_link(index, path.parent)
        weight_map, _ = read_index(index)
        if path.name in weight_map.values():
            found.update(weight_map)
    return frozenset(found - checkpoint.tensors.keys())
