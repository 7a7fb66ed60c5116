"""Print docs/api.md: every public name with its signature and what its docstring says.

python docs/api.py > docs/api.md
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import ires_kernels as ik

HEAD = """# All public names

Of `import ires_kernels as ik`. This page is printed by `python docs/api.py`; a test holds it to the code. The examples
are run by another: `base/`, `instruct/` and `target/` are small models of seven tensors there.
"""

NAMES = re.compile(r"([\w.]+(?:, [\w.]+)*) +(.*)")

ROOMS = {
    "Tensors": "subtract add add_ scale scale_ add_difference add_difference_ Tally",
    "Checkpoints": "extract apply merge load weights compare inspect verify",
    "After an interruption": "status resume finish rollback",
    "For others": "publish sha256",
    "Models in memory, and residuals as values": "mapped apply_ Residual",
    "What is there": "backends BackendStatus",
}


def main() -> None:
    """Print the page."""
    print(HEAD)
    listed = {name for names in ROOMS.values() for name in names.split()}
    rooms = {**ROOMS, "Others": " ".join(name for name in ik.__all__ if name not in listed)}
    for title, names in rooms.items():
        if names:
            print(f"## {title}\n")
        for name in names.split():
            for heading, thing in _things(name):
                print(f"### {heading}\n")
                print("\n".join(_page(heading, thing)))


def _things(name: str) -> Iterator[tuple[str, Any]]:
    """A public name, and the documented names in it if it is a class with methods of its own."""
    thing = getattr(ik, name)
    yield name, thing
    if inspect.isclass(thing):
        for key, member in vars(thing).items():
            function = getattr(thing, key) if isinstance(member, (classmethod, staticmethod)) else member
            if (
                not key.startswith("_")
                and getattr(function, "__doc__", None)
                and key not in getattr(thing, "_fields", ())
            ):
                yield f"{name}.{key}", function


def _page(heading: str, thing: Any) -> Iterator[str]:
    if callable(thing):
        yield "```python"
        yield _signature(heading, thing)
        yield "```\n"
    for paragraph in inspect.cleandoc(thing.__doc__ or "").split("\n\n"):
        lines = textwrap.dedent(paragraph).splitlines()
        if lines and lines[0].startswith(">>>"):
            yield "\n".join(["```pycon", *lines, "```\n"])
        elif any(re.match(r"[\w.]+ {2,}\S", line) for line in lines):
            yield _arguments(lines) + "\n"
        else:
            yield _plain(" ".join(lines)) + "\n"


def _signature(heading: str, thing: Any) -> str:
    signature = inspect.signature(thing)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    words = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        words.append(re.sub(r": (?:ForwardRef\()?'(.*?)'\)?(?= =|$)", r": \1", f"{parameter}"))
    back = signature.return_annotation
    arrow = f" -> {back}" if isinstance(back, str) and isinstance(thing, FunctionType) else ""
    line = f"{heading}({', '.join(words)}){arrow}"
    if len(line) <= 120:
        return line
    return "\n".join([f"{heading}(", *(f"    {word}," for word in words), f"){arrow}"])


def _arguments(lines: list[str]) -> str:
    """A table of names and what they mean, whose lines are broken and indented."""
    entries: list[list[str]] = []
    for line in lines:
        entry = None if line.startswith(" ") else NAMES.match(line)
        if entry:
            entries.append([f"- `{entry[1]}`:", entry[2]])
        else:
            entries[-1].append(line.strip())
    return "\n".join(_plain(" ".join(entry)) for entry in entries)


def _plain(text: str) -> str:
    """Angle brackets and stars are characters, but in code they are that anyway."""
    return re.sub(r"(`+).*?\1|[<>*]", lambda found: found[0] if found[1] else f"\\{found[0]}", text)


if __name__ == "__main__":
    main()
