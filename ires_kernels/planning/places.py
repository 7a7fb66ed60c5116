"""Where a part of a whole is, and what it is, by its name and its shape."""

from __future__ import annotations

import math
from collections.abc import Callable

from ires_kernels.planning.rewrites import Components, Kind

ORDER = ("q", "query", "k", "key", "v", "value", "gate", "w1", "up", "w3", "v1")
"""Words in names of parts, in the order in which they are fused where nothing else tells."""


Place = Callable[[Components], Components]


def fits(whole: Kind, part: Kind) -> bool:
    """Whether a part may be rows of the whole: its columns are the whole's, or it is the same bytes."""
    if not part.shape or not whole.shape or not math.prod(whole.shape):
        return False
    rest = part.shape[1:]
    if whole.shape[len(whole.shape) - len(rest) :] == rest:
        return True
    return math.prod(whole.shape) == math.prod(part.shape) and (
        whole.shape[0] == part.shape[0] or whole.shape[-1] == part.shape[-1]
    )


def module_of(pattern: Components) -> Components:
    """Where a part is: the module around a projection, or around all experts."""
    end = len(pattern) - (pattern[-1] in ("weight", "bias")) - 1
    while end > 0 and pattern[end - 1] == "*":
        end -= 1
    return pattern[: max(end, 0)]


def layer_of(pattern: Components) -> Components:
    """The layer that it is in, or of a stack of experts the one around that."""
    stars = [i for i, part in enumerate(pattern) if part == "*" and "expert" not in pattern[i - 1]]
    return pattern[: stars[-1] + 1] if stars else pattern[:1]


def anywhere(_: Components) -> Components:
    """Anywhere in the model."""
    return ()


def stem_of(pattern: Components) -> str:
    """What a part is called in its module."""
    return pattern[-2] if pattern[-1] in ("weight", "bias") and len(pattern) > 1 else pattern[-1]


def is_bias(pattern: Components) -> bool:
    """Whether it is added, and no matrix, by its name."""
    return pattern[-1].endswith("bias")


def rank_of(stem: str) -> int:
    """Where its word stands in the usual order."""
    low = stem.lower()
    return next((i for i, word in enumerate(ORDER) if low in (word, f"w{word}") or low.startswith(f"{word}_")), 99)
