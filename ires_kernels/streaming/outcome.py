"""What a run tells, beside what it writes: hashes and counts, to be recorded and read again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ires_kernels.backends.call import Tally
from ires_kernels.backends.fit import Fit
from ires_kernels.planning.steps import Step


@dataclass(slots=True)
class FitTally(Tally):
    """What is counted of a step whose operands are compared as well."""

    fit: Fit = field(default_factory=Fit)

    def __iadd__(self, other: Tally) -> FitTally:
        Tally.__iadd__(self, other)
        if isinstance(other, FitTally):
            self.fit = replace(self.fit)  # a copy of this tally has the old one
            self.fit += other.fit
        return self


def tally_of(numbers: Mapping[str, Any]) -> Tally:
    """What `asdict` gave of a tally, through JSON as well."""
    if "fit" not in numbers:
        return Tally(**numbers)
    return FitTally(**{**numbers, "fit": Fit(**numbers["fit"])})


@dataclass
class Outcome:
    """What a run learnt about the bytes that went by."""

    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    """role → name of a tensor, or `Operand.key` of what is none → xxh3_128 of its bytes as hex."""
    outputs: dict[str, str] = field(default_factory=dict)
    """tensor name → xxh3_128 as hex."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    """label of a step → what was counted; where only the dtype changed NaN, inf and overflow mean something."""
    scales: dict[str, tuple[int, int]] = field(default_factory=dict)
    """label of a step that makes codes → how many scales they have, and how many of those are new"""
    bytes_read: int = 0
    bytes_written: int = 0
    """By this run alone; no part of what is recorded."""

    def update(self, other: Outcome) -> None:
        """Add what `other` knows."""
        for role, hashes in other.inputs.items():
            self.inputs.setdefault(role, {}).update(hashes)
        self.outputs.update(other.outputs)
        self.tallies.update(other.tallies)
        self.scales.update(other.scales)

    def of(self, steps: Iterable[Step]) -> Outcome:
        """What is known of these steps, all of which have ended."""
        part = Outcome()
        for step in steps:
            for operand in step.operands:
                known = self.inputs.get(operand.role, {})
                if operand.key in known:
                    part.inputs.setdefault(operand.role, {})[operand.key] = known[operand.key]
            part.outputs[step.name] = self.outputs[step.name]
            if step.label in self.tallies:
                part.tallies[step.label] = self.tallies[step.label]
            if step.label in self.scales:
                part.scales[step.label] = self.scales[step.label]
        return part

    def to_dict(self) -> dict[str, Any]:
        tallies = {name: asdict(tally) for name, tally in self.tallies.items()}
        return {"inputs": self.inputs, "outputs": self.outputs, "tallies": tallies, "scales": self.scales}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Outcome:
        """What `to_dict` gave, through JSON as well."""
        tallies = {name: tally_of(numbers) for name, numbers in table["tallies"].items()}
        scales = {name: (blocks, new) for name, (blocks, new) in table.get("scales", {}).items()}
        return cls(table["inputs"], table["outputs"], tallies, scales)
