"""The header reader accepts what safetensors writes and never accepts what safetensors rejects."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ires_kernels.checkpoints import header
from ires_kernels.checkpoints.header import CheckpointError, Header, TensorInfo, build_header, parse_header, read_header
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


# ---------------------------------------------------------------------------------------------------------- accepted


def test_build_header_golden_bytes() -> None:
    raw = build_header([("a", "BF16", (2, 3)), ("é/\n", "I64", ()), ("z", "F32", (0, 5))], {"format": "pt"})
    assert raw == (
        b"\xd0\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"\xc3\xa9/\\n":{"dtype":"I64","shape":[],"data_offsets":[12,20]},'
        b'"z":{"dtype":"F32","shape":[0,5],"data_offsets":[20,20]}}    '
    )


def test_build_header_pads_only_where_needed() -> None:
    for name in ["a" * length for length in range(1, 17)]:
        raw = build_header([(name, "U8", ())], {})
        assert len(raw) % 8 == 0
        assert len(raw) - len(raw.rstrip(b" ")) < 8


def test_build_header_of_nothing() -> None:
    assert build_header([], {}) == b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "
    assert parse(build_header([], {})) == Header({}, {}, 16, 16)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ([("a", "F32", (1,)), ("a", "F32", (1,))], {}),
        ([("__metadata__", "F32", (1,))], {}),
        ([("\ud800", "F32", (1,))], {}),
        ([("a", "float32", (1,))], {}),
        ([("a", "F32", (-1,))], {}),
        ([("a", "F32", (True,))], {}),
        ([("a", "F32", (1.0,))], {}),
        ([("a", "F32", (2**62, 4))], {}),
        ([("a", "F4", (3,))], {}),
        ([("a", None, (3,))], {}),
        ([], {"a": 1}),
        ([], {"a": "\udfff"}),
    ],
)
def test_build_header_refuses_what_nobody_could_read(tensors: Any, metadata: Any) -> None:
    with pytest.raises(CheckpointError, match="new header"):
        build_header(tensors, metadata)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from(WHOLE), SHAPES), max_size=6),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))
    ),
    st.randoms(use_true_random=False),
)
def test_round_trip_through_both_readers(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], rng: random.Random
) -> None:
    start = build_header([(name, dtype, shape) for name, (dtype, shape) in tensors.items()], metadata)
    size = sum(header.tensor_bytes(dtype, shape) for dtype, shape in tensors.values())
    raw = start + rng.randbytes(size)
    parsed = parse(raw)
    assert [(name, (info.dtype, info.shape)) for name, info in parsed.tensors.items()] == list(tensors.items())
    assert (parsed.metadata, parsed.data_start, parsed.file_size) == (metadata, len(start), len(raw))
    assert len(start) % 8 == 0
    assert library(raw) == contents(raw, parsed) or not is_known(parsed)


TORCH_DTYPES = [*safetensors.torch._TYPES.values()]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "pt", "ключ": 'quote " and \\'}])
def test_files_of_safetensors_torch(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = {}
    for i, dtype in enumerate(TORCH_DTYPES):
        for shape in [(), (0,), (3,), (2, 0, 4), (3, 5), (1, 1, 7)]:
            numel = torch.Size(shape).numel()
            bits = torch.arange(i, i + numel * dtype.itemsize, dtype=torch.int64).to(torch.uint8) & 1
            tensors[f"層.{dtype}.{shape}"] = bits.view(dtype).reshape(shape)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    raw = path.read_bytes()
    parsed = read_header(path)
    assert parsed.metadata == (metadata or {})
    assert contents(raw, parsed) == library(raw)
    assert {name: info.numel for name, info in parsed.tensors.items()} == {k: v.numel() for k, v in tensors.items()}
    assert [info.begin for info in parsed.tensors.values()] == sorted(info.begin for info in parsed.tensors.values())
    for name, tensor in tensors.items():
        info = parsed.tensors[name]
        stored = raw[parsed.data_start + info.begin : parsed.data_start + info.end]
        assert stored == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
    if metadata is None or len(metadata) == 1:  # the library writes several entries in the order of a hash map
        listed = [(name, info.dtype, info.shape) for name, info in parsed.tensors.items()]
        assert build_header(listed, parsed.metadata) == raw[: parsed.data_start]


def test_files_of_safetensors_numpy(tmp_path: Path) -> None:
    kinds = ["bool", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]
    arrays = {f"{kind}.{n}": np.ones((n, 3), kind) for kind in kinds for n in (0, 1, 4)}
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(arrays, path)
    raw = path.read_bytes()
    assert contents(raw, read_header(path)) == library(raw)
    safetensors.numpy.save_file({}, path)
    assert read_header(path).tensors == {}


def test_every_dtype_of_the_library() -> None:
    """The library's own list, where its error message has one; its width of each, from the sizes that it takes."""
    assert len(KNOWN) >= 15
    assert set(re.findall(r"`(\w+)`", str(library(pack(tensor(dtype='"?"'), b"1"))))) <= set(KNOWN)
    for name in KNOWN:
        files = {size: library(pack(tensor(f'"{name}"', "[8]", f"[0,{size}]"), bytes(size))) for size in range(1, 129)}
        assert [size for size, found in files.items() if isinstance(found, dict)] == [BITS[name]]


