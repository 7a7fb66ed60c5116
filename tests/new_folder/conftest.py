"""What the tests of new folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selection import tiles


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 64 elements, so that small tensors have many."""
    with tiles(elements=64, copied=96):
        yield
