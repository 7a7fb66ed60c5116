"""Residuals that are written as sums: what is added to a model, as factors and where each residual is."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from ires_kernels.checkpoints.header import brief
from ires_kernels.planning.inputs import Pair, StrPath
from ires_kernels.planning.rules import ArgumentError

Term = tuple[float, StrPath | Pair]


@dataclass(frozen=True)
class Sum:
    """A sum of residuals with factors, of which nothing is computed before it is added to a model.

    Then the factor of each residual is its own, times the alpha that is asked for, and the sum is rounded once.
    """

    terms: tuple[Term, ...]
    """Factors, and the folder of a residual or the pair of models (instruct, base)."""

    def __mul__(self, factor: float) -> Self:
        return replace(self, terms=tuple((_product(factor, known), source) for known, source in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Self:
        return self * (1 / divisor)

    def __neg__(self) -> Self:
        return self * -1.0

    def __add__(self, other: Sum) -> Self:
        if not isinstance(other, Sum):
            return NotImplemented
        terms: dict[object, Term] = {}
        for factor, source in (*self.terms, *other.terms):
            key = tuple(map(str, source)) if isinstance(source, tuple) else str(source)
            before = terms[key][0] if key in terms else 0.0
            terms[key] = before + factor, source
        return replace(self, terms=tuple(terms.values()))

    def __sub__(self, other: Sum) -> Self:
        return self + -other if isinstance(other, Sum) else NotImplemented


def written_out(residual: Any, alpha: Any, alphas: Any) -> tuple[Any, Any, Any]:
    """What is added and its factors, with paths and pairs in place of sums; what has none stays what it is.

    Raises ArgumentError where there are not as many factors as residuals.
    """
    given = list(residual) if isinstance(residual, (list, tuple)) else [residual]
    if not any(isinstance(each, Sum) for each in given):
        return residual, alpha, alphas
    own = [each.terms if isinstance(each, Sum) else ((1.0, each),) for each in given]
    sources = [source for terms in own for _, source in terms]
    entries = alphas.items() if isinstance(alphas, Mapping) else alphas
    if not isinstance(entries, Iterable) or isinstance(entries, str):
        return sources, alpha, alphas  # which is refused where rules are made
    rules = [
        (entry[0], _times(entry[1], own)) if isinstance(entry, (list, tuple)) and len(entry) == 2 else entry
        for entry in entries
    ]
    what = sources[0] if len(sources) == 1 else sources
    return what, _times(alpha, own), rules


def _times(value: Any, own: Sequence[Sequence[Term]]) -> Any:
    """The factors of all terms, where `value` is one for all sums or one for each."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if several else [value] * len(own)
    if len(values) != len(own):
        raise ArgumentError(f"alpha: got {len(values)} factors for {len(own)} residuals; give one for each, or one.")
    found = []
    for each, terms in zip(values, own, strict=True):
        if isinstance(each, bool) or not isinstance(each, numbers.Real):
            return value  # which is refused where rules are made
        found += [float(each) * factor for factor, _ in terms]
    return found if len(found) > 1 else found[0]


def _product(factor: object, known: float) -> float:
    if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
        raise TypeError(f"a residual is multiplied by numbers, got {type(factor).__name__} {brief(factor)}")
    product = float(factor) * known
    if not math.isfinite(product):
        raise ArgumentError(f"the factor of a residual would be {product}, wanted a finite number.")
    return product
