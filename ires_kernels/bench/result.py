"""What a run of contenders gave: one form for kernels, merges, mapped models and other tools, and the same in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ires_kernels.bench.measure import Quartiles, Times, ratio


class Goal(NamedTuple):
    """A contender that is held against another one, what is wanted of it, and what to reach for."""

    contender: str
    other: str
    wanted: float | None = None
    reach: float | None = None


class Comparison(NamedTuple):
    """What was measured of a goal or of another number; it informs, and is no verdict."""

    what: str
    measured: Quartiles
    wanted: float | None = None
    reach: float | None = None
    at_most: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The comparison in JSON types."""
        return {**self._asdict(), "measured": self.measured.to_dict()}


@dataclass
class Result:
    """Contenders that took turns at the same work."""

    what: str
    """The work, in words."""
    facts: dict[str, Any]
    """The work, in JSON types."""
    times: Times
    traffic: Mapping[str, int]
    """Contender → bytes it reads and writes, where they are counted."""
    by: Literal["speed", "time"]
    """What a ratio is of: bytes a second, of which more is better, or seconds, of which fewer are."""
    yardsticks: Sequence[str]
    """The contenders that all of them are held against."""
    goals: Sequence[Goal] = ()
    numbers: Sequence[Comparison] = ()
    """What was measured beside the seconds."""
    notes: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Contender → what else is known of it, in JSON types."""
    unavailable: Mapping[str, str] = field(default_factory=dict)
    """Contender → why it could not run."""

    def median(self, name: str) -> float:
        """The median of a contender's seconds."""
        return Quartiles.of(self.times[name]).median

    def gb_per_second(self, name: str) -> float | None:
        """The median of what a contender reads and writes, None where that is not counted."""
        return self.traffic[name] / self.median(name) / 1e9 if name in self.traffic else None

    def ratio(self, name: str, other: str) -> Quartiles | None:
        """Speed or time as a multiple of another contender's; None where one of the two did not take part."""
        if self.by == "time":
            return ratio(self.times, name, other)
        of_time = ratio(self.times, other, name)
        return of_time and of_time.scaled(self.traffic[name] / self.traffic[other])

    def comparisons(self) -> list[Comparison]:
        """What was measured of the goals, where both took part, and the other numbers."""
        found = list(self.numbers)
        for name, other, wanted, reach in self.goals:
            measured = self.ratio(name, other)
            if measured:
                what = f"{self.what}: {name}, {self.by} / {other}"
                found.append(Comparison(what, measured, wanted, reach, self.by == "time"))
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON types."""
        contenders = {}
        for name, seconds in self.times.items():
            ratios = {other: self.ratio(name, other) for other in self.yardsticks}
            contenders[name] = {
                "seconds": seconds,
                "median_seconds": self.median(name),
                "gb_per_second": self.gb_per_second(name),
                "ratios": {other: found.to_dict() for other, found in ratios.items() if found},
                **self.notes.get(name, {}),
            }
        return {
            "what": self.what,
            **self.facts,
            "ratios_of": self.by,
            "contenders": contenders,
            "unavailable": dict(self.unavailable),
            "comparisons": [each.to_dict() for each in self.comparisons()],
        }
