"""Train and measure everything that examples/continual/README.md says: `make reproduce`, hours.

    python examples/continual/reproduce.py --worlds 0 1 --seeds 0 1 2

Models go to --work, figures to --results: one JSON file for a world and seed, one entry a row, written as they come.
What is there is not done again, so a run that was stopped goes on where it was. Rows of another machine or other code
are not added to, and models of other code not used. At the end the tables and plots are made.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import plots
import torch
import transformers
import xxhash
from evaluate import restored, scores, tensors_of
from rich.progress import Progress
from safetensors.torch import save_file
from train import STAGES, make, new_progress
from world import World

import ires_kernels as ik

ALPHAS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25)
STORED_DTYPES = ("f32", "bf16", "f16")
QUIETLY: dict[str, Any] = {"sync": False, "threads": 1}
RELATIVES = tuple(name for name in STAGES if name not in ("base-early", "base"))
NO_EMBEDDINGS = "embed_tokens|lm_head"
CODE = ("world", "train", "evaluate")
"""Modules that results depend on; trained models on all but the last."""

Row = dict[str, Any]


def permuted(residual: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same numbers in other places of the tensor."""
    return residual.flatten()[torch.randperm(residual.numel(), generator=generator)].view_as(residual)


def gaussian(residual: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers with the tensor's norm."""
    noise = torch.randn(residual.shape, generator=generator)
    return noise * (residual.norm() / noise.norm())


class Run:
    """A world and seed: its models, and its rows, each measured once."""

    def __init__(
        self, work: Path, results: Path, world: int, seed: int, other: int, progress: Progress, study: str = ""
    ) -> None:
        """`study` is what the names of other files of results than those of this module begin with."""
        self.world, self.seed = World(world), seed
        self.folder = work / f"world-{world}" / f"seed-{seed}"
        self._other = work / f"world-{world}" / f"seed-{other}"
        self._other_seed = other
        self._path = results / f"{study}world-{world}-seed-{seed}.json"
        self._about = {"world": world, "seed": seed, "other seed": other, "code": code(*CODE), "machine": machine()}
        self._rows: dict[str, Row] = {}
        if self._path.exists():
            known = json.loads(self._path.read_text())
            self._rows = known.pop("rows")
            differing = [name for name in known.keys() | self._about.keys() if known.get(name) != self._about.get(name)]
            if differing:
                raise SystemExit(
                    f"{self._path}: was measured with another {' and '.join(sorted(differing))}; rows of both cannot "
                    "be compared. Move the results elsewhere, or give another folder with --results."
                )
        self.progress = progress
        self._lock = threading.Lock()

    def model(self, name: str, *, other_seed: bool = False) -> Path:
        """The folder of a model, which is trained if it is not there."""
        if other_seed:
            return make(self._other, self.world, self._other_seed, name, self.progress)
        return make(self.folder, self.world, self.seed, name, self.progress)

    def add(self, name: str, measure: Callable[[Path], Row]) -> None:
        """Fill a row with what `measure` returns; it gets a folder for its models, which is removed."""
        with self._lock:
            if name in self._rows:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
                row = self._rows[name] = measure(Path(temporary))
            partial = self._path.with_suffix(".partial")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({**self._about, "rows": self._rows}, indent=1) + "\n")
            partial.replace(self._path)
            plots.write_tables(self._path.parent)
        figures = ", ".join(f"{key} {value:.2f}" for key, value in row.items())
        self.progress.print(f"world {self.world.number}, seed {self.seed}: {name}: {figures}")

    def add_model(self, name: str, model: str, register: str = "plain") -> None:
        self.add(name, lambda _: scores(self.model(model), self.world, register))

    def add_merge(
        self,
        name: str,
        target: str,
        pair: tuple[str, str] = ("instruct", "base"),
        *,
        register: str = "plain",
        other_seed: bool = False,
        **options: Any,
    ) -> None:
        """target + alpha * (instruct - base), by `ires`."""

        def measure(folder: Path) -> Row:
            instruct, base = (self.model(part, other_seed=other_seed) for part in pair)
            report = ik.apply(self.model(target), (instruct, base), out=folder / "out", **QUIETLY, **options)
            return {**scores(folder / "out", self.world, register), **merge_figures(report)}

        self.add(name, measure)

    def add_control(
        self, name: str, change: Callable[[torch.Tensor, torch.Generator], torch.Tensor], but: str = ""
    ) -> None:
        """The residual spoilt by `change`, except where `but` is found in the name: of a model that is base + that."""

        def measure(folder: Path) -> Row:
            ik.extract(self.model("base"), self.model("instruct"), folder / "residual", **QUIETLY)
            generator = torch.Generator().manual_seed(self.seed)
            base = tensors_of(self.model("base"))
            spoilt = {
                name: base[name].float() + (r if but and re.search(but, name) else change(r, generator))
                for name, r in tensors_of(folder / "residual").items()
            }
            (folder / "spoilt").mkdir()
            for file in self.model("instruct").glob("*.json"):
                if "index" not in file.name:
                    shutil.copy(file, folder / "spoilt")
            save_file(spoilt, folder / "spoilt" / "model.safetensors", metadata={"format": "pt"})
            pair = (folder / "spoilt", self.model("base"))
            report = ik.apply(self.model("cpt"), pair, out=folder / "out", **QUIETLY)
            return {**scores(folder / "out", self.world), **merge_figures(report)}

        self.add(name, measure)

    def add_stored(self, dtype: str) -> None:
        """The residual on the disk in a dtype; and base + residual against instruct."""

        def measure(folder: Path) -> Row:
            residual = folder / "residual"
            ik.extract(self.model("base"), self.model("instruct"), residual, dtype=dtype, **QUIETLY)
            ik.apply(self.model("base"), residual, out=folder / "again", **QUIETLY)
            ik.apply(self.model("cpt"), residual, out=folder / "out", **QUIETLY)
            return {
                **scores(folder / "out", self.world),
                "residual bytes": sum(path.stat().st_size for path in residual.glob("*.safetensors")),
                "restored": restored(folder / "again", self.model("instruct")),
            }

        self.add(f"stored {dtype}", measure)


