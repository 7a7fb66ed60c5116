"""The settings of a model that gets weights of another dtype: where they say so, and where they speak of codes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.sidefiles import SideFile
from ires_kernels.checkpoints.tokens import as_object

_BLOCKS = {"quantization_config", "compression_config"}
_EXPERTS = {"expert_dtype"}
"""What DeepSeek says of the codes of experts beside that."""
_PARAMS = {"quantization", "quantization_config"}
"""What says so in Mistral's own params.json."""
_ALL_OF_IT = {"hf_quant_config.json", "quantize_config.json", "quant_config.json", "quanto_qmap.json"}
"""Files that say nothing else: ModelOpt, GPTQ, AWQ, quanto."""


def of_plain(config: dict[str, Any] | None, files: Iterable[SideFile], dtype: str) -> dict[str, dict[str, Any] | None]:
    """The settings of the target that change where all of its weights become numbers of one dtype, by file.

    `config` is what config.json is apart from that, `dtype` torch's name for it. None stands for a file that has no
    place beside such weights.
    """
    found: dict[str, dict[str, Any] | None] = {}
    if config is not None:
        found["config.json"] = _plain(config, dtype)
    for side in files:
        if side.name in _ALL_OF_IT:
            found[side.name] = None
        elif side.name == "params.json":
            table = as_object(side.read())
            if table is None:
                raise CheckpointError(f"{side.source}: is not valid JSON. Correct it or download it again.")
            if table.keys() & _PARAMS:
                found[side.name] = {key: value for key, value in table.items() if key not in _PARAMS}
    return found


def _plain(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with the dtype replaced wherever it is given, as it is for every part of a multimodal model."""
    found = {}
    for key, value in config.items():
        if key in _BLOCKS or (key in _EXPERTS and isinstance(value, str)):
            continue
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            value = dtype
        found[key] = _plain(value, dtype) if isinstance(value, dict) else value
    return found
