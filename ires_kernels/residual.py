"""Residuals as values: opened or named, scaled and added up, and nothing is computed before they are applied."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ires_kernels.checking.recorded import check_weights
from ires_kernels.checkpoints import hub
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.merging.extraction import save_sum
from ires_kernels.merging.request import Running
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.inputs import StrPath, check_path, open_inputs
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.summing import plan_residual, roles_of_sum
from ires_kernels.planning.sums import Sum, Term
from ires_kernels.records.publication import public_copy
from ires_kernels.streaming.reader import second_copies

if TYPE_CHECKING:
    from ires_kernels.records.report import Report
from ires_kernels.records.workers import WorkerReport


@dataclass(frozen=True)
class Residual(Sum):
    """A residual, or a sum of residuals with factors, wherever `apply`, `load` and `apply_` take a residual.

    >>> r = ik.Residual.of("instruct/", "base/")  # or Residual.open("residual/")
    >>> report = ik.apply("target/", 0.7 * r, out="merged/")
    >>> r.shapes["model.norm.weight"]
    (16,)
    >>> round(r.norms()["model.norm.weight"], 4) == round((-r).norms()["model.norm.weight"], 4)
    True
    >>> report = (0.7 * r).save("residual/")  # computed now, and rounded once
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
        folder = self._opened()
        if folder is not None:
            return {name: ref.shape for name, ref in folder.tensors.items()}
        return {step.name: step.shape for step in self._plan("f32").steps}

    def norms(self) -> dict[str, float]:
        """The Euclidean norm of each tensor, in float64: one pass over its files, and nothing is written."""
        from ires_kernels.streaming import norms

        folder, factor = self._opened(), abs(self.terms[0][0])
        if folder is not None:
            return {name: factor * norm for name, norm in norms.of_residual(folder).items()}
        if len(self.terms) == 1:
            return {name: factor * norm for name, norm in norms.of_plan(self._plan("f32")).items()}
        return norms.of_plan(self._plan("f64"))

    def save(self, path: StrPath, **options: Any) -> Report | WorkerReport | Plan:
        """Write it as the new folder `path`, as `extract` does; `options` are those of `extract`.

        A sum is computed as `apply` would add it, and rounded once; its residuals have the same tensors. residual.json
        says what it was made of, and `verify` computes it again. Raises ArgumentError for what was opened as it is, and
        for sums in which residuals are mixed with pairs of models; CheckpointError where tensors differ.
        """
        folder = self._folder()
        if folder is not None:
            raise ArgumentError(f"{folder}: is this residual; it need not be saved again. Copy the folder.")
        paths, factors = roles_of_sum(self.terms), [factor for factor, _ in self.terms]
        running, others = Running.apart(options)
        return save_sum(paths, () if _is_difference(self.terms) else factors, path, running, **others)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
        """Upload it to a model on the Hub, which is made if it is not there; returns the address of the commit.

        What is uploaded tells nothing of this machine, as after `publish`; the folder itself stays as it is.

        private  of a new repository
        options  of `save`, for what is in no folder yet: then it is saved to a temporary one first

        Raises ImportError without huggingface_hub, what that raises, ArgumentError as `save`, and CheckpointError for a
        folder whose tensors have other hashes than its residual.json says.
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
            else:
                opened = open_inputs({"residual": folder})["residual"]
                if opened.manifest is not None:
                    check_weights(opened, opened.manifest)
            copy = Path(place) / "upload"
            copy.mkdir()
            public_copy(folder, copy)
            api = huggingface_hub.HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            return f"{api.upload_folder(repo_id=repo_id, folder_path=copy, commit_message='Upload a residual')}"

    def _folder(self) -> Path | None:
        """Where it lies as it is."""
        ((factor, source), *others) = self.terms
        return Path(source) if not others and factor == 1 and not isinstance(source, tuple) else None

    def _opened(self) -> Checkpoint | None:
        """Its folder, where it is one residual, with whatever factor."""
        ((_, source), *others) = self.terms
        return None if others or isinstance(source, tuple) else open_inputs({"residual": source})["residual"]

    def _plan(self, dtype: str) -> Plan:
        """Of a sum; of one pair without its factor."""
        factors = [factor for factor, _ in self.terms] if len(self.terms) > 1 else []
        inputs = open_inputs(roles_of_sum(self.terms))
        with Looks(inputs) as looks:
            rules = Rules.of(len(factors), alpha=factors, dtype=dtype)
            return plan_residual(inputs, rules, second_copies(inputs), looks=looks)


def _is_difference(terms: Sequence[Term]) -> bool:
    """Whether it is that of two models, and no more."""
    ((factor, source), *others) = terms
    return not others and factor == 1 and isinstance(source, tuple)
