"""On which device each tensor of a merged model is to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from ires_kernels.checkpoints.header import brief
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.planning.steps import Output
from ires_kernels.streaming import device as devices

ALL = "cuda:all"
"""All GPUs that torch sees."""
Wanted = str | torch.device | Mapping[str, "str | int | torch.device"]


class Places(NamedTuple):
    """The devices that have tensors, and which of them each has."""

    devices: tuple[torch.device, ...]
    by_name: dict[str, int]
    """The place in `devices`."""


def places(wanted: Wanted, outputs: Sequence[tuple[Output, int]]) -> Places:
    """Where tensors are to be, which come with their bytes: on one device, on all GPUs, or by the beginnings of names.

    On all GPUs each has tensors that follow each other in the model, of as many bytes as the others but for a tensor:
    so layers stay together. By names the longest beginning counts, as in a device_map of accelerate; it is whole words.

    Raises ArgumentError for a device that is not there, and a tensor that no name says anything of.
    """
    if isinstance(wanted, Mapping):
        return _by_beginnings(wanted, [output.name for output, _ in outputs])
    found = all_gpus() if wanted == ALL else (devices.resolve(wanted),)
    total = sum(nbytes for _, nbytes in outputs) or 1
    middles = [2 * end - nbytes for end, (_, nbytes) in zip(accumulate(n for _, n in outputs), outputs, strict=True)]
    numbers = [min(middle * len(found) // (2 * total), len(found) - 1) for middle in middles]
    return Places(found, {output.name: number for (output, _), number in zip(outputs, numbers, strict=True)})


def all_gpus() -> tuple[torch.device, ...]:
    """Those that torch sees. Raises ArgumentError where there are none."""
    first = devices.resolve("cuda:0")
    return (first, *(devices.resolve(f"cuda:{index}") for index in range(1, torch.cuda.device_count())))


def _by_beginnings(wanted: Mapping[str, str | int | torch.device], names: Sequence[str]) -> Places:
    given = {
        beginning: devices.resolve(f"cuda:{device}" if isinstance(device, int) else device)
        for beginning, device in wanted.items()
    }
    numbers = {device: number for number, device in enumerate(dict.fromkeys(given.values()))}
    by_name = {}
    for name in names:
        words = name.split(".")
        beginnings = (".".join(words[:count]) for count in range(len(words), -1, -1))
        beginning = next((each for each in beginnings if each in given), None)
        if beginning is None:
            raise ArgumentError(
                f"device has no place for {brief(name)}: give it one, or all that is left with the name ''."
            )
        by_name[name] = numbers[given[beginning]]
    return Places(tuple(numbers), by_name)
