"""Planning a merge: validated checkpoints and rules become a frozen Plan, or one error that lists what is wrong.

Nothing is written here, and of the weights no more is read than `open_checkpoint` has read; but the files beside them
are. A Plan fixes the headers of the output, where the bytes of every tensor come from and what is done to them. So
printing it is a dry run, and the same inputs and rules give the same Plan everywhere.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import xxhash

from ires_kernels.checkpoints import configs, names, parents, roles, selection, settings, sidefiles
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.header import brief, build_header, tensor_bytes
from ires_kernels.checkpoints.manifest import NotStored
from ires_kernels.checkpoints.quantized import QuantizedRef, Ref
from ires_kernels.checkpoints.sidefiles import SideFile
from ires_kernels.checkpoints.standins import shown
from ires_kernels.dtypes import STORAGE
from ires_kernels.files.plain import several, table
from ires_kernels.planning import ancestry, by_token, deeds
from ires_kernels.planning.absences import Absence, grouped
from ires_kernels.planning.ancestry import Ancestry
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.findings import Findings
from ires_kernels.planning.layout import Layout, lines
from ires_kernels.planning.matching import Matcher
from ires_kernels.planning.numbers import numbers
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.share import Share, share
from ires_kernels.planning.steps import Comparison, Operand, Step, by_output
from ires_kernels.version import VERSION as VERSION

MANIFESTS = {"apply": "ires.json", "extract": "residual.json"}
"""Name of the manifest that an operation leaves in its output."""

_LISTED = 16
"""Runs of an operand that `Plan.to_dict` lists."""
_LEFT_OVER = 0.1
"""Of the elements of a residual, what --allow-missing leaves out without being told so."""
_ANY = (
    "It leaves out a tenth at most: where what is missing belongs to the model, mend that first; "
    'to go on all the same, give --allow-missing=any (allow_missing="any").'
)
_PASSES = "2: one finds the scales that new codes need, and changes nothing; then all of it is done"
_IDS = "Correct the id in that file, or take a model whose tokenizer fits its rows."
_IDS_BY_ROWS = "Rows by number leave its ids without rows: --vocabulary target keeps those that the target has."
_NOTHING = "Take models of one architecture, whose tensors have the same names, and skip less."


class OutputFile(NamedTuple):
    """A safetensors file to write: the bytes before its data, and the size of all of it."""

    name: str
    header: bytes
    size: int


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
        return _hash({"roles": sorted(self.inputs), "own": sorted(self.roles_of_target()), "rules": rules, "tag": tag})

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


def plan_apply(
    inputs: Mapping[str, Checkpoint],
    rules: Rules,
    copies: Mapping[str, str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    looks: Looks | None = None,
) -> Plan:
    """Plan target + alpha * residuals, or target + alpha * (instruct - base) of one pair or several.

    `copies`: second copies in the target of its embedding, and the embedding's name (`reader.second_copies`).
    `layouts`: `Plan.layouts` of a plan of the same models, where that is known; else values are looked at, by `looks`.

    `inputs` holds target first, then instruct and base of each pair, or residuals. Raises CheckpointError with up to
    ten problems.
    """
    target = inputs["target"]
    found = _findings(inputs, rules, copies)
    models = found.inputs
    deeds.check_models(found)
    found.refuse("apply")
    deeds.match("target", layouts, looks, found)
    steps = _apply_steps(target, found)
    layout = [
        (shard.path.name, {"format": "pt"} | shard.header.metadata, [s for n in shard.header.tensors for s in steps[n]])
        for shard in target.shards
    ]
    everything = [step for _, _, group in layout for step in group]
    deeds.check_left_over(models, found)
    deeds.check_tied_head(models, everything, found)
    found.check_patterns()
    share = _share(everything, found)
    if (not found.missing or rules.allow_missing) and all(
        step.reason not in ("", by_token.ALPHA_0) for step in everything
    ):
        firsts = [f"{role} has {next(iter(models[role].tensors), '')!r} …" for role in list(inputs)[:2]]
        found.problem(f"no tensor would be merged: the {', '.join(firsts)}", _NOTHING)
    found.refuse("apply")

    foreign = by_token.other_vocabulary(models, everything, found)
    if foreign is not None:
        found.warnings.append(
            f"{foreign} stays as it is, and the other models have other rows or tokens for it: the target keeps its "
            "tokenizer and chat template"
        )
    found.warnings += _turned_round(inputs)
    found.warnings += configs.differences(inputs)
    found.notes += found.vocabulary.notes()
    config = by_token.grown_config(inputs, found)
    rows = [step.shape[0] for step in everything if names.is_vocabulary(step.name) and step.shape]
    sides = selection.of_model(
        inputs,
        own_tokenizer=foreign is not None,
        vocabulary=rules.vocabulary,
        reordered=found.vocabulary.reordered,
        config=config,
        rows=max(rows, default=None),
    )
    found.warnings += sides.warnings
    for text in sides.problems:
        found.problem(text, _IDS_BY_ROWS if rules.vocabulary == "rows" else _IDS)
    found.refuse("apply")
    side_files = sides.files
    files, placed = _lay_out(layout)
    documents = [] if target.index_name is None else [(target.index_name, _index(placed, target.index_metadata))]
    if rules.dtype is not None:
        changed = settings.of_plain(config, side_files, STORAGE[rules.dtype].torch)
        documents += [(name, _json(table)) for name, table in changed.items() if table is not None]
        side_files = [file for file in side_files if file.name not in changed]
    elif config is not None and config is not target.config:
        documents.append(("config.json", _json(config)))
        side_files = [file for file in side_files if file.name != "config.json"]
    return Plan(
        "apply", dict(inputs), rules, files, placed, tuple(documents), tuple(side_files), tuple(found.comparisons), {},
        tuple(found.missing), tuple(sides.left), tuple(found.warnings),
        tuple(found.notes), share=share, layouts=found.matcher.layouts,
    )  # fmt: skip


def plan_extract(
    inputs: Mapping[str, Checkpoint],
    rules: Rules,
    copies: Mapping[str, str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    looks: Looks | None = None,
) -> Plan:
    """Plan instruct - base, a residual in the layout of the instruct model.

    `copies`: second copies of an embedding, and that one's name (`reader.second_copies`). The rest as in `plan_apply`.

    `inputs` holds base and instruct. Raises CheckpointError with up to ten problems.
    """
    found = _findings(inputs, rules, copies)
    base, instruct = found.inputs["base"], found.inputs["instruct"]
    deeds.check_models(found)
    found.refuse("extract")
    deeds.match("instruct", layouts, looks, found)
    # A head that only base has becomes a difference to instruct's embedding, and is stored next to that one.
    heads = found.matcher.heads("instruct", "base")
    groups = []
    for shard in instruct.shards:
        own = [found.numbers["instruct"].tensor(name) for name in shard.header.tensors]
        refs = [ref for first in own if first is not None for ref in (first, *heads.get(first.name, []))]
        group = [step for ref in refs for step in deeds.extract_steps(ref, found)]
        groups += [group] if group else []
    for name in found.matcher.unused("base", "instruct"):
        if names.lookup(instruct, name) is not None or found.skipped(name) is not None or found.codes(name):
            continue
        if names.is_recomputed(base.tensors[name]):
            found.buffers.append(name)
        elif name not in found.matcher.copies:
            found.absent(name, ["base"], ["instruct"])
    found.note_buffers("instruct")
    found.check_patterns()
    share = _share([step for group in groups for step in group], found)
    if not groups and (not found.missing or rules.allow_missing):
        found.problem("no tensor would be stored", _NOTHING)
    found.refuse("extract")
    found.warnings += _turned_round(inputs)
    found.warnings += configs.differences(inputs)
    found.notes += found.vocabulary.notes()
    stored = found.vocabulary.by_token()

    files, placed, documents = lay_out_residual(groups)
    return Plan(
        "extract", dict(inputs), rules, files, placed, documents, tuple(selection.of_residual(instruct)),
        tuple(found.comparisons), found.not_stored, tuple(found.missing), (), tuple(found.warnings),
        tuple(found.notes),
        selection.record(base, instruct) | ({"by_token": stored} if stored else {}), share,
        layouts=found.matcher.layouts,
    )  # fmt: skip


def related(plan: Plan, looks: Looks) -> Plan:
    """The plan, and what the values of its models say: how much they have in common, with warnings where it is little.

    Raises CheckpointError for a file that changed, and OSError.
    """
    found = ancestry.compare(plan.inputs, plan.steps, looks)
    return replace(plan, ancestry=found, warnings=(*plan.warnings, *ancestry.warnings(found, plan.inputs)))


def _findings(inputs: Mapping[str, Checkpoint], rules: Rules, copies: Mapping[str, str] | None) -> Findings:
    seen = {role: numbers(checkpoint) for role, checkpoint in inputs.items()}
    return Findings(rules, Matcher({role: each.model for role, each in seen.items()}, copies or {}), seen)


def _apply_steps(target: Checkpoint, found: Findings) -> dict[str, list[Step]]:
    """What becomes of each tensor that the target's files hold, by its name there."""
    own = found.numbers["target"]
    steps = {name: deeds.apply_steps(ref, found) for name in target.tensors if (ref := own.tensor(name)) is not None}
    for name, weight in own.companions.items():
        made = steps[weight.codes.name] if weight else []
        steps[name] = deeds.companion_steps(target.tensors[name], made, found)
    return steps


