"""Fixtures: models to update in place, and many windows in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selection import tiles
from small_models import triple
from updated import SIDE

from ires_kernels.in_place import cuts
from ires_kernels.in_place.cuts import Sizes


@pytest.fixture
def small() -> Iterator[None]:
    """Many windows in tensors of a few hundred elements."""
    with pytest.MonkeyPatch.context() as patch, tiles(elements=32):
        patch.setattr(cuts, "SIZES", Sizes(window=64 * 4, unit=64, gap=16))
        yield


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, instruct and target, with side files, two shards and something that is not merged."""
    base, instruct, target = triple(tmp_path, shards=2)
    for role, folder in (("instruct", instruct), ("target", target)):
        for name, text in SIDE[role].items():
            (folder / name).write_text(text)
    return base, instruct, target
