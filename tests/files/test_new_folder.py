"""A new folder is all there or not there: order of syncs and renames, short writes, full disks, locks, remains."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ires_kernels.files import unfinished
from ires_kernels.files.destination import check_destination
from ires_kernels.files.new_file import NewFile
from ires_kernels.files.new_folder import NewFolder
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.unfinished import MARKER, is_unfinished, partial_path


def new(out: Path, identity: str = "mine", *, sync: bool = True) -> NewFolder:
    return NewFolder(out, identity, b"kept", sync=sync)


def create(folder: NewFolder, name: str, head: bytes, size: int, record: Callable[[], bytes] = bytes) -> NewFile:
    """A file that is reserved, and taken to be written."""
    folder.reserve(name, head, size)
    return folder.file(name, record)


def write(out: Path, *, sync: bool = False) -> None:
    """A folder with a file of three parts, one more file, and one in a folder of its own."""
    with new(out, sync=sync) as folder:
        assert not folder.finished
        file = create(folder, "a.bin", b"head", 10, lambda: b"learnt")
        file.write(b"789", 7)
        file.write(memoryview(b"456"), 4)
        folder.add("b.json", [b"{", b"}"])
        folder.add("sub/c.txt", [])
        folder.commit()


def contents(folder: Path) -> dict[str, bytes]:
    return {f"{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unsigned(folder: Path) -> dict[str, bytes]:
    """The contents, where lock and records do without the lines with their signatures."""
    found = contents(folder)
    for name, text in found.items():
        lines = text.split(b"\n")
        at = {MARKER: 1}.get(name, 0 if name.endswith(".done") else None)
        if at is not None:
            assert len(bytes.fromhex(lines.pop(at).decode())) == 32
            found[name] = b"\n".join(lines)
    return found


def state(folder: Path, *complete: str) -> dict[str, bytes]:
    """What a run of `new` keeps beside files, `complete` ones being of `create`; as `unsigned` shows it."""
    found = {name: (folder / name).stat() for name in complete}
    stamps = {name: f"{status.st_size} {status.st_mtime_ns} {status.st_ino}" for name, status in found.items()}
    records = {f".ires-{name}.done": f"{stamp}\nlearnt".encode() for name, stamp in stamps.items()}
    return {MARKER: b"mine\nkept", **records}


WRITTEN = {"a.bin": b"head456789", "b.json": b"{}", "sub/c.txt": b""}


def test_the_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new(out) as folder:
        file = create(folder, "a.bin", b"head", 10)
        there = (tmp_path / "out.partial" / ".ires-a.bin.tmp").stat()
        assert there.st_size == 10, "room is reserved at once"
        assert there.st_blocks > 0
        assert is_unfinished(folder.partial)
        file.write(b"456789", 4)
        assert (tmp_path / "out.partial" / "a.bin").read_bytes() == b"head456789"
        assert not out.exists()
        folder.commit()
        assert contents(out) == {"a.bin": b"head456789"}
    assert os.listdir(tmp_path) == ["out"]
    assert not is_unfinished(out)


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("sync", [True, False])
def test_order_of_syncs_and_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool) -> None:
    calls: list[tuple[str, str]] = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def path_of(fd: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path)

    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("fsync", path_of(fd))), fsync(fd)))
    monkeypatch.setattr(
        os, "rename", lambda a, b: (calls.append(("rename", os.path.relpath(b, tmp_path))), rename(a, b))
    )
    monkeypatch.setattr(os, "unlink", lambda p: (calls.append(("unlink", os.path.relpath(p, tmp_path))), unlink(p)))
    write(tmp_path / "out", sync=sync)
    expected = [
        ("fsync", "out.partial"),  # whether it can be done at all
        ("fsync", f"out.partial/{MARKER}"),
        ("fsync", "out.partial/.ires-a.bin.tmp"),
        ("fsync", "out.partial/.ires-a.bin.done"),
        ("rename", "out.partial/a.bin"),
        ("fsync", "out.partial/b.json"),
        ("fsync", "out.partial/sub/c.txt"),
        ("fsync", "out.partial/sub"),
        ("fsync", "out.partial"),
        ("rename", "out"),
        ("fsync", "."),
        ("fsync", f"out/{MARKER}"),
        ("unlink", "out/.ires-a.bin.done"),
        ("unlink", f"out/{MARKER}"),
    ]
    assert calls == [call for call in expected if sync or call[0] != "fsync"]
    assert contents(tmp_path / "out") == WRITTEN


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1], offset))
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == WRITTEN


@pytest.mark.parametrize(
    ("call", "count"),
    [(call, 0) for call in ("mkdir", "posix_fallocate", "rename")]
    + [("pwrite", count) for count in range(4)]
    + [("fsync", count) for count in range(3)],
)
def test_a_failing_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, count: int) -> None:
    real, calls = getattr(os, call), iter(range(100))

    def failing(*arguments: object, **options: object) -> object:
        if next(calls) == count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write(tmp_path / "out", sync=True)
    assert caught.value.errno == errno.EIO
    assert f"{caught.value.filename}".startswith(f"{tmp_path}/out")
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new(tmp_path / "out") as folder:
            create(folder, "a.bin", b"", 10)
            folder.add("sub/c.txt", [])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_no_room_is_said_before_data_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match=r"No space left on device: 10 bytes are needed, \d+ are free. Make room"
    ) as caught:
        write(tmp_path / "out")
    assert caught.value.filename == f"{tmp_path}/out.partial/a.bin"
    assert os.listdir(tmp_path) == []


def test_a_real_limit_on_file_sizes(tmp_path: Path) -> None:
    program = f"""
        import resource
        from pathlib import Path
        from ires_kernels.files.new_folder import NewFolder
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.getrlimit(resource.RLIMIT_FSIZE)[1]}))
        try:
            with NewFolder(Path({f"{tmp_path}/out"!r}), "mine", b"") as folder:
                folder.reserve("a.bin", b"", 5000)
        except OSError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert done.stdout == f"[Errno 27] File too large: '{tmp_path}/out.partial/a.bin'\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.root
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", f"{tmp_path}"], check=True)
    try:
        (tmp_path / "theirs.bin").write_bytes(bytes(600_000))

        def write_two_files() -> None:
            with new(tmp_path / "out") as folder:
                create(folder, "a.bin", b"", 300_000)
                create(folder, "b.bin", b"", 300_000)

        with pytest.raises(OSError, match="No space left on device: 300000 bytes are needed") as caught:
            write_two_files()
        assert caught.value.filename == f"{tmp_path}/out.partial/b.bin"
        assert os.listdir(tmp_path) == ["theirs.bin"]
    finally:
        subprocess.run(["umount", f"{tmp_path}"], check=True)


