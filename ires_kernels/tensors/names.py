"""What a caller calls the operands, and what kind of thing was given, for messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

_TEXT = (str, bytes)  # as a tuple: torch.compile of torch 2.6 does not know str | bytes


class Names(NamedTuple):
    """What the caller calls the operands; made into text only when a check fails."""

    op: str
    args: tuple[str, ...]  # the last one stands for all further columns
    listed: bool  # the first argument is a sequence of tensors
    many: bool = False  # the last argument is a sequence for every target; of pairs, the last two are
    pairs: bool = False  # the last two arguments take turns

    def at(self, item: int, column: int) -> str:
        """`add_: residual[3][0]`; column -1 is the tensor given as out=."""
        last = len(self.args) - 1
        arg = "out" if column < 0 else self.args[min(column, last)]
        place = f"[{item}]" if self.listed else ""
        if self.pairs and column > 0:
            arg = self.args[2 - column % 2]
            place += f"[{(column - 1) // 2}]" if self.many else ""
        elif self.many and column >= last:
            place += f"[{column - last}]"
        return f"{self.op}: {arg}{place}"


def is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it is a sequence of things, which a text is not."""
    return isinstance(value, Sequence) and not isinstance(value, _TEXT)


def first_of(names: Names, item: int) -> str:
    """The first operand of an item, without the operation."""
    return names.at(item, 0).split()[-1]


def kind_of(value: Any) -> str:
    """What was given, in a sentence that says what was wanted."""
    return "None" if value is None else f"of type {type(value).__name__}"
