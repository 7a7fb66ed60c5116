"""The engine of every merge: tensors go through a processor tile by tile, and it does not know where to.

    read the same tile of every input → compute → hash → hand the result to `write`, or leave it where it was made

Threads take tensors in the order of the steps, each from an output file of its own while there are enough of them (a
file system lets one thread at a time write a file), and tiles of a tensor in order, so the disk sees a few sequential
streams. A thread reuses its own slots for all tiles: nothing is allocated on the way. On the CPU it has one; with
more of them it starts the next tiles before it ends the oldest. Threads that find no tensor left help with the
tiles of one under way. Hashes are the standard xxh3_128 of whole tensors, so the tiles of a tensor are hashed in
order, and a thread whose turn it is not yet waits. A thread ends its tiles in the order in which it claimed them, so
the oldest tile of all waits for no other. Tallies are added up in that order as well: what a run learns depends
neither on its threads nor on where an earlier run was interrupted.
"""

from __future__ import annotations

import contextvars
import errno
import os
import threading
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from ires_kernels.backends.call import Tally
from ires_kernels.backends.call import threads as kernel_threads
from ires_kernels.backends.fit import Fit
from ires_kernels.checkpoints.addresses import Changed
from ires_kernels.checkpoints.checkpoint import FileId, TensorRef
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.checkpoints.sources import Files, Source
from ires_kernels.dtypes import FLOATS
from ires_kernels.files import interrupts
from ires_kernels.files.journal import NO_THREAD
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Operand, Output, Step, by_output
from ires_kernels.streaming.outcome import FitTally, Outcome
from ires_kernels.streaming.pieces import Reader, reader, take
from ires_kernels.streaming.tiles import (
    ComputeError,
    Portion,
    Processors,
    ReadError,
    ReadOnly,
    Slot,
    on_cpu,
    packed,
    tiles,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ires_kernels.streaming.encoded import Coder, Scales

_MOST_THREADS = 1024  # whatever was asked for
_MAX_THREADS = 8
"""By default. On a machine of 16 cores with an H100, models in its page cache, 16 were slower than 8: `load` onto the
GPU ran at 11.8 and 16.6 GB/s, and `apply` to a new folder took longer as well."""

Write = Callable[[Step, int, memoryview, Tally], None]
"""Takes a step, a byte offset in its output, the result's bytes from there on, and the tally of the step up to their
end. Called by several threads. With a tensor's last bytes the outcome has what there is to know of it."""
Fitted = Callable[[Step, int, Sequence[memoryview]], Fit]
"""Takes a step that adds a difference, how many elements there are, and its operands as numbers in memory."""
Progress = Callable[[int, int], None]
"""Takes bytes done and bytes to do, read and written together. Called by the thread that started the work."""

Placed = Callable[[str, int, int], None]
"""Takes a tensor that is filled, by name, and bytes of it that have their results now: where they begin, how many."""


class Done(NamedTuple):
    """The beginning of a tensor that an earlier run has written over its target: it is hashed, and left as it is."""

    stop: int
    """The byte of the tensor that follows it."""
    tallies: Mapping[str, Tally]
    """What was counted up to there, by the labels of the steps."""


def default_threads() -> int:
    """One for each CPU that this process may use, up to a limit."""
    return min(len(os.sched_getaffinity(0)), _MAX_THREADS)


def run(
    steps: Sequence[Step],
    file_ids: Mapping[Path, FileId],
    rules: Rules,
    write: Write,
    *,
    hashed: Container[str] | None = None,
    processors: Processors = on_cpu,
    counted: bool = True,
    fit: Fitted | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    in_order: bool = False,
    stops: Container[tuple[str, int]] | None = None,
    done: Mapping[str, Done] | None = None,
    scales: Callable[[QuantizedRef], Scales] | None = None,
    written: Container[Path] = (),
    outcome: Outcome | None = None,
    failed: Callable[[], None] | None = None,
) -> Outcome:
    """Carry out `steps`, whose inputs lie in files that must still be those of `file_ids`; `write` gets the results.

    hashed   the roles whose inputs are hashed; None: all of them. Results always are
    counted  whether the outcome has tallies
    fit      what is asked besides of each tile that a difference is added to; the tallies of these steps have it
    in_order claims the tiles strictly in the order of the steps, so that `write` may wait for those before its own
    stops    (tensor name, byte in it) where an interrupt may end the run. With them the tiles are claimed in order as
             well, and all tiles before the stop are written
    done     what is written already, by the tensor's name: "add" and "add_difference" overwrite their first operand
    scales   gives those of weights that get new codes, where they are known; None: they are found on the way
    written  input files that `write` may write to before they are read
    outcome  to be completed and returned; None: a new one
    failed   called when something goes wrong, for a `write` that waits

    A signal that raises ends the run at the next tile, or stop; more of them do not end it sooner. Where the system
    starts no more threads, those that there are do all of it, and at the least the calling one does.

    Raises what went wrong first, with tensor and file in it, when all threads have stopped: CheckpointError for a file
    that changed, OSError for one that cannot be read or written, ComputeError for a processor that failed.
    """
    asked = _Asked(steps, file_ids, rules, write, stops=stops, done=done or {}, scales=scales, written=written)
    told = _Told(Outcome() if outcome is None else outcome, progress, failed)
    return _Engine(asked, _How(processors, threads, hashed, counted, in_order or stops is not None, fit), told).run()


def check_threads() -> None:
    """Raise OSError where the system starts no more threads, for who cannot do without another one."""
    try:
        thread = threading.Thread(target=_nothing)
        thread.start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, NO_THREAD) from None
    thread.join()


