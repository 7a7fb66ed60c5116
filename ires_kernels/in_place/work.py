"""The bytes of an update in place: computed tile by tile, and written under the journal window by window."""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from operator import itemgetter

from ires_kernels.backends.call import Tally
from ires_kernels.checking import guards
from ires_kernels.files.journal import Journal
from ires_kernels.in_place import begun
from ires_kernels.in_place.again import Update
from ires_kernels.in_place.cuts import Window
from ires_kernels.planning.steps import Step, by_output
from ires_kernels.streaming import fitting, stream
from ires_kernels.streaming.asked import Done
from ires_kernels.streaming.options import Options
from ires_kernels.streaming.outcome import Outcome, tally_of


def work(update: Update, options: Options) -> Outcome:
    """Put back what was in the air, and change what is not changed yet; returns all that was learnt, then and now."""
    place, operation, plan, windows = update.place, update.operation, update.plan, update.windows
    outcome = Outcome()
    with begun.refused(place), begun.opened_journal(place.work, operation, place.model) as journal:
        journal.recover()
        begun.check_untouched(place.work, operation, place.model, len(journal.records))
        done: dict[str, Done] = {}
        for record in journal.records:
            table = json.loads(record)
            outcome.update(Outcome.from_dict(table["outcome"]))
            part = table["part"]
            done = {}
            if part:
                tallies = {label: tally_of(numbers) for label, numbers in part["tallies"].items()}
                done = {part["name"]: Done(part["stop"], tallies)}
        own = plan.roles_of_target()
        first, read = update.scales.learnt if update.scales else Outcome(), Outcome()
        begun.check_passes(place, operation, first, outcome)
        read.update(first)
        read.update(outcome)
        guards.check_begun(
            plan, operation.samples, read, update.changed, update.files,
            but=own, threads=options.threads, back=begun.back(place, operation),
        )  # fmt: skip
        files = update.own_files
        writer = _Writer(update.steps, windows, journal, outcome)
        journal.start()
        stream.run(
            [step for step in update.steps if step.name not in outcome.outputs],
            files,
            plan.rules,
            writer.write,
            hashed=plan.inputs.keys() - own,
            fit=fitting.of_tile if operation.compare else None,
            processors=options.processors,
            threads=options.threads,
            progress=options.progress,
            stops={(window.segments[0].step.name, window.segments[0].start) for window in windows},
            done=done,
            scales=update.scales.of if update.scales else None,
            written={place.model / step.file for step in update.steps if step.roles == ("scales",)},
            outcome=outcome,
            failed=journal.stop,
        )
        journal.finish()
        begun.check_passes(place, operation, first, outcome)
        journal.check_files(place.model)
        return outcome


class _Writer:
    """Writes results over the target, and tells the journal of windows that are complete; called by several threads."""

    def __init__(self, steps: Sequence[Step], windows: Sequence[Window], journal: Journal, outcome: Outcome) -> None:
        self._parts = by_output(steps)
        self._windows = windows
        self._journal = journal
        self._outcome = outcome
        self._left = [window.nbytes for window in windows]
        self._tallies: dict[int, Tally] = {}  # at the end of a window, of the step that made its last bytes
        self._lock = threading.Lock()
        self._places: dict[str, list[tuple[int, int]]] = {}  # where a tensor's segments begin, and in which windows
        for number, window in enumerate(windows):
            for segment in window.segments:
                self._places.setdefault(segment.step.name, []).append((segment.start, number))

    def write(self, step: Step, start: int, data: memoryview, tally: Tally) -> None:
        places = self._places[step.name]
        _, number = places[bisect_right(places, start, key=itemgetter(0)) - 1]
        if not step.is_own:
            self._journal.wait(number)
            self._journal.write(step.file, data, step.offset + start)
        last = self._windows[number].segments[-1]
        with self._lock:
            if step is last.step and start + len(data) == last.stop:
                self._tallies[number] = tally
            self._left[number] -= len(data)
            complete = self._left[number] == 0
        if complete:
            self._journal.complete(number, self._record(number))

    def _record(self, number: int) -> bytes:
        """What a later run has to know of the tensors that end in a window, and of the one that does not."""
        window = self._windows[number]
        last = window.segments[-1]
        tally = self._tallies.pop(number)
        part = None
        if not last.is_last:
            known = self._outcome.tallies
            before = [step for step in self._parts[last.step.output] if step.first < last.step.first]
            tallies = {step.label: known[step.label] for step in before if step.label in known}
            tallies |= {} if last.step.op == "copy" else {last.step.label: tally}
            numbers = {label: asdict(each) for label, each in tallies.items()}
            part = {"name": last.step.name, "stop": last.stop, "tallies": numbers}
        ended = [self._parts[segment.step.output] for segment in window.segments if segment.is_last]
        outcome = self._outcome.of(chain.from_iterable(ended))
        return json.dumps({"outcome": outcome.to_dict(), "part": part}).encode()
