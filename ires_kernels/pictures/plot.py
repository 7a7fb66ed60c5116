"""Pictures for --plot. Only this room and the bench import matplotlib, and only when a picture is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ires_kernels.files.plain import plain
from ires_kernels.pictures import grid
from ires_kernels.pictures.grid import Grid
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.records.fit import FitReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")


def check(path: str | os.PathLike[str]) -> None:
    """Refuse what cannot be drawn, before anything is read."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"{path}: wanted a name that ends with {' or '.join(SUFFIXES)}.")
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"{path}: its folder is not there. Make it first.")
    if find_spec("matplotlib") is None:
        raise ArgumentError(
            "--plot needs matplotlib: pip install 'ires_kernels[plot]', or --html, which needs nothing."
        )


def compared(report: FitReport, path: str | os.PathLike[str]) -> None:
    """Heat maps of a comparison, what rounding leaves of alpha, and how many ulps instruct has changed."""
    grids = {title: grid.of_report(report, name) for name, (title, _) in grid.FIGURES.items()}
    first = next(iter(grids.values()))
    figure = _figure(first, rows=3)
    axes = figure.subplots(3, 2, height_ratios=[_height(first), _height(first), 3.0])
    for ax, (title, each) in zip(axes.flat, grids.items(), strict=False):
        _map(figure, ax, each, title)
    _curve(axes[2][0], report)
    _histogram(axes[2][1], report)
    figure.suptitle(
        plain(f"{report.paths['target']} with {report.paths['instruct']} − {report.paths['base']}"), fontsize=9
    )
    _save(figure, path)


def inspected(table: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Where the parameters of a model are."""
    each = grid.of_inspected(table)
    figure = _figure(each, rows=1, columns=1)
    _map(figure, figure.subplots(), each, "parameters")
    figure.suptitle(plain(table["path"]), fontsize=9)
    _save(figure, path)


def profiled(each: Grid, title: str, path: str | os.PathLike[str]) -> None:
    """One map with a title, of what was added to a model."""
    figure = _figure(each, rows=1, columns=1)
    _map(figure, figure.subplots(), each, title)
    _save(figure, path)


def _figure(each: Grid, *, rows: int, columns: int = 2) -> Figure:
    from matplotlib.figure import Figure

    maps = max(1, rows - 1)
    height = maps * _height(each) + (3.0 if rows > 1 else 0.0) + 0.5
    return Figure(figsize=(columns * max(5.0, 0.32 * len(each.kinds) + 2.5), height), layout="constrained")


def _height(each: Grid) -> float:
    return min(2.6 + 0.2 * len(each.layers), 24.0)


def _map(figure: Figure, ax: Axes, each: Grid, title: str) -> None:
    values = [[float("nan") if value is None else value for value in row] for row in each.rows]
    two_sided = any(value is not None and value < 0 for row in each.rows for value in row)
    limits = {"vmin": -each.largest, "vmax": each.largest, "cmap": "RdBu_r"} if two_sided else {"vmin": 0.0}
    image = ax.imshow(values, aspect="auto", interpolation="nearest", **limits)
    ax.set_xticks(range(len(each.kinds)), [_literal(kind) for kind in each.kinds], rotation=90, fontsize=6)
    ax.set_yticks(range(len(each.layers)), [_literal(layer) for layer in each.layers], fontsize=6)
    ax.set_title(title, loc="left", fontsize=9)
    figure.colorbar(image, ax=ax)


def _curve(ax: Axes, report: FitReport) -> None:
    """Effective alpha over the alpha asked for."""
    points = sorted(dict(zip(report.alphas, report.total.effective(report.alphas), strict=True)).items())
    known = [(alpha, effective / alpha) for alpha, effective in points if effective is not None and alpha]
    ax.axhline(1.0, color="black", lw=0.6)
    ax.plot([alpha for alpha, _ in known], [share for _, share in known], "o-")
    ax.set_xlabel("alpha asked for", fontsize=8)
    ax.set_title("effective alpha / alpha, to nearest", loc="left", fontsize=9)


def _histogram(ax: Axes, report: FitReport) -> None:
    bins = report.total.histogram()
    ax.bar(range(len(bins)), [count / max(1, report.total.elements) for _, count in bins])
    ax.set_xticks(range(len(bins)), [label for label, _ in bins], fontsize=7)
    ax.set_xlabel("ulps from base to instruct", fontsize=8)
    ax.set_title("share of weights", loc="left", fontsize=9)


def _literal(text: str) -> str:
    """Text that matplotlib takes as it is: a dollar begins a formula."""
    return plain(text).replace("$", r"\$")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Whole or not at all, and the same bytes for the same numbers."""
    from matplotlib import rc_context

    path = Path(path)
    suffix = path.suffix.lower()
    temporary = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        with rc_context({"svg.hashsalt": "ires_kernels"}):
            figure.savefig(temporary, dpi=130, metadata={"Date": None} if suffix == ".svg" else {"Software": None})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
