"""A downloaded folder: what lies in it as if it were the state of a merge is named, and neither advised nor followed.

Every attack is a folder that its receiver owns, as an archive or a download leaves it, with state as somebody else's
machine would have made it. Nothing outside of the folder may change, and nothing in it be deleted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_models import snapshot, triple

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.cli import main
from ires_kernels.files import hidden, journal, new_folder, trust
from ires_kernels.files.ownership import Foreign, StoreError, is_bare, is_inner
from ires_kernels.files.unfinished import _of_file, partial_path
from ires_kernels.in_place import cuts
from ires_kernels.in_place.cuts import Sizes
from ires_kernels.records import provenance
from ires_kernels.records.operation import Operation

SIDE = {
    "base": {"tokenizer.json": "{}"},
    "instruct": {"tokenizer.json": "{  }", "vocab.json": "{}"},
    "target": {"tokenizer.json": "{ }", "merges.txt": ""},
}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, instruct and target, in a folder of their own."""
    paths = triple(tmp_path / "models", shards=2)
    for path in paths:
        for name, text in SIDE[path.name].items():
            (path / name).write_text(text)
    return paths


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows in models of a few kilobytes."""
    monkeypatch.setattr(cuts, "SIZES", Sizes(window=1 << 10))


@contextmanager
def elsewhere(folder: Path) -> Iterator[None]:
    """Whatever is signed, another user's machine signs: with a key that is not ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "_keys", {})
        patch.setenv("XDG_STATE_HOME", f"{folder}/their-state")
        yield


class Cut(BaseException):
    """The process ends here."""


def stop(target: Path, pair: tuple[Path, Path], where: tuple[Any, str], **options: Any) -> None:
    """Begin an update in place that ends where it calls that."""

    def cut(*_: Any, **__: Any) -> Any:
        raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*where, cut)
        with pytest.raises(Cut):
            ik.apply(target, pair, in_place=True, threads=1, **options)


def unfinished(models: tuple[Path, Path, Path], **options: Any) -> Path:
    base, instruct, target = models
    stop(target, (instruct, base), (journal.Journal, "complete"), **options)
    return target


