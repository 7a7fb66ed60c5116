"""Whether two models descend from one, and in which of their tensors: by the samples of `evidence`, over a whole merge.

Fine-tuning and continual pre-training move weights by little, so a model keeps pointing where its ancestor did; models
trained from different random weights are orthogonal, however alike they are in shape, norm and behaviour. A residual
added to a stranger does harm or nothing, and no shape or name gives it away. So a merge compares its target with the
base; and as the difference of strangers is no residual, it compares instruct with base as well. `extract` keeps what
base has at the sampled places, for `apply` to know base by.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ires_kernels.checkpoints import names, roles
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.quantized import QuantizedRef, Ref
from ires_kernels.dtypes import FLOATS
from ires_kernels.planning.absences import skip_pattern
from ires_kernels.planning.evidence import ALIKE, FEWEST, Likeness, Looks, Sample, likeness, places, through
from ires_kernels.planning.steps import Step, by_output
from ires_kernels.planning.values import verdict

ODD = 0.25
"""Where the weakest parts of the tensors of one kind have less in common, in the median, some of their rows are others.
It lies below ALIKE since a part has RUN elements, whose cosine is 0.1 off now and then."""

_MEANS = {
    "target": "A residual works only on models trained further from the base it was taken from",
    "instruct": "Their difference holds what an instruct model has learnt only if it was trained from that base",
    "kin": "Weights of models that were not trained from one have no mean that is one",
}
_MEANINGLESS = {True: "their mean", False: "what is added"}


@dataclass(frozen=True, slots=True)
class Ancestry:
    """How much a model and a base have in common."""

    model: str
    """Role of the model."""
    base: str
    """What the base is called: base, or "the base of residual"."""
    cosine: float
    """Median over the matrices of the cosine between the sampled elements of the two: 1 the same, 0 strangers."""
    distance: float
    """Median over the matrices of the norm of their difference, in units of the base's norm."""
    matrices: int
    """That were compared; norms are near 1 in all models."""
    tensors: int
    """That were compared, with the others."""
    equal: bool
    """Whether all that was compared is equal."""
    odd: dict[str, float]
    """Names of tensors of relatives that are no relatives, at least not in all rows, and their cosine there."""

    @property
    def related(self) -> bool:
        """Whether the residual of the base is likely to mean something to the model."""
        return self.cosine >= ALIKE

    @property
    def is_kin(self) -> bool:
        """Whether neither is the base of the other: they are models of one blend."""
        return self.base == "target"

    def __str__(self) -> str:
        if self.equal:
            return f"{self.model} is {self.base}: all that was sampled is equal, in {self.tensors} tensors"
        what = "is a stranger to" if not self.related else "is related to" if self.is_kin else "descends from"
        return (
            f"{self.model} {what} {self.base}: median cosine {self.cosine:.2f} of {self.matrices} matrices, distance "
            f"{self.distance:.2f} of the norm"
        )

    def to_dict(self) -> dict[str, Any]:
        """In JSON types, with a word for what it comes to."""
        kin = "related" if self.is_kin else "descends"
        word = "is" if self.equal else kin if self.related else "stranger"
        return {"relation": word, **asdict(self)}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Ancestry:
        """What `to_dict` gave."""
        return cls(**{key: value for key, value in table.items() if key != "relation"})


def compare(inputs: Mapping[str, Checkpoint], steps: Sequence[Step], looks: Looks) -> tuple[Ancestry, ...]:
    """What target and instruct have in common with base, or with the bases of the residuals, as far as that is known.

    steps  of the plan: tensors that are not merged are not compared
    Raises CheckpointError for a file that changed, and OSError.
    """
    pairs = [(model, "target") for model in inputs if model != "target" and roles.are_blended(inputs)] or [
        (model, base)
        for base in inputs
        if roles.is_base(base) or roles.is_residual(base)
        for model in (roles.instruct_of(base), "target")
        if model in inputs
    ]
    found = (_compared(model, base, steps, looks) for model, base in pairs)
    return tuple(each for each in found if each is not None)


