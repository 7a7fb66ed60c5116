"""The same tokens in another order: where another model has the row of each token, and whether its values agree."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass

from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import brief
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.checkpoints.tokens import Tokens
from ires_kernels.planning.evidence import RUN, Likeness, Looks, likeness, through

OTHERS = 0.05
"""Of the tokens of a vocabulary, how many at ids where another has other tokens make it another vocabulary."""
_SAMPLED = 16  # rows that are compared
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Order:
    """How the tokens of a model lie in its vocabulary, seen from another's.

    Tokens that were added to one of the two vocabularies do not count: they may be anywhere behind.
    """

    words: int
    """The tokens of its vocabulary."""
    other: dict[int, str]
    """Those at ids where the other model has another token."""
    moved: dict[int, int]
    """Those of them that it has elsewhere, and where."""

    @classmethod
    def of(cls, theirs: Tokens, mine: Tokens) -> Order:
        """The tokens `theirs`, seen from `mine`."""
        apart = {id_: t for t, id_ in theirs.ids.items() - mine.ids.items() if t not in theirs.added}
        other = {id_: apart[id_] for id_ in mine.at(apart)}
        moved = {id_: mine.ids[token] for id_, token in other.items() if token in mine.ids and token not in mine.added}
        return cls(len(theirs.ids) - len(theirs.added & theirs.ids.keys()), other, moved)

    @property
    def is_same(self) -> bool:
        """Whether the two have one vocabulary."""
        return not self.moved and len(self.other) <= OTHERS * self.words

    def likeness(
        self,
        inputs: Mapping[str, Checkpoint],
        roles: tuple[str, str],
        refs: Mapping[str, Ref],
        without: Container[int] = (),
    ) -> Likeness | None:
        """Compare rows of the same tokens in two models, the one with this order first; None where nothing is known.

        A residual has none, but what it knows of its base, which is `without` some of the rows.
        """
        role, own = roles
        theirs, mine = refs[role], refs[own]
        width = math.prod(theirs.shape[1:])
        with Looks(inputs) as looks:
            pairs = [pair for pair in self.moved.items() if pair[0] < theirs.shape[0] and pair[1] < mine.shape[0]]
            if inputs[role].kind == "residual":
                pairs = [pair for pair in pairs if pair[0] not in without]
                sample = looks.of(role, theirs)
            else:
                pairs = pairs[:: max(1, len(pairs) // _SAMPLED)]
                sample = looks.at(role, theirs, tuple((row * width, min(width, RUN)) for row, _ in pairs))
            if sample is None:
                return None
            values, runs = through(sample, [(row * width, width, other * width) for row, other in pairs])
            found = looks.at(own, mine, runs) if runs else None
            return None if found is None else likeness(values, found.values)


def listed(found: Mapping[int, str] | Collection[tuple[int, str]]) -> str:
    """Ids with their tokens, the first of them."""
    pairs = sorted(found.items() if isinstance(found, Mapping) else found)
    more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
    return ", ".join(f"{id_} {brief(token)}" for id_, token in pairs[:_SHOWN]) + more
