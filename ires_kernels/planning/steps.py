"""What happens to each tensor of a merge: the operation it gets, or why it is copied, or why the merge is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ires_kernels.checkpoints import names
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef, is_factor, shard_number
from ires_kernels.checkpoints.folders import MERGE_ADAPTER, listed
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.dtypes import FLOATS, STORAGE
from ires_kernels.planning import absences
from ires_kernels.planning.absences import Absence
from ires_kernels.planning.matching import Match, Matcher
from ires_kernels.planning.quantized import Modules
from ires_kernels.planning.rules import Rules

Op = Literal["add", "add_difference", "subtract", "convert", "copy"]
Decode = Literal["plain"]

ALPHA_0 = "alpha is 0"
ONLY_TARGET = "only in the target"

_SHAPES = "Operands are not broadcast: take models of one architecture, or leave such tensors as they are with --skip."
_VOCABULARY = (
    "Where vocabularies differ, leave what has a row for each token as it is in the target, which then keeps its "
    "tokenizer, with --skip {skip}, or resize the embeddings of one model to the other's first."
)
_CODES = (
    "Arithmetic on codes is meaningless: take weights that are not quantized, or leave such modules as they are with "
    "--skip, which takes all that belongs to a module for one: codes, scales, zero points."
)
_INTEGERS = "What is not floating point is copied where instruct and base agree; leave the rest as it is with --skip."
_EMPTY = (
    "A model looks like this when it is saved under ZeRO-3 without gathering its parameters: save it again with them "
    "(DeepSpeed: stage3_gather_16bit_weights_on_model_save), or take it from elsewhere."
)
_FACTORS = (
    f"Sums of its factors are not sums of its updates. {MERGE_ADAPTER} "
    "To merge the weights below it alone, leave its factors as they are with --skip."
)
_SECOND = "Give both the same --skip and --alpha-for: models that load one tensor for the two would load either."
_TIED = (
    "One tensor cannot take the updates of two. Save the target with an output head of its own "
    "(tie_word_embeddings=False), or leave the head out with --skip lm_head."
)


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that is made, and its place: from the byte `offset` of the file `file` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


class Operand(NamedTuple):
    """One of the tensors that a step computes with."""

    role: str
    """Whose it is."""
    refs: tuple[TensorRef, ...]
    """What is read for it: tensors, or runs of their elements. One as it is; or codes and what they are scaled by."""
    decode: Decode = "plain"
    """How the processor makes numbers of that."""


@dataclass(frozen=True, slots=True)
class Step:
    """A run of the elements of an output, all of them or a part: `op` of `operands` makes it.

    Steps of one output follow each other, and random bits are those of the element in the output: it is the same
    whether one step makes it or several do.
    """

    output: Output
    op: Op
    operands: tuple[Operand, ...]
    factors: tuple[float, ...] = ()
    stream: int = 0
    """Of the random numbers: xxh3_64 of the name."""
    reason: str = ""
    """Why the tensor is not merged but copied; "convert" is a copy with another dtype."""
    first: int = 0
    """Flat index of the first element."""
    count: int = -1
    """Number of elements; -1: all that follow."""

    def __post_init__(self) -> None:
        if self.count < 0:
            object.__setattr__(self, "count", self.output.numel - self.first)
        for operand in self.operands:
            if operand.decode == "plain" and [ref.numel for ref in operand.refs] != [self.count]:
                sizes = ", ".join(f"{ref.numel} of {ref.name!r}" for ref in operand.refs) or "nothing"
                raise ValueError(f"{self.label} takes {self.count} elements of {operand.role}, got {sizes}")

    @property
    def is_whole(self) -> bool:
        """Whether it makes all of its output."""
        return self.count == self.output.numel

    @property
    def label(self) -> str:
        """The output's name, and of a part which elements it makes."""
        return self.name if self.is_whole else f"{self.name}[{self.first}:{self.first + self.count}]"

    @property
    def name(self) -> str:
        return self.output.name

    @property
    def dtype(self) -> str:
        return self.output.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        return self.output.shape

    @property
    def file(self) -> str:
        return self.output.file

    @property
    def offset(self) -> int:
        """Of the output in its file, in bytes."""
        return self.output.offset

    @property
    def start(self) -> int:
        """Where the first byte that it makes is in the output."""
        return self.first * STORAGE[self.dtype].bits // 8

    @property
    def nbytes(self) -> int:
        """How many bytes it makes."""
        return self.count * STORAGE[self.dtype].bits // 8

    @property
    def roles(self) -> tuple[str, ...]:
        """Whose each of `inputs` is."""
        return tuple(operand.role for operand in self.operands for _ in operand.refs)

    @property
    def inputs(self) -> tuple[TensorRef, ...]:
        """All that is read, in the order of the operands."""
        return tuple(ref for operand in self.operands for ref in operand.refs)


