"""The header of a safetensors file: a strict reader and a writer, standard library only.

A file is an 8-byte little-endian length N, N bytes of JSON, then the data section (https://github.com/huggingface/safetensors).
The reader is stricter than the format's own library and never accepts what that library rejects: JSON of at most
100,000,000 bytes that starts with ``{``, no duplicate keys, no unknown fields, metadata from strings to strings, sizes
that agree with dtype and shape, and tensors that cover the data section from 0 to exactly the end of the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ires_kernels.dtypes import STORAGE
from ires_kernels.files.opening import CheckpointError as CheckpointError
from ires_kernels.files.opening import open_file, read_start

MAX_HEADER = 100_000_000
"""Largest accepted JSON part, in bytes; the limit of the safetensors library."""
MAX_DEPTH = 100
"""Objects and lists within each other in any JSON that is read; a header has 3, the settings of a model some 8."""

_INT63 = 2**63 - 1
_FIELDS = {"dtype", "shape", "data_offsets"}
_AGAIN = "The file is damaged or not safetensors: download it or write it again."
_DAMAGED = "The file is damaged: download it or write it again."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header: safetensors dtype name, shape, and its bytes [begin, end) in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def __post_init__(self) -> None:
        for what, value in (("begin", self.begin), ("end", self.end)):
            if type(value) is not int or not 0 <= value <= _INT63:
                raise CheckpointError(f"data offset {what} is {brief(value)}, wanted an integer from 0 to 2^63 - 1.")
        size = tensor_bytes(self.dtype, self.shape)
        if self.end - self.begin != size:
            raise CheckpointError(
                f"{self.dtype} of shape {brief(list(self.shape))} takes {size} bytes, "
                f"got data offsets [{self.begin}, {self.end}], which hold {self.end - self.begin}."
            )

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Length in the file, in bytes."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header: its tensors lie one after the other from `data_start` to exactly `file_size`."""

    tensors: dict[str, TensorInfo]
    """By name, in the order of the data."""
    metadata: dict[str, str]
    """The file's ``__metadata__``, empty when it has none."""
    data_start: int
    """Absolute offset of the data section, in bytes."""
    file_size: int
    """Size of the whole file, in bytes."""

    def __post_init__(self) -> None:
        end, previous = 0, "the start of the data"
        for name, info in self.tensors.items():
            if info.begin != end:
                kind = "gap" if info.begin > end else "overlap"
                raise CheckpointError(
                    f"{kind} before tensor {brief(name)}: it begins at data offset {info.begin}, wanted {end}, "
                    f"the end of {previous}."
                )
            end, previous = info.end, f"tensor {brief(name)}"
        missing = self.data_start + end - self.file_size
        if missing:
            state = f"truncated: {missing} bytes missing" if missing > 0 else f"{-missing} bytes too many at the end"
            raise CheckpointError(
                f"{state}. The header describes a file of {self.data_start + end} bytes, got {self.file_size}."
            )


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and validate the header of the safetensors file `path`.

    Raises CheckpointError, which names the file, for anything but a valid file; OSError when the disk fails.
    """
    where = os.fspath(path)
    try:
        fd = open_file(where)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and os.path.islink(where):
            raise CheckpointError(f"{where}: is a link to a file that is gone. Copy or download it again.") from error
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise CheckpointError(f"{where}: cannot open: {reason}. Check the path and its permissions.") from error
    try:
        size = os.fstat(fd).st_size
        raw = read_start(fd, min(size, 4096), where)
        length = int.from_bytes(raw[:8], "little")
        if len(raw) < 8 + length <= min(size, 8 + MAX_HEADER):
            raw = read_start(fd, 8 + length, where)
        return parse_header(raw, size, where)
    finally:
        os.close(fd)


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Validate the header in `raw`, the beginning of a file of `file_size` bytes.

    `raw` holds at least the 8 + N bytes of the header when the file has them; what follows is not looked at.
    `where` names the file in errors. Raises CheckpointError.
    """
    length = int.from_bytes(raw[:8], "little")
    stop = 8 + length
    if file_size < 8 or length > MAX_HEADER or stop > file_size or raw[8:9] != b"{":
        raise CheckpointError(f"{where}: {_not_safetensors(raw, file_size)}")
    if len(raw) < stop:
        raise CheckpointError(f"{where}: got {len(raw)} bytes of a header of {stop}: the file shrank. Do that again.")
    table = parse_json(raw[8:stop], f"{where}: header")
    metadata = table.pop("__metadata__", None)
    if metadata is None:  # null is what a writer with an optional map may produce
        metadata = {}
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ is {brief(metadata)}, wanted strings for strings. {_AGAIN}")
    tensors = {}
    for name, entry in table.items():
        try:
            tensors[name] = _tensor_info(entry)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: tensor {brief(name)}: {error} {_AGAIN}") from None
    # A tensor without elements shares its offset with the next one and comes first; sorting is stable.
    order = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    try:
        return Header(dict(order), metadata, stop, file_size)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error} {_AGAIN}") from None


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data of a file that holds `tensors`, each (name, dtype, shape), in this order without gaps.

    8-byte length, then JSON padded with spaces to a multiple of 8; for the same order and metadata of at most one entry
    the same bytes as the safetensors library writes. Raises CheckpointError for what `parse_header` would not accept.
    """
    where = "new header"
    items = [f'"__metadata__":{_dumps(dict(metadata))}'] if metadata else []
    end = 0
    for name, dtype, shape in tensors:
        begin = end
        try:
            end += tensor_bytes(dtype, tuple(shape))
        except CheckpointError as error:
            raise CheckpointError(f"{where}: tensor {brief(name)}: {error}") from None
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        items.append(f"{_dumps(name)}:{_dumps(entry)}")
    body = ("{" + ",".join(items) + "}").encode("utf-8", "surrogatepass")
    body += b" " * (-len(body) % 8)
    raw = len(body).to_bytes(8, "little") + body
    parse_header(raw, len(raw) + end, where)  # duplicates, lone surrogates, metadata that is not text, size
    return raw


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Length in bytes of a tensor in a file. Raises CheckpointError for an unknown dtype or an impossible shape."""
    bits = STORAGE[dtype].bits if type(dtype) is str and dtype in STORAGE else None
    if bits is None:
        raise CheckpointError(f"dtype is {brief(dtype)}, wanted one of {', '.join(STORAGE)}.")
    span = bits  # with 1 for every 0: the strides of a tensor without elements must fit as well
    for size in shape:
        if type(size) is not int or size < 0:
            raise CheckpointError(f"shape is {brief(list(shape))}, wanted integers >= 0.")
        span *= size or 1
        if span > _INT63:
            raise CheckpointError(f"shape {brief(list(shape))} of {dtype} takes more than 2^63 - 1 bits.")
    total = 0 if 0 in shape else span
    if total % 8:
        raise CheckpointError(f"shape {brief(list(shape))} of {dtype} takes {total} bits, wanted whole bytes.")
    return total // 8


