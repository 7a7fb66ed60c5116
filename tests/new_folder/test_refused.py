"""What is refused before the first byte of a new folder is written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merges import merge
from safetensors.torch import save_file
from small_models import Tensors, read_model, snapshot, triple
from torch import Tensor

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files import unfinished
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.unfinished import MARKER
from ires_kernels.planning.rules import ArgumentError

Change = Callable[[Path, dict[str, Any]], object]
"""Spoils the folders base, instruct and target below a root, or the options of `apply`."""
NORM = "model.norm.weight"


def weights(change: Callable[[Tensors], object], *folders: str) -> Change:
    """Save models again with other tensors."""

    def spoil(root: Path, _: dict[str, Any]) -> None:
        for folder in folders:
            model = read_model(root / folder)
            change(model)
            (root / folder / "model.safetensors").unlink()
            save_file(model, root / folder / "model.safetensors")

    return spoil


def everywhere(**added: Tensor) -> Change:
    """Give all three models more tensors; names with underscores for dots."""
    extra = {name.replace("__", "."): t for name, t in added.items()}
    return weights(lambda model: model.update(extra), "base", "instruct", "target")


def differing(**added: Tensor) -> Change:
    """Give all three models one more tensor, and the base model another value."""

    def spoil(root: Path, options: dict[str, Any]) -> None:
        everywhere(**added)(root, options)
        weights(lambda model: model.update({name: t + 1 for name, t in added.items()}), "base")(root, options)

    return spoil


def raw_bytes(folder: str, change: Callable[[bytes], bytes]) -> Change:
    def spoil(root: Path, _: dict[str, Any]) -> None:
        path = root / folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def name_twice(raw: bytes) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].replace(b'"model.norm.weight"', b'"model.embed_tokens.weight"')
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def option(**changes: Any) -> Change:
    """Other arguments; strings that begin with / are below the root."""

    def below(root: Path, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(below(root, each) for each in value)
        return root / value[1:] if isinstance(value, str) and value.startswith("/") else value

    return lambda root, options: options.update({key: below(root, value) for key, value in changes.items()})


def with_residual(**changes: Any) -> Change:
    """Other arguments, and a residual folder at /r."""

    def spoil(root: Path, options: dict[str, Any]) -> None:
        ik.extract(root / "base", root / "instruct", root / "r", sync=False)
        option(**changes)(root, options)

    return spoil


def tied_target(root: Path, options: dict[str, Any]) -> None:
    weights(lambda model: model.pop("lm_head.weight"), "target")(root, options)
    (root / "target" / "config.json").write_text("{}")


def foreign_folder(root: Path, _: dict[str, Any]) -> None:
    (root / "out.partial").mkdir()
    (root / "out.partial" / "thesis.txt").write_text("mine")


F8 = torch.zeros(4).to(torch.float8_e4m3fn)
COMPLEX = torch.zeros(3, dtype=torch.complex64)

REFUSED: dict[str, tuple[Change, str]] = {
    "shape": (weights(lambda m: m.update({NORM: torch.ones(8)}), "base"), "has shape [8] in base"),
    "one element": (weights(lambda m: m.update({NORM: torch.ones(1)}), "target"), "[1] in target"),
    "integers differ": (differing(ids=torch.arange(3)), "'ids' is I64 in"),
    "booleans differ": (differing(mask=torch.tensor([False])), "'mask' is BOOL in"),
    "complex differs": (differing(z=COMPLEX), "'z' is C64 in"),
    "integer and float": (weights(lambda m: m.update({NORM: torch.arange(16)}), "base"), "is BF16 in target"),
    "alpha nan": (option(alpha=float("nan")), "alpha is nan"),
    "alpha inf": (option(alpha=float("inf")), "alpha is inf"),
    "alpha bool": (option(alpha=True), "alpha is bool"),
    "alpha complex": (option(alpha=1j), "alpha is complex"),
    "missing in instruct": (weights(lambda m: m.pop(NORM), "instruct"), "is in target and base and not in instruct"),
    "missing in target": (weights(lambda m: m.pop(NORM), "target"), "is in instruct and base and not in target"),
    "tied target": (tied_target, "whose head is its embedding"),
    "truncated": (raw_bytes("base", lambda raw: raw[:-1]), "truncated: 1 bytes missing"),
    "trailing bytes": (raw_bytes("base", lambda raw: raw + b"0"), "1 bytes too many"),
    "huge header": (raw_bytes("base", lambda raw: (10**9).to_bytes(8, "little") + raw[8:]), "the header says it has"),
    "duplicate keys": (raw_bytes("base", name_twice), "duplicate key"),
    "fp8 with scales": (everywhere(a__weight=F8, a__weight_scale=torch.ones(1)), "codes whose scale is a.weight_scale"),
    "packed": (everywhere(a__qweight=torch.zeros(4).int()), "packed quantized weights"),
    "a pickle": (raw_bytes("instruct", lambda _: b"PK\x03\x04" + bytes(60)), "PyTorch pickle"),
    "a pointer": (raw_bytes("instruct", lambda _: b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "no such model": (option(target="/nowhere"), "no such file or folder"),
    "residual as target": (with_residual(target="/r"), "is a residual, wanted a model as target"),
    "residual and model": (with_residual(residual=("/r", "/base")), "r is a residual, "),
    "model as residual": (option(residual="/base"), "is a model, wanted a residual"),
    "three models": (option(residual=("/base", "/base", "/base")), "wanted one or more residual folders"),
    "list of two models": (option(residual=["/instruct", "/base"]), "a tuple in Python"),
    "no residual": (option(residual=()), "nothing is given"),
    "no such pattern": (option(skip="typo"), "'typo' matches no tensor"),
    "bad pattern": (option(skip="("), "is not a regular expression"),
    "out exists": (option(out="/base"), "is not empty"),
    "out in an input": (option(out="/base/out"), "lies in the input"),
    "threads": (option(threads=0), "threads is 0"),
    "foreign folder": (foreign_folder, "is in the way"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_byte(tmp_path: Path, case: str) -> None:
    base, instruct, target = triple(tmp_path)
    options: dict[str, Any] = {"target": target, "residual": (instruct, base), "out": tmp_path / "out"}
    spoil, text = REFUSED[case]
    spoil(tmp_path, options)
    before = snapshot(tmp_path)
    error = TypeError if case in ("alpha bool", "alpha complex") else (CheckpointError, ArgumentError, StoreError)
    with pytest.raises(error, match=re.escape(text)):
        ik.apply(**options)
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_residual_of_a_model_and_itself_is_said_to_be_0(tmp_path: Path) -> None:
    base, instruct, _ = triple(tmp_path)
    assert ik.extract(base, instruct, tmp_path / "residual", sync=False).warnings == ()
    shutil.copytree(base, tmp_path / "copy")
    (warning,) = ik.extract(base, tmp_path / "copy", tmp_path / "zero", sync=False).warnings
    assert warning.startswith("the residual is 0: instruct and base hold the same numbers")


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("shape", "has shape [8] in base"),
        ("integers differ", "'ids' is I64 in"),
        ("missing in instruct", "is in base and not in instruct"),
        ("truncated", "truncated"),
        ("fp8 with scales", "codes whose scale"),
        ("packed", "packed quantized weights"),
    ],
)
def test_extract_refuses_the_same(tmp_path: Path, case: str, text: str) -> None:
    base, instruct, _ = triple(tmp_path)
    REFUSED[case][0](tmp_path, {})
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(text)):
        ik.extract(base, instruct, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_an_unfinished_folder_is_no_input(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    partial = tmp_path / "x.partial"
    target.rename(partial)
    (partial / unfinished.MARKER).write_text("")
    with pytest.raises(CheckpointError, match="is the unfinished output of a merge"):
        ik.apply(partial, (instruct, base), out=tmp_path / "out")


def test_a_backend_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    monkeypatch.setenv("IRES_BACKEND", "abacus")
    with pytest.raises(ArgumentError, match="IRES_BACKEND=abacus: no such backend"):
        ik.apply(target, (instruct, base), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_alone_is_no_target_of_a_new_model(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    shard = sorted(target.glob("*.safetensors"))[0]
    with pytest.raises(CheckpointError, match="is one of several shards, and would be no model on its own"):
        merge(shard, (instruct, base), out=tmp_path / "out", allow_missing=True)
    assert not (tmp_path / "out").exists()


def test_unfinished_output_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    partial = tmp_path / "out.partial"
    shutil.copytree(target, partial)
    (partial / MARKER).touch()
    (tmp_path / "link").symlink_to(partial)
    monkeypatch.chdir(partial)
    for path in (tmp_path / "link", Path(".")):
        with pytest.raises(CheckpointError, match="is the unfinished output of a merge"):
            merge(path, (instruct, base), out=tmp_path / "new")
