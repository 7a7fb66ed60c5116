"""Rows that are elsewhere: the search for the rows of some tensors among those of others, by their values.

Fine-tuned weights keep their rows: of two relatives, a row of one is nearer to its own row of the other than to any
other. So the rows of a tensor are looked for among all that could hold them. Where every one is found, and each once,
they are taken from there: regions, or the rows of heads in another rotary order. What is found in columns alone,
because a model stores matrices transposed or in another order of columns, is named and not taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.planning.evidence import Looks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]
else:
    Matrix = Any

_COLUMNS = 64
"""Elements of a row that are compared. Of strangers they have a cosine of 0 with a deviation of 1/8, so that of some
thousand rows the best stranger reaches 0.5, and a row of a relative is at 0.86 or more."""
_NEAR = 0.5
_MOST_ROWS = 1 << 15
"""Of which each is compared with each: some seconds."""
_BLOCK = 1 << 11
_MOST = 0.9
"""Part of the rows, or columns, that has to be found somewhere for anything to be said of it."""


class Tensor(NamedTuple):
    """One that rows are looked for in, or taken from."""

    role: str
    ref: Ref


class Found(NamedTuple):
    """Where rows are."""

    rows: tuple[tuple[int, int], ...] = ()
    """For each row of all tensors that are looked for, one behind the other: which source, and which of its rows."""
    cause: str = ""
    """What was found where no rows were: why they cannot be taken."""


def search(looks: Looks, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Found:
    """Look for the rows of `mine` in `theirs`, which have as many elements."""
    import numpy as np

    alone = len(mine) == 1 == len(theirs) and len(mine[0].ref.shape) == len(theirs[0].ref.shape)
    in_depth = any(len(each.ref.shape) == 3 for each in (*mine, *theirs))
    sides = [_flat(side) if in_depth and not alone else _stacked(side) for side in (mine, theirs)]
    width = _width(sides[0], sides[1])
    if width >= _COLUMNS // 4:
        rows = [sum(math.prod(shape) // width for _, shape in side) for side in sides]
        if rows[0] == rows[1] <= _MOST_ROWS:
            columns = min(width, _COLUMNS)
            ours, yours = (_rows(looks, side, width, width // 2 - columns // 2, columns) for side in sides)
            best, cosine = _nearest(ours, yours)
            order = _bijection(best, cosine)
            if order is not None:
                ends = np.cumsum([math.prod(shape) // width for _, shape in sides[1]])
                which = np.searchsorted(ends, order, side="right")
                starts = np.concatenate([[0], ends])[which]
                return Found(tuple(zip(which.tolist(), (order - starts).tolist(), strict=True)))
    return Found(cause=_columns(looks, sides[0], sides[1]))


Side = list[tuple[Tensor, tuple[int, ...]]]


def _stacked(tensors: Sequence[Tensor]) -> Side:
    """Each with the shape of what is compared: of stacked experts the first one."""
    return [(each, each.ref.shape[-2:] if len(each.ref.shape) == 3 else each.ref.shape) for each in tensors]


def _flat(tensors: Sequence[Tensor]) -> Side:
    """Each as a matrix."""
    return [(each, (each.ref.numel // each.ref.shape[-1], each.ref.shape[-1])) for each in tensors]


def _width(*sides: Side) -> int:
    widths = {math.prod(shape[1:]) if len(shape) > 1 else 1 for side in sides for _, shape in side}
    return widths.pop() if len(widths) == 1 else 0


def _rows(looks: Looks, side: Side, width: int, column: int, columns: int) -> Matrix:
    """Some columns of all rows, each row of norm 1."""
    import numpy as np

    parts = []
    for tensor, shape in side:
        rows = math.prod(shape) // width
        runs = tuple((row * width + column, columns) for row in range(rows))
        if columns == width:
            runs = ((0, rows * width),)
        sample = looks.at(tensor.role, tensor.ref, runs)
        values = sample.values if sample is not None else [0.0] * (rows * columns)
        parts.append(np.asarray(values, np.float32).reshape(rows, columns))
    found = np.concatenate(parts)
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        made: Matrix = np.nan_to_num(found / norms, nan=0.0, posinf=0.0, neginf=0.0)
        return made


def _nearest(ours: Matrix, yours: Matrix) -> tuple[NDArray[np.int64], Matrix]:
    """For each row of ours the nearest of yours, and the cosine."""
    import numpy as np

    best, cosine = np.empty(len(ours), np.int64), np.empty(len(ours), np.float32)
    for start in range(0, len(ours), _BLOCK):
        products = ours[start : start + _BLOCK] @ yours.T
        best[start : start + _BLOCK] = products.argmax(axis=1)
        cosine[start : start + _BLOCK] = products.max(axis=1)
    return best, cosine


def _bijection(best: NDArray[np.int64], cosine: Matrix) -> NDArray[np.int64] | None:
    """The order of the rows, where every one is found and each once; rows without values follow the one before."""
    import numpy as np

    clear = cosine >= _NEAR
    if clear.mean() < _MOST:
        return None
    order = np.where(clear, best, -1)
    free = set(range(len(order))) - set(order[clear].tolist())
    for row in np.flatnonzero(~clear).tolist():
        wanted = int(order[row - 1]) + 1 if row else 0
        if wanted not in free:
            return None
        order[row] = wanted
        free.remove(wanted)
    return order if not free and len(np.unique(order)) == len(order) else None


def crossed(looks: Looks, whole: Tensor, shape: tuple[int, int], part: Tensor) -> str:
    """How the rows of `part` are columns of `whole`, whose share of the first expert has this shape; "" if not."""
    import numpy as np

    rows = shape[0]
    if part.ref.shape[-1] != rows or max(*shape, *part.ref.shape) > _MOST_ROWS:
        return ""
    count = min(rows, _COLUMNS)
    best, cosine = _nearest(_rows(looks, [(part, part.ref.shape)], rows, 0, count), _block(looks, whole, shape, count))
    if (cosine >= _NEAR).mean() < _MOST:
        return ""
    return "is stored transposed" + ("" if (np.diff(best) == 1).mean() >= _MOST else f", {_pattern(best)}")


def _columns(looks: Looks, mine: Side, theirs: Side) -> str:
    """What of the order of columns explains that no rows were found, in words; "" if nothing does."""
    import numpy as np

    if len(mine) != 1 or len(theirs) != 1:
        return ""
    (ours, shape), (yours, other) = mine[0], theirs[0]
    if len(shape) != 2 or len(other) != 2 or max(*shape, *other) > _MOST_ROWS:
        return ""
    count = min(*shape, *other, _COLUMNS)
    if shape[1] == other[0] and shape[0] == other[1]:
        best, cosine = _nearest(_rows(looks, mine, shape[1], 0, count), _block(looks, yours, other, count))
        if (cosine >= _NEAR).mean() >= _MOST:
            in_order = (best == np.arange(len(best))).mean() >= _MOST
            return "is stored transposed" if in_order else f"is stored transposed, {_pattern(best)}"
    if shape == other:
        best, cosine = _nearest(_block(looks, ours, shape, count), _block(looks, yours, other, count))
        if (cosine >= _NEAR).mean() >= _MOST and (best != np.arange(len(best))).any():
            return f"has its columns in another order, {_pattern(best)}"
    return ""


def _block(looks: Looks, tensor: Tensor, shape: tuple[int, ...], count: int) -> Matrix:
    """The first rows, transposed: of each column its first elements, as a vector of norm 1."""
    import numpy as np

    sample = looks.at(tensor.role, tensor.ref, ((0, count * shape[1]),))
    values = sample.values if sample is not None else [0.0] * (count * shape[1])
    found = np.asarray(values, np.float32).reshape(count, shape[1]).T
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        made: Matrix = np.nan_to_num(found / norms, nan=0.0, posinf=0.0, neginf=0.0)
        return made


def _pattern(best: NDArray[np.int64]) -> str:
    """Whether what follows each other here is two apart there."""
    import numpy as np

    steps = np.diff(best)
    half = np.diff(best[::2]), np.diff(best[1::2])
    apart = (steps == 2).mean() >= _MOST or all(len(each) and (each == 1).mean() >= _MOST for each in half)
    return "and two parts alternate by column" if apart else "and its rows and columns are in another order"
