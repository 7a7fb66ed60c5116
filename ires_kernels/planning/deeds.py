"""What happens to each tensor of a merge: the operation it gets, or why it is copied, or why the merge is refused."""

from __future__ import annotations

import shlex
from collections.abc import Container, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace

from ires_kernels.checkpoints import names, roles
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef, is_factor, shard_number
from ires_kernels.checkpoints.folders import MERGE_ADAPTER, listed
from ires_kernels.checkpoints.header import brief
from ires_kernels.checkpoints.quantized import QuantizedRef, Ref
from ires_kernels.dtypes import FLOATS
from ires_kernels.planning import absences
from ires_kernels.planning.alignment import Aligned, align
from ires_kernels.planning.by_token import ALPHA_0, differing_rows, merged_rows, tensors_by_token
from ires_kernels.planning.evidence import Looks
from ires_kernels.planning.findings import CODES, Findings
from ires_kernels.planning.layout import Layout
from ires_kernels.planning.matching import Match
from ires_kernels.planning.steps import Comparison, Encoding, Op, Output, Step, operands

ONLY_TARGET = "only in the target"
_RENAMES = (
    "A of --rename A=B is a part of names of {role}, between dots, B what it is in {others}: `ires inspect --tensors` "
    "lists the names."
)
_BESIDE = "kept with the codes"

_SHAPES = "Operands are not broadcast: take models of one architecture, or leave such tensors as they are with --skip."
_MIXED = "Save that model again with one dtype for all of these, or leave such tensors as they are with --skip."
_INTEGERS = "What is not floating point is copied where instruct and base agree; leave the rest as it is with --skip."
_EMPTY = (
    "A model looks like this when it is saved under ZeRO-3 without gathering its parameters: save it again with them "
    "(DeepSpeed: stage3_gather_16bit_weights_on_model_save), or take it from elsewhere."
)
_ODD = (
    "Take models that one exporter has saved, or leave such tensors as they are with --skip {skip}; where values may "
    "differ as much as that, --trust-names compares none."
)
_FACTORS = (
    f"Sums of its factors are not sums of its updates. {MERGE_ADAPTER} "
    "To merge the weights below it alone, leave its factors as they are with --skip."
)
_DTYPE = (
    "Nothing here makes new codes of that kind: write plain weights instead with -o OUT --dtype bf16 (f16, f32), or "
    "leave such modules as they are with --skip."
)
_SECOND = "Give both the same --skip and --alpha-for: models that load one tensor for the two would load either."
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


def match(role: str, layouts: Mapping[str, Layout] | None, looks: Looks | None, found: Findings) -> None:
    """Find what belongs to the tensors of `role` in the other models, unless their layouts are known already."""
    if layouts is not None:
        found.matcher.layouts = layouts
        return
    if found.rules.trust_names:
        found.notes.append("tensors were matched by names and shapes alone (--trust-names): no values were compared")
    with nullcontext(looks) if looks is not None else Looks(found.inputs) as used:
        aligned = {
            other: align(
                None if found.rules.trust_names else used,
                role,
                other,
                found.inputs,
                copies=found.matcher.copies,
                left=lambda name: found.skipped(name) is not None,
                renames=found.rules.renames,
            )
            for other in found.inputs
            if other != role
        }
    found.matcher.layouts = {other: each.layout for other, each in aligned.items()}
    for old, new in found.rules.renames:
        if not any((old, new) in each.renamed for each in aligned.values()):
            text = f"--rename {shlex.quote(f'{old}={new}')} gives no tensor of {role} a partner of as many elements"
            found.problem(text, _RENAMES.format(role=role, others=" or ".join(aligned)))
    # What is zero in base, or too little to tell, may have become anything in its descendants.
    silent = {name for other, each in aligned.items() if roles.is_base(other) for name in each.silent}
    for other, each in aligned.items():
        for text, advice, about in each.problems:
            found.problem(text, advice, about)
            found.told.update(about)
        found.told.update(each.passed)
        found.notes += each.notes
        _check_values(role, other, each, silent, found)


