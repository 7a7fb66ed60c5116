"""What a run of the bench has found: printed while it is measured, and written in the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from ires_kernels.backends.choice import backends
from ires_kernels.bench.result import Comparison, Result


@dataclass
class Report:
    """What is printed while it is measured, and written in the end."""

    console: Console
    machine: dict[str, Any]
    gpu: dict[str, Any] | None = None
    verified: list[str] = field(default_factory=list)
    kernels: list[Result] = field(default_factory=list)
    quantized: list[Result] = field(default_factory=list)
    merges: list[Result] = field(default_factory=list)
    fp8: list[Result] = field(default_factory=list)
    mapped: list[Result] = field(default_factory=list)
    looked: list[Result] = field(default_factory=list)
    """Of `compare` and of live models."""
    workers: list[Result] = field(default_factory=list)
    scale: dict[str, Any] | None = None
    """What workers cost, and their runs behind links."""
    start: list[Result] = field(default_factory=list)
    across: list[Comparison] = field(default_factory=list)
    """What was measured of several results together."""

    def say_verified(self, line: str) -> None:
        """Print what was compared before the clock starts, and keep it."""
        self.verified.append(line)
        self.console.print(f"verified: {line}", soft_wrap=True)

    def comparisons(self) -> list[Comparison]:
        """Those of all results."""
        results = (*self.kernels, *self.quantized, *self.merges, *self.fp8, *self.mapped, *self.looked)
        results = (*results, *self.workers, *self.start)
        return [each for result in results for each in result.comparisons()] + self.across

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON types."""
        return {
            "machine": self.machine,
            "backends": {name: status._asdict() for name, status in backends().items()},
            **({"gpu": self.gpu} if self.gpu else {}),
            "verified": self.verified,
            "kernels": [result.to_dict() for result in self.kernels],
            "quantized": [result.to_dict() for result in self.quantized],
            "merges": [result.to_dict() for result in self.merges],
            "fp8": [result.to_dict() for result in self.fp8],
            "mapped": [result.to_dict() for result in self.mapped],
            "looked": [result.to_dict() for result in self.looked],
            "workers": [result.to_dict() for result in self.workers],
            **({"scale": self.scale} if self.scale else {}),
            "start": [result.to_dict() for result in self.start],
            "comparisons": [each.to_dict() for each in self.comparisons()],
        }
