"""Work dealt out among those who do it, by its weight."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def dealt(weights: Sequence[int], parts: int) -> list[list[int]]:
    """The indexes of what weighs so much, in so many parts: the heaviest first, each into the lightest part so far."""
    found: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        load, part = heapq.heappop(loads)
        found[part].append(index)
        heapq.heappush(loads, (load + weights[index], part))
    return found
