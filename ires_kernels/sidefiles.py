"""Which of the files beside the weights belong to a merged model, and from which of its parents each one comes.

The target gives config.json and whatever else its folder holds. What makes a model answer as the instruct model does
comes from there: the tokenizer, the chat template, generation_config.json. A tokenizer is several files that fit only
each other, so it comes from one parent as a whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ires_kernels import store
from ires_kernels.checkpoint import Checkpoint, FileId
from ires_kernels.header import CheckpointError
from ires_kernels.opening import MAX_CONFIG, check_link, kind_of_file, open_file, read_bytes
from ires_kernels.store import Hasher

Group = Literal["tokenizer", "template", "generation", "model"]

_TEMPLATES = "additional_chat_templates"
_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt|model)|merges\.txt|tekken\.json"
    r"|(spiece|spm|tiktoken|source|target)\.(model|spm)|sentencepiece.*\.model|.*\.tiktoken|bpe\.codes|vocab\.bpe"
    r"|tokenization_.*\.py"
)
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|npz|index\.json)")
_OURS = {"ires.json", "residual.json", "SHA256SUMS"}


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of the output that is a copy of `source`, from the input `role`. `name` may have one folder in it."""

    name: str
    source: Path
    role: str
    file_id: FileId
    """What `source` was when it was chosen."""


def of_model(inputs: Mapping[str, Checkpoint], *, own_tokenizer: bool = False) -> tuple[list[SideFile], list[str]]:
    """Files for a merged model: those of the target, the first of `inputs`, and of the instruct model or a residual.

    The first donor that has them gives the tokenizer, the chat template and generation_config.json, and the target what
    no donor has. Base gives nothing: it is subtracted.

    With `own_tokenizer` the target keeps its tokenizer, chat template and generation_config.json, which holds ids of
    that tokenizer. Also returns what is not copied of the target's folder: sub-folders, weights in other formats and
    what is no regular file.
    """
    role, target = next(iter(inputs.items()))
    donors = [(name, checkpoint) for name, checkpoint in inputs.items() if name not in (role, "base")]
    own, left = _listing(target)
    chosen = {group: _tagged(own, group, role, target) for group in ("tokenizer", "template", "generation", "model")}
    for group in () if own_tokenizer else ("generation", "template", "tokenizer"):
        for donor, checkpoint in donors:
            files = _listing(checkpoint)[0]
            if any(_group(name) == group for name in files):
                chosen[group] = _tagged(files, group, donor, checkpoint)
                if group == "tokenizer":  # its template may be inside, where a file of the target's would override it
                    chosen["template"] = _tagged(files, "template", donor, checkpoint)
                break
    return sorted((file for files in chosen.values() for file in files), key=lambda file: file.name), left


def of_residual(instruct: Checkpoint) -> list[SideFile]:
    """What a residual keeps of the instruct model for `of_model`. Never config.json: a residual must not load."""
    files = _listing(instruct)[0]
    chosen = {name: path for name, path in sorted(files.items()) if _group(name) != "model"}
    return [_side_file(name, path, "instruct", instruct) for name, path in chosen.items()]


def replaced_by(target: Checkpoint, chosen: Iterable[SideFile]) -> list[str]:
    """The files of the target that have no place beside the `chosen` ones: parts of a tokenizer that is not theirs."""
    names = {file.name for file in chosen}
    return [name for name in _listing(target)[0] if name not in names and _group(name) != "model"]


def is_weights(name: str) -> bool:
    """Whether a file is of weights, by its name."""
    return _WEIGHTS.fullmatch(name) is not None


def has_template(checkpoint: Checkpoint) -> bool:
    """Whether there is a chat template, in a file of its own or in tokenizer_config.json."""
    files = _listing(checkpoint)[0]
    inside = files.get("tokenizer_config.json")
    return any(_group(name) == "template" for name in files) or (
        inside is not None and b'"chat_template"' in read_bytes(inside, MAX_CONFIG)
    )


def _group(name: str) -> Group:
    if name.startswith(("chat_template.", f"{_TEMPLATES}/")):
        return "template"
    if name == "generation_config.json":
        return "generation"
    return "tokenizer" if _TOKENIZER.fullmatch(name) else "model"


def chunks(side: SideFile, hasher: Hasher) -> Iterator[bytes]:
    """A side file by pieces, hashed on the way. Raises CheckpointError where it is not the one that was chosen."""
    fd = open_file(side.source)
    try:
        if FileId.of(fd).is_unwritten(side.file_id):
            yield from store.chunks(side.source, hasher, fd)
        if not FileId.of(fd).is_unwritten(side.file_id):
            raise CheckpointError(f"{side.source}: changed after it was looked at. Wait for its writer, then repeat.")
    finally:
        os.close(fd)


def _tagged(files: dict[str, Path], group: str, role: str, checkpoint: Checkpoint) -> list[SideFile]:
    return [_side_file(name, path, role, checkpoint) for name, path in files.items() if _group(name) == group]


def _side_file(name: str, path: Path, role: str, checkpoint: Checkpoint) -> SideFile:
    """A file of a checkpoint's folder that is going to be copied."""
    file_id = FileId.of(path)
    if not checkpoint.follow_links:
        check_link(path, checkpoint.path)
    return SideFile(name, path, role, file_id)


def _listing(checkpoint: Checkpoint) -> tuple[dict[str, Path], list[str]]:
    """Copyable files of a folder by name, and the names of what is there besides weights and hidden files."""
    folder = checkpoint.path
    if not folder.is_dir():
        return {}, []
    files: dict[str, Path] = {}
    left: list[str] = []
    weights = {shard.path.name for shard in checkpoint.shards} | {checkpoint.index_name} | _OURS
    for name in sorted(set(os.listdir(folder)) - weights):
        path = folder / name
        if name.startswith("."):
            continue
        if name == _TEMPLATES and path.is_dir():
            files.update((f"{name}/{child.name}", child) for child in sorted(path.glob("*.jinja")) if child.is_file())
        elif path.is_file() and not _WEIGHTS.fullmatch(name):
            files[name] = path
        elif path.is_symlink() and not path.exists() and _group(name) != "model":
            raise CheckpointError(
                f"{path}: is a link to {os.path.realpath(path)}, which is not there. Download it again, or delete it."
            )
        elif not path.is_dir() and not path.is_file() and _group(name) != "model":
            raise CheckpointError(f"{path}: is {kind_of_file(path.stat().st_mode)}, wanted a regular file. Delete it.")
        else:
            left.append(f"{name}/" if path.is_dir() else name)
    return files, left
