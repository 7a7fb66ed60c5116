"""The manifest that a merge leaves in its output: what it was made of, how, and the hash of every tensor.

``residual.json`` in a residual, ``ires.json`` in a merged model, ``NAME.ires.json`` beside a file that was updated in
place. Here it is read: parsed once, into frozen dataclasses, and refused with the name of the key where a value is not
of its kind. `provenance` makes it.

Whoever has a folder can write such a file. So it is signed, and what it says of the past of a model is believed only
where `is_mine`; everything else in it can be looked up in the files themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from ires_kernels.checkpoints import roles
from ires_kernels.checkpoints.decode import APART, KEY, RAW, Count, Time, Wanted, decode
from ires_kernels.checkpoints.header import CheckpointError, brief, parse_json
from ires_kernels.files import trust
from ires_kernels.files.opening import MAX_MANIFEST, read_bytes

_ADVICE = "It was edited since a merge wrote it, or damaged: put the right one back; or, if it is of no use, delete it."

Digest = Annotated[str, Wanted("32 hexadecimal digits", lambda text: re.fullmatch(r"[0-9a-f]{32}", text) is not None)]
"""xxh3_128"""
Sum = Annotated[str, Wanted("64 hexadecimal digits", lambda text: re.fullmatch(r"[0-9a-f]{64}", text) is not None)]
"""sha256"""
PathText = Annotated[str, Wanted("a path", lambda text: "\0" not in text)]
FileName = Annotated[str, Wanted("the name of a file in the folder", lambda text: is_inside(text))]


def is_inside(name: str) -> bool:
    """Whether a name stays in the folder that it is looked up in, links apart."""
    parts = name.split("/")
    return "\0" not in name and all(part not in ("", ".", "..") for part in parts) and not name.startswith("/")


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a file was: by its status, and by a `sample` of its bytes, at places that the manifest's id chooses.

    Manifests of version 0.1.0 have size and time alone, published ones size and sample.
    """

    size: Count
    mtime_ns: Time | None = None
    dev: Count | None = None
    ino: Count | None = None
    ctime_ns: Time | None = None
    sample: str = ""


@dataclass(frozen=True, slots=True)
class Input:
    """One of the models or residuals that an output was made of."""

    path: PathText = ""
    digest: Digest | None = None
    """Of all its tensors, if all were read."""
    read: Digest | None = None
    """Of what was read of it, in place."""
    files: dict[str, Stamp] = field(default_factory=dict)
    """Its weights, by name."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the output."""

    dtype: str
    shape: tuple[Count, ...]
    xxh3_128: Digest | None
    """None of one that an update in place left as it was, unseen."""
    inputs: dict[str, Digest]
    """xxh3_128 of what it was made of, by role."""
    copied: str = ""
    """Why it is the target's own."""
    update: float | None = None
    """The norm of what was added to it, or of the difference that it is; None where that was not counted."""


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of the output that holds no tensors."""

    xxh3_128: Digest
    origin: str = field(default="", metadata={KEY: "from"})


@dataclass(frozen=True, slots=True)
class NotStored:
    """A tensor of the instruct model that its residual does not hold."""

    reason: str
    dtype: str
    shape: tuple[Count, ...]


@dataclass(frozen=True, slots=True)
class ByToken:
    """The rows of a residual's tensor that has one for each token."""

    base: Count
    """How many rows base has."""
    own: tuple[tuple[Count, Count], ...] = ()
    """The first and the number of rows that are those of instruct, and no difference."""


@dataclass(frozen=True, slots=True)
class Strength:
    """How much of the updates asked for with the same factors is in the stored result.

    `realised` is <stored - target, update> / <update, update>, update = alpha * residual: 1 when rounding changed
    nothing on the whole, None when there was no update. With one factor, alpha * realised is the effective alpha.
    """

    factors: tuple[float, ...]
    elements: Count
    realised: float | None
    tensors: Count = 0
    pattern: str = ""
    """The regular expression, found in their names, that gave them these factors; empty where none did."""
    weights: bool = False
    """Whether factors are those of models that make up the result, and not of updates of one."""

    @property
    def effective_alpha(self) -> float | None:
        """Of the only factor; None for several residuals or without any update."""
        return self.factors[0] * self.realised if len(self.factors) == 1 and self.realised is not None else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "factors": list(self.factors),
            "elements": self.elements,
            "realised": self.realised,
            "effective_alpha": self.effective_alpha,
            "tensors": self.tensors,
            "pattern": self.pattern,
            **({"weights": True} if self.weights else {}),
        }


