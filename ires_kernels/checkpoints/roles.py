"""Who is who in a merge: target, what is added to it, and what that is the difference to.

What is added are residuals (residual, or residual-1, residual-2, …) or pairs of models (instruct and base, or
instruct-1, base-1, instruct-2, base-2, …), each with a factor of its own. In a blend nothing is added to a target: it
is the first of the models that make up the result, and the others are model-2, model-3, ….
"""

from __future__ import annotations

from collections.abc import Collection, Iterable


def is_residual(role: str) -> bool:
    return role.partition("-")[0] == "residual"


def is_instruct(role: str) -> bool:
    return role.partition("-")[0] == "instruct"


def is_base(role: str) -> bool:
    return role.partition("-")[0] == "base"


def are_blended(roles: Iterable[str]) -> bool:
    """Whether the models make up the result, each with a weight."""
    return any(role.partition("-")[0] == "model" for role in roles)


def base_of(instruct: str) -> str:
    """The base that is subtracted from an instruct model."""
    return f"base{instruct.removeprefix('instruct')}"


def instruct_of(base: str) -> str:
    """The instruct model that a base is subtracted from."""
    return f"instruct{base.removeprefix('base')}"


def of_residuals(count: int) -> list[str]:
    return ["residual"] if count == 1 else [f"residual-{number}" for number in range(1, count + 1)]


def of_pairs(count: int) -> list[str]:
    """Of each pair the instruct model and then its base."""
    numbers = [""] if count == 1 else [f"-{number}" for number in range(1, count + 1)]
    return [f"{kind}{number}" for number in numbers for kind in ("instruct", "base")]


def of_models(count: int) -> list[str]:
    """Of the models of a blend."""
    return ["target", *(f"model-{number}" for number in range(2, count + 1))]


def added(roles: Collection[str]) -> list[tuple[str, ...]]:
    """What has a factor, in their order: each residual, instruct and base of each pair, or each model of a blend."""
    if are_blended(roles):
        return [(role,) for role in roles]
    return [
        (role, base_of(role)) if is_instruct(role) else (role,)
        for role in roles
        if is_instruct(role) or is_residual(role)
    ]