def by_output(steps: Iterable[Step]) -> dict[Output, list[Step]]:
    """The steps of each output, in their order. Raises ValueError where they do not make all of it in that order."""
    groups: dict[Output, list[Step]] = {}
    for step in steps:
        groups.setdefault(step.output, []).append(step)
    for output, parts in groups.items():
        end = 0
        for part in parts:
            if part.first != end:
                raise ValueError(f"{output.name!r}: {part.label} does not begin at element {end}")
            end += part.count
        if end != output.numel:
            raise ValueError(f"{output.name!r} has {output.numel} elements, and its steps make {end}")
    return groups


class Comparison(NamedTuple):
    """Two tensors that must be equal byte for byte before anything is written."""

    name: str
    roles: tuple[str, str]
    inputs: tuple[TensorRef, TensorRef]


@dataclass
class Problem:
    """A reason to refuse a merge: what is the matter with a tensor, or with all of a kind."""

    names: dict[str, None]
    rest: str
    advice: str
    place: str = ""
    """Where the first one is."""
    folder: str = ""
    """Where all are."""
    tensors: tuple[str, ...] = ()
    """All that a sentence without names is about."""

    def __str__(self) -> str:
        first = next(iter(self.names), None)
        if first is None:
            return self.rest
        if len(self.names) == 1:
            return f"{brief(first)}{self.place} {self.rest}"
        verb, _, rest = names.pattern(self.rest).partition(" ")
        verb = {"is": "are", "has": "have"}.get(verb, verb)
        return f"{len(self.names)} tensors {names.pattern(first)}{self.folder} {verb} {rest}"


