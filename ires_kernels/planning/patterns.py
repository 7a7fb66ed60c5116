"""Regular expressions over the names of tensors, and how long they may take.

The matcher of Python tries one way after another, and there may be more than anybody can wait for: of ``(a+)+b`` two to
the power of the length of a name. Patterns come from manifests as well, which are strangers'. So before one is tried,
the ways it has are counted, as an upper bound: one that may have more of them on the longest name than LIMIT allows is
refused. All patterns together get a time, as there may be many, and many names.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection
from functools import lru_cache
from typing import Any

from ires_kernels.checkpoints.header import brief

try:
    from re import _parser as parser  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # before Python 3.11
    import sre_parse as parser  # type: ignore[no-redef, unused-ignore]

LIMIT = 8
"""log10 of the ways of one pattern through one name: some seconds. With names of 80 letters, four times ``.*``."""
SECONDS = 60.0
"""What all patterns together may take for all names."""
_LONGEST = 10_000  # characters of a pattern
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}


class PatternError(ValueError):
    """Why a pattern cannot be used."""


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern, ready for use. Raises PatternError for what is none."""
    if len(pattern) > _LONGEST:
        raise PatternError(f"has {len(pattern)} characters, wanted at most {_LONGEST}")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise PatternError(f"is not a regular expression: {error}") from None
    except RecursionError:
        raise PatternError("is nested too deeply") from None


def matches(pattern: str, name: str) -> bool:
    """Whether the regular expression is found anywhere in the name; ``^`` and ``$`` anchor it."""
    return compiled(pattern).search(name) is not None


def unmatched(patterns: Collection[str], names: Collection[str]) -> list[str]:
    """The patterns that are found in no name. Raises PatternError for one that may take too long."""
    longest = max(map(len, names), default=0)
    for pattern in patterns:
        if ways(pattern, longest) > LIMIT:
            raise PatternError(
                f"the regular expression {brief(pattern)} may take for ever on a name of {longest} characters. Repeat "
                "nothing that is itself repeated or has alternatives, as in (a+)+, and use fewer of .* and the like."
            )
    left = dict.fromkeys(patterns)
    end = time.monotonic() + SECONDS
    for pattern in patterns:
        search = compiled(pattern).search
        for name in names:
            if search(name) is not None:
                left.pop(pattern, None)
            if time.monotonic() > end:
                raise PatternError(
                    f"the regular expressions take more than {SECONDS:.0f} s for {len(names)} names, as "
                    f"{brief(pattern)} does. Use fewer, or simpler ones."
                )
    return list(left)


def ways(pattern: str, length: int) -> float:
    """log10 of how many ways at most the matcher tries to find the pattern in a name of `length` characters."""
    compiled(pattern)
    factor, free = _count(parser.parse(pattern), length)
    free += 1  # where it begins
    # The choices of `free` lengths that are at most `length` together.
    return factor + (math.lgamma(length + free + 1) - math.lgamma(length + 1) - math.lgamma(free + 1)) / math.log(10)


def _count(items: Any, length: int) -> tuple[float, int]:
    """Of a sequence: log10 of a number of ways, for each choice of so many lengths."""
    counts = [_count_one(f"{operator}", argument, length) for operator, argument in items]
    return sum(factor for factor, _ in counts), sum(free for _, free in counts)


def _count_one(operator: str, argument: Any, length: int) -> tuple[float, int]:
    if operator == "SUBPATTERN":
        return _count(argument[-1], length)
    if operator in ("ASSERT", "ASSERT_NOT"):
        return _count(argument[1], length)
    if operator == "ATOMIC_GROUP":
        return _count(argument, length)
    if operator in ("BRANCH", "GROUPREF_EXISTS"):
        branches = [branch for branch in argument[1:] if branch] if operator == "GROUPREF_EXISTS" else argument[1]
        counts = [_count(branch, length) for branch in branches]
        return math.log10(len(counts)) + max(factor for factor, _ in counts), max(free for _, free in counts)
    if operator not in _REPEATS:
        return 0.0, 0
    least, most, item = int(argument[0]), int(argument[1]), argument[2]
    factor, free = _count(item, length)
    if most - least <= 8 and not factor and not free:  # only how often
        return math.log10(most - least + 1), 0
    if not factor and not free:
        return 0.0, 1
    times = min(most, length + 1)
    return math.log10(times + 1) + times * factor, times * free