def test_file_systems_that_cannot_reserve_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == WRITTEN


def test_a_folder_that_could_not_be_made_durable_is_there_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, iter(range(100))

    def failing(fd: int) -> None:
        if next(calls) == 8:  # the parent folder, after the renaming
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "out", sync=True)
    assert unsigned(tmp_path / "out") == {**WRITTEN, **state(tmp_path / "out", "a.bin")}
    unfinished.tidy(tmp_path / "out")
    assert contents(tmp_path / "out") == WRITTEN
    assert not is_unfinished(tmp_path / "out")


def test_the_remains_of_a_killed_run_are_replaced(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    (partial / "sub").mkdir(parents=True)
    (partial / MARKER).write_bytes(unfinished.content_of_lock(b"killed", b""))
    for name in ("old.bin", "sub/old.txt"):
        (partial / name).write_text("old")
    (partial / "link").symlink_to(tmp_path)
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == WRITTEN
    assert os.listdir(tmp_path) == ["out"]


def interrupted(out: Path, identity: str = "mine", *, kind: type[BaseException] = KeyboardInterrupt) -> None:
    """One file complete, one begun, one of the small ones there."""

    def run() -> None:
        with new(out, identity, sync=False) as folder:
            done = create(folder, "a.bin", b"head", 10, lambda: b"learnt")
            begun = create(folder, "b.bin", b"", 10)
            done.write(b"456789", 4)
            begun.write(b"xx", 3)
            folder.add("c.json", [b"{}"])
            raise kind

    with pytest.raises(kind):
        run()


def test_what_is_complete_is_kept_for_the_same_operation(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out)
    partial = out.with_name("out.partial")
    assert unsigned(partial) == {"a.bin": b"head456789", **state(partial, "a.bin")}
    assert unfinished.read_kept(out) == b"kept"
    with new(out) as folder:
        assert folder.finished == {"a.bin": b"learnt"}
        create(folder, "b.bin", b"0123456789", 10)
        folder.commit()
    assert contents(out) == {"a.bin": b"head456789", "b.bin": b"0123456789"}


def test_what_is_complete_is_not_thrown_away_for_another_operation(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, "theirs 1")
    before = contents(partial_path(out))
    with pytest.raises(StoreError, match=f"1 complete files of another operation. Finish .* `ires rollback {out}`"):
        write(out)
    assert contents(partial_path(out)) == before
    with new(out, "theirs 2") as folder:  # the same, and not to be trusted
        assert folder.finished == {}
    assert os.listdir(tmp_path) == []
    interrupted(out, "theirs")
    with new(out, "theirs 2") as folder:  # the same, and durable
        assert folder.finished == {"a.bin": b"learnt"}
    unfinished.discard(out)
    assert os.listdir(tmp_path) == []


def test_what_bad_input_made_is_worthless(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", kind=ValueError)
    assert os.listdir(tmp_path) == []


def test_a_file_without_its_record_is_made_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    (tmp_path / "out.partial" / ".ires-a.bin.done").unlink()
    with new(tmp_path / "out", "another") as folder:
        assert folder.finished == {}


@pytest.mark.parametrize("data", [b"head45678", b"HEAD456789"])
def test_a_file_that_was_changed_since_is_made_again(tmp_path: Path, data: bytes) -> None:
    interrupted(tmp_path / "out")
    time.sleep(0.01)
    (tmp_path / "out.partial" / "a.bin").write_bytes(data)
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == WRITTEN


def test_an_empty_folder_in_the_way_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    write(tmp_path / "out")
    assert contents(tmp_path / "out") == WRITTEN


def test_what_is_being_written_cannot_be_discarded(tmp_path: Path) -> None:
    with new(tmp_path / "out") as folder:
        with pytest.raises(StoreError, match="another process is writing it"):
            unfinished.discard(tmp_path / "out")
        create(folder, "a.bin", b"x", 1)
        folder.commit()
    assert contents(tmp_path / "out") == {"a.bin": b"x"}


def test_a_file_that_is_not_complete_cannot_be_committed(tmp_path: Path) -> None:
    def run() -> None:
        with new(tmp_path / "out") as folder:
            create(folder, "a.bin", b"x", 4)
            folder.commit()

    with pytest.raises(AssertionError, match=r"a.bin: 3 bytes were not written"):
        run()
    assert os.listdir(tmp_path) == []


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="is in the way"):
        write(tmp_path / "out")
    assert contents(partial) == {"thesis.txt": b"mine"}
    (partial / "thesis.txt").rename(tmp_path / "thesis.txt")
    partial.rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / MARKER).write_text("")
    partial.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is in the way"):
        write(tmp_path / "out")
    assert (tmp_path / "elsewhere" / MARKER).exists()
    partial.unlink()
    partial.write_text("a file")
    with pytest.raises(StoreError, match="is in the way"):
        write(tmp_path / "out")


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with new(tmp_path / "out") as folder:
        create(folder, "a.bin", b"x", 1)
        with pytest.raises(StoreError, match="another process is writing it"):
            write(tmp_path / "out")
        assert unsigned(folder.partial) == {".ires-a.bin.tmp": b"x", **state(folder.partial)}
        folder.commit()
    assert contents(tmp_path / "out") == {"a.bin": b"x"}


