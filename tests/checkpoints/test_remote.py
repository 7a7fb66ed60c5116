"""Models at addresses in place of paths: the same bits as from folders, or an error, whatever a server does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import range_server
import torch
from children import end_of, forked
from quantized_models import FORMATS
from range_server import Answer, Files, Request
from small_models import normal, triple, write_model

import ires_kernels as ik
from ires_kernels.checkpoints import ahead, far_folders, hub, objects
from ires_kernels.checkpoints.addresses import Address
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.cli import main
from ires_kernels.files.unfinished import partial_path
from ires_kernels.planning import evidence
from ires_kernels.streaming import stream

pytest.importorskip("obstore")

ROLES = ("target", "instruct", "base")


@pytest.fixture
def server() -> Iterator[Files]:
    with range_server.serving() as files:
        yield files


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a second try."""
    backoff = {key: value / 50 if key != "base" else value for key, value in objects._BACKOFF.items()}
    monkeypatch.setattr(objects, "_BACKOFF", backoff)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    triple(tmp_path / "models", shards=2, files={"tokenizer_config.json": "{}", "empty.txt": ""})
    return tmp_path / "models"


@pytest.fixture
def addresses(models: Path, server: Files) -> dict[str, str]:
    return {role: server.add(models / role, f"/models/{role}") for role in ROLES}


@pytest.fixture
def plain(models: Path, tmp_path: Path) -> dict[str, bytes]:
    """What the same merge makes of folders."""
    out = tmp_path / "plain"
    ik.apply(models / "target", (models / "instruct", models / "base"), out=out, alpha=0.7)
    return weights(out)


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".safetensors", ".index.json")}


