"""Folders that others can write to: names that were there before us, locks, modes, and files that cannot be moved."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_models import snapshot, triple

import ires_kernels as ik
from ires_kernels.cli import main
from ires_kernels.files import destination, durable, journal, locks, moving, new_folder, trust, unfinished
from ires_kernels.files.ownership import Foreign, StoreError

VICTIM, MALLORY, GROUP = 65533, 65534, 65500
FILES = {"tokenizer.json": "{}", "merges.txt": ""}


@pytest.fixture
def tmp_path(open_folder: Path) -> Path:
    return open_folder


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, instruct and target; the instruct model has another tokenizer."""
    paths = triple(tmp_path / "models", shards=2, files=FILES)
    (paths[1] / "tokenizer.json").write_text("{  }")
    for path in (tmp_path / "models").rglob("*"):  # safetensors makes its files private
        path.chmod(0o755 if path.is_dir() else 0o644)
    return paths


def own(path: Path, uid: int, gid: int | None = None) -> None:
    for each in [path, *path.rglob("*")]:
        os.chown(each, uid, uid if gid is None else gid, follow_symlinks=False)


def as_user(uid: int, function: Callable[[], Any], *, groups: tuple[int, ...] = (), key: Path | None = None) -> Any:
    """What the function returns, or raises, in a process of that user with a state directory of its own."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            state = Path(f"/tmp/ires-tests-{uid}-{os.getppid()}")
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            os.umask(0o007 if groups else 0o022)
            os.environ["XDG_STATE_HOME"] = f"{state}"
            os.environ[trust.VARIABLE] = f"{key or ''}"
            trust._keys.clear()
            try:
                outcome: Any = function()
            except BaseException as error:
                outcome = error
                traceback.print_exc()
            os.write(write, pickle.dumps(outcome))
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        outcome = pickle.loads(file.read())
    os.waitpid(pid, 0)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder like /tmp."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    yield folder
    for uid in (VICTIM, MALLORY):
        shutil.rmtree(f"/tmp/ires-tests-{uid}-{os.getpid()}", ignore_errors=True)


def plant(path: Path, kind: str) -> None:
    """As the process that calls it, with everything that an unfinished merge has."""
    os.umask(0)
    if kind == "file":
        path.write_text("")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.with_name("elsewhere").mkdir()
        (path.with_name("elsewhere") / ".ires-lock").write_text("")
        path.symlink_to(path.with_name("elsewhere"))
    else:
        path.mkdir()
    if kind in ("state", "closed"):
        (path / ".ires-lock").write_bytes(unfinished.content_of_lock(b"x", b"{}"))
        (path / "model-00001-of-00002.safetensors").write_bytes(b"evil")
        (path / "operation.json").write_bytes(trust.seal("operation", b"{\n}"))
    if kind == "closed":
        path.chmod(0o700)


KINDS = ["file", "fifo", "link", "empty", "state", "closed"]


@pytest.mark.root
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["new folder", "in place", "in place, one file"])
def test_names_that_another_user_has_planted(
    models: tuple[Path, Path, Path], shared: Path, kind: str, where: str
) -> None:
    base, instruct, target = models
    target = Path(shutil.move(target, shared / "target"))
    own(target, VICTIM)
    target.chmod(0o1777)
    out = shared / "out"
    if where == "in place, one file":
        target = target / "model-00001-of-00002.safetensors"
    hidden = {
        "new folder": shared / "out.partial",
        "in place": target / ".ires-unfinished",
        "in place, one file": target.with_name(f".{target.name}.ires-unfinished"),
    }[where]
    as_user(MALLORY, lambda: plant(hidden, kind))
    before = snapshot(shared)
    options: dict[str, Any] = {"out": out} if where == "new folder" else {"in_place": True}
    if where == "in place, one file":
        base, instruct = base / target.name, instruct / target.name
    with pytest.raises(StoreError, match=r"uid 65534|in the way|no valid signature") as caught:
        as_user(VICTIM, lambda: ik.apply(target, (instruct, base), **options))
    if kind in ("empty", "state", "closed"):
        assert "uid 65534" in f"{caught.value}"
    for command in (ik.resume, ik.rollback):
        with pytest.raises(StoreError, match=r"uid 65534|in the way|no valid signature|nothing is unfinished there"):
            as_user(VICTIM, lambda: command(target if "in_place" in options else out))  # noqa: B023
    assert snapshot(shared) == before
    if where == "in place" and kind != "closed":
        assert as_user(VICTIM, lambda: ik.inspect(target)["kind"]) == "model"


@pytest.mark.root
def test_what_is_unfinished_is_closed_to_others(models: tuple[Path, Path, Path], shared: Path) -> None:
    """Nobody else can open the lock, so nobody can hold it; and no file can be put there."""
    base, instruct, target = models
    modes = []

    def look(*_: int) -> None:
        for path in [*shared.glob("out.partial"), *shared.glob("target/.ires-unfinished")]:
            files = [file for file in path.rglob(".ires-*") if file.is_file()] + [
                path / name for name in ("journal", "log", "operation.json") if (path / name).exists()
            ]
            modes.append(({path.stat().st_mode & 0o777}, {file.stat().st_mode & 0o077 for file in files}))

    shutil.copytree(target, shared / "target")
    old = os.umask(0)
    try:
        ik.apply(target, (instruct, base), out=shared / "out", progress=look)
        ik.apply(shared / "target", (instruct, base), in_place=True, progress=look)
    finally:
        os.umask(old)
    assert modes
    assert all(folder == {0o700} for folder, _ in modes)
    assert {0} in [files for _, files in modes]
    assert (shared / "out").stat().st_mode & 0o777 == 0o755  # no wider than the target


@pytest.mark.root
@pytest.mark.parametrize("name", ["tokenizer.json", "ires.json", "SHA256SUMS", "merges.txt", "config.json"])
def test_side_files_of_another_user_are_found_before_the_first_byte(
    models: tuple[Path, Path, Path], shared: Path, name: str
) -> None:
    """In a sticky folder of a third user they can be neither replaced nor moved away."""
    base, instruct, target = models
    (instruct / "merges.txt").unlink()
    target = Path(shutil.move(target, shared / "target"))
    own(target, VICTIM)
    os.chown(target, 0, 0)
    target.chmod(0o1777)
    (target / name).write_text("{}")
    os.chown(target / name, MALLORY, MALLORY)
    (target / name).chmod(0o666)
    before = snapshot(target)
    apply = lambda: ik.apply(target, (instruct, base), in_place=True, sha256=name == "SHA256SUMS")  # noqa: E731
    with pytest.raises(StoreError, match=rf"{name}: cannot be moved or replaced: .*uid 65534"):
        as_user(VICTIM, apply)
    assert snapshot(target) == before
    assert os.listdir(target / ".ires-unfinished") == [] if (target / ".ires-unfinished").exists() else True
    (target / name).unlink()
    if name == "config.json":
        shutil.copy(base / name, target / name)
        os.chown(target / name, VICTIM, VICTIM)
    as_user(VICTIM, lambda: bool(apply()))


@pytest.mark.root
@pytest.mark.parametrize("how", ["immutable", "append only", "bind mount", "mounted folder"])
def test_files_that_cannot_be_moved(models: tuple[Path, Path, Path], how: str) -> None:
    base, instruct, target = models
    if how == "mounted folder":
        for model in (instruct, target):
            (model / "additional_chat_templates").mkdir()
            (model / "additional_chat_templates" / "x.jinja").write_text(model.name)
        place = target / "additional_chat_templates"
    else:
        place = target / "tokenizer.json"
    do, undo = {
        "immutable": (["chattr", "+i"], ["chattr", "-i"]),
        "append only": (["chattr", "+a"], ["chattr", "-a"]),
    }.get(how, (["mount", "--bind", f"{place}"], ["umount"]))
    if subprocess.run([*do, f"{place}"], capture_output=True).returncode:
        pytest.skip(f"{do[0]} does not work here")
    try:
        before = snapshot(target)
        with pytest.raises(StoreError, match=r"cannot be moved or replaced|mount point"):
            ik.apply(target, (instruct, base), in_place=True)
        assert snapshot(target) == before
        assert not (target / ".ires-unfinished").exists()
    finally:
        subprocess.run([*undo, f"{place}"], check=True)
    ik.apply(target, (instruct, base), in_place=True)
    assert ik.verify(target)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL])
def test_a_chown_that_is_refused_is_no_failure(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    base, instruct, target = models

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "chown", refuse)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    ik.apply(target, (instruct, base), in_place=True)
    assert ik.verify(target)


def test_a_side_file_does_not_go_through_a_link(tmp_path: Path, models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    (instruct / "additional_chat_templates").mkdir()
    (instruct / "additional_chat_templates" / "x.jinja").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (target / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="additional_chat_templates"):
        ik.apply(target, (instruct, base), in_place=True, follow_links=True)
    assert not os.listdir(tmp_path / "elsewhere")
    assert not (target / ".ires-unfinished").exists()


def begun(target: Path, pair: tuple[Path, Path], out: Path) -> None:
    """Begin an output that ends with its weights complete."""

    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(new_folder.NewFolder, "finish_files", cut)
        with pytest.raises(KeyboardInterrupt):
            ik.apply(target, pair, out=out, threads=1)


def cut_off(target: Path, pair: tuple[Path, Path]) -> None:
    """Begin an update that ends in the middle."""

    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.Journal, "complete", cut)
        with pytest.raises(KeyboardInterrupt):
            ik.apply(target, pair, in_place=True, threads=1)


@pytest.mark.root
def test_users_who_share_a_key_go_on_with_what_others_began(models: tuple[Path, Path, Path], shared: Path) -> None:
    base, instruct, target = models
    group = shared / "group"
    group.mkdir()
    target = Path(shutil.copytree(target, group / "target"))
    own(group, VICTIM, GROUP)
    for path in [group, *group.rglob("*")]:
        path.chmod(0o2770 if path.is_dir() else 0o660)
    key = group / "key"
    key.write_bytes(os.urandom(32))
    os.chown(key, VICTIM, GROUP)
    key.chmod(0o640)
    as_user(VICTIM, lambda: cut_off(target, (instruct, base)), groups=(GROUP,), key=key)
    with pytest.raises(Foreign, match="Users who share a key"):
        as_user(MALLORY, lambda: ik.resume(target), groups=(GROUP,))
    assert as_user(MALLORY, lambda: ik.status(target).state, groups=(GROUP,), key=key) == "unfinished"
    as_user(MALLORY, lambda: bool(ik.resume(target)), groups=(GROUP,), key=key)
    assert ik.verify(target)
    as_user(VICTIM, lambda: begun(base, (instruct, base), group / "new"), groups=(GROUP,), key=key)
    with pytest.raises(Foreign, match="Users who share a key"):
        as_user(MALLORY, lambda: ik.resume(group / "new"), groups=(GROUP,))
    report = as_user(MALLORY, lambda: ik.resume(group / "new"), groups=(GROUP,), key=key)
    assert report.numbers()
    assert ik.verify(group / "new")
    empty = group / "out.partial"
    empty.mkdir()  # nothing signed is in it, so the key proves nothing
    empty.chmod(0o777)
    with pytest.raises(Foreign, match="uid 0"):
        as_user(VICTIM, lambda: ik.apply(base, (instruct, base), out=group / "out"), groups=(GROUP,), key=key)


def test_modes_that_cannot_be_set_are_no_failure(
    tmp_path: Path, models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchmod", refuse)
    (tmp_path / "out.partial").mkdir(mode=0o755)
    ik.apply(target, (instruct, base), out=tmp_path / "out")
    assert ik.verify(tmp_path / "out")
    with ik.mapped(target, write=True) as tensors:  # which keeps a copy with the mode of the file
        assert len(tensors)


@pytest.mark.root
def test_root_goes_on_for_a_user_with_their_key(models: tuple[Path, Path, Path], shared: Path) -> None:
    base, instruct, target = models
    target = Path(shutil.copytree(target, shared / "target"))
    own(target, VICTIM)
    as_user(VICTIM, lambda: cut_off(target, (instruct, base)))
    key = Path(f"/tmp/ires-tests-{VICTIM}-{os.getpid()}/ires_kernels/key")
    with pytest.raises(Foreign, match=f"uid {VICTIM}"):
        ik.resume(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "_keys", {})
        patch.setenv(trust.VARIABLE, f"{key}")
        ik.resume(target)
    assert ik.verify(target)


@pytest.mark.root
def test_files_that_are_shown_as_those_of_nobody(
    models: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS with root_squash: what root makes there is another's, and so is what root makes now."""
    base, instruct, target = models
    cut_off(target, (instruct, base))
    real = os.fstat

    def squashed(fd: int) -> os.stat_result:
        found = real(fd)
        under = os.readlink(f"/proc/self/fd/{fd}").startswith(f"{tmp_path}/models")
        return os.stat_result([*found[:4], MALLORY, *found[5:]], {}) if under and not found.st_uid else found

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", squashed)
        assert ik.status(target).state == "unfinished"
    ik.resume(target)


