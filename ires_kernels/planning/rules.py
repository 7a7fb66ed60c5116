"""What a merge was asked to do, apart from its inputs: factors, patterns over tensor names, dtype, rounding."""

from __future__ import annotations

import math
import numbers
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from ires_kernels.checkpoints.header import brief
from ires_kernels.dtypes import FLOATS, NUMBERS, number_of
from ires_kernels.files.plain import Refused
from ires_kernels.planning.patterns import PatternError, compiled, matches, unmatched

DTYPES = {name.lower(): name for name, width in FLOATS.items() if width > 1}
"""Names of output dtypes, as users and as safetensors write them."""
VOCABULARIES = ("target", "instruct", "rows")
"""What decides where the vocabularies of models disagree."""

_LATER = ("vocabulary", "renames", "trust_names", "recipe")
"""Fields that older manifests do not have."""


class ArgumentError(Refused):
    """An argument of a merge that cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Validated arguments. Make one with `Rules.of`; a manifest keeps them as `to_dict`."""

    alpha: tuple[float, ...] = (1.0,)
    """One factor per residual; one for instruct and base."""
    alphas: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """(pattern, factors): the first pattern found in a tensor's name decides in place of `alpha`."""
    skip: tuple[str, ...] = ()
    """Patterns of the tensors that are left as they are in the target."""
    dtype: str | None = None
    """safetensors name of the dtype that float tensors get; None keeps the target's."""
    allow_missing: bool | str = False
    """"any": even where more than a tenth of the residual's elements finds no place."""
    rounding: str = "nearest"
    seed: int = 0
    vocabulary: str | None = None
    """Whose tokens and rows the output has where models disagree; "rows": by number, whatever tokens they belong to."""
    renames: tuple[tuple[str, str], ...] = ()
    """Parts of names in the layout of the output, and what they are in the other models."""
    trust_names: bool = False
    """Whether tensors are matched by their names and shapes, and no values compared."""
    recipe: str = ""
    """The text that asked for all this, where one did."""

    @classmethod
    def of(
        cls,
        residuals: int = 1,
        *,
        alpha: object = 1.0,
        alphas: Iterable[tuple[str, object]] | Mapping[str, object] = (),
        skip: Iterable[str] | str = (),
        dtype: object = None,
        allow_missing: bool | str = False,
        rounding: str = "nearest",
        seed: int = 0,
        vocabulary: str | None = None,
        renames: Iterable[str | Sequence[str]] | Mapping[str, str] = (),
        trust_names: bool = False,
        recipe: str = "",
    ) -> Rules:
        """Check arguments for a merge of so many residuals. A single alpha serves all; `alphas` hold one for each.

        Raises ArgumentError for values, TypeError for kinds: factors are finite real numbers that float32 holds.
        """
        number = None if dtype is None else number_of(dtype)
        if dtype is not None and (number is None or number.name not in DTYPES.values()):
            raise ArgumentError(f"dtype is {brief(dtype)}, wanted one of {', '.join(DTYPES)}.")
        if rounding not in ("nearest", "stochastic"):
            raise ArgumentError(f'rounding is {brief(rounding)}, wanted "nearest" or "stochastic".')
        if not isinstance(allow_missing, bool) and allow_missing != "any":
            raise ArgumentError(f'allow_missing is {brief(allow_missing)}, wanted True, False or "any".')
        if vocabulary is not None and vocabulary not in VOCABULARIES:
            raise ArgumentError(f"vocabulary is {brief(vocabulary)}, wanted one of {', '.join(VOCABULARIES)}.")
        if not isinstance(trust_names, bool):
            raise TypeError(f"trust_names is {type(trust_names).__name__} {brief(trust_names)}, wanted True or False")
        if not isinstance(recipe, str):
            raise TypeError(f"recipe is {type(recipe).__name__} {brief(recipe)}, wanted a text")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed is {type(seed).__name__}, wanted an integer")
        if not 0 <= seed < 1 << 64:
            raise ArgumentError(f"seed is {seed}, wanted 0 <= seed < 2^64.")
        return cls(
            _factors(alpha, residuals, "alpha"),
            tuple((pattern, _factors_of(pattern, value, residuals)) for pattern, value in _pairs(alphas)),
            tuple(_pattern(each, f"skip[{i}]") for i, each in enumerate(_listed(skip))),
            None if number is None else number.name,
            allow_missing,
            rounding,
            seed,
            vocabulary,
            _renames(renames),
            trust_names,
            recipe,
        )

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Rules:
        """The rules that `to_dict` wrote into a manifest. Raises ArgumentError when somebody changed them."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        try:
            return cls.of(**{**table, "residuals": len(table["alpha"]), "dtype": names.get(table["dtype"])})
        except (TypeError, KeyError) as error:
            raise ArgumentError(f"the rules of the manifest cannot be read: {error}.") from error

    def to_dict(self) -> dict[str, Any]:
        """In JSON types. What came later is left out where nobody asks for it: hashes of older rules stay the same."""
        return {key: value for key, value in asdict(self).items() if value or key not in _LATER}

    def unmatched(self, names: Collection[str]) -> list[tuple[str, str]]:
        """The patterns that are found in none of the names, each after its option: typing errors.

        To be called before any is looked for. Raises ArgumentError for one that might take too long.
        """
        options = {"skip": self.skip, "alpha-for": tuple(pattern for pattern, _ in self.alphas)}
        try:
            found = set(unmatched([pattern for patterns in options.values() for pattern in patterns], names))
        except PatternError as error:
            raise ArgumentError(f"{error}") from None
        return [(option, pattern) for option, patterns in options.items() for pattern in patterns if pattern in found]

    def factors(self, name: str) -> tuple[float, ...]:
        """The factors of the tensor `name`."""
        return next((factors for pattern, factors in self.alphas if matches(pattern, name)), self.alpha)

    def decided_by(self, name: str) -> str:
        """The pattern that gives the tensor `name` its factors; empty where none does."""
        return next((pattern for pattern, _ in self.alphas if matches(pattern, name)), "")

    def skipped(self, name: str) -> str | None:
        """The pattern by which the tensor `name` is left as it is."""
        return next((pattern for pattern in self.skip if matches(pattern, name)), None)


def _factors(value: object, count: int, where: str) -> tuple[float, ...]:
    values = tuple(value) if _is_several(value) else (value,) * count
    if len(values) != count:
        raise ArgumentError(f"{where}: got {len(values)} factors for {count} residuals; give one for each, or one.")
    return tuple(_factor(each, where) for each in values)


def _factors_of(pattern: str, value: object, count: int) -> tuple[float, ...]:
    """The factors of the tensors of a pattern. One for several residuals would turn round those that are subtracted."""
    where = f"alpha of {brief(pattern)}"
    if count < 2:
        return _factors(value, count, where)
    given = _factors(value, len(value) if _is_several(value) else 1, where)
    if len(given) != count:
        example = [f"{given[0]:g}" if given else "1"] * count
        raise ArgumentError(
            f"{where}: got {len(given)} factor(s) for {count} residuals, which may differ in sign. Give one for each, "
            f"in their order: --alpha-for {shlex.quote(f'{pattern}=' + ','.join(example))}, in Python "
            f"alphas=[({pattern!r}, [{', '.join(example)}])]."
        )
    return given


def _pairs(alphas: object) -> list[tuple[str, object]]:
    """Pattern and factors of every entry, from pairs or from a table."""
    wanted = "wanted pairs of a regular expression and factors, as [('mlp', 0.5)] or {'mlp': 0.5}"
    entries = alphas.items() if isinstance(alphas, Mapping) else alphas
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        raise TypeError(f"alphas is {type(alphas).__name__} {brief(alphas)}, {wanted}")
    pairs = []
    for i, entry in enumerate(entries):
        if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 2:
            raise TypeError(f"alphas[{i}] is {type(entry).__name__} {brief(entry)}, {wanted}")
        pairs.append((_pattern(entry[0], f"alphas[{i}][0]"), entry[1]))
    return pairs


def _renames(renames: object) -> tuple[tuple[str, str], ...]:
    """Pairs of parts of names, from "A=B", pairs or a table."""
    wanted = "wanted A=B, parts of names with dots between them, as 'model.=model.language_model.'"
    entries = renames.items() if isinstance(renames, Mapping) else [renames] if isinstance(renames, str) else renames
    if not isinstance(entries, Iterable):
        raise TypeError(f"renames is {type(renames).__name__} {brief(renames)}, {wanted}")
    pairs = []
    for i, entry in enumerate(entries):
        given = entry.split("=") if isinstance(entry, str) else entry
        if not isinstance(given, Sequence) or not all(isinstance(part, str) for part in given):
            raise TypeError(f"renames[{i}] is {type(entry).__name__} {brief(entry)}, {wanted}")
        if len(given) != 2 or given[0] == given[1]:
            raise ArgumentError(f"renames[{i}] is {brief(entry)}, {wanted}.")
        pairs.append((given[0], given[1]))
    return tuple(pairs)


def _listed(skip: object) -> list[object]:
    if isinstance(skip, str):
        return [skip]
    if not isinstance(skip, Iterable) or isinstance(skip, bytes):
        raise TypeError(f"skip is {type(skip).__name__} {brief(skip)}, wanted a regular expression or a list of them")
    return list(skip)


def _is_several(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _factor(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where} is {type(value).__name__} {brief(value)}, wanted a real number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ArgumentError(f"{where} is {number}, wanted a finite number.")
    if abs(number) >= NUMBERS["F32"].limit:
        raise ArgumentError(f"{where} is {number}, which is infinite in float32, in which merges are computed.")
    return number


def _pattern(pattern: object, where: str) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"{where} is {type(pattern).__name__} {brief(pattern)}, wanted a regular expression as str")
    try:
        compiled(pattern)
    except PatternError as error:
        raise ArgumentError(f"{brief(pattern)} {error}.") from error
    return pattern
