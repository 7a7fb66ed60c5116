"""Which of the files beside the weights belong to a merged model, and from which of its parents each one comes.

The target gives config.json and whatever else its folder holds. What makes a model answer as the instruct model does
comes from there: the tokenizer, the chat template, generation_config.json, the processors of images and sounds. A
tokenizer is several files that fit only each other, so it comes from one parent as a whole; and it stays the target's
where another would lose tokens of the target's own.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ires_kernels.checkpoints import configs, endings, references, roles, tokens
from ires_kernels.checkpoints.checkpoint import Checkpoint, FileId
from ires_kernels.checkpoints.header import CheckpointError, brief
from ires_kernels.checkpoints.names import once
from ires_kernels.checkpoints.tokens import MAX_TOKENIZER, Tokens, as_object
from ires_kernels.files import transfer
from ires_kernels.files.opening import MAX_CONFIG, check_link, kind_of_file, open_file, read_bytes
from ires_kernels.files.transfer import Hasher

Group = Literal["tokenizer", "template", "generation", "processor", "model"]

_TEMPLATES = "additional_chat_templates"
_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt|model)|merges\.txt|tekken\.json"
    r"|(spiece|spm|tiktoken|source|target)\.(model|spm)|sentencepiece.*\.model|.*\.tiktoken|bpe\.codes|vocab\.bpe"
    r"|normalizer\.json|tokenization_.*\.py"
)
_PROCESSOR = re.compile(
    r".*processor_config\.json|(image|video|audio)_processor.*\.json|feature_extractor.*\.json"
    r"|(.*_)?processing_.*\.py|feature_extraction_.*\.py"
)
# Without one of the others a tokenizer has no tokens.
_NO_VOCABULARY = re.compile(r"tokenizer_config\.json|special_tokens_map\.json|(added_tokens|normalizer)\.json|.*\.py")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|npz|index\.json)")
_OURS = {"ires.json", "residual.json", "SHA256SUMS", "README.ires.md", "README.ires.png"}
_ADAPTER = "adapter_config.json"
"""Loaders that find it look for the adapter, which is no part of a merged model."""
_GENERATION, _JINJA, _SETTINGS = "generation_config.json", "chat_template.jinja", "tokenizer_config.json"
_TAKE = ". --vocabulary instruct takes it all the same"
_DEPTH = 16  # folders within each other
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of the output that is a copy of `source`, from the input `role`. `name` may have folders in it."""

    name: str
    source: Path
    role: str
    file_id: FileId
    """What `source` was when it was chosen."""
    why: str = ""
    """Why it is this parent's, where that is not the rule."""
    content: bytes | None = None
    """What the output holds in place of the bytes of `source`, from which it is made."""

    def read(self) -> bytes:
        """All of its bytes, of settings, templates or code. Raises CheckpointError where they are too many for that."""
        return read_bytes(self.source, MAX_CONFIG) if self.content is None else self.content

    def is_at(self, path: Path) -> bool:
        """Whether a file has these bytes already."""
        size = self.file_id.size if self.content is None else len(self.content)
        if not path.is_file() or path.stat().st_size != size:
            return False
        return read_bytes(path, size) == (self.content or read_bytes(self.source, size))


