"""A manifest may be anybody's: whatever its keys hold is read, or refused with file and key; and what it claims of the
past is believed only where it is signed with our own key."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import read_model, tensors, write_model

import ires_kernels as ik
from ires_kernels import cli
from ires_kernels.checkpoints import manifest
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.files import trust
from ires_kernels.files.ownership import StoreError
from ires_kernels.records.report import Report

SHAPES = {"model.embed_tokens.weight": (8, 16), "norm.weight": (8,)}
SIDE = {"tokenizer.json": "{}"}


def models(folder: Path) -> tuple[Path, Path, Path]:
    """Base, instruct and target of two tensors."""
    config = {"model_type": "llama", "tie_word_embeddings": True}
    made = [
        write_model(folder / name, tensors(number, SHAPES), config=config, files=SIDE)
        for number, name in enumerate(("base", "instruct", "target"))
    ]
    return made[0], made[1], made[2]


def signed(table: dict[str, Any]) -> str:
    """The text of a manifest as if we had written it so."""
    return json.dumps(trust.signed("manifest", {k: v for k, v in table.items() if k != "signature"}))


# --- what the keys hold

Path_ = tuple[str | int, ...]
DELETED = object()


def keys_of(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The way to every key and item of JSON; of tensors, side files and the like, which are all alike, to one."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from keys_of(item, (*path, key))


def others(value: Any) -> list[Any]:
    """What may be found in place of a value."""
    found: list[Any] = [
        DELETED, None, True, -1, 7, 1 << 63, 1 << 70, 1.5, -1e308, "", "x", "../x", "/etc/passwd", "a\0b", "\x1b[31m",
        "\udcff", "0" * 32, [], [[]], ["x"], {}, {"a": {}}, {"../a": {"b": None}},
    ]  # fmt: skip
    nested: Any = value
    for _ in range(50):
        nested = [nested]
    found += [nested, [value, value], {"x": value}, f"{value}"]
    if isinstance(value, str):
        found += [value[:-1], value + " ", value * 50]
    if type(value) in (int, float):
        found += [-value, value + 1, f"{value}"]
    return [other for other in found if other is DELETED or other != value]


def changed(table: Any, path: Path_, other: Any) -> Any:
    new = copy.deepcopy(table)
    at = new
    for key in path[:-1]:
        at = at[key]
    if other is DELETED:
        del at[path[-1]]
    else:
        at[path[-1]] = other
    return new


def real_manifests(root: Path) -> dict[str, Path]:
    """Manifests of every kind, each in the model that it tells of."""
    base, instruct, target = models(root)
    residual = root / "residual"
    ik.extract(base, instruct, residual, sync=False, skip="norm", sha256=True)
    out, twice, single = root / "out", root / "twice", root / "single"
    ik.apply(target, residual, out=out, alpha=0.5, skip="norm", sync=False, sha256=True)
    for copied in (twice, single):
        shutil.copytree(target, copied)
    for tag in ("1", "2"):
        ik.apply(twice, (instruct, base), in_place=True, alphas=[("norm", 0.5)], tag=tag, undo="all", sync=False)
    ik.apply(single / "model.safetensors", (instruct / "model.safetensors", base / "model.safetensors"),
             in_place=True, sync=False)  # fmt: skip
    return {
        "residual": residual / "residual.json", "new folder": out / "ires.json", "in place": twice / "ires.json",
        "single file": single / "model.safetensors.ires.json",
    }  # fmt: skip


def commands(root: Path, kind: str) -> list[list[str]]:
    """What reads the manifest."""
    base, instruct, residual = (f"{root / name}" for name in ("base", "instruct", "residual"))
    pair = ["--instruct", instruct, "--base", base]
    place = f"{root / {'residual': 'residual', 'new folder': 'out', 'in place': 'twice'}.get(kind, 'single')}"
    if kind == "single file":
        place += "/model.safetensors"
        pair = ["--instruct", f"{instruct}/model.safetensors", "--base", f"{base}/model.safetensors"]
    looks = [["inspect", place], ["verify", place], ["verify", place, "--hashes-only"], ["status", place]]
    target = f"{root / 'target'}"
    if kind == "residual":
        again = ["extract", base, instruct, "-o", place, "--skip", "norm", "--sha256", "--no-sync"]
        return [*looks, again, ["apply", target, place, "-o", f"{root / 'new'}", "--no-sync"]]
    if kind == "new folder":
        again = ["apply", target, f"{residual}:.5", "-o", place, "--skip", "norm", "--sha256", "--no-sync"]
        return [*looks, again, ["apply", place, residual, "-o", f"{root / 'new'}", "--no-sync"]]
    options = ["--alpha-for", "norm=0.5", "--tag", "2", "--keep-undo"] if kind == "in place" else []
    again = ["apply", place, *pair, "--in-place", *options, "--no-sync"]
    return [*looks, ["verify", place, "--target", target], again, ["rollback", place]]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("manifests") / "pristine"
    root.mkdir()
    real_manifests(root)
    return root


KINDS = {
    "residual": "residual/residual.json", "new folder": "out/ires.json", "in place": "twice/ires.json",
    "single file": "single/model.safetensors.ires.json",
}  # fmt: skip


def mutations(table: dict[str, Any]) -> Iterator[tuple[Path_, Any, dict[str, Any]]]:
    for path in keys_of(table):
        value: Any = table
        for key in path:
            value = value[key]
        for other in others(value):
            yield path, other, changed(table, path, other)


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_read_or_refused_by_its_key(pristine: Path, kind: str) -> None:
    path = pristine / KINDS[kind]
    table = json.loads(path.read_text())
    number = refused = 0
    for keys, other, new in mutations(table):
        number += 1
        said, found = "", None
        try:
            found = manifest.parse(json.dumps(new).encode(), path)
        except CheckpointError as error:
            said = f"{error}"
            refused += 1
        if found is None:
            assert said.startswith(f"{path}: "), (keys, other)
            assert f"{keys[0]}" in said or "JSON" in said, (keys, other, said)
        else:
            assert not found.is_mine or new == table, (keys, other)
    assert number > 1000
    assert refused > number / 3


def run_all(root: Path, work: Path, kind: str, step: int, offset: int) -> int:
    """Run the commands on every step-th of the changed manifests that can be read; returns how many these were."""
    shutil.copytree(root, work, symlinks=True)
    path = work / KINDS[kind]
    table = json.loads(path.read_text())
    count = 0
    for number, (keys, other, new) in enumerate(mutations(table)):
        if number % step != offset % step:
            continue
        try:
            manifest.parse(json.dumps(new).encode(), path)
        except CheckpointError:
            if number % (5 * step) != offset % step:
                continue
        count += 1
        path.write_text(signed(new))
        for command in commands(work, kind):
            started = time.process_time()  # of this process alone, however busy the machine is
            code = cli.main([*command, "--quiet"] if command[0] not in ("inspect", "status") else command)
            assert code in (0, 1, 2), (keys, other, command)
            assert time.process_time() - started < 20, (keys, other, command)
            shutil.rmtree(work / "new", ignore_errors=True)
            if command[0] in ("apply", "rollback") and kind in ("in place", "single file") and code == 0:
                name = KINDS[kind].split("/")[0]
                shutil.rmtree(work / name)
                shutil.copytree(root / name, work / name, symlinks=True)
                path.write_text(signed(new))
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_is_a_bug(pristine: Path, tmp_path: Path, kind: str) -> None:
    assert run_all(pristine, tmp_path / "work", kind, 61, 0) > 5


@pytest.mark.torture
@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_no_value_is_a_bug_at_length(pristine: Path, tmp_path: Path, kind: str, offset: int) -> None:
    assert run_all(pristine, tmp_path / "work", kind, 16, offset) > 30


# --- what is believed


def test_a_manifest_that_is_not_ours_stops_no_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = models(tmp_path)

    def apply(path: Path, **options: Any) -> Any:
        return ik.apply(path, (instruct, base), in_place=True, sync=False, **options)

    apply(target)
    assert "nothing was done" in f"{apply(target)}"
    ik.apply(target, (instruct, base), out=tmp_path / "wanted", sync=False)
    update = json.loads((target / "ires.json").read_text())["id"]
    (tmp_path / "key").write_bytes(os.urandom(32))
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setenv("IRES_KEY", f"{tmp_path / 'key'}")
    claim = f"{target}/ires.json says that update {update} was applied before, but is not signed with your key"
    assert any(text.startswith(claim) for text in apply(target, dry_run=True).warnings)
    assert "its manifest is not signed with your key" in f"{ik.status(target)}"
    report = apply(target)
    assert report.tensors == 2
    assert any(text.startswith(claim) for text in report.warnings)
    wanted, got = read_model(tmp_path / "wanted"), read_model(target)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    table = json.loads((target / "ires.json").read_text())
    assert table["in_place"]["history"] == [], "nothing of it becomes ours"
    assert "nothing was done" in f"{apply(target)}"


def test_a_model_that_was_changed_since_its_update_has_no_history_and_says_so(tmp_path: Path) -> None:
    base, instruct, target = models(tmp_path)
    ik.apply(target, (instruct, base), in_place=True, sync=False)
    file = target / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    report = ik.apply(target, (instruct, base), in_place=True, sync=False)
    assert isinstance(report, Report)
    assert any("the model is not what that left: it was changed since" in text for text in report.warnings)


def test_a_planted_manifest_is_not_the_output_of_the_same_command(tmp_path: Path) -> None:
    base, instruct, target = models(tmp_path)
    out = tmp_path / "out"
    ik.apply(target, (instruct, base), out=out, sync=False)
    table = json.loads((out / "ires.json").read_text())
    table["report"]["lost"] = 12345
    (out / "ires.json").write_text(json.dumps(table))
    with pytest.raises(StoreError, match="says that this is the output of this very command, but is not signed with"):
        ik.apply(target, (instruct, base), out=out, sync=False)
    (out / "ires.json").write_text(signed(table))
    assert "nothing was done" in f"{ik.apply(target, (instruct, base), out=out, sync=False)}"


def test_a_manifest_that_is_not_ours_takes_no_update_back(tmp_path: Path) -> None:
    base, instruct, target = models(tmp_path)
    before = read_model(target)
    ik.apply(target, (instruct, base), in_place=True, undo="all", sync=False)
    path = target / "ires.json"
    raw = path.read_bytes()
    table = json.loads(raw)
    path.write_text(json.dumps(table | {"unsynced": "x"}))
    with pytest.raises(StoreError, match="is not signed with your key, or was edited since"):
        ik.rollback(target)
    path.write_text(json.dumps(dict(reversed(table.items())), indent=7))  # the same values
    ik.rollback(target)
    assert all(torch.equal(tensor, before[name]) for name, tensor in read_model(target).items())


def test_the_order_of_keys_means_nothing(tmp_path: Path) -> None:
    base, instruct, target = models(tmp_path)
    ik.extract(base, instruct, tmp_path / "r", sync=False)
    ik.apply(target, [tmp_path / "r", tmp_path / "r"], out=tmp_path / "out", alpha=[0.5, 2], sync=False)
    for path in (tmp_path / "r" / "residual.json", tmp_path / "out" / "ires.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
        assert ik.verify(path.parent)


def test_a_residual_of_version_0_1_0(tmp_path: Path) -> None:
    """It has no signature, no samples, and stamps of size and time."""
    base, instruct, target = models(tmp_path)
    ik.extract(base, instruct, tmp_path / "r", sync=False)
    ik.apply(target, tmp_path / "r", out=tmp_path / "wanted", sync=False)
    path = tmp_path / "r" / "residual.json"
    table = json.loads(path.read_text())
    for key in ("signature", "samples", "config", "special_ids", "renamed_tokens"):
        table.pop(key, None)
    for entry in table["inputs"].values():
        entry["files"] = {n: {k: stamp[k] for k in ("size", "mtime_ns")} for n, stamp in entry["files"].items()}
    path.write_text(json.dumps(table | {"ires": "0.1.0"}))
    ik.apply(target, tmp_path / "r", out=tmp_path / "out", sync=False)
    for name, tensor in read_model(tmp_path / "wanted").items():
        assert torch.equal(tensor, read_model(tmp_path / "out")[name])
    assert ik.verify(tmp_path / "r")
    assert ik.verify(tmp_path / "out")


# --- names that are not UTF-8


def test_paths_and_names_that_are_not_utf_8_survive(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    base, instruct, target = models(folder)
    odd = os.fsdecode(b"notes-\xff.txt")
    (target / odd).write_text("odd")
    ik.extract(base, instruct, folder / "r", sync=False)
    ik.apply(target, folder / "r", out=folder / "out", sync=False)
    (folder / "out" / "ires.json").read_text(encoding="utf-8")
    assert (folder / "out" / odd).read_text() == "odd"
    assert ik.verify(folder / "out")
    assert "nothing was done" in f"{ik.apply(target, folder / 'r', out=folder / 'out', sync=False)}"
    (folder / "out" / odd).write_text("even")
    assert ik.verify(folder / "out").problems == [f"{odd} has changed since the merge"]
    ik.apply(target, (instruct, base), in_place=True, sync=False)
    assert "nothing was done" in f"{ik.apply(target, (instruct, base), in_place=True, sync=False)}"
    assert ik.verify(target)
    recorded = open_checkpoint(target).manifest
    assert recorded is not None
    assert recorded.inputs["base"].path == f"{base}"


def test_sums_of_a_file_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    base, instruct, target = models(tmp_path)
    single = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    shutil.copy(target / "model.safetensors", single)
    pair = (instruct / "model.safetensors", base / "model.safetensors")
    ik.apply(single, pair, out=tmp_path / "out", sha256=True, sync=False)
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes().endswith(b"caf\xe9.safetensors\n")
    assert ik.verify(tmp_path / "out")


# --- how long it takes


def test_large_manifests_are_read_in_time(tmp_path: Path) -> None:
    base, instruct, target = models(tmp_path)
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    path = tmp_path / "out" / "ires.json"
    table = json.loads(path.read_text())
    entry = table["tensors"]["norm.weight"]
    table["tensors"] = {f"model.layers.{i}.mlp.experts.weight": entry for i in range(50_000)}
    raw = signed(table).encode()
    started = time.process_time()
    found = manifest.parse(raw, path)
    assert len(found.tensors) == 50_000
    assert found.is_mine
    assert time.process_time() - started < 30  # some 3; looking for each name among all others takes minutes