@dataclass
class Findings:
    """What planning finds out on its way through the tensors."""

    rules: Rules
    matcher: Matcher
    modules: Modules = field(init=False)
    """The quantized ones."""
    problems: dict[object, Problem] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    not_stored: dict[str, tuple[str, TensorRef]] = field(default_factory=dict)
    missing: list[Absence] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    """What only sources have, and loaders compute again."""
    vocabulary: dict[str, None] = field(default_factory=dict)
    """Tensors with a row for each token, of which the models have other numbers."""

    explains: bool = False
    """Whether missing tensors are among the problems though they are allowed."""
    _embeddings: dict[str, set[int]] = field(default_factory=dict)

    @property
    def inputs(self) -> Mapping[str, Checkpoint]:
        """The models by role."""
        return self.matcher.inputs

    def __post_init__(self) -> None:
        everything = {name: None for checkpoint in self.inputs.values() for name in checkpoint.tensors}
        self._unmatched = self.rules.unmatched(everything)
        self.modules = Modules(self.inputs, self.rules)

    def check_patterns(self) -> None:
        """Find patterns that match no tensor: typing errors."""
        for option, pattern in self._unmatched:
            self.problem(f"--{option} {pattern!r} matches no tensor", "`ires inspect --tensors` lists the names.")

    def skipped(self, name: str) -> str | None:
        """Why a tensor is left as it is: by a pattern found in its name, or in that of a part of its module."""
        pattern = self.rules.skipped(name)
        if pattern is not None:
            return f"skipped by {pattern!r}"
        pattern = self.modules.skipped(name)
        return None if pattern is None else f"skipped by {pattern!r}, with its quantized module"

    def is_vocabulary(self, name: str, tensors: Mapping[str, TensorRef]) -> bool:
        """Whether tensors of one name differ as embeddings do: by the number of their rows alone."""
        if names.is_vocabulary(name):
            return True
        if len({ref.shape[1:] for ref in tensors.values()}) > 1 or not all(ref.shape for ref in tensors.values()):
            return False
        return all(ref.shape[0] in self._rows(role) for role, ref in tensors.items())

    def _rows(self, role: str) -> set[int]:
        """The rows of the embeddings of a model."""
        if role not in self._embeddings:
            refs = self.inputs[role].tensors.values()
            self._embeddings[role] = {r.shape[0] for r in refs if names.is_vocabulary(r.name) and r.shape}
        return self._embeddings[role]

    def problem(self, text: str, advice: str, tensors: Iterable[str] = ()) -> None:
        """Something that forbids the merge, and the way out; of which tensors, where there are many."""
        self.problems.setdefault(text, Problem({}, text, advice, tensors=tuple(tensors)))

    def about(self, name: str, rest: str, advice: str, place: str = "", folder: str = "") -> None:
        """Something that is wrong with a tensor, and perhaps with others of its kind."""
        key = (names.pattern(name), names.pattern(rest), advice, folder)
        self.problems.setdefault(key, Problem({}, rest, advice, place, folder)).names[name] = None

    def codes(self, name: str) -> bool:
        """Refuse a tensor that is a part of a quantized module; whether it is one."""
        found = self.modules.shared(name)
        if found is None:
            return False
        role, part = found
        where = f" of {role} ({self.inputs[role].tensors[part.code].path})"
        self.about(part.code, f"is {part.why}", _CODES, where, f" of {role} ({self.inputs[role].path})")
        return True

    def absent(self, name: str, present: Iterable[str], absent: Iterable[str], advice: str = "") -> None:
        """A tensor that some of the models lack: a problem unless missing tensors are allowed."""
        self.missing.append(Absence(name, tuple(present), tuple(absent), advice))

    def note_buffers(self, role: str) -> None:
        """Say which buffers were left out."""
        kinds = sorted({names.pattern(name) for name in self.buffers})
        if kinds:
            what = f"{len(self.buffers)} buffers that loaders compute again ({listed(kinds)})"
            self.notes.append(f"{what} are not in {role} and left out")

    def refuse(self, operation: str) -> None:
        """Raise CheckpointError with the first ten problems, if there are any."""
        if self.explains or not self.rules.allow_missing:
            for text, advice, missing in absences.explain(self.inputs, self.missing):
                self.problem(text, advice, missing)
        if not self.problems:
            return
        problems = list(self.problems.values())
        lines = [f"cannot {operation}:", *(f"  {problem}" for problem in problems[:10])]
        lines += [f"  and {len(problems) - 10} more problems"] if len(problems) > 10 else []
        everything = {name for checkpoint in self.inputs.values() for name in checkpoint.tensors}
        rows = self.vocabulary
        vocabulary = _VOCABULARY.format(skip=absences.skip_pattern(rows, {*rows}, everything)) if rows else ""
        ways = dict.fromkeys(vocabulary if p.advice is _VOCABULARY else p.advice for p in problems)
        error = CheckpointError(*lines, *ways)
        error.problems = [{"problem": f"{p}", "tensors": [*p.names, *p.tensors]} for p in problems]
        raise error


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


def apply_steps(ref: TensorRef, found: Findings) -> list[Step]:
    """What becomes of the target's tensor `ref`."""
    rules, name = found.rules, ref.name
    # A second copy of the embedding gets what the embedding gets, or the two would part.
    original = found.matcher.original(name)
    skipped = found.skipped(name)
    if (skipped is None) != (found.skipped(original) is None) or rules.factors(name) != rules.factors(original):
        found.problem(f"{brief(name)} is a second copy of {brief(original)} in the target, with other rules", _SECOND)
    if skipped is not None:
        return [_keep(ref, Match(0, {"target": ref}, ()), skipped, found)]
    if found.codes(name):
        return [_keep(ref, Match(0, {"target": ref}, ()), "not mergeable", found)]
    return [_apply_step(ref, match, found) for match in found.matcher.of("target", ref)]


def _apply_step(ref: TensorRef, match: Match, found: Findings) -> Step:
    """What becomes of a run of the elements of `ref`."""
    rules, name, absent = found.rules, ref.name, match.absent
    if len(match.refs) == 1:
        return _keep(ref, match, ONLY_TARGET, found)
    if absent and names.is_recomputed(ref):
        return _keep(ref, match, f"a buffer that loaders compute again, not in {' and '.join(absent)}", found)
    if absent:
        found.absent(name, match.refs, absent)
        if "instruct" in found.inputs:
            return _keep(ref, match, f"not in {' and '.join(absent)}", found)
    if not _numbers(name, match.refs, found):
        return _keep(ref, match, "not mergeable", found)
    if ref.dtype not in FLOATS:
        return _keep(ref, match, f"{ref.dtype}, equal in instruct and base", found)
    given = rules.factors(name)
    residuals = [role for role in found.inputs if role.startswith("residual")]
    factors = tuple(a for role, a in zip(residuals, given, strict=True) if role in match.refs) if residuals else given
    if not any(factors):
        return _keep(ref, match, ALPHA_0, found)
    op: Op = "add_difference" if "instruct" in found.inputs else "add"
    stream = found.matcher.stream(found.matcher.original(name))
    return _step(ref, match, op, rules.dtype or ref.dtype, factors, stream)


