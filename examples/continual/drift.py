"""How far a base may drift before its old instruction residual no longer fits: forty minutes of a core.

    python examples/continual/drift.py --seeds 0 1 2

The base is trained on the news in more ways than one: at higher rates, for longer, and with low-rank
adapters (LoRA) that are merged into it. Each of these targets is measured, compared with the residual by
`ires compare`, and measured again with the residual added. Figures go to --results, one JSON file for a seed; what is
there is not done again. At the end drift.md and the plot are made, of the ways that all seeds have.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from evaluate import scores
from plots import plt, spread
from plots import save as save_figure
from reproduce import CODE, QUIETLY, Row, Run, code, merge_figures
from torch.nn.utils import parametrize
from train import batches, load, new_progress, save, train
from transformers import LlamaForCausalLM

import ires_kernels as ik

ALPHAS = (1.0, 1.25)


class Way(NamedTuple):
    """How a base is trained on the news; rank 0 trains all weights, another one adapters of that rank in the layers."""

    steps: int
    rate: float
    rank: int = 0

    def __str__(self) -> str:
        return f"{'full' if not self.rank else f'rank {self.rank}'}, {self.steps} steps at {self.rate:g}"


WAYS = (
    Way(150, 5e-4),  # that of train.py
    Way(150, 2e-3),
    Way(150, 5e-3, 8),
    Way(150, 1e-3),
    Way(300, 5e-4),
    Way(150, 1.5e-3, 8),
)


class Adapter(torch.nn.Module):
    """weight + 2 · up · down, which begins as weight."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = torch.nn.Parameter(torch.randn(rank, columns, generator=generator) / math.sqrt(columns))
        self.up = torch.nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 2 * self.up @ self.down


def linears(model: LlamaForCausalLM) -> Iterator[torch.nn.Linear]:
    """Those in the layers: all matrices but embeddings and head."""
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            yield module


