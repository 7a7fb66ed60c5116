"""Results go to stdout, what went wrong to stderr; both may be closed, full, or a pipe that ends."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO

from ires_kernels.files.plain import plain_lines


class NotPrinted(OSError):
    """The result of a command could not be printed."""


def say(text: str) -> None:
    """Print a result. Raises NotPrinted where that fails, but not where whoever reads it has seen enough."""
    try:
        print(plain_lines(*text.split("\n")), flush=True)
    except BrokenPipeError:
        mute(sys.stdout)
    except OSError as error:
        mute(sys.stdout)
        raise NotPrinted(error.errno, error.strerror) from error


def fail(code: int, *lines: str) -> int:
    try:
        text = "\n".join([f"ires: {lines[0]}", *filter(None, lines[1:])])
        print(plain_lines(*text.split("\n")), file=sys.stderr, flush=True)
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