def commands(target: Path, models: tuple[Path, Path, Path]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every command that might take up what is there."""
    base, instruct, _ = models
    yield "resume", lambda: ik.resume(target)
    yield "rollback", lambda: ik.rollback(target)
    yield "apply", lambda: ik.apply(target, (instruct, base), in_place=True)
    yield "dry run", lambda: ik.apply(target, (instruct, base), in_place=True, dry_run=True)


def refused(target: Path, models: tuple[Path, Path, Path], world: Path, match: str) -> None:
    """No command takes it up, and status does not advise to."""
    before = snapshot(world)
    for name, command in commands(target, models):
        with pytest.raises((StoreError, CheckpointError), match=match):
            command()
        assert snapshot(world) == before, name
    for name in ("resume", "rollback", "status", "inspect"):
        main([name, f"{target}"])
        assert snapshot(world) == before, name


PROOF = r"no valid signature"


@pytest.mark.parametrize("phase", hidden.PHASES)
def test_state_of_another_machine_is_not_followed(
    tmp_path: Path, models: tuple[Path, Path, Path], phase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with elsewhere(tmp_path):
        target = unfinished(models)
        work = target / ".ires-unfinished"
        (work / "operation.json").rename(work / f"{phase}.json")
    refused(target, models, tmp_path, PROOF)
    said = "".join(capsys.readouterr())
    assert "ires resume" not in said
    assert "ires rollback" not in said
    assert "If the folder came from elsewhere, delete it" in said


def planted(target: Path, **changes: Any) -> Path:
    """An .ires-unfinished of a complete model, as an attacker writes it: by the format, signed with a key of theirs."""
    work = target / ".ires-unfinished"
    (work / "model").mkdir(parents=True)
    (work / ".ires-lock").write_text(trust.sign(*hidden.TOKEN))
    table = {
        "id": "0" * 32, "version": "0.2.0", "kind": "apply",
        "paths": {"target": f"{target}", "residual": f"{target}"}, "rules": {}, "undo": "all", "log_size": 0,
        **changes,
    }  # fmt: skip
    phase = table.pop("phase", "operation")
    (work / f"{phase}.json").write_bytes(trust.seal("operation", json.dumps(table, indent=1).encode()))
    (work / "journal").write_bytes(bytes(1 << 13))
    (work / "log").write_bytes(bytes(64))
    return work


@pytest.mark.parametrize("form", ["{home}/.bashrc", "../secret"])
@pytest.mark.parametrize("key", ["windows", "names", "installed", "dropped"])
@pytest.mark.parametrize("is_ours", [False, True], ids=["theirs", "signed by us"])
def test_paths_that_lead_out_of_the_folder(
    tmp_path: Path, models: tuple[Path, Path, Path], key: str, form: str, is_ours: bool
) -> None:
    """Window paths, names and side files, absolute and upwards: refused unsigned, and even with our own signature."""
    target = models[2]
    for victim in (tmp_path / "home" / ".bashrc", tmp_path / "models" / "secret"):
        victim.parent.mkdir(exist_ok=True)
        victim.write_text("mine" * 2000)
    name = form.format(home=tmp_path / "home")
    value: Any = {
        "windows": [[name, 0, 4096]], "names": [name], "dropped": [name],
        "installed": {name: {"from": "instruct", "xxh3_128": ""}},
    }[key]  # fmt: skip
    changes: dict[str, Any] = {key: value, "phase": "installing" if key in ("installed", "dropped") else "operation"}
    if is_ours:
        planted(target, **changes)
        match = rf"{key} of its record cannot be used"
    else:
        with elsewhere(tmp_path):
            planted(target, **changes)
        match = PROOF
    if key == "installed":
        new = target / ".ires-unfinished" / "new"
        shutil.copytree(tmp_path / "home", new / "home", dirs_exist_ok=True)
    refused_or_unusable = refused if not is_ours else unusable
    refused_or_unusable(target, models, tmp_path, match)


def unusable(target: Path, _: tuple[Path, Path, Path], world: Path, match: str) -> None:
    """What has our signature, and is of no use: resume and rollback say so, exit 2."""
    before = snapshot(world)
    for command in (ik.resume, ik.rollback):
        with pytest.raises((StoreError, CheckpointError), match=match):
            command(target)
    assert main(["resume", f"{target}"]) == 2
    assert main(["status", f"{target}"]) == 2
    assert snapshot(world) == before


@pytest.mark.parametrize("part", ["model", "new", "old", "journal", "log", ".ires-lock", "operation.json", "."])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_links_and_pipes_in_the_hidden_folder(
    tmp_path: Path, models: tuple[Path, Path, Path], part: str, kind: str
) -> None:
    """Whichever part of the state leads elsewhere, or is a pipe: nothing hangs, and nothing elsewhere is written."""
    with elsewhere(tmp_path):
        work = planted(models[2], windows=[["model-00001-of-00002.safetensors", 0, 64]])
    place = work if part == "." else work / part
    aside = tmp_path / "aside"
    if place.exists():
        place.rename(aside)
    else:
        aside.mkdir()
    if kind == "link":
        place.symlink_to(aside)
    else:
        os.mkfifo(place)
    refused(models[2], models, tmp_path, r"no valid signature|symbolic link|named pipe|in the way")


def test_a_complete_model_is_read_beside_a_strangers_state(
    tmp_path: Path, models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, instruct, target = models
    with elsewhere(tmp_path):
        work = planted(target)
    before = snapshot(target)
    (note,) = ik.inspect(target)["notes"]
    assert note.startswith(f"{work}: is not the state of a merge that you began here (no valid signature)")
    assert main(["inspect", f"{target}"]) == 0
    assert re.search(rf"^note +{re.escape(note)}$", capsys.readouterr().out, re.MULTILINE)
    found = ik.status(target)
    assert (found.state, found.next) == ("none", (note,))
    report = ik.apply(target, (instruct, base), out=tmp_path / "out")
    assert note in report.warnings
    assert not list((tmp_path / "out").glob(".ires*"))
    assert snapshot(target) == before
    shutil.rmtree(work)  # the way out
    assert ik.inspect(target)["notes"] == []
    ik.apply(target, (instruct, base), in_place=True)
    assert ik.verify(target)


def test_missing_files_are_explained_by_a_strangers_state(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    with elsewhere(tmp_path):
        target = unfinished(models)
    with pytest.raises(CheckpointError, match=r"(?s)found .*; wanted model.safetensors.*no valid signature"):
        ik.inspect(target)


def test_a_strangers_undo_is_no_way_back(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    with elsewhere(tmp_path):
        ik.apply(target, (instruct, base), in_place=True, undo="all")
    before = snapshot(target)
    with pytest.raises(StoreError, match=rf"(?s)nothing is unfinished there, .*{target}/.ires-undo-1: .*{PROOF}"):
        ik.rollback(target)
    found = ik.status(target)
    assert found.state == "finished"
    assert not any("takes the update back" in text for text in found.next)
    assert any(f"{target}/.ires-undo-1: is not the state" in text for text in found.next)
    assert snapshot(target) == before


def test_our_own_undo_is_found_beside_a_strangers(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    ik.apply(target, (instruct, base), in_place=True, undo="all")
    shutil.copytree(target / ".ires-undo-1", target / ".ires-undo-7")
    with elsewhere(tmp_path):
        content = trust.seal("operation", b'{\n "id": ""}')
    (target / ".ires-undo-7" / "finished.json").write_bytes(content)
    ik.rollback(target)
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()} == before
    assert (target / ".ires-undo-7" / "finished.json").read_bytes() == content


def begun(models: tuple[Path, Path, Path], out: Path) -> Path:
    """OUT.partial, with one complete shard."""
    base, instruct, target = models

    def cut(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(new_folder.NewFolder, "finish_files", cut)
        with pytest.raises(KeyboardInterrupt):
            ik.apply(target, (instruct, base), out=out, threads=1)
    partial = partial_path(out)
    assert list(partial.glob("*.safetensors"))
    return partial


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_an_unfinished_output_of_another_machine(
    tmp_path: Path, models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    base, instruct, target = models
    out = tmp_path / "out"
    with elsewhere(tmp_path):
        partial = begun(models, out)
    if kind == "link":
        partial.rename(tmp_path / "x.partial")
        partial.symlink_to(tmp_path / "x.partial")
    before = snapshot(tmp_path)
    for command in (
        lambda: ik.resume(out),
        lambda: ik.rollback(out),
        lambda: ik.apply(target, (instruct, base), out=out),
    ):
        with pytest.raises(StoreError, match=PROOF if kind == "folder" else rf"{PROOF}|in the way"):
            command()
        assert snapshot(tmp_path) == before
    assert ik.status(out).state == "foreign"
    assert main(["status", f"{out}"]) == 0
    assert main(["resume", f"{out}"]) == 2
    said = "".join(capsys.readouterr())
    assert "`ires resume" not in said
    assert "`ires rollback" not in said
    assert snapshot(tmp_path) == before


def test_an_unfinished_output_of_theirs_does_not_hide_an_update_of_ours(
    tmp_path: Path, models: tuple[Path, Path, Path]
) -> None:
    target = unfinished(models)
    with elsewhere(tmp_path):
        begun((models[0], models[1], models[1]), tmp_path / "other")
    (tmp_path / "other.partial").rename(partial_path(target))
    assert ik.status(target).state == "unfinished"
    ik.resume(target)
    assert ik.verify(target)
    assert ik.status(target).state == "finished"
    assert partial_path(target).exists()


@pytest.mark.parametrize("how", ["stamp", "record", "name", "other operation"])
def test_records_of_complete_files_are_ours(tmp_path: Path, models: tuple[Path, Path, Path], how: str) -> None:
    """A shard that was put there, with a record that was changed to be right of it, is written again."""
    base, instruct, target = models
    ik.apply(target, (instruct, base), out=tmp_path / "wanted")
    out = tmp_path / "out"
    partial = begun(models, out)
    name = sorted(partial.glob("*.safetensors"))[0].name
    record = partial / f".ires-{name}.done"
    signature, stamp, learnt = record.read_bytes().split(b"\n", 2)
    evil = (partial / name).read_bytes()[:-64] + bytes(64)
    (partial / name).write_bytes(evil)
    status = (partial / name).stat()
    if how == "stamp":
        stamp = f"{status.st_size} {status.st_mtime_ns}".encode()
    elif how == "record":
        os.utime(partial / name, ns=(0, int(stamp.split()[1])))
        learnt = learnt.replace(b'"nan": 0', b'"nan": 1')
        learnt = learnt if b'"nan": 1' in learnt else learnt[:-2] + b" " + learnt[-2:]
    elif how == "name":
        other = sorted(partial.glob("*.safetensors"))[-1].name
        signature, stamp, learnt = (partial / f".ires-{other}.done").read_bytes().split(b"\n", 2)
        if other == name:
            pytest.skip("one shard only")
        os.truncate(partial / name, int(stamp.split()[0]))
        os.utime(partial / name, ns=(0, int(stamp.split()[1])))
    else:
        stamp = f"{status.st_size} {status.st_mtime_ns}".encode()
        content = stamp + b"\n" + learnt
        signature = trust.sign("file", _of_file(b"another", name, content)).encode()
    record.write_bytes(b"\n".join([signature, stamp, learnt]))
    ik.apply(target, (instruct, base), out=out)
    for path in (tmp_path / "wanted").glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_nothing_of_a_strangers_is_tidied(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    """Files that only look like the remains of a finished run stay where they are."""
    base, instruct, target = models
    out = tmp_path / "out"
    ik.apply(target, (instruct, base), out=out)
    (out / ".ires-lock").write_text("x\ny\nz")
    (out / ".ires-notes.done").write_text("theirs")
    before = snapshot(out)
    ik.apply(target, (instruct, base), out=out)
    assert snapshot(out) == before


# --- records that are not what they should be


def damaged(raw: bytes) -> Iterator[bytes]:
    yield b""
    yield b"\0" * len(raw)
    yield raw[: len(raw) // 2]
    yield raw.replace(b'"sync"', b'"sink"')
    yield b"[" * 100_000
    yield b"null"
    yield b'{"signature": 1,\n}'
    yield json.dumps({"signature": "0" * 64}).encode()


def test_damaged_records_are_refused_by_name(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    target = unfinished(models)
    record = target / ".ires-unfinished" / "operation.json"
    raw = record.read_bytes()
    out = tmp_path / "out"
    lock = begun((models[0], models[1], models[1]), out) / ".ires-lock"
    kept = lock.read_bytes()
    for content in damaged(raw):
        record.write_bytes(content)
        for name in ("resume", "rollback"):
            assert main([name, f"{target}"]) == 2
        assert main(["status", f"{target}"]) in (0, 2)
        lock.write_bytes(content)
        for name in ("resume", "rollback"):
            assert main([name, f"{out}"]) == 2
        assert main(["status", f"{out}"]) == 0
    record.write_bytes(raw)
    lock.write_bytes(kept)
    ik.resume(target)
    ik.resume(out)
    assert ik.verify(target)


WRONG: dict[str, list[Any]] = {
    "id": [1, None], "version": [2], "kind": ["x", [], None], "paths": [[], {"target": "relative"}, {"target": 1}],
    "rules": [[], {"alpha": 1}, {"x": 1}], "sync": [1, "yes"], "sha256": [None], "follow_links": [0],
    "tag": [1], "boot": [None],
    "undo": ["some", []], "recipe": [{}], "names": ["x", [""], ["a/b"], [".."], [1], ["a\0b"]],
    "stamps": [[], {"x": 1}],
    "samples": [[], {"x": 1}, {"x": {"y": 1}}],
    "log_size": [-1, 1.5, True, "1"],
    "windows": [{}, [["x", 1]], [["x", 2, 1]], [["../x", 0, 1]], [["x", -1, 1]], [["x", True, 1]], [["", 0, 1]], [1]],
    "copies": [[], {"x": 1}],
    "installed": [[], {"../x": {}}, {"/x": {}}, {"a//b": {}}, {"x": 1}, {"x": {"y": 1}}, {"": {}}],
    "dropped": ["x", [1], ["../x"], ["a/../b"]], "history": [{}, [1]], "unknown": [1],
}  # fmt: skip


def test_every_key_of_a_record_has_its_type(tmp_path: Path) -> None:
    """With our signature, as another version may have written it: an error that names the file and the key."""
    good = {"id": "x", "version": "9", "kind": "apply", "paths": {}, "rules": {}}
    fields = set(json.loads(trust.unseal("operation", Operation(**good, boot="").to_bytes()) or b""))  # type: ignore[arg-type]
    for key in fields | WRONG.keys():
        for value in WRONG.get(key, [None]):
            raw = trust.seal("operation", json.dumps({**good, key: value}, indent=1).encode())
            with pytest.raises(CheckpointError, match=rf"^{tmp_path}: was written by ires_kernels .*{key}|rules|alpha"):
                Operation.from_bytes(raw, tmp_path)


def test_names_within_a_folder() -> None:
    assert all(map(is_bare, ["a", ".a", "a b", "ü", "\udc80", "...", "a\\b"]))
    assert not any(map(is_bare, ["", ".", "..", "/", "a/b", "/a", "a\0", None, 1, b"a"]))
    assert all(map(is_inner, ["a", "a/b", "a/b/c"]))
    assert not any(map(is_inner, ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a/b\0", None]))


def test_state_of_our_own_is_taken_up_wherever_it_lies(models: tuple[Path, Path, Path]) -> None:
    """A model that was moved together with its state can still be rolled back, and one that stayed be finished."""
    target = unfinished(models, undo="all")
    moved = target.with_name("moved")
    shutil.copytree(target, moved)
    ik.rollback(moved)
    ik.resume(target)
    assert ik.verify(target)


@pytest.mark.parametrize("undo", ["ring", "all"])
def test_an_update_whose_key_is_lost_can_be_adopted(
    tmp_path: Path, models: tuple[Path, Path, Path], undo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the home of a container is lost with it: on the user's word, and with every other check."""
    with elsewhere(tmp_path):
        target = unfinished(models, undo=undo)
    assert main(["resume", f"{target}"]) == 2
    assert "adopt" not in capsys.readouterr().err, "nobody is advised to"
    if undo == "all":
        assert main(["rollback", f"{target}", "--adopt"]) == 0
        assert ik.status(target).state == "none"
    else:
        assert main(["resume", f"{target}", "--adopt"]) == 0
        assert ik.verify(target)
    with pytest.raises(StoreError, match="nothing is there to be adopted"):
        ik.resume(models[0], adopt=True)


@pytest.mark.parametrize("name", ["../secret", "model"])
def test_what_is_adopted_stays_in_its_folder(tmp_path: Path, models: tuple[Path, Path, Path], name: str) -> None:
    target = models[2]
    (tmp_path / "models" / "secret").write_text("mine" * 2000)
    with elsewhere(tmp_path):
        work = planted(target, windows=[[name if name != "model" else "config.json", 0, 8]])
    if name == "model":
        (work / "model").rmdir()
        (work / "model").symlink_to(models[0])
    before = snapshot(models[0]), (tmp_path / "models" / "secret").read_bytes()
    for command in (ik.resume, ik.rollback):
        with pytest.raises((StoreError, CheckpointError), match=r"cannot be used|no valid signature"):
            command(target, adopt=True)
    assert (snapshot(models[0]), (tmp_path / "models" / "secret").read_bytes()) == before


def test_without_a_key_nothing_is_begun(
    tmp_path: Path, models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A read-only home, or none: exit 3, nothing is there, and the way out that is said is one."""
    base, instruct, target = models
    monkeypatch.setattr(trust, "_keys", {})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", f"{tmp_path}/file")
    monkeypatch.setenv(trust.VARIABLE, "")
    before = snapshot(tmp_path)
    pair = ["--instruct", f"{instruct}", "--base", f"{base}"]
    for command in (
        ["apply", f"{target}", *pair, "-o", f"{tmp_path}/out"],
        ["apply", f"{target}", *pair, "--in-place"],
    ):
        assert main(command) == 3
        assert "--key PATH, or IRES_KEY=PATH" in capsys.readouterr().err
        assert snapshot(tmp_path) == before
        assert not (tmp_path / "out.partial").exists()
        assert not (target / ".ires-unfinished").exists()
    assert main(["inspect", f"{target}"]) == 0
    assert main(["apply", f"{target}", *pair, "--in-place", "--key", f"{tmp_path}/key"]) == 0


def test_foreign_is_a_store_error() -> None:
    assert issubclass(Foreign, StoreError)


@pytest.mark.parametrize("undo", ["ring", "all"])
def test_numbers_of_a_strangers_leave_room_for_ours(models: tuple[Path, Path, Path], undo: str) -> None:
    """The next number would make a name that is too long, and be found out when all weights are new."""
    base, instruct, target = models
    for kind in (hidden.UNDO, hidden.REPLACED):
        (target / f"{kind}-{'9' * (254 - len(kind))}").mkdir()
        (target / f"{kind}-1").mkdir()
    ik.apply(target, (instruct, base), in_place=True, undo=undo)
    kept = target / f"{hidden.UNDO if undo == 'all' else hidden.REPLACED}-2"
    assert sorted(os.listdir(kept / "old" if undo == "all" else kept)) == ["merges.txt", "tokenizer.json"]
    ik.apply(target, (instruct, base), in_place=True, undo="all", tag="again")
    assert hidden.undo_folders(target)[-1].name == (f"{hidden.UNDO}-3" if undo == "all" else f"{hidden.UNDO}-2")
    ik.rollback(target)


def test_a_text_that_is_too_long_for_a_name_is_no_path(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    (instruct / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}" * 99 + "</s>"}))
    ik.apply(target, (instruct, base), out=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_verify_reads_nothing_outside_of_the_folder(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    out = tmp_path / "out"
    ik.apply(target, (instruct, base), out=out)
    (out / "vocab.json").unlink()
    (out / "vocab.json").symlink_to("/proc/self/pagemap")  # which says that it is empty, and has no end
    (problem,) = ik.verify(out).problems
    assert re.search(r"out/vocab.json: leads to /proc/.*follow-links", problem)
    (out / "vocab.json").unlink()
    (out / "vocab.json").symlink_to(instruct / "vocab.json")
    assert ik.verify(out, follow_links=True)


def test_a_name_forges_no_line_of_the_sums(tmp_path: Path) -> None:
    names = ["model.safetensors", f"a\\b\n{'0' * 64}  model.safetensors"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    sums = provenance.sha256({name: tmp_path / name for name in names})
    (tmp_path / "sums").write_bytes(provenance.sums_file(sums))
    subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "sums"], cwd=tmp_path, check=True)
