"""Residuals as values: opened or named, scaled and added up, and nothing is computed before they are applied."""

from __future__ import annotations

import math
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ires_kernels import merging
from ires_kernels.checkpoints import hub
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.inputs import Pair, StrPath, check_path, open_inputs
from ires_kernels.planning.plan import Plan, plan_extract
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.sums import Sum
from ires_kernels.streaming.reader import second_copies

if TYPE_CHECKING:
    from ires_kernels.records.report import Report

_SUM = "It is a sum, which apply, load and apply_ take as it is."


@dataclass(frozen=True)
class Residual(Sum):
    """A residual, or a sum of residuals with factors, wherever `apply`, `load` and `apply_` take a residual.

    >>> r = ik.Residual.of("instruct/", "base/")  # or Residual.open("residual/")
    >>> report = ik.apply("target/", 0.7 * r, out="merged/")
    >>> r.shapes["model.norm.weight"]
    (16,)
    >>> round(r.norms()["model.norm.weight"], 4) == round((-r).norms()["model.norm.weight"], 4)
    True
    >>> report = r.save("residual/")
    >>> (2 * r - r).terms == r.terms
    True
    """

    @classmethod
    def open(cls, path: StrPath) -> Residual:
        """A residual that `extract` wrote, or one on the Hub. Raises CheckpointError for what is none."""
        check_path(path, "residual")
        return cls(((1.0, open_inputs({"residual": hub.local(path)})["residual"].path.absolute()),))

    @classmethod
    def of(cls, instruct: StrPath, base: StrPath) -> Residual:
        """instruct - base, of two models. Raises CheckpointError where they are none."""
        paths = {"instruct": hub.local(instruct), "base": hub.local(base)}
        inputs = open_inputs(paths)
        return cls(((1.0, (inputs["instruct"].path.absolute(), inputs["base"].path.absolute())),))

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self.shapes)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name. Of a sum those that all of its residuals have; raises CheckpointError where they differ."""
        first, *others = (_shapes(source) for _, source in self.terms)
        for shapes, (_, source) in zip(others, self.terms[1:], strict=True):
            differing = first.keys() ^ shapes.keys() or {name for name in first if first[name] != shapes[name]}
            if differing:
                name = min(differing)
                raise CheckpointError(
                    f"{_text(source)}: {name!r} is {_shape(shapes.get(name))}, in {_text(self.terms[0][1])} "
                    f"{_shape(first.get(name))}. Residuals that are added up here have the same tensors; apply and "
                    "load match others with each target."
                )
        return first

    def norms(self) -> dict[str, float]:
        """The Euclidean norm of each tensor, in float64: one pass over its files, and nothing is written.

        Raises ArgumentError for a sum in which there are pairs of models: save these as residuals first.
        """
        if len(self.terms) == 1:
            ((factor, source),) = self.terms
            return {name: abs(factor) * norm for name, norm in _norms(source).items()}
        return self._norms_of_sum()

    def save(self, path: StrPath, **options: Any) -> Report | Plan:
        """Write it as the new folder `path`, as `extract` does; `options` are those of `extract`.

        Raises ArgumentError for what is no difference of two models but is scaled, added up or opened.
        """
        if len(self.terms) != 1 or self.terms[0][0] != 1 or not isinstance(self.terms[0][1], tuple):
            what = "was opened: its folder is there" if self._folder() else "is scaled, or a sum"
            raise ArgumentError(f"this residual {what}, and is not saved. {_SUM}")
        instruct, base = self.terms[0][1]
        return merging.extract(base, instruct, path, **options)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
        """Upload it to a model on the Hub, which is made if it is not there; returns the address of the commit.

        private  of a new repository
        options  of `save`, for a difference that is in no folder yet: then it is saved to a temporary one first

        Raises ImportError without huggingface_hub, what that raises, and ArgumentError as `save`.
        """
        import huggingface_hub

        folder = self._folder()
        with tempfile.TemporaryDirectory() as place:
            if folder is None:
                folder = Path(place) / "residual"
                self.save(folder, **options)
            elif not folder.is_dir():
                raise CheckpointError(
                    f"{folder}: is a file; a residual is published with residual.json: open its folder."
                )
            api = huggingface_hub.HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            return f"{api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message='Upload a residual')}"

    def _folder(self) -> Path | None:
        """Where it lies as it is."""
        ((factor, source), *others) = self.terms
        return Path(source) if not others and factor == 1 and not isinstance(source, tuple) else None

    def _norms_of_sum(self) -> dict[str, float]:
        import torch

        from ires_kernels.memory.mapping import mapped

        if any(isinstance(source, tuple) for _, source in self.terms):
            raise ArgumentError("norms of a sum take residuals and no pairs of models: save those first.")
        found = {}
        with ExitStack() as stack:
            models = [(factor, stack.enter_context(mapped(source))) for factor, source in self.terms]  # type: ignore[arg-type]
            for name in self.names:
                flat = [(factor, model[name].reshape(-1)) for factor, model in models]
                squares = []
                for start in range(0, flat[0][1].numel(), _PIECE):
                    piece = torch.zeros(1, dtype=torch.float64)
                    for factor, tensor in flat:
                        piece = piece + factor * tensor[start : start + _PIECE].double()
                    squares.append(float(torch.dot(piece, piece)))
                found[name] = math.sqrt(math.fsum(squares))
        return found


_PIECE = 1 << 20
"""Elements of a residual at a time."""


def _plan(pair: Pair) -> Plan:
    inputs = open_inputs({"base": pair[1], "instruct": pair[0]})
    with Looks(inputs) as looks:
        return plan_extract(inputs, Rules.of(0, dtype="f32"), second_copies(inputs), looks=looks)


def _opened(path: StrPath) -> Checkpoint:
    return open_inputs({"residual": path})["residual"]


def _shapes(source: StrPath | Pair) -> dict[str, tuple[int, ...]]:
    if isinstance(source, tuple):
        return {step.name: step.shape for step in _plan(source).steps}
    return {name: ref.shape for name, ref in _opened(source).tensors.items()}


def _norms(source: StrPath | Pair) -> dict[str, float]:
    """Of one residual, as its bytes go by."""
    from ires_kernels.streaming import norms

    return norms.of_plan(_plan(source)) if isinstance(source, tuple) else norms.of_residual(_opened(source))


def _text(source: StrPath | Pair) -> str:
    return f"{os.fspath(source[0])} - {os.fspath(source[1])}" if isinstance(source, tuple) else f"{os.fspath(source)}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"
