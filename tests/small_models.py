"""Makers of small checkpoints for tests, written with the safetensors library, so independently of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A model folder: `model.safetensors` or so many shards with their index, config.json, and other text files."""
    folder.mkdir(parents=True)
    names = list(tensors)
    meta = dict({"format": "pt"} if metadata is None else metadata)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata=meta)
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
            save_file({name: tensors[name] for name in part}, folder / file, metadata=meta)
            weight_map |= dict.fromkeys(part, file)
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read_model(folder: Path) -> Tensors:
    """All tensors of a folder, by the safetensors library."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.bfloat16, scale: float = 0.02) -> Tensor:
    """Weights like those of a model."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tuple(shape), generator=generator) * scale).to(dtype)


SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.mlp.weight": (24, 16),
    "model.layers.0.norm.weight": (16,),
    "model.layers.1.mlp.weight": (24, 16),
    "model.layers.1.norm.weight": (16,),
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}


def tensors(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Random tensors of a tiny untied language model."""
    return {name: normal(shape, 1000 * seed + i, dtype) for i, (name, shape) in enumerate(shapes.items())}


def triple(
    folder: Path, *, shards: int = 1, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> tuple[Path, Path, Path]:
    """Folders base, instruct and target of one family, `changes` being arguments of write_model."""
    base = tensors(1, dtype=dtype)
    instruct = {name: (t.float() + normal(t.shape, 7, torch.float32, 1e-3)).to(dtype) for name, t in base.items()}
    target = {name: (t.float() + normal(t.shape, 8, torch.float32, 1e-3)).to(dtype) for name, t in base.items()}
    config = {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    return (
        write_model(folder / "base", base, **{"shards": shards, "config": config, **changes}),
        write_model(folder / "instruct", instruct, **{"shards": shards, "config": config, **changes}),
        write_model(folder / "target", target, **{"shards": shards, "config": config, **changes}),
    )


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a folder with inode, mtime and content, to see that nothing touched it."""
    return {
        f"{path.relative_to(folder)}": (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], *, pad: int = 0) -> Path:
    """A .safetensors file with the data at once after the header, which ends in `pad` blanks."""
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))
    return path


def raw(t: Tensor) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)
