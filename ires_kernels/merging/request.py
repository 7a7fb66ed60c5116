"""What callers ask of a merge, in the words of their arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ires_kernels.checkpoints import hub, roles
from ires_kernels.checkpoints.addresses import Address, is_address
from ires_kernels.planning.inputs import Pair, StrPath, check_flags, roles_of_apply
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.sums import Sum, written_out
from ires_kernels.planning.workers import Cluster, Worker, asked
from ires_kernels.streaming.asked import Progress
from ires_kernels.streaming.options import Options

if TYPE_CHECKING:
    import torch

Added = StrPath | Sum | Sequence[StrPath | Sum] | Sequence[Pair | Sum]
Renames = Iterable[str | tuple[str, str]] | Mapping[str, str]
Workers = tuple[int, int] | str | None
PAIR = ["target", "instruct", "base"]
"""The roles of models that can be compared."""
Factors = Iterable[tuple[str, float | Sequence[float]]] | Mapping[str, float | Sequence[float]]


@dataclass(frozen=True)
class Running:
    """How a merge runs, whatever is asked for: the arguments that `extract`, `apply` and `merge` have in common."""

    sync: bool = True
    sha256: bool = False
    compare: bool = False
    device: str | torch.device = "cpu"
    threads: int | None = None
    progress: Progress | None = None
    dry_run: bool = False
    follow_links: bool = False
    lock: bool = True
    workers: Workers = None

    @classmethod
    def apart(cls, options: Mapping[str, Any]) -> tuple[Running, dict[str, Any]]:
        """Those of such arguments that say how a merge runs, and the others, which say what it computes."""
        names = {field.name for field in fields(cls)}
        running = cls(**{name: value for name, value in options.items() if name in names})
        return running, {name: value for name, value in options.items() if name not in names}

    def check(self) -> None:
        """Refuse arguments of wrong kinds, and those that do not go together."""
        check_flags(
            **{flag: getattr(self, flag) for flag in ("sync", "sha256", "compare", "dry_run", "follow_links", "lock")}
        )
        if self.worker is not None and not self.sync:
            raise ArgumentError(
                "workers wait for the disk: of what others wrote a machine that restarts knows nothing. "
                "Leave --no-sync (sync=False) out."
            )

    def check_out(self, out: StrPath) -> None:
        """Refuse a place where nothing can be written, or not by several processes."""
        hub.check_out(out)
        if self.worker is not None and is_address(out):
            raise ArgumentError(
                f"workers write one folder on a disk that all of them see, and {Address.of(out)} is in a store, where "
                "one process writes all of it. Leave workers out, or give a folder."
            )

    @cached_property
    def worker(self) -> Worker | Cluster | None:
        """Which of several processes this is, or who has them."""
        return asked(self.workers, f"{self.device}")

    @property
    def options(self) -> Options:
        """Of this process: the machines of a cluster may have GPUs, and this one none."""
        device = "cpu" if isinstance(self.worker, Cluster) else self.device
        return Options.of(device, self.threads, self.progress, self.lock, idle=self.dry_run, compare=self.compare)


def wanted(
    target: StrPath,
    residual: Added,
    alpha: float | Sequence[float],
    alphas: Factors,
    follow_links: bool,
    **rules: Any,
) -> tuple[dict[str, StrPath], Rules]:
    """Where the models of a merge are, by role, and its rules."""
    added, alpha, alphas = written_out(residual, alpha, alphas)
    paths = roles_of_apply(hub.local(target), hub.locals_of(added), follow_links=follow_links)
    return paths, Rules.of(len(roles.added(paths)), alpha=alpha, alphas=alphas, **rules)
