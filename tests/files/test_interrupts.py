"""What handlers of signals raise is kept, raised where the work can end, and never lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_models import triple

from ires_kernels.cli import main
from ires_kernels.files import interrupts
from ires_kernels.merging import extraction

INT, ALARM = signal.SIGINT, signal.SIGALRM


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, Any]]:
    """Those that there are before; afterwards there are the same."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield before
    after = {number: signal.getsignal(number) for number in signal.valid_signals()}
    assert after == before
    assert interrupts._entered is None


def test_nothing_is_raised_but_from_a_check() -> None:
    reached = False

    def work() -> None:
        nonlocal reached
        with interrupts.held():
            signal.raise_signal(INT)
            signal.raise_signal(INT)
            reached = True
            interrupts.check()
            pytest.fail("it was to end here")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(INT)


def test_what_was_not_raised_is_at_the_end() -> None:
    done = False
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012
        signal.raise_signal(INT)
        done = True
    assert done


def test_it_is_raised_once() -> None:
    """Whoever handles it goes on; what comes meanwhile is one with it."""
    with interrupts.held():
        signal.raise_signal(INT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        signal.raise_signal(INT)
        interrupts.check()


def test_a_region_within_another_is_part_of_it() -> None:
    @interrupts.uninterrupted
    def inner() -> str:
        signal.raise_signal(INT)
        return "whole"

    found = ""
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012
        found = inner()
        assert found
    assert found == "whole"


def test_an_error_that_came_with_it_is_its_cause() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interrupts.held():  # noqa: PT012
        signal.raise_signal(INT)
        raise OSError(5, "Input/output error")
    assert isinstance(caught.value.__cause__, OSError)


def test_every_handler_in_python_is_asked_and_what_it_raises_is_kept() -> None:
    calls: list[int] = []

    class TooLong(Exception):
        pass

    def handler(number: int, _: object) -> None:
        calls.append(number)
        if number == ALARM:
            raise TooLong

    before = {number: signal.signal(number, handler) for number in (signal.SIGUSR1, ALARM)}
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interrupts.held():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
            interrupts.check()  # it has raised nothing
            assert calls == [signal.SIGUSR1]
            signal.raise_signal(ALARM)
            assert calls == [signal.SIGUSR1, ALARM]
            with pytest.raises(TooLong):
                interrupts.check()
    finally:
        signal.signal(signal.SIGTERM, ignored)
        for number, old in before.items():
            signal.signal(number, old)


def test_a_handler_that_is_set_meanwhile_stays(handlers: dict[int, Any]) -> None:
    def mine(*_: object) -> None: ...

    with interrupts.held():
        signal.signal(INT, mine)
    assert signal.getsignal(INT) is mine
    signal.signal(INT, handlers[INT])


def test_what_python_drops_is_raised_all_the_same() -> None:
    """As in a finaliser; whoever has the hook for that tells."""
    interrupts.keep(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    interrupts.check()
    interrupts.keep(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        interrupts.check()
    interrupts.check()


class Finalised:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_in_a_finaliser_ends_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, instruct, _ = triple(tmp_path)
    opened = extraction.open_inputs

    def finalising(*arguments: Any, **options: Any) -> Any:
        Finalised()
        return opened(*arguments, **options)

    monkeypatch.setattr(extraction, "open_inputs", finalising)
    assert main(["extract", f"{base}", f"{instruct}", "-o", f"{tmp_path}/out"]) == 143
    assert capsys.readouterr().err.startswith("ires: stopped by SIGTERM.\n")
    assert not (tmp_path / "out").exists()


def test_other_threads_are_left_alone() -> None:
    errors: list[BaseException] = []
    entered, go_on = threading.Event(), threading.Event()

    def work() -> None:
        try:
            with interrupts.held():
                entered.set()
                go_on.wait(10)
                interrupts.check()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    with pytest.raises(KeyboardInterrupt), interrupts.held():  # noqa: PT012
        thread.start()
        entered.wait(10)
        signal.raise_signal(INT)
        go_on.set()
        thread.join(10)
    assert errors == []
    thread = threading.Thread(target=work)
    entered.clear(), go_on.clear()
    thread.start()
    entered.wait(10)
    with pytest.raises(KeyboardInterrupt):  # at once: it is not held in this thread
        signal.raise_signal(INT)
    go_on.set()
    thread.join(10)
    assert errors == []


def test_a_signal_while_handlers_are_put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before all are there, and after the first is given back, it is as ever."""
    install = signal.signal
    for number in range(4):
        calls = iter(range(100))

        def interrupted(what: Any, handler: Any, *, calls: Any = calls, number: int = number) -> Any:
            if next(calls) == number:
                signal.raise_signal(INT)
            return install(what, handler)

        def enter() -> None:
            with interrupts.held():
                pass

        with monkeypatch.context() as patch:
            usr = install(signal.SIGUSR1, lambda *_: None)
            patch.setattr(signal, "signal", interrupted)
            with pytest.raises(KeyboardInterrupt):
                enter()
            patch.undo()
            for kind in (INT, signal.SIGUSR1):
                handler = signal.getsignal(kind)
                if getattr(handler, "__self__", None).__class__ is interrupts._Region:  # it calls the one before
                    install(kind, handler.__self__._before[kind])  # type: ignore[union-attr]
            install(signal.SIGUSR1, usr)
