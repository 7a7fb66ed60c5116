"""What else brings a merged model onto a device: a floor, the loaders there are, and the script that people write.

The floor reads the same bytes with pread, by as many threads as `load` takes by default, into buffers that are used
again, and leaves them there. Loaders read all three models and compute nothing. Of each what counts is that all of it
is over: something of the last tensor is fetched.
"""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from ires_kernels.bench.measure import Ways
from ires_kernels.bench.merges import weights
from ires_kernels.bench.synthetic import Triple
from ires_kernels.streaming.stream import default_threads

PREAD, LOAD_FILE, FAST, SCRIPT = "pread", "load_file", "fastsafetensors", "script"
_PIECE = 8 << 20  # bytes that a thread reads at a time, as `load` does


def ways(triple: Triple, place: torch.device) -> tuple[Ways, dict[str, str]]:
    """The contenders that are installed, and why others are not there."""
    found: Ways = {PREAD: lambda: pread(triple, default_threads())}
    unavailable: dict[str, str] = {}
    if find_spec("safetensors"):
        found[LOAD_FILE] = lambda: load_file(triple, place)
        found[SCRIPT] = lambda: script(triple, place)
    else:
        unavailable |= dict.fromkeys((LOAD_FILE, SCRIPT), "safetensors is not installed")
    if find_spec("fastsafetensors"):
        found[FAST] = lambda: fast(triple, place)
    else:
        unavailable[FAST] = "fastsafetensors is not installed"
    return found, unavailable


def pread(triple: Triple, threads: int) -> int:
    """Read all weights; returns how many bytes that were."""
    fds = [os.open(path, os.O_RDONLY) for path in _files(triple)]
    pieces = [(fd, start) for fd in fds for start in range(0, os.fstat(fd).st_size, _PIECE)]
    turns, read = count(), [0] * threads

    def work(thread: int) -> None:
        buffer = bytearray(_PIECE)
        while (turn := next(turns)) < len(pieces):
            fd, start = pieces[turn]
            read[thread] += os.preadv(fd, [buffer], start)

    others = [threading.Thread(target=work, args=(i,)) for i in range(1, threads)]
    try:
        for other in others:
            other.start()
        work(0)
        for other in others:
            other.join()
    finally:
        for fd in fds:
            os.close(fd)
    return sum(read)


def load_file(triple: Triple, place: torch.device) -> None:
    """All files onto the device, one after the other, with safetensors."""
    from safetensors.torch import load_file

    for path in _files(triple):
        _fetch(load_file(path, device=str(place)))


def fast(triple: Triple, place: torch.device) -> None:
    """The files of one model at a time onto the device, with fastsafetensors and without GPUDirect Storage."""
    from fastsafetensors import fastsafe_open  # type: ignore[import-not-found]

    for folder in (triple.target, triple.instruct, triple.base):
        names = [str(path) for path in weights(folder)]
        with fastsafe_open(filenames=names, nogds=True, device=str(place), debug_log=False) as file:
            _fetch({name: file.get_tensor(name).clone() for name in file.get_keys()})


def script(triple: Triple, place: torch.device) -> dict[str, Tensor]:
    """Load the target, then the other two file by file, and add the difference on the device, tensor by tensor."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for path in weights(triple.target):
        state |= load_file(path, device=str(place))
    for pair in zip(weights(triple.instruct), weights(triple.base), strict=True):
        instruct, base = (load_file(path, device=str(place)) for path in pair)
        for name, tensor in instruct.items():
            state[name].add_(tensor - base[name])
    _fetch(state)
    return state


def _files(triple: Triple) -> list[Path]:
    return [path for folder in (triple.target, triple.instruct, triple.base) for path in weights(folder)]


def _fetch(state: dict[str, Tensor]) -> None:
    """Wait for the device."""
    for tensor in list(state.values())[-1:]:
        tensor.reshape(-1)[:1].cpu()