@dataclass(slots=True)
class Chosen:
    """The files of a merged model beside its weights, and what to say of them."""

    files: list[SideFile]
    left: list[str]
    """What is not copied of the target's folder: sub-folders, weights in other formats, what is no regular file, and
    parts of a tokenizer, template or processor that another replaces."""
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Why a model with these files would not work."""


def of_model(
    inputs: Mapping[str, Checkpoint],
    *,
    own_tokenizer: bool = False,
    vocabulary: str | None = None,
    reordered: bool = False,
    config: Mapping[str, Any] | None = None,
    rows: int | None = None,
) -> Chosen:
    """Files for a merged model: those of the target, the first of `inputs`, and of the instruct model or a residual.

    The first donor that has them gives the tokenizer, the chat template, generation_config.json and the processors, and
    the target what no donor has; of tokenizers one that has all tokens of the others goes first. Base gives nothing: it
    is subtracted. With `own_tokenizer`, and where a donor's would lose tokens of its own, the target keeps its
    tokenizer, and with it all that holds ids of which the two differ.

    vocabulary  "target" or "instruct" where it was decided whose tokenizer it gets: see `Rules.vocabulary`
    reordered   whether the target has its tokens in another order, so that the same text has another id
    config      config.json of the merged model
    rows        of its embedding
    """
    parents = {role: _Parent(role, checkpoint) for role, checkpoint in inputs.items()}
    own, *others = parents.values()
    donors = [parent for parent in others if not roles.is_base(parent.role)]
    said: list[str] = []

    def first(group: Group) -> _Parent | None:
        return next((donor for donor in donors if donor.has(group)), None)

    giver = _fullest([donor for donor in donors if donor.has("tokenizer")])
    base = parents.get(roles.base_of((giver or donors[0]).role)) if donors else None
    if giver is None and base is not None and base.has("tokenizer") and not own.has("tokenizer"):
        said.append("neither instruct nor the target has a tokenizer, and that of base is not taken")
    absent = f"not in {' and '.join(donor.role for donor in donors)}"
    holder, why = giver or own, "" if giver else absent
    if own_tokenizer:
        holder, why = own, "its vocabulary is another"
        groups = [own.files("template", why), own.files("generation", why)]
    elif giver is not None and reordered:
        holder, why = own, "its tokens are in another order"
        groups = [_template(own, giver, reordered=True), _generation(own, donors, giver, reordered=True)]
    elif giver is not None and (vocabulary == "target" or _clash(own, giver, base, vocabulary, said)):
        holder, why = own, "as --vocabulary says" if vocabulary == "target" else "it has tokens of its own"
        groups = [_template(own, giver), _generation(own, donors, giver)]
    elif giver is not None:
        groups = [giver.files("template") if giver.has_template else own.templates(absent), _generation(own, donors)]
    else:
        groups = [(first("template") or own).files("template"), _generation(own, donors)]
    groups.append(holder.files("tokenizer", why))
    keeps = holder is own and giver is not None and own.has("processor")
    source = None if keeps else first("processor")
    groups.append(
        source.files("processor") if source else own.files("processor", "as its tokenizer" if keeps else absent)
    )

    found: dict[str, SideFile] = {}
    for side in (side for group in [*groups, own.files("model")] for side in group):
        found.setdefault(side.name, side)
    _add_named(found, parents, said)
    folders = {name.partition("/")[0] + "/" for name in found}
    left = sorted(
        [name for name in own.left if name not in folders] + [name for name in own.listing if name not in found]
    )
    files = sorted(found.values(), key=lambda side: side.name)
    special, table, template = configs.special_ids(config), holder.tokens_or_none(), _template_of(files, holder)
    generation = _generation_of(files)
    ending = endings.warning(generation, special, table, template)
    said += [ending] if ending else []
    problems: list[str] = []
    if rows is not None:
        mine = own.json(_GENERATION) or {}, own.special_ids, own.tokens_or_none(), own.template
        before = endings.beyond(rows, *mine)
        for key, text in endings.beyond(rows, generation, special, table, template).items():
            # What the target lives with is no fault of the merge.
            (said if key in before else problems).append(text)
    return Chosen(files, left, said, problems)


def of_residual(giver: Checkpoint, role: str = "instruct") -> list[SideFile]:
    """What a residual keeps of the instruct model for `of_model`, or of another residual.

    Never config.json: a residual must not load.
    """
    parent = _Parent(role, giver)
    found = {name: parent.file(name) for name in parent.listing if _group(name) != "model"}
    _add_named(found, {role: parent}, [])
    return sorted(found.values(), key=lambda side: side.name)


def record(base: Checkpoint, instruct: Checkpoint) -> dict[str, Any]:
    """What residual.json keeps of the two models, for `of_model` and `configs`, besides these files."""
    renamed: dict[str, int] = {}
    parents = [_Parent("base", base), _Parent("instruct", instruct)]
    if not _same(*parents):
        one, two = (parent.tokens_or_none() for parent in parents)
        renamed = tokens.renamed(one, two) if one and two else {}
    return {
        "config": {"base": configs.fields(base.config), "instruct": configs.fields(instruct.config)},
        "special_ids": configs.special_ids(instruct.config),
        "renamed_tokens": renamed,
    }


@once
def tokens_of(checkpoint: Checkpoint) -> Tokens | None:
    """The tokens of its tokenizer, of a residual those of its instruct model; None where it has none.

    Raises CheckpointError where they cannot be read.
    """
    parent = _Parent("", checkpoint)
    files = {name: path for name, path in parent.listing.items() if _group(name) == "tokenizer"}
    return tokens.read(files) if parent.vocabulary else None


def same_tokens(checkpoints: Iterable[Checkpoint]) -> bool:
    """Whether models have the same tokens because the files of their tokenizers are the same, or none has any."""
    one, *others = (_Parent("", checkpoint) for checkpoint in checkpoints)
    return all(_same(one, other) for other in others)


def replaced_by(target: Checkpoint, chosen: Iterable[SideFile]) -> list[str]:
    """The files of the target that have no place beside the `chosen` ones: parts of a tokenizer that is not theirs."""
    names = {file.name for file in chosen}
    return [name for name in _listing(target)[0] if name not in names and _group(name) != "model"]


def rows(files: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """What comes from whom, for people; `files` are names, roles and why."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, role, why in files:
        grouped.setdefault((role, why), []).append(name)
    return [
        (f"from {role}", ", ".join(names) + (f" ({why})" if why else ""))
        for (role, why), names in sorted(grouped.items(), key=lambda item: item[0])
    ]


