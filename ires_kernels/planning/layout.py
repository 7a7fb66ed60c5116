"""How the tensors of one model are made of those of another: which runs of which tensors, and by which rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ires_kernels.checkpoints.header import brief
from ires_kernels.checkpoints.quantized import Ref


class Run(NamedTuple):
    """Elements of a source tensor: `times` times `size` of them, each `stride` behind the one before."""

    name: str
    """Of the source tensor."""
    first: int
    """Flat index."""
    size: int
    times: int = 1
    stride: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.size * self.times

    def pieces(self) -> Iterator[tuple[int, int]]:
        """First element and number of elements of what is contiguous."""
        return ((self.first + i * self.stride, self.size) for i in range(self.times))

    def meets(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """What it has of the source's elements [first, first + count): where there, how many, and where in the run."""
        stop = first + count
        if self.times == 1:
            repeats: Sequence[int] = (0,)
        else:
            repeats = range(
                max(0, -((self.first + self.size - 1 - first) // self.stride)),
                min(self.times, -((self.first - stop) // self.stride)),
            )
        for i in repeats:
            place = self.first + i * self.stride
            low, high = max(first, place), min(stop, place + self.size)
            if low < high:
                yield low, high - low, i * self.size + low - place


Runs = tuple[Run, ...]


def whole(name: str, ref: Ref) -> Runs:
    """All elements of a tensor."""
    return (Run(name, 0, ref.numel),)


def compressed(pieces: Iterable[tuple[str, int, int]]) -> Runs:
    """Runs of (name, first, count) that follow each other, joined where they are contiguous or at equal distances."""
    joined: list[tuple[str, int, int]] = []
    for name, first, count in pieces:
        if joined and joined[-1][0] == name and sum(joined[-1][1:]) == first:
            joined[-1] = (name, joined[-1][1], joined[-1][2] + count)
        else:
            joined.append((name, first, count))
    runs: list[Run] = []
    for name, first, size in joined:
        last = runs[-1] if runs else None
        if last is not None and (last.name, last.size) == (name, size):
            stride = first - last.first - (last.times - 1) * last.stride
            if stride >= size and (last.times == 1 or stride == last.stride):
                runs[-1] = last._replace(times=last.times + 1, stride=stride)
                continue
        runs.append(Run(name, first, size))
    return tuple(runs)


class Rule(NamedTuple):
    """What explains some correspondences, in words."""

    text: str
    how: str
    """What to add behind the name of the other model."""
    tensors: int
    """Of the model that gives the layout."""


@dataclass(frozen=True)
class Layout:
    """What belongs to the tensors of a model in another one, where that is not the tensor of the same name."""

    runs: Mapping[str, Runs] = field(default_factory=dict)
    """By name of the tensor of which they are all the elements, in their order; nothing where none belongs to it."""
    rules: tuple[Rule, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """In JSON types, to go on with."""
        return {
            "runs": {name: [list(run) for run in runs] for name, runs in self.runs.items()},
            "rules": [list(rule) for rule in self.rules],
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Layout:
        """What `to_dict` gave."""
        return cls(
            {name: tuple(Run(*run) for run in runs) for name, runs in table["runs"].items()},
            tuple(Rule(*rule) for rule in table["rules"]),
        )

    def summary(self) -> dict[str, Any]:
        """In JSON types, for people: the rules, and how many tensors are made of how many runs."""
        several = [runs for runs in self.runs.values() if len(runs) > 1 or any(run.times > 1 for run in runs)]
        regions = sum(run.times for runs in several for run in runs)
        return {
            "rules": [{"rule": f"{rule.text}{rule.how}", "tensors": rule.tensors} for rule in self.rules],
            "tensors": len(self.runs),
            "regions": regions + len(self.runs) - len(several),
        }


def lines(layouts: Mapping[str, Layout]) -> list[str]:
    """Each rule once, and in which models it holds, for people."""
    where: dict[Rule, list[str]] = {}
    for role, layout in layouts.items():
        for rule in layout.rules:
            where.setdefault(rule, []).append(role)
    return [
        f"{rule.text} in {' and '.join(roles)}{rule.how}: {rule.tensors} tensor{'s' * (rule.tensors != 1)}"
        for rule, roles in where.items()
    ]


def read(runs: Runs, shape: tuple[int, ...], tensors: Mapping[str, Ref]) -> tuple[Ref, ...]:
    """What is read for a tensor of this shape: its runs, each as a tensor of its own."""
    if len(runs) == 1 and runs[0].times == 1:
        name, first, size, _, _ = runs[0]
        ref = tensors[name].run(first, size)
        fits = ref.shape != shape and ref.numel == math.prod(shape)  # an embedding may have other rows
        return (replace(ref, shape=shape) if fits else ref,)
    return tuple(tensors[run.name].run(*piece) for run in runs for piece in run.pieces())


def cut(refs: Sequence[Ref], first: int, count: int) -> tuple[Ref, ...]:
    """The elements from `first` on of runs that follow each other."""
    if len(refs) == 1:
        return (refs[0].run(first, count),)
    found, end = [], 0
    for ref in refs:
        low, high = max(first, end), min(first + count, end + ref.numel)
        if low < high:
            found.append(ref.run(low - end, high - low))
        end += ref.numel
    return tuple(found)


def quoted(names: Iterable[str]) -> str:
    """Names in a sentence."""
    listed = [f"`{brief(name)[1:-1]}`" for name in names]
    return " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
