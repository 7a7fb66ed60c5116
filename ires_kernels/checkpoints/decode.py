"""JSON into frozen dataclasses, by the types of their fields; what does not fit is an error that names the key.

A field may be a str, int, float or bool, a dataclass, a tuple or a dict with str keys of such, a choice with `|`, or
`object` for what is looked at elsewhere. A key that is missing has the default of its field; keys that no field knows
are passed over, as a later version may write them. `Annotated[kind, Wanted(…)]` says more than a type can.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

from ires_kernels.checkpoints.header import CheckpointError, brief

T = TypeVar("T")

KEY = "key"
"""In the metadata of a field: its name in JSON, where that is another one."""
RAW = "raw"
"""In the metadata of a field: it holds the whole JSON object that the dataclass was made of."""
APART = "apart"
"""In the metadata of a field: it is not in the JSON object, whatever that has under its name."""


@dataclass(frozen=True)
class Wanted:
    """What a value must be besides of its type, in words and as a test."""

    words: str
    test: Callable[[Any], bool]


Count = Annotated[int, Wanted("a whole number from 0 to 2^64 - 1", lambda value: 0 <= value < 1 << 64)]
Time = Annotated[int, Wanted("a number of nanoseconds", lambda value: abs(value) < 1 << 63)]


def decode(kind: type[T], value: object, where: str, advice: str) -> T:
    """The JSON object `value` as an instance of the dataclass `kind`.

    Raises CheckpointError with the file `where`, the key, what it has and what is wanted, and the `advice`.
    """
    try:
        return typing.cast(T, _decoder(typing.cast(Any, kind))(value))
    except _Unfit as error:
        key = ".".join(map(_shown, reversed(error.keys))) or "the file"
        raise CheckpointError(f"{where}: {key} is {brief(error.got)}, wanted {error.wanted}. {advice}") from None


class _Unfit(Exception):
    """A value that is not of its type, and the keys that lead to it, from the inside out."""

    def __init__(self, got: object, wanted: str) -> None:
        super().__init__(got, wanted)
        self.got, self.wanted = got, wanted
        self.keys: list[str] = []


class _Missing:
    def __repr__(self) -> str:
        return "missing"


def _shown(key: str) -> str:
    return key if key.isidentifier() else brief(key)


@cache
def _decoder(kind: Any) -> Callable[[Any], Any]:
    """What makes a value of this kind from JSON; made once, as a model has 100,000 tensors."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _checked(_decoder(arguments[0]), arguments[1])
    if origin in (typing.Union, types.UnionType):
        return _choice(arguments)
    if origin is tuple:
        return _list(arguments)
    if origin is dict:
        return _table(*arguments)
    if is_dataclass(kind):
        return _record(kind)
    if kind in (object, Any):
        return _any
    if kind is float:
        return _float
    words = {str: "text", int: "a whole number", bool: "true or false", types.NoneType: "null"}[kind]
    return _plain(kind, words)


def _any(value: Any) -> Any:
    return value


def _plain(kind: type, words: str) -> Callable[[Any], Any]:
    def plain(value: Any) -> Any:
        if type(value) is not kind:
            raise _Unfit(value, words)
        return value

    return plain


def _float(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _Unfit(value, "a finite number")
    return float(value)


def _checked(inner: Callable[[Any], Any], wanted: Wanted) -> Callable[[Any], Any]:
    def checked(value: Any) -> Any:
        try:
            found = inner(value)
        except _Unfit as error:
            raise _Unfit(error.got, wanted.words) from None
        if not wanted.test(found):
            raise _Unfit(value, wanted.words)
        return found

    return checked


def _choice(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    decoders = [_decoder(kind) for kind in kinds]

    def choice(value: Any) -> Any:
        errors = []
        for each in decoders:
            try:
                return each(value)
            except _Unfit as error:
                errors.append(error)
        deepest = max(errors, key=lambda error: len(error.keys))
        if deepest.keys:
            raise deepest
        raise _Unfit(value, " or ".join(error.wanted for error in errors))

    return choice


def _list(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    length = None if kinds[1:] == (...,) else len(kinds)
    decoders = [_decoder(kind) for kind in (kinds if length is not None else kinds[:1])]

    def list_(value: Any) -> Any:
        if type(value) is not list or (length is not None and len(value) != length):
            raise _Unfit(value, "a list" if length is None else f"a list of {length}")
        each = decoders if length is not None else decoders * len(value)
        return tuple(_at(str(i), decoder, item) for i, (decoder, item) in enumerate(zip(each, value, strict=True)))

    return list_


def _table(key: Any, kind: Any) -> Callable[[Any], Any]:
    name, inner = _decoder(key), _decoder(kind)

    def table(value: Any) -> Any:
        if type(value) is not dict:
            raise _Unfit(value, "an object")
        return {_at(key, name, key): _at(key, inner, item) for key, item in value.items()}

    return table


def _record(kind: Any) -> Callable[[Any], Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    known = [
        (field, field.metadata.get(KEY, field.name))
        for field in fields(kind)
        if not {RAW, APART} & field.metadata.keys()
    ]
    raw = [field.name for field in fields(kind) if RAW in field.metadata]
    members = [(field.name, key, _decoder(hints[field.name]), _is_optional(field)) for field, key in known]

    def record(value: Any) -> Any:
        if type(value) is not dict:
            raise _Unfit(value, "an object")
        found: dict[str, Any] = dict.fromkeys(raw, value)
        for name, key, decoder, optional in members:
            if key in value:
                found[name] = _at(key, decoder, value[key])
            elif not optional:
                error = _Unfit(_Missing(), "it")
                error.keys.append(key)
                raise error
        return kind(**found)

    return record


def _is_optional(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _at(key: str, decoder: Callable[[Any], Any], value: Any) -> Any:
    try:
        return decoder(value)
    except _Unfit as error:
        error.keys.append(key)
        raise
