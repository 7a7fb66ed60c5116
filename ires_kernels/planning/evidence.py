"""What values tell of tensors: small samples at places that follow from a shape alone, and how alike two of them are.

Equal names and equal shapes prove nothing: rows may be in another order, halves changed about, the model a stranger.
Weights that were trained further keep pointing where they did, each row of them, so some hundred bytes of a tensor
tell whether it is where its name says. A tensor that others are matched with (the source) is always sampled at the
places of its own shape, and the target at the elements that belong to them: so what `extract` has kept of base in
residual.json serves as well as base itself.

    with Looks(inputs) as looks:
        sample = looks.of("base", ref)                            # None: nothing is known of its values
        values, runs = through(sample, pieces)                    # where the target has its elements elsewhere
        found = likeness(values, looks.at("target", target, runs).values)
        found = looks.compare("base", ref, "target", target)      # where it has them in the same order
        if found is not None and found.agrees is False: ...       # None: its values say nothing, other than False
"""

from __future__ import annotations

import base64
import math
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.quantized import QuantizedRef, Ref
from ires_kernels.checkpoints.sources import Files, Source
from ires_kernels.checkpoints.standins import far
from ires_kernels.dtypes import FLOATS
from ires_kernels.planning.elements import decoded, is_known, numbers

Run = tuple[int, int]
"""Elements of a tensor that follow each other: the flat index of the first, and how many."""

RUNS, RUN = 4, 64
"""How many runs of how many elements are a sample. Of strangers, 256 elements have a correlation of 0 with a deviation
of 1/16, and the 64 of a run of 1/8: what is called alike lies 8 and 4 deviations off."""
ALIKE = 0.5
"""The correlation from which two tensors are called alike. It lies in the middle of what was measured on trained models
(examples/continual/README.md): 0.86 and more for each row of relatives, -0.1 to 0.1 for tensors of strangers. It is the
correlation, which of weights is their cosine, since the cosine of any two norms is near 1."""
FAR = 0.5
"""Norm of the difference, in units of the source's, from which two tensors that do not correlate are called unlike.
Of strangers without a mean it is 1 or more. It is less where a mean much larger than the spread makes all tensors of a
kind near, as norms around 1: that tells nothing."""
FEWEST = 64
"""Elements with which a tensor has a say: of strangers 64 correlate by more than ALIKE once in 30,000 tensors, and 32
once in 400."""
SPREAD = 2.0**-6
"""Deviation in units of the mean below which a tensor counts as constant: two steps of bfloat16, or what is compared
would be their rounding."""
FAINT = 0.1
"""A part whose norm is a smaller share of that of the average part is not asked for its own cosine: it may be rows of
tokens that no text has, which are nothing but noise."""


@lru_cache(maxsize=1 << 14)
def places(shape: tuple[int, ...]) -> tuple[Run, ...]:
    """Where a tensor of this shape is sampled: RUNS runs of RUN elements in their order, or all of what has no more.

    Never to be changed: residuals hold what was read at these places.

    They lie at 1, 10, 13 and 15 sixteenths, of experts in the first dimension, of rows in the last but one, so that of
    [q; k; v] with 1 to 8 queries a key each has one, and of [gate; up] both. Where heads are of 4 k rows, none is the
    first or last of a head, which stay where they are when rows change to another rotary order; some are among the
    first of a head, others not, since often only a part of it is rotated.
    """
    numel = math.prod(shape)
    if numel <= RUNS * RUN:
        return ((0, numel),) if numel else ()
    width = shape[-1] if len(shape) > 1 else 1
    rows = shape[-2] if len(shape) > 1 else numel
    stacked = numel // (rows * width)
    unit, shifts = (64, (146, 1, 18, 37)) if rows >= 1024 else (4, (1, 2, 1, 2)) if rows >= 16 else (1, (0, 0, 0, 0))
    firsts = []
    for i, share in enumerate((1, 10, 13, 15)):
        item = stacked * share // 16
        row = rows * (share, (15, 1, 10, 13)[i])[stacked > 1] // 16 // unit * unit + shifts[i]
        column = max(width - RUN, 0) * i // RUNS
        firsts.append((item * rows + row) * width + column)
    end, apart = 0, []
    for first in sorted(firsts):
        apart.append(max(first, end))
        end = apart[-1] + RUN
    end = numel
    for i in reversed(range(RUNS)):
        apart[i] = min(apart[i], end - RUN)
        end = apart[i]
    return tuple((first, RUN) for first in apart)