def is_weights(name: str) -> bool:
    """Whether a file is of weights, by its name."""
    return _WEIGHTS.fullmatch(name) is not None


def has_vocabulary(checkpoint: Checkpoint) -> bool:
    """Whether there is a tokenizer with tokens."""
    return bool(_Parent("", checkpoint).vocabulary)


def has_template(checkpoint: Checkpoint) -> bool:
    """Whether there is a chat template, in a file of its own or in tokenizer_config.json."""
    return _Parent("", checkpoint).has_template


class _Parent:
    """A model or residual whose side files are looked at."""

    def __init__(self, role: str, checkpoint: Checkpoint) -> None:
        self.role = role
        self.checkpoint = checkpoint
        self.listing, self.left = _listing(checkpoint)

    def has(self, group: Group) -> bool:
        return any(_group(name) == group for name in self.listing)

    def files(self, group: Group, why: str = "") -> list[SideFile]:
        return [self.file(name, why) for name in self.listing if _group(name) == group]

    def templates(self, why: str = "") -> list[SideFile]:
        """The files of its chat template, made of what is inside of its tokenizer's where it has none of its own."""
        text = self.template
        if text is None or _JINJA in self.listing:
            return self.files("template", why)
        path = next(self.listing[name] for name in (_SETTINGS, "chat_template.json") if name in self.listing)
        return [self.file(_JINJA, why or f"from {path.name}", text.encode(errors="replace"), path)]

    def file(self, name: str, why: str = "", content: bytes | None = None, path: Path | None = None) -> SideFile:
        """A file of the output, of the bytes of the one of this name or at `path`, or with other `content`."""
        path = path or self.listing[name]
        stays = not self.checkpoint.follow_links and path != self.checkpoint.path
        found = check_link(path, self.checkpoint.path) if stays else None
        file_id = FileId.of(found or path)
        if content is None and _group(name) != "model" and file_id.size > MAX_TOKENIZER:
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
        return [name for name in self.listing if _group(name) == "tokenizer" and not _NO_VOCABULARY.fullmatch(name)]

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
        if _JINJA in self.listing:
            return self.read(_JINJA).decode(errors="replace")
        inside = self.json("chat_template.json") or self.json(_SETTINGS) or {}
        return endings.default_template(inside.get("chat_template"))


