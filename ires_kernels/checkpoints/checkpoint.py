"""Checkpoints on disk: a .safetensors file or a folder becomes tensor names with dtype, shape, file and offset.

Nothing but headers and small JSON files is read here. Every file that an index names lies in the checkpoint's own
folder, and index and shards agree in both directions, or the checkpoint is refused.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ires_kernels.checkpoints import hub, standins
from ires_kernels.checkpoints import manifest as manifests
from ires_kernels.checkpoints.folders import ADAPTER_NAME, SHARD_NAME, check_adapter, listed, only_file
from ires_kernels.checkpoints.header import CheckpointError, Header, brief, check_depth, parse_json, read_header, sniff
from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.dtypes import STORAGE
from ires_kernels.files.hidden import foreign, unfinished
from ires_kernels.files.opening import MAX_CONFIG, MAX_INDEX, MAX_MANIFEST, check_link, kind_of_file, read_bytes
from ires_kernels.files.unfinished import is_unfinished

Kind = Literal["model", "residual", "adapter"]

_INDEX = ".safetensors.index.json"
_BARE_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]+\.safetensors")
_RESIDUAL_NAME = re.compile(r"residual(-\d+-of-\d+)?\.safetensors")
_FACTOR = re.compile(
    r"(^|[._])(lora_(A|B|embedding_A|embedding_B|magnitude_vector|down|up|mid)|ia3_l|vera_lambda_[bd]|randlora_lambda"
    r"|hada_[wt]\d(_[ab])?|lokr_[wt]\d(_[ab])?|oft_[rR]|boft_[Rs]|prompt_embeddings)(\.|$)"
)


class FileId(NamedTuple):
    """What tells that a file is still the one that was looked at."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int
    """Nobody can set it; but a new name, a hard link or another mode sets it as well as a write."""

    @classmethod
    def of(cls, file: Path | int | os.stat_result) -> FileId:
        """The identity of a path now, links followed, of an open file, or by its status. Raises OSError."""
        status = file if isinstance(file, os.stat_result) else os.stat(file)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @classmethod
    def far(cls, size: int, tag: int) -> FileId:
        """That of a file that is elsewhere, where a number stands for what it is."""
        return cls(0, 0, size, tag, tag)

    def is_unwritten(self, since: FileId) -> bool:
        """Whether it is the file that it was, and nobody wrote it who did not set its time back."""
        return self[:4] == since[:4]

    def stamp(self) -> dict[str, int]:
        """All of it in JSON types."""
        return self._asdict()


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of a checkpoint."""

    path: Path
    header: Header
    file_id: FileId


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies: `nbytes` bytes from the absolute `offset` in the file `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    whole: str = ""
    """Of a run of elements, the name of the tensor that has them."""
    first: int = 0
    """And the flat index of the first one there."""

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def tensor(self) -> str:
        """The name of the tensor that it is, or that it is a run of."""
        return self.whole or self.name

    def run(self, first: int, count: int) -> TensorRef:
        """Its elements from the flat index `first` on, under a name that says which; itself where it is all of them.

        Raises ValueError for elements that it does not have, or that do not fill whole bytes.
        """
        bits, numel = STORAGE[self.dtype].bits, self.numel
        stop = first + count
        if not 0 <= first < stop <= numel or first * bits % 8 or count * bits % 8:
            raise ValueError(f"{self.name!r} has {numel} {self.dtype} elements, and no run [{first}:{stop}]")
        if count == numel:
            return self
        place, size = self.offset + first * bits // 8, count * bits // 8
        tensor, first = self.tensor, self.first + first
        name = f"{tensor}[{first}:{first + count}]"
        return TensorRef(name, self.dtype, (count,), self.path, place, size, tensor, first)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A validated checkpoint; see `open_checkpoint`. It is the same as itself only, so it can be a key."""

    path: Path
    """The folder, or the single file."""
    kind: Kind
    shards: tuple[Shard, ...]
    """By file name."""
    tensors: dict[str, TensorRef]
    """By name, in the order of shards and data."""
    index_name: str | None
    """Name of the index file, None for a single file."""
    index_metadata: dict[str, Any]
    """``metadata`` of the index as it stands; its total_size is wrong in many published models and not checked."""
    config: dict[str, Any] | None
    """config.json of the folder."""
    manifest: Manifest | None
    """residual.json of a residual, ires.json of a merged model, NAME.ires.json of a file that was updated in place."""
    follow_links: bool = False
    """Whether files of the folder may be links out of it."""
    blocks: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """What the settings of the model say of quantized weights, by where they say so."""
    beside: tuple[str, ...] = ()
    """Other .safetensors files of the folder, which are not read."""
    is_unread: bool = False
    """Whether only headers of it may be read, and no values: they are elsewhere, and nothing is made of them yet."""
    elsewhere: frozenset[str] = frozenset()
    """Of one shard given alone, the names of the tensors in the others, as far as the index beside it knows."""

    @property
    def quantization(self) -> str:
        """Which settings say that the weights are quantized; "" where none do."""
        return next(iter(self.blocks), "")

    @property
    def file_ids(self) -> dict[Path, FileId]:
        """What its files were when they were validated."""
        return {shard.path: shard.file_id for shard in self.shards}

    def changed(
        self, current: Mapping[Path, FileId] | None = None, only: Container[Path] | None = None
    ) -> tuple[list[Path], list[Path]]:
        """The shards that are no longer the files that were validated, or those that `current` says they were.

        And those of which only the time of the last change of their status is another one, by a write or by something
        else. Of the shards `only`, or of all. Raises OSError for one that is elsewhere and has changed, or cannot be
        asked.
        """
        known = self.file_ids if current is None else current
        paths = [path for path in self.file_ids if only is None or path in only]
        standins.check(paths)
        now = {path: _file_id_now(path) for path in paths}
        written = [path for path, file_id in now.items() if not (file_id and file_id.is_unwritten(known[path]))]
        return written, [path for path, file_id in now.items() if path not in written and file_id != known[path]]