ONE = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


@pytest.mark.parametrize(
    "text",
    [
        "{" + ONE + "}",
        "{" + ONE + "}      ",
        "{" + ONE + "}\n\t\r ",
        '{ "a" :\n{"data_offsets":[0,1],"shape":[1], "dtype":"U8"}}',
        '{"__metadata__":null,' + ONE + "}",
        '{"__metadata__":{},' + ONE + "}",
        '{"__metadata__":{"a":"b","":""},' + ONE + "}",
        "{" + ONE + ',"__metadata__":{}}',
        '{"":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
        '{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}',
        '{"\\ud83d\\ude00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        '{"😀\\u0000":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        '{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}',
        '{"a":{"dtype":"F6_E3M2","shape":[4,0],"data_offsets":[0,0]},"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        # JSON order is not data order, and tensors without elements share an offset with their neighbour
        '{"z":{"dtype":"U8","shape":[0],"data_offsets":[1,1]},'
        + ONE
        + ',"y":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    ],
)
def test_accepted(text: str) -> None:
    raw = pack(text, b"1")
    parsed = parse(raw)
    assert library(raw) == contents(raw, parsed) or not is_known(parsed)


def test_order_is_the_order_of_the_data() -> None:
    text = (
        '{"late":{"dtype":"U8","shape":[2],"data_offsets":[3,5]},"none":{"dtype":"U8","shape":[0],"data_offsets":[3,3]},'
        '"early":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    )
    assert list(parse(pack(text, b"12345")).tensors) == ["early", "none", "late"]


def test_files_beyond_32_bits(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    start = build_header([("a", "BF16", (2**20, 2**19)), ("b", "F64", (3,))], {})
    path.write_bytes(start)
    os.truncate(path, len(start) + 2**40 + 24)  # sparse
    parsed = read_header(path)
    assert (parsed.tensors["a"].numel, parsed.tensors["b"]) == (2**39, TensorInfo("F64", (3,), 2**40, 2**40 + 24))


def test_300_tensors_take_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(build_header([(f"model.layers.{i}.norm.weight", "F32", (0, i)) for i in range(300)], {}))
    best = 1e9
    for _ in range(5):
        start = time.perf_counter()
        assert len(read_header(path).tensors) == 300
        best = min(best, time.perf_counter() - start)
    assert best < 0.05


# ---------------------------------------------------------------------------------------------------------- rejected


BAD = {  # what: (JSON, message, whether the library takes it)
    "empty JSON": ("", "header is empty", False),
    "space first": (" {}", "begins with b' '", True),
    "byte order mark": ("\ufeff{}", "begins with", False),
    "list": ("[]", "begins with", False),
    "long name": ('{"' + "n" * 100_000 + '":[' + '"m",' * 100_000 + '"m"]}', "nnn...nnn", False),
    "cut": ('{"a":', "not valid JSON", False),
    "zero padding": ("{}\0\0", "not valid JSON", False),
    "two values": ("{} {}", "not valid JSON", False),
    "comment": ("{/**/}", "not valid JSON", False),
    "trailing comma": ('{"__metadata__":{},}', "not valid JSON", False),
    "single quotes": ("{'__metadata__':{}}", "not valid JSON", False),
    "not UTF-8": (b'{"\xff":1}', "not valid JSON", False),
    "overlong UTF-8": (b'{"__metadata__":{"\xc0\xaf":""}}', "not valid JSON", False),
    "UTF-8 surrogate": ('{"__metadata__":{"\ud800":""}}', "not valid JSON", False),
    "escaped surrogate": ('{"__metadata__":{"\\ud800":""}}', "not valid JSON", False),
    "escaped surrogates, wrong order": ('{"__metadata__":{"":"\\udc00\\ud800"}}', "not valid JSON", False),
    "control character": ('{"__metadata__":{"\n":""}}', "not valid JSON", False),
    "unknown escape": ('{"__metadata__":{"\\x41":""}}', "not valid JSON", False),
    "deep": ('{"a":' + "[" * 100_000, "nested too deeply", False),
    "deep and closed": ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply", False),
    "deep object": ('{"a":' * 100_000, "nested too deeply", False),
    "duplicate tensor": ("{" + ONE + "," + ONE + "}", "duplicate key 'a'", True),
    "duplicate tensor, escaped": ("{" + ONE + "," + ONE.replace("a", "\\u0061", 1) + "}", "duplicate key 'a'", True),
    "duplicate metadata": ('{"__metadata__":{},"__metadata__":{}}', "duplicate key", False),
    "duplicate in metadata": ('{"__metadata__":{"x":"","x":""}}', "duplicate key 'x'", True),
    "duplicate field": (tensor(offsets='[0,1],"shape":[1]'), "duplicate key 'shape'", False),
    "metadata number": ('{"__metadata__":{"x":1}}', "__metadata__ is", False),
    "metadata null value": ('{"__metadata__":{"x":null}}', "__metadata__ is", False),
    "metadata list": ('{"__metadata__":[]}', "__metadata__ is", False),
    "metadata false": ('{"__metadata__":false}', "__metadata__ is", False),
    "metadata nested": ('{"__metadata__":{"x":{}}}', "__metadata__ is", False),
    "metadata NaN": ('{"__metadata__":{"x":NaN}}', "NaN is not JSON", False),
    "entry null": ('{"a":null}', "got None", False),
    "entry list": ('{"a":["U8",[1],[0,1]]}', "wanted an object of exactly", True),
    "unknown field": (tensor(offsets='[0,1],"extra":0'), "wanted an object of exactly", True),
    "missing field": ('{"a":{"dtype":"U8","shape":[1]}}', "wanted an object of exactly", False),
    "dtype unknown": (tensor(dtype='"FLOAT"'), "dtype is 'FLOAT', wanted one of BOOL", False),
    "dtype lower case": (tensor(dtype='"u8"'), "dtype is 'u8'", False),
    "dtype number": (tensor(dtype="8"), "dtype is 8", False),
    "dtype list": (tensor(dtype='["U8"]'), "dtype is ['U8']", False),
    "dtype object": (tensor(dtype='{"U8":null}'), "dtype is {'U8': None}", True),
    "shape null": (tensor(shape="null"), "shape is None", False),
    "shape number": (tensor(shape="1"), "shape is 1,", False),
    "shape text": (tensor(shape='"1"'), "shape is '1'", False),
    "shape object": (tensor(shape="{}"), "shape is {}", False),
    "shape nested": (tensor(shape="[[1]]"), "shape is [[1]]", False),
    "shape float": (tensor(shape="[1.0]"), "shape is [1.0]", False),
    "shape exponent": (tensor(shape="[1e0]"), "shape is [1.0]", False),
    "shape bool": (tensor(shape="[true]"), "shape is [True]", False),
    "shape negative": (tensor(shape="[-1]"), "shape is [-1]", False),
    "shape negative twice": (tensor(shape="[-1,-1]"), "shape is [-1, -1]", False),
    "shape minus zero": ('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]},' + ONE.replace("a", "b", 1) + "}",
                         "shape is [-0.0]", False),
    "shape plus": (tensor(shape="[+1]"), "not valid JSON", False),
    "shape leading zero": (tensor(shape="[01]"), "not valid JSON", False),
    "shape NaN": (tensor(shape="[NaN]"), "NaN is not JSON", False),
    "shape Infinity": (tensor(shape="[Infinity]"), "Infinity is not JSON", False),
    "shape 2^64": (tensor(shape="[18446744073709551616]"), "2^63 - 1 bits", False),
    "shape 10000 digits": (tensor(shape=f"[{'1' * 10_000}]"), "shape is [inf]", False),
    "shape wraps to 1": (tensor(shape="[18446744073709551615,18446744073709551615]"), "2^63 - 1 bits", False),
    "shape wraps to 0": (tensor(shape="[4294967296,4294967296]"), "2^63 - 1 bits", False),
    "bits wrap to 8": (tensor(shape="[2305843009213693953]"), "2^63 - 1 bits", False),
    "zero after overflow": (tensor(shape="[4294967296,4294967296,0]"), "2^63 - 1 bits", False),
    "overflow after zero": ('{"a":{"dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0]},'
                            + ONE.replace("a", "b", 1) + "}", "2^63 - 1 bits", True),
    "shape too small": (tensor(shape="[0]"), "takes 0 bytes, got data offsets [0, 1], which hold 1", False),
    "shape too large": (tensor(shape="[2]"), "takes 2 bytes", False),
    "dtype too wide": (tensor(dtype='"F64"'), "F64 of shape [1] takes 8 bytes", False),
    "half a byte": (tensor(dtype='"F4"', shape="[1]"), "takes 4 bits, wanted whole bytes", False),
    "offsets null": (tensor(offsets="null"), "data_offsets is None", False),
    "offsets one": (tensor(offsets="[0]"), "data_offsets is [0]", False),
    "offsets three": (tensor(offsets="[0,1,1]"), "data_offsets is [0, 1, 1]", False),
    "offsets object": (tensor(offsets='{"0":0,"1":1}'), "data_offsets is {", False),
    "offset float": (tensor(offsets="[0,1.0]"), "end is 1.0", False),
    "offset bool": (tensor(offsets="[false,true]"), "begin is False", False),
    "offset negative": (tensor(offsets="[-1,0]"), "begin is -1", False),
    "offset minus zero": (tensor(offsets="[-0,1]"), "begin is -0.0", False),
    "offset text": (tensor(offsets='["0","1"]'), "begin is '0'", False),
    "offset 2^64": (tensor(offsets="[18446744073709551616,18446744073709551617]"), "begin is 1844674407370955", False),
    "offsets reversed": (tensor(offsets="[1,0]"), "hold -1", False),
    "offsets reversed, zero": ('{"a":{"dtype":"U8","shape":[0],"data_offsets":[1,0]},' + ONE.replace("a", "b", 1) + "}",
                               "hold -1", False),
    "gap at the start": (tensor(offsets="[1,2]"), "gap before tensor 'a'", False),
    "gap": ("{" + ONE + ',"b":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}}', "gap before tensor 'b'", False),
    "overlap": ("{" + ONE + "," + ONE.replace("a", "b", 1) + "}", "overlap before tensor 'b'", False),
    "zero-element tensor inside another": (
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}',
        "overlap before tensor 'b'", False),
    "trailing byte": ("{}", "1 bytes too many at the end. The header describes a file of 10 bytes, got 11", False),
    "truncated": (tensor(shape="[5]", offsets="[0,5]"),
                  "truncated: 4 bytes missing. The header describes a file of 66 bytes, got 62", False),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_rejected(tmp_path: Path, what: str) -> None:
    text, message, library_takes_it = BAD[what]
    raw = pack(
        text, b"1" if "data_offsets" in str(text) or "[0,1]" in str(text) or message.startswith("1 byte") else b""
    )
    with pytest.raises(CheckpointError) as caught:
        parse(raw)
    assert message in str(caught.value)
    assert str(caught.value).startswith("x.safetensors: ")
    assert len(str(caught.value)) < 1000
    assert isinstance(library(raw), dict) == library_takes_it
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError):
        read_header(path)
    with contextlib.nullcontext() if library_takes_it else pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, "np")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 16, 60, 68, 69])