def adapt(model: LlamaForCausalLM, rank: int, seed: int) -> None:
    """Put adapters where the linear layers are, and train nothing else."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for linear in linears(model):
        parametrize.register_parametrization(linear, "weight", Adapter(linear.weight, rank, generator))


def merge_adapters(model: LlamaForCausalLM) -> None:
    for linear in linears(model):
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def trained(run: Run, way: Way) -> Path:
    """The folder of the base trained in that way, which is done if it is not there; on the same texts for all ways."""
    out = run.folder / f"{way}".replace(",", "").replace(" ", "-")
    if not out.exists():
        model = load(run.model("base"))
        if way.rank:
            adapt(model, way.rank, run.seed)
        title = f"world {run.world.number}, seed {run.seed}: {way}"
        task = run.progress.add_task(title, total=way.steps, loss=math.nan)
        texts = batches(run.world, "A and B", run.seed, "cpt")
        train(model, texts, way.steps, way.rate, lambda loss: run.progress.update(task, advance=1, loss=loss))
        if way.rank:
            merge_adapters(model)
        save(model, run.world, out, chats=False)
        run.progress.remove_task(task)
    return out


def measure(run: Run, way: Way) -> None:
    """The target alone, with what compare says of it, and with the residual."""
    pair = run.model("instruct"), run.model("base")

    def alone(_: Path) -> Row:
        target = trained(run, way)
        fit = ik.compare(target, pair, threads=1).to_dict()["matrices"]
        figures = {key: fit[key] for key in ("drift", "size", "cosine", "sign_conflicts")}
        return {**scores(target, run.world), **figures}

    def merged(folder: Path, alpha: float) -> Row:
        report: Any = ik.apply(trained(run, way), pair, alpha=alpha, out=folder / "out", **QUIETLY)
        return {**scores(folder / "out", run.world), **merge_figures(report)}

    run.add(f"{way}", alone)
    for alpha in ALPHAS:
        run.add(f"{way}, alpha {alpha:g}", lambda folder, alpha=alpha: merged(folder, alpha))


COLUMNS = {
    "drift": "drift",
    "cosine": "cosine",
    "cloze B": "cloze, alone",
    "merged: format B": "format",
    "merged: knowledge B": "knowledge",
    "merged: both B": "both",
    "merged: cloze B": "cloze",
    "merged: perplexity B": "ppl",
    "more: format B": "format at 1.25",
    "more: both B": "both at 1.25",
}


def read(folder: Path) -> list[dict[str, Row]]:
    """The rows of all seeds."""
    return [json.loads(path.read_text())["rows"] for path in sorted(folder.glob("drift-world-*-seed-*.json"))]


def measured(results: list[dict[str, Row]]) -> dict[Way, list[Row]]:
    """Of each way that all seeds have, by drift, the figures of each seed: of the target, and of it merged."""
    found = {}
    for way in WAYS:
        names = {"": f"{way}", "merged: ": f"{way}, alpha 1", "more: ": f"{way}, alpha 1.25"}
        if all(name in rows for rows in results for name in names.values()):
            found[way] = [
                {f"{what}{key}": value for what, name in names.items() for key, value in rows[name].items()}
                for rows in results
            ]
    return dict(sorted(found.items(), key=lambda item: mean(item[1], "drift")))


def mean(rows: Iterable[Row], key: str) -> float:
    values = [row[key] for row in rows]
    return float(sum(values) / len(values))


def table(ways: Mapping[Way, list[Row]]) -> list[str]:
    lines = [f"| {' | '.join(['trained on the news', *COLUMNS.values(), 'runs'])} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for way, rows in ways.items():
        cells = [spread([row[key] for row in rows]) for key in COLUMNS]
        lines.append(f"| {' | '.join([f'{way}', *cells, f'{len(rows)}'])} |")
    return lines


def plot(ways: Mapping[Way, list[Row]], folder: Path) -> None:
    """What is kept over drift: a point for each seed, a line through the means of ways that train all weights."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 4), sharex=True, sharey=True)
    for axes, (key, title) in zip(
        panels, (("merged: format B", "format"), ("merged: both B", "both"), ("merged: cloze B", "cloze")), strict=True
    ):
        for full, marker, label in ((True, "o", "all weights"), (False, "^", "adapters, merged")):
            mine = {way: rows for way, rows in ways.items() if (way.rank == 0) is full}
            points = [(row["drift"], row[key]) for rows in mine.values() for row in rows]
            axes.scatter([x for x, _ in points], [y for _, y in points], marker=marker, s=22, label=label)
            if full:
                axes.plot([mean(r, "drift") for r in mine.values()], [mean(r, key) for r in mine.values()], linewidth=1)
        axes.set(xlabel="drift |target - base| / |base| of matrices", title=title, ylim=(-0.03, 1.03), xlim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="share, with the residual at alpha 1")
    panels[0].legend(fontsize="small")
    save_figure(figure, folder, "drift")


def draw(folder: Path) -> None:
    """drift.md, drift.png and drift.svg."""
    ways = measured(read(folder))
    text = (
        "Made by `drift.py` from the JSON files here; mean ± sample standard deviation over seeds, alpha 1 or as said."
    )
    (folder / "drift.md").write_text("\n".join(["# Drift", "", text, "", *table(ways), ""]))
    plot(ways, folder)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=here / "models")
    parser.add_argument("--results", type=Path, default=here / "results")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each (default: 2)")
    arguments = parser.parse_args()
    with new_progress() as progress:
        work = arguments.work / code(*CODE[:-1])[:8]
        runs = [
            Run(work, arguments.results, arguments.world, seed, seed, progress, "drift-") for seed in arguments.seeds
        ]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for run in runs:
                pool.submit(run.add_model, "instruct", "instruct")
            for done in [pool.submit(measure, run, way) for way in WAYS for run in runs]:
                done.result()
    draw(arguments.results)


if __name__ == "__main__":
    main()
