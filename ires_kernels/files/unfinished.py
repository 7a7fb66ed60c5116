"""An unfinished folder, ``OUT.partial`` beside OUT: the names in it, and what says whose it is.

In it a file is called ``.ires-NAME.tmp`` until it is complete and durable. A record of its size and time, and of what
was learnt while it was written, is made durable as ``.ires-NAME.done`` before that; so a file under its own name, which
is what its record says, is never written again by the run that takes up an interrupted one. The lock file says whose
folder it is: it holds the identity of the operation and is held with flock while a process works.

What is found there is taken up only if it is ours: folder, lock and files by their owner, and what the lock and the
records say by its signature.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ires_kernels.files import trust
from ires_kernels.files.durable import HIDDEN, fsync_folder, remove_from
from ires_kernels.files.locks import lock
from ires_kernels.files.opening import MAX_MANIFEST, read_open
from ires_kernels.files.ownership import Foreign, StoreError, check_owner, open_folder, open_own, unproved
from ires_kernels.files.transfer import named

MARKER = ".ires-lock"
"""The lock file: lines with the identity of the operation and the signature, then what was given to keep there."""
FINISHING = ".ires-finishing"
"""The lock of who finishes a folder that several processes have filled; see shared.py."""
WORKING = ".ires-working-"
"""What the names of notes begin with, of how far one of several processes is."""
_SUFFIX = ".partial"
TEMPORARY, RECORD, PART = ".tmp", ".done", ".part"


def partial_path(out: Path) -> Path:
    """Where `out` is written until it is complete."""
    if out.name in ("", ".."):  # of a path such as "."
        out = Path(os.path.realpath(out))
    return out.parent / f"{out.name}{_SUFFIX}"


def is_unfinished(folder: Path) -> bool:
    """Whether `folder` is the remains of a run that never finished, or one under way."""
    return os.path.exists(folder / MARKER) and os.path.realpath(folder).endswith(_SUFFIX)


def content_of_lock(identity: bytes, keep: bytes) -> bytes:
    return b"\n".join([identity, trust.sign("folder", identity + b"\n" + keep).encode(), keep])


def read_lock(fd: int, folder: Path) -> tuple[bytes, bytes]:
    """Identity, and what was kept, of a lock file that we have written. Raises Foreign for any other."""
    return told_by_lock(read_open(fd, MAX_MANIFEST, folder / MARKER), folder)


def told_by_lock(content: bytes, folder: object) -> tuple[bytes, bytes]:
    """`read_lock` of what is in one."""
    identity, _, rest = content.partition(b"\n")
    signature, _, keep = rest.partition(b"\n")
    if not trust.is_mine("folder", identity + b"\n" + keep, signature.decode(errors="replace")):
        raise unproved(folder)
    return identity, keep


def is_unused(names: Iterable[str]) -> bool:
    """Whether an unfinished folder has nothing in it: a run ended as it began."""
    return set(names) <= {MARKER}


def records_in(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of a folder that have their names, and the records that may be theirs: one for each who has made it."""
    names = sorted(names)
    found: dict[str, list[str]] = {name: [] for name in names}
    for hidden in names:
        if hidden.startswith(HIDDEN) and hidden.endswith(RECORD):
            name = hidden.removeprefix(HIDDEN).removesuffix(RECORD)
            each = found.get(name, found.get(name.rpartition(".")[0], []))
            each.append(hidden)
    return {name: each for name, each in found.items() if each}


def reserved_in(partial: Path, files: Collection[str]) -> dict[str, tuple[list[Path], bool]]:
    """Of an unfinished folder those of `files` that are there: where, and whether each is complete.

    What is not may be there several times, as each process that makes it has its own.
    """
    names = os.listdir(partial)
    found = {name: ([partial / name], True) for name in records_in(names) if name in files}
    for hidden in names:
        if hidden.startswith(HIDDEN) and hidden.endswith(TEMPORARY):
            name = hidden.removeprefix(HIDDEN).removesuffix(TEMPORARY)
            name = name if name in files else name.rpartition(".")[0]
            places, is_complete = found.setdefault(name, ([], False)) if name in files else ([], True)
            if not is_complete:
                places.append(partial / hidden)
    return found


