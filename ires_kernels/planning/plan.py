"""What a merge will do: a frozen Plan, made of validated checkpoints and rules before anything is written.

A Plan fixes the headers of the output, where the bytes of every tensor come from and what is done to them. So printing
it is a dry run, and the same inputs and rules give the same Plan everywhere.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import xxhash

from ires_kernels.checkpoints import sidefiles
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import brief
from ires_kernels.checkpoints.manifest import NotStored
from ires_kernels.checkpoints.quantized import QuantizedRef, Ref
from ires_kernels.checkpoints.sidefiles import SideFile
from ires_kernels.checkpoints.standins import shown
from ires_kernels.files.plain import several, size, table
from ires_kernels.planning import ancestry
from ires_kernels.planning.absences import Absence, grouped
from ires_kernels.planning.ancestry import Ancestry
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.identity import digest, identities, made_of
from ires_kernels.planning.layout import Layout, lines
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.shards import OutputFile
from ires_kernels.planning.share import Share
from ires_kernels.planning.steps import Comparison, Operand, Step
from ires_kernels.version import VERSION

MANIFESTS = {"apply": "ires.json", "extract": "residual.json"}
"""Name of the manifest that an operation leaves in its output."""

_LISTED = 16
"""Runs of an operand that `Plan.to_dict` lists."""
_PASSES = "2: one finds the scales that new codes need, and changes nothing; then all of it is done"


@dataclass(frozen=True)
class Plan:
    """Everything a merge will do, but for where its output goes. ``print(plan)`` tells a person."""

    operation: Literal["apply", "extract"]
    inputs: dict[str, Checkpoint]
    """By role: target, then instruct and base or residual, or of several pairs or residuals instruct-1, base-1, …."""
    rules: Rules
    files: tuple[OutputFile, ...]
    steps: tuple[Step, ...]
    """In the order of the output's bytes."""
    documents: tuple[tuple[str, bytes], ...]
    """Names and contents of the index and, where the dtype changes, config.json."""
    side_files: tuple[SideFile, ...]
    comparisons: tuple[Comparison, ...]
    not_stored: Mapping[str, tuple[str, Ref | NotStored]]
    """The tensors of the instruct model that its residual does not hold, and why."""
    missing: tuple[Absence, ...]
    """What allow_missing let pass."""
    not_copied: tuple[str, ...]
    """What else is in the target's folder."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=dict)
    """What residual.json says of the two models, in JSON types."""
    share: Share | None = None
    """How much of the residual finds a place, where tensors are missing."""
    ancestry: tuple[Ancestry, ...] = ()
    """What the models have in common, by samples of their values: see `related`."""
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """By role, what belongs to tensors that have other names there, or other parts."""
    in_place: bool = False
    """Whether the target's own files are changed, where they differ, and nothing else is written."""
    id: str = field(init=False)
    """xxh3_128, as hex, of everything that determines the output."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", _operation_id(self))

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that the steps read; a tensor that two steps use counts twice."""
        return sum(step.read_bytes for step in self._active())

    @property
    def bytes_written(self) -> int:
        """Size of the safetensors files of the output; in place what changes in them, the journal apart."""
        if self.in_place:
            return sum(step.nbytes for step in self._active())
        return sum(file.size for file in self.files)

    @property
    def passes(self) -> int:
        """How often the weights are read: of a quantized target in place twice, first for its scales."""
        return 2 if self.in_place and any(step.output.encoding for step in self.steps) else 1

    def roles_of_target(self) -> set[str]:
        """The target, and every other role in which it is given as well."""
        place = os.path.realpath(self.inputs["target"].path)
        return {role for role, checkpoint in self.inputs.items() if os.path.realpath(checkpoint.path) == place}

    def recipe(self, tag: str = "") -> str:
        """What is done to the target in place, as the same hash before and after, to tell a repetition.

        Whether the other models are the same ones is no part of it: `records` looks into them.
        """
        rules = self.rules.to_dict()
        del rules["dtype"]  # in place it is the target's
        rules.pop("recipe", None)  # in other words the same
        if self.rules.rounding == "nearest":
            del rules["seed"]
        return digest({"roles": sorted(self.inputs), "own": sorted(self.roles_of_target()), "rules": rules, "tag": tag})

    def reads(self, role: str) -> dict[str, Operand]:
        """What the steps read of an input, by key: that of a tensor is its name."""
        each = (operand for step in self._active() for operand in step.operands)
        return {operand.key: operand for operand in each if operand.role == role}

    def layout(self) -> dict[str, Any]:
        """By which rules tensors were matched that have other names in a model, or other parts; in JSON types."""
        return {role: layout.summary() for role, layout in self.layouts.items() if layout.runs}

    def matched(self) -> list[tuple[str, str, str]]:
        """What is not simply made of the tensors of its name: what, of which role, and in words what of it."""
        return [(label, o.role, o.text) for label, o in self.otherwise() if o.text != label]

    def otherwise(self) -> Iterable[tuple[str, Operand]]:
        """The operands that are not simply the tensors of the name of the step's output, and its label."""
        merged = (step for step in self.steps if not step.is_scale)
        return ((s.label, operand) for s in merged for operand in s.operands if not operand.is_called(s.name))

    def _active(self) -> Iterable[Step]:
        return (step for step in self.steps if not (self.in_place and step.is_own))

    def to_dict(self) -> dict[str, Any]:
        """The plan in JSON types, with every tensor."""
        return {
            "operation": self.operation,
            "id": self.id,
            "inputs": {
                role: {"path": shown(checkpoint.path), "tensors": len(checkpoint.tensors)}
                for role, checkpoint in self.inputs.items()
            },
            "rules": self.rules.to_dict(),
            "in_place": self.in_place,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "passes": self.passes,
            "files": [{"name": file.name, "size": file.size} for file in self.files],
            "tensors": [
                {
                    "name": step.name,
                    "dtype": step.dtype,
                    "shape": list(step.shape),
                    "file": step.file,
                    "op": step.op,
                    "factors": list(step.factors),
                    "inputs": {operand.role: _read(operand) for operand in step.operands},
                    "reason": step.reason,
                    **({} if step.is_whole else {"first": step.first, "count": step.count}),
                }
                for step in self.steps
            ],
            "compared": [comparison.name for comparison in self.comparisons],
            "not_stored": {name: reason for name, (reason, _) in self.not_stored.items()},
            "missing": [f"{absence.name!r} is {absence.where}" for absence in self.missing],
            **({"layout": layout} if (layout := self.layout()) else {}),
            "side_files": {side.name: side.role for side in self.side_files},
            "side_files_why": {side.name: side.why for side in self.side_files if side.why},
            "not_copied": list(self.not_copied),
            "ancestry": [found.to_dict() for found in self.ancestry],
            "warnings": [*self.warnings, *([self.share.text()] if self.share else [])],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return table(self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """The table: what will be done, and of what."""
        rows = [("operation", f"{self.operation} {self.id}")]
        for role, checkpoint in self.inputs.items():
            rows.append((role, f"{checkpoint.path} ({several(len(checkpoint.tensors), 'tensor')})"))
        seed = f", seed {self.rules.seed}" if self.rules.rounding == "stochastic" else ""
        rows.append(("rounding", self.rules.rounding + seed))
        made = Counter(f"{_deed(step)}{self._decided(step)}" for step in self.steps if step.is_whole)
        rows += [(several(count, "tensor"), deed) for deed, count in made.items()]
        rows += [("layout", line) for line in lines(self.layouts)]
        ruled = {(name, role) for role, layout in self.layouts.items() for name in layout.runs}
        matched = [
            f"{label} with {operand.text} of {operand.role}"
            for label, operand in self.otherwise()
            if operand.text != label and (label.partition("[")[0], operand.role) not in ruled
        ]
        rows += [("matched", line) for line in matched[:10]]
        rows += [("matched", f"and {len(matched) - 10} more")] if len(matched) > 10 else []
        reasons = Counter(reason for reason, _ in self.not_stored.values())
        rows += [(several(count, "tensor"), f"not stored: {reason}") for reason, count in reasons.items()]
        rows += [("missing", line) for line in grouped(self.missing)]
        rows += sidefiles.rows(
            (side.name, side.role, side.why)
            for side in self.side_files
            if side.why or not self.in_place or side.role != "target"
        )
        manifest = MANIFESTS[self.operation]
        if self.in_place and self.inputs["target"].path.is_file():
            manifest = f"{self.inputs['target'].path.name}.{manifest}"
        rows.append(("new files", ", ".join([*(name for name, _ in self.documents), manifest])))
        rows += [("not copied", ", ".join(self.not_copied))] if self.not_copied else []
        rows += [("ancestry", f"{found}") for found in self.ancestry if found.related]
        rows += [("warning", line) for line in self.warnings]
        rows += [("warning", self.share.text())] if self.share else []
        rows += [("note", line) for line in self.notes]
        rows.append(("reads", size(self.bytes_read)))
        rows += [("passes", _PASSES)] if self.passes > 1 else []
        where = "in place" if self.in_place else f"in {several(len(self.files), 'file')}"
        rows.append(("writes", f"{size(self.bytes_written)} {where}"))
        return rows

    def _decided(self, step: Step) -> str:
        """Which pattern gave a step its factors, if one did."""
        pattern = self.rules.decided_by(step.name) if step.factors and self.rules.alphas else ""
        return f", by {brief(pattern)}" if pattern else ""


def related(plan: Plan, looks: Looks) -> Plan:
    """The plan, and what the values of its models say: how much they have in common, with warnings where it is little.

    Raises CheckpointError for a file that changed, and OSError.
    """
    found = ancestry.compare(plan.inputs, plan.steps, looks)
    return replace(plan, ancestry=found, warnings=(*plan.warnings, *ancestry.warnings(found, plan.inputs)))


def _deed(step: Step) -> str:
    """What is done to a tensor, in words that group the like ones."""
    dtypes = "/".join(dict.fromkeys(kind for operand in step.operands for kind in operand.kinds))
    factors = ", ".join(f"{factor:g}" for factor in step.factors)
    deed = {
        "copy": f"copied: {step.reason or f'from {step.operands[0].role}'}",
        "convert": f"converted: {step.reason or f'from {step.operands[0].role}'}",
        "add": f"+ ({factors}) * residual",
        "add_difference": f"+ {factors if len(step.factors) == 1 else f'({factors})'} * (instruct - base)",
        "subtract": "instruct - base",
    }[step.op]
    if step.op == "add" and step.is_from_zero and step.operands[0].role == "target":
        each = zip(step.factors, step.operands, strict=True)
        deed = " + ".join(f"{factor:g} * {operand.role}" for factor, operand in each)
    encoding = step.output.encoding
    if encoding is None:
        return f"{deed}, {dtypes} → {step.dtype}"
    return f"{deed}, {dtypes} → {'scales' if step.is_scale else 'codes'} of {encoding.weight.format}"


def _read(operand: Operand) -> dict[str, Any]:
    """What is read for an operand: a tensor, or a run of one; or of how many runs it is made, and the first of them."""
    if len(operand.refs) == 1:
        one = {"name": operand.text, "dtype": operand.dtype, "file": f"{operand.paths[0]}"}
        return one | ({"format": operand.kinds[0]} if operand.is_decoded else {})
    runs = [{"name": ref.name, "file": shown(ref.path)} for ref in operand.refs[:_LISTED]]
    return {"name": operand.text, "dtype": operand.dtype, "runs": len(operand.refs), "first_runs": runs}


def _operation_id(plan: Plan) -> str:
    table = {
        "version": VERSION,
        "operation": plan.operation,
        "inputs": {role: identities(checkpoint) for role, checkpoint in plan.inputs.items()},
        "rules": plan.rules.to_dict(),
        # In place these are copied or left before anything begins, and are no part of what is gone on with.
        "side_files": [made_of(side) for side in plan.side_files if not plan.in_place],
        "about": plan.about,
        **({"matched": matched} if (matched := [(label, o.role, o.key) for label, o in plan.otherwise()]) else {}),
        **({"decoded": decoded} if (decoded := _decoded(plan)) else {}),
        "documents": [[n, xxhash.xxh3_128_hexdigest(content)] for n, content in plan.documents if not plan.in_place],
    }
    return digest(table)


def _decoded(plan: Plan) -> list[list[Any]]:
    """What is read as codes, and how: settings beside the weights have a say in that."""
    return [
        [operand.role, ref.name, ref.format.name, ref.format.settings]
        for step in plan.steps
        for operand in step.operands
        if operand.is_decoded
        for ref in operand.refs
        if isinstance(ref, QuantizedRef)
    ]
