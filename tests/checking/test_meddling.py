"""Somebody else cuts, replaces or writes files of a merge while it runs, or before it is taken up: that is noticed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selection import tiles
from small_models import triple

import ires_kernels as ik
from ires_kernels.cli import main
from ires_kernels.files import inplace, journal, new_file, new_folder
from ires_kernels.in_place import cuts
from ires_kernels.in_place.cuts import Sizes

FILE = "model-00002-of-00003.safetensors"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path, Path]]:
    """Small models that take many windows, and the folder of them as the current one."""
    monkeypatch.setattr(cuts, "SIZES", Sizes(window=256, unit=64, gap=16))
    monkeypatch.chdir(tmp_path)
    with tiles(elements=32):
        yield triple(tmp_path, shards=3)


def cut(path: Path) -> None:
    os.truncate(path, 100)


def replace(path: Path) -> None:
    """Another file of the same size and time under the same name."""
    status = path.stat()
    content = path.read_bytes()
    path.rename(path.with_name("elsewhere"))
    path.write_bytes(content[:-8] + bytes(8))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def write(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\xff")


def at_write(patch: pytest.MonkeyPatch, owner: Any, number: int, what: Callable[[], object]) -> None:
    """Do something before the n-th write."""
    calls, method = iter(range(10**6)), owner.write

    def meddled(*arguments: Any) -> None:
        if next(calls) == number:
            what()
        method(*arguments)

    patch.setattr(owner, "write", meddled)


APPLY = ["apply", "target", "--instruct", "instruct", "--base", "base", "--threads", "1"]


@pytest.mark.parametrize("meddle", [cut, replace])
@pytest.mark.parametrize("number", [25, 50])
def test_a_new_file_before_it_is_complete(
    models: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    meddle: Callable[[Path], None],
    number: int,
) -> None:
    base, instruct, target = models
    ik.apply(target, (instruct, base), out="wanted", sync=False)

    def at_work() -> None:
        (path,) = [path for path in Path("out.partial").glob(".ires-*.tmp") if path.stat().st_blocks][-1:]
        meddle(path)

    with monkeypatch.context() as patch:
        at_write(patch, new_file.NewFile, number, at_work)
        assert main([*APPLY, "-o", "out"]) == 3
    error = capsys.readouterr().err
    assert "somebody has cut, written or replaced it before all was complete" in error
    assert main([*APPLY, "-o", "out"]) == 0
    for path in Path("wanted").glob("*.safetensors"):
        assert Path("out", path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", [FILE, "config.json"])
@pytest.mark.parametrize("meddle", [cut, replace, write])
@pytest.mark.usefixtures("models")
def test_a_complete_file_before_all_is(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    meddle: Callable[[Path], None],
    name: str,
) -> None:
    check = new_folder.NewFolder.commit

    def commit(folder: new_folder.NewFolder) -> None:
        meddle(folder.partial / name)
        check(folder)

    with monkeypatch.context() as patch:
        patch.setattr(new_folder.NewFolder, "commit", commit)
        assert main([*APPLY, "-o", "out"]) == 3
    assert f"out.partial/{name}: somebody has cut, written or replaced it" in capsys.readouterr().err
    assert not Path("out").exists()
    assert main([*APPLY, "-o", "out"]) == 0
    assert main(["verify", "out"]) == 0


@pytest.mark.parametrize("undo", [[], ["--keep-undo"], ["--no-undo"]])
@pytest.mark.parametrize(("meddle", "what"), [(cut, "cut or lengthened it"), (replace, "moved or replaced it")])
@pytest.mark.usefixtures("models")
def test_weights_while_they_change(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    meddle: Callable[[Path], None],
    what: str,
    undo: list[str],
) -> None:
    with monkeypatch.context() as patch:
        at_write(patch, journal.Journal, 40, lambda: meddle(Path("target/.ires-unfinished/model", FILE)))
        assert main([*APPLY, "--in-place", *undo]) == 3
    assert f"somebody has {what}" in capsys.readouterr().err
    for command in ("resume", "rollback"):
        assert main([command, "target"]) == 3
        assert "Delete target/.ires-unfinished and copy the model again" in capsys.readouterr().err.replace(
            f"{Path.cwd()}/", ""
        )


class Killed(BaseException):
    pass


def killed() -> None:
    raise Killed


@pytest.mark.parametrize("command", ["resume", "rollback"])
@pytest.mark.parametrize("meddle", [cut, replace])
@pytest.mark.usefixtures("models")
def test_weights_of_an_unfinished_update(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    meddle: Callable[[Path], None],
    command: str,
) -> None:
    with monkeypatch.context() as patch:
        at_write(patch, journal.Journal, 40, killed)
        with pytest.raises(Killed):
            main([*APPLY, "--in-place", "--keep-undo"])
    meddle(Path("target/.ires-unfinished/model", FILE))
    assert main([command, "target"]) == 3
    error = capsys.readouterr().err
    assert f"model/{FILE} " in error
    assert "copy the model again" in error


@pytest.mark.parametrize("meddle", [cut, replace])
@pytest.mark.usefixtures("models")
def test_weights_as_they_are_put_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], meddle: Callable[[Path], None]
) -> None:
    assert main([*APPLY, "--in-place", "--keep-undo"]) == 0
    put_back = journal.Journal.restore

    def restore(self: journal.Journal) -> None:
        meddle(Path("target/.ires-unfinished/model", FILE))
        put_back(self)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "restore", restore)
        assert main(["rollback", "target"]) == 3
    assert "is what it was" not in capsys.readouterr().out


@pytest.mark.usefixtures("models")
def test_an_unfinished_update_may_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: journal, files and what says which they are."""
    before = {path.name: path.read_bytes() for path in Path("target").glob("*.safetensors")}
    with monkeypatch.context() as patch:
        at_write(patch, journal.Journal, 40, killed)
        with pytest.raises(Killed):
            main([*APPLY, "--in-place", "--keep-undo"])
    os.rename("target", "moved")
    os.system("cp -a moved target")
    assert main(["rollback", "target"]) == 0
    assert {path.name: path.read_bytes() for path in Path("target").glob("*.safetensors")} == before


@pytest.mark.usefixtures("models")
def test_the_old_bytes_of_a_finished_update(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody needs them to finish; but what is gone cannot be promised."""
    advance = inplace.Workplace.advance

    def and_cut(self: inplace.Workplace, phase: str) -> None:
        cut(self.work / "journal")
        advance(self, phase)

    with monkeypatch.context() as patch:
        patch.setattr(inplace.Workplace, "advance", and_cut)
        assert main([*APPLY, "--in-place", "--keep-undo"]) == 0
    assert "it cannot be taken back: somebody has cut the journal" in capsys.readouterr().out
    assert main(["verify", "target"]) == 0
    assert main(["rollback", "target"]) == 2
