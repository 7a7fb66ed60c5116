"""Plans of residuals that are sums of others: each with its factor, added up to nothing and rounded once.

The first residual, or pair of models, gives the layout; all of them have the same tensors. What tells later merges
about the two models of a residual, such as samples of its base, is that of the first one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, cast

import xxhash

from ires_kernels.checkpoints import configs, names, parents, roles, selection
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.dtypes import FLOATS
from ires_kernels.planning.evidence import ALIKE, Looks, likeness
from ires_kernels.planning.extraction import plan_extract
from ires_kernels.planning.inputs import StrPath
from ires_kernels.planning.layout import Layout
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError, Rules
from ires_kernels.planning.shards import lay_out_residual
from ires_kernels.planning.steps import Operand, Output, Step
from ires_kernels.planning.sums import Term

_APPLY = "apply and load take the sum as it is, and match each residual with the target."
_FEW = 64
"""Tensors that are looked at to tell whether two residuals have one base."""


def roles_of_sum(terms: Sequence[Term]) -> dict[str, StrPath]:
    """The paths of a sum by role: residuals, or pairs of models. Raises ArgumentError where there are both."""
    sources = [source for _, source in terms]
    pairs = [source for source in sources if isinstance(source, tuple)]
    if pairs and len(pairs) < len(sources):
        raise ArgumentError(
            "residuals are not mixed with pairs of models where a sum is computed: save the difference of each pair "
            "first, and add up what is saved."
        )
    if len(pairs) == 1:  # as `extract` has them
        return {"base": pairs[0][1], "instruct": pairs[0][0]}
    if pairs:
        return dict(zip(roles.of_pairs(len(pairs)), (path for pair in pairs for path in pair), strict=True))
    return dict(zip(roles.of_residuals(len(sources)), cast("list[StrPath]", sources), strict=True))


def plan_residual(
    inputs: Mapping[str, Checkpoint],
    rules: Rules,
    copies: Mapping[str, str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    looks: Looks | None = None,
) -> Plan:
    """What `plan_extract` plans; or a sum, where rules have factors, of residuals or of pairs of models."""
    if not rules.alpha:
        return plan_extract(inputs, rules, copies, layouts, looks)
    if any(map(roles.is_residual, inputs)):
        return _of_residuals(inputs, rules, looks)
    return _of_pairs(inputs, rules, copies, layouts, looks)


def _of_residuals(inputs: Mapping[str, Checkpoint], rules: Rules, looks: Looks | None) -> Plan:
    if rules.allow_missing or rules.vocabulary or rules.renames:
        raise ArgumentError(
            "allow_missing, vocabulary and renames are for models, and these are residuals of the same tensors: leave "
            "them out."
        )
    giver, first = next(iter(inputs.items()))
    unmatched = rules.unmatched(dict.fromkeys(name for each in inputs.values() for name in each.tensors))
    if unmatched:
        raise CheckpointError(
            f"--skip {unmatched[0][1]!r} matches no tensor: `ires inspect --tensors` lists the names."
        )
    dtype = rules.dtype or "F32"
    kept = {role: {n: r for n, r in each.tensors.items() if not rules.skipped(n)} for role, each in inputs.items()}
    for role, each in inputs.items():
        _check_shapes(kept, role, inputs)
        by_token = kept[role].keys() & (each.manifest.by_token if each.manifest is not None else {})
        if by_token:
            _refuse_rows(f"{each.path}", min(by_token))
    names_by_shard = [[name for name in shard.header.tensors if name in kept[giver]] for shard in first.shards]
    groups = [[_added(name, kept, dtype, rules) for name in its] for its in names_by_shard if its]
    if not groups:
        raise CheckpointError("no tensor would be stored: skip leaves out all of them. Skip less.")
    files, placed, documents = lay_out_residual(groups)
    recorded = first.manifest
    about: dict[str, Any] = {}
    if recorded is not None:
        keys = ("config", "special_ids", "renamed_tokens")
        about = {key: recorded.table[key] for key in keys if key in recorded.table}
        about["sketch"] = {name: text for name, text in recorded.sketch.items() if name in kept[giver]}
    return Plan(
        "extract", dict(inputs), rules, files, placed, documents, tuple(selection.of_residual(first, giver)), (),
        {name: (each.reason, each) for name, each in recorded.not_stored.items()} if recorded else {}, (), (),
        (*_one_base(inputs, kept, looks), *_one_tokenizer(inputs), *configs.differences(inputs)), (), about,
    )  # fmt: skip


def _added(name: str, residuals: Mapping[str, Mapping[str, TensorRef]], dtype: str, rules: Rules) -> Step:
    """The step that adds up a tensor of all residuals."""
    operands = tuple(Operand(role, (tensors[name],)) for role, tensors in residuals.items())
    odd = next((operand for operand in operands if operand.dtype not in FLOATS), None)
    if odd is not None:
        raise CheckpointError(
            f"{odd.paths[0]}: {name!r} is {odd.dtype}, and no residual is. Leave it out with skip, or extract that "
            "residual again."
        )
    stream = xxhash.xxh3_64_intdigest(name.encode())
    return Step(Output(name, dtype, operands[0].refs[0].shape), "add", operands, rules.alpha, stream)


def _of_pairs(
    inputs: Mapping[str, Checkpoint],
    rules: Rules,
    copies: Mapping[str, str] | None,
    layouts: Mapping[str, Layout] | None,
    looks: Looks | None,
) -> Plan:
    plans: dict[str, Plan] = {}
    for instruct, base in roles.added(inputs):
        pair = {"base": inputs[base], "instruct": inputs[instruct]}
        known = None if layouts is None else {"base": layouts[base]} if base in layouts else {}
        plan = plan_extract(pair, replace(rules, alpha=()), copies, known)
        if "by_token" in plan.about:
            _refuse_rows(f"{inputs[instruct].path}", next(iter(plan.about["by_token"])))
        plans[instruct] = plan
    first, *others = plans.values()
    by_role = {role: {step.name: step.output for step in plan.steps} for role, plan in plans.items()}
    for role in plans:
        _check_shapes(by_role, role, inputs)
    tables = [{step.label: step for step in plan.steps} for plan in others]
    steps = []
    for step in first.steps:
        operands: list[Operand] = []
        for (instruct, base), table in zip(roles.added(inputs), [{step.label: step}, *tables], strict=True):
            if step.label not in table:
                raise CheckpointError(
                    f"{inputs[instruct].path}: {step.name!r} is cut into other parts than in the first pair. Save the "
                    "difference of each pair first, and add up what is saved."
                )
            minuend, subtrahend = sorted(table[step.label].operands, key=lambda each: each.role != "instruct")
            operands += Operand(instruct, minuend.refs), Operand(base, subtrahend.refs)
        steps.append(replace(step, op="add_difference", operands=tuple(operands), factors=rules.alpha))
    instructs = {role: inputs[role] for role in plans}
    bases = {role: each for role, each in inputs.items() if roles.is_base(role)}
    tensors = {role: each.tensors for role, each in bases.items()}
    giver = next(iter(plans))
    return replace(
        first,
        inputs=dict(inputs),
        rules=rules,
        steps=tuple(steps),
        side_files=tuple(replace(side, role=giver) for side in first.side_files),
        comparisons=tuple(
            each._replace(roles=(instruct, roles.base_of(instruct)))
            for instruct, plan in plans.items()
            for each in plan.comparisons
        ),
        warnings=(
            *dict.fromkeys(line for plan in plans.values() for line in plan.warnings),
            *_one_base(bases, tensors, looks),
            *_one_tokenizer(instructs),
        ),
        notes=tuple(dict.fromkeys(line for plan in plans.values() for line in plan.notes)),
        layouts={roles.base_of(role): each for role, plan in plans.items() for each in plan.layouts.values()},
    )


def _check_shapes(tensors: Mapping[str, Mapping[str, Any]], role: str, inputs: Mapping[str, Checkpoint]) -> None:
    """Refuse a residual that has not the tensors of the first one."""
    one = next(iter(tensors))
    first, other = ({name: each.shape for name, each in tensors[which].items()} for which in (one, role))
    differing = first.keys() ^ other.keys() or {name for name in first if first[name] != other[name]}
    if differing:
        name = min(differing)
        raise CheckpointError(
            f"{inputs[role].path}: {name!r} is {_shape(other.get(name))}, in {inputs[one].path} "
            f"{_shape(first.get(name))}. Residuals that are added up have the same tensors: leave others out with "
            f"skip; {_APPLY}"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


def _refuse_rows(path: str, name: str) -> NoReturn:
    raise CheckpointError(
        f"{path}: {name!r} has rows of tokens that its base does not have, which are no differences and have no "
        f"multiples. Leave it out with skip; {_APPLY}"
    )


def _one_base(
    inputs: Mapping[str, Checkpoint], tensors: Mapping[str, Mapping[str, Any]], looks: Looks | None
) -> Iterable[str]:
    """A warning of each residual whose base has little in common with that of the first one, by samples of both.

    inputs  residuals, of whose bases they hold samples, or bases
    """
    if looks is None:
        return
    one, *others = inputs
    for other in others:
        cosines = []
        for name, ref in tensors[one].items():
            if len(ref.shape) < 2 or name not in tensors[other] or names.is_by_token(ref, inputs[one]):
                continue
            mine, theirs = looks.of(one, ref), looks.of(other, tensors[other][name])
            if mine is not None and theirs is not None and mine.runs == theirs.runs:
                found = likeness(mine.values, theirs.values)
                cosines += [found.cosine] if math.isfinite(found.cosine) else []
            if len(cosines) == _FEW:
                break
        cosine = statistics.median(cosines) if cosines else 1.0
        if cosine < ALIKE:
            yield (
                f"the bases of {one} and {other} look unrelated: the median cosine of {len(cosines)} sampled tensors "
                f"is {cosine:.2f} (related models: {ALIKE:g} to 1). What residuals of different bases add up to is a "
                "difference to none of them"
            )


def _one_tokenizer(inputs: Mapping[str, Checkpoint]) -> Iterable[str]:
    """A warning where the sum has the tokenizer of the first one, and others have another."""
    one, *others = inputs
    differing = [role for role in others if not parents.same_tokens((inputs[one], inputs[role]))]
    if differing:
        yield f"{', '.join(differing)} and {one} have other tokenizers: the sum has that of {one}"
