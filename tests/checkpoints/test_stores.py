"""Models in S3, as moto has it: found by listing, read by ranges, pinned by ETag; and what stores refuse."""

from __future__ import annotations

import _thread
import os
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_models import triple

import ires_kernels as ik
from ires_kernels.checkpoints import hub, objects
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.cli import main
from ires_kernels.streaming import stream

obstore = pytest.importorskip("obstore")
moto = pytest.importorskip("moto.server")
pytest.importorskip("flask_cors")

ROLES = ("target", "instruct", "base")
KEYS = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "s3cr3t-key", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def models(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of models, which are in a bucket as well, with what lies beside models and is none of their files."""
    for key, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(key, value)
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/models", method="PUT")).close()
    triple(tmp_path, shards=2, files={"tokenizer_config.json": "{}", "additional_chat_templates/tools.jinja": "x"})
    (tmp_path / "target" / "notes.txt").write_text("of nobody's list")
    for role in ROLES:
        for path in (tmp_path / role).rglob("*"):
            if path.is_file():
                put(f"{role}/{path.relative_to(tmp_path / role)}", path.read_bytes())
        put(f"{role}/checkpoint-1/model.safetensors", b"an older one")
        put(f"{role}/optimizer.pt", b"x" * 100)
    return tmp_path


def put(name: str, data: bytes) -> None:
    obstore.put(obstore.store.from_url("s3://models"), name, data)


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def test_a_merge_of_models_in_a_bucket(models: Path) -> None:
    ik.apply(models / "target", (models / "instruct", models / "base"), out=models / "here")
    ik.apply("s3://models/target", ("s3://models/instruct", "s3://models/base/"), out=models / "out")
    assert weights(models / "out") == weights(models / "here")
    beside = {f"{path.relative_to(models / 'out')}" for path in (models / "out").rglob("*") if path.is_file()}
    assert {"notes.txt", "tokenizer_config.json", "additional_chat_templates/tools.jinja"} <= beside
    assert not {"optimizer.pt", "checkpoint-1/model.safetensors"} & beside
    assert ik.verify(models / "out").ok
    name = "model-00001-of-00002.safetensors"
    assert ik.inspect(f"s3://models/base/{name}")["tensors"] == ik.inspect(models / "base" / name)["tensors"]


def test_an_object_that_changes(models: Path) -> None:
    checkpoint = open_checkpoint(hub.local("s3://models/base"))
    name = "base/model-00001-of-00002.safetensors"
    put(name, (models / name).read_bytes()[:-2] + b"\x00\x01")
    with pytest.raises(OSError, match=r"changed after it was first read.*s3://models/base/"):
        stream.hashes(checkpoint.tensors, checkpoint.file_ids)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://models/nothing", "no file of a model is there"),
        ("s3://no-such-bucket/a", "nothing is there"),
        ("s3://models/base/nothing.safetensors", "nothing is there"),
        ("az://container/a", "Account must be specified"),
    ],
)
@pytest.mark.usefixtures("models")
def test_what_is_not_there(
    address: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    assert main(["inspect", address]) in (2, 3)
    told = capsys.readouterr().err
    assert said in told
    assert address.partition("?")[0] in told
    assert "s3cr3t" not in told


def test_the_end_waits_for_threads_of_the_client() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), []

    def tell() -> None:
        begun.set()
        may_end.wait(10)
        ended.append(True)

    _thread.start_new_thread(tell, ())  # as threads of Rust are, it is none that `threading` knows
    assert begun.wait(10)
    objects._let_end(os.getpid() + 1)  # of a fork, to which they do not belong
    assert not ended
    threading.Timer(0.05, may_end.set).start()
    objects._let_end(os.getpid())
    assert ended
