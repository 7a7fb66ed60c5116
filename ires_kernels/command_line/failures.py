"""What has ended a command, and what is left of it: said on stderr, with an exit code."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
from pathlib import Path

import ires_kernels as ik
from ires_kernels.checkpoints.addresses import is_address
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.command_line import run
from ires_kernels.command_line.signals import Stopped
from ires_kernels.command_line.streams import NotPrinted, fail, mute, say
from ires_kernels.files.hidden import unfinished
from ires_kernels.files.inplace import LostError
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.plain import plain
from ires_kernels.files.unfinished import is_unfinished, partial_path
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.streaming.failures import ComputeError

_WRITING = (run.extract, run.apply, run.merge, run.resume, run.finish, run.rollback)
_PATIENCE = 5.0
"""Seconds for a store to say what a command has left there: who has interrupted it is waiting."""


def explain(error: BaseException, arguments: argparse.Namespace | None) -> int:
    """Say on stderr what has ended a command, and what is left of it; returns the exit code."""
    if isinstance(error, KeyboardInterrupt) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the interrupt came first, or later, but this is what to know
    if isinstance(error, LostError):
        return fail(3, f"{error}")
    if isinstance(error, (CheckpointError, StoreError, ArgumentError)):
        if isinstance(error, CheckpointError) and error.problems and getattr(arguments, "json", False):
            try:
                say(json.dumps({"error": f"{error}", "problems": error.problems}, indent=2))
            except OSError:  # what follows still tells
                mute(sys.stdout)
        return fail(2, f"{error}", _unfinished(arguments))
    if isinstance(error, NotPrinted):
        return fail(3, f"standard output: {error.strerror}. What the command had to do is done.")
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename is not None else ""
        answers = error.errno != errno.EREMOTEIO
        return fail(3, plain(f"{place}{error.strerror or error}."), _state(arguments, answers=answers))
    if isinstance(error, ComputeError):
        return fail(3, f"{error}", _state(arguments))
    if isinstance(error, Stopped) and error.number != signal.SIGINT:
        return fail(128 + error.number, f"stopped by {signal.Signals(error.number).name}.", _state(arguments))
    if isinstance(error, KeyboardInterrupt):
        return fail(130, "interrupted.", _state(arguments))
    if not isinstance(error, Exception) or os.environ.get("IRES_DEBUG"):
        raise error
    kind = type(error).__name__
    return fail(4, f"unexpected {kind}: {plain(error)}. IRES_DEBUG=1 shows where it comes from.", _state(arguments))


def _written(arguments: argparse.Namespace | None) -> str | None:
    """What a command writes, None if it only reads."""
    if arguments is None or arguments.run not in _WRITING:
        return None
    if arguments.run in (run.resume, run.rollback):
        return f"{arguments.path}"
    path = arguments.target if getattr(arguments, "in_place", False) else arguments.out
    return None if path is None else f"{path}"


def _path(arguments: argparse.Namespace | None) -> Path | None:
    """That, where it is on this disk."""
    written = _written(arguments)
    return None if written is None or is_address(written) else Path(written)


def _elsewhere(arguments: argparse.Namespace | None) -> str:
    """That, where it is in a store."""
    written = _written(arguments)
    return plain(written) if written is not None and is_address(written) else ""


def _state_elsewhere(where: str, answers: bool) -> str:
    """What a failed merge has left in a store, and the next step."""
    if answers:
        from ires_kernels.checkpoints.objects import within  # which takes long to load, and is there by now

        try:
            with within(_PATIENCE):
                return f"{ik.status(where)}"
        except CheckpointError:
            return f"{where} was not written and nothing is left of it."
        except (OSError, ValueError):
            pass
    return f"`ires status {where}` says what is left of it; the same command goes on."


def _unfinished(arguments: argparse.Namespace | None) -> str:
    """What is unfinished there and what to do about it; nothing where nothing is."""
    path = _path(arguments)
    try:
        if path is not None and (unfinished(path) or is_unfinished(partial_path(path))):
            found = ik.status(path)
            return f"{found}" if found.state != "foreign" else ""  # the error has said that
    except (OSError, ValueError):  # what cannot be looked at cannot be told
        return f"`ires status {path}` says what is left of it."
    return ""


def _state(arguments: argparse.Namespace | None, *, answers: bool = True) -> str:
    """What a failed merge has left, and the next step.

    answers  False: what is elsewhere could not be reached, and is not asked once more
    """
    where = _elsewhere(arguments)
    if where:
        return _state_elsewhere(where, answers)
    path = _path(arguments)
    unfinished_there = _unfinished(arguments)
    if arguments is None or path is None or unfinished_there:
        return unfinished_there
    try:
        if arguments.run is run.rollback or (getattr(arguments, "in_place", False) and path.exists()):
            return f"{path} is as it was, or finished: `ires status {path}` says which."
        if path.exists():
            return f"There is something at {path}: `ires verify {path}` says whether it is the complete output."
    except OSError:
        return f"`ires status {path}` says what is left of it."
    return f"{path} was not written and nothing is left of it."