def _clash(own: _Parent, giver: _Parent, base: _Parent | None, vocabulary: str | None, said: list[str]) -> bool:
    """Whether the giver's tokenizer would lose tokens of the target; says so, and where nobody can tell."""
    if not own.vocabulary or _same(own, giver):
        return False
    if not giver.vocabulary:
        said.append(f"{giver.role} has settings of a tokenizer and no vocabulary: the target keeps its tokenizer")
        return True
    try:
        mine, theirs = own.tokens, giver.tokens
    except CheckpointError as error:
        said.append(f"the tokens of target and {giver.role} cannot be compared, whose tokenizer is taken: {error}")
        return False
    known = giver.renamed if base is None else base.tokens_or_none()
    lost = tokens.lost(mine, theirs, known)
    if not lost:
        return False
    there = theirs.at(mine.ids[token] for token in lost)
    names = [
        f"{mine.ids[token]} {brief(token)}"
        + (f" ({brief(there[mine.ids[token]])} in {giver.role})" if mine.ids[token] in there else "")
        for token in lost[:_SHOWN]
    ]
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    if vocabulary == "instruct":
        said.append(
            f"{len(lost)} tokens of the target are lost, for {giver.role} lacks them or has them at other ids: "
            f"{', '.join(names)}{more}"
        )
        return False
    said.append(
        f"the target keeps its tokenizer, for that of {giver.role} lacks {len(lost)} of its tokens or has them at "
        f"other ids: {', '.join(names)}{more}"
        + (". Rows are merged by number, whatever token they belong to" if vocabulary == "rows" else _TAKE)
    )
    return True


def _fullest(givers: Sequence[_Parent]) -> _Parent | None:
    """The first tokenizer, or the one that has all tokens of the others where that has not."""
    if not givers or all(_same(givers[0], other) for other in givers[1:]):
        return givers[0] if givers else None
    tables = [table for giver in givers if (table := giver.tokens_or_none()) is not None]
    if len(tables) < len(givers):
        return givers[0]
    everything = [table.ids.items() for table in tables]
    fuller = (giver for giver, own in zip(givers, everything, strict=True) if all(other <= own for other in everything))
    return next(fuller, givers[0])


def _same(one: _Parent, two: _Parent) -> bool:
    """Whether two tokenizers have the same tokens because their files are the same, settings apart."""
    names = [*one.vocabulary, "added_tokens.json"]
    if one.vocabulary != two.vocabulary:
        return False
    pairs = [(one.listing.get(name), two.listing.get(name)) for name in names]
    if not all(a is b or (a and b and _equal(a, b)) for a, b in pairs):
        return False
    added = [(parent.json(_SETTINGS) or {}).get("added_tokens_decoder") for parent in (one, two)]
    return added[0] == added[1]


def _equal(one: Path, two: Path) -> bool:
    if one.stat().st_size != two.stat().st_size:
        return False
    return read_bytes(one, MAX_TOKENIZER) == read_bytes(two, MAX_TOKENIZER)


def _template(own: _Parent, giver: _Parent, *, reordered: bool = False) -> list[SideFile]:
    """The giver's chat template for the target's tokenizer, if it has all marks of it at the same ids; or its own.

    reordered  whether the ids do not matter
    """
    text, mine, theirs = giver.template, own.tokens_or_none(), giver.tokens_or_none()
    if text is None:
        return own.files("template", f"not in {giver.role}")
    marks = endings.marks(text, theirs) if theirs else []
    ids = {mark: theirs.ids[mark] for mark in marks} if theirs and not reordered else {}
    if not mine or not theirs or not marks or any(ids.get(m, mine.ids.get(m)) != mine.ids.get(m, -1) for m in marks):
        return own.files("template", f"that of {giver.role} has marks that its tokenizer has not, or at other ids")
    return giver.templates()


