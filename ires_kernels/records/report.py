"""What a merge did to the numbers, for people and for machines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ires_kernels.backends.call import Tally
from ires_kernels.checkpoints import sidefiles
from ires_kernels.checkpoints.addresses import Address
from ires_kernels.checkpoints.manifest import Compared, Numbers, Requantized, Strength
from ires_kernels.files.plain import several, size, table
from ires_kernels.planning.absences import Absence, grouped
from ires_kernels.planning.ancestry import Ancestry
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import copied
from ires_kernels.records import requantized, strengths
from ires_kernels.records.fit import FitReport, rows_of
from ires_kernels.streaming.outcome import Outcome

_DONE = {"extract": "extracted", "apply": "merged"}


@dataclass(frozen=True)
class Report:
    """Outcome of `apply` or `extract`; ``print(report)`` is a table. Counts are of elements of merged tensors."""

    operation: str
    id: str
    out: Path | Address
    """The new folder; with an Address, `str` of it is s3://bucket/folder."""
    seconds: float
    bytes_read: int
    bytes_written: int
    """By this run: what an interrupted one before it has done is not among them."""
    tensors: int
    """Merged tensors."""
    counts: Tally
    overflow: int
    """Finite inputs whose result the stored dtype cannot hold, in converted tensors as well."""
    strengths: tuple[Strength, ...]
    """By patterns and factors, for `apply`."""
    copied: dict[str, str]
    """Tensors taken from the target as they are, or in another dtype, and why."""
    not_stored: dict[str, str]
    """Tensors of the instruct model that the residual does not hold, and why."""
    missing: tuple[Absence, ...]
    side_files: dict[str, str]
    """Name and the model each comes from."""
    not_copied: tuple[str, ...]
    ancestry: tuple[Ancestry, ...] = field(default=())
    """What the models have in common, by samples of their values."""
    warnings: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    """What to know about the files."""
    hints: tuple[str, ...] = field(default=())
    """What helps where rounding has taken much of an alpha."""
    why: dict[str, str] = field(default_factory=dict)
    """Of side files, by name, why they come from that model, where this is not the rule."""
    requantized: Requantized | None = None
    """Of the tensors that are stored as codes."""
    compared: Compared | None = None
    """How target and instruct have moved away from base, where that was asked for."""
    fit: FitReport | None = None
    """All that was counted for it, by this run or those that it went on with."""

    @classmethod
    def recorded(cls, operation: str, id_: str, out: Path | Address, numbers: Numbers, note: str) -> Report:
        """What a manifest says of an operation that was carried out before; of what this run did, nothing."""
        names = ("elements", "updates", "lost", "nan_in", "inf_in", "nan_out", "overflow")
        counts = Tally(**{name: getattr(numbers, name) for name in names})
        return cls(
            operation, id_, out, 0.0, 0, 0, numbers.tensors, counts, counts.overflow, numbers.strengths, {}, {}, (), {},
            (), notes=(note,), requantized=numbers.requantized, compared=numbers.compare,
        )  # fmt: skip

    @classmethod
    def of(cls, plan: Plan, outcome: Outcome, out: Path | Address, seconds: float) -> Report:
        total, converted = Tally(), Tally()
        for step in plan.steps:
            tally = outcome.tallies.get(step.label)
            if tally is None:
                continue
            if step.op == "convert":
                converted += tally
            else:
                total += tally
        codes = requantized.requantized(plan, outcome)
        realised = strengths.strengths(plan, outcome)
        fit = FitReport.of_merge(plan, outcome)
        return cls(
            plan.operation,
            plan.id,
            out,
            seconds,
            outcome.bytes_read,
            outcome.bytes_written,
            len({step.name for step in plan.steps if not step.reason and not step.is_scale}),
            total,
            total.overflow + converted.overflow,
            realised,
            copied(plan.steps),
            {name: reason for name, (reason, _) in plan.not_stored.items()},
            plan.missing,
            {file.name: file.role for file in plan.side_files if not (plan.in_place and file.role == "target")},
            () if plan.in_place else plan.not_copied,
            plan.ancestry,
            (
                *plan.warnings,
                *_zero(plan, total),
                *_odd_values(plan, outcome),
                *_share(plan, outcome),
                *requantized.warnings(codes, plan.rules.rounding),
                *(fit.warnings if fit else ()),
            ),
            plan.notes,
            hints=tuple(strengths.hints(realised, plan)),
            requantized=codes,
            compared=fit.overall() if fit else None,
            fit=fit,
            why={side.name: side.why for side in plan.side_files if side.why},
        )

    @property
    def lost_fraction(self) -> float:
        """Part of the updates (elements whose update is not 0) that rounding took back entirely."""
        return self.counts.lost / self.counts.updates if self.counts.updates else 0.0

    @property
    def gb_per_second(self) -> float:
        """Bytes read and written per second, in GB (10^9)."""
        return (self.bytes_read + self.bytes_written) / self.seconds / 1e9 if self.seconds else math.inf

    def numbers(self) -> dict[str, Any]:
        """What depends on the inputs and rules alone, and so belongs into the manifest.

        But for the last digits of effective alphas: sums are taken in an order that the processor chooses.
        """
        return {
            "tensors": self.tensors,
            "elements": self.counts.elements,
            "updates": self.counts.updates,
            "lost": self.counts.lost,
            "lost_fraction": self.lost_fraction,
            "nan_in": self.counts.nan_in,
            "inf_in": self.counts.inf_in,
            "nan_out": self.counts.nan_out,
            "overflow": self.overflow,
            "strengths": [strength.to_dict() for strength in self.strengths],
            **({"requantized": asdict(self.requantized)} if self.requantized else {}),
            **({"compare": asdict(self.compared)} if self.compared else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON types."""
        return {
            "operation": self.operation,
            "id": self.id,
            "out": f"{self.out}",
            "seconds": self.seconds,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "gb_per_second": self.gb_per_second if self.seconds else None,
            **self.numbers(),
            **({"compare": self.fit.figures()} if self.fit else {}),
            "copied": self.copied,
            "not_stored": self.not_stored,
            "missing": [f"{absence.name!r} is {absence.where}" for absence in self.missing],
            "side_files": self.side_files,
            "side_files_why": {name: why for name, why in self.why.items() if name in self.side_files},
            "not_copied": list(self.not_copied),
            "ancestry": [found.to_dict() for found in self.ancestry],
            "hints": list(self.hints),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = table(self.rows())
        return f"{lines}\n\n{self.fit.section()}" if self.fit else lines

    def rows(self) -> list[tuple[str, str]]:
        """The table: what, and how much."""
        counts = self.counts
        rows = [("output", f"{self.out}")]
        if self.operation not in _DONE:  # of what was written through `mapped` nobody knows anything
            return rows + [("note", line) for line in self.notes]
        rows.append((_DONE[self.operation], f"{several(self.tensors, 'tensor')}, {counts.elements:,} elements"))
        if self.seconds:
            rows.append(("read, written", f"{size(self.bytes_read)}, {size(self.bytes_written)}"))
            rows.append(("time", f"{self.seconds:.2f} s, {self.gb_per_second:.2f} GB/s"))
        rows += strengths.rows(self.strengths)
        if not any(strength.weights for strength in self.strengths):  # of which there are no updates
            lost = f"{counts.lost:,} of {counts.updates:,} updates ({self.lost_fraction:.3%})"
            rows.append(("lost to rounding", lost))
        rows += [("stored as codes", requantized.row(self.requantized))] if self.requantized else []
        rows += rows_of(self.compared) if self.compared else []
        for title, count in (
            ("NaN in the inputs", counts.nan_in),
            ("inf in the inputs", counts.inf_in),
            ("NaN in the output", counts.nan_out),
            ("overflow", self.overflow),
        ):
            rows += [(title, several(count, "element"))] if count else []
        rows += _grouped("copied", self.copied) + _grouped("not stored", self.not_stored)
        rows += [("missing", line) for line in grouped(self.missing)]
        rows += sidefiles.rows((name, role, self.why.get(name, "")) for name, role in self.side_files.items())
        rows += [("not copied", ", ".join(self.not_copied))] if self.not_copied else []
        rows += [("ancestry", f"{found}") for found in self.ancestry if found.related]
        rows += [("hint", line) for line in self.hints]
        rows += [("warning", line) for line in self.warnings]
        rows += [("note", line) for line in self.notes]
        return rows


def _zero(plan: Plan, total: Tally) -> Iterable[str]:
    """A warning of a residual that is no difference."""
    if plan.operation == "extract" and plan.rules.alpha and total.elements and not total.updates:
        yield "the sum is 0: its residuals are, or cancel each other"
    elif plan.operation == "extract" and total.elements and not total.updates:
        yield "the residual is 0: instruct and base hold the same numbers. Are they two different models?"


def _odd_values(plan: Plan, outcome: Outcome) -> Iterable[str]:
    """Warnings of values that are no numbers, with the tensors that have them."""
    kinds = {"nan_in": "NaN in the inputs", "inf_in": "infinities in the inputs", "overflow": "overflow in the output"}
    for counted, what in kinds.items():
        found = [step.label for step in plan.steps if getattr(outcome.tallies.get(step.label), counted, 0)]
        if found:
            more = f" and {len(found) - 10} more" if len(found) > 10 else ""
            yield f"{what} of {several(len(found), 'tensor')}: {', '.join(found[:10])}{more}"


def _share(plan: Plan, outcome: Outcome) -> Iterable[str]:
    """The warning of how much of the residual went in, where tensors were missing."""
    share = plan.share
    if share is not None:
        tallies = outcome.tallies
        inside = sum(tallies[step.label].norm2 for step in plan.steps if not step.reason and step.label in tallies)
        outside = sum(tallies[step.name].norm2 for step in share.left if step.name in tallies)
        norm = math.sqrt(inside / (inside + outside)) if share.known and inside + outside > 0 else None
        yield share.text(norm)


def _grouped(title: str, reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(title, f"{several(count, 'tensor')}, {reason}") for reason, count in Counter(reasons.values()).items()]
