"""Whose tokenizer a merged model gets: one that has the tokens of the others, and loses none of the target."""

from __future__ import annotations

from collections.abc import Sequence

from ires_kernels.checkpoints import tokens
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.checkpoints.parents import Parent, have_same_files

_TAKE = ". --vocabulary instruct takes it all the same"
_SHOWN = 10


def fullest(givers: Sequence[Parent]) -> Parent | None:
    """The first tokenizer, or the one that has all tokens of the others where that has not."""
    if not givers or all(have_same_files(givers[0], other) for other in givers[1:]):
        return givers[0] if givers else None
    tables = [table for giver in givers if (table := giver.tokens_or_none()) is not None]
    if len(tables) < len(givers):
        return givers[0]
    everything = [table.ids.items() for table in tables]
    fuller = (giver for giver, own in zip(givers, everything, strict=True) if all(other <= own for other in everything))
    return next(fuller, givers[0])


def clashes(own: Parent, giver: Parent, base: Parent | None, vocabulary: str | None, said: list[str]) -> bool:
    """Whether the giver's tokenizer would lose tokens of the target; says so, and where nobody can tell."""
    if not own.vocabulary or have_same_files(own, giver):
        return False
    if not giver.vocabulary:
        said.append(f"{giver.role} has settings of a tokenizer and no vocabulary: the target keeps its tokenizer")
        return True
    try:
        mine, theirs = own.tokens, giver.tokens
    except CheckpointError as error:
        said.append(f"the tokens of target and {giver.role} cannot be compared, whose tokenizer is taken: {error}")
        return False
    known = giver.renamed if base is None else base.tokens_or_none()
    lost = tokens.lost(mine, theirs, known)
    if not lost:
        return False
    there = theirs.at(mine.ids[token] for token in lost)
    names = [
        f"{mine.ids[token]} {brief(token)}"
        + (f" ({brief(there[mine.ids[token]])} in {giver.role})" if mine.ids[token] in there else "")
        for token in lost[:_SHOWN]
    ]
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    if vocabulary == "instruct":
        said.append(
            f"{len(lost)} tokens of the target are lost, for {giver.role} lacks them or has them at other ids: "
            f"{', '.join(names)}{more}"
        )
        return False
    said.append(
        f"the target keeps its tokenizer, for that of {giver.role} lacks {len(lost)} of its tokens or has them at "
        f"other ids: {', '.join(names)}{more}"
        + (". Rows are merged by number, whatever token they belong to" if vocabulary == "rows" else _TAKE)
    )
    return True