def extract_steps(ref: TensorRef, found: Findings) -> list[Step]:
    """The difference for the instruct model's tensor `ref`; nothing when it is not stored."""
    reason = found.skipped(ref.name) or ("not mergeable" if found.codes(ref.name) else None)
    if reason is None:
        matches = found.matcher.of("instruct", ref)
        reason = next(filter(None, [_lack(ref, match, found) for match in matches]), None)
        if reason is None:
            stream = found.matcher.stream(ref.name)
            return [_step(ref, match, "subtract", found.rules.dtype or "F32", (), stream) for match in matches]
    found.not_stored[ref.name] = (reason, ref)
    return []


def _lack(ref: TensorRef, match: Match, found: Findings) -> str | None:
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
    left = {name: None for checkpoint in sources.values() for name in checkpoint.tensors if name not in target.tensors}
    number = shard_number(target.path)
    alone = number is not None and number[1] > 1
    others = 0
    for name in left:
        present = [role for role, checkpoint in sources.items() if name in checkpoint.tensors]
        if found.skipped(name) is not None or found.codes(name):
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


def check_tied_head(inputs: Mapping[str, Checkpoint], steps: Iterable[Step], found: Findings) -> None:
    """Find a target that says its head is its embedding, stores both, and would get different updates for them."""
    target, *sources = inputs.values()
    embedding = names.embedding(target)
    if names.says_tied(target) is not True or embedding is None:
        return
    table = {step.name: step for step in steps}
    one = table[embedding.name]
    for two in [step for step in table.values() if names.is_head(step.name) and step.name not in found.matcher.copies]:
        changed = not (one.reason and two.reason)
        if changed and (one.op != two.op or one.factors != two.factors or not all(map(names.is_tied, sources))):
            found.problem(
                f"config.json of the target ties {two.name} to {one.name}, and its files hold both, with other updates",
                _TIED,
            )


class Share(NamedTuple):
    """How much of the residual finds a place, where tensors are missing."""

    tensors: int
    all_tensors: int
    elements: int
    all_elements: int
    left: tuple[Step, ...]
    """What finds none: steps that make its update of itself, and so tell its norm."""
    known: bool
    """Whether all of that has an update; where base or instruct lacks a tensor there is none to take."""

    @property
    def left_over(self) -> float:
        """The part of the elements that finds no place."""
        return 1 - self.elements / self.all_elements if self.all_elements else 0.0

    def text(self, norm: float | None = None) -> str:
        """The warning; `norm` is the part of the update's norm that went in, None where that is not known."""
        part = f"{_percent(self.elements, self.all_elements)} of its elements"
        part += "" if norm is None else f" and {_percent(norm, 1)} of its norm"
        return f"of the residual {self.tensors} of {self.all_tensors} tensors went in, {part}"


def _percent(part: float, whole: float) -> str:
    """A percentage that is 0 or 100 only if it is."""
    text = f"{part / whole:.2%}" if whole else "100.00%"
    if part < whole and text == "100.00%":
        return "more than 99.99%"
    return "less than 0.01%" if part > 0 and text == "0.00%" else text


def share(steps: Iterable[Step], found: Findings) -> Share | None:
    """How much of the residual, stored or taken on the way, finds a place; None where nothing is missing."""
    if not found.missing:
        return None
    given = [role for role in found.inputs if role == "instruct" or role.startswith("residual")]
    used = {(role, ref.name): ref for s in steps if not s.reason for role, ref in zip(s.roles, s.inputs, strict=True)}
    inside = [ref for (role, _), ref in used.items() if role in given]
    outside: list[TensorRef] = []
    left = []
    for absence in found.missing:
        name = absence.name
        refs = {r: ref for r in found.inputs if r in absence.present and (ref := found.inputs[r].tensors.get(name))}
        lost = {r: ref for r, ref in refs.items() if r in given and (r, name) not in used and ref.dtype in FLOATS}
        outside += lost.values()
        if lost:
            left += _update(name, lost | {r: ref for r, ref in refs.items() if r == "base"}, found)
    elements = sum(ref.numel for ref in inside)
    everything = elements + sum(ref.numel for ref in outside)
    known = {step.name for step in left} == {ref.name for ref in outside}
    return Share(len(inside), len(inside) + len(outside), elements, everything, tuple(left), known)


