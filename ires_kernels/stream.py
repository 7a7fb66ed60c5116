"""The engine of every merge: tensors go through the kernels window by window, and it does not know where to.

    read the same window of every input → compute → hash → hand the result to `write`

Threads take tensors in the order of the steps, each from an output file of its own while there are enough of them (a
file system lets one thread at a time write a file), and windows of a tensor in order, so the disk sees a few sequential
streams. A thread reuses its own buffers for all windows, which stay in its cache from the read to the write: nothing is
allocated on the way. Threads that find no tensor left help with the windows of one under way. Hashes are the standard
xxh3_128 of whole tensors, so the windows of a tensor are hashed in order, and a thread whose turn it is not yet waits.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from ires_kernels import ops
from ires_kernels.backends import Tally
from ires_kernels.backends import threads as kernel_threads
from ires_kernels.checkpoint import FileId
from ires_kernels.header import CheckpointError
from ires_kernels.names import FLOATS
from ires_kernels.reader import Files, read_into
from ires_kernels.rules import Rules
from ires_kernels.steps import Step

WINDOW = 1 << 19
"""Elements that a thread works on at a time. Results do not depend on it."""
_COPY = 1 << 19  # bytes at a time of a tensor that is copied
_MAX_THREADS = 16  # by default: beyond that the disk or the page cache is the limit

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

Write = Callable[[Step, int, memoryview], None]
"""Takes a step, a byte offset in its tensor, and the result's bytes from there on. Called by several threads."""
Progress = Callable[[int, int], None]
"""Takes bytes done and bytes to do, read and written together. Called by the thread that started the work."""


@dataclass
class Outcome:
    """What a run learnt about the bytes that went by."""

    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    """role → tensor name → xxh3_128 as hex."""
    outputs: dict[str, str] = field(default_factory=dict)
    """tensor name → xxh3_128 as hex."""
    merged: dict[tuple[float, ...], Tally] = field(default_factory=dict)
    """By the factors that were asked for."""
    converted: Tally = field(default_factory=Tally)
    """Of the tensors that only changed their dtype; of its counts those of NaN, inf and overflow mean something."""


def default_threads() -> int:
    """One for each CPU that this process may use, up to a limit."""
    return min(len(os.sched_getaffinity(0)), _MAX_THREADS)


