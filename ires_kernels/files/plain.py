"""Text for people with names from strangers in it: what would steer a terminal is shown, and not done.

A name may hold the sequences by which a terminal erases and recolours, a line break after which a sentence of ours
seems to begin, or marks that turn the order of letters round. Whatever is printed or raised goes through here, line by
line: a break between lines is ours, and one within a line is somebody's. JSON needs none of it: it is exact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# C0, DEL and C1; marks of direction; separators of lines and paragraphs; halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(line: object) -> str:
    """One line, with its control characters written as in Python: ``\\x1b`` for an escape, ``\\n`` for a line break."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), f"{line}")


def plain_lines(*lines: object) -> str:
    """Lines one below the other, each of them `plain`."""
    return "\n".join(map(plain, lines))


def table(rows: Sequence[tuple[str, object]]) -> str:
    """Titles in a column, and what they are of in another."""
    width = max(len(plain(title)) for title, _ in rows)
    return "\n".join(f"{plain(title):<{width}}  {plain(text)}" for title, text in rows)


class Refused(ValueError):
    """What cannot be used or done, and why: a line for each argument."""

    def __init__(self, *lines: object) -> None:
        self.lines = tuple(map(plain, lines))
        super().__init__("\n".join(self.lines))