def is_shard(path: Path) -> bool:
    """Whether a file is one of the shards of a model, by its name."""
    return SHARD_NAME.fullmatch(path.name) is not None


def is_factor(name: str) -> bool:
    """Whether this is a tensor of an adapter (LoRA and its kin), which is no weight but makes one with others."""
    return _FACTOR.search(name) is not None


def shard_number(path: Path) -> tuple[int, int] | None:
    """Which of how many shards a file is, by its name; None for what is no shard."""
    found = re.search(r"-(\d+)-of-(\d+)\.safetensors$", path.name)
    return (int(found[1]), int(found[2])) if found else None


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
        raise CheckpointError(f"{path}: {_unreachable(path, error)}") from None
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
    return with_settings(_assemble(path, kind, [shard], None, {}, None, _read_manifest(beside), follow_links))


def _open_folder(folder: Path, follow_links: bool) -> Checkpoint:
    try:
        names = {name for name in os.listdir(folder) if not name.startswith(".")}
    except OSError as error:
        raise CheckpointError(f"{folder}: {_unreachable(folder, error)}") from None
    residual = {"residual.json", "residual.safetensors", f"residual{_INDEX}"} & names
    model = {"model.safetensors", f"model{_INDEX}"} & names
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

    manifest = _read_manifest(inside("residual.json" if residual else "ires.json"))
    if residual and manifest is None:
        raise CheckpointError(
            f"{folder}: residual.json is missing beside {listed(residual)}. Copy it there, or extract again."
        )
    config = _read_config(inside("config.json"))
    index_name = _index_name(folder, kind, names)
    if index_name is None:
        shards = [_open_shard(folder / only_file(folder, kind, names), home)]
        return _assemble(folder, kind, shards, None, {}, config, manifest, follow_links)
    weight_map, metadata = _read_index(inside(index_name))
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
    if f"{kind}{_INDEX}" in names:
        return f"{kind}{_INDEX}"
    others = [name for name in names if name.endswith(_INDEX)]
    if f"{kind}.safetensors" in names or not others:
        return None
    if len(others) > 1:
        raise CheckpointError(
            f"{folder}: found the indexes {listed(others)}, wanted one. Give a folder with a single checkpoint."
        )
    return others[0]


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """weight_map and metadata of an index."""
    where = f"{path}"
    table = _read_json(path, MAX_INDEX) or {}
    weight_map, metadata = table.get("weight_map"), table.get("metadata", {})
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError(
            f"{where}: weight_map is {brief(weight_map)}, wanted file names by tensor name. Download it again."
        )
    for name, file in weight_map.items():
        if type(file) is not str or not _BARE_NAME.fullmatch(file):
            raise CheckpointError(
                f"{where}: tensor {brief(name)} is in {brief(file)}, wanted the bare name of a .safetensors file of "
                "this folder. Download the index again, and not from a source that you do not trust."
            )
    if type(metadata) is not dict:
        raise CheckpointError(f"{where}: metadata is {brief(metadata)}, wanted an object. Download it again.")
    return weight_map, metadata


