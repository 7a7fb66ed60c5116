"""The JSON beside the weights: index, config.json, manifests; strictly read, and with a way out where it is broken."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ires_kernels.checkpoints import hub
from ires_kernels.checkpoints import manifest as manifests
from ires_kernels.checkpoints.header import CheckpointError, brief, check_depth, parse_json, sniff
from ires_kernels.checkpoints.manifest import Manifest
from ires_kernels.files.opening import MAX_CONFIG, MAX_INDEX, MAX_MANIFEST, read_bytes

INDEX = ".safetensors.index.json"
_BARE_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]+\.safetensors")


def read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """weight_map and metadata of an index."""
    where = f"{path}"
    table = _read_json(path, MAX_INDEX) or {}
    weight_map, metadata = table.get("weight_map"), table.get("metadata", {})
    if type(weight_map) is not dict or not weight_map:
        raise CheckpointError(
            f"{where}: weight_map is {brief(weight_map)}, wanted file names by tensor name. Download it again."
        )
    for name, file in weight_map.items():
        if type(file) is not str or not _BARE_NAME.fullmatch(file):
            raise CheckpointError(
                f"{where}: tensor {brief(name)} is in {brief(file)}, wanted the bare name of a .safetensors file of "
                "this folder. Download the index again, and not from a source that you do not trust."
            )
    if type(metadata) is not dict:
        raise CheckpointError(f"{where}: metadata is {brief(metadata)}, wanted an object. Download it again.")
    return weight_map, metadata


def read_manifest(path: Path) -> Manifest | None:
    raw = _read_bytes(path, MAX_MANIFEST)
    return None if raw is None else manifests.parse(raw, path)


def read_config(path: Path) -> dict[str, Any] | None:
    """config.json as loaders read it: some models have Infinity in theirs, which strict JSON does not know."""
    raw = _read_bytes(path, MAX_CONFIG)
    if raw is None:
        return None
    with with_advice_of_hub(path):
        check_depth(raw, f"{path}")
        try:
            config = json.loads(raw.decode())
        except ValueError as error:
            what = sniff(raw)
            reason = f"not JSON but {what}" if what else f"not valid JSON: {error}. Correct it or download it again."
            raise CheckpointError(f"{path}: {reason}") from None
        if type(config) is not dict:
            raise CheckpointError(f"{path}: got JSON {brief(config)}, wanted an object. Download it again.")
        return config


def _read_json(path: Path, limit: int) -> dict[str, Any] | None:
    """A JSON object of at most `limit` bytes, parsed strictly; None when there is no such file."""
    raw = _read_bytes(path, limit)
    with with_advice_of_hub(path):
        return None if raw is None else parse_json(raw, f"{path}")


def _read_bytes(path: Path, limit: int) -> bytes | None:
    try:
        return read_bytes(path, limit)
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        raise CheckpointError(f"{path}: is a link to a file that is gone. Copy or download it again.") from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise
        raise CheckpointError(f"{path}: {unreachable(path, error)}") from None


@contextmanager
def with_advice_of_hub(path: Path) -> Iterator[None]:
    """Say of a file in the Hub's cache that cannot be used how to have another: who finds it there asks no more."""
    try:
        yield
    except CheckpointError as error:
        again = hub.download_again(path)
        if again is None:
            raise
        raise CheckpointError(*error.lines, again) from None


def unreachable(path: Path, error: Exception) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"cannot read: {getattr(error, 'strerror', error)}. Check the path and its permissions."
    if path.is_symlink():
        return "is a link to something that is gone. Copy or download it again."
    return "no such file or folder. Check the path."
