"""Checkpoints are opened by being validated: a .safetensors file, or a folder with its index.

Nothing but headers and small JSON files is read here. Every file that an index names lies in the checkpoint's own
folder, and index and shards agree in both directions, or the checkpoint is refused.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

from ires_kernels.checkpoints import standins
from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId, Kind, Shard, TensorRef, file_id_of
from ires_kernels.checkpoints.documents import (
    INDEX,
    read_config,
    read_index,
    read_manifest,
    unreachable,
    with_advice_of_hub,
)
from ires_kernels.checkpoints.folders import check_adapter, listed, only_file
from ires_kernels.checkpoints.header import CheckpointError, brief, read_header
from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.checkpoints.surroundings import with_settings
from ires_kernels.files.hidden import foreign, unfinished
from ires_kernels.files.opening import check_link, kind_of_file
from ires_kernels.files.unfinished import is_unfinished

_RESIDUAL_NAME = re.compile(r"residual(-\d+-of-\d+)?\.safetensors")


def open_checkpoint(path: str | os.PathLike[str], *, follow_links: bool = False) -> Checkpoint:
    """Open a model or residual: a folder, or one .safetensors file on its own.

    A folder holds `model.safetensors` or an index and its shards; with no such name, the only index or the only
    .safetensors file that it has. A residual folder has `residual` in place of `model`, and `residual.json`.
    `path` may be a link; what is in the folder must not lead out of it, unless `follow_links` says that it may.
    Raises CheckpointError, which says what was found and what is wanted.
    """
    path = Path(path)
    try:
        return _open_checkpoint(path, follow_links)
    except CheckpointError as error:
        strange = foreign(path).values()  # perhaps files are missing because they are in there
        if not strange:
            raise
        raise CheckpointError(*error.lines, *strange) from None


def _open_checkpoint(path: Path, follow_links: bool) -> Checkpoint:
    if unfinished(path):
        raise CheckpointError(
            f"{path}: an update in place of this model still runs or was interrupted. `ires status {path}` says more."
        )
    if is_unfinished(path):
        raise CheckpointError(f"{path}: is the unfinished output of a merge that still runs or was interrupted.")
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {unreachable(path, error)}") from None
    if stat.S_ISDIR(mode):
        return with_settings(_open_folder(path, follow_links))
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is {kind_of_file(mode)}, wanted a model's folder or a .safetensors file.")
    shard = _open_shard(path)
    is_residual = _RESIDUAL_NAME.fullmatch(path.name) is not None
    kind: Kind = "residual" if is_residual else "model"
    beside = path.with_name("residual.json" if is_residual else f"{path.name}.ires.json")
    if not follow_links and os.path.exists(beside):
        check_link(beside, path.parent)
    return with_settings(_assemble(path, kind, [shard], None, {}, None, read_manifest(beside), follow_links))


def _open_folder(folder: Path, follow_links: bool) -> Checkpoint:
    try:
        names = {name for name in os.listdir(folder) if not name.startswith(".")}
    except OSError as error:
        raise CheckpointError(f"{folder}: {unreachable(folder, error)}") from None
    residual = {"residual.json", "residual.safetensors", f"residual{INDEX}"} & names
    model = {"model.safetensors", f"model{INDEX}"} & names
    if model:
        check_adapter(folder, model, names)
    if residual and model:
        raise CheckpointError(
            f"{folder}: holds a model ({listed(model)}) and a residual ({listed(residual)}). "
            "Move one of them elsewhere."
        )
    kind: Kind = "residual" if residual else "model"

    home = None if follow_links else folder

    def inside(name: str) -> Path:
        path = folder / name
        if not follow_links and os.path.exists(path):
            check_link(path, folder)
        return path

    manifest = read_manifest(inside("residual.json" if residual else "ires.json"))
    if residual and manifest is None:
        raise CheckpointError(
            f"{folder}: residual.json is missing beside {listed(residual)}. Copy it there, or extract again."
        )
    config = read_config(inside("config.json"))
    index_name = _index_name(folder, kind, names)
    if index_name is None:
        shards = [_open_shard(folder / only_file(folder, kind, names), home)]
        return _assemble(folder, kind, shards, None, {}, config, manifest, follow_links)
    weight_map, metadata = read_index(inside(index_name))
    single = f"{kind}.safetensors"
    if single in names and single not in weight_map.values():
        raise CheckpointError(
            f"{folder}: {single} and {index_name} are both there, but the index does not name the file; some loaders "
            "take the one, some the other. Delete the one that is out of date."
        )
    files = sorted(set(weight_map.values()))
    absent = [name for name in files if not os.path.exists(folder / name)]
    if absent:
        raise CheckpointError(
            f"{folder}: {len(absent)} of the {len(files)} files that {index_name} names are missing: {listed(absent)}. "
            "Download or copy them into the folder."
        )
    shards = [_open_shard(folder / name, home) for name in files]
    checkpoint = _assemble(folder, kind, shards, index_name, metadata, config, manifest, follow_links)
    _check_agreement(folder / index_name, weight_map, checkpoint)
    return checkpoint


def _index_name(folder: Path, kind: Kind, names: set[str]) -> str | None:
    """Name of the folder's index; None when the weights are a single file."""
    if f"{kind}{INDEX}" in names:
        return f"{kind}{INDEX}"
    others = [name for name in names if name.endswith(INDEX)]
    if f"{kind}.safetensors" in names or not others:
        return None
    if len(others) > 1:
        raise CheckpointError(
            f"{folder}: found the indexes {listed(others)}, wanted one. Give a folder with a single checkpoint."
        )
    return others[0]


