"""Whether models are whole: tensors that nobody filled, or for which there is no place, and heads that are tied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef, is_factor, shard_number
from ires_kernels.checkpoints.folders import MERGE_ADAPTER, listed
from ires_kernels.checkpoints.header import brief
from ires_kernels.planning import absences
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.findings import Findings
from ires_kernels.planning.steps import Comparison, Step

_EMPTY = (
    "A model looks like this when it is saved under ZeRO-3 without gathering its parameters: save it again with them "
    "(DeepSpeed: stage3_gather_16bit_weights_on_model_save), or take it from elsewhere."
)
_FACTORS = (
    f"Sums of its factors are not sums of its updates. {MERGE_ADAPTER} "
    "To merge the weights below it alone, leave its factors as they are with --skip."
)
_TIED = (
    "One tensor cannot take the updates of two. Save the target with an output head of its own "
    "(tie_word_embeddings=False), or leave the head out with --skip lm_head."
)


def check_models(found: Findings) -> None:
    """Find models that are none: with tensors that nobody filled, or with an adapter that is not merged in."""
    for role, checkpoint in found.inputs.items():
        where = f" of {role} ({checkpoint.path})"
        written = role == "target"  # whose tensors are in the output, skipped or not
        for ref in names.empty(checkpoint, found.inputs.values()):
            if written or found.skipped(ref.name) is None:
                rest = f"is empty: shape {list(ref.shape)}"
                found.about(ref.name, rest, _EMPTY, f" of {role} ({ref.path})", where)
        if written:
            alone = [ref.name for ref in checkpoint.tensors.values() if not ref.numel]
            verb = "have" if len(alone) > 1 else "has"
            found.warnings += [f"{_few(alone)} of the target {verb} no elements"] if alone else []
        if checkpoint.beside:
            read = checkpoint.index_name or checkpoint.shards[0].path.name
            found.notes.append(f"{checkpoint.path}: {listed(checkpoint.beside)} was not read, but {read}")
        factors = [name for name in checkpoint.tensors if is_factor(name) and found.skipped(name) is None]
        if factors:
            text = f"{role} ({checkpoint.path}) holds an adapter that is not merged in: {_few(factors)}"
            found.problem(text, _FACTORS)


def _few(found: list[str]) -> str:
    """How many, and the first of them."""
    return f"{len(found)} tensors such as {brief(found[0])}" if len(found) > 1 else brief(found[0])


def check_left_over(inputs: Mapping[str, Checkpoint], found: Findings) -> None:
    """Find tensors of the residuals, or of instruct and base, for which the target has no place."""
    sources = {role: checkpoint for role, checkpoint in inputs.items() if role != "target"}
    target = inputs["target"]
    unused = {role: dict.fromkeys(found.matcher.unused(role, "target")) for role in sources}
    left = {name: None for names_left in unused.values() for name in names_left}
    number = shard_number(target.path)
    alone = number is not None and number[1] > 1
    others = 0
    shared = [n for n in left if found.skipped(n) is None and all(n in unused[role] for role in sources)]
    equal = {} if alone else _equal_in_pair(shared, found)
    for name in left:
        present = [role for role in sources if name in unused[role]]
        if found.skipped(name) is not None or found.codes(name) or name in equal:
            continue
        if alone:
            others += 1
        elif names.is_recomputed(sources[present[0]].tensors[name]):
            found.buffers.append(name)
        elif name in found.matcher.copies:
            found.notes.append(
                f"{brief(name)} is a second copy of {found.matcher.original(name)}, which is all that the target has"
            )
        elif not (names.is_head(name) and names.is_tied(target)):
            found.absent(name, present, ["target"])
        elif not all(map(names.is_tied, sources.values())):  # else it is a second copy of the embedding
            found.absent(name, present, ["target, whose head is its embedding"], _TIED)
    if alone and number is not None and others:
        found.notes.append(
            f"target is shard {number[0]} of {number[1]}: {others} tensors of the others stay as they are"
        )
    found.note_buffers("target")
    found.comparisons += equal.values()
    rest = [*target.tensors, *(name for name in inputs.get("instruct", target).tensors if name not in equal)]
    for kind, names_of in absences.by_module(equal, rest).items():
        nbytes = sum(equal[name].inputs[0].nbytes for name in names_of)
        what = f"{brief(kind)} ({len(names_of)} tensors, {nbytes:,} bytes)" if len(names_of) > 1 else brief(kind)
        found.notes.append(f"{what} is in instruct and base alone, and the same in both: nothing of it is lost")


def _equal_in_pair(left: Iterable[str], found: Findings) -> dict[str, Comparison]:
    """Of tensors that only instruct and base have those that look the same in both: all of their bytes are compared."""
    if found.inputs.keys() != {"target", "instruct", "base"}:
        return {}
    equal = {}
    with Looks({role: found.inputs[role] for role in ("instruct", "base")}) as looks:
        for name in left:
            one, two = (found.inputs[role].tensors[name] for role in ("instruct", "base"))
            if isinstance(one, TensorRef) and isinstance(two, TensorRef) and one.shape == two.shape:
                mine, theirs = looks.of("instruct", one), looks.of("base", two)
                alike = mine == theirs and (mine is not None or found.inputs["base"].is_unread)
                if alike and not names.is_recomputed(one):
                    equal[name] = Comparison(name, ("instruct", "base"), (one, two))
    return equal


def check_tied_head(inputs: Mapping[str, Checkpoint], steps: Iterable[Step], found: Findings) -> None:
    """Find a target that says its head is its embedding, stores both, and would get different updates for them."""
    target, *sources = inputs.values()
    embedding = names.embedding(target)
    if names.says_tied(target) is not True or embedding is None:
        return
    table: dict[str, list[tuple[str, str, tuple[float, ...], int]]] = {}
    for step in steps:
        table.setdefault(step.name, []).append((step.reason, step.op, step.factors, step.count))
    one = table[embedding.name]
    for name in [name for name in table if names.is_head(name) and name not in found.matcher.copies]:
        two = table[name]
        changed = not all(reason for reason, *_ in (*one, *two))
        alike = [done for _, *done in one] == [done for _, *done in two]
        if changed and not (alike and all(map(names.is_tied, sources))):
            found.problem(
                f"config.json of the target ties {name} to {embedding.name}, and its files hold both, with other "
                "updates",
                _TIED,
            )
