"""The plan of a merge, and what is to be said of its inputs."""

from __future__ import annotations

from dataclasses import replace

from ires_kernels.checkpoints import hub, parents, roles
from ires_kernels.files import hidden
from ires_kernels.planning.application import plan_apply
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.inputs import open_inputs
from ires_kernels.planning.plan import Plan, related
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.summing import plan_residual
from ires_kernels.records.operation import Operation, other_files, same_plan
from ires_kernels.streaming.reader import second_copies

_FETCH = ": where there is a network, naming it as org/name@commit fetches what a merge takes from an instruct model"


def planned_again(operation: Operation) -> Plan:
    """The plan of an unfinished new folder. Raises CheckpointError where its inputs are not what they were."""
    paths = {role: hub.local(path) for role, path in operation.paths.items()}
    inputs = open_inputs(paths, follow_links=operation.follow_links)
    plan_again = plan_residual if operation.kind == "extract" else plan_apply
    known = None if other_files(inputs, operation.stamps) else operation.known_layouts()
    rules = Rules.from_dict(operation.rules)
    with Looks(inputs) as looks:
        plan = warned(plan_again(inputs, rules, second_copies(inputs), known, looks), looks)
    same_plan(operation, plan)
    return plan


def warned(plan: Plan, looks: Looks) -> Plan:
    """The plan, and what is to be said of inputs by their values, and where one has a stranger's state."""
    plan = related(plan, looks)
    theirs = [text for checkpoint in plan.inputs.values() for text in hidden.foreign(checkpoint.path).values()]
    givers = [each for role, each in plan.inputs.items() if roles.is_instruct(role)]
    doubts = [text for each in givers if (text := hub.doubt(each.path, parents.has_vocabulary(each)))]
    unread = [role for role, checkpoint in plan.inputs.items() if checkpoint.is_unread]
    told = f"of {', '.join(unread)} only headers were read, and no values: a merge compares some first"
    notes = (*plan.notes, told) if unread else plan.notes
    return replace(plan, warnings=(*plan.warnings, *theirs, *(text + _FETCH for text in doubts)), notes=notes)
