"""Signals that ask a command to end."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from ires_kernels.files import interrupts

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


class Stopped(KeyboardInterrupt):
    """A signal that asks to end in order, Ctrl-C among them."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Once:
    """The handler of signals that ask to end: the first one raises Stopped. What follows brings things in order."""

    def __init__(self) -> None:
        self._raised = False
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def __call__(self, number: int, _: FrameType | None) -> None:
        if not self._raised:
            self._raised = True
            raise Stopped(number)

    def take_over(self) -> None:
        """Handle the signals that nobody ignores or handles otherwise."""
        interrupts.keep(None)
        sys.unraisablehook = self._keep
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = before
                    signal.signal(number, self)

    def pass_over(self) -> None:
        """Raise nothing any more: the command has ended, and what it has told is how."""
        self._raised = True

    def _keep(self, what: UnraisableHookArgs, /) -> None:
        """The signal came while a finaliser ran: it is not to be lost with what that raised."""
        if isinstance(what.exc_value, Stopped):
            interrupts.keep(what.exc_value)
        else:
            self._hook(what)

    def give_back(self) -> None:
        """Leave them to who had them before."""
        sys.unraisablehook = self._hook
        for number, before in self._before.items():
            signal.signal(number, before)
