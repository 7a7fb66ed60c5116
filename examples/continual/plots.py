"""Tables and plots of the results, and the table of the README: mean ± standard deviation over worlds and seeds.

python examples/continual/plots.py [RESULTS]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCORES = {
    "format B": "format",
    "format B, seen": "seen",
    "format B, held out": "held out",
    "format B, upper": "upper case",
    "knowledge B": "knowledge B",
    "both B": "both",
    "knowledge A": "knowledge A",
    "cloze B": "cloze B",
    "perplexity B": "ppl B",
    "perplexity A": "ppl A",
}
PARTS = {
    f"{score} B, {part}": f"{score}, {title}"
    for part, title in (("seen", "seen"), ("held out", "held out"), ("upper", "upper case"))
    for score in ("format", "knowledge", "both")
}
SUMMARY = {
    "format B": "format",
    "format B, seen": "seen",
    "format B, upper": "upper case",
    "knowledge B": "knowledge",
    "both B": "both",
    "both B, seen": "seen",
    "both B, upper": "upper case",
    "cloze B": "cloze",
    "perplexity B": "ppl",
}
CLAIM = {
    "base": "base",
    "instruct": "instruct",
    "cpt": "continually pre-trained base (CPT)",
    "instruct-cpt": "instruct, then CPT",
    "alpha 1, nearest": "**CPT + residual**",
    "cpt-instruct": "CPT, instruction-tuned again",
}
CONTROLS = {
    "residual of another seed": "CPT + residual of another seed",
    "residual permuted": "CPT + residual permuted",
    "residual permuted but for embeddings and head": "CPT + residual permuted but for embeddings and head",
    "Gaussian of the same norm": "CPT + Gaussian of the same norm",
    "without embeddings and head": "CPT + residual without embeddings and head",
    "instruct-cpt + residual": "instruct, then CPT, + residual",
}
PORTABILITY = {
    "alpha 1, nearest": "v1 residual on v1 CPT",
    "v1.1 residual on v1": "v1.1 residual on v1 CPT",
    "v1 residual on v1.1": "v1 residual on v1.1 CPT",
    "v1.1 residual on v1.1": "v1.1 residual on v1.1 CPT",
}
REGISTRY = {
    "registry: base": "base",
    "registry: instruct": "instruct",
    "registry: cpt-registry": "CPT on the registry",
    "registry: cpt-registry + residual": "CPT on the registry + residual",
}
RELATIVES = {
    f"ancestry: {row}": title
    for row, title in {
        "instruct": "instruct",
        "cpt": "CPT",
        "instruct-cpt": "instruct, then CPT",
        "cpt-instruct": "CPT, instruction-tuned",
        "base-v1.1": "base v1.1",
        "instruct-v1.1": "instruct v1.1",
        "cpt-v1.1": "CPT of v1.1",
        "cpt-registry": "CPT on the registry",
        "base of another seed": "base of another seed",
        "instruct of another seed": "instruct of another seed",
        "cpt of another seed": "CPT of another seed",
    }.items()
}
KINSHIP = {
    "cosine": "median cosine, sample",
    "distance": "median distance, sample",
    "whole cosine": "cosine, all weights",
    "whole distance": "distance, all weights",
    "norm ratio": "norm / norm of the base",
}
README_ROWS = (
    {row: title for row, title in CLAIM.items() if row != "base"}
    | CONTROLS
    | {row: title for row, title in PORTABILITY.items() if row.startswith("v1")}
    | {"registry: cpt-registry + residual": "CPT on a registry + residual"}
)
BEGIN, END = "<!-- written by plots.py -->\n", "<!-- end -->\n"
ALPHAS = ("0.1", "0.25", "0.5", "0.75", "1", "1.25")

Results = list[dict[str, Any]]


def read(folder: Path) -> Results:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("world-*-seed-*.json"))]


def values(results: Results, row: str, key: str) -> list[float]:
    return [run["rows"][row][key] for run in results if row in run["rows"]]


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; large numbers with fewer digits."""
    if not numbers:
        return "–"
    digits = min(digits, max(0, 3 - len(f"{max(numbers):.0f}"))) if max(numbers) >= 10 else digits
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{deviation}"


def table(results: Results, rows: Mapping[str, str], columns: Mapping[str, str]) -> list[str]:
    lines = [f"| {' | '.join(['', *columns.values(), 'runs'])} |", "|---" * (len(columns) + 2) + "|"]
    for row, title in rows.items():
        cells = [values(results, row, key) for key in columns]
        lines.append(f"| {' | '.join([title, *map(spread, cells), str(len(cells[0]))])} |")
    return [*lines, ""]


def stored_table(results: Results) -> list[str]:
    lines = ["| residual in | bytes | base + r is instruct | format | knowledge B | runs |", "|---" * 6 + "|"]
    for dtype in ("f32", "bf16", "f16"):
        row = f"stored {dtype}"
        sizes = values(results, row, "residual bytes")
        if sizes:
            cells = [f"{round(statistics.mean(sizes)):,}", spread(values(results, row, "restored"), 6)]
            cells += [spread(values(results, row, key)) for key in ("format B", "knowledge B")]
            lines.append(f"| {' | '.join([dtype, *cells, str(len(sizes))])} |")
    return [*lines, ""]