def kinship(model: Path, base: Path) -> Row:
    """By the sample that a merge takes (`planning/ancestry.py`), and by all weights of the matrices at once."""
    (found,) = ik.extract(base, model, model.with_name("none"), dry_run=True).ancestry
    ours, theirs = tensors_of(model), tensors_of(base)
    names = [name for name, t in theirs.items() if t.dim() > 1]
    a, b = (torch.cat([tensors[name].flatten().double() for name in names]) for tensors in (ours, theirs))
    return {
        "cosine": found.cosine,
        "distance": found.distance,
        "whole cosine": float(a @ b / (a.norm() * b.norm())),
        "whole distance": float((a - b).norm() / b.norm()),
        "norm ratio": float(a.norm() / b.norm()),
    }


def merge_figures(report: Any) -> Row:
    return {
        "effective alpha": report.strengths[0].effective_alpha,
        "lost fraction": report.lost_fraction,
        "seconds": report.seconds,
    }


def measure_core(run: Run) -> None:
    """The claim, alpha, and the controls that need no training of their own."""
    for name in ("base", "instruct", "cpt"):
        run.add_model(name, name)
    for alpha in ALPHAS:
        run.add_merge(f"alpha {alpha:g}, nearest", "cpt", alpha=alpha)
    run.add_control("residual permuted", permuted)
    run.add_control("residual permuted but for embeddings and head", permuted, NO_EMBEDDINGS)
    run.add_control("Gaussian of the same norm", gaussian)
    run.add_merge("without embeddings and head", "cpt", skip=NO_EMBEDDINGS)
    for dtype in STORED_DTYPES:
        run.add_stored(dtype)
    run.add_merge("residual of another seed", "cpt", other_seed=True)
    for alpha in ALPHAS[:-1]:
        run.add_merge(f"alpha {alpha:g}, stochastic", "cpt", alpha=alpha, rounding="stochastic", seed=run.seed)


def measure_more(run: Run) -> None:
    """What needs more training: the other ways to a new instruct model, another version, another register."""
    for name in ("cpt-instruct", "instruct-cpt"):
        run.add_model(name, name)
    run.add_merge("instruct-cpt + residual", "instruct-cpt")
    run.add_merge("v1.1 residual on v1", "cpt", ("instruct-v1.1", "base-v1.1"))
    run.add_merge("v1 residual on v1.1", "cpt-v1.1")
    run.add_merge("v1.1 residual on v1.1", "cpt-v1.1", ("instruct-v1.1", "base-v1.1"))
    for name in ("base", "instruct", "cpt-registry"):
        run.add_model(f"registry: {name}", name, "registry")
    run.add_merge("registry: cpt-registry + residual", "cpt-registry", register="registry")
    for name in RELATIVES:
        run.add(f"ancestry: {name}", lambda _, name=name: kinship(run.model(name), run.model("base")))
    for name in ("base", "instruct", "cpt"):
        run.add(
            f"ancestry: {name} of another seed",
            lambda _, name=name: kinship(run.model(name, other_seed=True), run.model("base")),
        )


def code(*modules: str) -> str:
    """Digest of modules of this folder."""
    here = Path(__file__).parent
    return xxhash.xxh3_128_hexdigest(b"".join((here / f"{module}.py").read_bytes() for module in modules))


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ires_kernels": ik.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=here / "models")
    parser.add_argument("--results", type=Path, default=here / "results")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each (default: 2)")
    arguments = parser.parse_args()
    if len(arguments.seeds) < 2:
        parser.error("give two seeds or more: the residual of one is a control for another")
    with new_progress() as progress:
        first, second, *_ = arguments.seeds
        work = arguments.work / code(*CODE[:-1])[:8]
        runs = [
            Run(work, arguments.results, world, seed, second if seed == first else first, progress)
            for world in arguments.worlds
            for seed in arguments.seeds
        ]
        # Runs side by side in threads: torch lets go of the interpreter while it computes.
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for done in [pool.submit(part, run) for part in (measure_core, measure_more) for run in runs]:
                done.result()
    plots.make(arguments.results)


if __name__ == "__main__":
    main()