def warnings(found: Iterable[Ancestry], inputs: Mapping[str, Checkpoint]) -> Iterator[str]:
    """What to say of strangers, and of relatives that are none in part, among the models of a merge."""
    for each in found:
        if not each.related:
            yield (
                f"{each.model} and {each.base} look unrelated: the median cosine of {each.matrices} sampled tensors is "
                f"{each.cosine:.2f} (related models: {ALIKE:g} to 1), their distance {each.distance:.2f} times the "
                f"{'target' if each.is_kin else 'base'}'s norm. {_MEANS[_kind(each)]}"
            )
        elif each.odd:
            kinds: dict[str, list[float]] = {}
            for name, cosine in sorted(each.odd.items()):
                kinds.setdefault(names.pattern(name), []).append(cosine)
            listed = [f"{kind} (cosine {statistics.median(cosines):.2f})" for kind, cosines in kinds.items()]
            more = f" and {len(listed) - 3} more kinds" if len(listed) > 3 else ""
            everything = {name for checkpoint in inputs.values() for name in checkpoint.tensors}
            yield (
                f"{each.model} and {each.base} are related, but for {', '.join(listed[:3])}{more}: these were trained "
                f"anew, or one of the models has their rows in another order, and then {_MEANINGLESS[each.is_kin]} "
                "means nothing. Take models that were saved alike, or leave such tensors as they are with --skip "
                f"{skip_pattern(set(each.odd), set(each.odd), everything)}"
            )


def _kind(each: Ancestry) -> str:
    """What a model is to the other."""
    return "kin" if each.is_kin else "target" if each.model == "target" else "instruct"


def _compared(model: str, base: str, steps: Iterable[Step], looks: Looks) -> Ancestry | None:
    matrices: dict[str, Likeness] = {}
    others: list[Likeness] = []
    for name, pieces in _pieces(model, base, steps, looks.inputs):
        found = _likeness(base, model, pieces, looks)
        if (
            found is not None
            and len(pieces[0].source.shape) > 1
            and found.count >= FEWEST
            and math.isfinite(found.cosine)
        ):
            matrices[name] = found
        elif found is not None:
            others.append(found)
    if not matrices:
        return None
    cosine = statistics.median(found.cosine for found in matrices.values())
    return Ancestry(
        model,
        f"the base of {base}" if roles.is_residual(base) else base,
        cosine,
        statistics.median(found.distance for found in matrices.values()),
        len(matrices),
        len(matrices) + len(others),
        all(found.equal for found in (*matrices.values(), *others)),
        _odd(matrices, looks.inputs[model]) if cosine >= ALIKE else {},
    )


def _odd(matrices: Mapping[str, Likeness], model: Checkpoint) -> dict[str, float]:
    """Tensors whose values deny what those of most confirm, and kinds of which some of the rows do."""
    odd = {name: found.cosine for name, found in matrices.items() if verdict(found) is False}
    suspects = {names.pattern(name) for name, found in matrices.items() if found.weakest < ODD}
    kinds: dict[str, dict[str, float]] = {kind: {} for kind in suspects}
    for name, found in matrices.items() if kinds else ():
        kind = names.pattern(name)
        if kind in kinds and math.isfinite(found.weakest):
            kinds[kind][name] = found.weakest
    for weakest in kinds.values():
        ref = model.tensors.get(next(iter(weakest), ""))
        by_token = ref is not None and names.is_by_token(ref, model)  # which are learnt row by row
        if not by_token and statistics.median(weakest.values()) < ODD:
            odd = weakest | odd
    return odd


def _likeness(source: str, own: str, pieces: Sequence[_Piece], looks: Looks) -> Likeness | None:
    """Compare a tensor of the model `source` with what one of `own` has of it."""
    first = pieces[0]
    if first.count == first.source.numel == first.own.numel:
        return looks.compare(source, first.source, own, first.own)
    sample = looks.of(source, first.source)
    if sample is None:
        return None
    values, runs = through(sample, [(piece.start, piece.count, piece.place) for piece in pieces])
    found = looks.at(own, first.own, runs)
    return None if found is None else likeness(values, found.values)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of elements that two tensors share."""

    source: Ref
    start: int
    """The first one's flat index in `source`."""
    own: Ref
    place: int
    """And in `own`."""
    count: int