def signed_record(operation: bytes, name: str, content: bytes) -> bytes:
    """What `read_signed_record` gives back, of the same operation and file."""
    return trust.sign("file", _of_file(operation, name, content)).encode() + b"\n" + content


def read_signed_record(path: Path, operation: bytes, name: str) -> bytes | None:
    """What is recorded of a file of an operation; None where that is not there, or not ours."""
    try:
        fd = open_own(path)
    except (FileNotFoundError, Foreign):
        return None
    try:
        return told_by_record(read_open(fd, MAX_MANIFEST, path), operation, name)
    finally:
        os.close(fd)


def told_by_record(record: bytes, operation: bytes, name: str) -> bytes | None:
    """`read_signed_record` of what is in one."""
    signature, _, content = record.partition(b"\n")
    signed = _of_file(operation, name, content)
    return content if trust.is_mine("file", signed, signature.decode(errors="replace")) else None


def _of_file(operation: bytes, name: str, content: bytes) -> bytes:
    """What the signature of a record says: of which operation and file it is."""
    return b"\0".join([operation, name.encode(errors="surrogateescape"), content])


def read_kept(out: Path) -> bytes:
    """What the unfinished output `out` was given to keep in its lock file. Raises Foreign where that is not ours."""
    partial = partial_path(out)
    with _ours(partial) as at, named(partial):
        fd = open_own(partial / MARKER)
        try:
            return read_lock(fd, partial)[1]
        except Foreign:
            if not is_unused(os.listdir(at)):
                raise
            raise StoreError(
                f"{partial}: was left by a merge that ended before it began. Give the command again; or "
                f"`ires rollback {out}` removes it."
            ) from None
        finally:
            os.close(fd)


def discard(out: Path, *, locked: bool = True) -> None:
    """Remove the unfinished output `out`. Raises StoreError when a process is writing it, or when it is not ours."""
    partial = partial_path(out)
    with _ours(partial) as at, named(partial):
        fd = lock(partial / MARKER, wanted=locked)
        try:
            names = os.listdir(at)
            if not is_unused(names):
                read_lock(fd, partial)
            for name in sorted(names, key=MARKER.__eq__):
                remove_from(at, name)
            fsync_folder(partial, fd, needed=False)
        finally:
            os.close(fd)
        partial.rmdir()  # not before: on NFS what is open keeps a name in it
        fsync_folder(partial.parent, needed=False)


def tidy(out: Path) -> None:
    """Remove from the complete folder `out` what only its writing needed, the lock last; nothing of a stranger's."""
    try:
        fd = open_own(out / MARKER)
    except (FileNotFoundError, Foreign):
        return
    try:
        read_lock(fd, out)
    except Foreign:
        return
    finally:
        os.close(fd)
    for name in sorted(os.listdir(out), key=MARKER.__eq__):
        ours = name.endswith((RECORD, TEMPORARY, PART)) or name.startswith(WORKING)
        if name in (MARKER, FINISHING) or (name.startswith(HIDDEN) and ours):
            with suppress(FileNotFoundError):  # another process does the same
                os.unlink(out / name)


@contextmanager
def _ours(partial: Path) -> Iterator[int]:
    """An unfinished folder, open, which is a real one and ours."""
    try:
        at = open_folder(partial)
    except NotADirectoryError:
        raise unproved(partial) from None
    try:
        check_owner(at, partial, unsigned=is_unused(os.listdir(at)))
        yield at
    finally:
        os.close(at)


def notes(partial: Path) -> dict[str, bytes]:
    """What processes have said of how far they are, by rank."""
    found = {}
    names: list[str] = []
    with suppress(FileNotFoundError):  # it has its name by now
        names = sorted(os.listdir(partial))
    for name in names:
        if name.startswith(WORKING) and "." not in name.removeprefix(WORKING):
            with suppress(OSError, ValueError):
                fd = open_own(partial / name)
                try:
                    found[name.removeprefix(WORKING)] = read_open(fd, MAX_MANIFEST, partial / name)
                finally:
                    os.close(fd)
    return found
