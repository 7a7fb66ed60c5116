"""A tensor of codes in a checkpoint, and what lies beside it, wherever in the index that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.claims import Claims
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.checkpoints.sources import Files
from ires_kernels.formats import Format

FLOAT_SCALES = ("F32", "F16", "BF16")
EXPONENTS = ("F8_E8M0", "U8")
"""Dtypes of scales that are powers of two, which some files have as plain bytes."""


class Undecided(Exception):
    """Why codes cannot be decoded: what was found, and what is wanted."""


@dataclass
class Codes:
    """What is known of one weight so far."""

    checkpoint: Checkpoint
    claims: Claims
    files: Files
    ref: TensorRef
    """Of the codes."""
    name: str
    """Of the weight."""
    stem: str
    """What the names of its companions begin with."""
    parts: list[tuple[str, TensorRef]] = field(default_factory=list)
    """What its numbers are made of besides the codes."""
    others: list[str] = field(default_factory=list)
    """What belongs to it, and is of no use for its numbers."""

    @property
    def is_fused(self) -> bool:
        """Whether it is a tensor of experts that has no module of its own: ``experts.gate_up_proj``."""
        return self.stem == f"{self.name}_"

    def beside(self, *endings: str) -> TensorRef | None:
        """The first of some companions that there is."""
        tensors = self.checkpoint.tensors
        return next((tensors[self.stem + ending] for ending in endings if self.stem + ending in tensors), None)

    def wanted(self, *endings: str) -> TensorRef:
        """The first of some companions that there is. Raises Undecided where there is none."""
        found = self.beside(*endings)
        if found is not None:
            return found
        away = next((ending for ending in endings if self.stem + ending in self.checkpoint.elsewhere), None)
        if away is not None:
            raise Undecided(f"{self.stem}{away}, which belongs to it, is in another shard. Give the model's folder")
        kind = f"{self.ref.name} has {self.ref.dtype} codes"
        if len(endings) > 1:
            raise Undecided(f"{kind}, and there is no scale of them in any file")
        raise Undecided(f"{kind}, and there is no {self.stem}{endings[0]} in any file")

    def confirm(self, form: str, *families: str) -> None:
        """Raise Undecided where there are settings, and none of them says that weights have this format."""
        if self.claims.formats and not self.claims.of(*families):
            said = ", ".join(sorted({f"{claim}" for claim in self.claims.formats}))
            raise Undecided(f"its tensors have the format {form}, and {self.claims.where} says {said}")

    def add(self, part: str, ref: TensorRef) -> TensorRef:
        """Take a companion for a part of the weight."""
        self.parts.append((part, ref))
        return ref

    def read(self, ref: TensorRef) -> bytes:
        """The bytes of a small companion."""
        raw = bytearray(ref.nbytes)
        self.files.open(ref.path).read_into(memoryview(raw), ref.offset)
        return bytes(raw)

    def weight(self, name: str, full: tuple[int, ...], settings: Mapping[str, int | str]) -> QuantizedRef:
        """The weight in a format, of the shape `full`."""
        form = Format(name, tuple(settings.items()))
        return QuantizedRef(self.name, full, form, (("codes", self.ref), *self.parts), full)


def check(ref: TensorRef, shape: tuple[int, ...] | None, *dtypes: str) -> TensorRef:
    """A companion of the right shape, where that is known, and dtype. Raises Undecided for any other."""
    if ref.dtype not in dtypes or (shape is not None and ref.shape != shape):
        wanted = " or ".join(dtypes) + (f" {list(shape)}" if shape is not None else "")
        raise Undecided(f"{ref.name} is {ref.dtype} {list(ref.shape)}, wanted {wanted}")
    return ref