def _update(name: str, refs: Mapping[str, TensorRef], found: Findings) -> list[Step]:
    """The update that a tensor would make, on top of itself; nothing where there is no difference to take."""
    if len({ref.shape for ref in refs.values()}) > 1 or not all(ref.dtype in FLOATS for ref in refs.values()):
        return []
    first, *_ = operands = _operands(refs)
    factors = found.rules.factors(name)
    if "instruct" in refs:
        op: Op = "add_difference"
        if "base" not in refs:
            return []
    else:
        op = "add"
        residuals = [role for role in found.inputs if role.startswith("residual")]
        factors = tuple(factor for role, factor in zip(residuals, factors, strict=True) if role in refs)
    return [Step(Output(name, "F32", first.refs[0].shape), op, (first, *operands), factors)]


def other_vocabulary(inputs: Mapping[str, Checkpoint], steps: Iterable[Step]) -> str | None:
    """A tensor that was skipped because the target has another vocabulary than a model whose tokenizer it would get."""
    for step in steps:
        if step.reason and names.is_vocabulary(step.name) and step.shape:
            for checkpoint in list(inputs.values())[1:]:
                rows = names.rows(checkpoint, step.name)
                if rows is not None and rows != step.shape[0]:
                    return step.name
    return None


def _numbers(name: str, tensors: Mapping[str, TensorRef], found: Findings) -> bool:
    """Whether tensors fit each other, element by element; what is not floating point is left to be compared."""
    first, *others = tensors.items()
    for role, ref in others:
        if ref.shape != first[1].shape:
            words = found.is_vocabulary(name, {first[0]: first[1], role: ref})
            if words:
                found.vocabulary[name] = None
            found.about(
                name,
                f"has shape {brief(list(ref.shape))} in {role} ({ref.path}), "
                f"{brief(list(first[1].shape))} in {first[0]} ({first[1].path})",
                _VOCABULARY if words else _SHAPES,
            )
            return False
    dtypes = {role: ref.dtype for role, ref in tensors.items()}
    if all(dtype in FLOATS for dtype in dtypes.values()):
        return True
    if len(set(dtypes.values())) > 1 or "instruct" not in tensors:
        listed = ", ".join(f"{dtype} in {role}" for role, dtype in dtypes.items())
        found.about(name, f"is {listed}", _INTEGERS)
        return False
    found.comparisons.append(Comparison(name, ("instruct", "base"), (tensors["instruct"], tensors["base"])))
    return True


def _operands(tensors: Mapping[str, TensorRef]) -> tuple[Operand, ...]:
    """What was matched, by role, as it is."""
    return tuple(Operand(role, (ref,)) for role, ref in tensors.items())


def _step(
    ref: TensorRef, match: Match, op: Op, dtype: str, factors: tuple[float, ...] = (), stream: int = 0, reason: str = ""
) -> Step:
    """The step that makes a run of an output of the layout of `ref` out of all that was matched."""
    output, (own, *_) = Output(ref.name, dtype, ref.shape), match.refs.values()
    return Step(output, op, _operands(match.refs), factors, stream, reason, match.first, own.numel)


def _keep(ref: TensorRef, match: Match, reason: str, found: Findings) -> Step:
    """A copy of what the target has, in another dtype where one is asked for."""
    own = match._replace(refs={"target": match.refs["target"]})
    dtype = found.rules.dtype
    if dtype is None or ref.dtype == dtype or ref.dtype not in FLOATS:
        return _step(ref, own, "copy", ref.dtype, reason=reason)
    part = found.modules.parts["target"].get(ref.name)
    if part is not None:
        code = found.inputs["target"].tensors[part.code]
        found.about(
            part.code, f"is {part.why}, and cannot become {dtype}", _CODES, f" of target ({code.path})", " of target"
        )
    return _step(ref, own, "convert", dtype, stream=found.matcher.stream(ref.name), reason=reason)