def _open_shard(path: Path, home: Path | None = None) -> Shard:
    """`home`: the folder that it must not lead out of."""
    far = standins.far(path)
    if far is not None:
        return Shard(path, standins.header(path, far), FileId.far(far.size, far.tag))
    found = check_link(path, home) if home is not None and os.path.exists(path) else None
    before = FileId.of(found) if found else _file_id(path)
    with _of_the_hub(path):
        header = read_header(path)
    if before is None or _file_id(path) != before or header.file_size != before.size:
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


def _read_manifest(path: Path) -> Manifest | None:
    raw = _read_bytes(path, MAX_MANIFEST)
    return None if raw is None else manifests.parse(raw, path)


def _read_json(path: Path, limit: int) -> dict[str, Any] | None:
    """A JSON object of at most `limit` bytes, parsed strictly; None when there is no such file."""
    raw = _read_bytes(path, limit)
    with _of_the_hub(path):
        return None if raw is None else parse_json(raw, f"{path}")


@contextmanager
def _of_the_hub(path: Path) -> Iterator[None]:
    """Say of a file in the Hub's cache that cannot be used how to have another: who finds it there asks no more."""
    try:
        yield
    except CheckpointError as error:
        again = hub.download_again(path)
        if again is None:
            raise
        raise CheckpointError(*error.lines, again) from None


def _read_config(path: Path) -> dict[str, Any] | None:
    """config.json as loaders read it: some models have Infinity in theirs, which strict JSON does not know."""
    raw = _read_bytes(path, MAX_CONFIG)
    if raw is None:
        return None
    with _of_the_hub(path):
        check_depth(raw, f"{path}")
        try:
            config = json.loads(raw.decode())
        except ValueError as error:
            what = sniff(raw)
            reason = f"not JSON but {what}" if what else f"not valid JSON: {error}. Correct it or download it again."
            raise CheckpointError(f"{path}: {reason}") from None
        if type(config) is not dict:
            raise CheckpointError(f"{path}: got JSON {brief(config)}, wanted an object. Download it again.")
        return config


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
        return _read_config(folder / name)

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


_QUANTIZATION: dict[str, tuple[str, ...]] = {
    "params.json": ("quantization", "quantization_config"),
    "hf_quant_config.json": ("quantization",),
    "quantize_config.json": (),
}
"""Settings of Mistral's own format, ModelOpt and GPTQ, and what in them says that the weights are quantized.

Those of Mistral are for consolidated*.safetensors, beside which the same model may lie in another form and dtype.
"""


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
    for index in sorted(path.parent.glob(f"*{_INDEX}")) if is_shard(path) else ():
        if not checkpoint.follow_links:
            check_link(index, path.parent)
        weight_map, _ = _read_index(index)
        if path.name in weight_map.values():
            found.update(weight_map)
    return frozenset(found - checkpoint.tensors.keys())


def _read_bytes(path: Path, limit: int) -> bytes | None:
    try:
        return read_bytes(path, limit)
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        raise CheckpointError(f"{path}: is a link to a file that is gone. Copy or download it again.") from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise
        raise CheckpointError(f"{path}: {_unreachable(path, error)}") from None


def _file_id(path: Path) -> FileId | None:
    try:
        return FileId.of(path)
    except OSError:
        return None


def _file_id_now(path: Path) -> FileId | None:
    """As it is by now, also of a file that is elsewhere, and was asked for."""
    far = standins.far(path)
    return _file_id(path) if far is None else FileId.far(far.size, far.tag)


def _unreachable(path: Path, error: Exception) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"cannot read: {getattr(error, 'strerror', error)}. Check the path and its permissions."
    if path.is_symlink():
        return "is a link to something that is gone. Copy or download it again."
    return "no such file or folder. Check the path."
