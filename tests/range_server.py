"""A small server of files by ranges, and of what may go wrong with them."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Request:
    """What was asked."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    start: int
    stop: int | None
    """None: no range."""


@dataclass
class Answer:
    """What is answered, which a fault may change."""

    status: int
    body: bytes
    headers: dict[str, str]
    cut: int | None = None
    """Bytes of the body after which the connection ends."""


Fault = Callable[[Request, Answer], None]


@dataclass
class Files:
    """What the server has, what it was asked, and how it answers."""

    files: dict[str, bytes] = field(default_factory=dict)
    """By path, from the first slash on."""
    requests: list[Request] = field(default_factory=list)
    faults: list[tuple[Callable[[Request], bool], Fault, int]] = field(default_factory=list)
    """Which answers are changed, how, and how many of them."""
    latency: float = 0.0
    hold: threading.Event | None = None
    """Nothing is answered before it is set."""
    rate: float = 0.0
    """Bytes per second of each answer; 0: as fast as it goes."""
    pins: bool = True
    """Whether If-Match is heeded."""
    etags: bool = True
    address: str = ""
    most: int = 0
    """Requests that were under way at once."""
    now: int = 0

    def add(self, folder: Path, at: str) -> str:
        """The files of a folder under a path; returns its address."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.files[f"{at}/{path.relative_to(folder)}"] = path.read_bytes()
        return f"{self.address}{at}"

    def fault(self, fault: Fault, *, times: int = 1 << 30, name: str = ".safetensors", first: bool = False) -> None:
        """Change the answers to ranges of files whose path ends so; not the first of each file, which has the header.

        first  those as well
        """
        self.faults.append((lambda r: r.path.endswith(name) and (first or r.start > 0), fault, times))

    def answer(self, request: Request) -> Answer:
        body = self.files.get(request.path)
        if body is None:
            return Answer(404, b"", {})
        headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "Accept-Ranges": "bytes"}
        if self.etags:
            headers["ETag"] = _etag(body)
        wanted = request.headers.get("if-match")
        if self.pins and wanted is not None and wanted != headers.get("ETag"):
            return Answer(412, b"", headers)
        if request.stop is None:
            return Answer(200, body, headers)
        if request.start >= len(body):
            return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(body)}"})
        stop = min(request.stop, len(body))
        headers["Content-Range"] = f"bytes {request.start}-{stop - 1}/{len(body)}"
        return Answer(206, body[request.start : stop], headers)


@lru_cache(maxsize=256)
def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


@contextmanager
def serving(host: str = "127.0.0.1") -> Iterator[Files]:
    """A server on loopback."""
    files = Files()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

        def do_HEAD(self) -> None:
            self.reply(body=False)

        def do_GET(self) -> None:
            self.reply(body=True)

        def reply(self, body: bool) -> None:
            with lock:
                files.now += 1
                files.most = max(files.most, files.now)
            try:
                self._reply(body)
            finally:
                with lock:
                    files.now -= 1

        def _reply(self, body: bool) -> None:
            path, _, query = self.path.partition("?")
            begin, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            headers = {key.lower(): value for key, value in self.headers.items()}
            request = Request(self.command, unquote(path), query, headers, int(begin), int(end) + 1 if end else None)
            time.sleep(files.latency)
            if files.hold is not None:
                files.hold.wait(60)
            with lock:
                files.requests.append(request)
                answer = files.answer(request)
                for i, (applies, fault, left) in enumerate(files.faults):
                    if left and applies(request) and answer.status in (200, 206, 412):
                        files.faults[i] = applies, fault, left - 1
                        fault(request, answer)
            self.send_response(answer.status)
            for key, value in {"Content-Length": f"{len(answer.body)}", **answer.headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if not body:
                return
            data = answer.body if answer.cut is None else answer.body[: answer.cut]
            try:
                self.send(data)
                self.wfile.flush()
                if answer.cut is not None:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # whoever asked has gone
                self.close_connection = True

        def send(self, data: bytes) -> None:
            if not files.rate:
                self.wfile.write(data)
                return
            began = time.monotonic()
            for at in range(0, len(data), 1 << 20):
                self.wfile.write(data[at : at + (1 << 20)])
                time.sleep(max(0.0, began + (at + (1 << 20)) / files.rate - time.monotonic()))

    class Server(ThreadingHTTPServer):
        request_queue_size = 256  # or many that come at once are sent away, for seconds

    server = Server((host, 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    files.address = f"http://{host}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
