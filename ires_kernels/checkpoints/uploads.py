"""Files of known sizes that are written to a store: each is there when all of it is, and nothing of it is before.

Threads write bytes in any order near each other. They are collected in memory into parts, which are sent in order,
several at a time; a file is an upload in parts, which the store makes one object of when all are there. That is what
renaming is on a disk. So many parts are in memory at most, of all files together; who writes farther ahead waits. Parts
get their memory strictly in the order of the files and of the bytes in them, so where tiles are claimed in that order,
those that are waited for never wait.

A part is sent again where the store asks for that (429, 5xx) or the connection is cut. An upload that is given up is
aborted, so nothing of it stays in the store. Only what is killed can leave parts, which readers do not see.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from ires_kernels.checkpoints.addresses import Unreachable
from ires_kernels.checkpoints.objects import Pin, aside, begin, explained, library
from ires_kernels.checkpoints.prefix import Prefix
from ires_kernels.files import interrupts

PART = 16 << 20
"""Bytes of a part: at 25 MB/s and 50 ms away, .67 s of .72 s are spent with bytes on their way."""
_MOST_PARTS = 9_000
"""Of a file: stores take 10,000. Larger files have larger parts."""
AT_ONCE = 16
"""Parts of a file that are on their way."""
ROOM = 24
"""Parts in memory, on their way or being filled: of usual files 384 MiB."""
_RETURNS = 5.0
"""Seconds to wait at the end for memory that the client still holds."""
_PATIENCE = 30.0
"""Seconds that who gives up waits for a file that is about to be complete, or for the store to know of it."""


class Complete(NamedTuple):
    """A file that is in the store."""

    pin: Pin
    sha256: str
    """Of all of it, where that was wanted."""


class _Part(bytearray):
    """The bytes of a part. The client holds it as long as it may have to send it again, and then it goes."""


@dataclass(eq=False)
class Upload:
    """A file that threads write; `Uploads` makes it."""

    uploads: Uploads
    name: str
    head: bytes
    size: int
    note: Callable[[Complete], bytes]
    length: int
    """Bytes of each part but the last."""
    parts: dict[int, _Part] = field(default_factory=dict)
    """Those that are being filled, and those that wait for one before them."""
    left: dict[int, int] = field(default_factory=dict)
    """Of these the bytes that are not there."""
    begun: int = 0
    sent: int = 0
    """Parts that have got memory; that were handed over."""
    full: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    """What was handed over, and last what `note` gave."""
    future: Future[Complete] | None = None
    task: asyncio.Task[Any] | None = None
    is_closing: bool = False

    @property
    def count(self) -> int:
        return -(-self.size // self.length)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Bytes nobody has written yet. Raises what has gone wrong with the upload of any file."""
        rest = memoryview(data)
        while rest:
            number, start = divmod(offset, self.length)
            part = self.uploads.part(self, number)
            count = min(len(rest), len(part) - start)
            with memoryview(part) as view:
                view[start : start + count] = rest[:count]
            del part
            self.uploads.filled(self, number, count)
            rest, offset = rest[count:], offset + count