def test_a_folder_that_is_finished_just_now_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process removes its marker, or makes a new one, between our look at it and our lock on it."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / MARKER).write_text("")
    (partial / "theirs.bin").write_text("data")
    flock = fcntl.flock

    def finish(fd: int, operation: int) -> None:
        (partial / MARKER).unlink()
        (partial / MARKER).write_text("new")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", finish)
    with pytest.raises(StoreError, match=r"another process has just ended there\. Give the command again"):
        write(tmp_path / "out")
    assert (partial / "theirs.bin").read_text() == "data"


@pytest.mark.parametrize("make", ["file", "full", "link", "dangling", "no parent", "weights", "root"])
def test_destinations_that_are_refused(tmp_path: Path, make: str) -> None:
    out = tmp_path / "out"
    if make == "file":
        out.write_text("")
    elif make == "full":
        out.mkdir()
        (out / "x").write_text("")
    elif make == "link":
        (tmp_path / "there").mkdir()
        out.symlink_to(tmp_path / "there")
    elif make == "dangling":
        out.symlink_to(tmp_path / "nowhere")
    out = {"no parent": tmp_path / "no" / "out", "weights": tmp_path / "out.safetensors", "root": Path("/")}.get(
        make, out
    )
    with pytest.raises(StoreError, match=str(out)):
        check_destination(out, [])


def test_destinations_in_or_at_an_input_are_refused(tmp_path: Path) -> None:
    model, partial = tmp_path / "model", tmp_path / "out.partial"
    model.mkdir()
    partial.mkdir()
    (tmp_path / "alias").symlink_to(model)
    for out in (model, model / "out", tmp_path / "alias" / "out"):
        with pytest.raises(StoreError, match="lies in the input"):
            check_destination(out, [model])
    with pytest.raises(StoreError, match="has the name that the unfinished output would get"):
        check_destination(tmp_path / "out", [partial])
    check_destination(tmp_path / "out", [model])
    check_destination(tmp_path / "model-2", [model, model / "model.safetensors"])
    (tmp_path / "empty").mkdir()
    check_destination(tmp_path / "empty", [model])
    write(tmp_path / "empty")
    assert contents(tmp_path / "empty") == WRITTEN


def test_paths_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_destination(Path("out"), [])
    write(Path("out"), sync=True)
    assert contents(tmp_path / "out") == WRITTEN
    assert partial_path(Path("out")) == Path("out.partial")


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(StoreError, match="mount point"):
        check_destination(tmp_path / "out", [])
