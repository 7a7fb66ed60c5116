"""The same tiles through a GPU: from pinned host memory to the device, computed there, and back.

    thread:  read a tile | start it | read the next one | start it | wait for the first | hash and write it | …
    queue:                   copy in → kernel → copy out, count

Every thread has SLOTS tiles under way, each with host and device memory and a queue (a CUDA stream) of its own. What
is queued runs in order, so a slot needs no other care than to wait before its host memory is used again; queues of
different slots overlap, so that copies in, kernels and copies out of all threads run at the same time.

Weights that are quantized go there as their codes and scales, and are decoded where they are computed.

Results that stay on an NVIDIA GPU take a shorter way (`_GpuSlot.load`): one call of the extension reads, copies and
computes a tile, without Python's lock, and small tensors that follow each other share one.

Pinned host memory is dear to make (ring.py), so the slots of all runs borrow it from one ring of the device, piece by
piece, and a piece is pinned when it is first used: the first thread reads while the others pin theirs.

The kernels do not tally. Where counts are wanted, plain torch makes them on the device from the operands and the result
(counting.py), behind the copy out and without stopping the queue, and they come back with it. Tensors that are copied
to a file never go there.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ires_kernels.backends import counting, decoding, native
from ires_kernels.backends.call import Coded, Tally
from ires_kernels.backends.choice import choose
from ires_kernels.backends.weight import as_bytes
from ires_kernels.checkpoints.sources import IN_MEMORY, Read
from ires_kernels.dtypes import FLOATS
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.steps import Step
from ires_kernels.streaming.cpu import NOTHING, TORCH_DTYPES, Cpu, compute, zeros
from ires_kernels.streaming.encoded import Coding
from ires_kernels.streaming.failures import failed_read
from ires_kernels.streaming.ring import Piece, Ring
from ires_kernels.streaming.tiles import (
    Portion,
    Processor,
    Processors,
    Slot,
    buffer_sizes,
    cut,
    packed,
    tiles,
)

SLOTS = 2
"""Tiles that a thread has under way: one is read or written while the other is on the device."""
_ALIGNED = 16  # elements, so that every buffer begins at a multiple of 16 bytes


Result = TypeVar("Result")


class Queue(Protocol):
    """Work of a device in order: a CUDA stream."""

    def submit(self, work: Callable[[], None]) -> None:
        """Call `work`, which queues its operations here; an error leaves in the queue what was queued before it."""

    def call(self, work: Callable[[int, int], Result]) -> Result:
        """Call `work` with a device and a stream, which the native backend takes for this queue; returns its result.

        The device is the current one meanwhile; what was queued is waited for as well.
        """

    def wait(self) -> None:
        """Return when all that was submitted is done. Raises RuntimeError when it failed."""


class Runtime(Protocol):
    """What is special about a GPU; all else here is the same on any device."""

    @property
    def device(self) -> torch.device:
        """Where the memory of a tile is, beside the host."""

    @property
    def native(self) -> bool:
        """Whether the native backend computes there."""

    def queue(self) -> Queue:
        """A queue of its own."""

    def pinned(self, nbytes: int) -> Tensor:
        """A few bytes of host memory that the device can copy to while the host goes on."""

    @property
    def ring(self) -> Ring:
        """Where the tiles have their host memory; of the whole process."""

    def settle(self) -> None:
        """Wait for what the calling thread has queued: memory it got may be in use by that until then."""


class CudaQueue:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def submit(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            try:
                work()
            finally:
                self._done.record()

    def call(self, work: Callable[[int, int], Result]) -> Result:
        with torch.cuda.device(self._device):
            try:
                return work(self._device.index, self._stream.cuda_stream)
            finally:
                self._done.record(self._stream)

    def wait(self) -> None:
        self._done.synchronize()


class Cuda:
    """A device of torch.cuda."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ring = _rings.setdefault(device.index, Ring(_pin, _unpin))
        self.native = choose(device) is native

    def queue(self) -> Queue:
        return CudaQueue(self.device)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def settle(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()


def _pin(nbytes: int) -> Tensor:
    """Memory of its own, registered with CUDA: torch's allocator would keep what is given back to it."""
    memory = torch.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    _check(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, _PORTABLE))  # type: ignore[no-untyped-call]
    return memory


def _unpin(memory: Tensor) -> None:
    _check(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))  # type: ignore[no-untyped-call]


def _check(code: Any) -> None:
    if int(code):
        raise RuntimeError(f"CUDA error {int(code)}")


_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
_rings: dict[int, Ring] = {}
"""Of each GPU: one alone has no part of its memory in use for another, and so none waits for another."""


def free() -> int:
    """Give back the pinned host memory that merges on GPUs have left for the next one, at most 128 MiB a GPU.

    Returns how many bytes that were; what a merge is using right now stays. The next merge pins memory again.

    >>> from ires_kernels.streaming import device
    >>> device.free()  # nothing was merged on a GPU in this process
    0
    """
    return sum(ring.free() for ring in _rings.values())


