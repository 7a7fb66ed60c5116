"""An input is who it is by its content: equal names, sizes and times do not make one model pass for another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from merges import before_window
from safetensors.torch import save_file
from small_models import read_model, snapshot, tensors, triple, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.checkpoint import FileId
from ires_kernels.checkpoints.header import CheckpointError, read_header
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.files import samples
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.samples import sample
from ires_kernels.planning.plan import Plan
from ires_kernels.planning.rules import ArgumentError


def flip(file: Path, at: int = -1) -> None:
    """Change a byte, and set the time back to what it was."""
    times = file.stat()
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    with open(file, "r+b") as stream_:
        stream_.write(raw)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_name_or_a_mode_that_an_input_gets_meanwhile_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    files = sorted(base.glob("*.safetensors"))

    def touch() -> None:
        os.link(files[0], tmp_path / "linked")
        files[1].chmod(0o400)

    before_window(monkeypatch, 1, touch)
    where: dict[str, Any] = {"in_place": True} if in_place else {"out": tmp_path / "out"}
    ik.apply(target, (instruct, base), sync=False, threads=1, **where)
    assert ik.verify(target if in_place else tmp_path / "out")


@pytest.mark.parametrize("where", ["header", "tensor"])
def test_an_input_that_is_written_meanwhile_is_found_though_its_time_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    base, instruct, target = triple(tmp_path)
    file = base / "model.safetensors"
    at = 12 if where == "header" else open_checkpoint(base).tensors["lm_head.weight"].offset
    before_window(monkeypatch, 20, lambda: flip(file, at))
    with pytest.raises(CheckpointError, match=f"{file}: (changed while it was read|tensor)"):
        ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False, threads=1)
    assert not (tmp_path / "out").exists()


def test_a_new_folder_takes_nothing_that_belongs_to_an_update_in_place(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    for ignored in ({"undo": "all"}, {"undo": "none"}, {"tag": "x"}):
        with pytest.raises(ArgumentError, match="undo and tag go with in_place=True"):
            ik.apply(target, (instruct, base), out=tmp_path / "out", **ignored)
    assert not (tmp_path / "out").exists()


def triple_with_numbers(folder: Path) -> tuple[Path, Path, Path]:
    """Models with a tensor of whole numbers, the same in all, which is compared and copied."""
    paths = triple(folder)
    for path in paths:
        model = read_model(path) | {"position_ids": torch.arange(12)}
        save_file(model, path / "model.safetensors", metadata={"format": "pt"})
    return paths


def test_the_target_as_instruct_with_numbers_that_are_compared(tmp_path: Path) -> None:
    base, _, target = triple_with_numbers(tmp_path)
    ik.apply(target, (target, base), out=tmp_path / "out", sync=False)
    ik.apply(target, (target, base), in_place=True, sync=False)
    out, mine = read_model(tmp_path / "out"), read_model(target)
    assert all(torch.equal(out[name], mine[name]) for name in out)


# --- two models with equal names, sizes and times


def twin(model: Path, name: str) -> Path:
    """Another model in a folder of this name beside it: other weights, and the names, sizes and times of this one."""
    other = model.with_name(name)
    shutil.copytree(model, other)
    for path in other.glob("*.safetensors"):
        header = read_header(path)
        raw = bytearray(path.read_bytes())
        for i in range(header.data_start, len(raw), 2):
            raw[i] ^= 3
        path.write_bytes(raw)
    for path in model.iterdir():
        times = path.stat()
        os.utime(other / path.name, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert all(FileId.of(path)[2:4] == FileId.of(other / path.name)[2:4] for path in model.iterdir())
    return other


def exchange(model: Path) -> Path:
    """Put a twin in place of a model; returns where that is now."""
    other = twin(model, "twin")
    model.rename(model.with_name("moved"))
    other.rename(model)
    return model.with_name("moved")


def put_back(model: Path) -> None:
    shutil.rmtree(model)
    model.with_name("moved").rename(model)


@pytest.mark.parametrize("role", ["instruct", "base", "target"])
def test_a_finished_folder_is_not_the_output_of_a_twin(tmp_path: Path, role: str) -> None:
    paths = dict(zip(("base", "instruct", "target"), triple(tmp_path, shards=2), strict=True))
    out = tmp_path / "out"

    def apply() -> Any:
        return ik.apply(paths["target"], (paths["instruct"], paths["base"]), out=out, sync=False)

    plan = apply().id
    before = snapshot(out)
    model, paths[role] = paths[role], twin(paths[role], "other")
    with pytest.raises(StoreError, match=f"same command, but of another {role}: {paths[role]}.* has other bytes now"):
        apply()
    paths[role] = model
    assert "nothing was done" in f"{apply()}"
    exchange(model)
    with pytest.raises(StoreError, match=f"same command, but of another {role}: {model}.* has other bytes now"):
        apply()
    assert snapshot(out) == before
    shutil.rmtree(out)
    assert apply().id == plan, "not by its id"


def test_a_residual_has_twins_too(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    ik.extract(base, instruct, tmp_path / "r", sync=False)
    ik.extract(base, twin(instruct, "other"), tmp_path / "r2", sync=False)
    times = (tmp_path / "r" / "residual.safetensors").stat()
    os.utime(tmp_path / "r2" / "residual.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(StoreError, match="same command, but of another instruct"):
        ik.extract(base, tmp_path / "other", tmp_path / "r", sync=False)
    ik.apply(target, tmp_path / "r", out=tmp_path / "out", sync=False)
    with pytest.raises(StoreError, match="same command, but of another residual"):
        ik.apply(target, tmp_path / "r2", out=tmp_path / "out", sync=False)


def test_side_files_have_twins_too(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, files={"vocab.json": "{}", "README.md": "abc"})
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    file = target / "README.md"
    times = file.stat()
    file.write_text("xyz")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(StoreError, match=f"same command, but of another target: {file} has other bytes now"):
        ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)


@pytest.mark.parametrize("role", ["instruct", "base"])
def test_an_update_in_place_is_not_that_with_a_twin(tmp_path: Path, role: str) -> None:
    paths = dict(zip(("base", "instruct", "target"), triple(tmp_path), strict=True))
    target = paths.pop("target")

    def apply(**options: Any) -> Any:
        return ik.apply(target, (paths["instruct"], paths["base"]), in_place=True, sync=False, **options)

    apply()
    assert "nothing was done" in f"{apply()}"
    exchange(paths[role])
    assert isinstance(apply(dry_run=True), Plan)
    shutil.copytree(target, tmp_path / "before")
    report = apply()
    assert report.tensors == 7
    put_back(paths[role])
    twin(paths[role], "other")
    with_twin = [tmp_path / "other" if name == role else paths[name] for name in ("instruct", "base")]
    ik.apply(tmp_path / "before", (with_twin[0], with_twin[1]), out=tmp_path / "wanted", sync=False)
    wanted, got = read_model(tmp_path / "wanted"), read_model(target)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert "nothing was done" in f"{apply()}", "it was applied, by the update before the last"


# --- what was interrupted


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, run: Callable[[], object]) -> None:
    def fail() -> None:
        raise OSError(5, "an interruption")

    with monkeypatch.context() as patch:
        before_window(patch, at, fail)
        with pytest.raises(OSError, match="an interruption"):
            run()


@pytest.mark.parametrize("again", ["resume", "the same command"])
@pytest.mark.parametrize("role", ["instruct", "base", "target"])
def test_an_unfinished_folder_is_not_gone_on_with_by_a_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, again: str
) -> None:
    paths = dict(zip(("base", "instruct", "target"), triple(tmp_path, shards=2), strict=True))
    out = tmp_path / "out"

    def apply(to: Path = out) -> Any:
        return ik.apply(paths["target"], (paths["instruct"], paths["base"]), out=to, sync=False, threads=1)

    apply(tmp_path / "wanted")
    interrupt(monkeypatch, 16, apply)
    partial = out.with_name("out.partial")
    assert len(list(partial.glob("*.done"))) == 1 or len(list(partial.glob(".*.done"))) == 1
    before = snapshot(partial)
    exchange(paths[role])
    with pytest.raises(StoreError, match=f"{paths[role]}.*not the file of the {role}.* that this was begun with"):
        ik.resume(out) if again == "resume" else apply()
    assert snapshot(partial) == before, "nothing is lost"
    put_back(paths[role])
    ik.resume(out) if again == "resume" else apply()
    assert ik.verify(out)
    for path in sorted((tmp_path / "wanted").glob("*.safetensors")):
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("again", ["resume", "the same command"])
@pytest.mark.parametrize("role", ["instruct", "base"])
def test_an_unfinished_update_is_not_gone_on_with_by_a_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, again: str
) -> None:
    paths = dict(zip(("base", "instruct", "target"), triple(tmp_path), strict=True))
    target = paths["target"]
    ik.apply(target, (paths["instruct"], paths["base"]), out=tmp_path / "wanted", sync=False)

    def apply() -> Any:
        return ik.apply(target, (paths["instruct"], paths["base"]), in_place=True, sync=False, threads=1)

    interrupt(monkeypatch, 10, apply)
    exchange(paths[role])
    with pytest.raises(StoreError, match=f"{paths[role]}.*not the file of the {role}.* that this was begun with"):
        ik.resume(target) if again == "resume" else apply()
    put_back(paths[role])
    ik.resume(target) if again == "resume" else apply()
    wanted, got = read_model(tmp_path / "wanted"), read_model(target)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_restart_that_numbers_the_disks_anew_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    base, instruct, target = triple_with_numbers(tmp_path) if in_place else triple(tmp_path, shards=2)
    ik.apply(target, (instruct, base), out=tmp_path / "wanted", sync=False)
    where: dict[str, Any] = {"in_place": True} if in_place else {"out": tmp_path / "out"}
    of = FileId.of
    interrupt(monkeypatch, 16, lambda: ik.apply(target, (instruct, base), threads=1, **where))
    monkeypatch.setattr(FileId, "of", lambda file: of(file)._replace(dev=12345))
    place = target if in_place else tmp_path / "out"
    ik.resume(place)
    assert "nothing was done" in f"{ik.apply(target, (instruct, base), **where)}"
    monkeypatch.undo()
    assert "nothing was done" in f"{ik.apply(target, (instruct, base), **where)}"
    wanted, got = read_model(tmp_path / "wanted"), read_model(place)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("how", ["another path", "a link", "moved", "a hard link", "a copy"])
def test_the_same_model_elsewhere_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, in_place: bool
) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    where: dict[str, Any] = {"in_place": True} if in_place else {"out": tmp_path / "out"}
    ik.apply(target, (instruct, base), sync=False, **where)
    same = tmp_path / "same"
    if how == "another path":
        monkeypatch.chdir(base)
        same = Path("../instruct/../instruct")
    elif how == "a link":
        same.symlink_to(instruct)
    elif how == "moved":
        instruct.rename(same)
    elif how == "a copy":
        shutil.copytree(instruct, same, copy_function=shutil.copy2)
    else:
        shutil.copytree(instruct, same, copy_function=os.link)
    assert "nothing was done" in f"{ik.apply(target, (same, base), sync=False, **where)}"


# --- finished outputs that were damaged since

BIG = {"model.embed_tokens.weight": (40, 16), "big.weight": (700, 1000), "model.norm.weight": (16,)}


@pytest.mark.parametrize("set_back", [False, True])
@pytest.mark.parametrize("what", ["a byte", "the last byte", "header", "cut", "gone", "side file", "manifest"])
def test_damaged_output_is_not_taken_for_done(tmp_path: Path, what: str, set_back: bool) -> None:
    models = [write_model(tmp_path / n, tensors(i, BIG), files={"a.txt": "abc"}) for i, n in enumerate("bit")]
    base, instruct, target = models
    out = tmp_path / "out"
    ik.apply(target, (instruct, base), out=out, sync=False)
    note = f"{ik.apply(target, (instruct, base), out=out, sync=False)}"
    assert "nothing was done" in note
    assert "a sample was compared" in note
    assert "`ires verify`" in note
    file = out / {"side file": "a.txt", "manifest": "ires.json"}.get(what, "model.safetensors")
    times = file.stat()
    if what == "gone":
        file.unlink()
    elif what == "cut":
        os.truncate(file, times.st_size - 2)
    else:
        offset = open_checkpoint(out).tensors["big.weight"].offset
        at = {"a byte": offset + 512_345, "header": 12, "side file": 1, "manifest": 300}.get(what, times.st_size - 1)
        with open(file, "r+b") as stream_:
            stream_.seek(at)
            byte = stream_.read(1)
            stream_.seek(at)
            stream_.write(bytes([byte[0] ^ 1]))
    if set_back and what != "gone":
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises((StoreError, CheckpointError)) as caught:
        ik.apply(target, (instruct, base), out=out, sync=False)
    if what != "manifest":
        assert "is the output of the same command, but" in f"{caught.value}"
        assert "Delete it, then merge again" in f"{caught.value}"


def test_bytes_that_rot_without_a_trace_are_found_where_the_sample_is(tmp_path: Path, monkeypatch: Any) -> None:
    """Nothing tells of them but the bytes; a twin differs everywhere, and so in every sample."""
    base, instruct, target = triple(tmp_path)
    ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)
    flip(tmp_path / "out" / "model.safetensors")
    of = FileId.of
    unnoticed = {"mtime_ns": 1, "ctime_ns": 1}
    monkeypatch.setattr(FileId, "of", lambda file: of(file)._replace(**unnoticed if "/out/" in f"{file}" else {}))
    with pytest.raises(StoreError, match="is the output of the same command, but"):
        ik.apply(target, (instruct, base), out=tmp_path / "out", sync=False)


def test_a_sample_is_of_all_parts_and_its_places_follow_from_the_id(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000_000))
    found = sample(path, "one")
    assert found == sample(path, "one")
    places = samples._places(10_000_000, "one")
    assert places != samples._places(10_000_000, "another")
    assert places[0][0] == 0
    assert places[-1][1] == 10_000_000
    assert all(stop <= start for (_, stop), (start, _) in pairwise(places))
    assert max(start - stop for (_, stop), (start, _) in pairwise(places)) < 2 * 10_000_000 / 16
    assert 300_000 < sum(stop - start for start, stop in places) < 400_000
    for start, stop in places:
        for at in (start, stop - 1):
            with open(path, "r+b") as stream_:
                stream_.seek(at)
                stream_.write(b"\1")
                stream_.flush()
                assert sample(path, "one") != found
                stream_.seek(at)
                stream_.write(b"\0")
    for size in (0, 1, 327_680, 327_681):
        path.write_bytes(bytes(size))
        assert sum(stop - start for start, stop in samples._places(size, "x")) in (size, 327_680)
        assert sample(path, "x") != found
