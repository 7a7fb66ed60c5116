"""Forked children of a test: they need no second interpreter, and share nothing but what is forked."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable


def forked(run: Callable[[], object]) -> int:
    """A child of this process that does something and ends: with 0, or with 1 if it raises, and prints what. Its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which do not matter to what is done here
        child = os.fork()
    if not child:
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    return child


def end_of(child: int) -> int:
    """How a child ends: its exit code, or the signal that killed it, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ends(run: Callable[[], object]) -> int:
    """`end_of` a child that does something."""
    return end_of(forked(run))


def die() -> None:
    """Be killed."""
    os.kill(os.getpid(), signal.SIGKILL)
