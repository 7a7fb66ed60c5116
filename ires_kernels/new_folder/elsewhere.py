"""An unfinished folder in a store: what lies under the prefix of an output until all of it is there.

Nothing can be renamed there, so files have their own names from the first. Weights come first, each of them whole or
not at all; then what lies beside them; config, index and manifest last, as these make a model of a folder. Besides
there are, until the end,

    .ires-lock       whose it is, as in a folder on a disk, and which names are written. It is put as a new file, so of
                     two operations that begin at a time only one does
    .ires-NAME.done  of a file that is complete what it is (size, ETag) and what was learnt; the same command goes on
                     with the others

Nobody is kept away by that lock, for a store tells nobody who has died. Two runs of one operation at a time write the
same bytes under the same names, and whoever is last finds all of it done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from types import TracebackType

from ires_kernels.checkpoints.addresses import Address
from ires_kernels.checkpoints.objects import Pin, within
from ires_kernels.checkpoints.prefix import Prefix, Taken
from ires_kernels.checkpoints.uploads import Complete, Upload, Uploads, note_of
from ires_kernels.files.ownership import Access, StoreError
from ires_kernels.files.unfinished import MARKER, content_of_lock, signed_record, told_by_lock, told_by_record
from ires_kernels.records.elsewhere import as_kept, names_and_kept

_HIDDEN = ".ires-"
_PATIENCE = 10.0
"""Seconds for a store to have removed, after a failure, what is of no use: perhaps it is what fails."""


class FolderElsewhere:
    """A context in which the files of an output are put under `prefix`; `commit` ends it.

    identity  one line of words: what an earlier run with the same line has completed is kept; another is refused
    keep      bytes for whoever finds the unfinished folder
    names     of the files that will be put, the last one being what says that all are there
    accept    called before the files of an earlier run are kept, with what that one gave to keep and with `finished`;
              raises StoreError to leave all as it is
    hashed    sha256 of the weights is wanted

    Leaving without `commit` keeps what is complete, or removes everything where nothing is, or where an error of the
    inputs, a ValueError, makes it worthless. Raises StoreError for what is somebody else's.
    """

    def __init__(
        self,
        prefix: Prefix,
        identity: str,
        keep: bytes,
        names: Collection[str],
        *,
        accept: Callable[[bytes, Mapping[str, bytes]], None],
        hashed: bool,
    ) -> None:
        self.out = prefix.address
        self.access = Access()
        self.finished: dict[str, bytes] = {}
        """Files that need not be made, by name, and what was recorded of them."""
        self.complete: dict[str, Complete] = {}
        """What these are, and those that were made since."""
        self._prefix = prefix
        self._identity = identity.encode()
        self._keep = as_kept(names, keep)
        self._names = list(names)
        self._accept = accept
        self._hashed = hashed
        self._uploads = Uploads(prefix, hashed=hashed)
        self._reserved: dict[str, tuple[bytes, int]] = {}
        self._last: dict[str, bytes] = {}
        """What is put at the very end."""
        self._began = self._is_done = False

    def __enter__(self) -> FolderElsewhere:
        content = content_of_lock(self._identity, self._keep)
        try:
            self._prefix.put(MARKER, content, new=True)
        except Taken:
            self._take_over()
        else:
            strange = self._prefix.names() - {MARKER}
            if strange:  # it was not empty, or somebody else writes there without asking
                self._prefix.remove([MARKER])
                raise not_empty(self.out)
            self._began = True
        return self

    def _take_over(self) -> None:
        """Keep what an interrupted run of the same operation has completed."""
        lock = self._prefix.read(MARKER)
        if lock is None:  # another run has ended just now
            raise not_empty(self.out)
        identity, kept = told_by_lock(lock, self.out)
        if identity != self._identity:
            raise StoreError(
                f"{self.out}: holds the files of another operation. Finish that one with `ires resume {self.out}`, or "
                f"remove it with `ires rollback {self.out}`; or give the output another name."
            )
        self.complete, self.finished = recorded(self._prefix, self._identity, self._names)
        if self._hashed and not all(each.sha256 for each in self.complete.values()):
            self.complete, self.finished = {}, {}
        if self.finished:
            self._accept(names_and_kept(kept)[1], self.finished)

    def reserve(self, name: str, head: bytes, size: int) -> None:
        """Have a file of `size` bytes that begins with `head`."""
        self._reserved[name] = head, size

    def file(self, name: str, record: Callable[[], bytes] = bytes) -> Upload:
        """One of the files that are reserved, to be written; they are written in the order of these calls."""

        def note(complete: Complete) -> bytes:
            self.complete[name] = complete
            about = {"size": complete.pin.size, "etag": complete.pin.etag, "time": complete.pin.modified}
            line = json.dumps({**about, "sha256": complete.sha256}).encode()
            return signed_record(self._identity, name, line + b"\n" + record())

        return self._uploads.add(name, *self._reserved[name], note)

    def stop(self) -> None:
        """Let no thread wait that writes."""
        self._uploads.stop()

    def finish_files(self) -> None:
        """Every file that was taken to be written is in the store."""
        self._uploads.finish()

    def abandon_files(self) -> None:
        """Abort those that are not finished."""
        self._uploads.abandon()

    def add(self, name: str, chunks: Iterable[bytes], mode: int | None = None) -> None:  # noqa: ARG002
        """A whole file from its bytes; who may read it is for the store to say."""
        content = b"".join(chunks)
        if name == self._names[-1] or name == "config.json" or name.endswith(".index.json"):
            self._last[name] = content
        else:
            self._prefix.put(name, content)

    def commit(self) -> None:
        """Put what makes a model of it, if all is as it was put, and remove what only the writing needed."""
        pins = self._prefix.pins(self.complete)
        for name, complete in self.complete.items():
            if not is_same(pins.get(name), complete.pin):
                raise StoreError(
                    f"{self.out.child(name)}: is not what was put there: somebody else writes there. When they have "
                    f"ended, `ires rollback {self.out}` and give the command again; or give the output another name."
                )
        if not self._is_mine(gone=True):
            raise StoreError(f"{self.out}: another merge has begun there meanwhile. Give the output another name.")
        for name, content in self._last.items():
            self._prefix.put(name, content)
        self._is_done = True
        tidy(self._prefix)

    def _is_mine(self, *, gone: bool) -> bool:
        """Whether the lock is that of this operation; `gone` where there is none, as another run of it has ended."""
        lock = self._prefix.read(MARKER)
        return gone if lock is None else told_by_lock(lock, self.out)[0] == self._identity

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon_files()
        if not self._is_done:
            with suppress(OSError, StoreError), within(_PATIENCE):  # the error that brought us here matters more
                there = self._prefix.names()
                is_nothing = self._began and not any(note_of(name) in there for name in self._names)
                is_useless = isinstance(error, ValueError) and not isinstance(error, StoreError)
                if (is_nothing or is_useless) and self._is_mine(gone=False):
                    discard(self._prefix, self._names, there)


def is_same(now: Pin | None, then: Pin) -> bool:
    """Whether a file is still what it was."""
    if now is None or now.size != then.size:
        return False
    return now.etag == then.etag if then.etag else now.modified == then.modified


def recorded(prefix: Prefix, operation: bytes, names: Collection[str]) -> tuple[dict[str, Complete], dict[str, bytes]]:
    """Of these files those that are complete: what they are, and what was recorded of them."""
    there = prefix.names()
    wanted = [name for name in names if name in there and note_of(name) in there]
    notes, pins = prefix.read_all(map(note_of, wanted)), prefix.pins(wanted)
    complete, records = {}, {}
    for name in wanted:
        content = told_by_record(notes.get(note_of(name), b""), operation, name)
        if content is not None:
            line, _, record = content.partition(b"\n")
            about = json.loads(line)  # which is ours
            pin = Pin(about["size"], about["etag"], about["time"])
            if is_same(pins.get(name), pin):
                complete[name], records[name] = Complete(pin, about["sha256"]), record
    return complete, records


def discard(prefix: Prefix, names: Iterable[str], there: Collection[str]) -> None:
    """Remove what an operation has put under these names, the lock last; nothing of a stranger's."""
    prefix.remove([name for name in names if name in there])
    tidy(prefix)


def tidy(prefix: Prefix) -> None:
    """Remove what only the writing needed, the lock last."""
    prefix.remove([name for name in prefix.names() if name.startswith(_HIDDEN) and name.endswith(".done")])
    prefix.remove([MARKER])


def not_empty(out: Address) -> StoreError:
    """The error for a prefix where something is."""
    return StoreError(f"{out}: is not empty. Give the name of a new folder, or delete this one first.")
