"""Text for people with names from strangers in it: what would steer a terminal is shown, and not done.

A name may hold the sequences by which a terminal erases and recolours, a line break after which a sentence of ours
seems to begin, or marks that turn the order of letters round. Whatever is printed or raised goes through here, line by
line: a break between lines is ours, and one within a line is somebody's. JSON needs none of it: it is exact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from unicodedata import combining, east_asian_width

# C0, DEL and C1; marks of direction; separators of lines and paragraphs; halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_TITLE = re.compile(r"(?:\S+(?: \S+)*)?\s\s+(?=\S)")
_WORDS = re.compile(r"(\s*)((?:`[^`]*`|\S)+)")


def plain(line: object) -> str:
    """One line, with its control characters written as in Python: ``\\x1b`` for an escape, ``\\n`` for a line break."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), without_secrets(called(f"{line}")))


_SCHEME = r"(?:https?|ftps?|s3|gs|az):/"
_SECRET = re.compile(
    rf"({_SCHEME}/?)"  # as a path it has one slash
    rf"(?:(?:(?!{_SCHEME})[^\s/?#'\"])*@"  # a user with a password
    rf"|[^\s/?#@'\"]*:(?!\d*(?:[/?#\s'\",:]|$))(?:(?!{_SCHEME})[^\s'\"])*@)?"  # which has what should be %2F
    rf"((?:(?!{_SCHEME})[^\s?#'\"<>{{}}|\\])*)"
    rf"(?:\?(?:(?:(?!{_SCHEME})[^\s'\"<>{{}},])*[^\s'\"<>{{}},.:;)])?)?",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """A text in which addresses have no user with a password, and no query, which may be a signature."""
    return _SECRET.sub(r"\1\2", text) if ":/" in text else text


_NAMES: dict[str, str] = {}


def call(path: str, name: str) -> None:
    """Have a folder, and what is in it, called otherwise than it is: it stands in for something elsewhere."""
    _NAMES[path] = name


def called(text: str) -> str:
    """A text with the names of folders that are called otherwise."""
    for path, name in _NAMES.items():
        if path in text:
            text = text.replace(path, name)
    return text


def plain_lines(*lines: object) -> str:
    """Lines one below the other, each of them `plain`."""
    return "\n".join(map(plain, lines))


def table(rows: Sequence[tuple[str, object]]) -> str:
    """Titles in a column, and what they are of in another."""
    width = max(len(plain(title)) for title, _ in rows)
    return "\n".join(f"{plain(title):<{width}}  {plain(text)}" for title, text in rows)


def several(count: int, noun: str) -> str:
    """A number of things: 1 tensor, 2 tensors."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def size(count: float) -> str:
    """Bytes for people, in powers of 1000 as disks and networks are sold."""
    name, factor = unit(count)
    return f"{count / factor:.3g} {name}"


def unit(count: float) -> tuple[str, int]:
    """The unit in which so many bytes are told, and how many it has."""
    names = ("B", "kB", "MB", "GB", "TB")
    power = next((power for power in range(4) if count < 1000 ** (power + 1)), 4)
    return names[power], 1000**power


def folded(line: str, width: int) -> str:
    """A line as one or several of at most so many columns, broken between words; the text of a `table` stays in its
    column. What stands in backticks is to be copied, and stays together, as does a word that is longer than a line.
    """
    if _columns(line) <= width:
        return line
    title = _TITLE.match(line)
    if title is not None and len(title[0]) > width // 2:  # blanks in a sentence, and no column
        title = None
    indent = len(title[0]) if title else 2
    lines, at = [line[: title.end()] if title else ""], title.end() if title else 0
    blank = True  # nothing but a title is in this line
    for space, word in _WORDS.findall(line[at:]):
        if not blank and _columns(lines[-1] + space + word) > width:
            lines.append(" " * indent + word)
        else:
            lines[-1] += space + word
        blank = False
    return "\n".join(lines)


def _columns(text: str) -> int:
    """How many columns of a terminal it takes."""
    if text.isascii():
        return len(text)
    return sum(2 if east_asian_width(letter) in "WF" else not combining(letter) for letter in text)


class Refused(ValueError):
    """What cannot be used or done, and why: a line for each argument."""

    def __init__(self, *lines: object) -> None:
        self.lines = tuple(map(plain, lines))
        super().__init__("\n".join(self.lines))
