"""Planning instruct - base, a residual: the steps of all tensors, or one error that lists what is wrong."""

from __future__ import annotations

from collections.abc import Mapping

from ires_kernels.checkpoints import configs, names, parents, selection
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.planning import agreement, completeness, deeds
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.findings import NOTHING, Findings
from ires_kernels.planning.layout import Layout
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.shards import lay_out_residual
from ires_kernels.planning.share import checked_share


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
    found = Findings.of(inputs, rules, copies)
    base, instruct = found.inputs["base"], found.inputs["instruct"]
    completeness.check_models(found)
    found.refuse("extract")
    agreement.match("instruct", layouts, looks, found)
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
    share = checked_share([step for group in groups for step in group], found)
    if not groups and (not found.missing or rules.allow_missing):
        found.problem("no tensor would be stored", NOTHING)
    found.refuse("extract")
    found.warnings += parents.turned_round(inputs)
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