def old_places(numel: int) -> tuple[Run, ...]:
    """Where residuals of version 0.1 were sampled."""
    return tuple(((2 * i + 1) * (numel - 16) // 8, 16) for i in range(4))


class Sample(NamedTuple):
    """What a tensor has at some places."""

    runs: tuple[Run, ...]
    dtype: str
    """One of FLOATS."""
    data: bytes
    """Of all runs, little-endian as it is stored."""

    @property
    def values(self) -> Sequence[float]:
        """The numbers, all exactly."""
        return numbers(self.dtype, self.data)

    def to_text(self, shape: Sequence[int]) -> str:
        """As residual.json has it, of a tensor of this shape whose `places` these are."""
        return f"{self.dtype} {'x'.join(map(str, shape))} {base64.b64encode(self.data).decode()}"

    @classmethod
    def from_text(cls, text: object, shape: tuple[int, ...]) -> Sample | None:
        """What `to_text` gave of a tensor of this shape; None for everything else, as somebody may have edited it."""
        if not isinstance(text, str):
            return None
        dtype, _, rest = text.partition(" ")
        size, _, coded = rest.partition(" ")
        if dtype not in FLOATS or size != "x".join(map(str, shape)):
            return None
        return _stored(places(shape), dtype, coded)

    @classmethod
    def from_old_text(cls, text: object, numel: int) -> Sample | None:
        """As `from_text`, of a residual of version 0.1, which has bfloat16 of matrices at other places."""
        count, _, coded = text.partition(" ") if isinstance(text, str) else ("", "", "")
        return _stored(old_places(numel), "BF16", coded) if count == f"{numel}" and numel >= 64 else None


def _stored(runs: tuple[Run, ...], dtype: str, coded: str) -> Sample | None:
    try:
        data = base64.b64decode(coded, validate=True)
    except ValueError:
        return None
    fits = len(data) == sum(count for _, count in runs) * FLOATS[dtype]
    return Sample(runs, dtype, data) if fits else None


def through(sample: Sample, pieces: Iterable[tuple[int, int, int]]) -> tuple[list[float], tuple[Run, ...]]:
    """Of a sample what a target holds, and where in the target that is, in the same order.

    pieces  of the sampled tensor, as (first element, how many, where the first is in the target), not overlapping
    """
    values, runs = sample.values, []
    found: list[float] = []
    for first, count, place in pieces:
        passed = 0
        for start, length in sample.runs:
            low, high = max(start, first), min(start + length, first + count)
            if low < high:
                found += values[passed + low - start : passed + high - start]
                runs.append((place + low - first, high - low))
            passed += length
    return found, tuple(runs)


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike the sampled elements of two tensors are."""

    count: int
    """Elements that were compared."""
    cosine: float
    """Between the two as vectors: 1 the same direction, 0 strangers; NaN where one is zero or not finite."""
    correlation: float
    """The same of what they have besides their means; NaN where one is constant or nearly so."""
    distance: float
    """Norm of the difference, in units of the source's norm."""
    weakest: float
    """The least cosine of a part of RUN elements that is not FAINT; NaN where there are fewer than two parts. A tensor
    of which some rows alone are in another order is alike, with a part that is not."""
    equal: bool
    """Whether all numbers are equal."""

    @property
    def agrees(self) -> bool | None:
        """Whether the values say that the two are the same rows of relatives; None where they say nothing.

        They say nothing where a tensor is zero, nearly constant, or small, unless the two are far from each other.
        """
        if self.count < FEWEST or not math.isfinite(self.cosine):
            return None
        if self.correlation >= ALIKE:
            return True
        return None if self.distance < FAR else False


def agrees(source: Sequence[float], target: Sequence[float]) -> bool | None:
    """`Likeness.agrees` of values of a source, and those of the target at the same elements."""
    return likeness(source, target).agrees


def likeness(source: Sequence[float], target: Sequence[float]) -> Likeness:
    """Compare values of a source with those that a target has of the same elements. Pure Python: some 30 us."""
    s, t = tuple(source), tuple(target)
    count = len(s)
    if len(t) != count:
        raise ValueError(f"{count} values of the source, {len(t)} of the target")
    dots, norms_s, norms_t = [], [], []
    for part in _parts(count):
        some, others = s[part], t[part]
        dots.append(sum(map(mul, some, others)))
        norms_s.append(math.hypot(*some))
        norms_t.append(math.hypot(*others))
    dot, norm_s, norm_t = sum(dots), math.hypot(*norms_s), math.hypot(*norms_t)
    if not (norm_s * norm_t > 0 and math.isfinite(norm_s * norm_t)):
        return Likeness(count, math.nan, math.nan, math.nan, math.nan, s == t)
    least = FAINT / math.sqrt(len(dots))
    least_s, least_t = least * norm_s, least * norm_t
    heard = [d / (a * b) for d, a, b in zip(dots, norms_s, norms_t, strict=True) if a > least_s and b > least_t]
    return Likeness(
        count,
        dot / (norm_s * norm_t),
        _correlation(dot, norm_s, norm_t, sum(s), sum(t), count),
        math.dist(s, t) / norm_s,
        min(heard) if len(dots) > 1 and heard else math.nan,
        s == t,
    )


@lru_cache(maxsize=512)
def _parts(count: int) -> tuple[slice, ...]:
    """Parts of RUN of so many elements, the last one with what is left over."""
    starts = range(0, max(count - RUN, 0) + 1, RUN)
    return tuple(slice(start, count if start == starts[-1] else start + RUN) for start in starts)


def _correlation(dot: float, norm_s: float, norm_t: float, sum_s: float, sum_t: float, count: int) -> float:
    """Of values with these norms and sums; NaN where the deviation of one is less than SPREAD of its mean."""
    of_s, of_t = sum_s / norm_s, sum_t / norm_t  # not their squares, which may be no numbers any more
    spread_s, spread_t = 1 - of_s**2 / count, 1 - of_t**2 / count
    least_s, least_t = ((SPREAD * total) ** 2 / count for total in (of_s, of_t))
    if spread_s <= least_s or spread_t <= least_t:
        return math.nan
    return (dot / (norm_s * norm_t) - of_s * of_t / count) / math.sqrt(spread_s) / math.sqrt(spread_t)


class Looks:
    """Samples of the tensors of some models, each read once, whoever asks. What is no float has none, and what is
    quantized has those of the numbers that it stands for, in formats that `elements` knows.

    Files are held open until `close`, and are those that were validated: reading raises CheckpointError for one that
    changed, and OSError.
    """

    def __init__(self, inputs: Mapping[str, Checkpoint], memory: Mapping[Path, Source] | None = None) -> None:
        """`memory`: of models that are in no files, by their paths."""
        self.inputs = inputs
        self.bytes_read = 0
        self._requests = 0  # for what is elsewhere
        self._known: dict[tuple[str, str, tuple[Run, ...]], Sample | None] = {}
        self._following: dict[str, tuple[Sequence[Ref], Mapping[str, int]]] = {}
        self._asked: dict[str, int] = {}  # up to which of them
        self._compared: dict[tuple[str, str, str, str], Likeness | None] = {}
        self._files = Files({path: of for model in inputs.values() for path, of in model.file_ids.items()}, (), memory)

    def of(self, role: str, ref: Ref) -> Sample | None:
        """A tensor at its own places; for one of a residual what base had in its place, where that is known."""
        model = self.inputs[role]
        if model.kind != "residual":
            return self.at(role, ref, places(ref.shape))
        if model.manifest is None:
            return None
        old = model.manifest.ancestry if isinstance(model.manifest.ancestry, Mapping) else {}
        return Sample.from_text(model.manifest.sketch.get(ref.name), ref.shape) or Sample.from_old_text(
            old.get(ref.name), ref.numel
        )

    def at(self, role: str, ref: Ref, runs: tuple[Run, ...]) -> Sample | None:
        """Some elements of a tensor of a model, or of a run of one; None where nothing is known of them."""
        if self.inputs[role].is_unread:
            return None
        key = role, ref.name, runs
        if key not in self._known and far(ref.path) is not None:
            self._requests += len(runs)
            if self._requests > _MOST_REQUESTS:
                return None
        if key not in self._known:
            started = time.perf_counter()
            self._known[key] = self._read(ref, runs) if runs and ref.dtype in FLOATS else None
            if time.perf_counter() - started > _SLOW:
                self._look_ahead(role, ref)
        return self._known[key]

    def compare(self, role: str, ref: Ref, other: str, target: Ref) -> Likeness | None:
        """Compare a source, of the model `role`, with a target whose elements are in the same order.

        None where nothing is known of one of them, or they are not of one size.
        """
        key = role, ref.name, other, target.name
        if key not in self._compared:
            sample = self.of(role, ref) if ref.numel == target.numel else None
            found = None if sample is None else self.at(other, target, sample.runs)
            self._compared[key] = None if sample is None or found is None else likeness(sample.values, found.values)
        return self._compared[key]

    def close(self) -> None:
        """Close the files; another look opens them again."""
        self._files.close()

    def __enter__(self) -> Looks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, ref: Ref, runs: tuple[Run, ...]) -> Sample | None:
        if isinstance(ref, QuantizedRef):
            if not is_known(ref):
                return None
            values = [value for first, count in runs for value in decoded(ref, first, count, self._bytes)]
            return Sample(runs, "F32", struct.pack(f"<{len(values)}f", *values))
        width = FLOATS[ref.dtype]
        begin, end = min(runs)[0], max([first + count for first, count in runs])
        if (end - begin) * width <= _NEAR:
            near = self._bytes(ref, begin * width, (end - begin) * width)
            parts = [near[(first - begin) * width :][: count * width] for first, count in runs]
            return Sample(runs, ref.dtype, b"".join(parts))
        data = memoryview(bytearray(sum([count for _, count in runs]) * width))
        source, done = self._files.open(ref.path), 0
        for first, count in runs:
            source.read_into(data[done : done + count * width], ref.offset + first * width)
            done += count * width
        self.bytes_read += done
        return Sample(runs, ref.dtype, bytes(data))

    def _look_ahead(self, role: str, ref: Ref) -> None:
        """Have the places of the next tensors read as well, all at once, where a disk had to be waited for."""
        if role not in self._following:
            refs: list[Ref] = [*self.inputs[role].tensors.values()]
            self._following[role] = refs, {each.name: i for i, each in enumerate(refs)}
        order, index = self._following[role]
        here = index.get(ref.tensor, 0)
        if here < self._asked.get(role, 0):
            return
        self._asked[role] = here + 1 + _AHEAD
        source = self._files.open(ref.path)
        for other in order[here + 1 : here + 1 + _AHEAD]:
            if isinstance(other, TensorRef) and other.path == ref.path and other.dtype in FLOATS:
                width = FLOATS[other.dtype]
                for first, count in places(other.shape):
                    source.will_need(other.offset + first * width, count * width)

    def _bytes(self, ref: TensorRef, offset: int, size: int) -> bytes:
        data = bytearray(size)
        self._files.open(ref.path).read_into(memoryview(data), ref.offset + offset)
        self.bytes_read += size
        return bytes(data)


_SLOW = 2.5e-4
"""Seconds that reading a sample takes from a disk, rather than from memory, where it is a tenth of it."""
_MOST_REQUESTS = 30_000
"""Places that are looked at in files elsewhere, each a request: a minute at most. Of models with some 1,500 tensors and
more (three of them) it is the first tensors that are compared, and of the others nothing is known."""
_AHEAD = 256
"""Tensors whose samples are asked for then. 20,000 tensors of three models took 31 s from a disk one by one, 9 s so."""
_NEAR = 1 << 13
"""Bytes that are read at once, where all places of a tensor lie within: it takes no longer than to read them apart."""
