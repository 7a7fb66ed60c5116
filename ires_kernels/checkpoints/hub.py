"""Models on the Hugging Face Hub: `org/name`, `org/name@revision` or `hf://org/name@revision` in place of a path.

The library of the Hub does the work: its cache, its tokens, its offline mode. Only what a merge needs is downloaded:
the safetensors files that the index names, and the small files beside them. A revision is resolved to its commit first,
so all files are of one commit, whatever is pushed meanwhile, and the path of the snapshot in the cache tells which.

Other programs share the cache, and download what they need: the weights, say, and no tokenizer. So the names of what a
merge needs of a commit are kept among the library's assets, and nobody is asked again where all of that is there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fnmatch import translate
from pathlib import Path
from typing import Any, NamedTuple

from ires_kernels.checkpoints import standins
from ires_kernels.checkpoints.addresses import Address, Unreachable, is_address
from ires_kernels.checkpoints.folders import listed
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files.opening import MAX_INDEX, read_bytes

StrPath = str | os.PathLike[str]

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@\s:][^@\s]*))?")
_SCHEME = "hf://"
_STREAM = "hf+stream://"
_SNAPSHOT = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)/snapshots/(?P<commit>[0-9a-f]{40})")
_INDEX = "model.safetensors.index.json"
# Weights in formats that are not read, and what comes along with models and is none of their files.
_OTHER = re.compile(
    "|".join(
        map(
            translate,
            ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot",
             "*.tflite", "*.pkl", "*.npz", "*.zip", "*.tar*", "*.safetensors", "*.png", "*.jpg", "*.jpeg", "*.gif",
             "*.mp4", "*.wav", "*.pdf", ".gitattributes"),
        )
    ),
    re.IGNORECASE,
)  # fmt: skip
_INSTALL = (
    "Check the path; or install the library of the Hub (`pip install 'ires_kernels[hub]'`) to have a model downloaded."
)


class Repo(NamedTuple):
    """A model on the Hub, at a commit."""

    id: str
    """org/name."""
    commit: str
    """40 hex digits."""

    def __str__(self) -> str:
        return f"{self.id}@{self.commit}"


def repo_of(path: StrPath) -> Repo | None:
    """The model whose snapshot in the Hub's cache a folder is, or a file in it is of; None for any other."""
    found = _SNAPSHOT.search(os.path.realpath(path)) or _SNAPSHOT.search(os.path.abspath(path))
    return Repo(f"{found['org']}/{found['name']}", found["commit"]) if found else None


def download_again(path: Path) -> str | None:
    """How to have another copy of a file in the Hub's cache, where it is taken for good; None for any other file."""
    folder = Path(os.path.realpath(path.parent))
    repo = repo_of(folder)
    if repo is None or folder.name != repo.commit or standins.shown(folder) != f"{folder}":
        return None
    cache, where = folder.parents[2], ""
    with suppress(ImportError):
        from huggingface_hub import constants

        if os.path.realpath(constants.HF_HUB_CACHE) != os.path.realpath(cache):
            where = f" --cache-dir {shlex.quote(f'{cache}')}"
    return (
        "It is in the Hub's cache; have it downloaded again: "
        f"`hf download {repo.id} {shlex.quote(path.name)} --revision {repo.commit} --force-download{where}`."
    )


def is_remote(path: object) -> bool:
    """Whether a path names a model elsewhere: at an address, or on the Hub.

    Of the Hub it does where it says so, or looks like a name there and leads nowhere here.
    """
    text = f"{path}"
    if text.startswith((_SCHEME, _STREAM)) or is_address(text):
        return True
    return bool(_ID.fullmatch(text)) and not os.path.lexists(text) and not os.path.isdir(text.partition("/")[0])


def check_local(path: StrPath, instead: str = "Write a new folder: -o OUT.") -> None:
    """Refuse a model that is elsewhere as one to be changed; `instead` is what can be done."""
    if isinstance(path, (str, os.PathLike)) and is_address(path):
        raise CheckpointError(f"{Address.of(path)}: is not on this disk, and is only read. {instead}")
    if isinstance(path, (str, os.PathLike)) and is_remote(path):
        raise CheckpointError(f"{path}: is on the Hub, whose cache is never written. {instead}")


def check_out(path: StrPath) -> None:
    """Refuse an address where nothing can be written as the place of an output."""
    if is_address(path) and not Address.of(path).is_store:
        raise CheckpointError(
            f"{Address.of(path)}: is read, and never written. Wanted a folder on this disk, or in a store: s3://, "
            "gs:// or az://."
        )


def streamed(path: str) -> str:
    """A name on the Hub as one whose weights are read where they are; what is none stays what it is."""
    if not is_remote(path) or is_address(path) or path.startswith(_STREAM):
        return path
    return f"{_STREAM}{path.removeprefix(_SCHEME)}"


