"""Which rows of which models make the rows of a tensor that has one for each token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Deed = Literal["added", "taken", "kept"]
Rows = tuple[int, int]
"""The first of some rows that follow each other, and how many."""
Orders = Mapping[str, Mapping[int, int]]
"""By role, where a model with another order has each row; of the others it is in the same place."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of an output that follow each other and are made alike."""

    first: int
    count: int
    deed: Deed
    rows: dict[str, tuple[Rows, ...]]
    """What they are made of, by role: as many rows as these, in their order."""


@dataclass(frozen=True, slots=True)
class Split:
    """What the rows of a tensor are made of."""

    rows: int
    """Of the output."""
    pieces: tuple[Piece, ...]

    def count(self, deed: Deed) -> int:
        """To how many rows this is done."""
        return sum(piece.count for piece in self.pieces if piece.deed == deed)

    def is_plain(self, counts: Mapping[str, int]) -> bool:
        """Whether all of it is made alike, out of all of the tensors."""
        whole = {role: ((0, count),) for role, count in counts.items()}
        return [(piece.deed, piece.rows) for piece in self.pieces] == [("added", whole)]


@dataclass(frozen=True, slots=True)
class Donor:
    """A model whose rows are added to those of the target: instruct or a residual, or one of several."""

    role: str
    rows: int
    base: int
    """How many rows its base has."""
    new: Mapping[int, str]
    """Its tokens whose rows are taken as they are, by id."""
    apart: AbstractSet[int]
    """Its rows that are no difference, or cannot be made one; those of `new` are among them."""
    lost: AbstractSet[int]
    """Ids of tokens of the target that it does not have there."""
    subtracted: str = ""
    """The role of its base, if that is subtracted on the way."""


def of_difference(counts: Mapping[str, int], new: Collection[int], orders: Orders) -> Split:
    """The rows of a residual: instruct's own for its new tokens, and for those that base does not have."""

    def made(row: int) -> tuple[Deed, dict[str, int]]:
        there = _place(orders, "base", row)
        if row in new or not 0 <= there < counts["base"]:
            return "taken", {"instruct": row}
        return "added", {"instruct": row, "base": there}

    return _split(made, counts["instruct"], [counts["base"], *_edges(new)], orders)


def of_merge(counts: Mapping[str, int], donors: Sequence[Donor], rows: int, orders: Orders) -> Split:
    """The rows of a merged tensor, of which there are to be so many."""

    def made(row: int) -> tuple[Deed, dict[str, int]]:
        exists = row < counts["target"]
        added: dict[str, int] = {}
        for donor in donors:
            there = _place(orders, donor.role, row)
            if not 0 <= there < donor.rows or (exists and row in donor.lost):
                continue
            if there in donor.new or not exists:
                return "taken", {donor.role: there}
            if there in donor.apart:
                continue
            below = _place(orders, donor.subtracted, row) if donor.subtracted else -1
            if donor.subtracted and 0 <= below < counts[donor.subtracted]:
                added |= {donor.role: there, donor.subtracted: below}
            elif not donor.subtracted:
                added[donor.role] = there
        return ("added", {"target": row, **added}) if added else ("kept", {"target": row})

    edges = [edge for donor in donors for ids in (donor.new, donor.apart, donor.lost) for edge in _edges(ids)]
    return _split(made, rows, [*counts.values(), *edges], orders)


def _place(orders: Orders, role: str, row: int) -> int:
    return orders[role].get(row, -1) if role in orders else row


def _edges(ids: Collection[int]) -> Iterator[int]:
    """Where what is done to rows may change, as some are among `ids` and others not."""
    for id_ in ids:
        yield from (id_, id_ + 1)


def _split(
    made: Callable[[int], tuple[Deed, dict[str, int]]], rows: int, edges: Iterable[int], orders: Orders
) -> Split:
    """Ask of one row in each stretch without an edge, and join what is made alike."""
    places = range(rows + 1) if orders else sorted({0, rows, *(edge for edge in edges if edge < rows)})
    pieces: list[tuple[int, Deed, dict[str, list[Rows]]]] = []
    for first, end in pairwise(places):
        deed, there = made(first)
        if not pieces or pieces[-1][1] != deed or [*pieces[-1][2]] != [*there]:
            pieces.append((first, deed, {role: [] for role in there}))
        for role, runs in pieces[-1][2].items():
            if runs and sum(runs[-1]) == there[role]:
                runs[-1] = runs[-1][0], runs[-1][1] + end - first
            else:
                runs.append((there[role], end - first))
    ends = [*(first for first, _, _ in pieces[1:]), rows]
    return Split(
        rows,
        tuple(
            Piece(first, end - first, deed, {role: tuple(found) for role, found in runs.items()})
            for (first, deed, runs), end in zip(pieces, ends, strict=True)
        ),
    )
