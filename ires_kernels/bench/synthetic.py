"""Made-up checkpoints of Llama's shape, for trials, benchmarks and tests: a base, an instruct and a target model.

The weights are normal with a standard deviation of 0.02 (norms: around 1). The instruct and the target model are the
base plus updates of their own, small enough that many vanish in 16 bits, as between real models of a family. The
folders are those of a real model: shards and index, config, generation config, a byte-level tokenizer, and in the
instruct model a chat template. Everything follows from the seed. A 2.5 GB model takes a few seconds.

    python -m ires_kernels.bench.synthetic FOLDER --shape llama-1b
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ires_kernels.checkpoints.header import build_header

ROLES = ("base", "instruct", "target")
DTYPES = {"bf16": (torch.bfloat16, "BF16"), "f16": (torch.float16, "F16"), "f32": (torch.float32, "F32")}
WEIGHT_STD = 0.02
UPDATE_STD = {"instruct": 2e-4, "target": 4e-4}

_POOL = 1 << 23  # normal numbers that are drawn; weights are slices of them from random places
_PIECE = 1 << 20  # elements of a slice, at most

_BEGIN, _END, _END_OF_TURN, _HEADER, _HEADER_END = range(256, 261)
_SPECIAL = {
    "<|begin_of_text|>": _BEGIN,
    "<|end_of_text|>": _END,
    "<|eot_id|>": _END_OF_TURN,
    "<|start_header_id|>": _HEADER,
    "<|end_header_id|>": _HEADER_END,
}
_CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama model. Widths are in elements; `shards` is the number of files, at most."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True
    shards: int = 1

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, in the order of the files."""
        hidden, inner = self.hidden, self.intermediate
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, inner),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "self_attn.q_proj": (query, hidden),
            "self_attn.v_proj": (key, hidden),
        }
        tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, hidden)}
        for i in range(self.layers):
            tensors |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        tensors["model.norm.weight"] = (hidden,)
        return tensors if self.tied else {**tensors, "lm_head.weight": (self.vocabulary, hidden)}

    @property
    def parameters(self) -> int:
        """Elements of the model."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    @classmethod
    def of_parameters(cls, count: int) -> Shape:
        """The widest model of four or more layers with about `count` parameters, within an eighth; shards of 1 GB."""
        fitting = [shape for shape in _WIDTHS if replace(shape, layers=4).parameters <= count]
        if not fitting:
            least = replace(_WIDTHS[0], layers=4).parameters
            raise ValueError(f"got a model of {count} parameters, wanted at least {least}")
        width = fitting[-1]
        rest = width.parameters  # without layers
        layers = round((count - rest) / (replace(width, layers=1).parameters - rest))
        shape = replace(width, layers=layers)
        return replace(shape, shards=math.ceil(2 * shape.parameters / 1e9))


SHAPES = {
    "tiny": Shape(64, 192, 2, 4, 2, 16, 512, shards=2),
    "llama-1b": Shape(2048, 8192, 16, 32, 8, 64, 128256, shards=3),
    "llama-3b": Shape(3072, 8192, 28, 24, 8, 128, 128256, shards=2),
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256, tied=False, shards=4),
}
"""Llama 3.2 1B and 3B and Llama 3.1 8B as published (the first in three files), and one for tests."""

_WIDTHS = [
    Shape(64, 192, 0, 4, 2, 16, 512),
    Shape(256, 1024, 0, 8, 4, 32, 2048),
    Shape(512, 2048, 0, 8, 4, 64, 8192),
    Shape(1024, 4096, 0, 16, 8, 64, 32768),
    Shape(2048, 8192, 0, 32, 8, 64, 128256),
    Shape(4096, 14336, 0, 32, 8, 128, 128256, tied=False),
]


def shape_of(text: str) -> Shape:
    """A name in SHAPES, a number of parameters such as 250M or 8G, or bytes of a 16-bit model such as 500MB, 16GB."""
    if text in SHAPES:
        return SHAPES[text]
    return Shape.of_parameters(count_of(text))


def count_of(text: str) -> int:
    """Elements: 1000000, 250M, 1.5G; or 16-bit elements in so many bytes: 500MB, 16GB. Powers of ten."""
    number = text.upper()
    divisor = 2 if number.endswith("B") else 1
    number = number.removesuffix("B")
    factor = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    try:
        count = float(number if factor == 1 else number[:-1]) * factor / divisor
    except ValueError:
        count = math.nan
    if not 1 <= count < 2**50:
        names = ", ".join(SHAPES)
        raise ValueError(f"got size {text!r}, wanted a number such as 250M (elements) or 500MB, or a name: {names}")
    return int(count)


class Triple(NamedTuple):
    """The folders of three models of one shape."""

    base: Path
    instruct: Path
    target: Path
    parameters: int
    """Of one model."""
    nbytes: int
    """Tensor data of one model."""

    @property
    def models(self) -> str:
        """What they are, in words."""
        return f"models of {self.nbytes / 1e9:.3g} GB"

    def facts(self) -> dict[str, int]:
        """What they are, in JSON types."""
        return {"parameters": self.parameters, "model_bytes": self.nbytes}


def write_triple(
    folder: str | PathLike[str],
    shape: Shape | str = "llama-1b",
    *,
    seed: int = 0,
    dtype: str = "bf16",
    shards: int | None = None,
) -> Triple:
    """Write `folder`/base, /instruct and /target, which must not exist, with about 50 MB of memory.

    shape   or what `shape_of` takes
    dtype   of the weights: bf16, f16 or f32
    shards  files of a model, in place of what the shape says; fewer where tensors are too large to divide them so

    Raises FileExistsError, OSError when the disk fails, ValueError for an unknown shape.
    """
    shape = shape_of(shape) if isinstance(shape, str) else shape
    folders = [Path(folder, role) for role in ROLES]
    for path in folders:
        path.mkdir(parents=True)
    width = DTYPES[dtype][0].itemsize
    files = _layout(shape, shards or shape.shards)
    random = np.random.default_rng(seed)
    pool = torch.from_numpy(random.standard_normal(_POOL, dtype=np.float32))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on busy CPUs more of them spend ten times as long waiting for each other as computing
    try:
        for name, tensors in files.items():
            _write_shard([path / name for path in folders], tensors, dtype, pool, random)
    finally:
        torch.set_num_threads(threads)
    for role, path in zip(ROLES, folders, strict=True):
        for name, content in _documents(role, shape, dtype, files):
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            (path / name).write_text(text, encoding="utf-8")
    base, instruct, target = folders
    return Triple(base, instruct, target, shape.parameters, width * shape.parameters)


def _layout(shape: Shape, shards: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name → tensors: consecutive ones, each in the file that its middle falls into."""
    total, done = shape.parameters, 0
    parts: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, size in shape.tensors().items():
        count = math.prod(size)
        parts.setdefault((2 * done + count) * shards // (2 * total), {})[name] = size
        done += count
    if len(parts) == 1:
        return {"model.safetensors": parts.popitem()[1]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts.values(), 1)}


