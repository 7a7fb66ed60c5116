"""The files of a model that is updated in place: who may be, where they are meanwhile, and how they come back.

Names and bytes only. While an update is unfinished everything that a loader looks for (weights, index, config.json) is
in the hidden folder TARGET/.ires-unfinished, so that nothing takes a half-updated model for one; renaming moves no
bytes. For a target that is a single file it is .NAME.ires-unfinished beside it. The same folder holds the lock, the
journal, the model's files (model/), the new side files until they are installed (new/), the ones they replace (old/),
and what says how far it got:

    operation.json   the weights may be part old, part new. Before it exists nothing was touched
    installing.json  the weights are new; the side files are being replaced
    finished.json    all is new; what is left to do is to move the model's files back
    withdraw.json    the weights' old bytes are being put back; the side files had not been replaced
    rollback.json    the weights' old bytes, and then the side files, are being put back
    restored.json    all is old again; what is left to do is to remove the rest

Every move can be done again: whoever takes up an interrupted one looks at where the files are.

The folder is closed to others; which of them are ours, hidden.py knows.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from ires_kernels.files import trust
from ires_kernels.files.hidden import (
    FOLDERS,
    REPLACED,
    TOKEN,
    UNDO,
    beside,
    folder_of,
    foreign,
    numbered,
    open_hidden,
    phase_of,
    read_own,
    undo_folders,
    why_not_ours,
    work_folder,
)
from ires_kernels.files.locks import lock
from ires_kernels.files.ownership import Foreign, StoreError, is_same, make_private, open_folder, private_mode
from ires_kernels.files.store import MARKER, allocate, fsync_folder, named, remove_from, write_file

_FIXED = (errno.EPERM, errno.EACCES, errno.EBUSY, errno.EXDEV)
"""What the kernel says of a file that may not be moved."""
_COPY = "Copy the model (`cp -rL`) and update the copy, or write a new folder with -o OUT."


def check(target: Path, names: Iterable[str]) -> None:
    """Refuse with StoreError to update these files of `target`, a model folder or a single file."""
    folder = folder_of(target)
    if target.is_symlink():
        raise StoreError(
            f"{target}: is a symbolic link to {os.path.realpath(target)}. Give that path, if it is the model to change."
        )
    cache = _hub_cache(target)
    if cache:
        raise StoreError(f"{target}: lies in the Hugging Face cache {cache}, whose files serve several models. {_COPY}")
    work = work_folder(target)
    strange = foreign(target)
    if work in strange:
        raise Foreign(strange[work])
    mounts = _mount_points()
    for path in (folder / name for name in names):
        if not _is_utf8(path.name):
            raise StoreError(f"{path!r}: its name is not UTF-8, and a manifest cannot tell it. Rename the file.")
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            raise StoreError(f"{path}: is a symbolic link to {os.path.realpath(path)}. {_COPY}")
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{path}: is no regular file. {_COPY}")
        if status.st_nlink > 1:
            raise StoreError(f"{path}: has {status.st_nlink} hard links, so other models change with it. {_COPY}")
        if not status.st_mode & 0o222:
            raise StoreError(f"{path}: is read-only. `chmod u+w` it, if it is to be changed.")
        if os.path.realpath(path) in mounts:  # also of a file of the same file system
            raise StoreError(f"{path}: is a mount point. {_COPY}")
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
        except PermissionError as error:
            raise StoreError(f"{path}: cannot be written: {error.strerror}. {_COPY}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(f"{folder}: no permission to make files in it, which the journal needs. {_COPY}")


class Workplace:
    """The hidden folder of an update, locked by this process. Make one with `begin` or `take`; `close` unlocks it."""

    def __init__(self, target: Path, lock: int, at: int, *, sync: bool = True) -> None:
        self.target = target
        self.folder = folder_of(target)
        self.work = work_folder(target)
        self.model = self.work / "model"
        """Where the model's files are meanwhile."""
        self.sync = sync
        self._lock, self._at = lock, at

    @classmethod
    def begin(cls, target: Path, *, sync: bool = True, locked: bool = True) -> Workplace:
        """Make the folder. Raises StoreError when an update is under way or unfinished, or what is there is not ours.

        locked  False: without the lock, where the user says that no other process works there
        """
        work = work_folder(target)
        token = trust.sign(*TOKEN).encode()  # before anything is there: it may lack a key
        with named(work):
            try:
                os.mkdir(work, private_mode(0o770))
            except FileExistsError:
                place = cls.take(target, locked=locked)
                if place.phase() is not None:
                    place.close()
                    raise StoreError(
                        f"{target}: an update in place is unfinished. `ires resume {target}` finishes it, "
                        f"`ires rollback {target}` takes it back where that is possible."
                    ) from None
                place.remove()  # nothing had begun
                return cls.begin(target, sync=sync, locked=locked)
            try:
                if sync:
                    fsync_folder(work)  # where that cannot be done, it is said before anything else
                fd = lock(work / MARKER, make=True, wanted=locked)
            except OSError:
                os.rmdir(work)
                raise
            try:
                at = open_folder(work)
                os.pwrite(fd, token, 0)
                if sync:
                    os.fsync(fd)
                return cls(target, fd, at, sync=sync)
            except BaseException:
                os.close(fd)
                raise

    @classmethod
    def take(cls, target: Path, *, locked: bool = True) -> Workplace:
        """The folder that an interrupted update left. Raises StoreError when it is in use, or is not ours."""
        work = work_folder(target)
        if not os.path.lexists(work):
            raise StoreError(f"{target}: nothing is unfinished there: no update in place, and no new folder.")
        with named(work):
            at = open_hidden(work)
            try:
                strange = why_not_ours(work)
                if strange:
                    raise Foreign(strange)
                make_private(at)
                fd = lock(work / MARKER, make=MARKER not in os.listdir(at), wanted=locked)
                try:
                    strange = why_not_ours(work)  # again, as it may be another process's by now
                    if strange:
                        raise Foreign(strange)
                    return cls(target, fd, at)
                except BaseException:
                    os.close(fd)
                    raise
            except BaseException:
                os.close(at)
                raise

    def close(self) -> None:
        """Unlock."""
        for fd in (self._lock, self._at):
            if fd >= 0:
                os.close(fd)
        self._lock = self._at = -1

    def phase(self) -> str | None:
        """One of PHASES; None before the first."""
        return phase_of(self.work)

    def read(self) -> bytes:
        """What `write` wrote."""
        path = self.work / f"{self.phase()}.json"
        with named(path):
            return read_own(path)

    def write(self, content: bytes) -> None:
        """Make the update one that has begun: `content` is what it takes to go on with it."""
        path = self.work / "operation.json"
        temporary = path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        # Always synced: without it nobody knows what the folder is.
        write_file(temporary, [content], sync=True, mode=private_mode(0o660))
        with self._here():
            self.model.mkdir(exist_ok=True)
            os.rename(temporary, path)
            fsync_folder(self.work, needed=self.sync)
            fsync_folder(self.folder, needed=self.sync)

    def advance(self, phase: str) -> None:
        """Go on to another phase."""
        with self._here():
            self._sync(self.work, self.folder)
            os.rename(self.work / f"{self.phase()}.json", self.work / f"{phase}.json")
            self._sync(self.work)

    def check_movable(self, names: Iterable[str]) -> None:
        """Refuse with StoreError files of the model that cannot be moved away, before the first of them is.

        The kernel is asked to move each of them over a folder. It looks first at whether the file may be moved at all
        (sticky folders, flags such as `chattr +i`, mounts), and then refuses, because a folder is there.
        """
        mounts = _mount_points()
        for name in names:
            path = self.folder / name
            for parent in [parent for parent in path.parents if self.folder in parent.parents]:
                if os.path.lexists(parent) and (parent.is_symlink() or not parent.is_dir()):
                    raise StoreError(f"{parent}: is no folder but a link or file, and {path.name} goes there. {_COPY}")
                if parent.is_dir() and not os.access(parent, os.W_OK | os.X_OK):
                    raise StoreError(f"{parent}: no permission to replace {path.name} in it. {_COPY}")
            try:
                os.rename(path, self.work)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST):
                    if error.errno not in _FIXED:
                        raise
                    whose = trust.stranger(os.lstat(path))
                    raise StoreError(
                        f"{path}: cannot be moved or replaced: {error.strerror}{whose and f' (it {whose})'}. {_COPY}"
                    ) from None
            if os.path.realpath(path.parent) + "/" + path.name in mounts:
                raise StoreError(f"{path}: is a mount point. {_COPY}")

    def reserve(self, size: int) -> None:
        """Take room that `release` gives back. Raises OSError where there is none."""
        path = self.work / "reserve"
        with named(path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, private_mode(0o660))
            try:
                allocate(fd, size, path)
            finally:
                os.close(fd)

    def release(self) -> None:
        """Give the room back."""
        (self.work / "reserve").unlink(missing_ok=True)

    def move_in(self, names: Iterable[str]) -> None:
        """Hide the files of the model."""
        self._move(self.folder, self.model, names)

    def move_out(self, names: Iterable[str]) -> None:
        """Give the files of the model back."""
        self._move(self.model, self.folder, names)

    def _move(self, source: Path, target: Path, names: Iterable[str]) -> None:
        with self._here():
            for name in names:
                if (source / name).exists():
                    if (target / name).exists():
                        whose = trust.stranger(os.lstat(target / name))
                        raise StoreError(
                            f"{source / name} and {target / name} are both there, and one of them is the file that is "
                            f"updated. Move the other one elsewhere{whose and f', or have it removed: it {whose}'}."
                        )
                    _rename(source / name, target / name)
            self._sync(*(folder for folder in (target, source) if folder.exists()))

    def stage(self, name: str, chunks: Iterable[bytes], mode: int = 0o666) -> None:
        """Keep a side file for `install`. `name` may have folders in it."""
        path = self.work / "new" / name
        with self._here():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of a run that was interrupted
            write_file(path, chunks, sync=self.sync, mode=mode)
            self._sync(*_folders(self.work, path), self.work)

    def install(self, names: Iterable[str], dropped: Iterable[str] = ()) -> None:
        """Put staged files where they belong. What they replace, and the `dropped` files, go to old/."""
        dropped = list(dropped)
        with self._here():
            for name in [*names, *dropped]:
                place, new, old = self.folder / name, self.work / "new" / name, self.work / "old" / name
                if not os.path.lexists(new) and name not in dropped:
                    continue  # it is there already
                self._check_parents(place)
                if os.path.lexists(place) and not os.path.lexists(old):
                    old.parent.mkdir(parents=True, exist_ok=True)
                    _rename(place, old)
                if os.path.lexists(new):
                    _take_after(new, old)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    _rename(new, place)
                    self._sync(*_folders(self.folder, place))
            self._sync_below("old")
            self._sync(self.folder)

    def uninstall(self, names: Iterable[str], dropped: Iterable[str], is_ours: Callable[[str], bool]) -> None:
        """Take `install` back. What has come in place of the files since, `is_ours` not being true of it, is kept."""
        dropped = list(dropped)
        with self._here():
            for name in [*names, *dropped]:
                place, new, old = self.folder / name, self.work / "new" / name, self.work / "old" / name
                theirs = self.work / "edited" / name
                if os.path.lexists(place) and not os.path.lexists(new) and not os.path.lexists(theirs):
                    if name in dropped:
                        to = theirs if os.path.lexists(old) else None  # else it is the old one, back already
                    else:
                        to = new if is_ours(name) else theirs
                    if to is not None:
                        self._check_parents(place)
                        to.parent.mkdir(parents=True, exist_ok=True)
                        _rename(place, to)
                if os.path.lexists(old):
                    self._check_parents(place)
                    _rename(old, place)
                else:
                    with suppress(OSError):  # there are other files in one, or it never was
                        for folder in _folders(self.folder, place):
                            folder.rmdir()
            self._sync_below("edited")
            self._sync(self.folder)

    def left_over(self) -> list[str]:
        """Those of old/ and edited/ that have files, which are not to be lost."""
        tops = [self.work / "old", self.work / "edited"]
        return [top.name for top in tops if any(names for _, _, names in os.walk(top))]

    def keep(self) -> Path:
        """End the update, but keep all that taking it back needs; returns where."""
        kept = self._next(UNDO)
        with self._here():
            os.rename(self.work, kept)
            self._sync(self.folder)
        self.close()
        return kept

    def remove(self, *, drop: Sequence[str] = ()) -> Path | None:
        """End the update, and keep only what is `left_over`, `drop` apart; returns where that is."""
        kept = None
        with self._here():
            for name in drop:
                (self.work / "old" / name).unlink(missing_ok=True)
            for top in self.left_over():
                kept = self._next(REPLACED)
                os.rename(self.work / top, kept)
                self._sync(self.folder)
            phase = self.phase()
            names = set(os.listdir(self._at))
            model = os.listdir(self.model) if "model" in names else []
            known = {"journal", "log", "reserve", "operation.tmp", MARKER, *FOLDERS}
            strange = [*(names - known - {f"{phase}.json"}), *model]
            if strange:
                raise StoreError(f"{self.work}: holds {', '.join(sorted(strange))}. Move that to where it belongs.")
            for name in names - {MARKER, f"{phase}.json"}:
                remove_from(self._at, name)
            self._sync(self.work)
            if phase is not None:
                os.unlink(f"{phase}.json", dir_fd=self._at)
            os.unlink(MARKER, dir_fd=self._at)
            try:
                self.work.rmdir()
            except OSError as error:  # another process has just begun in it
                if error.errno != errno.ENOTEMPTY:
                    raise
            self._sync(self.folder)
        self.close()
        return kept

    @contextmanager
    def _here(self) -> Iterator[None]:
        """While files are moved: the hidden folder is the one that we have locked."""
        with named(self.work):
            if not is_same(self._at, self.work):
                raise StoreError(f"{self.work}: was moved or replaced while it was in use. Put it back, then go on.")
            yield

    def _check_parents(self, place: Path) -> None:
        """A side file goes into a folder of the model, and not through a link out of it."""
        for parent in _folders(self.folder, place):
            if parent.is_symlink():
                raise StoreError(f"{parent}: is a link, wanted a folder. Move it away, then go on.")

    def _next(self, kind: str) -> Path:
        """A name for what is kept: after our own, and past a stranger's, which may have any number."""
        ours = undo_folders(self.target)
        last = max((number for number, path in numbered(self.target, kind) if path in ours), default=0)
        names = (beside(self.target, f"{kind}-{number}") for number in count(last + 1))
        return next(name for name in names if not os.path.lexists(name))

    def _sync(self, *folders: Path) -> None:
        if self.sync:
            for folder in folders:
                fsync_folder(folder, self._lock)

    def _sync_below(self, name: str) -> None:
        for folder, _, _ in os.walk(self.work / name):
            self._sync(Path(folder))


