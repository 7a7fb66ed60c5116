"""The GPU as the bench sees it: where tensors go, and what its own clock says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

CALLS = 5
"""Calls that are timed at a time: the host queues one while the device is busy with the one before."""
_HEAD_START = 20_000_000  # cycles, about 10 ms, in which the host queues the first
_PINNED = 1 << 26  # bytes of host memory that `transfer` copies again and again


class Accelerator(Protocol):
    """What is special about a GPU."""

    @property
    def place(self) -> torch.device:
        """Where the tensors are."""

    @property
    def name(self) -> str:
        """Of the product."""

    def facts(self) -> dict[str, Any]:
        """For the record, in JSON types."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Of the device, for one call of `run`."""

    def transfer(self, into: int, back: int) -> None:
        """Copy so many bytes from pinned host memory to the device and back from it, both ways at once, and wait."""

    def release(self) -> None:
        """Give back memory that nothing uses any more."""


class Cuda:
    """A device of torch.cuda."""

    def __init__(self, place: torch.device) -> None:
        self.place = torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)
        self.name = torch.cuda.get_device_name(self.place)

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.place)
        return {
            "name": self.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }

    def seconds(self, run: Callable[[], object]) -> float:
        with torch.cuda.device(self.place):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(CALLS):
                run()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / CALLS

    def transfer(self, into: int, back: int) -> None:
        with torch.cuda.device(self.place):
            queues = []
            for nbytes, inwards in ((into, True), (back, False)):
                host = torch.empty(_PINNED, dtype=torch.uint8, pin_memory=True)
                there = torch.empty(_PINNED, dtype=torch.uint8, device=self.place)
                to, source = (there, host) if inwards else (host, there)
                queues.append((torch.cuda.Stream(), nbytes, to, source))  # type: ignore[no-untyped-call]
            for stream, nbytes, to, source in queues:
                with torch.cuda.stream(stream):
                    for start in range(0, nbytes, _PINNED):
                        size = min(_PINNED, nbytes - start)
                        to[:size].copy_(source[:size], non_blocking=True)
            torch.cuda.synchronize()

    def release(self) -> None:
        torch.cuda.empty_cache()


def open_cuda(device: str) -> Cuda:
    """The GPU that is meant. Raises RuntimeError where there is none."""
    try:
        place = torch.device(device)
    except RuntimeError:
        raise RuntimeError(f"{device}: no such device; wanted cuda, or cuda:N for one of several") from None
    if place.type != "cuda":
        raise RuntimeError(f"{device}: measures tensors on a GPU only; wanted cuda, or cuda:N for one of several")
    count = torch.cuda.device_count()
    if (place.index or 0) >= count:
        raise RuntimeError(f"{device}: torch {torch.__version__} sees {count} CUDA devices; run this on a GPU machine")
    return Cuda(place)