def _write_shard(
    paths: Sequence[Path], tensors: dict[str, tuple[int, ...]], dtype: str, pool: Tensor, random: np.random.Generator
) -> None:
    """The same shard of the three models side by side."""
    stored_dtype, name_of_dtype = DTYPES[dtype]
    value, changed = torch.empty(_PIECE), torch.empty(_PIECE)
    stored = torch.empty(_PIECE, dtype=stored_dtype)
    raw = stored.view(torch.uint8).numpy().data
    header = build_header(((name, name_of_dtype, size) for name, size in tensors.items()), {"format": "pt"})
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        for file in files:
            file.write(header)
        for size in tensors.values():
            for count in _pieces(math.prod(size)):
                starts = random.integers(0, _POOL - count, size=len(ROLES), endpoint=True).tolist()
                slices = [pool[start : start + count] for start in starts]
                v, c, s = value[:count], changed[:count], stored[:count]
                torch.mul(slices[0], WEIGHT_STD, out=v)
                if len(size) == 1:
                    v.add_(1.0)
                s.copy_(v)
                v.copy_(s)
                files[0].write(raw[: s.nbytes])
                for i in (1, 2):
                    # two roundings, never a fused multiply-add: the same bits on every machine
                    torch.mul(slices[i], UPDATE_STD[ROLES[i]], out=c)
                    s.copy_(c.add_(v))
                    files[i].write(raw[: s.nbytes])


def _pieces(count: int) -> Iterator[int]:
    for done in range(0, count, _PIECE):
        yield min(_PIECE, count - done)


def _documents(
    role: str, shape: Shape, dtype: str, files: dict[str, dict[str, tuple[int, ...]]]
) -> Iterator[tuple[str, Any]]:
    """Names and contents of what lies beside the shards."""
    if len(files) > 1:
        total = DTYPES[dtype][0].itemsize * shape.parameters
        weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
        yield "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    yield (
        "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": _BEGIN,
            "dtype": {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[dtype],
            "eos_token_id": _END,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "initializer_range": WEIGHT_STD,
            "intermediate_size": shape.intermediate,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": shape.tied,
            "use_cache": True,
            "vocab_size": shape.vocabulary,
        },
    )
    instruct = role == "instruct"
    ends = [_END, _END_OF_TURN] if instruct else _END
    generation = {"bos_token_id": _BEGIN, "do_sample": True, "eos_token_id": ends, "temperature": 0.6}
    yield "generation_config.json", generation
    yield "tokenizer.json", _tokenizer()
    yield (
        "tokenizer_config.json",
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>" if instruct else "<|end_of_text|>",
            "model_max_length": 8192,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    if instruct:
        yield "chat_template.jinja", _CHAT_TEMPLATE


def _tokenizer() -> dict[str, Any]:
    """One token a byte, and the special ones."""
    # Byte-level tokenizers write bytes that are no printable Latin-1 character as those from 256 on.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, "content": token, **flags} for token, id_ in _SPECIAL.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {letters[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write a triple and say what it is."""
    parser = argparse.ArgumentParser(
        prog="python -m ires_kernels.bench.synthetic", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("folder", metavar="FOLDER", help="gets base/, instruct/ and target/")
    parser.add_argument(
        "--shape", "--size", default="llama-1b", help=f"{', '.join(SHAPES)}, or a size: 250M parameters, 500MB"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, help="files of a model (default: as the shape says)")
    arguments = parser.parse_args(argv)
    try:
        shape = shape_of(arguments.shape)
        triple = write_triple(
            arguments.folder, shape, seed=arguments.seed, dtype=arguments.dtype, shards=arguments.shards
        )
    except (ValueError, FileExistsError) as error:
        parser.error(f"{error}")
    size = f"{triple.parameters:,} parameters, {triple.nbytes / 1e9:.3f} GB"
    print(f"{arguments.folder}: base, instruct and target, each of {size}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
