"""Signals while bytes are on their way: what their handlers raise is kept until the work can end in order.

Ctrl-C raises KeyboardInterrupt between any two instructions of the main thread: also while it waits for the threads
that still write, while it cleans up, and again while it handles the first one. So for as long as a region is entered
every signal that has a handler in Python is answered by calling that handler, and what this raises is kept. `check`
raises it, where whoever calls it can stop; at the latest it is raised when the region is left, as everything is in
order. More signals change nothing on the way. Handlers that do not raise do what they always do, at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import wraps
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_entered: _Region | None = None
"""Of the main thread, as no other one runs handlers of signals."""
_dropped: BaseException | None = None
"""What was raised outside of a region, and Python has dropped."""


def held() -> _Region:
    """A context in which signals raise nothing but from `check`, in the main thread; in others it does nothing.

    One within another is part of it. Afterwards all handlers are those that there were before.
    """
    return _Region()


def uninterrupted(function: Callable[P, T]) -> Callable[P, T]:
    """All of a function as one such context."""

    @wraps(function)
    def inside(*arguments: P.args, **options: P.kwargs) -> T:
        with held():
            return function(*arguments, **options)

    return inside


def check() -> None:
    """Raise what a handler has raised in this region, once. To be called where the work can end in order."""
    global _dropped
    if threading.current_thread() is not threading.main_thread():
        return
    if _entered is not None:
        _entered.check()
    elif _dropped is not None:
        error, _dropped = _dropped, None
        raise error


def keep(error: BaseException | None) -> None:
    """Raise an error at the next `check` after all: a handler raised it where Python drops errors, as in finalisers."""
    global _dropped
    _dropped = error


class _Region:
    def __init__(self) -> None:
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._kept: BaseException | None = None
        self._raised = False

    def __enter__(self) -> None:
        global _entered, _dropped
        if _entered is not None or threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler):
                    self._before[number] = handler
                    signal.signal(number, self._handle)
        except BaseException:  # a signal has come meanwhile, and raised
            self._restore()
            raise
        _entered = self  # and not before: so far nobody would raise what was kept
        self._kept, _dropped = self._kept or _dropped, None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _entered
        if _entered is not self:
            return
        _entered = None
        self._restore()
        if self._kept is not None and not self._raised:
            raise self._kept from error

    def check(self) -> None:
        if self._kept is not None and not self._raised:
            self._raised = True
            raise self._kept

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Out of the region, as it is about to be or was just left, this is the handler that there was."""
        try:
            self._before[number](number, frame)
        except BaseException as error:
            if _entered is not self:
                raise
            self._kept = self._kept or error

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:  # and not one that was set meanwhile
                signal.signal(number, handler)
