"""Models behind links that are slow: a server of ranges on loopback whose every client has a link of its own.

A link is a port. It stands there as a proxy, so that all clients know a model by one address (`HTTP_PROXY` says which
link is whose). What goes through a link takes the time that its rate gives, however many answers there are at once; all
of it goes through the link of the source as well. Answers of weights wait until every client has asked for some: so
many machines start at once, so many processes on a few cores do not.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from email.utils import formatdate
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HOST = "http://models.invalid"
"""Where the models are, for who asks through a link."""
WEIGHTS = 1 << 20
"""Bytes of an answer from which on it is one of weights, and not of a header or of samples."""
_CHUNK = 1 << 15
_SIGN_OF_LIFE = 5.0
"""Seconds until who waits gets a byte, and so does not give up."""


class Link:
    """Bytes go through one after the other."""

    def __init__(self, rate: float) -> None:
        """`rate`: bytes a second."""
        self._rate = rate
        self._free = 0.0

    def through(self, count: int) -> float:
        """When so many bytes, which come now, are through."""
        self._free = max(self._free, time.monotonic()) + count / self._rate
        return self._free


class Links:
    """What the clients of a run are told, and what they have done."""

    def __init__(self, clients: int) -> None:
        self.ports: Any = multiprocessing.Array("i", clients)
        self.read: Any = multiprocessing.Array("q", clients)
        """Bytes that came through each link."""
        self.planning: Any = multiprocessing.Array("q", clients)
        """Of these, what came before any weights."""
        self.released: Synchronized[float] = multiprocessing.Value("d", 0.0)
        """When all had asked for weights, by the monotonic clock; 0 before."""

    def environment(self, client: int) -> dict[str, str]:
        """What a client needs so that all it asks for comes through its link."""
        others = {name: text for name, text in os.environ.items() if name.lower() not in _PROXIES}
        return {**others, "HTTP_PROXY": f"http://127.0.0.1:{self.ports[client]}"}


_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@contextmanager
def serving(folder: Path, clients: int, *, link: float, source: float) -> Iterator[Links]:
    """Serve the files of a folder through so many links of `link` bytes a second, and one of `source` behind them."""
    links = Links(clients)
    process = multiprocessing.get_context("fork").Process(
        target=_serve, args=(folder, links, clients, link, source), daemon=True
    )
    process.start()
    try:
        while not links.ports[clients - 1]:
            if not process.is_alive():
                raise OSError("the server of the models has ended")
            time.sleep(0.01)
        yield links
    finally:
        process.terminate()
        process.join()


def _serve(folder: Path, links: Links, clients: int, link: float, source: float) -> None:
    asyncio.run(_Server(folder, links, clients, link, source).serve())


class _Server:
    def __init__(self, folder: Path, links: Links, clients: int, link: float, source: float) -> None:
        self._folder = folder
        self._links = links
        self._each = [Link(link) for _ in range(clients)]
        self._source = Link(source)
        self._asked: set[int] = set()
        self._all_have_asked = asyncio.Event()

    async def serve(self) -> None:
        servers = []
        for client in range(len(self._each)):

            async def answer(reader: Any, writer: Any, client: int = client) -> None:
                with suppress(ConnectionError, asyncio.IncompleteReadError):
                    while await self._answer(reader, writer, client):
                        pass
                writer.close()

            servers.append(await asyncio.start_server(answer, "127.0.0.1", 0, backlog=256))
            self._links.ports[client] = servers[-1].sockets[0].getsockname()[1]
        await asyncio.gather(*(server.serve_forever() for server in servers))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: int) -> bool:
        """Answer a request; returns whether another one may follow."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split()
        asked = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in head[1:])}
        path = self._folder / urlsplit(target).path.lstrip("/")
        if not path.is_file():
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return True
        size = path.stat().st_size
        first, _, last = asked.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else size, size)
        writer.write(_headers(size, start, stop, path.stat().st_mtime))
        if method != "HEAD":
            with open(path, "rb") as file:
                await self._send(file.fileno(), start, stop, writer, client)
        return True

    async def _send(self, file: int, start: int, stop: int, writer: asyncio.StreamWriter, client: int) -> None:
        is_weights = stop - start >= WEIGHTS
        if is_weights and not self._all_have_asked.is_set():
            self._asked.add(client)
            if len(self._asked) == len(self._each):
                self._links.released.value = time.monotonic()
                self._all_have_asked.set()
            while not self._all_have_asked.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._all_have_asked.wait(), _SIGN_OF_LIFE)
                    break
                writer.write(os.pread(file, 1, start))
                start += 1
        while start < stop:
            part = os.pread(file, min(_CHUNK, stop - start), start)
            through = max(self._each[client].through(len(part)), self._source.through(len(part)))
            await asyncio.sleep(through - time.monotonic())
            writer.write(part)
            await writer.drain()
            start += len(part)
            self._links.read[client] += len(part)
            if client not in self._asked:
                self._links.planning[client] += len(part)


def _headers(size: int, start: int, stop: int, modified: float) -> bytes:
    lines: Sequence[str] = (
        "HTTP/1.1 206 Partial Content",
        f"Content-Length: {stop - start}",
        f"Content-Range: bytes {start}-{stop - 1}/{size}",
        f'ETag: "{size}-{modified}"',
        f"Last-Modified: {formatdate(modified, usegmt=True)}",
        "\r\n",
    )
    return "\r\n".join(lines).encode()
