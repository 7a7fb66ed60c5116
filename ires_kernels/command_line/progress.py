"""The progress bar."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ires_kernels.streaming.asked import Progress


@contextmanager
def progress_bar(arguments: argparse.Namespace, what: str) -> Iterator[Progress | None]:
    """A progress bar with bytes, speed and time left, on a terminal. It draws in the thread that does the work."""
    if arguments.quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
    drawing = [True]

    def draw(work: Callable[[], object]) -> None:
        """A terminal that goes away, or is full, is no reason to end a merge."""
        if drawing[0]:
            try:
                work()
            except Exception:
                drawing[0] = False

    task = bar.add_task(what, total=None)

    class Drawn:
        def __call__(self, done: int, todo: int) -> None:
            draw(lambda: bar.update(task, completed=done, total=todo, refresh=True))

        def tell(self, text: str) -> None:
            """What it is that is done, where that changes."""
            draw(lambda: bar.update(task, description=text))

    draw(bar.start)
    try:
        yield Drawn()
    finally:
        draw(bar.stop)