def _pieces(
    own: str, source: str, steps: Iterable[Step], inputs: Mapping[str, Checkpoint]
) -> Iterable[tuple[str, list[_Piece]]]:
    """What the steps take to belong together of two tensors of two models, with the name of the output.

    Of outputs that are made of the same, as codes and their scales are, the first.
    """
    found: dict[tuple[str, str], tuple[str, list[_Piece]]] = {}
    for step in steps:
        refs = {operand.role: operand.refs for operand in step.operands}
        if own in refs and source in refs:
            ours, theirs = refs[own], refs[source]
            if len(ours) == len(theirs) == 1 and not (ours[0].whole or theirs[0].whole):
                piece = _Piece(theirs[0], 0, ours[0], 0, step.taken)
                found.setdefault((theirs[0].name, ours[0].name), (step.name, [piece]))
                continue
            for piece in _shared(_runs(inputs[source], refs[source]), _runs(inputs[own], refs[own])):
                output, pieces = found.setdefault((piece.source.name, piece.own.name), (step.name, []))
                if output == step.name:
                    pieces.append(piece)
    return found.values()


def _shared(sources: Iterator[tuple[Ref, int, int]], owns: Iterator[tuple[Ref, int, int]]) -> Iterator[_Piece]:
    """Runs of the same elements, of two lists of runs that are of the same elements as a whole."""
    source, start, left = next(sources)
    own, place, room = next(owns)
    while True:
        count = min(left, room)
        yield _Piece(source, start, own, place, count)
        start, place, left, room = start + count, place + count, left - count, room - count
        try:
            if not left:
                source, start, left = next(sources)
            if not room:
                own, place, room = next(owns)
        except StopIteration:
            return


def _runs(model: Checkpoint, refs: Iterable[Ref]) -> Iterator[tuple[Ref, int, int]]:
    """The whole tensors that runs are of, the first element of each run there, and how many it has."""
    for ref in refs:
        whole, first = _whole(model, ref)
        yield whole, first, ref.numel


def _whole(model: Checkpoint, ref: Ref) -> tuple[Ref, int]:
    """The tensor that a ref is a run of, and where it begins there."""
    if not ref.whole:
        return ref, 0
    if isinstance(ref, QuantizedRef):
        return replace(ref, name=ref.whole, shape=ref.full, first=0, whole=""), ref.first
    return model.tensors[ref.whole], ref.first


def sketch(steps: Iterable[Step], looks: Looks, base: str) -> dict[str, str]:
    """What the model `base` has at the places of each tensor of a residual: `evidence.Sample.to_text` by name.

    In the residual's layout, whatever that of base is. Raises CheckpointError for a file that changed, and OSError.
    """
    found = {}
    for output, parts in by_output(steps).items():
        refs = {step.first: operand.refs for step in parts for operand in step.operands if operand.role == base}
        sample = _sampled(output.shape, refs, looks, base)
        if sample is not None:
            found[output.name] = sample.to_text(output.shape)
    return found


def _sampled(shape: tuple[int, ...], refs: Mapping[int, Iterable[Ref]], looks: Looks, base: str) -> Sample | None:
    """What base has at the places of a tensor of this shape; None where it lacks one, as for rows of new tokens.

    refs  runs of base that follow each other, by the flat index in the tensor of what the first one begins with
    """
    wanted = places(shape)
    data, dtypes = b"", set()
    for end, runs in refs.items():
        for whole, first, count in _runs(looks.inputs[base], runs):
            begin, end = end, end + count
            here = tuple(
                (max(start, begin) - begin + first, min(start + length, end) - max(start, begin))
                for start, length in wanted
                if max(start, begin) < min(start + length, end)
            )
            found = looks.at(base, whole, here) if here else None
            if found is not None:
                data += found.data
                dtypes.add(found.dtype)
    size = sum(length for _, length in wanted)
    if len(dtypes) != 1 or len(data) != size * FLOATS[(dtype := dtypes.pop())]:
        return None
    return Sample(wanted, dtype, data)