def _open_shard(path: Path, home: Path | None = None) -> Shard:
    """`home`: the folder that it must not lead out of."""
    far = standins.far(path)
    if far is not None:
        return Shard(path, standins.header(path, far), FileId.far(far.size, far.tag))
    found = check_link(path, home) if home is not None and os.path.exists(path) else None
    before = FileId.of(found) if found else file_id_of(path)
    with with_advice_of_hub(path):
        header = read_header(path)
    if before is None or file_id_of(path) != before or header.file_size != before.size:
        raise CheckpointError(f"{path}: changed while its header was read. Wait for its writer to finish.")
    return Shard(path, header, before)


def _assemble(
    path: Path,
    kind: Kind,
    shards: list[Shard],
    index_name: str | None,
    index_metadata: dict[str, Any],
    config: dict[str, Any] | None,
    manifest: Manifest | None,
    follow_links: bool,
) -> Checkpoint:
    tensors: dict[str, TensorRef] = {}
    for shard in shards:
        start = shard.header.data_start
        for name, info in shard.header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{path}: tensor {brief(name)} is both in {tensors[name].path.name} and in {shard.path.name}. "
                    "Delete the file that does not belong to this checkpoint, or save the model again."
                )
            tensors[name] = TensorRef(name, info.dtype, info.shape, shard.path, start + info.begin, info.nbytes)
    return Checkpoint(path, kind, tuple(shards), tensors, index_name, index_metadata, config, manifest, follow_links)


def _check_agreement(index: Path, weight_map: dict[str, str], checkpoint: Checkpoint) -> None:
    problems = []
    for name, file in weight_map.items():
        ref = checkpoint.tensors.get(name)
        if ref is None:
            problems.append(f"{brief(name)} is not in {file}")
        elif ref.path.name != file:
            problems.append(f"{brief(name)} is in {ref.path.name}, not in {file}")
    for name, ref in checkpoint.tensors.items():
        if name not in weight_map:
            problems.append(f"{brief(name)} of {ref.path.name} is not in the index")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{index}: index and shards disagree: {'; '.join(problems[:10])}{more}. "
            "The files come from different versions of the model: download or save all of them again."
        )
