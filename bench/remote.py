"""How fast a model is read that is elsewhere: from a server on loopback that is slow in the way stores are.

    python bench/remote.py [--size 4] [--rate 25] [--latency 50] [--threads 2]

Each answer comes after a latency and no faster than a rate. Two files of `size` GB, which the server makes up, are read
through to the end by the engine, as a merge reads its inputs; nothing is written. What comes out is held against 32
answers at full rate. The server is a process of its own and takes CPU time as well: with both on two cores that others
use, the machine may be the limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TENSOR = 4096, 4096
"""Shape of each tensor, of bfloat16."""
BLOCK = bytes(range(256)) * 1024


def header(size: float) -> bytes:
    nbytes = TENSOR[0] * TENSOR[1] * 2
    entries = {
        f"model.layers.{i}.mlp.up_proj.weight": {
            "dtype": "BF16", "shape": TENSOR, "data_offsets": [i * nbytes, (i + 1) * nbytes],
        }
        for i in range(max(1, int(size * 1e9 / nbytes)))
    }  # fmt: skip
    body = json.dumps(entries).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def serve(size: float, rate: float, latency: float, port: Any) -> None:
    """Answer for /a and /b until the process is ended."""
    head = header(size)
    total = len(head) + max(json.loads(head[8:]).values(), key=lambda e: e["data_offsets"][1])["data_offsets"][1]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

        def do_GET(self) -> None:
            time.sleep(latency)
            if not self.path.endswith("/model.safetensors"):
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            stop = min(last + 1, total)
            self.send_response(206)
            self.send_header("ETag", f'"{total}"')
            self.send_header("Content-Length", f"{stop - first}")
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{total}")
            self.end_headers()
            began, done = time.monotonic(), 0
            while done < stop - first:
                part = (head[first + done :] or BLOCK)[: stop - first - done]
                self.wfile.write(part)
                done += len(part)
                time.sleep(max(0.0, began + done / rate - time.monotonic()))

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 512

    server = Server(("127.0.0.1", 0), Handler)
    port.value = server.server_address[1]
    server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=4, help="GB of each of two files")
    parser.add_argument("--rate", type=float, default=25, help="MB/s of each answer")
    parser.add_argument("--latency", type=float, default=50, help="ms until it begins")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    port = multiprocessing.Value("i", 0)
    server = multiprocessing.Process(
        target=serve, args=(asked.size, asked.rate * 1e6, asked.latency / 1e3, port), daemon=True
    )
    server.start()
    from ires_kernels.checkpoints import ahead, hub
    from ires_kernels.checkpoints.validation import open_checkpoint
    from ires_kernels.streaming import stream

    while not port.value:
        time.sleep(0.01)
    began = time.monotonic()
    models = [open_checkpoint(hub.local(f"http://127.0.0.1:{port.value}/{name}")) for name in "ab"]
    opened = time.monotonic() - began
    refs = {f"{i}/{name}": ref for i, model in enumerate(models) for name, ref in model.tensors.items()}
    file_ids = {path: known for model in models for path, known in model.file_ids.items()}
    nbytes = sum(ref.nbytes for ref in refs.values())
    began, cpu = time.monotonic(), time.process_time()
    stream.hashes(refs, file_ids, threads=asked.threads)
    took, cpu = time.monotonic() - began, time.process_time() - cpu
    server.terminate()
    full = ahead.AT_ONCE * asked.rate * 1e6
    print(f"opened both models in {opened:.2f} s")
    print(
        f"read {nbytes / 1e9:.1f} GB in {took:.1f} s: {nbytes / took / 1e6:.0f} MB/s, {nbytes / took / full:.2f} of "
        f"{ahead.AT_ONCE} × {asked.rate:g} MB/s; {cpu:.1f} s of CPU time, "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB at most"
    )


if __name__ == "__main__":
    main()