def _share(planned: Iterable[Step], found: Findings) -> Share | None:
    """How much of the residual finds a place; refuses to go on where that is too little to be meant."""
    placed = share(planned, found)
    if placed is not None and found.rules.allow_missing is True and placed.left_over > _LEFT_OVER:
        found.explains = True
        found.problem(f"--allow-missing would leave out too much: {placed.text()}", _ANY)
    return placed


def _turned_round(inputs: Mapping[str, Checkpoint]) -> list[str]:
    """A warning for each base that has, and whose instruct has not, what makes a model an instruct model."""
    return [
        f"{base} has a chat template and {instruct} has none: are they the wrong way round?"
        for instruct in inputs
        if roles.is_instruct(instruct) and (base := roles.base_of(instruct)) in inputs
        if parents.has_template(inputs[base]) and not parents.has_template(inputs[instruct])
    ]


def size(count: float) -> str:
    """Bytes for people, in powers of 1000 as disks and networks are sold."""
    name, factor = unit(count)
    return f"{count / factor:.3g} {name}"


def unit(count: float) -> tuple[str, int]:
    """The unit in which so many bytes are told, and how many it has."""
    names = ("B", "kB", "MB", "GB", "TB")
    power = next((power for power in range(4) if count < 1000 ** (power + 1)), 4)
    return names[power], 1000**power


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


