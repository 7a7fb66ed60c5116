"""Files that are elsewhere, read by ranges over https or out of S3, GCS and Azure; obstore does the asking.

A file is pinned by what it was when it was first asked for: its ETag, or its time where it has none, and its size. Each
answer is held against that and against what was asked: other bytes than those of the pinned file never come out of
here. obstore asks again where it was told to (429, 5xx) or cut off, and goes on where a body ended. Its messages may
have addresses with signatures in them, so none of them is passed on.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import xxhash

from ires_kernels.checkpoints.addresses import Address, Changed, Missing, Unreachable
from ires_kernels.files import interrupts
from ires_kernels.files.opening import CheckpointError

T = TypeVar("T")

_RETRIES = 6
"""Of a request, by obstore."""
_TRIES = 3
"""Of a range whose body did not come whole for all that."""
_STALLED = timedelta(seconds=30)
"""Without a byte; then it is asked again."""
_SENT = timedelta(minutes=10)
"""For a part of a file to be there, of some that share a slow link."""
_BACKOFF = {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=15), "base": 2}


class Pin(NamedTuple):
    """What a file was when it was first asked for."""

    size: int
    etag: str | None
    modified: str

    @property
    def tag(self) -> int:
        """A number for what it was, other than its size: of 60 bits, so that it can be the time of a file."""
        return xxhash.xxh3_64_intdigest(f"{self.etag or self.modified}".encode()) >> 4


class Place:
    """A folder elsewhere, or a file alone: what requests are sent with."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._store = None if address.query else store_at(address)

    def of(self, name: str) -> tuple[Any, str, bool]:
        """The store to ask for a file in it, by what name, and whether that is elsewhere than the address says."""
        if self._store is not None:
            return self._store, name, False
        from ires_kernels.checkpoints.landing import landing

        address = self.address.child(name)  # with the query, which is for its host alone
        there = landing(address)
        return store_at(there), "", there != address

    def file(self, name: str) -> Object:
        return Object(self.address.child(name), self, name)

    def names(self, folder: str = "") -> list[str]:
        """What files there are, of what can be asked for that. Raises Unreachable."""
        try:
            found = library(self.address).list_with_delimiter(self._store, folder or None)
        except BaseException as error:
            raise explained(error, self.address) from None
        # An object of no bytes with the folder's own name and a slash: some consoles put it to show an empty folder.
        return [entry["path"] for entry in found["objects"] if entry["path"] != folder]


class Object:
    """One file elsewhere."""

    expires = False
    """Whether what is asked may be refused after a while, and be asked for anew then."""

    def __init__(self, where: object, place: Place | None = None, name: str = "") -> None:
        self.where = where
        self.pin: Pin | None = None
        self._place = place
        self._name = name
        self._asked: tuple[Any, str] | None = None
        self._asking = asyncio.Lock()

    async def start(self, size: int) -> bytes:
        """Its first bytes, or all of a shorter one; this pins it."""
        try:
            return bytes(await self._ranged(0, size, first=True))
        except _Empty:
            return b""

    async def read(self, start: int, stop: int) -> Any:
        """The bytes from `start` to `stop`, as a buffer. Raises Unreachable, or Changed."""
        return await self._ranged(start, stop)

    async def _ranged(self, start: int, stop: int, first: bool = False) -> Any:
        for left in reversed(range(_TRIES)):
            asked = await self._ask()
            try:
                return await self._once(asked, start, stop, first)
            except _Cut as error:
                if not left:
                    raise Unreachable(self.where, f"{error}") from None
                await asyncio.sleep(0.2 * 4 ** (_TRIES - 1 - left))
            except Missing:
                if not left or not self.expires:
                    raise
                if self._asked is asked:
                    self._asked = None
        raise AssertionError

    async def _ask(self) -> tuple[Any, str]:
        async with self._asking:
            if self._asked is None:
                self._asked = await aside(self.asked)
            return self._asked

    async def _once(self, asked: tuple[Any, str], start: int, stop: int, first: bool) -> Any:
        import obstore

        pin, options = None if first else self.pin, {"range": (start, stop)}
        async with _room:
            try:
                answer = await obstore.get_async(*asked, options={**options, **self.match(pin)})
                pin = self.check(told(answer.meta), pin)
                wanted = (start, min(stop, pin.size))
                if tuple(answer.range) != wanted:
                    raise Unreachable(self.where, f"the answer has the bytes {answer.range}, wanted {wanted}")
                data = await answer.bytes_async()
            except BaseException as error:
                if first and " 416 " in f"{error}":
                    await self._check_empty(asked)
                raise explained(error, self.where) from None
        if len(data) != wanted[1] - start:
            raise _Cut(f"the answer has {len(data)} bytes, wanted {wanted[1] - start}")
        self.pin = pin
        return data

    async def _check_empty(self, asked: tuple[Any, str]) -> None:
        """Pin a file that has no bytes, and so no range of them. Raises _Empty."""
        import obstore

        with suppress(Exception):
            pin = self.check(told(await obstore.head_async(*asked)), None)
            if not pin.size:
                self.pin = pin
                raise _Empty

    def asked(self) -> tuple[Any, str]:
        """The store to ask, and by what name."""
        assert self._place is not None
        store, name, self.expires = self._place.of(self._name)  # what one is sent on to is most often signed
        return store, name

    def match(self, pin: Pin | None) -> dict[str, str]:
        """What is asked on the condition that it is still the pinned file; weak tags are for no ranges."""
        strong = pin is not None and pin.etag and not pin.etag.startswith("W/")
        return {"if_match": f"{pin.etag}"} if pin is not None and strong else {}

    def check(self, now: Pin, pin: Pin | None) -> Pin:
        """The pin, where an answer is of `now`; the first one makes it. Raises Changed."""
        if pin is None:
            if not now.etag and now.modified == "0.0":
                raise CheckpointError(
                    f"{self.where}: its server tells neither an ETag nor a time, so nobody could tell whether it "
                    "changes while it is read. Download it, and give the folder."
                )
            return now
        if now.size != pin.size or (now.etag != pin.etag if pin.etag else now.modified != pin.modified):
            raise Changed(self.where)
        return pin


