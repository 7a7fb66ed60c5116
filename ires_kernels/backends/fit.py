"""How two updates of one base, target - base and instruct - base, fit together, as sums. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

STEPS = 8
"""Of `Fit.within`."""


@dataclass(slots=True)
class Fit:
    """What was counted and summed; ``+=`` joins two.

    Differences are taken as merges take them, products and sums of these in float64.
    """

    elements: int = 0
    """Whose three values are finite. All else is of these."""
    both: int = 0
    """target - base and instruct - base are not 0."""
    conflicts: int = 0
    """Of those, the two have different signs."""
    within: list[int] = field(default_factory=lambda: [0] * STEPS)
    """From base to instruct it is at most 2^k - 1 ulps: steps of the type that the target is stored in."""
    base: float = 0.0
    """Sum of base^2."""
    drift: float = 0.0
    """Sum of (target - base)^2."""
    update: float = 0.0
    """Sum of (instruct - base)^2."""
    cross: float = 0.0
    """Sum of (target - base) * (instruct - base)."""
    moved: list[float] = field(default_factory=list)
    """By alpha, sum of (stored - target) * (instruct - base): of what rounding to nearest leaves of the update."""
    exact: float = 0.0
    """The part of `update` that `moved` is of: not that of weights that are stored as codes."""

    def __iadd__(self, other: Fit) -> Fit:
        for name in ("elements", "both", "conflicts", "base", "drift", "update", "cross", "exact"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.within = [a + b for a, b in zip(self.within, other.within, strict=True)]
        if other.moved:
            self.moved = [a + b for a, b in zip(self.moved or [0.0] * len(other.moved), other.moved, strict=True)]
        return self

    @property
    def relative_drift(self) -> float | None:
        """||target - base|| / ||base||."""
        return _root(self.drift, self.base)

    @property
    def relative_size(self) -> float | None:
        """||instruct - base|| / ||base||."""
        return _root(self.update, self.base)

    @property
    def cosine(self) -> float | None:
        """Of the two updates."""
        norm = math.sqrt(self.drift) * math.sqrt(self.update)
        return _finite(self.cross / norm) if norm else None

    @property
    def conflict_share(self) -> float | None:
        """Of the elements that both updates change, those that they change in different directions."""
        return self.conflicts / self.both if self.both else None

    @property
    def small_share(self) -> float | None:
        """Of all elements, those that instruct changes by an ulp at most, or not at all."""
        return self.within[1] / self.elements if self.elements else None

    def effective(self, alphas: tuple[float, ...]) -> list[float | None]:
        """What rounding leaves of each alpha; None where nothing is added, or where what is stored are codes."""
        if not self.exact:
            return [None] * len(alphas)
        return [_finite(moved / self.exact) for moved in self.moved]

    def histogram(self) -> list[tuple[str, int]]:
        """How many elements instruct changes by so many ulps."""
        counts = [self.within[0], *(b - a for a, b in zip(self.within, self.within[1:], strict=False))]
        ends = [(2 ** (k - 1), 2**k - 1) for k in range(1, STEPS)]
        labels = ["0", *(f"{low}" if low == high else f"{low}–{high}" for low, high in ends)]
        return [*zip(labels, counts, strict=True), (f"{2 ** (STEPS - 1)}+", self.elements - self.within[-1])]


def _root(square: float, other: float) -> float | None:
    return _finite(math.sqrt(square / other)) if other > 0 and math.isfinite(square) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
