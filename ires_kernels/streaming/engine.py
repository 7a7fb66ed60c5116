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
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, cycle

from ires_kernels.backends.call import Tally
from ires_kernels.backends.call import threads as kernel_threads
from ires_kernels.files import interrupts
from ires_kernels.streaming.asked import Asked, How, Told
from ires_kernels.streaming.claims import Claims
from ires_kernels.streaming.failures import with_tensor
from ires_kernels.streaming.outcome import FitTally, Outcome
from ires_kernels.streaming.pieces import take
from ires_kernels.streaming.tiles import Slot
from ires_kernels.streaming.under_way import Tile, UnderWay

_MOST_THREADS = 1024  # whatever was asked for


class Engine:
    """One run: what its threads share."""

    def __init__(self, asked: Asked, how: How, told: Told) -> None:
        self.asked = asked
        self.how = how
        self.told = told
        self.processor = how.processors(asked.steps, asked.rules, how.counted)
        self.claims = Claims(asked, how, self.processor, partial(_note, told.outcome, how.counted))
        self.todo = sum((0 if asked.stays(step) else step.nbytes) + step.read_bytes for step in asked.steps)
        self.read: list[int] = []  # bytes by thread, so that counting needs no lock
        self.written: list[int] = []
        self.error: BaseException | None = None

    def run(self) -> Outcome:
        outcome = self.told.outcome
        with interrupts.held():
            self._run(min(self.how.threads, _MOST_THREADS))
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
        self.claims.files.close()

    def _go_on(self, look: Callable[[], None]) -> bool:
        """Show the progress; False after an error there, or an interrupt: the run ends at the next tile or stop."""
        try:
            look()
        except BaseException as error:
            if self.asked.stops is None:
                self._stop(error)
            else:
                with self.claims.lock:
                    self.error = self.error or error
                    self.claims.ending = True
            return False
        return True

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
        busy: deque[list[Tile]] = deque()
        tensor = at = None
        try:
            slots = self.processor.slots()
            for slot in cycle(slots):
                at = None  # a tensor that cannot be started puts its own name into the error
                if look is not None and not self._go_on(look):
                    look = None
                claims = self.claims.next(tensor)
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
            self._stop(with_tensor(error, at))
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

    def _begin(self, claims: Sequence[tuple[UnderWay, int]], slot: Slot) -> list[Tile]:
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
            begun.append(Tile(tensor, index, part, first, slot, seen, None, at, read, written))
        return begun

    def _begin_tile(self, tensor: UnderWay, index: int, slot: Slot) -> Tile:
        """Read a tile and start to compute it."""
        part, first = tensor.at(index)
        step = part.step
        count = min(part.tile, part.length - first)
        coding = None
        if part.coder is not None:
            scales = part.coder.scales(step, part.readers, slot, self.claims.sizes[False], lambda: self.claims.stopped)
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
        return Tile(tensor, index, part, first, slot, seen, result, at, read, written, fit)

    def _scales_tile(self, tensor: UnderWay, index: int, slot: Slot, stored: memoryview) -> Tile:
        """All scales of a weight, which are there."""
        part, first = tensor.at(index)
        if part.out is not None:
            import torch

            part.out.copy_(torch.frombuffer(bytearray(stored), dtype=torch.uint8))
        result = None if part.out is not None else stored
        return Tile(
            tensor, index, part, first, slot, [() for _ in part.readers], result, tensor.place(index), 0, len(stored)
        )

    def _end(self, tile: Tile, worker: int) -> None:
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

    def _in_turn(self, tile: Tile, counted: Tally | None) -> Tally | None:
        """Hash and count a tile after the ones before it; the tally of its step so far, None when the run stopped."""
        tensor, part = tile.tensor, tile.part
        with tensor.turned:
            while tensor.turn != tile.number:
                if self.claims.stopped:
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
            with self.claims.lock:
                self.claims.finish(tensor)
        return total

    def _stop(self, error: BaseException) -> None:
        """Let all threads end; the first error stays, and if that was an interrupt, the next one as its cause."""
        with self.claims.lock:
            if self.error is None:
                self.error = error
            elif self.claims.ending and not self.claims.stopped:
                self.error.__cause__ = error
            self.claims.stopped = True
            if self.told.failed is not None:
                self.told.failed()
            self.claims.files.interrupt()
            active = list(self.claims.active)
        for tensor in active:
            with tensor.turned:
                tensor.turned.notify_all()


def _note(outcome: Outcome, counted: bool, tensor: UnderWay) -> None:
    """Tell what was learnt of a tensor that is finished."""
    if tensor.hasher is not None:
        outcome.outputs[tensor.output.name] = tensor.hasher.hexdigest()
    for part in tensor.parts:
        step = part.step
        for operand, wanted, hasher in zip(step.operands, part.wanted, part.hashers, strict=True):
            if wanted:
                known = hasher or tensor.hasher
                assert known is not None
                outcome.inputs.setdefault(operand.role, {})[operand.key] = known.hexdigest()
        if counted and not part.copied and not part.tiles:
            outcome.tallies[step.label] = part.tally
        if part.coder is not None and part.coder.found is not None and not step.is_scale:
            outcome.scales[step.label] = (part.coder.found.blocks, part.coder.found.new)
