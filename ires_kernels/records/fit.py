"""What `compare` found, for people and for machines: does a residual fit a target?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ires_kernels.backends.fit import Fit
from ires_kernels.checkpoints.manifest import Compared, Fitted
from ires_kernels.checkpoints.standins import shown
from ires_kernels.files.plain import plain, plain_lines, several, size, table
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.steps import Step, copied
from ires_kernels.streaming.outcome import FitTally, Outcome

MEASURED = ((0.15, 0.82), (0.21, 0.58), (0.34, 0.24))
"""Of targets of examples/continual whose weights were all trained (results/drift.md): the relative drift of matrices,
and with the residual at alpha 1 the share of answers in their format, of that of instruct. Means of three seeds."""
ADAPTED = (0.50, 0.80)
"""The same of targets into which adapters of rank 8 were merged."""
CURVE = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Alphas of the curve in a picture, beside the one that is asked."""

_BAR = 6
_NAME = 24
_LISTED = 40
_NUMBER = re.compile(r"^(.*?)\.?\b(\d+)\.(.+)$")
_ENDING = re.compile(r"\.(weight|scale)$")


class Place(NamedTuple):
    """Where a tensor is in a model, told by its name."""

    layer: str
    """The name up to its first number; empty outside of layers."""
    kind: str
    """The rest of it, with * for further numbers."""


def place(name: str) -> Place:
    """The layer and kind of a tensor.

    >>> place("model.layers.3.mlp.experts.17.down_proj.weight")
    Place(layer='model.layers.3', kind='mlp.experts.*.down_proj')
    """
    name = _ENDING.sub("", name)
    found = _NUMBER.match(name)
    if found is None:
        return Place("", name)
    stack, number, kind = found.groups()
    return Place(f"{stack}.{number}".lstrip("."), re.sub(r"(?<=\.)\d+(?=\.|$)", "*", kind))


