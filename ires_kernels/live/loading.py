"""Merging while loading: tensors of what `apply` would write, all at once or one by one, and nothing on a disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from ires_kernels.checking import guards
from ires_kernels.checkpoints import configs
from ires_kernels.files.plain import plain
from ires_kernels.live import parts
from ires_kernels.live.peers import Peers
from ires_kernels.live.placing import Wanted, places
from ires_kernels.planning import ancestry
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.box import Box
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.inputs import StrPath, open_inputs
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.steps import Step, by_output
from ires_kernels.streaming import device as devices
from ires_kernels.streaming import statedict, together
from ires_kernels.streaming.asked import Progress
from ires_kernels.streaming.cpu import TORCH_DTYPES
from ires_kernels.streaming.options import Options
from ires_kernels.streaming.outcome import Outcome
from ires_kernels.streaming.reader import second_copies
from ires_kernels.streaming.together import Part

BATCH = 256 << 20
"""Bytes of tensors that are computed at a time, or one tensor that has more."""


class Weights:
    """The tensors of a merged model, which are computed as they are asked for: pairs of names and tensors.

    What each of them is can be asked before: `metadata`. As often as it is iterated over, all of it is computed again.
    """

    def __init__(self, plan: Plan, device: Wanted, threads: int | None, progress: Progress | None) -> None:
        self.metadata: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        """By name, in the order in which they come."""
        outputs = by_output(plan.steps)
        statedict.check_dtypes(plan.steps)
        for output in outputs:
            self.metadata[output.name] = TORCH_DTYPES[output.dtype], output.shape
        self.places = places(device, [(output, sum(step.nbytes for step in made)) for output, made in outputs.items()])
        self.nbytes = sum(step.nbytes for step in plan.steps)
        """Of all of them."""
        self.target = plan.inputs["target"]
        self._plan = plan
        self._options = Options.of(self.places.devices[0], threads, progress)

    def __len__(self) -> int:
        return len(self.metadata)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of name and tensor, each a new tensor on its device.

        Raises CheckpointError at the end where a residual is damaged, or where a file has changed meanwhile: then
        what was taken is not to be used.
        """
        outcome, at = Outcome(), 0
        batches: list[tuple[int, list[Step]]] = []
        for made in by_output(self._plan.steps).values():
            batches.append((at // BATCH, made))
            at += sum(step.nbytes for step in made)
        for _, batch in groupby(batches, key=lambda each: each[0]):
            found, learnt = self._fill([step for _, made in batch for step in made])
            outcome.update(learnt)
            while found:
                name = next(iter(found))
                yield name, found.pop(name)
        self._check(outcome)

    def all(self) -> dict[str, Tensor]:
        """All of them, by name."""
        tensors, outcome = self._fill(self._plan.steps)
        self._check(outcome)
        return tensors

    def blocks(self, boxes: Mapping[str, Box], again: Mapping[str, str], peers: Peers) -> dict[str, Tensor]:
        """What is here of them, of a module that several processes hold: blocks, or all of what has no box.

        again  names under which others of them are there once more, as other blocks
        """
        if len(self.places.devices) > 1:
            raise ArgumentError("device is several, and each process of a sharded module has one: give that.")
        parts.check_same(self._plan, peers)
        steps = [*self._plan.steps]
        for name, other in again.items():
            steps += [replace(s, output=replace(s.output, name=name)) for s in self._plan.steps if s.name == other]
        tensors: dict[str, Tensor] = {}
        for some in parts.steps_here(steps, self._plan, boxes):
            tensors |= self._fill(some, hashed=())[0]
        for step in steps:
            if step.name in boxes and not boxes[step.name].numel:
                dtype = TORCH_DTYPES[step.dtype]
                tensors[step.name] = torch.empty(boxes[step.name].size, dtype=dtype, device=self.places.devices[0])
        guards.check_residuals(self._plan, {}, self._options.threads, only=parts.to_check(self._plan, peers))
        guards.check_unchanged(self._plan, {}, threads=self._options.threads)
        return tensors

    def _fill(
        self, steps: tuple[Step, ...] | list[Step], hashed: Sequence[str] | None = None
    ) -> tuple[dict[str, Tensor], Outcome]:
        if hashed is None:
            hashed = [role for role, checkpoint in self._plan.inputs.items() if checkpoint.kind == "residual"]
        tensors: dict[str, Tensor] = {}
        shares: list[Part] = []
        for number, device in enumerate(self.places.devices):
            mine = [step for step in steps if self.places.by_name.get(step.name, 0) == number]
            if mine:
                into = statedict.allocate(mine, device)
                shares.append(Part(into, mine, devices.processors(device)))
                tensors |= into
        outcome = together.fill(
            shares,
            guards.file_ids(self._plan),
            self._plan.rules,
            hashed=hashed,
            threads=self._options.threads,
            progress=self._options.progress,
        )
        return {step.name: tensors[step.name] for step in steps}, outcome

    def _check(self, outcome: Outcome) -> None:
        guards.check_residuals(self._plan, outcome.inputs, self._options.threads)
        guards.check_unchanged(self._plan, outcome.inputs, threads=self._options.threads)


def planned(
    paths: Mapping[str, StrPath],
    rules: Rules,
    device: Wanted,
    threads: int | None,
    progress: Progress | None,
    *,
    follow_links: bool,
    tells: bool = True,
) -> Weights:
    """What `apply` would write, by its inputs and rules, with its warnings for who called the caller, if it `tells`."""
    inputs = open_inputs(paths, follow_links=follow_links)
    with Looks(inputs) as looks:
        plan = plan_apply(inputs, rules, second_copies(inputs), looks=looks)
        kin = ancestry.compare(inputs, plan.steps, looks)
    weights = Weights(plan, device, threads, progress)
    left_out = [plan.share.text()] if plan.share else []
    known = (*configs.differences(plan.inputs), *ancestry.warnings(kin, inputs), *left_out)
    for text in known if tells else ():
        warnings.warn(plain(text), stacklevel=3)
    guards.compare(plan)
    guards.check_companions(plan)
    return weights