def lay_out_residual(
    groups: Sequence[list[Step]],
) -> tuple[tuple[OutputFile, ...], tuple[Step, ...], tuple[tuple[str, bytes], ...]]:
    """The files of a residual, one for each group of steps; these in their places; and the index, where it has one."""
    stem = "residual-{:05}-of-{:05}" if len(groups) > 1 else "residual"
    layout = [
        (f"{stem.format(number, len(groups))}.safetensors", {"format": "pt"}, group)
        for number, group in enumerate(groups, 1)
    ]
    files, placed = _lay_out(layout)
    documents = [("residual.safetensors.index.json", _index(placed, {}))] if len(groups) > 1 else []
    return files, placed, tuple(documents)


def _lay_out(
    layout: Iterable[tuple[str, dict[str, str], list[Step]]],
) -> tuple[tuple[OutputFile, ...], tuple[Step, ...]]:
    """Give every step its place in the files, each of which is (name, metadata, steps)."""
    files: list[OutputFile] = []
    placed: list[Step] = []
    for name, metadata, group in layout:
        outputs = by_output(group)
        header = build_header(((output.name, output.dtype, output.shape) for output in outputs), metadata)
        end = len(header)
        for output, parts in outputs.items():
            place = replace(output, file=name, offset=end)
            placed += [replace(step, output=place) for step in parts]
            end += tensor_bytes(output.dtype, output.shape)
        files.append(OutputFile(name, header, end))
    return tuple(files), tuple(placed)


def _index(placed: Iterable[Step], metadata: dict[str, Any]) -> bytes:
    weight_map = {step.name: step.file for step in placed}
    total = sum(step.nbytes for step in placed)
    return _json({"metadata": metadata | {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _json(table: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only escape
        return (json.dumps(table, indent=2) + "\n").encode()


def _operation_id(plan: Plan) -> str:
    table = {
        "version": VERSION,
        "operation": plan.operation,
        "inputs": {role: _identities(checkpoint) for role, checkpoint in plan.inputs.items()},
        "rules": plan.rules.to_dict(),
        # In place these are copied or left before anything begins, and are no part of what is gone on with.
        "side_files": [_made_of(side) for side in plan.side_files if not plan.in_place],
        "about": plan.about,
        **({"matched": matched} if (matched := [(label, o.role, o.key) for label, o in plan.otherwise()]) else {}),
        **({"decoded": decoded} if (decoded := _decoded(plan)) else {}),
        "documents": [[n, xxhash.xxh3_128_hexdigest(content)] for n, content in plan.documents if not plan.in_place],
    }
    return _hash(table)


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


def _made_of(side: SideFile) -> list[Any]:
    if side.content is not None:
        return [side.name, side.role, xxhash.xxh3_128_hexdigest(side.content)]
    # Not its place on the disk: a restart may number disks anew, and an interrupted merge must know its own id then.
    return [side.name, side.role, side.file_id.size, side.file_id.mtime_ns]


def _identities(checkpoint: Checkpoint) -> list[list[Any]]:
    return [
        [shard.path.name, shard.file_id.size, shard.file_id.mtime_ns, _header_digest(shard.header.tensors.items())]
        for shard in checkpoint.shards
    ]


def _hash(table: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(table, sort_keys=True, separators=(",", ":")).encode())


def _header_digest(tensors: Iterable[tuple[str, Any]]) -> str:
    table = [[name, info.dtype, info.shape, info.begin] for name, info in tensors]
    return xxhash.xxh3_128_hexdigest(json.dumps(table, separators=(",", ":")).encode())