def local(path: StrPath) -> StrPath:
    """The folder of a model: of one on the Hub its snapshot in the cache, downloaded where it is not there yet.

    The path of a snapshot that is no longer in the cache, as a manifest may have it, is such a model at its commit. A
    model at an address has a folder that stands in for it, and so has one at hf+stream://: see standins.py.
    Raises CheckpointError with the Hub's reason and the way out, OSError where an address cannot be reached.
    """
    if not isinstance(path, (str, os.PathLike)):
        return path
    if is_address(path):
        from ires_kernels.checkpoints.far_folders import stand_in

        return stand_in(f"{path}")
    if is_remote(path):
        return _snapshot(f"{path}")
    gone = None if os.path.lexists(path) else repo_of(path)
    return path if gone is None else _snapshot(f"{gone}")


def locals_of(paths: Any) -> Any:
    """`local` of a path, or of each in lists and tuples of them; what is neither stays what it is."""
    if isinstance(paths, (str, os.PathLike)):
        return local(paths)
    if isinstance(paths, (list, tuple)):
        return type(paths)(map(locals_of, paths))
    return paths


def needed(names: Iterable[str], weights: Iterable[str] | None) -> list[str]:
    """Which files of a model a merge needs: `weights`, or where there is no index the only ones, and the small ones.

    names  of all files of the repository
    """
    names = list(names)
    if weights is None:
        found = [name for name in names if re.fullmatch(r"[^/]+\.safetensors", name)]
        one = [name for name in found if name in ("model.safetensors", "residual.safetensors")]
        weights = one or found
    return sorted({*weights, *(name for name in names if not _OTHER.fullmatch(name))} & {*names})


def _snapshot(text: str) -> Path:
    match = _ID.fullmatch(text.removeprefix(_STREAM).removeprefix(_SCHEME))
    if match is None:
        wanted = f"{_SCHEME}org/name or {_SCHEME}org/name@revision"
        raise CheckpointError(f"{text}: is no name of a model on the Hub, wanted {wanted}.")
    here = "" if text.startswith((_SCHEME, _STREAM)) else "no such file or folder, and on the Hub: "
    try:
        import huggingface_hub as library
        from huggingface_hub import constants
    except ImportError:
        nobody = here or "is on the Hub: "
        raise CheckpointError(f"{text}: {nobody}nothing here can ask it (huggingface_hub). {_INSTALL}") from None
    repo, revision = match["id"], match["revision"]
    cached = None
    try:
        if text.startswith(_STREAM):
            return _streamed(library, repo, revision)
        cached = _cached(library, repo, revision)
        if cached is not None and (constants.HF_HUB_OFFLINE or _is_complete(cached, revision)):
            _check_weights(cached, repo)
            return cached
        return _download(library, repo, revision)
    except (CheckpointError, Unreachable):
        raise
    except Exception as error:  # of the library, or of what it asks with, which is another one in each of its versions
        if cached is not None and _has_weights(cached, revision):
            return cached  # what may be missing beside them, `doubt` tells
        raise CheckpointError(f"{text}: {here}{_reason(error)} {_way_out(error, repo)}") from None


def _cached(library: Any, repo: str, revision: str | None) -> Path | None:
    """The snapshot in the cache, all of it or not; None where nothing of it is there."""
    for name in ("config.json", "residual.json"):
        path = library.try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _is_complete(folder: Path, revision: str | None) -> bool:
    """Whether a snapshot has all that is needed of a commit, and that was asked for: then nobody has to be asked."""
    names = _recorded(folder) if folder.name == revision else None
    return names is not None and all((folder / name).is_file() for name in names)


def doubt(path: StrPath, tokenizer: bool) -> str | None:
    """What of a model in the Hub's cache is not there beside its weights, or may not be; None where nothing is missed.

    tokenizer  whether it has one
    """
    repo, folder = repo_of(path), Path(path)
    if repo is None or not folder.is_dir() or folder in _streams.values():
        return None
    names = _recorded(folder)
    if names is None:
        return None if tokenizer else f"{repo} has no tokenizer in the cache, and perhaps one on the Hub"
    missing = [name for name in names if not (folder / name).is_file()]
    return f"{repo} has {listed(missing)} on the Hub, and not in the cache" if missing else None


def _record_of(folder: Path) -> Path | None:
    """Where the names of the files that are needed of a snapshot are kept; None where there is no place for that."""
    repo = repo_of(folder)
    try:
        from huggingface_hub import cached_assets_path

        return None if repo is None else cached_assets_path("ires_kernels", repo.id, "needed") / f"{repo.commit}.json"
    except (ImportError, OSError, ValueError):
        return None