@dataclass(frozen=True, slots=True)
class Requantized:
    """What became of the updates of tensors that are stored as codes, as `requantized` counts it."""

    tensors: Count = 0
    scales: Count = 0
    new_scales: Count = 0
    """Those of blocks that have outgrown theirs."""
    noise: float = 0.0
    """Norm of what codes differ by from the result, in units of the norm of the update."""
    loud: Count = 0
    """Tensors in which that is more than `requantized.LOUD`."""
    worst: str = ""
    """The tensor with the most."""
    most: float = 0.0
    """Its noise."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """How target and instruct have moved away from base, as `fit.FitReport.numbers` tells it."""

    elements: Count = 0
    drift: float | None = None
    size: float | None = None
    cosine: float | None = None
    sign_conflicts: float | None = None
    within_an_ulp: float | None = None
    effective_alpha: float | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """The same of all merged tensors together, and of matrices alone."""

    total: Fitted = Fitted()
    matrices: Fitted = Fitted()


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a merge did to the numbers, as `report.Report.numbers` counts it."""

    tensors: Count = 0
    elements: Count = 0
    updates: Count = 0
    lost: Count = 0
    nan_in: Count = 0
    inf_in: Count = 0
    nan_out: Count = 0
    overflow: Count = 0
    strengths: tuple[Strength, ...] = ()
    requantized: Requantized | None = None
    compare: Compared | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """The rules of a merge as they stand: typed, and not checked any further, which `Rules.from_dict` does."""

    alpha: tuple[float, ...] = (1.0,)
    alphas: tuple[tuple[str, tuple[float, ...]], ...] = ()
    skip: tuple[str, ...] = ()
    dtype: str | None = None
    allow_missing: bool | str = False
    rounding: str = "nearest"
    seed: int = 0
    vocabulary: str | None = None
    renames: tuple[tuple[str, str], ...] = ()
    trust_names: bool = False
    recipe: str = ""


@dataclass(frozen=True, slots=True)
class Update:
    """An update in place, as the manifests of later ones tell of it."""

    id: str
    recipe: str | None
    inputs: dict[str, Input]
    report: Numbers
    rules: Asked | None = None
    table: dict[str, Any] = field(default_factory=dict, repr=False, compare=False, metadata={RAW: True})
    """As it stands."""