class Uploads:
    """The files of one run, which are written in the order in which they are added."""

    def __init__(self, prefix: Prefix, *, hashed: bool = False) -> None:
        """`hashed`: sha256 of each file is wanted."""
        self._prefix = prefix
        self._hashed = hashed
        self._files: list[Upload] = []
        self._turn = threading.Condition()  # of an RLock: memory may come back in a thread that holds it
        self._room = self._all = ROOM
        self._coming: Iterator[tuple[Upload, int]] | None = None
        self._error: BaseException | None = None
        self._stopped = False

    def add(self, name: str, head: bytes, size: int, note: Callable[[Complete], bytes]) -> Upload:
        """A file of `size` bytes that begins with `head`.

        note  called when all of it is there; its bytes are put as a file of their own, `note_of(name)`
        """
        length = max(PART, -(-size // _MOST_PARTS))
        file = Upload(self, name, head, size, note, length)
        self._files.append(file)
        return file

    def part(self, file: Upload, number: int) -> _Part:
        """The memory of a part, as soon as there is room."""
        with self._turn:
            self._check()
            while file.begun <= number:
                self._begin_next_or_wait()
            return file.parts[number]

    def _begin_next_or_wait(self) -> None:
        """Give memory to the next part of all, if there is some; called under the lock, which who waits gives away."""
        if self._room:
            self._begin_next()
        else:
            self._turn.wait(0.5)
            interrupts.check()
            self._check()

    def _begin_next(self) -> None:
        """With the bytes that are known before."""
        if self._coming is None:
            self._coming = ((file, number) for file in self._files for number in range(file.count))
        file, number = next(self._coming)
        if file.future is None:
            file.future = begin(self._send(file))
            file.future.add_done_callback(self._has_ended)
        start = number * file.length
        part = _Part(min(file.length, file.size - start))
        self._room -= 1
        weakref.finalize(part, self._is_free).atexit = False
        known = file.head[start : start + len(part)]
        part[: len(known)] = known
        file.parts[number], file.left[number] = part, len(part) - len(known)
        file.begun += 1
        self._hand_over(file)

    def filled(self, file: Upload, number: int, count: int) -> None:
        """So many bytes of a part are there."""
        with self._turn:
            file.left[number] -= count
            self._hand_over(file)

    def _hand_over(self, file: Upload) -> None:
        while file.left.get(file.sent) == 0:
            del file.left[file.sent]
            begin(file.full.put(file.parts.pop(file.sent)))
            file.sent += 1

    async def _send(self, file: Upload) -> Complete:
        where, name = self._prefix.address.child(file.name), file.name
        hasher = hashlib.sha256() if self._hashed else None
        file.task = asyncio.current_task()
        writer = library(where).open_writer_async(
            self._prefix.writer, name, buffer_size=file.length, max_concurrency=AT_ONCE
        )
        try:
            for _ in range(file.count):
                part: Any = await file.full.get()
                if hasher is not None:
                    await aside(partial(hasher.update, part))
                await asyncio.shield(writer.write(part))  # who is cancelled as an upload begins would not know of it
                part = None
            file.is_closing = True
            await writer.close()
        except BaseException as error:
            part = None  # which the error would hold
            if not file.is_closing:
                with suppress(Exception):  # the first error tells more
                    await writer.__aexit__(type(error), None, None)
            raise explained(error, where, "write") from None
        pin = await self._prefix.pin_later(name)
        if pin is None or pin.size != file.size:
            found = "is not there" if pin is None else f"has {pin.size} bytes"
            raise Unreachable(where, f"{found} after {file.size} bytes were sent. The same command sends them again")
        complete = Complete(pin, hasher.hexdigest() if hasher else "")
        await self._prefix.put_later(note_of(name), file.note(complete))
        return complete

    def _is_free(self) -> None:
        with self._turn:
            self._room += 1
            self._turn.notify_all()

    def _has_ended(self, future: Future[Complete]) -> None:
        error = None if future.cancelled() else future.exception()
        with self._turn:
            self._error = self._error or error
            self._turn.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._stopped:
            raise Unreachable(self._prefix.address, "the run has ended")

    def stop(self) -> None:
        """Let nobody wait any longer."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    def finish(self) -> dict[str, Complete]:
        """What the files are, when all are in the store. Raises what has gone wrong."""
        with self._turn:
            while self._files and self._files[-1].begun < self._files[-1].count:  # of files that are nothing but heads
                self._begin_next_or_wait()
        futures = {file.name: file.future for file in self._files if file.future is not None}
        while any(not future.done() for future in futures.values()) and self._error is None:
            interrupts.check()
            wait(futures.values(), 0.1)
        self._check()
        self._wait_for_memory()
        return {name: future.result() for name, future in futures.items()}

    def _wait_for_memory(self) -> None:
        """Until the client holds none: its threads would give it back to an interpreter that may be ending."""
        end = time.monotonic() + _RETURNS
        with self._turn:
            while self._room < self._all and time.monotonic() < end:
                self._turn.wait(0.1)

    def abandon(self) -> None:
        """Abort what is not complete, and wait until the store knows of that."""
        self.stop()
        running = [file for file in self._files if file.future is not None and not file.future.done()]
        for file in running:
            begin(self._cancel(file))
        wait([file.future for file in running if file.future is not None], _PATIENCE)
        for file in self._files:
            file.parts.clear()
            file.full = asyncio.Queue()
        self._files.clear()
        self._wait_for_memory()

    async def _cancel(self, file: Upload) -> None:
        if file.task is not None and not file.is_closing:  # that takes but a moment, and cannot be taken back
            file.task.cancel()


def note_of(name: str) -> str:
    """The name of what is noted of a file that is complete."""
    return f".ires-{name}.done"