@dataclass(frozen=True)
class FitReport:
    """How target - base and instruct - base fit together; ``print(report)`` is a table."""

    paths: dict[str, Path]
    alphas: tuple[float, ...]
    """The one that was asked, and those of the curve."""
    tensors: dict[str, Fit]
    matrices: frozenset[str]
    """Of the tensors, those with rows and columns, or more."""
    not_compared: dict[str, str]
    """Tensors of the target, and why."""
    seconds: float
    bytes_read: int
    warnings: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls,
        plan: Plan,
        tensors: Mapping[str, Fit],
        alphas: tuple[float, ...],
        seconds: float,
        bytes_read: int,
        warnings: Iterable[str] = (),
    ) -> FitReport:
        """Warnings are those of the models; what the sums say comes to them."""
        paths = {role: checkpoint.path for role, checkpoint in plan.inputs.items()}
        matrices = frozenset(step.name for step in plan.steps if len(step.shape) > 1 and step.name in tensors)
        report = cls(paths, alphas, dict(tensors), matrices, copied(plan.steps), seconds, bytes_read)
        return replace(report, warnings=(*warnings, *_misfits(report), *_rounding(report)))

    @classmethod
    def of_merge(cls, plan: Plan, outcome: Outcome) -> FitReport | None:
        """What a merge has counted on its way; None where it was not asked to, or not all of it was.

        How much of alpha is left is told here where all is rounded to nearest with one alpha; the report tells anyhow.
        """
        found = _found(plan.steps, outcome)
        if not found:
            return None
        if plan.rules.alphas or plan.rules.rounding != "nearest":
            found = {name: replace(fit, moved=[], exact=0.0) for name, fit in found.items()}
        report = cls.of(plan, found, plan.rules.alpha[:1], 0.0, 0)
        return replace(report, warnings=tuple(_misfits(report)))

    @property
    def alpha(self) -> float:
        return self.alphas[0]

    @cached_property
    def total(self) -> Fit:
        return _sum(self.tensors.values())

    @cached_property
    def matrix_total(self) -> Fit:
        """Of matrices alone: the weights of norms, which are about 1, would make a small model's drift look smaller."""
        return _sum(fit for name, fit in self.tensors.items() if name in self.matrices)

    @cached_property
    def layers(self) -> dict[str, Fit]:
        """By layer, in the order of the model; what is outside of layers is under its own name."""
        return _grouped(self.tensors, lambda at: at.layer or at.kind)

    @cached_property
    def kinds(self) -> dict[str, Fit]:
        return _grouped(self.tensors, lambda at: at.kind)

    @cached_property
    def cells(self) -> dict[Place, Fit]:
        """By layer and kind."""
        groups: dict[Place, list[Fit]] = {}
        for name, fit in self.tensors.items():
            groups.setdefault(place(name), []).append(fit)
        return {at: _sum(fits) for at, fits in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON types; shares are of 1, and what cannot be told is None."""
        return {
            "paths": {role: shown(path) for role, path in self.paths.items()},
            "alpha": self.alpha,
            "seconds": self.seconds,
            "bytes_read": self.bytes_read,
            **self.figures(),
        }

    def figures(self) -> dict[str, Any]:
        """What was counted, in JSON types."""
        return {
            "total": self.numbers(self.total),
            "matrices": self.numbers(self.matrix_total),
            "curve": [
                {"alpha": alpha, "effective_alpha": effective}
                for alpha, effective in zip(self.alphas, self.total.effective(self.alphas), strict=True)
            ],
            "layers": {name: self.numbers(fit) for name, fit in self.layers.items()},
            "kinds": {name: self.numbers(fit) for name, fit in self.kinds.items()},
            "tensors": {name: self.numbers(fit) for name, fit in self.tensors.items()},
            "not_compared": self.not_compared,
            "warnings": list(self.warnings),
        }

    def overall(self) -> Compared:
        """What a manifest keeps of it, in as many digits as any order of adding up gives."""
        return Compared(*(self._overall(fit) for fit in (self.total, self.matrix_total)))

    def _overall(self, fit: Fit) -> Fitted:
        numbers = self.numbers(fit)
        del numbers["ulps"]
        elements = numbers.pop("elements")
        return Fitted(elements, **{key: None if x is None else float(f"{x:.6g}") for key, x in numbers.items()})

    def numbers(self, fit: Fit) -> dict[str, Any]:
        return {
            "elements": fit.elements,
            "drift": fit.relative_drift,
            "size": fit.relative_size,
            "cosine": fit.cosine,
            "sign_conflicts": fit.conflict_share,
            "within_an_ulp": fit.small_share,
            "effective_alpha": fit.effective(self.alphas)[0],
            "ulps": dict(fit.histogram()),
        }

    def __str__(self) -> str:
        groups = _layers_in_few_rows(self.layers)
        lines = [self.section()]
        lines += [self._table({}, "layers", groups)] if len(groups) > 1 else []
        return plain_lines(*(line for part in lines for line in part.split("\n")), *table(self.rows()).split("\n"))

    def section(self) -> str:
        """The first of its tables, which the report of a merge has as well."""
        kinds = self.kinds
        shown = dict(sorted(kinds.items(), key=lambda each: -each[1].elements)[:_LISTED])
        lines = [self._table({"all": self.total}, "kind of tensor", {k: f for k, f in kinds.items() if k in shown})]
        lines += [f"and {len(kinds) - len(shown)} more kinds: --json has all"] if len(kinds) > len(shown) else []
        return plain_lines(*(line for part in lines for line in part.split("\n")))

    def rows(self) -> list[tuple[str, str]]:
        """What is below the table."""
        total, drift = self.total, self.matrix_total.relative_drift
        rows = [("read", f"{size(self.bytes_read)} in {self.seconds:.2f} s")]
        rows.append(("drift", "|target - base| / |base|" + (f", of matrices {drift:.3g}" if drift is not None else "")))
        rows.append(("", _measured()))
        rows.append(("size", "|instruct - base| / |base|"))
        rows.append(("cosine, signs", "of target - base and instruct - base; signs: share of weights that differ"))
        rows.append(("≤1ulp", "share of weights that instruct changes by one step of their dtype, or none"))
        effective = total.effective(self.alphas)[0]
        left = "not known: the target stores codes" if effective is None else f"{effective:.6g}"
        rows.append((f"alpha {self.alpha:g}", f"effective {left}, rounded to nearest"))
        rows += [
            ("not compared", f"{several(n, 'tensor')}, {why}") for why, n in Counter(self.not_compared.values()).items()
        ]
        return rows + [("warning", line) for line in self.warnings]

    def _table(self, first: Mapping[str, Fit], title: str, fits: Mapping[str, Fit]) -> str:
        """80 columns, with bars of drift and size on one scale."""
        rows = {**first, **fits}
        largest = max([r for f in rows.values() for r in (f.relative_drift, f.relative_size) if r], default=1.0)
        bars, numbers = [f"{'drift':<{_BAR}}", "", f"{'size':<{_BAR}}", ""], ["cosine", "signs", "≤1ulp", " alpha"]
        cells = [[title, *bars, *numbers]]
        for name, fit in rows.items():
            beside = [text for r in (fit.relative_drift, fit.relative_size) for text in (bar(r, largest), _short(r))]
            shares = _percent(fit.conflict_share), _percent(fit.small_share)
            first_line, *more = _in_parts(plain(name))
            effective = _short(fit.effective(self.alphas)[0])
            cells.append([first_line, *beside, _short(fit.cosine), *shares, effective])
            cells += [[line] for line in more]
        widths = [_NAME, *(max(len(row[k]) for row in cells if len(row) > k) for k in range(1, len(cells[0])))]
        lines = [" ".join(_aligned(row, widths)).rstrip() for row in cells]
        return "\n".join([lines[0], "─" * (sum(widths) + len(widths) - 1), *lines[1:]])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """Names and bars to the left, numbers to the right."""
    for number, (cell, width) in enumerate(zip(row, widths, strict=False)):
        yield cell.ljust(width) if number in (0, 1, 3) else cell.rjust(width)


def _in_parts(name: str) -> list[str]:
    """A name in lines that fit into the column, broken after dots where that is possible."""
    lines = [""]
    for part in re.findall(rf"[^.]{{1,{_NAME - 1}}}\.?|\.", name):
        if lines[-1] and len(lines[-1]) + len(part) > _NAME:
            lines.append("")
        lines[-1] += part
    return lines


def bar(value: float | None, largest: float) -> str:
    """A bar of eighths of a letter, as long as the value is large."""
    eighths = round(8 * _BAR * (value or 0) / largest)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _layers_in_few_rows(layers: Mapping[str, Fit], most: int = 8) -> dict[str, Fit]:
    """Layers in their order, neighbours together where there are many."""
    names = [name for name in layers if name.rpartition(".")[2].isdigit()]
    if len(names) <= most:
        return {name: layers[name] for name in names}
    length = -(-len(names) // most)
    groups = [names[i : i + length] for i in range(0, len(names), length)]
    titles = [g[0] if len(g) == 1 else f"{g[0]} – {g[-1].rpartition('.')[2]}" for g in groups]
    return {title: _sum(layers[name] for name in group) for title, group in zip(titles, groups, strict=True)}


def _found(steps: Iterable[Step], outcome: Outcome) -> dict[str, Fit]:
    """What a run has counted by tensor; nothing where that is not known of all."""
    found: dict[str, Fit] = {}
    for step in steps:
        if step.op == "add_difference" and not step.is_scale:
            tally = outcome.tallies.get(step.label)
            if not isinstance(tally, FitTally):
                return {}
            total = found.setdefault(step.name, Fit())
            total += tally.fit
    return found


def rows_of(found: Compared) -> list[tuple[str, str]]:
    """What a merge tells of it above the table."""
    total, drift = found.total, found.matrices.drift
    shares = _percent(total.sign_conflicts), _percent(total.within_an_ulp)
    numbers = (
        f"drift {_short(total.drift)}, of matrices {_short(drift)}, size {_short(total.size)}, cosine "
        f"{_short(total.cosine)}, {shares[0]} of signs differ, instruct is within an ulp of base in {shares[1]}"
    )
    return [("compared", numbers), ("drift", f"|target - base| / |base|; {_measured()}")]


def _misfits(report: FitReport) -> Iterable[str]:
    """Warnings of what the models are."""
    total, drift = report.total, report.matrix_total.relative_drift
    if not total.update:
        yield "the residual is 0: instruct and base hold the same numbers. Are they two different models?"
    if not total.drift:
        yield "the target holds the numbers of base: was it trained further?"
    if drift is not None and drift >= MEASURED[1][0]:
        at, kept = min(MEASURED, key=lambda each: abs(each[0] - drift))  # the nearest
        farther = ", and nothing is known of what lies farther" if drift > MEASURED[-1][0] else ""
        yield (
            f"the matrices of the target are {drift:.3g} of base's norm away from it. Of tiny models whose weights "
            f"were all trained, {kept:.0%} of instruct's format came back at {at:.2f}{farther}; adapters that were "
            "merged in did no such harm (examples/continual). No threshold for others follows: try the merged model, "
            "at several alphas, before you rely on it"
        )


def _rounding(report: FitReport) -> Iterable[str]:
    """A warning of what rounding to nearest would leave of alpha."""
    total, alpha = report.total, report.alpha
    effective = total.effective((alpha,))[0] if total.moved else None
    if effective is not None and alpha and abs(effective / alpha - 1) > 0.01:
        yield (
            f"rounding to nearest leaves {effective:.3g} of alpha {alpha:g}: --rounding stochastic keeps it on "
            "average, and --dtype f32 keeps all of it"
        )


def _measured() -> str:
    """What examples/continual measured."""
    shares = ", ".join(f"{kept:.0%} at {drift:.2f}" for drift, kept in MEASURED)
    return (
        f"in examples/continual (1.4 M parameters) a residual gave back {shares} of instruct's format where all "
        f"weights were trained, and {ADAPTED[1]:.0%} at {ADAPTED[0]:.2f} where adapters of rank 8 were merged in"
    )


def _sum(fits: Iterable[Fit]) -> Fit:
    total = Fit()
    for fit in fits:
        total += fit
    return total


def _grouped(tensors: Mapping[str, Fit], key: Any) -> dict[str, Fit]:
    groups: dict[str, list[Fit]] = {}
    for name, fit in tensors.items():
        groups.setdefault(key(place(name)), []).append(fit)
    return {name: _sum(fits) for name, fits in sorted(groups.items(), key=lambda each: natural(each[0]))}


def natural(text: str) -> list[tuple[int, str]]:
    """For an order in which 10 comes behind 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
