"""A store of S3 as moto has it, behind a server that knows what was asked of it, and may answer otherwise."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import moto.s3.models
import obstore
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "s3cr3t-key", "AWS_REGION": "us-east-1"}
BUCKET = "models"


class Asked(NamedTuple):
    """One request."""

    method: str
    path: str
    """From the bucket on."""
    query: str
    size: int

    @property
    def is_part(self) -> bool:
        return self.method == "PUT" and "partNumber" in self.query

    @property
    def is_completion(self) -> bool:
        return self.method == "POST" and "uploadId" in self.query


Fault = Callable[[Asked], int | None]
"""The status to answer with in place of asking the store; 0: none, the connection is cut; None: what the store says."""


@dataclass
class Bucket:
    """What is in the store, asked without the server in front of it."""

    endpoint: str
    store: str
    asked: list[Asked] = field(default_factory=list)
    fault: Fault = lambda _: None

    def environment(self) -> dict[str, str]:
        """What a client has to know."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.endpoint, "AWS_ALLOW_HTTP": "true"}

    def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        connection = http.client.HTTPConnection(self.store)
        try:
            connection.request(method, path, body, {"Content-Type": "application/octet-stream"})
            return connection.getresponse().read()
        finally:
            connection.close()

    def names(self, folder: str = "") -> list[str]:
        """Of all objects, those in a folder within that."""
        begin = f"{folder}/" if folder else ""
        found = re.findall("<Key>([^<]*)</Key>", self.ask("GET", f"/{BUCKET}?list-type=2").decode())
        return sorted(name.removeprefix(begin) for name in found if name.startswith(begin))

    def objects(self, folder: str) -> dict[str, bytes]:
        """Of a folder, by name."""
        return {name: self.read(f"{folder}/{name}") for name in self.names(folder)}

    def read(self, name: str) -> bytes:
        """One object."""
        return bytes(obstore.get(self._client(), name).bytes())

    def _client(self, folder: str = "") -> Any:
        """What clients have put may be read by them alone."""
        return obstore.store.S3Store(
            BUCKET,
            prefix=folder,
            config={"endpoint": f"http://{self.store}", "access_key_id": "an-id", "secret_access_key": "s3cr3t-key"},
            client_options={"allow_http": True},
        )

    def put(self, name: str, content: bytes) -> None:
        self.ask("PUT", f"/{BUCKET}/{name}", content)

    def uploads(self) -> list[str]:
        """Those that are neither complete nor aborted."""
        return re.findall("<UploadId>([^<]*)</UploadId>", self.ask("GET", f"/{BUCKET}?uploads").decode())

    def clear(self) -> None:
        """Have it as it was at first."""
        self.fault = lambda _: None
        for backends in moto.s3.models.s3_backends.values():
            backends["aws"].buckets[BUCKET].keys.clear()
        self.abort()
        self.asked.clear()

    def abort(self) -> None:
        """Forget all uploads that are not complete, as a rule of a bucket's life cycle does."""
        for backends in moto.s3.models.s3_backends.values():
            backends["aws"].buckets[BUCKET].multiparts.clear()


@contextmanager
def serving() -> Iterator[Bucket]:
    """A store with an empty bucket, which takes parts of any size."""
    least, moto.s3.models.S3_UPLOAD_PART_MIN_SIZE = moto.s3.models.S3_UPLOAD_PART_MIN_SIZE, 1
    inner = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    inner.start()
    host, port = inner.get_host_and_port()
    front = _Front(("127.0.0.1", 0), _Handler)
    front.bucket = Bucket(f"http://127.0.0.1:{front.server_address[1]}", f"{host}:{port}")
    thread = threading.Thread(target=front.serve_forever, args=(0.05,))
    thread.start()
    try:
        front.bucket.ask("PUT", f"/{BUCKET}")
        yield front.bucket
    finally:
        front.shutdown()
        thread.join()
        front.server_close()
        inner.stop()
        moto.s3.models.S3_UPLOAD_PART_MIN_SIZE = least


class _Front(ThreadingHTTPServer):
    daemon_threads = True
    bucket: Bucket

    def handle_error(self, *_: object) -> None:
        """Clients that go away are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Front

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def reply(self) -> None:
        bucket = self.server.bucket
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, _, query = self.path.partition("?")
        asked = Asked(self.command, path.removeprefix(f"/{BUCKET}/"), query, len(body))
        bucket.asked.append(asked)
        status = bucket.fault(asked)
        if status == 0:
            self.close_connection = True
            return
        if status is not None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = http.client.HTTPConnection(bucket.store)
        headers = {"Content-Type": "application/octet-stream"} | {
            key: value for key, value in self.headers.items() if key.lower() not in ("host", "content-length")
        }
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(key, value)
            self.send_header("Content-Length", answer.getheader("Content-Length") or f"{len(data)}")
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(data)
        finally:
            connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = reply
