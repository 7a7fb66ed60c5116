"""Results go to stdout, what went wrong to stderr; both may be closed, full, or a pipe that ends."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import suppress
from typing import TextIO

from ires_kernels.files.plain import folded, plain_lines

_WARNING = re.compile(r"^warning(?=  )(?:.*\S)?(?:\n +\S.*)*", re.MULTILINE)
"""The line of a table, with those that it was folded into."""


class NotPrinted(OSError):
    """The result of a command could not be printed."""


def say(text: str) -> None:
    """Print a result as it is. Raises NotPrinted where that fails, but not where whoever reads it has seen enough."""
    _print(plain_lines(*text.split("\n")))


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        mute(sys.stdout)
    except OSError as error:
        mute(sys.stdout)
        raise NotPrinted(error.errno, error.strerror) from error


def tell(text: str) -> None:
    """Print a result for people: in lines as long as the terminal is wide, with warnings in colour. Raises as `say`."""
    _print(_for_people(text, sys.stdout))


def fail(code: int, *lines: str) -> int:
    try:
        text = "\n".join([f"ires: {lines[0]}", *filter(None, lines[1:])])
        print(_for_people(text, sys.stderr), file=sys.stderr, flush=True)
    except OSError:  # the exit code still tells
        mute(sys.stderr)
    return code


def open_streams() -> None:
    """Let what was closed lead nowhere: the next file to be opened would get its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        stream = getattr(sys, name)
        if mode == "w" and isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a letter gets its number
            stream.reconfigure(errors="backslashreplace")


def flush(code: int) -> int:
    """Bring out what argparse or a library has printed, or drop it, for Python would exit with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            mute(stream)
        except OSError as error:
            mute(stream)
            if stream is sys.stdout and not code:
                code = fail(3, f"standard output: {error.strerror}.")
    return code


def mute(stream: TextIO) -> None:
    """What is written to a stream from now on, and what it has not brought out yet, leads nowhere."""
    with suppress(io.UnsupportedOperation):  # it is in memory
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _for_people(text: str, stream: TextIO) -> str:
    lines, width = plain_lines(*text.split("\n")), _width(stream)
    if width is not None:
        lines = "\n".join(folded(line, width) for line in lines.split("\n"))
    return _WARNING.sub("\x1b[33m\\g<0>\x1b[0m", lines) if _is_coloured(stream) else lines


def _width(stream: TextIO) -> int | None:
    """Columns of a terminal, or those that COLUMNS asks for; None: lines may have any length."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):  # no terminal, or no file at all
        return None


def _is_coloured(stream: TextIO) -> bool:
    """Whether there is a terminal with colours, and nobody who wants none (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
