"""The steps that make tensors with a row for each token, and what else changes where a vocabulary does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ires_kernels.checkpoints import configs, names, roles
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.quantized import QuantizedRef, Ref
from ires_kernels.dtypes import FLOATS
from ires_kernels.planning.findings import Findings
from ires_kernels.planning.rows import Split
from ires_kernels.planning.steps import Op, Operand, Output, Step

ALPHA_0 = "alpha is 0"
OWN_TOKENS = "rows of tokens, or of none, that only the target has"

_GROWN = "All that has a row for each token grows together: skip none of it, or keep its rows with --vocabulary target."


def tensors_by_token(matched: Mapping[str, tuple[Ref, ...]], found: Findings) -> dict[str, Ref] | None:
    """By role what has a row for each token; None where it is something else."""
    tensors = {role: refs[0] for role, refs in matched.items() if len(refs) == 1 and refs[0].dtype in FLOATS}
    return tensors if len(tensors) == len(matched) and found.is_by_token(tensors) else None


def merged_rows(ref: Ref, tensors: Mapping[str, Ref], split: Split, found: Findings) -> list[Step]:
    """The steps that make the rows of a tensor with a row for each token."""
    rules = found.rules
    dtype = rules.dtype or ref.dtype
    stream = found.matcher.stream(found.matcher.original(ref.name))
    steps = []
    for part in _parts(Output(ref.name, dtype, (split.rows, *ref.shape[1:])), tensors, split, stream):
        factors, op = found.added(ref.name, [operand.role for operand in part.operands])
        if part.op != "add":
            steps.append(part)
        elif any(factors):
            steps.append(replace(part, op=op, factors=factors))
        else:
            own = _copy_op(part.operands[0], dtype)
            steps.append(replace(part, op=own, operands=part.operands[:1], reason=ALPHA_0))
    return steps


def differing_rows(ref: Ref, tensors: Mapping[str, Ref], split: Split, found: Findings) -> list[Step]:
    """The steps that make the rows of a residual: differences, and the rows of tokens that base does not have."""
    output, stream = Output(ref.name, found.rules.dtype or "F32", ref.shape), found.matcher.stream(ref.name)
    parts = _parts(output, tensors, split, stream)
    return [replace(part, op="subtract") if part.op == "add" else part for part in parts]


def grown_config(inputs: Mapping[str, Checkpoint], found: Findings) -> dict[str, Any] | None:
    """config.json of the target; where its embedding gets more rows, with their number and the ids of instruct."""
    target, grown = inputs["target"], found.vocabulary.grown
    embeddings = {name: rows for name, rows in grown.items() if names.is_vocabulary(name)}
    if not embeddings:
        return target.config
    (before, after), *others = dict.fromkeys(embeddings.values())
    left = [
        ref.name
        for ref in target.tensors.values()
        if names.is_vocabulary(ref.name) and ref.shape and ref.shape[0] == before and ref.name not in grown
    ]
    if others or left:
        found.problem(f"the embeddings get {after} rows, and {', '.join(left) or 'others of them'} would not", _GROWN)
    donor = next(checkpoint for role, checkpoint in inputs.items() if role != "target" and not roles.is_base(role))
    known = donor.manifest.special_ids if donor.manifest and donor.kind == "residual" else None
    special = configs.special_ids(donor.config) if known is None else known
    return configs.grown(target.config, after, special) if target.config is not None else None


def other_vocabulary(inputs: Mapping[str, Checkpoint], steps: Iterable[Step], found: Findings) -> str | None:
    """A tensor that was left as it is though a model whose tokenizer it would get has other rows, or tokens, for it."""
    for step in steps:
        if step.reason and names.is_vocabulary(step.name) and step.shape and step.name not in found.vocabulary.names:
            for role, checkpoint in list(inputs.items())[1:]:
                rows = names.rows(checkpoint, step.name)
                if rows is not None and (rows != step.shape[0] or found.vocabulary.lacks(role)):
                    return step.name
    return None


def _parts(output: Output, tensors: Mapping[str, Ref], split: Split, stream: int) -> Iterable[Step]:
    """A step for each piece, which copies what is taken or kept, and adds what is added."""
    width = math.prod(output.shape[1:])
    for piece in split.pieces:
        read = tuple(
            Operand(role, tuple(tensors[role].run(first * width, count * width) for first, count in runs))
            for role, runs in piece.rows.items()
        )
        op: Op = "add" if piece.deed == "added" else _copy_op(read[0], output.dtype)
        reason = OWN_TOKENS if piece.deed == "kept" else ""
        yield Step(output, op, read, (), stream, reason, piece.first * width, piece.count * width)


def _copy_op(operand: Operand, dtype: str) -> Op:
    same = operand.dtype == dtype and not any(isinstance(ref, QuantizedRef) for ref in operand.refs)
    return "copy" if same else "convert"