@dataclass(frozen=True, slots=True)
class InPlace:
    """What is special about an update in place."""

    recipe: str
    files: dict[str, Stamp]
    """The target's own files, as it has left them."""
    layouts: dict[str, str]
    """Hash of what they have where."""
    undo: str = "ring"
    history: tuple[Update, ...] = ()
    """The updates before, the last one last."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `provenance.build` wrote. Of a key that is missing it has the default, so that older ones can be read."""

    path: Path = field(default=Path(), metadata={APART: True})
    """Where it was read."""
    version: str = field(default="", metadata={KEY: "ires"})
    operation: str = ""
    id: str = ""
    """Plan.id."""
    digest: Digest | None = None
    inputs: dict[str, Input] = field(default_factory=dict)
    """By role."""
    rules: Asked | None = None
    report: Numbers = field(default_factory=Numbers)
    files: dict[FileName, SideFile] = field(default_factory=dict)
    headers: dict[FileName, Digest] = field(default_factory=dict)
    """xxh3_128 of what comes before the data in the weights, by name."""
    samples: dict[FileName, Digest] = field(default_factory=dict)
    """Of the weights of a new folder, by name, at places that `id` chooses."""
    sha256: dict[FileName, Sum] = field(default_factory=dict)
    in_place: InPlace | None = None
    unsynced: str = ""
    """Where nothing was fsynced, the boot_id of the machine."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sketch: dict[str, str] = field(default_factory=dict)
    """Of a residual: what base has at the `places` of each of its tensors, as `evidence.Sample.to_text` gives it."""
    ancestry: object = None
    """What the models had in common, as `ancestry.Ancestry.to_dict` gives it. Of a residual that has no sketch: what
    base has of some matrices, by name (`evidence.Sample.from_old_text`)."""
    tied: bool | None = None
    """Of a residual: whether the head is the embedding in both of its models."""
    not_stored: dict[str, NotStored] = field(default_factory=dict)
    config: dict[str, dict[str, object]] = field(default_factory=dict)
    """Of a residual: what `configs.fields` gave of base and instruct."""
    special_ids: dict[str, object] = field(default_factory=dict)
    """Of a residual: `configs.special_ids` of instruct."""
    renamed_tokens: dict[str, Count] = field(default_factory=dict)
    """Of a residual: tokens of base in whose rows instruct has others, and their ids."""
    by_token: dict[str, ByToken] = field(default_factory=dict)
    """Of a residual: its tensors with a row for each token, where not all rows are differences."""
    table: dict[str, Any] = field(default_factory=dict, repr=False, compare=False, metadata={RAW: True})
    """As it stands."""

    @property
    def is_mine(self) -> bool:
        """Whether it was made with the key of this user, and not changed since."""
        return trust.is_signed("manifest", self.table)

    def history(self) -> list[Update]:
        """What the manifest of the next update in place keeps: the updates before this one, and this one last."""
        if self.in_place is None:
            return []
        keys = ("path", "digest", "read", "files")
        inputs = self.table.get("inputs", {})
        last = {
            "id": self.id,
            "recipe": self.in_place.recipe,
            "inputs": {role: {key: entry[key] for key in keys if key in entry} for role, entry in inputs.items()},
            "rules": self.table.get("rules"),
            "report": self.table.get("report"),
        }
        return [*self.in_place.history, decode(Update, last, f"{self.path}", _ADVICE)]

    def demand(self, keys: Iterable[str]) -> None:
        """Refuse with CheckpointError a manifest that lacks one of the keys."""
        absent = [key for key in keys if key not in self.table]
        if absent:
            raise CheckpointError(f"{self.path}: {absent[0]} is missing, wanted it. {_ADVICE}")

    def made_of(self) -> dict[str, Input]:
        """The inputs by role, in the order of `inputs.open_inputs`.

        Raises CheckpointError for a manifest that does not tell all that a merge tells of its output.
        """
        self.demand(("operation", "inputs", "rules", "files", "tensors"))
        operation = self.operation
        others = len(self.inputs) - 1
        is_sum = operation == "extract" and self.rules is not None and bool(self.rules.alpha)
        shapes: dict[str, list[list[str]]] = {
            "extract": [roles.of_pairs((others + 1) // 2), roles.of_residuals(others + 1)]
            if is_sum
            else [["base", "instruct"]],
            "apply": [
                *(["target", *given] for given in (roles.of_pairs(others // 2), roles.of_residuals(others))),
                *([roles.of_models(others + 1)] if others else []),
            ],
        }
        if operation not in shapes:
            raise CheckpointError(f"{self.path}: operation is {brief(operation)}, wanted apply or extract. {_ADVICE}")
        named = next((names for names in shapes[operation] if set(names) == self.inputs.keys()), None)
        if named is None:
            wanted = " or ".join(", ".join(names) for names in shapes[operation])
            raise CheckpointError(f"{self.path}: inputs are {brief(list(self.inputs))}, wanted {wanted}. {_ADVICE}")
        count = 0 if operation == "extract" and not is_sum else len(roles.added(named))
        if self.rules is None or len(self.rules.alpha) != count:
            raise CheckpointError(f"{self.path}: rules.alpha has not {count} factors. {_ADVICE}")
        if operation == "extract" and self.rules.dtype is None:
            raise CheckpointError(f"{self.path}: rules.dtype is null, wanted that of the residual. {_ADVICE}")
        return {role: self.inputs[role] for role in named}


def parse(raw: bytes, path: Path) -> Manifest:
    """A manifest from its text. Raises CheckpointError with file and key for what is none."""
    table = parse_json(raw, f"{path}", escaped=True)
    return replace(decode(Manifest, table, f"{path}", _ADVICE), path=path)


def read(path: Path) -> Manifest | None:
    """The manifest in the file `path`; None where there is none. Raises CheckpointError, and OSError."""
    try:
        raw = read_bytes(path, MAX_MANIFEST)
    except FileNotFoundError:
        return None
    return parse(raw, path)