def _check_values(role: str, other: str, aligned: Aligned, silent: Container[str], found: Findings) -> None:
    """Refuse tensors whose values are not those of what they were matched with, where those of others are."""
    tensors, matcher = found.inputs[role].tensors, found.matcher

    def is_asked(match: Match) -> bool:
        """Whether values have a say: something is added, and not by tokens, which are looked at elsewhere."""
        by_token = None if match.absent else tensors_by_token(match.refs, found)
        return not match.absent and (by_token is None or found.vocabulary.split(by_token) is None)

    failed = [
        name
        for name in aligned.failed
        if name not in silent
        and not (names.is_head(name) and found.inputs[other].kind == "residual")  # base may have had none of its own
        and any(found.rules.factors(name) or (1,))
        and all(map(is_asked, matcher.of(role, tensors[name])))
    ]
    by_kind: dict[tuple[str, str], list[str]] = {}
    for name in failed:
        by_kind.setdefault((names.pattern(name), aligned.causes.get(name, "")), []).append(name)
    everything = {name for checkpoint in found.inputs.values() for name in checkpoint.tensors}
    runs = aligned.layout.runs
    skip = absences.skip_pattern(failed, {*failed}, everything) if failed else ""
    for (kind, cause), those in by_kind.items():
        many = len(those) > 1
        is_named = all(name not in runs for name in those)
        what = f"{len(those)} tensors {kind}" if many else brief(those[0])
        verb = ("agree" if many else "agrees") if is_named else ("fit" if many else "fits")
        which = f"in name and shape with {other}" if is_named else f"by name and shape what {other} has for it"
        mean = sum(aligned.failed[name] for name in those) / len(those)
        text = (
            f"{what} {verb} {which}, {'their' if many else 'its'} values do not (cosine {mean:.2f}), while those of "
            f"{aligned.agreed} others do{f': {other} {cause}' if cause else ''}"
        )
        found.problem(text, _ODD.format(skip=skip), those)


def _few(found: list[str]) -> str:
    """How many, and the first of them."""
    return f"{len(found)} tensors such as {brief(found[0])}" if len(found) > 1 else brief(found[0])


def apply_steps(ref: Ref, found: Findings) -> list[Step]:
    """What becomes of the target's tensor `ref`."""
    rules, name = found.rules, ref.name
    # A second copy of the embedding gets what the embedding gets, or the two would part.
    original = found.matcher.original(name)
    skipped = found.skipped(name)
    if (skipped is None) != (found.skipped(original) is None) or rules.factors(name) != rules.factors(original):
        found.problem(f"{brief(name)} is a second copy of {brief(original)} in the target, with other rules", _SECOND)
    if skipped is not None:
        return [_keep(ref, Match(0, {"target": (ref,)}, ()), skipped, found)]
    if found.codes(name):
        return [_keep(ref, Match(0, {"target": (ref,)}, ()), "not mergeable", found)]
    steps = [step for match in found.matcher.of("target", ref) for step in _apply_steps(ref, match, found)]
    if len(steps) > 1 and isinstance(ref, QuantizedRef) and found.rules.dtype is None:
        found.about(name, "is quantized in the target, and only a part of it would change", _DTYPE)
    return steps


def _apply_steps(ref: Ref, match: Match, found: Findings) -> list[Step]:
    """What becomes of a run of the elements of `ref`: one thing, or of a tensor with a row for each token several."""
    refs = _of_whole_pairs(match, found)
    by_token = tensors_by_token(refs, found) if len(refs) > 1 else None
    split = found.vocabulary.split(by_token) if by_token else None
    if by_token is None or split is None:
        return [_apply_step(ref, match, found)]
    if match.absent:
        found.absent(ref.name, match.refs, match.absent)
    if isinstance(ref, QuantizedRef) and found.rules.dtype is None:
        found.about(ref.name, "is quantized in the target, and has not the rows of the other models", _DTYPE)
        return [_keep(ref, match, "not mergeable", found)]
    return merged_rows(ref, by_token, split, found)