def _generation(
    own: _Parent, donors: Sequence[_Parent], giver: _Parent | None = None, *, reordered: bool = False
) -> list[SideFile]:
    """generation_config.json, with the ids at which the first donor that says so ends.

    giver      the donor whose tokenizer is not taken: an id that is another token in the target's is not taken either
    reordered  whether ids become those of the same tokens there
    """
    for donor in donors:
        said, special = donor.json(_GENERATION) or {}, donor.special_ids
        if donor.has("generation"):
            side = donor.file(_GENERATION)
            if said.get("eos_token_id") is None and "eos_token_id" in special:
                content = endings.generation(said, special)
                side = donor.file(_GENERATION, "with eos_token_id of its config.json", content)
            special = special | {key: value for key, value in said.items() if value is not None}
        elif "eos_token_id" in special:
            mine = own.json(_GENERATION) or {}
            eos = mine.get("eos_token_id") or own.special_ids.get("eos_token_id")
            if endings.ids(eos) == endings.ids(special["eos_token_id"]):
                break
            why = f"{'that of the target' if mine else 'new'}, with eos_token_id of the config.json of {donor.role}"
            path = own.listing[_GENERATION] if mine else donor.says_ids
            side = (own if mine else donor).file(_GENERATION, why, endings.generation(mine, special), path)
        else:
            continue
        if giver is not None and reordered:
            table = _with_ids_of(as_object(side.read()) or {}, own, giver)
            if table is not None:
                content = endings.generation(table, {})
                return [replace(side, why="with the ids of its tokenizer", content=content)]
        if giver is not None and not _agree(special, own, giver):
            return own.files("generation", f"that of {donor.role} has ids of other tokens")
        return [side]
    return own.files("generation", f"not in {' and '.join(donor.role for donor in donors)}")


def _with_ids_of(generation: Mapping[str, Any], own: _Parent, giver: _Parent) -> dict[str, Any] | None:
    """The settings with the ids that their tokens have in another tokenizer; None where it lacks one of them."""
    mine, theirs = own.tokens_or_none(), giver.tokens_or_none()
    if mine is None or theirs is None:
        return None
    found = dict(generation)
    for key, value in generation.items():
        ids = endings.ids(value) if key.endswith("token_id") else []
        names = theirs.at(ids)
        new = [mine.ids.get(names.get(id_, ""), -1) for id_ in ids]
        if -1 in new:
            return None
        if new:
            found[key] = new if isinstance(value, list) else new[0]
    return found


def _agree(special: Mapping[str, Any], own: _Parent, giver: _Parent) -> bool:
    """Whether all special ids are the same tokens in two tokenizers."""
    mine, theirs = own.tokens_or_none(), giver.tokens_or_none()
    wanted = [id_ for key, value in special.items() if key.endswith("token_id") for id_ in endings.ids(value)]
    if mine is None or theirs is None:
        return False
    names = theirs.at(wanted)
    return all(id_ in names and mine.ids.get(names[id_]) == id_ for id_ in wanted)


def _generation_of(files: Iterable[SideFile]) -> dict[str, Any]:
    """What the chosen generation_config.json says."""
    found = next((side for side in files if side.name == _GENERATION), None)
    return (as_object(found.read()) if found else None) or {}


def _template_of(files: Iterable[SideFile], holder: _Parent) -> str | None:
    """The chat template of the chosen files, which may be inside of the tokenizer of their holder."""
    found = next((side for side in files if side.name == _JINJA), None)
    return found.read().decode(errors="replace") if found else holder.template


def _add_named(found: dict[str, SideFile], parents: Mapping[str, _Parent], said: list[str]) -> None:
    """Add what the files `found` name, and what that names in turn, each from the parent of the file that names it."""
    queue = [side for side in found.values() if _names_others(side.name)]
    seen: set[tuple[str, str]] = set()
    while queue:
        side = queue.pop()
        if side.file_id.size > MAX_CONFIG:
            continue  # data, and not settings or code
        folder = parents[side.role].checkpoint.path
        for part in sorted(references.named_by(side.name, side.read())):
            if (side.role, part) in seen:
                continue
            seen.add((side.role, part))
            for name, path in _tree(folder, part).items():
                new = parents[side.role].file(name, f"{side.name} names it", path=path)
                there = found.setdefault(name, new)
                if there is new:
                    queue += [new] if _names_others(name) else []
                    if is_weights(name):
                        said.append(f"{name}: these weights are copied from {side.role} as they are, and not merged")
                elif there.role != side.role and not new.is_at(there.source):
                    said.append(
                        f"{name} of {side.role}, which {side.name} names, is not copied: {there.role} has another"
                    )


