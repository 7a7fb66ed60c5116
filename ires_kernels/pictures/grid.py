"""Layers by kinds of tensors: the table behind heat maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ires_kernels.records.fit import FitReport, Place, natural, place

FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], float | None]]] = {
    "drift": ("drift |target - base| / |base|", lambda numbers: numbers["drift"]),
    "size": ("size |instruct - base| / |base|", lambda numbers: numbers["size"]),
    "cosine": ("cosine of the two", lambda numbers: numbers["cosine"]),
    "signs": ("share of signs that differ", lambda numbers: numbers["sign_conflicts"]),
}
"""What a map of a comparison shows, and what it is called."""


class Grid(NamedTuple):
    """Numbers by layer and kind; None where a layer has no such tensor, or nothing can be told."""

    layers: list[str]
    kinds: list[str]
    rows: list[list[float | None]]
    """One for each layer."""

    @property
    def largest(self) -> float:
        return max((abs(value) for row in self.rows for value in row if value is not None), default=0.0) or 1.0


def of_report(report: FitReport, figure: str) -> Grid:
    ask = FIGURES[figure][1]
    return _grid({at: ask(report.numbers(fit)) for at, fit in report.cells.items()})


def of_inspected(table: Mapping[str, Any]) -> Grid:
    """Elements of the tensors of a model, of `inspect`."""
    found: dict[Place, float | None] = {}
    for entry in table["all_tensors"]:
        at, count = place(entry["name"]), 1
        for length in entry.get("numbers", entry["shape"]):
            count *= length
        found[at] = (found.get(at) or 0) + count
    return _grid(found)


def of_updates(updates: Mapping[str, tuple[float, int]]) -> Grid:
    """Root mean squares of what was added to tensors, by their names: its norm, and of how many elements."""
    squares: dict[Place, tuple[float, int]] = {}
    for name, (norm, count) in updates.items():
        total, counted = squares.get(place(name), (0.0, 0))
        squares[place(name)] = total + norm**2, counted + count
    return _grid({at: math.sqrt(total / count) for at, (total, count) in squares.items() if count})


def _grid(cells: Mapping[Place, float | None]) -> Grid:
    """Layers in their order; what is outside of layers is a layer of that name and one kind."""
    layers = _ordered(at.layer or _OUTSIDE for at in cells)
    kinds = _ordered(at.kind for at in cells)
    at = {(each.layer or _OUTSIDE, each.kind): value for each, value in cells.items()}
    return Grid(layers, kinds, [[at.get((layer, kind)) for kind in kinds] for layer in layers])


_OUTSIDE = "(outside of layers)"


def _ordered(texts: Iterable[str]) -> list[str]:
    return sorted(set(texts), key=natural)
