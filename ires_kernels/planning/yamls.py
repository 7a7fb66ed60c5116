"""YAML as recipes need it: texts, lists and tables, each with its line, and nothing that could be more than it says.

Anchors, aliases and tags are refused: with them a short text can mean a huge one, itself, or code. So are a key that
stands twice, and a text that is too long or too deep to have been written for a merge.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from ires_kernels.checkpoints.header import brief
from ires_kernels.planning.rules import ArgumentError

LONGEST = 1 << 16
"""Bytes of a text."""
_DEEPEST = 16
_NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
"""What every version of YAML takes for the same number. `1e-3` is one, though YAML 1.1 calls it a text."""


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it stands. Its methods raise ArgumentError for what is not what they want."""

    where: str
    """File and line."""
    key: str
    """As `models[1].parameters.weight`; of all of it nothing."""
    text: str | None = None
    """Of a scalar."""
    is_quoted: bool = False
    items: tuple[Node, ...] | None = None
    table: dict[str, Node] | None = None

    def error(self, problem: str) -> ArgumentError:
        """An error that names file, line and key."""
        return ArgumentError(f"{self.where}: {self.key}{': ' if self.key else ''}{problem}")

    def wrong(self, wanted: str) -> ArgumentError:
        got = "a list" if self.items is not None else "a table" if self.table is not None else brief(self.text)
        return self.error(f"is {got}, wanted {wanted}.")

    @property
    def is_empty(self) -> bool:
        return self.text in ("", "~", "null") and not self.is_quoted

    @property
    def is_number(self) -> bool:
        return self.text is not None and not self.is_quoted and _NUMBER.fullmatch(self.text) is not None

    def word(self, wanted: str = "a text") -> str:
        """A scalar as it stands."""
        if self.text is None or self.is_empty:
            raise self.wrong(wanted)
        return self.text

    def number(self, wanted: str = "a number, as 0.5") -> float:
        if self.text is None or not self.is_number:
            raise self.wrong(wanted)
        return float(self.text)

    def whole(self) -> int:
        """A whole number that is not negative."""
        if self.text is None or not re.fullmatch("0|[1-9][0-9]{,19}", self.text):
            raise self.wrong("a whole number")
        return int(self.text)

    def flag(self) -> bool:
        if self.is_quoted or self.text not in ("true", "True", "false", "False"):
            raise self.wrong("true or false")
        return self.text.lower() == "true"

    def several(self, wanted: str) -> tuple[Node, ...]:
        """A list with something in it."""
        if not self.items:
            raise self.wrong(wanted)
        return self.items

    def fields(self, known: Collection[str] | None, needed: Iterable[str] = ()) -> dict[str, Node]:
        """A table of no other keys than the known ones, and with those that are needed."""
        if self.table is None:
            raise self.wrong(f"a table of {', '.join(known or ['keys and values'])}")
        for key, node in self.table.items():
            if known is not None and key not in known:
                raise node.error(f"is not supported; known here are {', '.join(known)}.")
        for key in needed:
            if key not in self.table:
                raise self.error(f"{key} is missing; wanted {', '.join(needed)}.")
        return self.table


def parse(raw: bytes, name: str) -> Node:
    """The tree of a text, which the file `name` has. Raises ArgumentError with the line."""
    import yaml

    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{name}: is no text in UTF-8 (byte {error.start}).") from None
    try:
        _check_tokens(text, name)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or f"{error}".splitlines()[0]
        raise ArgumentError(f"{name}{line}: is no YAML: {problem}.") from None
    if root is None:
        raise ArgumentError(f"{name}: is empty.")
    return _node(root, name, "")


def _check_tokens(text: str, name: str) -> None:
    """Refuse what this does not read, before anything is made of it."""
    import yaml

    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        kind = token.id
        where = f"{name}:{token.start_mark.line + 1}"
        if kind in ("<anchor>", "<alias>", "<tag>", "<directive>"):
            raise ArgumentError(f"{where}: {kind[1:-1]}s are not read. Write out what is meant.")
        depth += kind in ("[", "{", "<block sequence start>", "<block mapping start>")
        depth -= kind in ("]", "}", "<block end>")
        if depth > _DEEPEST:
            raise ArgumentError(f"{where}: is nested more than {_DEEPEST} deep.")


def _node(node: Any, name: str, key: str) -> Node:
    where = f"{name}:{node.start_mark.line + 1}"
    if node.id == "scalar":
        return Node(where, key, node.value, node.style is not None)
    if node.id == "sequence":
        return Node(where, key, items=tuple(_node(each, name, f"{key}[{i}]") for i, each in enumerate(node.value)))
    table: dict[str, Node] = {}
    for label, value in node.value:
        at = f"{name}:{label.start_mark.line + 1}"
        if label.id != "scalar":
            raise ArgumentError(f"{at}: {key}{' ' if key else ''}has a key that is no text.")
        inner = f"{key}.{label.value}" if key else label.value
        if label.value in table:
            raise ArgumentError(f"{at}: {inner}: is there twice.")
        found = _node(value, name, inner)
        table[label.value] = found if found.text is None else Node(at, inner, found.text, found.is_quoted)
    return Node(where, key, table=table)