def _names_others(name: str) -> bool:
    return name.endswith(".py") or (name.endswith(".json") and (_group(name) == "model" or _is_settings(name)))


def _is_settings(name: str) -> bool:
    return _NO_VOCABULARY.fullmatch(name) is not None or _group(name) in ("processor", "generation")


def _group(name: str) -> Group:
    if name.startswith(("chat_template.", f"{_TEMPLATES}/")):
        return "template"
    if name == _GENERATION:
        return "generation"
    if "/" in name:
        return "model"
    return "tokenizer" if _TOKENIZER.fullmatch(name) else "processor" if _PROCESSOR.fullmatch(name) else "model"


def chunks(side: SideFile, hasher: Hasher) -> Iterator[bytes]:
    """A side file by pieces, hashed on the way. Raises CheckpointError where it is not the one that was chosen."""
    if side.content is not None:
        hasher.update(side.content)
        yield side.content
        return
    fd = open_file(side.source)
    try:
        if FileId.of(fd).is_unwritten(side.file_id):
            yield from transfer.chunks(side.source, hasher, fd)
        if not FileId.of(fd).is_unwritten(side.file_id):
            raise CheckpointError(f"{side.source}: changed after it was looked at. Wait for its writer, then repeat.")
    finally:
        os.close(fd)


def _tree(folder: Path, part: str) -> dict[str, Path]:
    """The module `part` of a folder, and all files of its sub-folder of that name, hidden ones apart.

    Raises CheckpointError for what cannot be copied, which would be missing in the output.
    """
    top = folder / part
    try:
        found = {f"{part}.py": folder / f"{part}.py"} if (folder / f"{part}.py").is_file() else {}
        if part.startswith(".") or part == _TEMPLATES or not top.is_dir():
            return found
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return {}  # a text with a slash in it, and no path
    for place, folders, names in os.walk(top):
        inner = Path(place).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        links = [name for name in folders if (folder / inner / name).is_symlink()]
        if links or len(inner.parts) > _DEPTH:
            what = (
                f"has more than {_DEPTH} folders within each other" if not links else f"{links[0]} is a linked folder"
            )
            raise CheckpointError(f"{folder / inner}: {what}. Put what is needed of it into a folder without that.")
        for name in sorted(names):
            path = folder / inner / name
            if name.startswith("."):
                continue
            if not path.is_file():
                what = kind_of_file(path.stat().st_mode) if path.exists() else "a link to something that is gone"
                raise CheckpointError(f"{path}: is {what}, wanted a regular file. Delete it.")
            found[f"{inner / name}"] = path
    return found


def _listing(checkpoint: Checkpoint) -> tuple[dict[str, Path], list[str]]:
    """Copyable files of a folder by name, and the names of what is there besides weights and hidden files."""
    folder = checkpoint.path
    if not folder.is_dir():
        return {}, []
    files: dict[str, Path] = {}
    left: list[str] = []
    weights = {shard.path.name for shard in checkpoint.shards} | {checkpoint.index_name} | _OURS
    # What updates in place of a single file recorded beside it: of that file, and not of what becomes of it.
    weights |= {f"{shard.path.name}{suffix}" for shard in checkpoint.shards for suffix in (".ires.json", ".sha256")}
    for name in sorted(set(os.listdir(folder)) - weights):
        path = folder / name
        if name.startswith("."):
            continue
        if name == _TEMPLATES and path.is_dir():
            files.update((f"{name}/{child.name}", child) for child in sorted(path.glob("*.jinja")) if child.is_file())
        elif path.is_file() and not _WEIGHTS.fullmatch(name) and name != _ADAPTER:
            files[name] = path
        elif path.is_symlink() and not path.exists() and _group(name) != "model":
            raise CheckpointError(
                f"{path}: is a link to {os.path.realpath(path)}, which is not there. Download it again, or delete it."
            )
        elif not path.is_dir() and not path.is_file() and _group(name) != "model":
            raise CheckpointError(f"{path}: is {kind_of_file(path.stat().st_mode)}, wanted a regular file. Delete it.")
        else:
            left.append(f"{name}/" if path.is_dir() else name)
    return files, left
