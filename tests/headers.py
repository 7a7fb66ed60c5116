"""Headers of .safetensors files for tests: made by hand, and read by both readers."""

from __future__ import annotations

import safetensors
import safetensors.numpy
import safetensors.torch

from ires_kernels.checkpoints.header import Header, parse_header
from ires_kernels.dtypes import STORAGE


def pack(text: str | bytes, data: bytes = b"") -> bytes:
    """A file with this JSON, valid or not, and this data."""
    body = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return len(body).to_bytes(8, "little") + body + data


def tensor(dtype: str = '"U8"', shape: str = "[1]", offsets: str = "[0,1]") -> str:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


def parse(raw: bytes) -> Header:
    return parse_header(raw, len(raw), "x.safetensors")


def library(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | str:
    """The safetensors library's reading of a file, or its error."""
    try:
        found = safetensors.deserialize(raw)
    except safetensors.SafetensorError as error:
        return str(error)
    return {name: (spec["dtype"], tuple(spec["shape"]), bytes(spec["data"])) for name, spec in found}


def contents(raw: bytes, parsed: Header) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    data = raw[parsed.data_start :]
    return {name: (info.dtype, info.shape, data[info.begin : info.end]) for name, info in parsed.tensors.items()}


BITS = {dtype.name: dtype.bits for dtype in STORAGE.values()}
WHOLE = [name for name, bits in BITS.items() if bits % 8 == 0]
KNOWN = [  # to the installed version of the library
    name
    for name, bits in BITS.items()
    if isinstance(library(pack(tensor(f'"{name}"', "[8]", f"[0,{bits}]"), bytes(bits))), dict)
]


def is_known(parsed: Header) -> bool:
    return all(info.dtype in KNOWN for info in parsed.tensors.values())
