"""A model or residual as the giver of files beside the weights: its tokenizer, its chat template and its settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ires_kernels.checkpoints import configs, endings, roles, tokens
from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId
from ires_kernels.checkpoints.filenames import JINJA, SETTINGS, Group, group_of, has_tokens
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.names import once
from ires_kernels.checkpoints.sidefiles import SideFile, listing
from ires_kernels.checkpoints.tokens import MAX_TOKENIZER, Tokens, as_object
from ires_kernels.files.opening import MAX_CONFIG, check_link, read_bytes


class Parent:
    """A model or residual whose side files are looked at."""

    def __init__(self, role: str, checkpoint: Checkpoint) -> None:
        self.role = role
        self.checkpoint = checkpoint
        self.listing, self.left = listing(checkpoint)

    def has(self, group: Group) -> bool:
        return any(group_of(name) == group for name in self.listing)

    def files(self, group: Group, why: str = "") -> list[SideFile]:
        return [self.file(name, why) for name in self.listing if group_of(name) == group]

    def templates(self, why: str = "") -> list[SideFile]:
        """The files of its chat template, made of what is inside of its tokenizer's where it has none of its own."""
        text = self.template
        if text is None or JINJA in self.listing:
            return self.files("template", why)
        path = next(self.listing[name] for name in (SETTINGS, "chat_template.json") if name in self.listing)
        return [self.file(JINJA, why or f"from {path.name}", text.encode(errors="replace"), path)]

    def file(self, name: str, why: str = "", content: bytes | None = None, path: Path | None = None) -> SideFile:
        """A file of the output, of the bytes of the one of this name or at `path`, or with other `content`."""
        path = path or self.listing[name]
        stays = not self.checkpoint.follow_links and path != self.checkpoint.path
        found = check_link(path, self.checkpoint.path) if stays else None
        file_id = FileId.of(found or path)
        if content is None and group_of(name) != "model" and file_id.size > MAX_TOKENIZER:
            raise CheckpointError(f"{path}: has {file_id.size} bytes, wanted at most {MAX_TOKENIZER}. Delete it.")
        return SideFile(name, path, self.role, file_id, why, content)

    def read(self, name: str) -> bytes:
        return read_bytes(self.listing[name], MAX_CONFIG) if name in self.listing else b""

    def json(self, name: str) -> dict[str, Any] | None:
        """A file of settings; None where there is none that loaders could read."""
        return as_object(self.read(name))

    @property
    def vocabulary(self) -> list[str]:
        """The files of its tokenizer that have tokens."""
        return [name for name in self.listing if has_tokens(name)]

    @property
    def tokens(self) -> Tokens:
        """Raises CheckpointError where they cannot be read."""
        found = tokens_of(self.checkpoint)
        if found is None:
            raise CheckpointError(f"{self.checkpoint.path}: has no tokenizer.")
        return found

    def tokens_or_none(self) -> Tokens | None:
        try:
            return tokens_of(self.checkpoint)
        except CheckpointError:
            return None

    @property
    def special_ids(self) -> dict[str, Any]:
        """Ids of tokens that begin and end texts, by config.json; for a residual by that of its instruct model."""
        if self.checkpoint.kind == "residual":
            return self.checkpoint.manifest.special_ids if self.checkpoint.manifest else {}
        return configs.special_ids(self.checkpoint.config)

    @property
    def says_ids(self) -> Path:
        """The file that `special_ids` are from; of a residual that is a single file, that file."""
        place = self.checkpoint.path
        return (
            place / ("residual.json" if self.checkpoint.kind == "residual" else "config.json")
            if place.is_dir()
            else place
        )

    @property
    def renamed(self) -> dict[str, int]:
        """Of a residual: tokens of base in whose rows its instruct model has others."""
        known = self.checkpoint.manifest if self.checkpoint.kind == "residual" else None
        return known.renamed_tokens if known else {}

    @property
    def has_template(self) -> bool:
        return self.has("template") or self.template is not None

    @property
    def template(self) -> str | None:
        """The chat template of its tokenizer."""
        if JINJA in self.listing:
            return self.read(JINJA).decode(errors="replace")
        inside = self.json("chat_template.json") or self.json(SETTINGS) or {}
        return endings.default_template(inside.get("chat_template"))


@once
def tokens_of(checkpoint: Checkpoint) -> Tokens | None:
    """The tokens of its tokenizer, of a residual those of its instruct model; None where it has none.

    Raises CheckpointError where they cannot be read.
    """
    parent = Parent("", checkpoint)
    files = {name: path for name, path in parent.listing.items() if group_of(name) == "tokenizer"}
    return tokens.read(files) if parent.vocabulary else None


def has_vocabulary(checkpoint: Checkpoint) -> bool:
    """Whether there is a tokenizer with tokens."""
    return bool(Parent("", checkpoint).vocabulary)


def has_template(checkpoint: Checkpoint) -> bool:
    """Whether there is a chat template, in a file of its own or in tokenizer_config.json."""
    return Parent("", checkpoint).has_template


def turned_round(inputs: Mapping[str, Checkpoint]) -> list[str]:
    """A warning for each base that has, and whose instruct has not, what makes a model an instruct model."""
    return [
        f"{base} has a chat template and {instruct} has none: are they the wrong way round?"
        for instruct in inputs
        if roles.is_instruct(instruct) and (base := roles.base_of(instruct)) in inputs
        if has_template(inputs[base]) and not has_template(inputs[instruct])
    ]


def same_tokens(checkpoints: Iterable[Checkpoint]) -> bool:
    """Whether models have the same tokens because the files of their tokenizers are the same, or none has any."""
    one, *others = (Parent("", checkpoint) for checkpoint in checkpoints)
    return all(have_same_files(one, other) for other in others)


def have_same_files(one: Parent, two: Parent) -> bool:
    """Whether two tokenizers have the same tokens because their files are the same, settings apart."""
    names = [*one.vocabulary, "added_tokens.json"]
    if one.vocabulary != two.vocabulary:
        return False
    pairs = [(one.listing.get(name), two.listing.get(name)) for name in names]
    if not all(a is b or (a and b and _equal(a, b)) for a, b in pairs):
        return False
    added = [(parent.json(SETTINGS) or {}).get("added_tokens_decoder") for parent in (one, two)]
    return added[0] == added[1]


def _equal(one: Path, two: Path) -> bool:
    if one.stat().st_size != two.stat().st_size:
        return False
    return read_bytes(one, MAX_TOKENIZER) == read_bytes(two, MAX_TOKENIZER)