def test_several_workers_on_models_at_addresses(
    addresses: dict[str, str], plain: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pair = (addresses["instruct"], addresses["base"])
    ik.apply(addresses["target"], pair, out=out, alpha=0.7, workers=(1, 3))
    ik.resume(out)
    assert weights(out) == plain
    for rank in range(3):
        ik.apply(addresses["target"], pair, out=tmp_path / "other", alpha=0.7, workers=(rank, 3))
    assert weights(tmp_path / "other") == plain


def merged(addresses: dict[str, str], out: Path) -> dict[str, bytes]:
    ik.apply(addresses["target"], (addresses["instruct"], addresses["base"]), out=out, alpha=0.7)
    return weights(out)


def command(addresses: dict[str, str], out: Path) -> list[str]:
    pair = ["--instruct", addresses["instruct"], "--base", addresses["base"]]
    return ["apply", addresses["target"], *pair, "--alpha", "0.7", "-o", f"{out}"]


def test_all_that_reads_models_reads_them_elsewhere(
    addresses: dict[str, str], models: Path, plain: dict[str, bytes], tmp_path: Path, server: Files
) -> None:
    target, instruct, base = (addresses[role] for role in ROLES)
    assert merged(addresses, tmp_path / "out") == plain
    assert (tmp_path / "out/config.json").read_bytes() == (models / "target/config.json").read_bytes()
    made = json.loads((tmp_path / "out/ires.json").read_text())
    assert {role: entry["path"] for role, entry in made["inputs"].items()} == addresses
    assert "bit for bit" in f"{ik.verify(tmp_path / 'out')}"
    ik.merge(tmp_path / "out/ires.json", out=tmp_path / "again")
    assert weights(tmp_path / "again") == plain

    ik.extract(base, instruct, tmp_path / "residual")
    server.add(tmp_path / "residual", "/residual")
    ik.apply(models / "target", f"{server.address}/residual", out=tmp_path / "far-residual", alpha=0.7)
    ik.apply(models / "target", tmp_path / "residual", out=tmp_path / "residual-here", alpha=0.7)
    assert weights(tmp_path / "far-residual") == weights(tmp_path / "residual-here")

    there, here = ik.load(target, (instruct, base)), ik.load(models / "target", (models / "instruct", models / "base"))
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert (
        ik.compare(target, (instruct, base)).total
        == ik.compare(models / "target", (models / "instruct", models / "base")).total
    )
    assert ik.inspect(target) | {"path": ""} == ik.inspect(models / "target") | {"path": ""}
    assert ik.inspect(target)["path"] == target


def test_one_file(server: Files, tmp_path: Path) -> None:
    """A file of weights with its settings beside it, at an address with a signature that is for it alone."""
    write_model(tmp_path / "one", {"a": normal((8, 8), 1)}, config={"model_type": "x"})
    address = server.add(tmp_path / "one", "/one")
    found = ik.inspect(f"{address}/model.safetensors?X-Signature=abc")
    assert (found["tensors"], found["path"]) == (1, f"{address}/model.safetensors")
    assert {request.query for request in server.requests} == {"X-Signature=abc"}


def cut(_: Request, answer: Answer) -> None:
    answer.cut = len(answer.body) // 2


def short(_: Request, answer: Answer) -> None:
    answer.body = answer.body[:-1]


def status(code: int) -> range_server.Fault:
    def fault(_: Request, answer: Answer) -> None:
        answer.status, answer.body = code, b""
        answer.headers.clear()

    return fault


@pytest.mark.parametrize("fault", [cut, short, status(429), status(503), status(500)], ids=lambda f: f.__qualname__)
def test_what_passes_gives_the_right_bytes(
    fault: range_server.Fault, addresses: dict[str, str], plain: dict[str, bytes], server: Files, tmp_path: Path
) -> None:
    server.fault(fault, times=2)
    server.fault(fault, times=2, first=True)
    assert merged(addresses, tmp_path / "out") == plain


def ignored(_: Request, answer: Answer) -> None:
    answer.status, answer.body = 200, bytes(100_000)
    answer.headers.pop("Content-Range")


def shifted(request: Request, answer: Answer) -> None:
    total = answer.headers["Content-Range"].partition("/")[2]
    stop = request.start + len(answer.body)
    answer.headers["Content-Range"] = f"bytes {request.start - 1}-{stop - 2}/{total}"


def resized(_: Request, answer: Answer) -> None:
    answer.headers["Content-Range"] = re.sub("/.*", "/99999", answer.headers["Content-Range"])


def other_etag(_: Request, answer: Answer) -> None:
    answer.headers["ETag"] = '"another"'


FATAL = {
    "ignored": (ignored, "with all of it"),
    "shifted": (shifted, "another range"),
    "resized": (resized, "changed after it was first read"),
    "other_etag": (other_etag, "changed after it was first read"),
    "always cut": (cut, "cut off|body"),
    "always short": (short, "wanted"),
    "gone": (status(404), "nothing is there"),
    "refused": (status(403), "access is refused"),
    "signed out": (status(401), "access is refused"),
    "precondition": (status(412), "changed after it was first read"),
    "busy": (status(503), "not available"),
    "too many": (status(429), "no time"),
    "broken": (status(500), "has failed"),
    "range": (status(416), "shorter than it was"),
}


@pytest.mark.parametrize("name", FATAL)
def test_what_does_not_pass_ends_it_with_nothing_left(
    name: str,
    addresses: dict[str, str],
    server: Files,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(objects, "_RETRIES", 2)
    fault, said = FATAL[name]
    server.fault(fault, name="instruct/model-00002-of-00002.safetensors")
    out = tmp_path / "out"
    assert main(command(addresses, out)) == 3
    told = capsys.readouterr().err
    assert re.search(said, told), told
    assert f"{addresses['instruct']}/model-00002-of-00002.safetensors: " in told
    assert "was not written and nothing is left" in told
    assert not out.exists()
    assert not partial_path(out).exists()


@pytest.mark.parametrize("pins", [True, False], ids=["If-Match", "no If-Match"])
@pytest.mark.parametrize("when", ["before the weights", "while they are read", "after them"])
def test_a_file_that_changes(
    when: str, pins: bool, addresses: dict[str, str], server: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bytes under the same name and of the same size, from some moment on."""
    server.pins = pins
    path = "/models/base/model-00002-of-00002.safetensors"
    asked = [0]
    known = server.answer

    def answer(request: Request) -> Answer:
        if request.path == path and request.start:
            asked[0] += 1
            if asked[0] == {"before the weights": 1, "while they are read": 5}.get(when, 0):
                server.files[path] = server.files[path][:-2] + b"\x00\x01"
        return known(request)

    server.answer = answer  # type: ignore[method-assign]
    if when == "after them":
        from ires_kernels.new_folder import run

        finish = run.finish

        def late(*arguments: object) -> None:
            server.files[path] = server.files[path][:-2] + b"\x00\x01"
            finish(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(run, "finish", late)
    out = tmp_path / "out"
    with pytest.raises(OSError, match="changed after it was first read"):
        merged(addresses, out)
    assert not out.exists()
    assert not partial_path(out).exists()


def test_a_body_that_goes_on_with_another_file(addresses: dict[str, str], server: Files, tmp_path: Path) -> None:
    """Cut off, and asked for the rest, the server has another file by then, and does not heed If-Match."""
    server.pins = False
    path = "/models/base/model-00002-of-00002.safetensors"

    def change(_: Request, answer: Answer) -> None:
        answer.cut = len(answer.body) // 2
        server.files[path] = server.files[path][:-2] + b"\x00\x01"

    server.fault(change, name=path, times=1)
    with pytest.raises(OSError, match=r"changed after it was first read|cut off"):
        merged(addresses, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_reads_headers_only(addresses: dict[str, str], server: Files, tmp_path: Path) -> None:
    plan = ik.apply(addresses["target"], (addresses["instruct"], addresses["base"]), out=tmp_path / "out", dry_run=True)
    assert "only headers were read" in f"{plan}"
    assert all(address in f"{plan}" for address in addresses.values())
    files = [request for request in server.requests if request.path.endswith(".safetensors")]
    read = [request for request in files if request.path in server.files]
    assert len(read) == 6
    assert {request.start for request in read} == {0}
    ends = {8 + int.from_bytes(server.files[request.path][:8], "little") for request in read}
    assert not any(end > 1 << 16 for end in ends)


def test_secrets_stay_with_their_host(
    models: Path, server: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's password goes to the host of the address, and not where that leads; nor into what is written or said."""
    with range_server.serving("localhost") as other:
        for role in ROLES:
            server.add(models / role, f"/{role}")
            other.add(models / role, f"/{role}")

        def elsewhere(request: Request, answer: Answer) -> None:
            answer.status, answer.body = 302, b""
            answer.headers = {"Location": f"{other.address}{request.path}?token=t0psecret"}

        server.fault(elsewhere, first=True)
        host = server.address.removeprefix("http://")
        addresses = {role: f"http://me:pa55word@{host}/{role}" for role in ROLES}
        addresses["base"] = f"{server.address}/base?sig=s1gnature"
        out = tmp_path / "out"
        assert main(command(addresses, out)) == 0
        assert other.requests
        assert all("authorization" not in request.headers for request in other.requests)
        assert not re.search("s1gnature|pa55word", f"{other.requests}")
        asked = [request for request in server.requests if not request.query]
        assert {request.headers.get("authorization") for request in asked} == {"Basic bWU6cGE1NXdvcmQ="}
        assert main(["status", f"{out}"]) == 0
        status_ = capsys.readouterr()
        texts = [path.read_bytes().decode(errors="replace") for path in out.rglob("*") if path.is_file()]
        other.fault(status(403), first=True)
        assert main(command(addresses, tmp_path / "refused")) == 3
        failed = capsys.readouterr()
        recipe = tmp_path / "recipe.yml"
        pair = f"instruct: '{addresses['instruct']}', base: '{addresses['base']}'"
        recipe.write_text(f"{{target: '{addresses['target']}', pairs: [{{{pair}}}]}}")
        other.faults.clear()
        ik.merge(recipe, out=tmp_path / "by-recipe")
        assert f"{server.address}/base" in (tmp_path / "by-recipe/ires.json").read_text()
        texts += [path.read_bytes().decode(errors="replace") for path in (tmp_path / "by-recipe").iterdir()]
        assert main(["apply", addresses["target"], "--pair", f"{addresses['base']}", "-o", "nowhere"]) == 2
        odd = capsys.readouterr()
        for text in (*texts, status_.out, status_.err, failed.out, failed.err, odd.out, odd.err):
            assert not re.search("pa55word|t0psecret|s1gnature|bWU6", text)


@pytest.mark.parametrize(
    "rest", ["pa55/w0rd@host/x", "pa55#w0rd@host/x", "pa55?w0rd@host/x", "pa55@w0rd@host:99999/x", "pa55\u2100@host/x"]
)
def test_addresses_that_are_none_keep_their_secrets(rest: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor are they said by commands that want a path: as one, an address has a slash less."""
    text = f"https://me:{rest}"
    out = ["-o", "nowhere"]
    for command_ in (["inspect", text], ["apply", text, text, *out], ["apply", "x", "--pair", f"{text}:{text}", *out]):
        assert main(command_) == 2
        assert not re.search("pa55|w0rd", capsys.readouterr().err)
    for command_ in (["status", text], ["finish", text], ["resume", text], ["rollback", text]):
        assert main(command_) == 2
        assert not re.search("pa55|w0rd", capsys.readouterr().err)


def test_where_a_signed_address_leads(server: Files, models: Path) -> None:
    """On to another that is signed as well, and asked for anew where that has expired; never to what is less safe."""
    server.add(models / "base", "/kept")
    signed, known = [0], server.answer

    def answer(request: Request) -> Answer:
        if request.path.startswith("/base/") and request.query == "sig=s1gnature":
            signed[0] += 1
            location = f"{request.path.replace('/base', '/kept')}?number={signed[0]}"
            there = known(Request("GET", request.path.replace("/base", "/kept"), "", {}, 0, 1))
            return Answer(302, b"", {"Location": location}) if there.status == 206 else there
        if request.path.startswith("/kept/") and request.query == "number=1":
            return Answer(403, b"", {})
        return known(request)

    server.answer = answer  # type: ignore[method-assign]
    assert ik.inspect(f"{server.address}/base?sig=s1gnature")["tensors"] == 7
    assert not re.search("s1gnature", f"{[request for request in server.requests if '/kept/' in request.path]}")
    for location in (
        "ftp://host/x",
        "s3://bucket/x",
        "http://[::1",
        f"{server.address}/base/config.json?sig=s1gnature",
    ):
        server.answer = lambda _, to=location: Answer(302, b"", {"Location": to})  # type: ignore[misc,method-assign]
        with pytest.raises(OSError, match=r"leads (to|from)") as caught:
            ik.inspect(f"{server.address}/base?sig=s1gnature")
        assert "s1gnature" not in f"{caught.value}"


def test_a_newer_signature_is_used(server: Files, models: Path, tmp_path: Path) -> None:
    """Also where the model was read with an older one before, which is refused by now."""
    server.add(models / "base", "/base")
    valid, known = ["old"], server.answer
    server.answer = lambda request: known(request) if request.query == valid[0] else Answer(403, b"", {})  # type: ignore[method-assign]
    ik.inspect(f"{server.address}/base?old")
    valid[0] = "new"
    ik.extract(f"{server.address}/base?new", models / "instruct", tmp_path / "residual")
    ik.extract(models / "base", models / "instruct", tmp_path / "here")
    assert weights(tmp_path / "residual") == weights(tmp_path / "here")


def test_forks_of_who_reads_elsewhere(server: Files, models: Path) -> None:
    """They say so, and do not wait for threads that they do not have."""
    address = server.add(models / "base", "/base")
    ik.inspect(address)

    def read() -> None:
        with pytest.raises(CheckpointError, match="is a fork"):
            ik.inspect(address)

    assert end_of(forked(read)) == 0


def test_settings_that_no_store_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "pa55word")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "t0psecret\n")
    with pytest.raises(CheckpointError, match="AWS_SESSION_TOKEN in the environment has a line break") as caught:
        ik.inspect("s3://bucket/model")
    assert "t0psecret" not in f"{caught.value}"
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://[bad")
    with pytest.raises(CheckpointError, match="Check its endpoint"):
        ik.inspect("s3://bucket/model")


def test_a_server_that_has_everything_is_refused(server: Files, models: Path) -> None:
    server.add(models / "base", "/base")

    def page(request: Request) -> Answer:
        stop = min(request.stop or 6, 6)
        return Answer(206, b"<html>"[:stop], {"ETag": '"x"', "Content-Range": f"bytes 0-{stop - 1}/6"})

    server.answer = page  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="has something under names that it cannot know"):
        ik.inspect(f"{server.address}/base")


def test_nothing_tells_whether_it_changes(server: Files, addresses: dict[str, str]) -> None:
    def bare(_: Request, answer: Answer) -> None:
        answer.headers.pop("ETag")
        answer.headers.pop("Last-Modified")

    server.fault(bare, name="", first=True)
    with pytest.raises((CheckpointError, OSError)) as caught:
        ik.inspect(addresses["base"])
    assert "ETag" in f"{caught.value}"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/nothing", "no file of a model is there"),
        ("/nothing.safetensors", "nothing is there"),
    ],
)
def test_what_is_not_there(path: str, said: str, server: Files) -> None:
    with pytest.raises((CheckpointError, OSError), match=said):
        ik.inspect(f"{server.address}{path}")


@pytest.mark.parametrize(
    "text",
    ["https://", "s3:///a", "https://host/a#b", "s3://b/a?x=1", "https://h:port/a", "https://host/../a", "s3://b/a\nb"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(CheckpointError, match="is no address"):
        ik.inspect(text)


def test_addresses_are_shown_without_secrets() -> None:
    address = Address.of("HTTPS://me:pa55@Host:8443/a/b%20c/?sig=x")
    assert f"{address}" == "https://host:8443/a/b%20c"
    assert f"{address.child('x y.json')}" == "https://host:8443/a/b%20c/x%20y.json"
    assert address.full() == "https://me:pa55@host:8443/a/b%20c?sig=x"
    assert Address.of("s3://Bucket/a").full() == "s3://Bucket/a"


def test_what_is_elsewhere_is_not_written(addresses: dict[str, str], models: Path) -> None:
    with pytest.raises(CheckpointError, match="is only read"):
        ik.apply(addresses["target"], (models / "instruct", models / "base"), in_place=True)
    with pytest.raises(CheckpointError, match="is read, and never written"):
        ik.apply(models / "target", (models / "instruct", models / "base"), out=f"{addresses['target']}/out")
    with pytest.raises(CheckpointError, match="is read, and never written"):
        ik.extract(models / "base", models / "instruct", "https://host/out")


def test_an_interrupted_merge_goes_on(
    addresses: dict[str, str], plain: dict[str, bytes], server: Files, tmp_path: Path
) -> None:
    """What a server that was away has interrupted; the address is in the record."""
    server.fault(status(404), name="target/model-00002-of-00002.safetensors")
    with pytest.raises(OSError, match="nothing is there"):
        ik.apply(
            addresses["target"], (addresses["instruct"], addresses["base"]), out=tmp_path / "out", alpha=0.7, threads=1
        )
    server.faults.clear()
    if partial_path(tmp_path / "out").exists():
        ik.resume(tmp_path / "out")
    else:
        merged(addresses, tmp_path / "out")
    assert weights(tmp_path / "out") == plain


@contextmanager
def held(server: Files) -> Iterator[None]:
    """Nobody is answered meanwhile, and who waits for that waits for long: nothing was said by the end."""
    before = len(server.requests)
    hold = server.hold = threading.Event()
    try:
        yield
        assert len(server.requests) == before
    finally:
        server.hold = None
        hold.set()


def test_ctrl_c_does_not_wait_for_a_server(addresses: dict[str, str], server: Files) -> None:
    """Nor does any other end of a run."""
    checkpoint = open_checkpoint(hub.local(addresses["base"]))

    def interrupt(*_: int) -> None:
        if server.now:
            raise KeyboardInterrupt

    with held(server), pytest.raises(KeyboardInterrupt):
        stream.hashes(checkpoint.tensors, checkpoint.file_ids, progress=interrupt)


def test_ctrl_c_while_a_model_is_opened(server: Files, tmp_path: Path) -> None:
    """No thread that still asks is waited for."""
    command_ = [sys.executable, "-m", "ires_kernels", "inspect", f"{server.address}/base?sig=s1gnature"]
    with held(server):
        child = subprocess.Popen(
            command_, env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}"}, cwd=tmp_path
        )
        while not server.now:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130


def test_reading_ahead(server: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latency is paid once and not for each tile, and memory stays within its bound."""
    monkeypatch.setattr(ahead, "PIECE", 1 << 18)
    monkeypatch.setattr(ahead, "MOST", 48 << 18)
    most = [0]
    known = ahead.Window.room.fget
    assert known is not None

    def room(window: ahead.Window) -> int:
        most[0] = max(most[0], window.near)
        return known(window)

    monkeypatch.setattr(ahead.Window, "room", property(room))
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": normal((1024, 1024), i) for i in range(4)}
    other = {name: tensor + 0.001 for name, tensor in tensors.items()}
    for name, each in (("base", tensors), ("instruct", other)):
        write_model(tmp_path / name, each, config={})
        server.add(tmp_path / name, f"/{name}")
    ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / "here")
    server.latency = 0.02
    ik.extract(f"{server.address}/base", f"{server.address}/instruct", tmp_path / "out", threads=1)
    assert weights(tmp_path / "out") == weights(tmp_path / "here")
    pieces = [r for r in server.requests if r.path.endswith(".safetensors") and r.stop and r.stop - r.start >= 1 << 18]
    assert len(pieces) >= 64
    assert server.most >= 16, "many requests are under way at once"
    assert most[0] <= ahead.MOST + 4 * ahead.PIECE


def test_pieces() -> None:
    """What lies and is read one behind the other is one piece, of a bounded size; what is read twice is in one."""
    size = ahead.PIECE
    assert ahead._cut([(0, 10), (10, 5), (100, 5)]) == [(0, 15), (100, 105)]
    assert ahead._cut([(5, size + 7)]) == [(5, size + 5), (size + 5, size + 12)]
    assert ahead._cut([(0, 10), (0, 10), (5, 3), (10, 1), (20, 0)]) == [(0, 11)]
    assert ahead._cut([(50, 10), (0, 10)]) == [(50, 60), (0, 10)]


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_a_server_that_is_not_ours(models: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
    user = "" if os.getuid() else "user root;"  # others cannot look into the folder of a test
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"daemon off; pid {tmp_path}/pid; {user} events {{}}\n"
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port}; root {models}; }} }}\n"
    )
    server = subprocess.Popen(["nginx", "-c", f"{config}", "-e", f"{tmp_path}/errors"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.05)
        assert merged({role: f"http://127.0.0.1:{port}/{role}" for role in ROLES}, tmp_path / "out") == plain
    finally:
        server.terminate()
        server.wait()


def test_sums_are_of_all_bytes(models: Path, addresses: dict[str, str]) -> None:
    """Not of what stands in for a file."""
    assert ik.sha256(addresses["base"]).sums == ik.sha256(models / "base").sums
    with pytest.raises(CheckpointError, match=r"is only read\. Without --write"):
        ik.sha256(addresses["base"], write=True)
    with pytest.raises(CheckpointError, match=r"is only read\. Have a copy of it on this disk, and publish that"):
        ik.publish(addresses["base"])


def test_in_place_and_interrupted(models: Path, addresses: dict[str, str], tmp_path: Path) -> None:
    """The target is here; what is added to it is elsewhere, and asked for again by who goes on."""
    for name in ("here", "there"):
        shutil.copytree(models / "target", tmp_path / name)
    ik.apply(tmp_path / "here", (models / "instruct", models / "base"), in_place=True)

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    pair = (addresses["instruct"], addresses["base"])
    with pytest.raises(KeyboardInterrupt):
        ik.apply(tmp_path / "there", pair, in_place=True, progress=stop)
    ik.resume(tmp_path / "there")
    assert weights(tmp_path / "there") == weights(tmp_path / "here")
    assert "this was applied before" in f"{ik.apply(tmp_path / 'there', pair, in_place=True)}"


def test_several_workers(addresses: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes its own stand-ins, and comes to the same plan."""
    merged(addresses, tmp_path / "alone")
    pair = addresses["instruct"], addresses["base"]
    for rank in range(2):
        monkeypatch.setattr(far_folders, "_made", {})
        ik.apply(addresses["target"], pair, out=tmp_path / "out", alpha=0.7, workers=(rank, 2))
    assert weights(tmp_path / "out") == weights(tmp_path / "alone")


def test_a_worker_asks_only_for_what_it_has_read(addresses: dict[str, str], server: Files, tmp_path: Path) -> None:
    """Whether all is as it was: of what goes into its file, and all at once; whoever finishes asks for all files."""
    for rank in range(2):
        server.requests.clear()
        ik.apply(
            addresses["target"],
            (addresses["instruct"], addresses["base"]),
            out=tmp_path / "out",
            threads=1,
            workers=(rank, 2),
        )
        asked = [request.path for request in server.requests if (request.start, request.stop) == (0, 1)]
        files = [path for path in asked if path.endswith(".safetensors")]
        if rank == 0:
            assert len({path.rpartition("/")[2] for path in files}) == 1
            assert len(set(files)) == 3
    target = open_checkpoint(hub.local(addresses["target"]))
    server.latency, server.most = 0.3, 0
    target.changed()
    assert server.most == 2


@pytest.mark.parametrize("format", ["fp8-block", "nvfp4", "pack-quantized"])
def test_codes(format: str, server: Files, tmp_path: Path) -> None:
    make, settings = FORMATS[format]
    weight = "model.layers.0.mlp.up_proj.weight"
    addresses = {}
    for i, role in enumerate(ROLES):
        numbers = normal((64, 96), 1) + 0.01 * normal((64, 96), 7 + i)
        stored = {weight: numbers} if role == "target" else make(weight, numbers)
        config = {"model_type": "llama"} | ({} if role == "target" else {"quantization_config": settings})
        write_model(tmp_path / role, {**stored, "model.norm.weight": normal((96,), 2)}, config=config)
        addresses[role] = server.add(tmp_path / role, f"/{role}")
    ik.apply(tmp_path / "target", (tmp_path / "instruct", tmp_path / "base"), out=tmp_path / "here", alpha=0.7)
    assert merged(addresses, tmp_path / "out") == weights(tmp_path / "here")


def test_what_is_compared_before_is_read_ahead(server: Files, tmp_path: Path) -> None:
    """A head that is the embedding once more is read to its end, in pieces and not in the steps of the comparison."""
    embedding = normal((1000, 1024), 1)
    addresses = {}
    for i, role in enumerate(ROLES):
        own = embedding + 0.01 * normal((1000, 1024), 7 + i)
        tensors = {
            "model.embed_tokens.weight": own,
            "lm_head.weight": own.clone(),
            "model.norm.weight": normal((9,), 2),
        }
        write_model(tmp_path / role, tensors, config={"model_type": "llama"})
        addresses[role] = server.add(tmp_path / role, f"/{role}")
    ik.apply(tmp_path / "target", (tmp_path / "instruct", tmp_path / "base"), out=tmp_path / "here", alpha=0.7)
    assert merged(addresses, tmp_path / "out") == weights(tmp_path / "here")
    large = [request for request in server.requests if request.stop and request.stop - request.start > 1 << 17]
    assert len(large) == 3 * (2 + 1 + 1), "the beginnings of both, both as one piece, and what is merged"


def weak(_: Request, answer: Answer) -> None:
    if "ETag" in answer.headers:
        answer.headers["ETag"] = f"W/{answer.headers['ETag']}"


@pytest.mark.parametrize("how", ["weak ETags", "times alone"])
def test_files_that_are_pinned_otherwise(
    how: str, addresses: dict[str, str], plain: dict[str, bytes], server: Files, tmp_path: Path
) -> None:
    """A weak ETag is compared, and no condition of requests, as ranges need a strong one; a time serves as well."""
    server.etags = how == "weak ETags"
    server.fault(weak, name="", first=True)
    assert merged(addresses, tmp_path / "out") == plain
    assert not any("if-match" in request.headers for request in server.requests)

    def later(_: Request, answer: Answer) -> None:
        answer.headers["Last-Modified"] = "Tue, 02 Jan 2024 00:00:00 GMT"
        answer.headers.update({"ETag": 'W/"another"'} if server.etags else {})

    server.fault(later, name="base/model-00002-of-00002.safetensors")
    with pytest.raises(OSError, match="changed after it was first read"):
        merged(addresses, tmp_path / "changed")


def test_a_long_header(server: Files, tmp_path: Path) -> None:
    """It takes a second request."""
    write_model(tmp_path / "long", {f"model.layers.{i}.norm.weight": normal((4,), i) for i in range(1500)}, config={})
    address = server.add(tmp_path / "long", "/long")
    assert ik.inspect(address)["tensors"] == 1500
    assert ik.sha256(address).sums == ik.sha256(tmp_path / "long").sums


def test_nothing_here_can_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(CheckpointError, match=r"pip install 'ires_kernels\[remote\]'"):
        ik.inspect("https://127.0.0.1:9/model")


def test_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_RETRIES", 1)
    with pytest.raises(OSError, match="nobody answers there"):
        ik.inspect("http://127.0.0.1:9/model")


def test_looks_are_bounded(
    addresses: dict[str, str], plain: dict[str, bytes], server: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a request, and a model may have 100,000 tensors."""
    asked = []
    for most in (30_000, 8, 0):
        monkeypatch.setattr(evidence, "_MOST_REQUESTS", most)
        server.requests.clear()
        assert merged(addresses, tmp_path / f"out-{most}") == plain
        asked.append(len(server.requests))
    assert asked[0] > asked[1] > asked[2]
