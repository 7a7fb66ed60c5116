"""How scales lie over a weight: by their shape, and where that leaves the sides of a block open, by the settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.claims import Claim
from ires_kernels.checkpoints.codes import Undecided
from ires_kernels.formats import matrices


class Grid(NamedTuple):
    """What a scale is for."""

    kind: Literal["tensor", "channel", "block"]
    rows: int
    """Sides of a block, as `formats` has them."""
    columns: int


def grid(full: tuple[int, ...], scale: TensorRef, said: Iterable[Claim], where: str) -> Grid:
    """The grid that a scale is, over a weight of the shape `full`.

    `said` is what the settings `where` say of the format. Raises Undecided for a shape that contradicts it, or that is
    none of a grid.
    """
    many, height, width = matrices(full)
    shape = _shape(full, scale)
    fits = len(shape) == len(full) and shape[:-2] == full[:-2]
    down, across = shape[-2:] if fits else (0, 0)
    sides = {(claim.rows or height, claim.columns or width) for claim in said if claim.rows is not None}
    fitting = [side for side in sides if (-(-height // side[0]), -(-width // side[1])) == (down, across)]
    if not fitting and scale.numel == 1 and (not sides or (height, width) in sides):
        return Grid("tensor", many * height, width)
    if not fitting and (sides or not 0 < down <= height or not 0 < across <= width):
        blocks = " or ".join(f"{rows} × {columns}" for rows, columns in sorted(sides))
        says = f", and by {where} blocks of {blocks} share a scale" if sides else ""
        raise Undecided(f"{scale.name} has the shape {list(scale.shape)} for the weight {list(full)}{says}")
    if fitting:
        rows, columns = min(fitting)
    elif len(full) == 3 and (down, across) == (2, 1) and height % 2 == 0:  # gate and up, one after the other
        rows, columns = height // 2, width
    else:
        rows, columns = _side(height, down, scale), _side(width, across, scale)
        square = rows == columns or (down == 1 and height <= columns) or (across == 1 and width <= rows)
        if not square and 1 not in (rows, columns) and (down, across) != (1, 1):  # q, k and v have a scale each, maybe
            raise Undecided(_unsaid(scale, f"the shape {list(scale.shape)} for the weight {list(full)}"))
    if (rows, columns) == (height, width):
        return Grid("tensor", many * height if scale.numel == 1 else height, width)
    return Grid("channel" if rows == 1 and columns >= width else "block", rows, columns)


def group(width: int, groups: int, said: Iterable[Claim], scale: TensorRef, where: str) -> int:
    """How many of `width` columns share a scale where there are so many groups of them."""
    sizes = sorted({claim.columns or width for claim in said if claim.columns is not None})
    fitting = next((size for size in sizes if -(-width // size) == groups), None)
    if fitting is None and (sizes or not groups or width % groups):
        says = f", and by {where} groups have {' or '.join(map(str, sizes))}" if sizes else ""
        raise Undecided(f"{scale.name} has {groups} groups for {width} columns{says}")
    return fitting or width // groups


def _shape(full: tuple[int, ...], scale: TensorRef) -> tuple[int, ...]:
    """The shape of a scale with the dimensions of its weight, where it was stored with more of them or fewer."""
    shape = scale.shape
    if len(full) == 2 and len(shape) == 4 and shape[1] == shape[3] == 1:
        return shape[0], shape[2]
    if shape == full[:-1] and scale.numel > 1:
        return *shape, 1
    if len(full) == 3 and shape == full[:1]:
        return *shape, 1, 1
    return shape


def _side(length: int, blocks: int, scale: TensorRef) -> int:
    """The side of the blocks that a dimension was cut into, where nothing tells: a power of two, or equal parts."""
    if blocks == 1:
        return length
    sizes = {1 << power for power in range(length.bit_length()) if -(-length // (1 << power)) == blocks}
    if length % blocks == 0:
        sizes.add(length // blocks)
    if len(sizes) != 1:
        raise Undecided(_unsaid(scale, f"{blocks} blocks for {length} rows or columns"))
    return sizes.pop()


def _unsaid(scale: TensorRef, what: str) -> str:
    wanted = "weight_block_size in the quantization_config of config.json"
    return f"{scale.name} has {what}, and no settings say the sides of a block: wanted {wanted}"
