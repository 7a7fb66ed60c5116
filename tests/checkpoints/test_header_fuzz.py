"""Random headers, sound and damaged: none is taken that safetensors refuses, and whatever is refused has a reason."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from headers import KNOWN, WHOLE, contents, is_known, library, pack, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from ires_kernels.checkpoints import header
from ires_kernels.checkpoints.header import CheckpointError, build_header

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
