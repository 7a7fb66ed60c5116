"""A small server that speaks what the Hub's client asks: models, their commits and files, and its ways to refuse."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@dataclass
class Model:
    """A repository: the files of each commit, and what its branches are."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    refusal: tuple[int, str, str] | None = None
    """Status, X-Error-Code and X-Error-Message of every answer."""

    def push(self, folder: Path, ref: str = "main", also: dict[str, bytes] | None = None) -> str:
        """A commit of the files of a folder; returns its hash."""
        files = {f"{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()} | (also or {})
        commit = hashlib.sha1(repr(sorted((n, hashlib.sha1(b).hexdigest()) for n, b in files.items())).encode())
        self.commits[commit.hexdigest()] = files
        self.refs[ref] = commit.hexdigest()
        return commit.hexdigest()


@dataclass
class Hub:
    """What the server has, and what it was asked."""

    models: dict[str, Model] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path."""
    tokens: set[str] = field(default_factory=set)
    url: str = ""
    busy: int = 0
    """How many of the next downloads are answered with 429."""
    on_get: list[object] = field(default_factory=list)
    """Called, once each, before a file is sent."""
    elsewhere: str = ""
    """Address of the host of all weights, to which one is sent with a signature."""
    signed: int = 0
    """Signatures that were given."""

    def downloaded(self) -> list[str]:
        """Names of the files that were sent, in order."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for m, path in self.requests
            if m == "GET" and "/resolve/" in path
        ]


@contextmanager
def serving() -> Iterator[Hub]:
    """A server on loopback."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": f"{len(data)}", **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def refuse(self, status: int, code: str, message: str, body: bool) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self.send(status, json.dumps({"error": message}).encode(), headers, body)

        def answer(self, body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.requests.append((self.command, path))
            if "authorization" in self.headers:
                hub.tokens.add(self.headers["authorization"])
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/([^/]+)|/tree/([^/]+).*)?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = api or file
            model = hub.models.get(found[1]) if found else None
            if found is None or model is None:
                return self.refuse(404, "RepoNotFound", "Repository not found", body)
            if model.refusal is not None:
                return self.refuse(*model.refusal, body)
            revision = (api[3] or api[4] or "main") if api else file[2]
            commit = model.refs.get(revision, revision)
            if commit not in model.commits:
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}", body)
            files = model.commits[commit]
            if api and api[4]:
                tree = [
                    {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for n, b in files.items()
                ]
                return self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
            if api:
                info = {
                    "id": found[1],
                    "modelId": found[1],
                    "sha": commit,
                    "siblings": [{"rfilename": name} for name in files],
                }
                return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
            if file[3] not in files:
                return self.refuse(404, "EntryNotFound", f"Entry not found: {file[3]}", body)
            if body and hub.busy:
                hub.busy -= 1
                return self.send(429, b"", {"Retry-After": "0"}, body)
            if body and hub.on_get:
                hub.on_get.pop()()  # type: ignore[operator]
            data = files[file[3]]
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            headers = {"X-Repo-Commit": commit, "ETag": tag}
            if hub.elsewhere and file[3].endswith(".safetensors"):
                hub.signed += 1
                where = f"{hub.elsewhere}{path}?X-Signature=s1gn{hub.signed}"
                linked = {"Location": where, "X-Linked-ETag": tag, "X-Linked-Size": f"{len(data)}"}
                return self.send(302, b"", headers | linked, body)
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
            if asked and int(asked[1]) < len(data):
                part = data[int(asked[1]) : int(asked[2]) + 1]
                headers["Content-Range"] = f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}"
                return self.send(206, part, headers, body)
            return self.send(200, data, headers, body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
