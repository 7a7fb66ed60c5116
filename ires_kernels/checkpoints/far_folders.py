"""Making stand-ins of models at addresses: what files there are, the small ones, and the headers of the weights.

Stores say what they have. Other servers are asked for the files that models are known to have, and for the weights that
an index names.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from secrets import token_hex

from ires_kernels.checkpoints import objects, standins
from ires_kernels.checkpoints.addresses import Address, Missing
from ires_kernels.checkpoints.header import MAX_HEADER, CheckpointError, parse_json
from ires_kernels.checkpoints.objects import Object, Place
from ires_kernels.files.opening import MAX_CONFIG, MAX_INDEX, MAX_MANIFEST
from ires_kernels.files.unfinished import MARKER

MAX_OTHER = 1 << 28
"""Bytes of a file beside the weights that is none of those that are known; as much as the largest tokenizers."""
_START = 1 << 16
"""Bytes of a file that are asked for first: most headers are shorter, and most other files."""
_INDEX = ".safetensors.index.json"
_SETTINGS = ("config.json", "params.json", "hf_quant_config.json", "quantize_config.json")
_KNOWN = (
    *_SETTINGS, "ires.json", "residual.json", f"model{_INDEX}", f"residual{_INDEX}", "adapter_config.json",
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json", "README.md", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip
"""What is asked for where nobody can be asked what there is: the files of the models that are known."""
_OTHER = re.compile(
    r"\..*|.*\.(bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|onnx_data|ot|tflite|pkl|npz|zip|tar.*|png|jpe?g|gif|mp4|wav|pdf)",
    re.IGNORECASE,
)
"""Weights in formats that are not read, and what comes along with models and is none of their files."""
_TEMPLATES = "additional_chat_templates"


_made: dict[tuple[object, ...], Path] = {}
_lock = threading.Lock()


def stand_in(text: str) -> Path:
    """The folder here that stands in for a model at an address, or the file in it for one of weights.

    Raises CheckpointError for what is no model, and OSError for what cannot be reached.
    """
    address = Address.of(text)
    place = Place(address.parent if address.is_file else address)
    return objects.wait_for(_found(address, place))


async def _found(address: Address, place: Place) -> Path:
    if address.is_file:
        known, weights = {}, [address.name]
        about = ["residual.json"] if re.fullmatch(r"residual(-\d+-of-\d+)?\.safetensors", address.name) else []
        about += [*_SETTINGS, f"{address.name}.ires.json"]
        about += [f"model{_INDEX}"] if re.search(r"-\d+-of-\d+\.safetensors$", address.name) else []
        known = await _small(place, about)
    elif address.is_store:
        names = await _listed(place)
        known = await _small(place, [name for name in names if not name.endswith(".safetensors")], all_there=True)
        weights = _weights(known, [name for name in names if name.endswith(".safetensors")])
    else:
        await _check_honest(place)
        known = await _small(place, _KNOWN)
        weights = _weights(known, None)
    heads = await objects.all_of([_head(place.file(name), optional=weights is _EITHER) for name in weights])
    found = {name: each for name, each in zip(weights, heads, strict=True) if each is not None}
    if not found and not known:
        raise CheckpointError(
            f"{address}: no file of a model is there, or none that may be read. Check the address, and that what reads "
            "it has the credentials that it takes."
        )
    return _written(address, known, found)


_EITHER = ["model.safetensors", "residual.safetensors", "adapter_model.safetensors"]


def _weights(known: Mapping[str, tuple[Object, bytes]], there: list[str] | None) -> list[str]:
    """The files of weights that a merge may need: those that an index names, else the only ones there are."""
    for name in known:
        if name.endswith(_INDEX):
            table = parse_json(known[name][1], f"{known[name][0].where}").get("weight_map")
            named = {f"{file}" for file in table.values()} if isinstance(table, dict) else set()
            # Others are refused when the index is read.
            return sorted(file for file in named if re.fullmatch(r"[^/\\\x00-\x1f]+\.safetensors", file))
    if there is None:
        return _EITHER
    return [name for name in there if name in _EITHER] or there


async def _listed(place: Place) -> list[str]:
    """What there is in a folder of a store, as far as it may be a file of a model."""
    names = await objects.aside(place.names)
    if MARKER in names and not {"ires.json", "residual.json"} & {*names}:
        raise CheckpointError(
            f"{place.address}: is an output that is unfinished, or just being written: `ires status {place.address}` "
            "says more."
        )
    names += await objects.aside(lambda: place.names(_TEMPLATES))
    return [name for name in names if not _OTHER.fullmatch(name.rpartition("/")[2])]


async def _check_honest(place: Place) -> None:
    """Refuse a server that has something under any name: it would give a page for a tokenizer."""
    nothing = place.file(f"{token_hex(8)}.json")
    try:
        await nothing.start(1)
    except Missing:
        return
    raise CheckpointError(
        f"{place.address}: its server has something under names that it cannot know ({nothing.where}), so nobody could "
        "tell what belongs to the model. Download it, and give its folder."
    )


async def _small(place: Place, names: Iterable[str], all_there: bool = False) -> dict[str, tuple[Object, bytes]]:
    names = list(names)
    found = await objects.all_of([_whole(place, name, all_there) for name in names])
    return {name: each for name, each in zip(names, found, strict=True) if each is not None}


async def _whole(place: Place, name: str, there: bool) -> tuple[Object, bytes] | None:
    """All of a small file; None where there is none."""
    file = place.file(name)
    try:
        raw = bytes(await file.start(_START))
    except Missing:
        if there:
            raise
        return None
    assert file.pin is not None
    check_size(file.where, name, file.pin.size)
    if len(raw) < file.pin.size:
        raw += bytes(await file.read(len(raw), file.pin.size))
    return file, raw


def check_size(where: object, name: str, size: int) -> None:
    """Refuse a file beside the weights that is too large to be one."""
    limit = _limit(name)
    if size > limit:
        raise CheckpointError(
            f"{where}: has {size} bytes, wanted at most {limit} of a file beside the weights. Move it elsewhere, or "
            "download the model without it."
        )


def _limit(name: str) -> int:
    if name.endswith(_INDEX):
        return MAX_INDEX
    if name in ("ires.json", "residual.json") or name.endswith(".ires.json"):
        return MAX_MANIFEST
    return MAX_CONFIG if name in _SETTINGS else MAX_OTHER


async def _head(file: Object, optional: bool = False) -> tuple[Object, bytes] | None:
    """The header of a file of weights; None where there is no file."""
    try:
        return await head(file)
    except Missing:
        if optional:
            return None
        raise


async def head(file: Object) -> tuple[Object, bytes]:
    """The header of a file of weights, as far as there is one: what is wrong with it, its reader says."""
    raw = bytes(await file.start(_START))
    assert file.pin is not None
    end = 8 + int.from_bytes(raw[:8], "little")
    if len(raw) < end <= min(file.pin.size, 8 + MAX_HEADER):
        raw += bytes(await file.read(len(raw), end))
    return file, raw[: max(end, 9)]


def _written(
    address: Address, known: Mapping[str, tuple[Object, bytes]], weights: Mapping[str, tuple[Object, bytes]]
) -> Path:
    """The folder with these files, small ones and headers, or the one file in it that the address is of."""
    where = address.parent if address.is_file else address
    what = (f"{where}", *sorted((name, file.pin) for name, (file, _) in {**known, **weights}.items()))
    with _lock:
        if what not in _made:
            folder = Path(tempfile.mkdtemp(dir=standins.home())) / f"{where}".replace("://", "/", 1)
            folder.mkdir(parents=True)
            for name, (_, raw) in known.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(raw)
            standins.fill(folder, f"{where}", weights)
            _made[what] = folder
        else:
            standins.ask(_made[what], weights)
        return _made[what] / address.name if address.is_file else _made[what]
