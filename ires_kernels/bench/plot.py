"""The picture of a bench record. The only module that imports matplotlib, and only `bench --plot` imports it."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ires_kernels.bench.kernels import MEMORY
from ires_kernels.bench.merges import COPY


def draw(record: dict[str, Any], path: str) -> None:
    """Bars of speed over the memory loop's and of time over that of copying; the format follows from the suffix."""
    panels = []
    for threads in sorted({entry["threads"] for entry in record["kernels"]}):
        entries = [entry for entry in record["kernels"] if entry["threads"] == threads]
        panels.append((f"kernels, threads {threads}: speed / memory loop", "case", MEMORY, entries))
    if record["merges"]:
        panels.append(("merges: time / (cat + cp)", "what", COPY, record["merges"]))
    heights = [1 + 0.2 * sum(len(entry["contenders"]) for entry in entries) for *_, entries in panels]
    figure = Figure(figsize=(9, 1 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)
    for ax, (title, label, yardstick, entries) in zip(axes.flat, panels, strict=True):
        _bars(ax, title, entries, label, yardstick)
    machine = record["machine"]
    commit = (machine["commit"] or "unknown")[:12]
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores, commit {commit}", fontsize=9)
    figure.savefig(path, dpi=130)


def _bars(ax: Axes, title: str, entries: list[dict[str, Any]], label: str, yardstick: str) -> None:
    """One bar per entry and contender with its quartiles, contenders in the same colours throughout."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["contenders"]))
    ticks, labels, row = [], [], 0
    for entry in entries:
        first = row
        for name, contender in entry["contenders"].items():
            quartiles = contender["ratios"].get(yardstick)
            if quartiles:
                middle = quartiles["median"]
                whiskers = [[middle - quartiles["low"]], [quartiles["high"] - middle]]
                ax.barh(row, middle, xerr=whiskers, color=f"C{names.index(name) % 10}", error_kw={"lw": 1})
                row += 1
        ticks.append((first + row - 1) / 2)
        labels.append(entry[label])
        row += 1
    for i, name in enumerate(names):
        ax.barh(0, 0, color=f"C{i % 10}", label=name)
    ax.axvline(1, color="black", lw=0.8)
    ax.set_yticks(ticks, labels, fontsize=8)
    ax.invert_yaxis()
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(fontsize=7, loc="lower right")