def _of_whole_pairs(match: Match, found: Findings) -> dict[str, tuple[Ref, ...]]:
    """What was matched, without the halves of pairs of which the other half has nothing."""
    halves = {role for each in roles.added(found.inputs) for role in each if not set(match.absent).isdisjoint(each)}
    return {role: refs for role, refs in match.refs.items() if role not in halves}


def companion_steps(ref: TensorRef, made: Iterable[Step], found: Findings) -> list[Step]:
    """What becomes of the target's `ref`, a scale or the like of a weight of which `made` are the steps."""
    if found.rules.dtype is not None:
        return []  # of plain numbers it says nothing
    for step in made:
        if step.output.encoding is not None and ref in step.output.encoding.scales:
            encoding = step.output.encoding._replace(part="scale")
            return [replace(step, output=Output(ref.name, ref.dtype, ref.shape, encoding=encoding), first=0, count=-1)]
    own = Match(0, {"target": (ref,)}, ())
    return [_step(ref, own, "copy", ref.dtype, reason=next((s.reason for s in made if s.reason), _BESIDE))]


def _apply_step(ref: Ref, match: Match, found: Findings) -> Step:
    """What becomes of a run of the elements of `ref`."""
    rules, name, absent = found.rules, ref.name, match.absent
    if len(match.refs) == 1:
        return _keep(ref, match, ONLY_TARGET, found)
    if absent and names.is_recomputed(ref):
        return _keep(ref, match, f"a buffer that loaders compute again, not in {' and '.join(absent)}", found)
    if absent:
        found.absent(name, match.refs, absent)
        match = match._replace(refs=_of_whole_pairs(match, found))
        if len(match.refs) == 1:
            return _keep(ref, match, f"not in {' and '.join(absent)}", found)
    if not _numbers(name, match.refs, found):
        return _keep(ref, match, "not mergeable", found)
    if ref.dtype not in FLOATS:
        return _keep(ref, match, f"{ref.dtype}, equal in instruct and base", found)
    factors, op = found.added(name, match.refs)
    if not any(factors):
        return _keep(ref, match, ALPHA_0, found)
    stream = found.matcher.stream(found.matcher.original(name))
    step = _step(ref, match, op, rules.dtype or ref.dtype, factors, stream)
    return step if rules.dtype or not isinstance(ref, QuantizedRef) else _encoded(step, ref, found)


def _encoded(step: Step, weight: QuantizedRef, found: Findings) -> Step:
    """The step with its result in the format of the target's weight."""
    if not weight.format.is_encoded:
        found.about(
            weight.name, f"is {weight.format} in the target", _DTYPE, f" of target ({weight.path})", " of target"
        )
    codes = weight.codes
    return replace(step, output=Output(codes.name, codes.dtype, codes.shape, encoding=Encoding(weight, "codes")))


def extract_steps(ref: Ref, found: Findings) -> list[Step]:
    """The difference for the instruct model's tensor `ref`; nothing when it is not stored."""
    reason = found.skipped(ref.name) or ("not mergeable" if found.codes(ref.name) else None)
    if reason is None:
        matches = found.matcher.of("instruct", ref)
        reason = next(filter(None, [_lack(ref, match, found) for match in matches]), None)
        if reason is None:
            return [step for match in matches for step in _differences(ref, match, found)]
    found.not_stored[ref.name] = (reason, ref)
    return []


def _differences(ref: Ref, match: Match, found: Findings) -> list[Step]:
    """The difference of a run of the elements of `ref`; of rows of tokens that base does not have, they themselves."""
    by_token = tensors_by_token(match.refs, found)
    split = found.vocabulary.split(by_token) if by_token else None
    if by_token is None or split is None:
        return [_step(ref, match, "subtract", found.rules.dtype or "F32", (), found.matcher.stream(ref.name))]
    return differing_rows(ref, by_token, split, found)