def fill(
    tensors: Mapping[str, Tensor],
    steps: Sequence[Step],
    file_ids: Mapping[Path, FileId],
    rules: Rules,
    *,
    hashed: Container[str],
    processors: Processors = on_cpu,
    threads: int | None = None,
    progress: Progress | None = None,
    memory: Mapping[Path, Source] | None = None,
    placed: Placed | None = None,
) -> Outcome:
    """`run` into contiguous tensors by name, on the processor's device. Inputs of the roles `hashed` are hashed.

    memory  of models that are in no files, by their paths
    placed  told of each tile when its results are there
    """
    import torch

    flat = {name: tensor.reshape(-1) for name, tensor in tensors.items()}
    into = {name: (elements, elements.view(torch.uint8)) for name, elements in flat.items()}
    asked = _Asked(steps, file_ids, rules, _nothing, into, memory=memory or {}, placed=placed)
    return _Engine(asked, _How(processors, threads, hashed, counted=False), _Told(Outcome(), progress)).run()


def look(
    steps: Sequence[Step],
    file_ids: Mapping[Path, FileId],
    processors: Processors,
    *,
    hashed: Container[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
    outcome: Outcome | None = None,
) -> int:
    """Show the operands of `steps` to a processor that makes nothing of them; returns bytes read. Errors as of `run`.

    Nothing is written: what the processor learns is its own. The outcome gets the hashes of inputs of the roles
    `hashed`.
    """
    asked = _Asked(steps, file_ids, Rules(), _nothing, kept=False)
    told = _Told(Outcome() if outcome is None else outcome, progress)
    return _Engine(asked, _How(processors, threads, hashed, counted=False), told).run().bytes_read


def hashes(
    refs: Mapping[str, TensorRef | Operand],
    file_ids: Mapping[Path, FileId],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """xxh3_128 of the bytes of tensors and operands, under the names that they have here. Errors as of `run`."""
    steps = []
    for name, ref in refs.items():
        operand = _as_stored(ref if isinstance(ref, Operand) else Operand("input", (ref,)))
        output = Output(name, operand.dtype, (operand.count,), f"{operand.paths[0]}")
        steps.append(Step(output, "copy", (operand,)))
    return run(steps, file_ids, Rules(), _nothing, processors=ReadOnly, threads=threads, progress=progress).outputs


def _as_stored(operand: Operand) -> Operand:
    """The bytes that the digest of an operand is of, as an operand that is nothing but bytes."""
    if not operand.is_decoded:
        return operand
    from ires_kernels.streaming.decoded import stored

    return Operand(operand.role, tuple(each for ref in operand.refs for each in stored(ref)))


def _nothing(*_: object) -> None:
    """What is written of results that stay where they were made, or are only looked at."""


class _Part:
    """What one step makes of a tensor that is under way."""

    def __init__(
        self,
        step: Step,
        readers: Sequence[Reader],
        tile: int,
        out: tuple[Tensor, Tensor] | None,
        hashed: Container[str] | None,
        tally: Tally,
        stays: bool,
        coder: Coder | None,
        fitted: bool,
    ) -> None:
        self.step = step
        self.readers = readers
        self.coder = coder
        self.copied = step.op == "copy" or step.is_scale
        self.is_run = step.box is None or step.box.is_run
        self.length = _length(step)
        self.tile = tile
        self.tiles = -(-self.length // self.tile)
        self.overwrites = step.op in ("add", "add_difference") and not step.is_from_zero
        self.width = 1 if self.copied or coder else FLOATS[step.dtype]
        self.out: Tensor | None = None
        if out is not None:
            elements, in_bytes = out
            self.out = in_bytes[step.start :] if self.copied else elements[step.first :]
        self.wanted = _wanted(step, hashed)
        self.hashers: list[xxhash.xxh3_128 | None] = []  # of what is read, where it is not the result
        self.tally = tally
        self.stays = stays
        self.fitted = fitted


class _Tensor:
    """An output under way, shared by the threads that work on its tiles."""

    def __init__(self, output: Output, parts: Sequence[_Part], done: int, kept: bool, loaded: bool) -> None:
        self.output = output
        self.parts = parts
        self.done = done  # its first bytes, which an earlier run has written
        self.tiles = sum(part.tiles for part in parts)
        # The bytes of a whole copy are hashed once, as those of the result.
        self.is_copy = len(parts) == 1 and parts[0].copied
        self.is_written = all(part.out is None for part in parts)
        self.is_loaded = loaded  # the processor reads it itself
        self.hasher = xxhash.xxh3_128() if self.is_written and kept else None
        apart = not (self.is_copy and self.is_written)
        for part in parts:
            part.hashers = [xxhash.xxh3_128() if apart and wanted else None for wanted in part.wanted]
        self._ends = list(accumulate(part.tiles for part in parts))
        self.claimed = 0
        self.turn = 0  # the tile to hash next
        self.turned = threading.Condition()

    def at(self, index: int) -> tuple[_Part, int]:
        """The part that a tile belongs to, and where it begins in that."""
        number = bisect_right(self._ends, index)
        part = self.parts[number]
        return part, (index - self._ends[number] + part.tiles) * part.tile

    def place(self, index: int) -> int:
        """The byte of the output where a tile begins."""
        part, first = self.at(index)
        return part.step.start + first * part.width

    def portion(self, index: int) -> Portion:
        """A tile of a tensor that stays in memory, or is only looked at."""
        part, first = self.at(index)
        step, count = part.step, min(part.tile, part.length - first)
        out = None if part.out is None else part.out[first : first + count]
        reads = [reads for reader in part.readers if (reads := reader.reads(first, count)) is not None]
        seen = [hasher is not None for hasher in part.hashers]
        return Portion(step, step.number(step.first + first), count, out, reads, seen)


class _Tile(NamedTuple):
    """A tile that was started and is not ended."""

    tensor: _Tensor
    number: int
    part: _Part
    first: int
    """Where it begins in the part: bytes of a copy, else elements."""
    slot: Slot
    seen: Sequence[Sequence[memoryview]]
    """By operand, what was read of it; to be hashed."""
    result: memoryview | None
    """What is made of that, and hashed as well, unless it stays in memory."""
    at: int
    """The byte of the output where it begins."""
    read: int
    written: int
    """Bytes, those of results that stay in memory among them."""
    fit: Fit | None = None


@dataclass(frozen=True)
class _Asked:
    """What is to be done, and where results go."""

    steps: Sequence[Step]
    file_ids: Mapping[Path, FileId]
    rules: Rules
    write: Write
    into: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Tensors that are filled, by name: their elements and their bytes. The results of all others are written."""
    stops: Container[tuple[str, int]] | None = None
    done: Mapping[str, Done] = field(default_factory=dict)
    memory: Mapping[Path, Source] = field(default_factory=dict)
    placed: Placed | None = None
    scales: Callable[[QuantizedRef], Scales] | None = None
    written: Container[Path] = ()
    kept: bool = True
    """False: there are no results."""


@dataclass(frozen=True)
class _How:
    """The options of a run."""

    processors: Processors
    threads: int | None
    hashed: Container[str] | None
    counted: bool
    in_order: bool = False
    fit: Fitted | None = None


@dataclass(frozen=True)
class _Told:
    """Who learns of it what, and when."""

    outcome: Outcome
    progress: Progress | None = None
    failed: Callable[[], None] | None = None


class _Engine:
    """One run: what its threads share."""

    def __init__(self, asked: _Asked, how: _How, told: _Told) -> None:
        self.asked = asked
        self.how = how
        self.told = told
        steps = asked.steps
        self.processor = how.processors(steps, asked.rules, how.counted)
        # With stops, windows begin and end where tiles do: those of copies have one size on all processors.
        copied = self.processor.copy if asked.stops is None else tiles.get().copied
        self.sizes = self.processor.tile, copied
        self.files = Files(asked.file_ids, _uses(steps), asked.memory, asked.written, lambda: _reads(steps))
        self.todo = sum((0 if self._stays(step) else step.nbytes) + step.read_bytes for step in steps)
        self.read: list[int] = []  # bytes by thread, so that counting needs no lock
        self.written: list[int] = []
        self.lock = threading.Lock()  # for the claims, and all that follows
        self.waiting: dict[str, deque[tuple[Output, list[Step]]]] = {}  # by output file
        for output, parts in by_output(steps).items():
            queue = self.waiting.setdefault(output.file, deque())
            # Without bytes nobody writes its last ones: it is over before the file can be.
            queue.append((output, parts)) if output.numel else queue.appendleft((output, parts))
        self.coders: dict[QuantizedRef, Coder] = {}
        self.uncoded = Counter(step.output.encoding.weight for step in steps if step.output.encoding)
        self.active: dict[_Tensor, None] = {}
        self.stopped = False
        self.ending = self.ended = False  # an interrupt waits for the next of `stops`; has come to it
        self.error: BaseException | None = None

    def run(self) -> Outcome:
        outcome = self.told.outcome
        with interrupts.held():
            self._run(min(self.how.threads or default_threads(), _MOST_THREADS))
            if self.error is not None:
                raise self.error
        outcome.bytes_read += sum(self.read)
        outcome.bytes_written += sum(self.written)
        return outcome

    def _run(self, threads: int) -> None:
        """Return when no thread works any more: they write to files that are closed then."""

        def look() -> None:
            interrupts.check()
            if self.told.progress:
                self.told.progress(sum(self.read) + sum(self.written), self.todo)

        self.read, self.written = [0] * threads, [0] * threads
        # Not Thread.join: interrupted, it takes a running thread for an ended one (CPython 3.11).
        ended: list[threading.Event] = []
        for number in range(threads):
            event = threading.Event()
            try:
                threading.Thread(target=self._work, args=(number, event), name=f"ires-{number}").start()
            except RuntimeError:  # the system starts no more of them
                break
            ended.append(event)
        if not ended:
            contextvars.copy_context().run(self._take_tiles, 0, look)
        looking = True
        for event in ended:
            while not event.wait(0.1 if looking else None):
                looking = self._go_on(look)
        if looking:
            self._go_on(look)
        self.files.close()

    def _go_on(self, look: Callable[[], None]) -> bool:
        """Show the progress; False after an error there, or an interrupt: the run ends at the next tile or stop."""
        try:
            look()
        except BaseException as error:
            if self.asked.stops is None:
                self._stop(error)
            else:
                with self.lock:
                    self.error = self.error or error
                    self.ending = True
            return False
        return True

    def _next_file(self) -> str:
        """The output file that the fewest threads are writing, of those that have tensors to start."""
        writers = Counter(tensor.output.file for tensor in self.active if not self.how.in_order)
        return min(self.waiting, key=writers.__getitem__)

    def _start(self) -> _Tensor | None:
        """The next tensor to work on; called under the lock."""
        while self.waiting:
            file = self._next_file()
            output, steps = self.waiting[file].popleft()
            if not self.waiting[file]:
                del self.waiting[file]
            out, done = self.asked.into.get(output.name), self.asked.done.get(output.name)
            readers = [self._readers(step) for step in steps]
            loaded = [self._loaded(step, each, out) for step, each in zip(steps, readers, strict=True)]
            parts = []
            for step, each, size in zip(steps, readers, loaded, strict=True):
                fitted = self.how.fit is not None and step.op == "add_difference" and not step.is_scale
                known = done.tallies.get(step.label) if done else None
                tally = replace(known) if known is not None else FitTally() if fitted else Tally()
                tile = size if all(loaded) else self._tile(step)
                more = self.how.hashed, tally, self._stays(step), self._coder(step), fitted
                parts.append(_Part(step, each, tile, out, *more))
            tensor = _Tensor(output, parts, done.stop if done else 0, self.asked.kept, all(loaded))
            self.active[tensor] = None
            if tensor.tiles:
                return tensor
            self._finish(tensor)
        return None

    def _stays(self, step: Step) -> bool:
        """Whether nothing is written: no results are kept, or it would write over the target what that has."""
        return not self.asked.kept or (self.asked.stops is not None and step.is_own)

    def _tile(self, step: Step) -> int:
        """Elements of a step that is read here, at a time; bytes of a copy."""
        return max(1, _length(step)) if step.is_scale else self.sizes[step.op == "copy"]

    def _loaded(self, step: Step, readers: Sequence[Reader], out: tuple[Tensor, Tensor] | None) -> int:
        """The same of a step that the processor reads itself; 0 of others.

        Its result stays there, its operands are in files or in memory as they are, and its random bits follow each
        other.
        """
        if (self.asked.kept and out is None) or not (step.box is None or step.box.is_run):
            return 0
        reads = [reads for reader in readers if (reads := reader.reads(0, 0)) is not None]
        if len(reads) < len(readers):
            return 0
        return self.processor.loads(step, None if out is None else out[0], reads, _wanted(step, self.how.hashed))

    def _readers(self, step: Step) -> list[Reader]:
        try:
            return [self._reader(step, operand) for operand in step.operands]
        except (OSError, TypeError) as error:
            raise _with_tensor(error, step) from error

    def _reader(self, step: Step, operand: Operand) -> Reader:
        """Opens the files of an operand, for as long as its tensor is under way."""
        sources = {path: self.files.hold(path) for path in operand.paths}
        return reader(operand, sources, 1 if step.op == "copy" else FLOATS[operand.dtype])

    def _coder(self, step: Step) -> Coder | None:
        """What knows the scales of the weight that a step encodes; one for all steps that need them."""
        if step.output.encoding is None:
            return None
        from ires_kernels.streaming.encoded import Coder

        weight = step.output.encoding.weight
        return self.coders.setdefault(weight, Coder(weight, self.asked.scales))

    def _claim(self, mine: _Tensor | None) -> list[tuple[_Tensor, int]]:
        """The next tile of the tensor `mine`, else of a new one, else of the first that has one left.

        A small tensor that is loaded comes with those that follow and share a tile with it; nothing: all is claimed.
        """
        with self.lock:
            if self.stopped or self.ended:
                return []
            if self.how.in_order:
                mine = self._unclaimed() or self._start()
            elif mine is None or mine.claimed == mine.tiles:
                mine = self._start() or self._unclaimed()
            if mine is None:
                return []
            if self.ending and self.asked.stops is not None:
                self.ended = (mine.output.name, mine.place(mine.claimed)) in self.asked.stops
                if self.ended:
                    return []
            mine.claimed += 1
            return [(mine, mine.claimed - 1), *((other, 0) for other in self._joining(mine))]

    def _joining(self, small: _Tensor) -> Iterator[_Tensor]:
        """Start the tensors that follow for as long as they go into a tile with `small`; called under the lock."""
        room, (part, *_) = self.processor.room, small.parts
        if not room or small.tiles > 1 or not small.is_loaded:
            return
        room -= _packed(part.step)
        while self.waiting:
            _, (step, *more) = self.waiting[self._next_file()][0]
            room -= _packed(step)
            alike = (step.op, step.factors, step.number(0)) == (part.step.op, part.step.factors, part.step.number(0))
            if more or not alike or room < 0 or not 0 < _length(step) <= part.tile or self._is_made(step):
                return
            tensor = self._start()
            assert tensor is not None
            tensor.claimed = 1
            yield tensor

    def _is_made(self, step: Step) -> bool:
        """Whether an operand is made of codes, or is in no file here, so that the processor does not read it itself."""
        local = self.files.is_local
        return any(operand.is_decoded or not all(map(local, operand.paths)) for operand in step.operands)

    def _unclaimed(self) -> _Tensor | None:
        """The first tensor under way that has a tile left."""
        return next((tensor for tensor in self.active if tensor.claimed < tensor.tiles), None)

    def _work(self, worker: int, ended: threading.Event) -> None:
        """What one thread does."""
        try:
            self._take_tiles(worker)
        finally:
            ended.set()

    def _take_tiles(self, worker: int, look: Callable[[], None] | None = None) -> None:
        """What one thread does; `look` is for the one that has started the work, where it does all of it."""
        kernel_threads.set(1)
        slots: Sequence[Slot] = ()
        busy: deque[list[_Tile]] = deque()
        tensor = at = None
        try:
            slots = self.processor.slots()
            for slot in cycle(slots):
                at = None  # a tensor that cannot be started puts its own name into the error
                if look is not None and not self._go_on(look):
                    look = None
                claims = self._claim(tensor)
                if not claims:
                    break
                tensor, index = claims[0]
                at = tensor.at(index)[0].step
                busy.append(self._begin(claims, slot))
                if len(busy) == len(slots):
                    for tile in busy.popleft():
                        at = tile.part.step
                        self._end(tile, worker)
            for tile in chain.from_iterable(busy):
                at = tile.part.step
                self._end(tile, worker)
        except BaseException as error:
            self._stop(_with_tensor(error, at))
            self._abandon(slots)
        finally:
            self.processor.release(slots)

    def _abandon(self, slots: Iterable[Slot]) -> None:
        """After an error: nothing may be under way in memory that is about to be freed."""
        for slot in slots:
            try:
                slot.wait()
            except RuntimeError as error:  # a device that failed once fails again; the first error is the one to raise
                self._stop(error)

    def _begin(self, claims: Sequence[tuple[_Tensor, int]], slot: Slot) -> list[_Tile]:
        """Read the claimed tiles and start to compute them, as one load where the slot can."""
        if not claims[0][0].is_loaded:
            return [self._begin_tile(*claim, slot) for claim in claims]
        assert slot.load is not None
        portions = [tensor.portion(index) for tensor, index in claims]
        begun = []
        for (tensor, index), portion, views in zip(claims, portions, slot.load(portions), strict=True):
            part, first = tensor.at(index)
            read = sum(piece.nbytes for pieces in portion.reads for piece in pieces)
            written = 0 if part.stays else portion.size * part.width
            seen, at = [[view] for view in views], tensor.place(index)
            begun.append(_Tile(tensor, index, part, first, slot, seen, None, at, read, written))
        return begun

    def _begin_tile(self, tensor: _Tensor, index: int, slot: Slot) -> _Tile:
        """Read a tile and start to compute it."""
        part, first = tensor.at(index)
        step = part.step
        count = min(part.tile, part.length - first)
        coding = None
        if part.coder is not None:
            scales = part.coder.scales(step, part.readers, slot, self.sizes[False], lambda: self.stopped)
            if step.is_scale:
                return self._scales_tile(tensor, index, slot, scales.stored)
        codes = slot.decodes and part.is_run and not part.fitted
        seen, coded = take(part.readers, slot.buffers, first, count, codes=codes)
        read, written = sum(len(view) for views in seen for view in views), count * part.width
        at = tensor.place(index)
        written = 0 if part.stays or at < tensor.done else written
        result = None
        if part.coder is not None:
            coding = part.coder.coding(seen[0][-1])
        if part.out is not None:
            slot.start(step, step.first + first, count, part.out[first : first + count], coded, coding)
        elif part.copied or (at < tensor.done and part.overwrites):
            result = seen[0][-1]  # where it is written already, what the target held is gone: this is the result
        else:
            slot.start(step, step.first + first, count, None, coded, coding)
            result = slot.buffers[-1][: count * part.width]
        fit = self.how.fit(step, count, slot.buffers) if self.how.fit and part.fitted and at >= tensor.done else None
        return _Tile(tensor, index, part, first, slot, seen, result, at, read, written, fit)

    def _scales_tile(self, tensor: _Tensor, index: int, slot: Slot, stored: memoryview) -> _Tile:
        """All scales of a weight, which are there."""
        part, first = tensor.at(index)
        if part.out is not None:
            import torch

            part.out.copy_(torch.frombuffer(bytearray(stored), dtype=torch.uint8))
        result = None if part.out is not None else stored
        return _Tile(
            tensor, index, part, first, slot, [() for _ in part.readers], result, tensor.place(index), 0, len(stored)
        )

    def _end(self, tile: _Tile, worker: int) -> None:
        """Take a tile the rest of the way."""
        counted = tile.slot.wait()
        if self.asked.placed is not None:
            self.asked.placed(tile.tensor.output.name, tile.at, tile.written)
        tally = self._in_turn(tile, counted if tile.at >= tile.tensor.done else None)
        if tally is None:
            return
        if tile.result is not None and tile.at >= tile.tensor.done:
            self.asked.write(tile.part.step, tile.at, tile.result, tally)
        self.read[worker] += tile.read
        self.written[worker] += tile.written

    def _in_turn(self, tile: _Tile, counted: Tally | None) -> Tally | None:
        """Hash and count a tile after the ones before it; the tally of its step so far, None when the run stopped."""
        tensor, part = tile.tensor, tile.part
        with tensor.turned:
            while tensor.turn != tile.number:
                if self.stopped:
                    return None
                tensor.turned.wait()
        for hasher, views in zip(part.hashers, tile.seen, strict=True):
            if hasher is not None:
                for view in views:
                    hasher.update(view)
        if tensor.hasher is not None and tile.result is not None:
            tensor.hasher.update(tile.result)
        total = replace(part.tally)  # a new one, as the writers of earlier tiles look at theirs
        if counted is not None:
            total += counted
        if tile.fit is not None:
            total += FitTally(fit=tile.fit)
        part.tally = total
        if self.how.counted and not part.copied and tile.first + part.tile >= part.length:
            self.told.outcome.tallies[part.step.label] = total
        with tensor.turned:
            tensor.turn += 1
            tensor.turned.notify_all()
        if tile.number == tensor.tiles - 1:
            with self.lock:
                self._finish(tensor)
        return total

    def _finish(self, tensor: _Tensor) -> None:
        """Every tile was read and hashed; called under the lock."""
        if tensor.hasher is not None:
            self.told.outcome.outputs[tensor.output.name] = tensor.hasher.hexdigest()
        for part in tensor.parts:
            step = part.step
            for operand, wanted, hasher in zip(step.operands, part.wanted, part.hashers, strict=True):
                if wanted:
                    known = hasher or tensor.hasher
                    assert known is not None
                    self.told.outcome.inputs.setdefault(operand.role, {})[operand.key] = known.hexdigest()
                for path in operand.paths:
                    self.files.release(path)
            if self.how.counted and not part.copied and not part.tiles:
                self.told.outcome.tallies[step.label] = part.tally
            if part.coder is not None and part.coder.found is not None and not step.is_scale:
                self.told.outcome.scales[step.label] = (part.coder.found.blocks, part.coder.found.new)
            if step.output.encoding is not None:
                weight = step.output.encoding.weight
                self.uncoded[weight] -= 1
                if not self.uncoded[weight]:
                    self.coders.pop(weight, None)
        del self.active[tensor]

    def _stop(self, error: BaseException) -> None:
        """Let all threads end; the first error stays, and if that was an interrupt, the next one as its cause."""
        with self.lock:
            if self.error is None:
                self.error = error
            elif self.ending and not self.stopped:
                self.error.__cause__ = error
            self.stopped = True
            if self.told.failed is not None:
                self.told.failed()
            self.files.interrupt()
            active = list(self.active)
        for tensor in active:
            with tensor.turned:
                tensor.turned.notify_all()


def _wanted(step: Step, hashed: Container[str] | None) -> list[bool]:
    """Of which operands the hash is wanted. What scales are made of is read for the codes as well."""
    return [not step.is_scale and (hashed is None or operand.role in hashed) for operand in step.operands]


def _length(step: Step) -> int:
    """Of a copy and of scales the bytes, of all else the elements."""
    return step.nbytes if step.op == "copy" or step.is_scale else step.count


def _packed(step: Step) -> int:
    """Bytes that all operands take in a tile."""
    return packed(operand.nbytes for operand in step.operands)


def _uses(steps: Iterable[Step]) -> Iterator[Path]:
    """The files of all operands, as often as they are opened for one."""
    return (path for step in steps for operand in step.operands for path in operand.paths)


def _reads(steps: Iterable[Step]) -> Iterator[tuple[Path, int, int]]:
    """What is read of the files of all operands, (path, offset, bytes), in the order of the steps."""
    for step in steps:
        for operand in step.operands:
            found = []
            for ref in operand.refs:
                if isinstance(ref, QuantizedRef):
                    begin, size = ref.span(0, ref.numel)
                    found += [(part.path, part.offset, part.nbytes) for _, part in ref.parts[1:]]
                    found.append((ref.path, ref.codes.offset + begin, size))
                else:
                    found.append((ref.path, ref.offset, ref.nbytes))
            yield from sorted(found)


def _with_tensor(error: BaseException, step: Step | None) -> BaseException:
    """The error with the tensor in it that was worked on."""
    if isinstance(error, ReadError):
        return _with_tensor(error.reason, error.step)
    if step is None or isinstance(error, (CheckpointError, Changed)) or not isinstance(error, Exception):
        return error
    if isinstance(error, OSError):
        new: Exception = OSError(error.errno, f"{error.strerror} (tensor {step.name!r})", error.filename)
    else:
        kind = ComputeError if isinstance(error, RuntimeError) else RuntimeError
        new = kind(f"tensor {step.name!r} of {step.operands[0].paths[0]}: {error}")
    new.__cause__ = error
    return new
