"""What planning finds out on its way through the tensors: problems, all of which are told at once, and notes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from ires_kernels.checkpoints import names, roles
from ires_kernels.checkpoints.checkpoint import Checkpoint
from ires_kernels.checkpoints.folders import listed
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.planning import absences
from ires_kernels.planning.absences import Absence
from ires_kernels.planning.matching import Matcher
from ires_kernels.planning.numbers import Numbers, numbers
from ires_kernels.planning.quantized import Modules
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Comparison, Op
from ires_kernels.planning.vocabulary import Vocabulary

CODES = (
    "Arithmetic on codes is meaningless: take weights that are not quantized, or leave such modules as they are with "
    "--skip, which takes all that belongs to a module for one: codes, scales, zero points."
)
NOTHING = "Take models of one architecture, whose tensors have the same names, and skip less."


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
    numbers: Mapping[str, Numbers]
    """What the models stand for, by role."""
    modules: Modules = field(init=False)
    """The quantized ones that nothing here decodes."""
    problems: dict[object, Problem] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    not_stored: dict[str, tuple[str, Ref]] = field(default_factory=dict)
    missing: list[Absence] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    """What only sources have, and loaders compute again."""
    vocabulary: Vocabulary = field(init=False)
    """What the rows of embeddings and heads are made of."""
    told: set[str] = field(default_factory=set)
    """Tensors of whose absence something else is said."""
    explains: bool = False
    """Whether missing tensors are among the problems though they are allowed."""
    _embeddings: dict[str, set[int]] = field(default_factory=dict)
    _skipped: dict[str, str] = field(default_factory=dict)
    """Weights of which a stored part is skipped, and the pattern."""

    @classmethod
    def of(cls, inputs: Mapping[str, Checkpoint], rules: Rules, copies: Mapping[str, str] | None) -> Findings:
        """None as yet, of models by role. `copies`: second copies of an embedding, and its name."""
        seen = {role: numbers(checkpoint) for role, checkpoint in inputs.items()}
        return cls(rules, Matcher({role: each.model for role, each in seen.items()}, copies or {}), seen)

    @property
    def inputs(self) -> Mapping[str, Checkpoint]:
        """The models by role."""
        return self.matcher.inputs

    def __post_init__(self) -> None:
        everything = {name: None for checkpoint in self.inputs.values() for name in checkpoint.tensors}
        parts = {name: weight for each in self.numbers.values() for name, weight in each.stored()}
        self._unmatched = self.rules.unmatched(everything | dict.fromkeys(parts))
        self.modules = Modules(self.inputs, {role: each.codes for role, each in self.numbers.items()}, self.rules)
        for name, weight in parts.items():
            pattern = self.rules.skipped(name)
            if pattern is not None:
                self._skipped.setdefault(weight, pattern)
        self.vocabulary = Vocabulary(self.inputs, self.rules)

    @property
    def is_blend(self) -> bool:
        """Whether the models make up the result, and nothing is added to one of them."""
        return roles.are_blended(self.inputs)

    def check_patterns(self) -> None:
        """Find patterns that match no tensor: typing errors."""
        for option, pattern in self._unmatched:
            self.problem(f"--{option} {pattern!r} matches no tensor", "`ires inspect --tensors` lists the names.")

    def skipped(self, name: str) -> str | None:
        """Why a tensor is left as it is: by a pattern found in its name, or in that of a part of its module."""
        pattern = self.rules.skipped(name)
        if pattern is not None:
            return f"skipped by {pattern!r}"
        pattern = self._skipped.get(name) or self.modules.skipped(name)
        return None if pattern is None else f"skipped by {pattern!r}, with its quantized module"

    def added(self, name: str, there: Container[str]) -> tuple[tuple[float, ...], Op]:
        """The factors of what is added to a tensor, as far as it is there, and the operation that adds it."""
        given = list(zip(roles.added(self.inputs), self.rules.factors(name), strict=True))
        factors = tuple(factor for each, factor in given if all(role in there for role in each))
        return factors, "add_difference" if any(len(each) == 2 for each, _ in given) else "add"

    def is_by_token(self, tensors: Mapping[str, Ref]) -> bool:
        """Whether matched tensors have a row for each token: by their names, or as they differ as embeddings do."""
        role, ref = next(iter(tensors.items()))
        if len({ref.shape[1:] for ref in tensors.values()}) > 1 or not all(ref.shape for ref in tensors.values()):
            return False
        if names.is_by_token(ref, self.inputs[role]):
            return True
        counts = {role: ref.shape[0] for role, ref in tensors.items()}
        return len({*counts.values()}) > 1 and all(count in self._rows(role) for role, count in counts.items())

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
        self.about(part.code, f"is {part.why}", CODES, where, f" of {role} ({self.inputs[role].path})")
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
        everything = {name for checkpoint in self.inputs.values() for name in checkpoint.tensors}
        for text, advice in self.vocabulary.problems:
            rows = self.vocabulary.names
            skip = absences.skip_pattern(rows, {*rows}, everything) if "{skip}" in advice else ""
            self.problem(text, advice.replace("{skip}", skip), rows)
        if self.explains or not self.rules.allow_missing:
            untold = [absence for absence in self.missing if absence.name not in self.told]
            for text, advice, missing in absences.explain(self.inputs, untold):
                self.problem(text, advice, missing)
        if not self.problems:
            return
        problems = list(self.problems.values())
        lines = [f"cannot {operation}:", *(f"  {problem}" for problem in problems[:10])]
        lines += [f"  and {len(problems) - 10} more problems"] if len(problems) > 10 else []
        error = CheckpointError(*lines, *dict.fromkeys(problem.advice for problem in problems))
        error.problems = [{"problem": f"{p}", "tensors": [*p.names, *p.tensors]} for p in problems]
        raise error