# --- locks


def test_a_lock_that_is_held_says_by_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / ".ires-lock"
    path.parent.mkdir()
    fd = locks.lock(path, make=True)
    assert path.stat().st_mode & 0o777 == 0o600
    slept: list[float] = []
    monkeypatch.setattr("ires_kernels.files.locks.time", SimpleNamespace(sleep=slept.append))
    with pytest.raises(StoreError, match=rf"another process is writing it, process {os.getpid()} \(.*\) of .*uid"):
        locks.lock(path)
    assert sum(slept) < 1
    assert locks.holder(path).startswith(f"process {os.getpid()} (")
    os.close(fd)
    assert locks.holder(path) == ""
    os.close(locks.lock(path))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks(
    tmp_path: Path,
    models: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
) -> None:
    base, instruct, target = models

    def none(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    pair = ["--instruct", f"{instruct}", "--base", f"{base}"]
    before = snapshot(tmp_path)
    for where in (["-o", f"{tmp_path}/out"], ["--in-place"]):
        assert main(["apply", f"{target}", *pair, *where]) == 3
        assert "has no locks (flock). Where no other process writes there, --no-lock" in capsys.readouterr().err
        assert snapshot(tmp_path) == before
        assert not (tmp_path / "out.partial").exists()
        assert not (target / ".ires-unfinished").exists()
    for where in (["-o", f"{tmp_path}/out"], ["--in-place"]):
        assert main(["apply", f"{target}", *pair, *where, "--no-lock"]) == 0, capsys.readouterr().err
    assert ik.verify(target)
    assert ik.verify(tmp_path / "out", hashes_only=True)


def test_folders_that_cannot_be_synced(
    tmp_path: Path,
    models: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, instruct, target = models
    fsync = os.fsync

    def of_files(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", of_files)
    pair = ["--instruct", f"{instruct}", "--base", f"{base}"]
    before = snapshot(tmp_path)
    for where in (["-o", f"{tmp_path}/out"], ["--in-place"]):
        assert main(["apply", f"{target}", *pair, *where]) == 3
        assert "cannot make the names in a folder durable (fsync). --no-sync" in capsys.readouterr().err
        assert snapshot(tmp_path) == before
        assert not (tmp_path / "out.partial").exists()
        assert not (target / ".ires-unfinished").exists()
    for where in (["-o", f"{tmp_path}/out"], ["--in-place", "--keep-undo"]):
        assert main(["apply", f"{target}", *pair, *where, "--no-sync"]) == 0
    assert main(["rollback", f"{target}"]) == 0


# --- modes


def modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize(
    ("private", "file", "folder"),
    [("target", 0o600, 0o700), ("instruct", 0o600, 0o700), ("base", 0o600, 0o700), ("nothing", 0o644, 0o755)],
)
def test_private_inputs_give_private_outputs(
    tmp_path: Path, models: tuple[Path, Path, Path], private: str, file: int, folder: int
) -> None:
    base, instruct, target = models
    if private != "nothing":
        for path in (tmp_path / "models" / private).glob("*.safetensors"):
            path.chmod(0o600)
    old = os.umask(0o002)
    try:
        ik.apply(target, (instruct, base), out=tmp_path / "out", sha256=True)
        if private != "target":
            ik.extract(base, instruct, tmp_path / "residual")
    finally:
        os.umask(old)
    found = modes(tmp_path / "out")
    assert found.pop("out") == folder
    assert set(found.values()) == {file}
    if private in ("base", "instruct"):
        found = modes(tmp_path / "residual")
        assert found.pop("residual") == 0o700
        assert set(found.values()) == {0o600}


@pytest.mark.parametrize("what", ["folder", "side file", "empty out"])
def test_what_is_private_stays_so(tmp_path: Path, models: tuple[Path, Path, Path], what: str) -> None:
    base, instruct, target = models
    out = tmp_path / "out"
    if what == "folder":
        instruct.chmod(0o700)
    elif what == "side file":
        (instruct / "tokenizer.json").chmod(0o600)
    else:
        out.mkdir(mode=0o700)
    ik.apply(target, (instruct, base), out=out)
    found = modes(out)
    assert found["out"] == (0o755 if what == "side file" else 0o700)
    assert found["model-00001-of-00002.safetensors"] == (0o600 if what == "folder" else 0o644)
    assert found["tokenizer.json"] == (0o644 if what == "empty out" else 0o600)


def test_in_place_nothing_is_wider_than_the_weights(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    (target / "tokenizer.json").chmod(0o640)
    (instruct / "vocab.json").write_text("{}")
    for path in target.glob("*.safetensors"):
        path.chmod(0o600)
    ik.apply(target, (instruct, base), in_place=True, undo="all", sha256=True)
    found = modes(target)
    assert found["tokenizer.json"] == 0o640, "as what it replaces"
    assert {found[name] for name in ("ires.json", "SHA256SUMS", "vocab.json")} == {0o600}
    assert found[".ires-undo-1"] == 0o700
    assert found["journal"] == 0o600


def test_an_empty_output_that_only_another_user_can_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sticky" / "out"
    out.mkdir(parents=True)
    out.parent.chmod(0o1777)
    destination.check_destination(out, [])
    monkeypatch.setattr(os, "geteuid", lambda: out.stat().st_uid + 1)
    with pytest.raises(StoreError, match="belongs to another user, in a folder where only they can replace it"):
        destination.check_destination(out, [])


def swap(partial: Path, precious: Path) -> None:
    """What a writer of a folder that is not sticky can do: the name of ours leads elsewhere."""
    partial.rename(partial.with_name("aside"))
    partial.symlink_to(precious)


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of the victim that nobody else can write to."""
    folder = tmp_path / "precious"
    (folder / "inner").mkdir(parents=True)
    (folder / "file").write_text("mine")
    (folder / "inner" / "file").write_text("mine")
    return folder


def test_what_is_removed_is_what_was_locked(
    models: tuple[Path, Path, Path], tmp_path: Path, precious: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    out, before = tmp_path / "out", snapshot(precious)

    def meddle(*_: Any, **__: Any) -> Any:
        swap(unfinished.partial_path(out), precious)
        raise StoreError("an error that makes what is there worthless")

    with monkeypatch.context() as patch:
        patch.setattr(new_folder.NewFolder, "finish_files", meddle)
        with pytest.raises(StoreError, match="worthless"):
            ik.apply(target, (instruct, base), out=out)
    assert snapshot(precious) == before
    assert not list((tmp_path / "aside").iterdir())


def test_what_is_rolled_back_is_what_was_locked(
    models: tuple[Path, Path, Path], tmp_path: Path, precious: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    out, before = tmp_path / "out", snapshot(precious)

    def cut(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    def meddle(_: int, folder: Path) -> Any:
        swap(folder, precious)
        return b"", b""

    with monkeypatch.context() as patch:
        patch.setattr(new_folder.NewFolder, "add", cut)
        with pytest.raises(KeyboardInterrupt):
            ik.apply(target, (instruct, base), out=out)
        patch.setattr(unfinished, "read_lock", meddle)
        with pytest.raises(OSError, match="Not a directory"):
            unfinished.discard(out)
    assert snapshot(precious) == before


def test_links_in_what_is_removed_are_not_followed(tmp_path: Path, precious: Path) -> None:
    before = snapshot(precious)
    (tmp_path / "work" / "new" / "deep").mkdir(parents=True)
    (tmp_path / "work" / "new" / "deep" / "link").symlink_to(precious)
    (tmp_path / "work" / "new" / "file").write_text("")
    folder = os.open(tmp_path / "work", os.O_RDONLY)
    durable.remove_from(folder, "new")
    os.close(folder)
    assert not os.listdir(tmp_path / "work")
    assert snapshot(precious) == before


@pytest.mark.root
@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("name", ["ires.json", "tokenizer.json", "model-00001-of-00002.safetensors"])
def test_files_that_another_user_puts_there_meanwhile(models: tuple[Path, Path, Path], name: str) -> None:
    """Nobody but they can remove them there: whose they are is said, and the update ends when they are gone."""
    base, instruct, target = models
    own(target, VICTIM)
    os.chown(target, 0, 0)
    target.chmod(0o1777)
    (target / "tokenizer.json").unlink()

    def begin() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moving, "install", lambda *_: os.close(-1))
            ik.apply(target, (instruct, base), in_place=True)

    with pytest.raises(OSError, match="Bad file descriptor"):
        as_user(VICTIM, begin)
    (target / name).write_text("evil")
    os.chown(target / name, MALLORY, MALLORY)
    for _ in range(2):
        with pytest.raises((OSError, StoreError), match=rf"it belongs to .*uid {MALLORY}") as refusal:
            as_user(VICTIM, lambda: ik.resume(target) and None)
        assert f"{target / name}" in f"{refusal.value}"
    (target / name).unlink()
    as_user(VICTIM, lambda: ik.resume(target) and None)
    assert as_user(VICTIM, lambda: bool(ik.verify(target)))


@pytest.mark.root
@pytest.mark.parametrize("mask", [0o777, 0o277, 0o137])
def test_a_umask_that_closes_files_to_their_owner(models: tuple[Path, Path, Path], shared: Path, mask: int) -> None:
    base, instruct, target = models
    arguments = ["apply", f"{target}", "--instruct", f"{instruct}", "--base", f"{base}", "-o", f"{shared / 'out'}"]

    def run() -> tuple[int, int]:
        os.umask(mask)
        return main(arguments), os.umask(0)

    assert as_user(VICTIM, run) == (0, mask)
    assert (shared / "out").stat().st_mode & 0o700 == 0o700


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are open keep a name in their folder, as on NFS."""
    unlink, close = os.unlink, os.close
    kept: dict[tuple[int, int], Path] = {}

    def is_open(wanted: os.stat_result) -> bool:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
        return any(os.path.exists(f"/proc/self/fd/{n}") and os.path.samestat(os.stat(n), wanted) for n in numbers)

    def keep(path: Any, *, dir_fd: int | None = None) -> None:
        status = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        if not is_open(status):
            unlink(path, dir_fd=dir_fd)
            return
        folder = Path(path).parent if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}"))
        name = kept[status.st_dev, status.st_ino] = folder / f".nfs{status.st_ino}"
        os.rename(path, name, src_dir_fd=dir_fd)

    def close_and_drop(fd: int) -> None:
        status = os.fstat(fd)
        close(fd)
        if (status.st_dev, status.st_ino) in kept and not is_open(status):
            unlink(kept.pop((status.st_dev, status.st_ino)))

    monkeypatch.setattr(os, "unlink", keep)
    monkeypatch.setattr(os, "close", close_and_drop)


@pytest.mark.usefixtures("nfs")
def test_nothing_is_left_where_open_files_keep_a_name(
    models: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    out = tmp_path / "out"
    ik.apply(target, (instruct, base), in_place=True, undo="all")
    ik.rollback(target)
    assert not list(target.glob(".ires-*"))
    with monkeypatch.context() as patch:
        patch.setattr(new_folder.NewFolder, "add", lambda *_: os.close(-1))
        with pytest.raises(OSError, match="Bad file descriptor"):
            ik.apply(target, (instruct, base), out=out)
    ik.rollback(out)
    assert not unfinished.partial_path(out).exists()