def take_undo(target: Path, *, locked: bool = True) -> Workplace:
    """Make the last undo that was kept the unfinished update that it was."""
    kept = undo_folders(target)[-1]
    work = work_folder(target)
    if os.path.lexists(work):
        raise StoreError(f"{work}: is in the way. Move it away or delete it.")
    with named(kept):
        os.rename(kept, work)
        fsync_folder(folder_of(target), needed=False)
    return Workplace.take(target, locked=locked)


def _rename(source: Path, target: Path) -> None:
    """Move a file of the model; where the kernel refuses that, say whose file is there, or in its way."""
    try:
        os.rename(source, target)
    except PermissionError as error:
        for path in (source, target):
            whose = trust.stranger(os.lstat(path)) if os.path.lexists(path) else ""
            if whose:
                text = f"{error.strerror}: it {whose}, and came there meanwhile. Have it removed by them, then go on"
                raise OSError(error.errno, text, f"{path}") from None
        raise


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _folders(top: Path, path: Path) -> list[Path]:
    """The folders between `top` and a path in it, from the inside out."""
    return [folder for folder in path.parents if top in folder.parents]


def _take_after(new: Path, old: Path) -> None:
    """Give a file the mode and, where allowed, the owner of the one that it replaces."""
    if not old.is_symlink() and old.exists():
        status = old.stat()
        try:
            os.chmod(new, stat.S_IMODE(status.st_mode))
        except PermissionError:  # another user who shares the key has staged it
            return
        if (status.st_uid, status.st_gid) != (os.getuid(), os.getgid()):
            try:
                os.chown(new, status.st_uid, status.st_gid)
            except OSError as error:  # only root may give files away, and not to users that a container does not know
                if error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise


def _mount_points() -> set[str]:
    try:
        table = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return set()
    fields = [line.split(" ")[4] for line in table.splitlines()]
    return {re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field) for field in fields}


def _hub_cache(target: Path) -> Path | None:
    """The cache of the Hugging Face Hub that `target` lies in, by its settings or by its looks."""
    real = Path(os.path.realpath(target))
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    settings = [os.environ.get("HF_HUB_CACHE"), os.environ.get("HUGGINGFACE_HUB_CACHE"), os.path.join(home, "hub")]
    for cache in (Path(os.path.realpath(path)) for path in settings if path):
        if cache in real.parents:
            return cache
    for parent in real.parents:
        if parent.name in ("snapshots", "blobs") and parent.parent.name.startswith(("models--", "datasets--")):
            return parent.parent.parent
    return None