def _lack(ref: Ref, match: Match, found: Findings) -> str | None:
    """Why there is no difference of a run of the elements of `ref`; None where there is one."""
    if match.absent and names.is_recomputed(ref):
        return "a buffer that loaders compute again, not in base"
    if match.absent:
        found.absent(ref.name, ["instruct"], ["base"])
        return "not in base"
    fit = _numbers(ref.name, match.refs, found)
    return None if fit and ref.dtype in FLOATS else f"{ref.dtype}, equal in instruct and base"


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


def _numbers(name: str, matched: Mapping[str, tuple[Ref, ...]], found: Findings) -> bool:
    """Whether tensors fit each other, element by element; what is not floating point is left to be compared."""
    several = next(((role, refs) for role, refs in matched.items() if len({ref.dtype for ref in refs}) > 1), None)
    if several is not None:
        dtypes = dict.fromkeys(ref.dtype for ref in several[1])
        found.about(name, f"is made of {' and '.join(dtypes)} in {several[0]}", _MIXED)
        return False
    by_token = tensors_by_token(matched, found) is not None  # however many rows they have
    tensors = {role: refs[0] for role, refs in matched.items()}
    first, *others = ((role, refs[0]) for role, refs in matched.items() if len(refs) == 1)
    for role, ref in others:
        if ref.shape != first[1].shape and not by_token:
            found.about(
                name,
                f"has shape {brief(list(ref.shape))} in {role} ({ref.path}), "
                f"{brief(list(first[1].shape))} in {first[0]} ({first[1].path})",
                _SHAPES,
            )
            return False
    dtypes = {role: ref.dtype for role, ref in tensors.items()}
    if all(dtype in FLOATS for dtype in dtypes.values()):
        return True
    pairs = [
        Comparison(name, (each[0], each[1]), (refs[0], refs[1]))
        for each in roles.added(matched)
        if len(refs := [ref for role in each for ref in matched[role] if isinstance(ref, TensorRef)]) == len(each) == 2
    ]
    if len(set(dtypes.values())) > 1 or not pairs or len(pairs) < len(roles.added(matched)):
        listed = ", ".join(f"{dtype} in {role}" for role, dtype in dtypes.items())
        found.about(name, f"is {listed}", _INTEGERS)
        return False
    found.comparisons += pairs
    return True


def _step(
    ref: Ref, match: Match, op: Op, dtype: str, factors: tuple[float, ...] = (), stream: int = 0, reason: str = ""
) -> Step:
    """The step that makes a run of an output of the layout of `ref` out of all that was matched."""
    output, given = Output(ref.name, dtype, ref.shape), operands(match.refs)
    return Step(output, op, given, factors, stream, reason, match.first, given[0].count)


def _keep(ref: Ref, match: Match, reason: str, found: Findings) -> Step:
    """A copy of what the target has, in another dtype where one is asked for."""
    own = match._replace(refs={"target": match.refs["target"]})
    dtype = found.rules.dtype
    if dtype is None and isinstance(ref, QuantizedRef):
        return _keep(ref.codes, Match(0, {"target": (ref.codes,)}, ()), reason, found)
    if dtype is None or ref.dtype not in FLOATS or (ref.dtype == dtype and isinstance(ref, TensorRef)):
        return _step(ref, own, "copy", ref.dtype, reason=reason)
    part = found.modules.parts["target"].get(ref.name)
    if part is not None:
        code = found.inputs["target"].tensors[part.code]
        found.about(
            part.code, f"is {part.why}, and cannot become {dtype}", CODES, f" of target ({code.path})", " of target"
        )
    return _step(ref, own, "convert", dtype, stream=found.matcher.stream(ref.name), reason=reason)