def parse_json(raw: bytes, where: str, *, escaped: bool = False) -> dict[str, Any]:
    """Parse one strict JSON object: UTF-8 without byte order mark, no duplicate keys, no NaN, no lone surrogates.

    escaped  whether lone surrogates may be escaped in it, as which Python has the bytes of paths that are not UTF-8

    Numbers that are not integers of at most 20 digits come back as float. Raises CheckpointError, which names `where`.
    """
    check_depth(raw, where)
    try:
        text = raw.decode()
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_constant)
        if not escaped and re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:  # includes JSONDecodeError, UnicodeDecodeError and UnicodeEncodeError
        kind = sniff(raw)
        reason = f"not JSON but {kind}" if kind else f"not valid JSON: {error}. {_DAMAGED}"
        raise CheckpointError(f"{where}: {reason}") from None
    if type(value) is not dict:
        raise CheckpointError(f"{where}: got JSON {brief(value)}, wanted an object. {_DAMAGED}")
    return value


def check_depth(raw: bytes, where: str) -> None:
    """Refuse JSON that is nested deeper than MAX_DEPTH, before anything follows it down.

    Python's own limit depends on its version and on how deep the caller's stack is; and what passes it in one place may
    not do so in the next.
    """
    outside = b"".join(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    steps = memoryview(outside.translate(_STEPS, _NO_STEPS)).cast("b")
    if max(accumulate(steps), default=0) > MAX_DEPTH:
        raise CheckpointError(f"{where}: JSON is nested too deeply: wanted at most {MAX_DEPTH} levels. {_DAMAGED}")


_STEPS = bytes.maketrans(b"{[}]", b"\x01\x01\xff\xff")  # as signed numbers: one level down, one up
_NO_STEPS = bytes(set(range(256)) - set(b"{[}]"))


def sniff(raw: bytes) -> str | None:
    """What a file that begins with `raw` is instead of safetensors, with the way out; None when unknown."""
    start = raw[:256].lstrip().lower()
    for magics, kind in _MAGIC:
        if raw.startswith(magics) or start.startswith(magics):
            return kind
    return None


_CONVERT = "Load it with its own library and save it as safetensors (save_pretrained, or safetensors.torch.save_file)."
_MAGIC: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"version https://git-lfs",), "a git-lfs pointer without its data. Run `git lfs pull` in its folder."),
    ((b"<!doctype", b"<html", b"<?xml"), "an HTML or XML page: the download failed. Check the address and repeat."),
    ((b"GGUF",), "a GGUF file. Take the safetensors files of the same model."),
    ((b"PK\x03\x04",), f"a zip, such as a PyTorch pickle (.bin, .pt). {_CONVERT}"),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), f"a Python pickle, such as an old PyTorch file. {_CONVERT}"),
    ((b"\x93NUMPY",), f"a NumPy array (.npy). {_CONVERT}"),
    ((b"\x89HDF\r\n",), f"an HDF5 file. {_CONVERT}"),
    ((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ"), "a compressed file. Unpack it."),
)


def _not_safetensors(raw: bytes, file_size: int) -> str:
    """Why the first 8 + 1 bytes cannot begin a safetensors file."""
    if file_size == 0:
        return "the file is empty. Download it or write it again."
    length = int.from_bytes(raw[:8], "little")
    if length > MAX_HEADER or raw[8:9] != b"{":  # else it is one, cut off, and its length may look like anything
        kind = sniff(raw)
        if kind:
            return f"not safetensors but {kind}"
        if re.match(rb"\{\s*[\"}]", raw):
            return "not safetensors but JSON text, perhaps an index. Give the folder, or a .safetensors file."
        if len(raw) >= 8 and raw[:8].isascii() and raw[:8].decode().isprintable():
            return f"not safetensors but text, {brief(raw[:40])}, perhaps the answer to a failed download. Repeat it."
    if file_size < 8:
        return f"got {file_size} bytes, wanted at least 8 for the length of the header. {_AGAIN}"
    if length > MAX_HEADER:
        return f"the header says it has {length} bytes, wanted at most {MAX_HEADER}. {_AGAIN}"
    if 8 + length > file_size:
        return f"truncated in the header: wanted at least {8 + length} bytes, got {file_size}. {_AGAIN}"
    if length == 0:
        return f"the header is empty, wanted JSON. Perhaps space was reserved and never written. {_AGAIN}"
    return f"the header begins with {raw[8:9]!r}, wanted b'{{'. {_AGAIN}"


def _tensor_info(entry: object) -> TensorInfo:
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise CheckpointError(f"got {brief(entry)}, wanted an object of exactly dtype, shape and data_offsets.")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if type(shape) is not list:
        raise CheckpointError(f"shape is {brief(shape)}, wanted a list of integers.")
    if type(offsets) is not list or len(offsets) != 2:
        raise CheckpointError(f"data_offsets is {brief(offsets)}, wanted two integers.")
    return TensorInfo(entry["dtype"], tuple(shape), offsets[0], offsets[1])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"duplicate key {brief(name)}")
            seen.add(name)
    return table


def _integer(text: str) -> int | float:
    # As in the Rust library -0 is no integer, and neither is anything longer than 2^64; int() of 4301 digits raises.
    return float(text) if text == "-0" or len(text) > 20 else int(text)


def _constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def brief(value: object) -> str:
    """repr for error messages, cut in length and depth: names and shapes come from files that nobody has checked."""
    return _BRIEF.repr(value)


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 3
_BRIEF.maxstring = _BRIEF.maxother = 120
_BRIEF.maxlist = _BRIEF.maxdict = _BRIEF.maxtuple = 10
