"""The header reader accepts what safetensors writes and never accepts what safetensors rejects."""

from __future__ import annotations

import contextlib
import errno
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
from headers import BITS, KNOWN, WHOLE, contents, is_known, library, pack, parse, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from ires_kernels.checkpoints import header
from ires_kernels.checkpoints.header import CheckpointError, Header, TensorInfo, build_header, read_header

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
    for name, t in tensors.items():
        info = parsed.tensors[name]
        stored = raw[parsed.data_start + info.begin : parsed.data_start + info.end]
        assert stored == bytes(t.reshape(-1).view(torch.uint8).tolist())
        assert (info.shape, info.nbytes) == (tuple(t.shape), t.nbytes)
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
