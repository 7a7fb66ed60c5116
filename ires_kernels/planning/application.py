"""Planning target + alpha * residuals: the steps of all tensors, or one error that lists what is wrong.

Nothing is written here, and of the weights no more is read than `open_checkpoint` has read and what is looked at to
match them; but the files beside them are.
"""

from __future__ import annotations

from collections.abc import Mapping

from ires_kernels.checkpoints import configs, names, parents, selection, settings
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.dtypes import STORAGE
from ires_kernels.planning import agreement, by_token, completeness, deeds
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.findings import NOTHING, Findings
from ires_kernels.planning.layout import Layout
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.shards import as_json, index, lay_out
from ires_kernels.planning.share import checked_share
from ires_kernels.planning.steps import Step

_IDS = "Correct the id in that file, or take a model whose tokenizer fits its rows."
_IDS_BY_ROWS = "Rows by number leave its ids without rows: --vocabulary target keeps those that the target has."


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
    found = Findings.of(inputs, rules, copies)
    models = found.inputs
    completeness.check_models(found)
    found.refuse("apply")
    agreement.match("target", layouts, looks, found)
    steps = _apply_steps(target, found)
    layout = [
        (shard.path.name, {"format": "pt"} | shard.header.metadata, [s for n in shard.header.tensors for s in steps[n]])
        for shard in target.shards
    ]
    everything = [step for _, _, group in layout for step in group]
    completeness.check_left_over(models, found)
    completeness.check_tied_head(models, everything, found)
    found.check_patterns()
    share = checked_share(everything, found)
    if (not found.missing or rules.allow_missing) and all(
        step.reason not in ("", by_token.ALPHA_0) for step in everything
    ):
        firsts = [f"{role} has {next(iter(models[role].tensors), '')!r} …" for role in list(inputs)[:2]]
        found.problem(f"no tensor would be merged: the {', '.join(firsts)}", NOTHING)
    found.refuse("apply")

    foreign = by_token.other_vocabulary(models, everything, found)
    if foreign is not None:
        found.warnings.append(
            f"{foreign} stays as it is, and the other models have other rows or tokens for it: the target keeps its "
            "tokenizer and chat template"
        )
    found.warnings += parents.turned_round(inputs)
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
    files, placed = lay_out(layout)
    documents = [] if target.index_name is None else [(target.index_name, index(placed, target.index_metadata))]
    if rules.dtype is not None:
        changed = settings.of_plain(config, side_files, STORAGE[rules.dtype].torch)
        documents += [(name, as_json(table)) for name, table in changed.items() if table is not None]
        side_files = [file for file in side_files if file.name not in changed]
    elif config is not None and config is not target.config:
        documents.append(("config.json", as_json(config)))
        side_files = [file for file in side_files if file.name != "config.json"]
    return Plan(
        "apply", dict(inputs), rules, files, placed, tuple(documents), tuple(side_files), tuple(found.comparisons), {},
        tuple(found.missing), tuple(sides.left), tuple(found.warnings),
        tuple(found.notes), share=share, layouts=found.matcher.layouts,
    )  # fmt: skip


def _apply_steps(target: Checkpoint, found: Findings) -> dict[str, list[Step]]:
    """What becomes of each tensor that the target's files hold, by its name there."""
    own = found.numbers["target"]
    steps = {name: deeds.apply_steps(ref, found) for name in target.tensors if (ref := own.tensor(name)) is not None}
    for name, weight in own.companions.items():
        made = steps[weight.codes.name] if weight else []
        steps[name] = deeds.companion_steps(target.tensors[name], made, found)
    return steps
