"""What the texts of arguments mean: residuals and pairs with factors, and which of several workers this is."""

from __future__ import annotations

import argparse
import os
import re

from ires_kernels.checkpoints import hub
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.planning.workers import Worker


def alpha_for(text: str) -> tuple[str, tuple[float, ...] | float]:
    pattern, _, values = text.rpartition("=")
    try:
        factors = tuple(float(value) for value in values.split(","))
    except ValueError:
        factors = ()
    if not pattern or not factors:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted REGEX=ALPHA, or =ALPHA,ALPHA,… for several residuals")
    return pattern, factors if len(factors) > 1 else factors[0]


def residual(text: str) -> tuple[str, float | None]:
    """Path and factor of PATH or PATH:ALPHA; a path that exists is one, colons and all."""
    path, colon, factor = text.rpartition(":")
    if not os.path.lexists(text) and colon and path:
        try:
            return path, float(factor)
        except ValueError:
            if os.path.lexists(path):
                raise ArgumentError(
                    f"{text}: {factor!r} is no factor of {path}, wanted a number, as {path}:0.5, or nothing."
                ) from None
    return text, None


def pair(text: str) -> tuple[tuple[str, str], float | None]:
    """The models and the factor of INSTRUCT:BASE or INSTRUCT:BASE:ALPHA, of which models that exist may have colons."""
    models, factor = text, None
    if _parted(text) is None:
        models, factor = residual(text)
    found = _parted(models)
    if found is None:
        raise ArgumentError(
            f"{text}: is no pair, wanted INSTRUCT:BASE or INSTRUCT:BASE:ALPHA: two models with a colon between them, "
            "and a number as the factor."
        )
    return found, factor


def _parted(text: str) -> tuple[str, str] | None:
    """The two sides of the colon that parts models; None where none does."""
    places = [match.start() for match in re.finditer(":(?!//)", text) if not _is_of_host(text, match.start())][::-1]
    sides = [(text[:at], text[at + 1 :]) for at in places if text[:at] and text[at + 1 :]]
    there = [pair for pair in sides if all(os.path.lexists(path) or hub.is_remote(path) for path in pair)]
    if there:
        return there[0]
    return sides[0] if len(sides) == 1 and not _is_number(sides[0][1]) else None


def _is_of_host(text: str, at: int) -> bool:
    """Whether a colon of an address has the port behind it, or a password."""
    return (
        re.search("://[^/]*$", text[:at]) is not None
        and re.match(r"(\d+|[^/]*@[^/]*)(/|$)", text[at + 1 :]) is not None
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def workers(arguments: argparse.Namespace) -> Worker | str | None:
    """Which of several processes this is, where it was asked to be one; or the cluster that has them."""
    rank, world, address = arguments.rank, arguments.world, arguments.address
    if arguments.engine:
        if arguments.workers or rank is not None or world is not None:
            raise ArgumentError("--engine has workers of its own: leave out --workers, --rank and --world.")
        return f"ray:{address}" if address else "ray"
    if address:
        raise ArgumentError("--address goes with --engine ray.")
    if rank is not None and world is not None:
        return Worker.of(rank, world)
    if rank is not None or (world is not None and not arguments.workers):
        raise ArgumentError("--rank and --world go together; or --workers env takes the rank from the environment.")
    return Worker.of_environment(os.environ, world) if arguments.workers else None