def _recorded(folder: Path) -> list[str] | None:
    """The names of the files that are needed of a snapshot, where they are known."""
    record = _record_of(folder)
    try:
        names = json.loads(read_bytes(record, MAX_INDEX)) if record is not None else None
    except (OSError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _record(folder: Path, names: Sequence[str]) -> None:
    record = _record_of(folder)
    if record is not None:
        with suppress(OSError):
            temporary = record.with_name(f".{record.name}.{os.getpid()}")
            temporary.write_text(json.dumps(names))
            os.replace(temporary, record)


def _check_weights(folder: Path, repo: str) -> None:
    """Refuse a snapshot that lacks shards, where nobody may be asked for them."""
    missing = [name for name in _named_by(folder / _INDEX) or () if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{_SCHEME}{repo}@{folder.name}: {listed(missing)} is not in the cache, and HF_HUB_OFFLINE is set: "
            f"download it where there is a network (`hf download {repo} --revision {folder.name}`)."
        )


def _has_weights(folder: Path, revision: str | None) -> bool:
    """Whether a snapshot is of the commit that was asked for and has all of its weights."""
    if folder.name != revision:
        return False
    weights = _named_by(folder / _INDEX)
    if weights is None:
        weights = [path.name for path in folder.glob("*.safetensors")]
    return bool(weights) and all((folder / name).is_file() for name in weights)


def _download(library: Any, repo: str, revision: str | None) -> Path:
    while True:
        commit, files = _files(library, repo, revision)
        # By its name, so that the cache knows offline what it was; which may be another commit by now.
        folder = Path(library.snapshot_download(repo, revision=revision, allow_patterns=_patterns(files)))
        if folder.name == commit:
            _record(folder, files)
            return folder


def _streamed(library: Any, repo: str, revision: str | None) -> Path:
    """A snapshot that has all but the bytes of the weights, in a cache of this process alone."""
    from ires_kernels.checkpoints import far_folders, objects
    from ires_kernels.checkpoints.hub_objects import HubObject

    cache = standins.home()
    commit, files = _files(library, repo, revision, cache)
    name = f"{_STREAM}{repo}@{commit}"
    if name not in _streams:
        small = [file for file in files if not file.endswith(".safetensors")]
        library.snapshot_download(repo, revision=commit, allow_patterns=_patterns(small), cache_dir=cache)
        folder = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        weights = [file for file in files if file not in small]
        for file in weights:
            if "/" in file:  # it would lead out of the folder
                raise CheckpointError(f"{name}: names weights {file!r}, wanted a file beside the others.")
        heads = [far_folders.head(HubObject(library, repo, commit, file)) for file in weights]
        found = objects.wait_for(objects.all_of(heads, at_once=8))
        standins.fill(folder, name, dict(zip(weights, found, strict=True)))
        _streams[name] = folder
    return _streams[name]


_streams: dict[str, Path] = {}


def _files(library: Any, repo: str, revision: str | None, cache: Path | None = None) -> tuple[str, list[str]]:
    """The commit that a revision is, and which of its files a merge needs.

    cache  of a stand-in, which is small: no file beside the weights may be large
    """
    info = library.HfApi().model_info(repo, revision=revision, files_metadata=cache is not None)
    names = [entry.rfilename for entry in info.siblings or ()]
    weights = None
    if _INDEX in names:
        weights = _named_by(Path(library.hf_hub_download(repo, _INDEX, revision=info.sha, cache_dir=cache)))
    files = needed(names, weights)
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(
            f"{_SCHEME}{repo}@{info.sha}: has no .safetensors files ({listed(names) or 'no files'}). "
            "Take a model that is published as safetensors, or convert it: AutoModelForCausalLM.from_pretrained("
            f"{repo!r}, dtype='auto').save_pretrained(NEW)."
        )
    if cache is None:
        return info.sha, files
    from ires_kernels.checkpoints.far_folders import check_size

    for entry in info.siblings or ():
        if entry.rfilename in files and not entry.rfilename.endswith(".safetensors"):
            check_size(f"{_SCHEME}{repo}@{info.sha}/{entry.rfilename}", entry.rfilename, entry.size or 0)
    return info.sha, files


def _patterns(names: Iterable[str]) -> list[str]:
    return [re.sub(r"([*?\[])", r"[\1]", name) for name in names]


def _named_by(index: Path) -> Sequence[str] | None:
    """The files that an index names; None where there is none that can be read."""
    try:
        table = json.loads(read_bytes(index, MAX_INDEX))
        return sorted({name for name in table["weight_map"].values() if isinstance(name, str)})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _reason(error: Exception) -> str:
    """What the Hub said, in a line."""
    said = getattr(error, "server_message", None) or f"{error}"
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("(Request ID")]
    text = " ".join(lines[:3]) or type(error).__name__
    return text if text.endswith((".", "!")) else f"{text}."


def _way_out(error: Exception, repo: str) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"Ask for access on {page}, then log in with `hf auth login` or set HF_TOKEN."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"The revisions are listed on {page}/commits/main; leave @revision out for the newest."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "If it is a path, nothing is there: check it. If it is a private model, log in with `hf auth login` or set "
            "HF_TOKEN."
        )
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set: download it where there is a network (`hf download {repo}`)."
    return (
        "Try again later; or give a commit that is in the cache (org/name@COMMIT), or HF_HUB_OFFLINE=1 for what was "
        "downloaded last."
    )
