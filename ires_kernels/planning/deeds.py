"""What happens to each tensor of a merge: the operation it gets, or why it is copied, or why the merge is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ires_kernels.checkpoints import names, roles
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.header import brief
from ires_kernels.checkpoints.quantized import QuantizedRef, Ref
from ires_kernels.dtypes import FLOATS
from ires_kernels.planning.by_token import ALPHA_0, differing_rows, merged_rows, tensors_by_token
from ires_kernels.planning.findings import CODES, Findings
from ires_kernels.planning.matching import Match
from ires_kernels.planning.steps import Comparison, Encoding, Op, Output, Step, operands

ONLY_TARGET = "only in the target"
_BESIDE = "kept with the codes"

_SHAPES = "Operands are not broadcast: take models of one architecture, or leave such tensors as they are with --skip."
_MIXED = "Save that model again with one dtype for all of these, or leave such tensors as they are with --skip."
_INTEGERS = "What is not floating point is copied where instruct and base agree; leave the rest as it is with --skip."
_INTEGERS_OF_BLEND = "What is not floating point is copied where models agree; leave the rest as it is with --skip."
_DTYPE = (
    "Nothing here makes new codes of that kind: write plain weights instead with -o OUT --dtype bf16 (f16, f32), or "
    "leave such modules as they are with --skip."
)
_SECOND = "Give both the same --skip and --alpha-for: models that load one tensor for the two would load either."


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
    if len(match.refs) == 1 and not found.is_blend:  # of a blend all models have all tensors
        return _keep(ref, match, ONLY_TARGET, found)
    if absent and names.is_recomputed(ref):
        return _keep(ref, match, f"a buffer that loaders compute again, not in {' and '.join(absent)}", found)
    if absent:
        found.absent(name, match.refs, absent)
        match = match._replace(refs=_of_whole_pairs(match, found))
        if len(match.refs) == 1 or found.is_blend:  # whose weights are those of all models
            return _keep(ref, match, f"not in {' and '.join(absent)}", found)
    if not _numbers(name, match.refs, found):
        return _keep(ref, match, "not mergeable", found)
    if ref.dtype not in FLOATS:
        where = "all models" if found.is_blend else "instruct and base"
        return _keep(ref, match, f"{ref.dtype}, equal in {where}", found)
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


def _numbers(name: str, matched: Mapping[str, tuple[Ref, ...]], found: Findings) -> bool:
    """Whether tensors fit each other, element by element; what is not floating point is left to be compared."""
    several = next(((role, refs) for role, refs in matched.items() if len({ref.dtype for ref in refs}) > 1), None)
    if several is not None:
        dtypes = dict.fromkeys(ref.dtype for ref in several[1])
        found.about(name, f"is made of {' and '.join(dtypes)} in {several[0]}", _MIXED)
        return False
    by_token = not found.is_blend and tensors_by_token(matched, found) is not None  # however many rows they have
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
    given = [("target", role) for role in matched if role != "target"] if found.is_blend else roles.added(matched)
    pairs = [
        Comparison(name, (each[0], each[1]), (refs[0], refs[1]))
        for each in given
        if len(refs := [ref for role in each for ref in matched[role] if isinstance(ref, TensorRef)]) == len(each) == 2
    ]
    if len(set(dtypes.values())) > 1 or not pairs or len(pairs) < len(given):
        listed = ", ".join(f"{dtype} in {role}" for role, dtype in dtypes.items())
        found.about(name, f"is {listed}", _INTEGERS_OF_BLEND if found.is_blend else _INTEGERS)
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