def resolve(device: str | torch.device) -> torch.device:
    """The device that is meant, known to be there and to have a backend. Raises ArgumentError."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError(f"--device {device}: {_WANTED}") from None
    if found.type not in ("cpu", "cuda"):
        raise ArgumentError(f"--device {device}: {_WANTED}")
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            built = torch.version.cuda or torch.version.hip
            why = "is there a driver, and a GPU?" if built else f"torch {torch.__version__} was built without CUDA"
            raise ArgumentError(f"--device {device}: torch sees no CUDA device ({why}). {_LEAVE_OUT}")
        # Other threads have another current device.
        index = torch.cuda.current_device() if found.index is None else found.index
        if index >= count:
            raise ArgumentError(f"--device {device}: torch sees {count} CUDA devices, the last is cuda:{count - 1}.")
        found = torch.device("cuda", index)
    try:
        choose(found)
    except RuntimeError as error:
        raise ArgumentError(f"--device {device}: {error}.") from None
    return found


_WANTED = "wanted cpu, cuda, or cuda:N for one of several."
_LEAVE_OUT = "Leave it out to compute on the CPU."


def processors(device: torch.device) -> Processors:
    """What computes tiles on a device that `resolve` gave."""
    return Cpu if device.type == "cpu" else partial(on_gpu, Cuda(device))


def on_gpu(runtime: Runtime, steps: Sequence[Step], rules: Rules, counted: bool) -> Processor:
    """What computes the steps of a run: where some of them make codes the CPU, and else the GPU."""
    if any(step.output.encoding for step in steps):
        return Cpu(steps, rules, counted)
    return Gpu(runtime, steps, rules, counted)


class Gpu:
    """Tiles of all threads through one GPU."""

    def __init__(self, runtime: Runtime, steps: Sequence[Step], rules: Rules, counted: bool) -> None:
        self.runtime = runtime
        self.rules = rules
        self.counted = counted
        self.tile = _tile_of(steps, runtime.ring.piece)
        self.sizes = buffer_sizes(steps, self.tile)
        self.sizes[0] += runtime.ring.piece - sum(self.sizes)
        self.copy = self.sizes[0] // tiles.get().copied * tiles.get().copied
        self.room = runtime.ring.piece if runtime.native else 0
        self.zeros = zeros(steps, self.tile, runtime.device)
        runtime.settle()

    def loads(self, step: Step, _: object, reads: Sequence[Sequence[Read]], *_more: object) -> int:
        if not self.runtime.native or any(read.fd == IN_MEMORY for each in reads for read in each):
            return 0
        return self.copy if step.op == "copy" else self.tile

    def slots(self) -> list[Slot]:
        return [_GpuSlot(self, piece) for piece in self.runtime.ring.borrow(SLOTS)]

    def release(self, slots: Iterable[Slot]) -> None:
        self.runtime.ring.take_back([slot.piece for slot in slots if isinstance(slot, _GpuSlot)])


def _tile_of(steps: Sequence[Step], piece: int) -> int:
    """As many elements as a piece holds of all inputs and the result; a power of two, as the stops of an update are."""
    largest = max((step.count for step in steps if step.op != "copy"), default=1)
    tile = tiles.get().on_gpu
    while tile > _ALIGNED and sum(buffer_sizes(steps, tile)) > piece:
        tile //= 2
    return min(tile, -(-largest // _ALIGNED) * _ALIGNED or _ALIGNED)


class _GpuSlot:
    decodes = True

    def __init__(self, gpu: Gpu, piece: Piece) -> None:
        self.piece = piece
        self._gpu = gpu
        self._queue = gpu.runtime.queue()
        self._host: Sequence[Tensor] = ()
        self._views: list[memoryview] = []
        self._device: Sequence[Tensor] = ()
        self._whole: Tensor | None = None
        self._parts: dict[tuple[int, str], tuple[memoryview, Tensor]] = {}
        self._numbers: Tensor | None = None
        self._counted = 0  # elements of the tile under way whose counts are on their way to `_numbers`

    @property
    def buffers(self) -> list[memoryview]:
        """Pinned when they are first asked for. Raises ComputeError where there is no room."""
        if not self._views:
            pinned = self._pinned()
            self._host = cut(pinned, self._gpu.sizes)
            self._views = cut(pinned.numpy().data, self._gpu.sizes)
        return self._views

    def _allocate(self) -> None:
        """On the device, in the queue, so that no other stream was the last to use this memory."""
        self._whole = torch.empty(self._gpu.runtime.ring.piece, dtype=torch.uint8, device=self._gpu.runtime.device)
        self._device = cut(self._whole, self._gpu.sizes)

    def _pinned(self) -> Tensor:
        """The host memory. To pin it is a call of CUDA, which would wake another device that is the current one."""
        return self._queue.call(lambda *_: self.piece.memory)

    def load(self, portions: Sequence[Portion]) -> list[list[memoryview]]:
        """Inputs one after the other, at the same places of the host's memory and of the device's."""
        memory = self.piece.memory if self.piece.is_pinned else self._pinned()
        if self._whole is None:
            self._queue.submit(self._allocate)
            assert self._whole is not None
        host, view, there = memory.data_ptr(), memory.numpy().data, self._whole.data_ptr()
        reads, items, views, at = [], [], [], 0
        owners: list[tuple[Step, Path]] = []  # of the reads
        for step, _, count, out, operands, _ in portions:
            assert out is not None
            pointers = [out.data_ptr()]
            seen = []
            for pieces in operands:
                begin, goal = at, pointers[0] if step.op == "copy" else there + at
                pointers.append(there + at)
                one = len(pieces) == 1
                for fd, offset, nbytes, path, *_ in pieces:
                    reads.append((fd, offset, host + at, goal if one else 0, nbytes))
                    owners.append((step, path))
                    at += nbytes
                if not one:  # some hundred pieces, each of which would cost as much to copy as all of them
                    reads.append((-1, 0, host + begin, goal, at - begin))
                    owners.append((step, Path()))
                seen.append(view[begin:at])
                at = begin + packed([at - begin])
            views.append(seen)
            if step.op != "copy":
                dtypes = [out.dtype, *(TORCH_DTYPES[operand.dtype] for operand in step.operands)]
                if step.op == "convert":
                    dtypes.append(dtypes[1])
                    pointers.append(self._gpu.zeros[step.operands[0].dtype].data_ptr())
                items.append(native.item(count, step.stream, tuple(pointers), tuple(dtypes)))
        step, first, rules = portions[0].step, portions[0].first, self._gpu.rules
        op = step.op if step.op not in ("convert", "copy") else "subtract"
        factors = step.factors if items and op != "subtract" else ()
        load = partial(
            native.load, reads, native.code(op), items, factors,
            stochastic=rules.rounding == "stochastic", seed=rules.seed, offset=first,
        )  # fmt: skip
        unread = self._queue.call(load)
        if unread is not None:
            number, error, place = unread
            raise failed_read(*owners[number], error, place)
        return views

    def measure(self, step: Step, *_: object) -> None:
        raise AssertionError(f"codes of {step.name} are to be made on the CPU")

    def start(
        self,
        step: Step,
        first: int,
        count: int,
        out: Tensor | None,
        coded: Mapping[int, Coded],
        coding: Coding | None = None,
    ) -> None:
        assert coding is None
        self._counted = count if self._gpu.counted and step.op != "copy" else 0
        if self._counted and self._numbers is None:
            self._numbers = self._gpu.runtime.pinned(8 * counting.NUMBERS).view(torch.float64)
        self._queue.submit(partial(self._run, step, first, count, out, coded))

    def _run(self, step: Step, first: int, count: int, out: Tensor | None, coded: Mapping[int, Coded]) -> None:
        if step.op == "copy":
            assert out is not None
            out.copy_(self._host[0][:count], non_blocking=True)
            return
        if not self._device:
            self._allocate()
        operands = [
            self._decoded(slot, coded[slot], count) if slot in coded else self._copied_in(slot, operand.dtype, count)
            for slot, operand in enumerate(step.operands)
        ]
        if step.op == "convert":
            operands.append(self._gpu.zeros[step.operands[0].dtype][:count])
        elif step.is_from_zero:
            operands.insert(0, self._gpu.zeros[NOTHING][:count])
        nbytes = count * FLOATS[step.dtype]
        stored = self._device[-1][:nbytes].view(TORCH_DTYPES[step.dtype]) if out is None else out
        compute(step, operands, stored, first, self._gpu.rules, None)
        if out is None:
            self._host[-1][:nbytes].copy_(self._device[-1][:nbytes], non_blocking=True)
        if self._numbers is not None:
            numbers = counting.count("subtract" if step.op == "convert" else step.op, operands, step.factors, stored)
            self._numbers.copy_(numbers, non_blocking=True)

    def _copied_in(self, slot: int, dtype: str, count: int) -> Tensor:
        nbytes = count * FLOATS[dtype]
        there = self._device[slot][:nbytes]
        there.copy_(self._host[slot][:nbytes], non_blocking=True)
        return there.view(TORCH_DTYPES[dtype])

    def _decoded(self, slot: int, numbers: Coded, count: int) -> Tensor:
        """The numbers of an operand whose codes are in the host's memory, made of them on the device.

        What it has no kernel for is decoded by the CPU.
        """
        format, full, first, parts = numbers
        there = self._device[slot][: 4 * count].view(torch.float32)
        codes = as_bytes(parts["codes"]).to(there.device, non_blocking=True)
        others = {name: self._part(slot, name, view) for name, view in parts.items() if name != "codes"}
        if not decoding.decode_on_device(format, full, first, {"codes": codes, **others}, there):
            here = torch.empty(count)
            decoding.decode(format, full, first, count, parts, here)
            there.copy_(here)
        return there

    def _part(self, slot: int, name: str, view: memoryview) -> Tensor:
        """A part of a weight other than its codes, on the device; as long as the weight is the same it stays there."""
        known = self._parts.get((slot, name))
        if known is None or known[0] is not view:
            known = view, as_bytes(view).to(self._gpu.runtime.device)
            self._parts[slot, name] = known
        return known[1]

    def wait(self) -> Tally | None:
        self._queue.wait()
        elements, self._counted = self._counted, 0
        return counting.tally(elements, self._numbers) if elements and self._numbers is not None else None
