"""Results as tables in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ires_kernels.bench.measure import Quartiles
from ires_kernels.bench.result import Comparison, Result

Column = Callable[[Result, str], str]
"""The cell of a contender."""


def open_console(*, stderr: bool = False) -> Console:
    """A console that tables fit into, also where it is no terminal."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = 120
    return console


def print_contenders(
    console: Console, title: str, results: Sequence[Result], more: Mapping[str, Column] | None = None
) -> None:
    """A table a result, and a row a contender: seconds, speed, ratios to the yardsticks, the caller's columns."""
    more = more or {}
    for result in results:
        yardsticks = result.yardsticks
        others = (f"{result.by} / {name}" for name in yardsticks)
        table = _table(f"{title}: {result.what}", "contender", "seconds", "GB/s", *others, *more)
        for name in result.times:
            table.add_row(
                name,
                f"{result.median(name):.2f}",
                _number(result.gb_per_second(name)),
                *(_shown(result.ratio(name, other)) for other in yardsticks),
                *(column(result, name) for column in more.values()),
            )
        console.print(table)


def print_ratios(
    console: Console,
    title: str,
    results: Sequence[Result],
    ratios: Mapping[str, tuple[str, str]],
    *,
    speed_of: str | None = None,
) -> None:
    """A row a result, and a column a ratio: title → contender and other. A * marks others whose bits differ."""
    table = _table(title, "what", *([f"{speed_of} GB/s"] if speed_of else []), *ratios)
    for result in results:
        cells = [result.what]
        if speed_of:
            cells.append(_number(result.gb_per_second(speed_of) if speed_of in result.times else None))
        for name, other in ratios.values():
            mark = "*" if result.notes.get(other, {}).get("differs") else ""
            cells.append(_shown(result.ratio(name, other), mark))
        table.add_row(*cells)
    console.print(table)


def print_comparisons(console: Console, title: str, comparisons: Iterable[Comparison], *, wanted: bool) -> None:
    """What was measured, and beside it what is wanted, if asked for; nothing where nothing was compared."""
    table = _table(title, "what", *(["wanted", "reach for"] if wanted else []), "measured")
    for each in comparisons:
        sign = "≤" if each.at_most else "≥"
        gates = ("" if number is None else f"{sign} {number:g}" for number in (each.wanted, each.reach))
        table.add_row(each.what, *(gates if wanted else ()), _shown(each.measured))
    if table.rows:
        console.print(table)


def print_unavailable(console: Console, results: Iterable[Result]) -> None:
    """Which contenders could not run, why, and of which results that is true."""
    whats: dict[str, list[str]] = {}
    for result in results:
        for name, why in result.unavailable.items():
            whats.setdefault(f"not measured: {name}: {why}", []).append(result.what)
    for line, of in whats.items():
        console.print(f"{line} ({'; '.join(of)})", soft_wrap=True, markup=False)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}"


def _shown(quartiles: Quartiles | None, mark: str = "") -> str:
    """Median and quartiles, of one round the number alone."""
    if quartiles is None:
        return "–"
    if quartiles.rounds == 1:
        return f"{quartiles.median:.3g}{mark}"
    return f"{_digits(quartiles.median)}{mark} [dim]{_digits(quartiles.low)}–{_digits(quartiles.high)}[/dim]"


def _digits(x: float) -> str:
    """Three digits: what is cut at 80 columns says nothing."""
    return f"{x:.2f}" if x < 9.995 else f"{x:.1f}" if x < 99.95 else f"{x:.0f}"
