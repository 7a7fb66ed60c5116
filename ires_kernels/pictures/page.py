"""A comparison as one page for --html: no script, no font, no picture from elsewhere, and nothing that loads one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from ires_kernels.backends.fit import Fit
from ires_kernels.files.plain import plain
from ires_kernels.pictures import grid
from ires_kernels.pictures.grid import Grid
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.records.fit import FitReport
from ires_kernels.version import VERSION

_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;margin:.5em 0 1.5em}
th,td{padding:.15em .6em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th:first-child,td:first-child,.text td,.text th{text-align:left}
.map td{padding:.1em .3em;min-width:4em;font-size:11px;border:1px solid #fff;text-align:center}
.map th{font-size:11px;font-weight:normal;vertical-align:bottom}
.map th.k span{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;display:inline-block}
.map th.k{text-align:center}
.wide{overflow-x:auto}.bars td:last-child{width:min(20em,45vw);text-align:left}
.bar{display:inline-block;height:.8em;background:#4878a8}
.warning{border-left:4px solid #c60;padding:.3em .8em;background:#fff6e8}
"""
_COLUMNS = ("elements", "drift", "size", "cosine", "signs", "≤ 1 ulp", "effective alpha")


def check(path: str | os.PathLike[str]) -> None:
    """Refuse a place where no page can be written, before anything is read."""
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"{path}: its folder is not there. Make it first.")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ArgumentError(f"{path}: wanted a name that ends with .html.")


def write(report: FitReport, path: str | os.PathLike[str]) -> None:
    """Write the page, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page(report), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def page(report: FitReport) -> str:
    """All of it, as text."""
    total = report.total
    curve = dict(zip(report.alphas, total.effective(report.alphas), strict=True))  # the asked one may be on it
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ires compare</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Whatever a name might smuggle in, a browser loads and runs nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<style>{_STYLE}</style></head><body><h1>Does it fit?</h1>",
        _table(("", "path"), ((role, f"{model}") for role, model in report.paths.items()), "text"),
        *(f'<p class="warning">{_text(warning)}</p>' for warning in report.warnings),
        _fits("all", report, {"all weights": total, "matrices": report.matrix_total}),
        "<h2>Ulps from base to instruct</h2>",
        _histogram(total),
        "<h2>What rounding to nearest leaves of alpha</h2>",
        _table(
            ("alpha", "effective"),
            ((f"{alpha:g}", _number(effective)) for alpha, effective in sorted(curve.items())),
        ),
        *(f"<h2>{_text(title)}</h2>{_map(grid.of_report(report, name))}" for name, (title, _) in grid.FIGURES.items()),
        "<h2>Kinds of tensors</h2>",
        _fits("kind", report, report.kinds),
        "<h2>Layers</h2>",
        _fits("layer", report, report.layers),
        "<h2>What the figures are</h2>",
        _table(("", ""), report.rows(), "text"),
        f"<p>ires_kernels {_text(VERSION)}</p></body></html>\n",
    ]
    return "\n".join(parts)


def _fits(title: str, report: FitReport, fits: Mapping[str, Fit]) -> str:
    rows = []
    for name, fit in fits.items():
        numbers = report.numbers(fit)
        keys = ("drift", "size", "cosine", "sign_conflicts", "within_an_ulp", "effective_alpha")
        rows.append((name, f"{fit.elements:,}", *(_number(numbers[key]) for key in keys)))
    return _table((title, *_COLUMNS), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    lines = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    titles = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    return f'<div class="wide"><table class="{kind}"><tr>{titles}</tr>{lines}</table></div>'


def _histogram(total: Fit) -> str:
    largest = max((count for _, count in total.histogram()), default=0) or 1
    rows = "".join(
        f"<tr><td>{_text(label)}</td><td>{count / max(1, total.elements):.1%}</td><td>"
        f'<span class="bar" style="width:{count / largest:.1%}"></span></td></tr>'
        for label, count in total.histogram()
    )
    return f'<table class="bars">{rows}</table>'


def _map(each: Grid) -> str:
    head = "".join(f'<th class="k"><span>{_text(kind)}</span></th>' for kind in each.kinds)
    rows = "".join(
        f"<tr><th>{_text(layer)}</th>" + "".join(_cell(value, each.largest) for value in row) + "</tr>"
        for layer, row in zip(each.layers, each.rows, strict=True)
    )
    return f'<div class="wide"><table class="map"><tr><th></th>{head}</tr>{rows}</table></div>'


def _cell(value: float | None, largest: float) -> str:
    if value is None:
        return "<td></td>"
    color = "72,120,168" if value >= 0 else "200,90,60"
    return f'<td style="background:rgba({color},{abs(value) / largest:.2f})">{value:.3g}</td>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _text(text: str) -> str:
    """Names come from files of strangers."""
    return escape(plain(text))
