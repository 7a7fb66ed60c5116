"""Where bytes of checkpoints come from: files that are opened once, and known to be those that were validated."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ires_kernels.checkpoints import standins
from ires_kernels.checkpoints.checkpoint import FileId
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files import interrupts
from ires_kernels.files.opening import open_file
from ires_kernels.files.transfer import Hasher, chunks, read_into, read_views

if TYPE_CHECKING:
    from ires_kernels.checkpoints.ahead import RemoteFile, Window

MOST_OPEN = 16
"""Files that stay open until they are needed again, with those in use."""


IN_MEMORY = -1
"""In place of a descriptor."""


class Read(NamedTuple):
    """Bytes of a file that is open, or of memory, for what reads them itself."""

    fd: int
    """Or IN_MEMORY."""
    offset: int
    """Or the address."""
    nbytes: int
    path: Path
    keep: int = 0
    """Where bytes of memory are to be copied that will be changed, before they are."""
    kept: int = 0
    """The address of a count of 64 bits of those of them that are there: who copies adds to it."""
    packed: str = ""
    """Or the dtype by which they are packed there once they have changed: behind the count is that of the record."""


class Source(Protocol):
    """Bytes that are read by position: those of a file, or of what else has a size and a state that can be told."""

    @property
    def path(self) -> Path:
        """What it is called in errors."""

    def stamp(self) -> FileId:
        """What it is now; as long as this is what it was, so are its bytes."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill the view with the bytes from `offset` on. Raises OSError where there are fewer."""

    def read_views(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill the views, one after the other, as if they were one."""

    def reads(self, offset: int, size: int) -> list[Read] | None:
        """Where bytes are that are read now by who asks, one after the other; None where only this can read them."""

    def will_need(self, offset: int, size: int) -> None:
        """Have bytes brought near that are read soon; does not wait for them."""

    def close(self) -> None: ...


class LocalFile:
    """A file that is open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = open_file(path)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def stamp(self) -> FileId:
        return FileId.of(self.fd)

    def read_into(self, view: memoryview, offset: int) -> None:
        read_into(self.fd, view, offset, self.path)

    def read_views(self, views: Sequence[memoryview], offset: int) -> None:
        read_views(self.fd, views, offset, self.path)

    def reads(self, offset: int, size: int) -> list[Read]:
        return [Read(self.fd, offset, size, self.path)]

    def will_need(self, offset: int, size: int) -> None:
        os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self.fd)


def contents(path: Path, hasher: Hasher) -> Iterator[bytes | memoryview]:
    """All bytes of a file of weights, here or elsewhere, by pieces, hashed on the way."""
    far = standins.far(path)
    if far is None:
        yield from chunks(path, hasher)
        return
    from ires_kernels.checkpoints.ahead import RemoteFile, Window

    source, buffer = RemoteFile(path, far, Window(), [(0, far.size)]), memoryview(bytearray(1 << 20))
    try:
        for offset in range(0, far.size, len(buffer)):
            interrupts.check()
            part = buffer[: far.size - offset]
            source.read_into(part, offset)
            hasher.update(part)
            yield part
    finally:
        source.close()


class Files:
    """Input files, open from their first use to their last; opening makes sure that they are still the same.

    No more than MOST_OPEN stay open beyond those in use: a process may open some thousand files or fewer.
    """

    def __init__(
        self,
        file_ids: Mapping[Path, FileId],
        uses: Iterable[Path],
        memory: Mapping[Path, Source] | None = None,
        written: Container[Path] = (),
        reads: Callable[[], Iterable[tuple[Path, int, int]]] = tuple,
    ) -> None:
        """Nothing is opened yet.

        memory   what is no file, and there for as long as this is, by the path that it is called
        written  files that this process writes meanwhile, which are told by all but their times
        reads    what will be read, (path, offset, bytes), in order; asked where some of it is elsewhere
        """
        self._file_ids = file_ids
        self._memory = memory or {}
        self._written = written
        self._uses = Counter(uses)
        self._held: Counter[Path] = Counter()
        self._open: dict[Path, LocalFile | RemoteFile] = {}
        self._window: Window | None = None
        self._reads: dict[Path, list[tuple[int, int]]] = {}
        if any(map(standins.far, file_ids)):
            for path, offset, size in reads():
                self._reads.setdefault(path, []).append((offset, size))

    def open(self, path: Path) -> Source:
        """A source to be used at once: the next call may close it."""
        if path in self._memory:
            return self._memory[path]
        source = self._open.get(path)
        if source is None:
            if len(self._open) >= MOST_OPEN:
                idle = next((other for other in self._open if not self._held[other]), None)
                if idle is not None:
                    self._open.pop(idle).close()
            source = self._open[path] = self._opened(path)
            now, known = source.stamp(), self._file_ids[path]
            if path in self._written:
                known = known._replace(mtime_ns=now.mtime_ns)
            if not now.is_unwritten(known):
                raise CheckpointError(f"{path}: changed after it was validated. Wait for its writer, then start again.")
        return source

    def _opened(self, path: Path) -> LocalFile | RemoteFile:
        far = standins.far(path)
        if far is None:
            return LocalFile(path)
        from ires_kernels.checkpoints.ahead import RemoteFile, Window

        self._window = self._window or Window()
        return RemoteFile(path, far, self._window, self._reads.get(path, ()))

    def hold(self, path: Path) -> Source:
        """A source that stays open until `release`."""
        source = self.open(path)
        self._held[path] += 1
        return source

    def is_local(self, path: Path) -> bool:
        """Whether the bytes of a file are in one here, and neither in memory nor elsewhere."""
        return path not in self._memory and standins.far(path) is None

    def release(self, path: Path) -> None:
        """One of the uses is over."""
        self._uses[path] -= 1
        self._held[path] -= min(1, self._held[path])
        if not self._uses[path] and path in self._open:  # of a tensor without elements nothing was read
            self._open.pop(path).close()

    def interrupt(self) -> None:
        """Let nobody wait any longer for what comes from elsewhere."""
        for source in list(self._open.values()):
            if not isinstance(source, LocalFile):
                source.close()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()