def told(meta: Any) -> Pin:
    """What a store says that a file is."""
    return Pin(meta["size"], meta["e_tag"], f"{meta['last_modified'].timestamp()}")


class _Empty(BaseException):
    """It has no bytes."""


class _Cut(Exception):
    """The body was not all that the answer said it would be."""


_ends = threading.local()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Let this thread wait so long at most, for all that it asks together; then it has TimeoutError, an OSError."""
    before = getattr(_ends, "at", math.inf)
    _ends.at = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _ends.at = before


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """The result of something that is waited for here; an interrupt ends it, and what `within` says."""
    future = begin(work)
    try:
        while not future.done():
            interrupts.check()
            if time.monotonic() > getattr(_ends, "at", math.inf):
                raise TimeoutError(errno.ETIMEDOUT, "nobody answered in time")
            wait([future], 0.1)
        return future.result()
    except BaseException:
        future.cancel()
        raise


def begin(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Have work done meanwhile, in the one thread that does all of it."""
    try:
        return asyncio.run_coroutine_threadsafe(work, _loop())
    except CheckpointError:
        work.close()
        raise


async def aside(work: Callable[[], T]) -> T:
    """The result of what waits by itself, in a thread that nobody waits for at the end of the process."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whoever waits raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


async def all_of(work: list[Coroutine[Any, Any, T]], at_once: int = 32) -> list[T]:
    """All results, in order; the first error ends it."""
    room = asyncio.Semaphore(at_once)

    async def one(each: Coroutine[Any, Any, T]) -> T:
        async with room:
            return await each

    tasks = [asyncio.ensure_future(one(each)) for each in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


_room = asyncio.Semaphore(64)
"""Requests at once, of all there are."""
_lock = threading.Lock()
_running: list[tuple[int, asyncio.AbstractEventLoop]] = []
"""With the process that it runs in."""


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        if not _running:
            loop = asyncio.new_event_loop()
            # It outlives every run, whose threads are called ires-something.
            threading.Thread(target=loop.run_forever, name="remote-ires", daemon=True).start()
            atexit.register(_let_end, os.getpid())
            _running.append((os.getpid(), loop))
        check_not_forked()
        return _running[0][1]


def _let_end(owner: int) -> None:
    """At the end of the process wait for threads of the client that still tell of what is done.

    An interpreter that ends meanwhile ends them in the middle, at which they abort the process: without this one of
    twenty that had just removed a file did (obstore 0.12.1, Python 3.11, a busy machine).
    """
    if os.getpid() != owner:
        return
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        time.sleep(0.02)  # also for those that are about to begin with that
        ours = {thread.ident for thread in threading.enumerate()}
        if sys._current_frames().keys() <= ours:
            return


def check_not_forked() -> None:
    """Refuse to read in a fork: the threads that would do it stayed behind, and it would wait for ever."""
    if _running and _running[0][0] != os.getpid():
        raise CheckpointError(
            "this process is a fork of one that has read models elsewhere, and cannot read any. Start processes anew: "
            'multiprocessing.get_context("spawn"); or let none but forks read them.'
        )


_CLOUDS, _YES = ("AWS", "AZURE", "GOOGLE"), ("true", "True", "1")


def library(address: Address) -> Any:
    try:
        import obstore
    except ImportError:
        raise CheckpointError(
            f"{address}: nothing here can ask for it. Install obstore (`pip install 'ires_kernels[remote]'`), or "
            "download the model and give its folder."
        ) from None
    return obstore


def store_at(address: Address, *, writes: bool = False, **headers: str) -> Any:
    """What asks for files under an address, with these headers, which go to its host alone.

    writes  for what is sent there: as long as bytes are on their way, nothing comes back
    """
    check_not_forked()
    library(address)
    from obstore import store

    client: dict[str, Any] = {"timeout": timedelta(hours=1), "read_timeout": _STALLED}
    retry: Any = {"max_retries": _RETRIES, "retry_timeout": timedelta(minutes=3), "backoff": _BACKOFF}
    if writes:
        client, retry["retry_timeout"] = {"timeout": _SENT}, 3 * _SENT
    try:
        if address.is_store:
            _check_settings(address)
            client["allow_http"] = any(os.environ.get(f"{cloud}_ALLOW_HTTP", "") in _YES for cloud in _CLOUDS)
            return store.from_url(address.full(), retry_config=retry, client_options=client)
        if address.scheme == "http":
            client["allow_http"] = True
        client["default_headers"] = headers | address.authorization()
        full = address._replace(user="").full()
        return store.HTTPStore.from_url(full, retry_config=retry, client_options=client)
    except CheckpointError:
        raise
    except Exception as error:
        first = f"{error}".strip().splitlines()[0] if address.is_store else "is no address that can be asked"
        raise CheckpointError(f"{address}: {first}. Check it, and the settings of its store.") from None


def _check_settings(address: Address) -> None:
    """Refuse what obstore would panic at: a token with a line break, as a file that was read whole ends in one."""
    for name, value in os.environ.items():
        if name.startswith(("AWS_", "AZURE_")) and not value.isprintable():
            raise CheckpointError(
                f"{address}: {name} in the environment has a line break or another character that is not printed, "
                "which no setting has. Set it without."
            )


def explained(error: BaseException, where: object, to: str = "read") -> BaseException:
    """What went wrong, in words without secrets, as somebody wanted `to` do something."""
    from obstore import exceptions as known

    if type(error).__name__ in ("PanicException", "RustPanic"):  # the first one is no Exception
        return CheckpointError(f"{where}: cannot be asked for with the settings of its store. Check its endpoint.")
    if not isinstance(error, Exception):
        return error
    text = f"{error}"
    if isinstance(error, (CheckpointError, Unreachable, _Cut)):
        return error
    if to == "read" and (isinstance(error, known.PreconditionError) or " 412 " in text):
        return Changed(where)
    if to == "write" and "NoSuchUpload" in text:
        return Unreachable(where, "its upload is not known to the store any more. The same command sends it again")
    if isinstance(error, FileNotFoundError) or " 404 " in text:
        return Missing(where, "nothing is there" if to == "read" else "there is no such bucket")
    if isinstance(error, (known.PermissionDeniedError, known.UnauthenticatedError)) or " 403 " in text:
        newer = ", or a newer address" if to == "read" else ""
        return Missing(where, f"access is refused (401 or 403): give credentials that may {to} it{newer}")
    if isinstance(error, known.NotSupportedError):
        return Unreachable(where, "its server does not answer with ranges of a file, but with all of it. Download it")
    if "UnexpectedRange" in text or "Requested " in text:
        return Unreachable(where, "its server answers with another range than the one that it was asked for")
    for sign, why in _SIGNS.items():
        if sign in text:
            return (_Cut if sign in _BODY else lambda why: Unreachable(where, why))(why)
    said = re.sub(r"\w+://\S+", "it", (text.strip() or type(error).__name__).splitlines()[0])
    if code := re.search(r"<Code>(\w+)</Code>", text):  # of what a store answers, on lines below
        said = f"{said.partition('<')[0]}{code[1]}"
    return Unreachable(where, f"cannot be {'read' if to == 'read' else 'written'} ({said})")


_BODY = ("body error", "decoding response body")
_SIGNS = {
    "/latest/api/token": "there are no credentials to ask with (AWS_ACCESS_KEY_ID …), and the machine gives none. "
    "For what everybody may read, set AWS_SKIP_SIGNATURE=true",
    "body error": "the answer was cut off each time",
    "decoding response body": "the answer was cut off each time",
    " 429 ": "its server has no time for more requests (429). Try again later: what is complete is kept",
    " 503 ": "its server is not available (503). Try again later: what is complete is kept",
    "status code: 5": "its server has failed (5xx). Try again later: what is complete is kept",
    "dns error": "its host has no address in the network",
    "onnection refused": "nobody answers there (connection refused)",
    "error sending request": "nobody answers there",
    "timed out": "nobody answered in time",
    "Timeout": "nobody answered in time",
    "<Code>ExpiredToken": "its credentials have expired. Give newer ones",
    " 400 Bad Request: \n": "its server refuses to tell of it (400), as S3 does where credentials have expired",
    " 416 ": "it is empty, or shorter than it was",
}