def rounding_table(results: Results) -> list[str]:
    titles = ["effective alpha", "updates lost", "format", "knowledge B"]
    head = ["alpha", *(f"{title}, {kind}" for title in titles for kind in ("nearest", "stochastic")), "runs"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for alpha in ALPHAS[:-1]:
        cells = [
            spread(values(results, f"alpha {alpha}, {kind}", key), digits)
            for key, digits in (("effective alpha", 5), ("lost fraction", 4), ("format B", 2), ("knowledge B", 2))
            for kind in ("nearest", "stochastic")
        ]
        count = len(values(results, f"alpha {alpha}, stochastic", "format B"))
        lines.append(f"| {' | '.join([alpha, *cells, str(count)])} |")
    return [*lines, ""]


def tables(results: Results) -> str:
    runs = ", ".join(f"world {run['world']} seed {run['seed']}" for run in results)
    sweep = {"cpt": "0", **{f"alpha {alpha}, nearest": alpha for alpha in ALPHAS}}
    lines = [
        "# Tables",
        "",
        f"Made by `plots.py` from the JSON files here; mean ± sample standard deviation over {runs}.",
        "",
        *("## The claim", "", *table(results, CLAIM, SCORES)),
        *("## The same by kind of format", "", *table(results, CLAIM, PARTS)),
        *("## Controls", "", *table(results, CONTROLS, SCORES)),
        *("## Alpha, on the CPT model", "", *table(results, sweep, SCORES)),
        *("## Portability between versions", "", *table(results, PORTABILITY, SCORES)),
        *("## News in another register (that of cloze B and ppl B)", "", *table(results, REGISTRY, SCORES)),
        *("## The residual in fewer bits", "", *stored_table(results)),
        *("## Rounding of the merged model", "", *rounding_table(results)),
        *("## Ancestry: models against the base", "", *table(results, RELATIVES, KINSHIP)),
    ]
    worlds = sorted({run["world"] for run in results})
    for world in worlds if len(worlds) > 1 else []:
        part = [run for run in results if run["world"] == world]
        lines += [f"## World {world} alone", "", *table(part, CLAIM, SCORES)]
    return "\n".join(lines)


def write_tables(folder: Path) -> None:
    (folder / "tables.md").write_text(tables(read(folder)))


def with_table(readme: str, results: Results) -> str:
    """A README with its table made anew; as it is if it has no place for one."""
    if BEGIN not in readme:
        return readme
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "".join([before, BEGIN, "\n".join(table(results, README_ROWS, SUMMARY)), END, after])


def save(figure: Any, folder: Path, name: str) -> None:
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=150)
    # neither a date nor random ids: the same numbers give the same file
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def _centre(results: Results, row: str, key: str) -> tuple[float, float]:
    numbers = values(results, row, key)
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def alpha_plot(results: Results, folder: Path) -> None:
    """Format, knowledge and cloze against alpha, and the perplexities below."""
    rows = ["cpt", *(f"alpha {alpha}, nearest" for alpha in ALPHAS)]
    x = [0.0, *map(float, ALPHAS)]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 6), sharex=True, height_ratios=[3, 2])
    panels: Iterable[tuple[Any, str]] = [(top, key) for key in ("format B", "knowledge B", "cloze B")]
    for axes, key in [*panels, (bottom, "perplexity B"), (bottom, "perplexity A")]:
        points = [_centre(results, row, key) for row in rows]
        mean = [m for m, _ in points]
        (line,) = axes.plot(x, mean, marker="o", label=SCORES[key])
        low, high = [m - s for m, s in points], [m + s for m, s in points]
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    top.set(ylabel="share", ylim=(-0.03, 1.03), title=f"CPT base + alpha · residual, {len(results)} runs, mean ± sd")
    bottom.set(xlabel="alpha", ylabel="perplexity")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        axes.legend()
    save(figure, folder, "alpha")


def trade_plot(results: Results, folder: Path) -> None:
    """Format against knowledge and against perplexity: one point a model, the path of alpha between them."""
    names = {row: title.replace("**", "") for row, title in CLAIM.items() if values(results, row, "format B")}
    path = ["cpt", *(f"alpha {alpha}, nearest" for alpha in ALPHAS)]
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.4), sharey=True)
    for axes, key in zip(panels, ("knowledge B", "perplexity B"), strict=True):
        axes.plot(
            [_centre(results, row, key)[0] for row in path],
            [_centre(results, row, "format B")[0] for row in path],
            color="grey", linewidth=1, marker=".", zorder=1, label="alpha from 0 to 1.25",
        )  # fmt: skip
        for row, title in names.items():
            (x, dx), (y, dy) = _centre(results, row, key), _centre(results, row, "format B")
            label = f"{title} ({len(values(results, row, key))})"
            axes.errorbar(x, y, xerr=dx, yerr=dy, marker="o", capsize=3, linestyle="", label=label)
        axes.set(xlabel=SCORES[key])
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="format", ylim=(-0.05, 1.05))
    panels[1].legend(fontsize="small")
    figure.suptitle("Format, knowledge of the news and perplexity on them, mean ± sd (runs)")
    save(figure, folder, "trade")


def make(folder: Path) -> None:
    """tables.md, alpha.png, alpha.svg, trade.png, trade.svg, and the table of the README beside the folder, if any."""
    write_tables(folder)
    results = read(folder)
    readme = folder.parent / "README.md"
    if readme.exists():
        readme.write_text(with_table(readme.read_text(), results))
    alpha_plot(results, folder)
    trade_plot(results, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path(__file__).parent / "results")
    make(parser.parse_args().results)


if __name__ == "__main__":
    main()
