"""Which tile is next: the tensors that wait, those under way, and the files that are open for them."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ires_kernels.backends.call import Tally
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.checkpoints.sources import Files
from ires_kernels.dtypes import FLOATS
from ires_kernels.planning.steps import Operand, Output, Step, by_output
from ires_kernels.streaming.asked import Asked, How
from ires_kernels.streaming.failures import with_tensor
from ires_kernels.streaming.outcome import FitTally
from ires_kernels.streaming.pieces import Reader, reader
from ires_kernels.streaming.tiles import Processor, packed, tiles
from ires_kernels.streaming.under_way import Part, UnderWay, length, wanted

if TYPE_CHECKING:
    from torch import Tensor

    from ires_kernels.streaming.encoded import Coder


class Claims:
    """What threads claim, tile by tile, under the lock."""

    def __init__(self, asked: Asked, how: How, processor: Processor, finished: Callable[[UnderWay], None]) -> None:
        """`finished` is called, under the lock, of tensors all tiles of which were read and hashed."""
        self.asked = asked
        self.how = how
        self.processor = processor
        self.lock = threading.Lock()  # for all that follows
        # With stops, windows begin and end where tiles do: those of copies have one size on all processors.
        self.sizes = processor.tile, processor.copy if asked.stops is None else tiles.get().copied
        self.files = Files(asked.file_ids, _uses(asked.steps), asked.memory, asked.written, lambda: _reads(asked.steps))
        self.waiting: dict[str, deque[tuple[Output, list[Step]]]] = {}  # by output file
        for output, parts in by_output(asked.steps).items():
            queue = self.waiting.setdefault(output.file, deque())
            # Without bytes nobody writes its last ones: it is over before the file can be.
            queue.append((output, parts)) if output.numel else queue.appendleft((output, parts))
        self.active: dict[UnderWay, None] = {}
        self.stopped = False
        self.ending = self.ended = False  # an interrupt waits for the next of `stops`; has come to it
        self._coders: dict[QuantizedRef, Coder] = {}
        self._uncoded = Counter(step.output.encoding.weight for step in asked.steps if step.output.encoding)
        self._finished = finished

    def next(self, mine: UnderWay | None) -> list[tuple[UnderWay, int]]:
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

    def finish(self, tensor: UnderWay) -> None:
        """Every tile was read and hashed; called under the lock."""
        self._finished(tensor)
        for part in tensor.parts:
            step = part.step
            for operand in step.operands:
                for path in operand.paths:
                    self.files.release(path)
            if step.output.encoding is not None:
                weight = step.output.encoding.weight
                self._uncoded[weight] -= 1
                if not self._uncoded[weight]:
                    self._coders.pop(weight, None)
        del self.active[tensor]

    def _next_file(self) -> str:
        """The output file that the fewest threads are writing, of those that have tensors to start."""
        writers = Counter(tensor.output.file for tensor in self.active if not self.how.in_order)
        return min(self.waiting, key=writers.__getitem__)

    def _start(self) -> UnderWay | None:
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
                more = self.how.hashed, tally, self.asked.stays(step), self._coder(step), fitted
                parts.append(Part(step, each, tile, out, *more))
            tensor = UnderWay(output, parts, done.stop if done else 0, self.asked.kept, all(loaded))
            self.active[tensor] = None
            if tensor.tiles:
                return tensor
            self.finish(tensor)
        return None

    def _tile(self, step: Step) -> int:
        """Elements of a step that is read here, at a time; bytes of a copy."""
        return max(1, length(step)) if step.is_scale else self.sizes[step.op == "copy"]

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
        return self.processor.loads(step, None if out is None else out[0], reads, wanted(step, self.how.hashed))

    def _readers(self, step: Step) -> list[Reader]:
        try:
            return [self._reader(step, operand) for operand in step.operands]
        except (OSError, TypeError) as error:
            raise with_tensor(error, step) from error

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
        return self._coders.setdefault(weight, Coder(weight, self.asked.scales))

    def _joining(self, small: UnderWay) -> Iterator[UnderWay]:
        """Start the tensors that follow for as long as they go into a tile with `small`; called under the lock."""
        room, (part, *_) = self.processor.room, small.parts
        if not room or small.tiles > 1 or not small.is_loaded:
            return
        room -= _packed(part.step)
        while self.waiting:
            _, (step, *more) = self.waiting[self._next_file()][0]
            room -= _packed(step)
            alike = (step.op, step.factors, step.number(0)) == (part.step.op, part.step.factors, part.step.number(0))
            if more or not alike or room < 0 or not 0 < length(step) <= part.tile or self._is_made(step):
                return
            tensor = self._start()
            assert tensor is not None
            tensor.claimed = 1
            yield tensor

    def _is_made(self, step: Step) -> bool:
        """Whether an operand is made of codes, or is in no file here, so that the processor does not read it itself."""
        local = self.files.is_local
        return any(operand.is_decoded or not all(map(local, operand.paths)) for operand in step.operands)

    def _unclaimed(self) -> UnderWay | None:
        """The first tensor under way that has a tile left."""
        return next((tensor for tensor in self.active if tensor.claimed < tensor.tiles), None)


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