def run(
    steps: Sequence[Step],
    file_ids: Mapping[Path, FileId],
    rules: Rules,
    write: Write,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Carry out `steps`, whose inputs lie in files that must still be those of `file_ids`.

    Raises what went wrong first, with tensor and file in it, when all threads have stopped: CheckpointError for a file
    that changed, OSError for one that cannot be read or written.
    """
    return _Engine(steps, file_ids, rules, write).run(threads or default_threads(), progress)


class _Buffers:
    """The memory of one thread: a buffer for each input and one, the last, for the result; and the tensors on them."""

    def __init__(self, sizes: Sequence[int]) -> None:
        memory = memoryview(mmap.mmap(-1, sum(sizes)))
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.bytes = [memory[end - length : end] for end, length in zip(ends, sizes, strict=True)]
        self._tensors: dict[tuple[int, str], Tensor] = {}

    def tensor(self, slot: int, dtype: str, count: int) -> Tensor:
        """The first elements of a buffer as a tensor."""
        whole = self._tensors.get((slot, dtype))
        if whole is None:
            whole = torch.frombuffer(self.bytes[slot], dtype=TORCH_DTYPES[dtype], count=WINDOW)
            self._tensors[slot, dtype] = whole
        return whole if count == WINDOW else whole[:count]


class _Tensor:
    """A step under way, shared by the threads that work on its windows."""

    def __init__(self, step: Step, fds: Iterable[int]) -> None:
        self.step = step
        self.fds = tuple(fds)
        self.copied = step.op == "copy"
        # Copies are counted in bytes, all else in elements.
        self.length = step.nbytes if self.copied else step.inputs[0].numel
        self.window = _COPY if self.copied else WINDOW
        self.windows = -(-self.length // self.window)
        self.widths = [1] if self.copied else [FLOATS[ref.dtype] for ref in step.inputs]
        self.width = 1 if self.copied else FLOATS[step.dtype]
        self.hashers = [xxhash.xxh3_128() for _ in range(len(self.fds) + (not self.copied))]
        self.claimed = 0
        self.turn = 0  # the window to hash next
        self.turned = threading.Condition()


class _Engine:
    """One run: what its threads share."""

    def __init__(self, steps: Sequence[Step], file_ids: Mapping[Path, FileId], rules: Rules, write: Write) -> None:
        self.rules = rules
        self.write = write
        self.outcome = Outcome()
        self.files = Files(file_ids, (ref.path for step in steps for ref in step.inputs))
        self.sizes = _buffer_sizes(steps)
        self.zeros = {dtype: torch.zeros(WINDOW, dtype=TORCH_DTYPES[dtype]) for dtype in _converted_dtypes(steps)}
        self.todo = sum(step.nbytes + sum(ref.nbytes for ref in step.inputs) for step in steps)
        self.done: list[int] = []  # by thread, so that counting needs no lock
        self.lock = threading.Lock()  # for the claims, and all that follows
        self.waiting: dict[str, deque[Step]] = {}  # by output file
        for step in steps:
            self.waiting.setdefault(step.file, deque()).append(step)
        self.active: dict[_Tensor, None] = {}
        self.stopped = False
        self.error: BaseException | None = None

    def run(self, threads: int, progress: Progress | None) -> Outcome:
        self.done = [0] * threads
        workers = [threading.Thread(target=self._work, args=(i,), name=f"ires-{i}") for i in range(threads)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.1 if progress else None)
                    if progress:
                        progress(sum(self.done), self.todo)
            if progress:
                progress(sum(self.done), self.todo)
        except BaseException as error:  # most of all an interrupt
            self._stop(error)
        for worker in workers:
            while worker.is_alive():
                with suppress(KeyboardInterrupt):  # they write to files that will be closed, and stop after a window
                    worker.join()
        self.files.close()
        if self.error is not None:
            raise self.error
        return self.outcome

    def _start(self) -> _Tensor | None:
        """The next tensor of the output file that the fewest threads are writing; called under the lock."""
        while self.waiting:
            writers = Counter(tensor.step.file for tensor in self.active)
            file = min(self.waiting, key=writers.__getitem__)
            step = self.waiting[file].popleft()
            if not self.waiting[file]:
                del self.waiting[file]
            tensor = _Tensor(step, [self.files.open(ref.path) for ref in step.inputs])
            self.active[tensor] = None
            if tensor.windows:
                return tensor
            self._finish(tensor)
        return None

    def _claim(self, mine: _Tensor | None) -> tuple[_Tensor, int] | None:
        """The next window of the tensor `mine`, else of a new one, else of the first that has one left."""
        with self.lock:
            if self.stopped:
                return None
            if mine is None or mine.claimed == mine.windows:
                mine = self._start() or next((t for t in self.active if t.claimed < t.windows), None)
                if mine is None:
                    return None
            mine.claimed += 1
            return mine, mine.claimed - 1

    def _work(self, worker: int) -> None:
        """What one thread does."""
        kernel_threads.set(1)
        tallies: dict[tuple[float, ...] | None, Tally] = {}
        tensor = None
        try:
            buffers = _Buffers(self.sizes)
            while claim := self._claim(tensor):
                tensor, index = claim
                self.done[worker] += self._window(tensor, index, buffers, tallies)
        except BaseException as error:
            self._stop(_with_tensor(error, tensor.step if tensor else None))
        with self.lock:
            for factors, tally in tallies.items():
                if factors is None:
                    self.outcome.converted += tally
                else:
                    self.outcome.merged.setdefault(factors, Tally()).__iadd__(tally)

    def _window(
        self, tensor: _Tensor, index: int, buffers: _Buffers, tallies: dict[tuple[float, ...] | None, Tally]
    ) -> int:
        """Take one window all the way; returns the bytes read and written."""
        step = tensor.step
        first = index * tensor.window
        count = min(tensor.window, tensor.length - first)
        views = []
        for slot, (fd, ref, width) in enumerate(zip(tensor.fds, step.inputs, tensor.widths, strict=True)):
            view = buffers.bytes[slot][: count * width]
            read_into(fd, view, ref.offset + first * width, ref.path)
            views.append(view)
        if not tensor.copied:
            self._compute(step, first, count, buffers, tallies)
            views.append(buffers.bytes[-1][: count * tensor.width])
        if not self._in_turn(tensor, index, views):
            return 0
        self.write(step, first * tensor.width, views[-1])
        return sum(map(len, views)) + (len(views[0]) if tensor.copied else 0)

    def _compute(
        self,
        step: Step,
        first: int,
        count: int,
        buffers: _Buffers,
        tallies: dict[tuple[float, ...] | None, Tally],
    ) -> None:
        operands = [buffers.tensor(slot, ref.dtype, count) for slot, ref in enumerate(step.inputs)]
        options: dict[str, Any] = {
            "out": buffers.tensor(-1, step.dtype, count),
            "rounding": self.rules.rounding,
            "seed": self.rules.seed,
            "stream": step.stream,
            "offset": first,
        }
        key = None if step.op == "convert" else step.factors
        tally = tallies.get(key)
        if tally is None:
            tally = tallies[key] = Tally()
        t, *others = operands
        if step.op == "add_difference":
            ops.add_difference(t, others[0], others[1], step.factors[0], tally=tally, **options)
        elif step.op == "add":
            ops.add(t, others, step.factors, tally=tally, **options)
        elif step.op == "subtract":
            ops.subtract(t, others[0], tally=tally, **options)
        else:  # minus 0 leaves every value as it is, -0 as well, and counts what the new dtype makes infinite
            ops.subtract(t, self.zeros[step.inputs[0].dtype][:count], tally=tally, **options)

    def _in_turn(self, tensor: _Tensor, index: int, views: list[memoryview]) -> bool:
        """Hash a window after the ones before it; False when the run has stopped."""
        with tensor.turned:
            while tensor.turn != index:
                if self.stopped:
                    return False
                tensor.turned.wait()
        for hasher, view in zip(tensor.hashers, views, strict=True):
            hasher.update(view)
        with tensor.turned:
            tensor.turn += 1
            tensor.turned.notify_all()
        if index == tensor.windows - 1:
            with self.lock:
                self._finish(tensor)
        return True

    def _finish(self, tensor: _Tensor) -> None:
        """Every window was read and hashed; called under the lock."""
        step = tensor.step
        digests = [hasher.hexdigest() for hasher in tensor.hashers]
        self.outcome.outputs[step.name] = digests[-1]
        for role, ref, digest in zip(step.roles, step.inputs, digests, strict=False):
            self.outcome.inputs.setdefault(role, {})[ref.name] = digest
            self.files.release(ref.path)
        del self.active[tensor]

    def _stop(self, error: BaseException) -> None:
        """Let all threads end; the first error stays."""
        with self.lock:
            self.error = self.error or error
            self.stopped = True
            active = list(self.active)
        for tensor in active:
            with tensor.turned:
                tensor.turned.notify_all()


def _buffer_sizes(steps: Iterable[Step]) -> list[int]:
    """Bytes that a thread needs for each input, and last for the result."""
    inputs, result = [_COPY], 0
    for step in steps:
        if step.op != "copy":
            widths = [FLOATS[ref.dtype] * WINDOW for ref in step.inputs]
            inputs = [max(pair) for pair in zip_longest(inputs, widths, fillvalue=0)]
            result = max(result, FLOATS[step.dtype] * WINDOW)
    return [*inputs, result]


def _converted_dtypes(steps: Iterable[Step]) -> set[str]:
    return {step.inputs[0].dtype for step in steps if step.op == "convert"}


def _with_tensor(error: BaseException, step: Step | None) -> BaseException:
    """The error with the tensor in it that was worked on."""
    if step is None or isinstance(error, CheckpointError) or not isinstance(error, Exception):
        return error
    if isinstance(error, OSError):
        new: Exception = OSError(error.errno, f"{error.strerror} (tensor {step.name!r})", error.filename)
    else:
        new = RuntimeError(f"tensor {step.name!r} of {step.inputs[0].path}: {error}")
    new.__cause__ = error
    return new