def test_truncated_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    whole = build_header([("a", "U8", (6,))], {}) + b"123456"
    assert len(whole) == 70
    path.write_bytes(whole[:size])
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "again" in message
    if size >= 64:
        assert f"{70 - size} bytes missing. The header describes a file of 70 bytes, got {size}" in message
    elif size >= 8:
        assert f"wanted at least 64 bytes, got {size}" in message


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html>", "HTML"),
        (b"\n  <html>", "HTML"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "XML"),
        (b"GGUF\x03\0\0\0\x23\x01\0\0\0\0\0\0", "GGUF"),
        (b"PK\x03\x04\0\0\x08\x08\0\0", "zip"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
        (b"\x80\x04\x95\0\0\0\0\0" + bytes(20), "pickle"),
        (b"\x93NUMPY\x01\0v\0", ".npy"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "compressed"),
        (b'{"metadata": {"total_size": 5}, "weight_map": {}}', "JSON text, perhaps an index"),
        (b"{}", "JSON text"),
        (b"Entry not found", "text, b'Entry not found'"),
        (b"\xf0\xf1\xf2\xf3\xf4\xf5\xf6\xf7\xf8", "header says it has"),
        (bytes(4096), "header is empty"),
        (b"\x05" + bytes(4095), "begins with b'\\x00'"),
    ],
)
def test_names_what_the_file_is_instead(tmp_path: Path, start: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ") as caught:
        read_header(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("length", [0x0A7B, 0x227B, 0x8B1F])
def test_lengths_that_look_like_other_formats(length: int) -> None:
    raw = (length.to_bytes(8, "little") + b"{}").ljust(8 + length)
    assert parse(raw).tensors == {}
    with pytest.raises(CheckpointError, match="truncated in the header"):
        parse(raw[:-1])


def test_pytorch_pickle(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"zip, such as a PyTorch pickle.*save_pretrained"):
        read_header(path)


def test_things_that_are_not_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in [
        ("", "is a folder"),
        ("fifo", "is a named pipe"),
        ("absent", "No such file"),
        ("loop", "Too many levels"),
        ("nul\0", "null byte"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_header(tmp_path / name)


def test_header_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    os.truncate(path, 100_000_009)
    with pytest.raises(CheckpointError, match="100000001 bytes, wanted at most 100000000"):
        read_header(path)
    monkeypatch.setattr(header, "MAX_HEADER", 16)
    assert parse(pack("{}".ljust(16))).tensors == {}
    with pytest.raises(CheckpointError, match="at most 16"):
        parse(pack("{}".ljust(17)))


def test_short_reads_and_disk_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(build_header([(f"tensor {i}", "U8", (0,)) for i in range(200)], {}))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 1000), at))
    assert len(read_header(path).tensors) == 200
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 1000), at) if at < 5000 else b"")
    with pytest.raises(CheckpointError, match="the file shrank"):
        read_header(path)

    def fail(*_: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*x\.safetensors'") as caught:
        read_header(path)
    assert not isinstance(caught.value, CheckpointError)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"GGUF")
    before = len(os.listdir("/proc/self/fd"))
    for path in [tmp_path, tmp_path / "x"]:
        with pytest.raises(CheckpointError):
            read_header(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_values_are_valid_by_construction() -> None:
    with pytest.raises(CheckpointError, match="hold 3"):
        TensorInfo("F32", (1,), 0, 3)
    with pytest.raises(CheckpointError, match="gap"):
        Header({"a": TensorInfo("F32", (1,), 4, 8)}, {}, 8, 16)
    with pytest.raises(CheckpointError, match="truncated"):
        Header({"a": TensorInfo("F32", (1,), 0, 4)}, {}, 8, 11)


# -------------------------------------------------------------------------------------------------- differential fuzz

# Where this reader is stricter than the library; any other refusal of a file that the library takes is a defect.
STRICTER = (
    "duplicate key", "wanted an object of exactly", "header begins with", "2^63 - 1", "dtype is {", "JSON text",
    "nested too deeply",
)  # fmt: skip

ODD_NUMBERS = [
    "0", "1", "2", "3", "8", "-0", "-1", "1.0", "1e0", "0.5", "00", "1e400", "NaN", "-Infinity", "4294967296",
    "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616",
    "99999999999999999999", "1" * 5000,
]  # fmt: skip
ODD_VALUES = [
    *ODD_NUMBERS, "null", "true", "false", '""', '"U8"', '"F4"', '"F6_E2M3"', '"C64"', "[]", "{}", "[0,0]", "[1]",
    '["U8"]', '{"U8":null}', '{"a":"b"}', '"\\ud800"', '"\\ud83d\\ude00"', '"\\udc00x"', '"é"', '"\\u0000"',
    '"\x01"', "[[]]", '"__metadata__"', '{"__metadata__":{}}', "[0,1.5]", "[-1]",
]  # fmt: skip


class Number(str):
    """JSON text that stands for itself."""


def render(rng: random.Random, value: Any) -> str:
    """JSON text of a tree whose objects are lists of pairs, so that keys may repeat, now and then with white space."""
    space = rng.choice([" ", "\n", "\t", "\r\n", "\f", "\u00a0"]) if rng.random() < 0.002 else ""
    if isinstance(value, Number):
        return space + value
    if isinstance(value, tuple):
        return space + "{" + ",".join(f"{json.dumps(k)}:{render(rng, v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return space + "[" + ",".join(render(rng, v) for v in value) + "]" + space
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def valid_tree(rng: random.Random) -> tuple[list[Any], int]:
    """Pairs of a valid header, in random order, and the size of its data."""
    pairs: list[Any] = []
    end = 0
    for i in range(rng.choice([0, 1, 1, 2, 3, 5])):
        dtype = rng.choice(KNOWN)
        shape = [rng.choice([0, 1, 1, 2, 3, 4]) for _ in range(rng.randrange(4))]
        shape += [] if dtype in WHOLE else [4]
        begin, end = end, end + header.tensor_bytes(dtype, tuple(shape))
        entry = [("dtype", dtype), ("shape", shape), ("data_offsets", [begin, end])]
        rng.shuffle(entry)
        pairs.append((rng.choice([f"t{i}", f"é{i}", f"層.{i}\n", f"{i}"]), tuple(entry)))
    if rng.random() < 0.3:
        pairs.append(("__metadata__", (("format", "pt"),)))
    rng.shuffle(pairs)
    return pairs, end


def mutate_tree(rng: random.Random, pairs: list[Any]) -> list[Any]:
    """One change to the structure: a value, a key, an entry doubled, dropped or swapped."""
    pairs = copy.copy(pairs)
    odd = Number(rng.choice(ODD_VALUES))
    if not pairs or rng.random() < 0.1:
        pairs.insert(rng.randrange(len(pairs) + 1), (rng.choice(["x", "__metadata__", "dtype", "t0"]), odd))
        return pairs
    at = rng.randrange(len(pairs))
    name, entry = pairs[at]
    fields = list(entry) if isinstance(entry, tuple) else []
    kind = rng.randrange(9)
    if kind == 0:
        pairs.append(pairs[at])
    elif kind == 1:
        del pairs[at]
    elif kind == 2:
        pairs[at] = (name, odd)
    elif kind == 3:
        pairs[at] = (rng.choice(["__metadata__", "", "t0"]), entry)
    elif fields:
        where = rng.randrange(len(fields))
        key, value = fields[where]
        if kind == 4:
            fields.append(rng.choice([fields[where], ("extra", odd)]))
        elif kind == 5:
            del fields[where]
        elif kind == 6:
            fields[where] = (key, odd)
        elif isinstance(value, list) and value:
            value = list(value)
            position = rng.randrange(len(value))
            step = value[position] + rng.choice([-1, 1]) if type(value[position]) is int else odd
            value[position] = rng.choice([step, step, Number(rng.choice(ODD_NUMBERS)), odd])
            if rng.random() < 0.1:
                value.append(value[position])
            fields[where] = (key, value)
        else:
            fields[where] = (key, rng.choice([*WHOLE, "F4", odd]))
        pairs[at] = (name, tuple(fields))
    return pairs


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    """A few changes to bytes, most of them in the header; often the length is made to agree again."""
    out = bytearray(raw)
    size = len(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(out)) if out else 0
        kind = rng.randrange(6)
        if kind == 0 and out:
            out[at] = rng.choice(b' {}[]",:0123456789-.eE+\\u\t\n\0') if rng.random() < 0.7 else rng.randrange(256)
        elif kind == 1 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at:at] = rng.choice([b"0", b"1", b" ", b",", b"\\", b'"', b"{", b"}", b"[", b"]", rng.randbytes(2)])
        elif kind == 3:
            del out[at : at + rng.choice([1, 1, 2, 8])]
        elif kind == 4:
            other = rng.randrange(len(out)) if out else 0
            out[at:at] = out[other : other + rng.randrange(24)]
        else:
            del out[at + rng.randrange(64) :]
    if len(out) > 8 and rng.random() < 0.6:
        length = max(int.from_bytes(raw[:8], "little") + len(out) - size, 0)
        out[:8] = length.to_bytes(8, "little")
    return bytes(out)


REFUSALS = (
    "header is empty", "wanted at least 8 for the length", "wanted at most 100000000", "truncated in the header",
    "header begins with", "not valid JSON", "is not JSON", "codec can't", "duplicate key", "__metadata__ is",
    "wanted an object of exactly", "dtype is", "shape is", "wanted integers >= 0", "2^63 - 1 bits",
    "wanted whole bytes", "data_offsets is", "data offset begin", "data offset end", "which hold", "gap before",
    "overlap before", "bytes missing", "bytes too many",
)  # fmt: skip
"""A part of every message for what is wrong inside of a file; the fuzz has to get to each."""


def compare(raw: bytes, seen: set[str] | None = None) -> str:
    """Feed one file to both readers; fail where this one accepts too much or refuses without a known reason.

    Adds to `seen` the refusals that were met.
    """
    found = library(raw)
    refusal = ""
    try:
        parsed = parse(raw)
    except CheckpointError as error:
        refusal = str(error)
    if refusal:
        if seen is not None:
            seen.update(part for part in REFUSALS if part in refusal)
        assert isinstance(found, str) or any(reason in refusal for reason in STRICTER), (raw, refusal)
        return "rejected" if isinstance(found, str) else "stricter"
    if not is_known(parsed):
        return "unknown"
    assert isinstance(found, dict), (raw, found)
    assert contents(raw, parsed) == found, raw
    return "accepted"


def fuzz(rounds: int, seed: int) -> tuple[dict[str, int], set[str]]:
    """Numbers of outcomes, and the refusals that were met."""
    seen: set[str] = set()
    rng = random.Random(seed)
    counts = {"accepted": 0, "rejected": 0, "stricter": 0, "unknown": 0}
    for _ in range(rounds):
        pairs, size = valid_tree(rng)
        data = rng.randbytes(size)
        changed = pairs
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            changed = mutate_tree(rng, changed)
        text = render(rng, tuple(changed))
        raw = pack(render(rng, tuple(pairs)) + " " * rng.choice([0, 0, 3]), data)
        trimmed = data[: rng.choice([size, size, size, max(size - 1, 0)])] + bytes(rng.choice([0, 0, 0, 1]))
        for candidate in (raw, pack(text, trimmed), mutate_bytes(rng, raw), mutate_bytes(rng, pack(text, data))):
            counts[compare(candidate, seen)] += 1
    return counts, seen


def test_fuzz_against_the_library() -> None:
    counts, seen = fuzz(10_000, seed=20240917)
    assert seen == set(REFUSALS)
    assert counts["accepted"] > 10_000  # also mutations survive: the comparison is not only of refusals
    assert counts["rejected"] > 10_000
    assert counts["stricter"] > 300


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(10))
def test_fuzz_long(seed: int) -> None:
    counts, seen = fuzz(50_000, seed)
    assert seen == set(REFUSALS)
    assert min(counts["accepted"], counts["rejected"], counts["stricter"]) > 2_000


def test_every_truncation_and_extension_is_refused() -> None:
    raw = build_header([("a", "F32", (2, 2)), ("b", "U8", (3,))], {"format": "pt"}) + bytes(range(19))
    assert isinstance(library(raw), dict)
    for size in range(len(raw)):
        with pytest.raises(CheckpointError):
            parse(raw[:size])
    for extra in range(1, 20):
        with pytest.raises(CheckpointError, match=f"{extra} bytes too many"):
            parse(raw + bytes(extra))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=64))
def test_random_bytes_give_a_reason_or_agree(body: bytes) -> None:
    compare(body)
    compare(pack(b"{" + body))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(WHOLE),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(
        st.text(max_size=3) | st.just("__metadata__"),
        JSON | st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "data_offsets": JSON}),
        max_size=3,
    )
)
def test_random_json_gives_a_reason_or_agrees(table: dict[str, Any]) -> None:
    compare(pack(json.dumps(table), b"12345678"))
