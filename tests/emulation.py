"""tests/emulate.cpp, built and callable: the GPU kernels, thread by thread, on a CPU."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ires_kernels.backends.coded import Layout

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-strict-aliasing"]
WORDS = (32760 - 40) // 8  # of the larger table
BLOCKS = 2**31 - 1


class Emulated(NamedTuple):
    launches: int
    narrow: int  # accesses of up to 8 bytes
    wide: int  # accesses of 16 bytes
    written: int  # bytes


class Emulator:
    """`run` takes what `_native.cuda_run` takes, but for the device and the stream."""

    def __init__(self, compiler: str, folder: Path) -> None:
        library = folder / "emulate.so"
        source = str(ROOT / "tests/emulate.cpp")
        subprocess.run([compiler, *FLAGS, f"-I{ROOT / 'csrc'}", source, "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.emulate.restype = self._library.emulate_decode.restype = ctypes.c_int64
        self._library.emulate_error.restype = ctypes.c_char_p

    def run(
        self,
        op: int,
        items: Sequence[tuple[Any, ...]],
        factors: Sequence[float],
        stochastic: bool,
        seed: int,
        offset: int,
        *,
        words: int = WORDS,
        blocks: int = BLOCKS,
        ends: int = 0,
    ) -> Emulated:
        """Limits are those of a launch; with `ends` only so many blocks at either end of each launch run."""
        inputs = len(items[0][2]) - 1
        u64, i64, i32 = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int
        counts = (u64 * 3)()
        launches = self._library.emulate(
            i32(op),
            i32(inputs),
            _array(ctypes.c_double, factors),
            i32(stochastic),
            u64(seed),
            u64(offset),
            i64(len(items)),
            _array(i64, [item[0] for item in items]),
            _array(u64, [item[1] for item in items]),
            _array(u64, [pointer for item in items for pointer in item[2]]),
            _array(i32, [dtype for item in items for dtype in item[3]]),
            _array(i32, [len(item[4]) for item in items]),
            _array(i64, [size for item in items for size in item[4]]),
            _array(i64, [stride for item in items for stride in item[5]]),
            u64(words),
            u64(blocks),
            ctypes.c_uint32(ends),
            counts,
        )
        if launches < 0:
            raise RuntimeError(self._library.emulate_error().decode())
        return Emulated(launches, *counts)

    def decode(self, layout: Layout, parts: tuple[Any, ...], first: int, out: Tensor) -> int:
        """What `_native.cuda_decode` does with parts that are memoryviews; returns the bytes written."""
        codes, skipped, scale, zero, over, _ = parts
        i64, kept = ctypes.c_int64, [np.frombuffer(view or b"0", np.uint8) for view in (codes, scale, zero, over)]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in kept]
        kinds = (layout.codes, layout.high_first, layout.scale, layout.zero, layout.second)
        written: int = self._library.emulate_decode(
            _array(ctypes.c_int, kinds),
            _array(ctypes.c_float, layout.table or (0.0,) * 16),
            _array(i64, [*layout.shape, *layout.block, skipped, len(kept[3]) // 4]),
            pointers[0],
            i64(len(codes)),
            *pointers[1:],
            i64(first),
            i64(len(out)),
            ctypes.c_void_p(out.data_ptr()),
        )
        if written < 0:
            raise RuntimeError(self._library.emulate_error().decode())
        return written


def _array(kind: Any, values: Sequence[Any]) -> Any:
    return (kind * len(values))(*values)
