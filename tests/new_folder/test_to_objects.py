"""Output to a store: what is there in the end is what a folder would have, or nothing of it is taken for a model."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from small_models import normal, triple, write_model

import ires_kernels as ik
from ires_kernels.checkpoints import objects, uploads
from ires_kernels.checkpoints.addresses import Address, Unreachable
from ires_kernels.checkpoints.prefix import Prefix
from ires_kernels.cli import main
from ires_kernels.command_line import failures
from ires_kernels.files.ownership import StoreError
from ires_kernels.new_folder import elsewhere
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.records.report import Report

pytest.importorskip("obstore")
pytest.importorskip("flask_cors")
pytest.importorskip("moto.server")
from s3_server import Asked, Bucket, serving

PART = 1 << 8
ROLES = ("target", "instruct", "base")


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    with serving() as bucket:
        yield bucket


@pytest.fixture
def bucket(server: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty one, and clients of it with small parts that do not wait long."""
    server.clear()
    for key, value in server.environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(uploads, "PART", PART)
    monkeypatch.setattr(uploads, "ROOM", 4)
    monkeypatch.setattr(uploads, "AT_ONCE", 2)
    monkeypatch.setattr(objects, "_RETRIES", 3)
    monkeypatch.setitem(objects._BACKOFF, "init_backoff", objects.timedelta(milliseconds=10))
    return server


@pytest.fixture
def models(tmp_path: Path) -> Path:
    triple(tmp_path, shards=3, files={"tokenizer_config.json": "{}", "additional_chat_templates/tools.jinja": "x"})
    return tmp_path


def merge(models: Path, out: object, **options: object) -> Report:
    report = ik.apply(models / "target", (models / "instruct", models / "base"), out=f"{out}", **options)  # type: ignore[arg-type]
    assert isinstance(report, Report)
    return report


def same(bucket: Bucket, folder: str, wanted: Path) -> None:
    """The objects are the files of a folder, but for what the manifest says of how they lie there."""
    found = bucket.objects(folder)
    there = {f"{path.relative_to(wanted)}": path.read_bytes() for path in wanted.rglob("*") if path.is_file()}
    assert found.keys() == there.keys()
    for name in ("ires.json", "residual.json"):
        tables = [json.loads(each.pop(name)) if name in each else {} for each in (found, there)]
        for table in tables:
            table.pop("samples", None)
            table.pop("signature", None)
        assert tables[0] == tables[1]
    assert found == there
    assert not bucket.uploads()


def test_the_objects_are_the_files(bucket: Bucket, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(models, models / "here", sha256=True)
    temporary = models / "temporary"
    temporary.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", f"{temporary}")
        report = merge(models, "s3://models/a/out", sha256=True, threads=3)
    assert os.listdir(temporary) == []
    assert f"{report.out}" == report.to_dict()["out"] == "s3://models/a/out"
    same(bucket, "a/out", models / "here")
    assert any(asked.is_part for asked in bucket.asked)
    last = [asked.path for asked in bucket.asked if asked.method == "PUT" and not asked.is_part][-2:]
    assert last == ["a/out/model.safetensors.index.json", "a/out/ires.json"]
    assert ik.verify("s3://models/a/out").ok
    assert ik.verify("s3://models/a/out", hashes_only=True).ok
    assert ik.status("s3://models/a/out").state == "finished"
    assert ik.inspect("s3://models/a/out")["tensors"] == ik.inspect(models / "here")["tensors"]
    bucket.asked.clear()
    again = merge(models, "s3://models/a/out/")
    assert "nothing was done" in again.notes[0]
    assert not any(asked.method == "PUT" for asked in bucket.asked)


def test_from_a_store_to_a_store(bucket: Bucket, models: Path) -> None:
    for role in ROLES:
        for path in (models / role).rglob("*"):
            if path.is_file():
                bucket.put(f"{role}/{path.relative_to(models / role)}", path.read_bytes())
    ik.extract(models / "base", models / "instruct", models / "residual", dtype="bf16")
    ik.apply(models / "target", models / "residual", out=models / "here", alpha=0.5)
    pair = ["s3://models/base", "s3://models/instruct", "--dtype", "bf16"]
    assert main(["extract", *pair, "-o", "s3://models/residual", "--quiet"]) == 0
    assert ik.status("s3://models/residual").what.startswith("extract")
    ik.apply("s3://models/target", "s3://models/residual", out="s3://models/out", alpha=0.5)
    here, there = models / "here", bucket.objects("out")
    for path in here.glob("*.safetensors"):
        assert there[path.name] == path.read_bytes()
    assert ik.verify("s3://models/out").ok


def test_tensors_without_elements_and_one_file(bucket: Bucket, tmp_path: Path) -> None:
    tensors = {
        "a.weight": normal((40, 30), 1),
        "b.none": torch.empty(0, 7, dtype=torch.bfloat16),
        "c.one": normal((1,), 2),
    }
    for number, role in enumerate(ROLES):
        write_model(tmp_path / role, {name: each + number * 0.01 for name, each in tensors.items()}, config={})
    merge(tmp_path, tmp_path / "here")
    merge(tmp_path, "s3://models/out")
    same(bucket, "out", tmp_path / "here")


@pytest.mark.parametrize("status", [0, 500, 503])
def test_what_is_tried_again(bucket: Bucket, models: Path, status: int) -> None:
    merge(models, models / "here")
    seen: dict[str, int] = {}

    def fault(asked: Asked) -> int | None:
        key = f"{asked.method} {asked.path} {asked.query.partition('&')[0]}"
        seen[key] = seen.get(key, 0) + 1
        return status if seen[key] == 1 and (asked.is_part or asked.is_completion) else None

    bucket.fault = fault
    merge(models, "s3://models/out")
    same(bucket, "out", models / "here")


LAST = "out/model-00002-of-00003.safetensors"
"""The file of weights that is written last."""


def refused_part(bucket: Bucket, asked: Asked) -> int | None:
    is_it = asked.is_part and asked.path == LAST and "partNumber=2" in asked.query
    return 403 if is_it and others_are_complete(bucket) else None


def refused_completion(bucket: Bucket, asked: Asked) -> int | None:
    return 500 if asked.is_completion and asked.path == LAST and others_are_complete(bucket) else None


def others_are_complete(bucket: Bucket) -> bool:
    """When they are: what fails ends all that is under way."""
    return wait_for(lambda: sum(name.endswith(".done") for name in bucket.names("out")) == 2)


def refused_index(_: Bucket, asked: Asked) -> int | None:
    return 403 if asked.method == "PUT" and asked.path.endswith("index.json") else None


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("fault", [refused_part, refused_completion, refused_index])
def test_what_fails_and_is_done_again(
    bucket: Bucket, models: Path, fault: Callable[[Bucket, Asked], int | None], capsys: pytest.CaptureFixture[str]
) -> None:
    merge(models, models / "here")
    bucket.fault = partial(fault, bucket)
    command = ["apply", f"{models / 'target'}", "--instruct", f"{models / 'instruct'}", "--base", f"{models / 'base'}"]
    assert main([*command, "-o", "s3://models/out"]) == 3
    told = capsys.readouterr().err
    assert "s3://models/out" in told
    assert "s3cr3t" not in told
    assert not bucket.uploads()
    assert "ires.json" not in bucket.names("out")
    assert "model.safetensors.index.json" not in bucket.names("out")
    bucket.fault = lambda _: None
    bucket.asked.clear()
    assert main([*command, "-o", "s3://models/out", "--quiet"]) == 0
    same(bucket, "out", models / "here")
    again = {asked.path for asked in bucket.asked if asked.is_part}
    assert again == ({LAST} if fault is not refused_index else set()), "what was complete is not sent again"


@pytest.fixture
def half(bucket: Bucket, models: Path) -> Bucket:
    """With an output of which the first files are complete."""
    bucket.fault = partial(refused_part, bucket)
    with pytest.raises(OSError, match="access is refused"):
        merge(models, "s3://models/out")
    bucket.fault = lambda _: None
    bucket.asked.clear()
    return bucket


def test_ctrl_c_at_once(bucket: Bucket, models: Path) -> None:
    def fault(asked: Asked) -> int | None:
        if asked.is_part:
            time.sleep(0.3)
        return None

    def progress(*_: int) -> None:
        raise KeyboardInterrupt

    bucket.fault = fault
    with pytest.raises(KeyboardInterrupt):
        merge(models, "s3://models/out", progress=progress)
    assert any(asked.is_part for asked in bucket.asked)
    assert not bucket.uploads()
    assert not bucket.names("out"), "nothing was complete"


def test_what_is_unfinished_is_no_model(half: Bucket, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "s3://models/out"]) == 2
    assert "is unfinished" in capsys.readouterr().err.replace("\n", " ")
    found = ik.status("s3://models/out")
    assert found.state == "unfinished"
    assert found.headway is not None
    assert found.headway.files_done == 2
    with pytest.raises(StoreError, match="files of another operation"):
        merge(models, "s3://models/out", alpha=0.5)
    merge(models, models / "here")
    assert ik.resume("s3://models/out").tensors == 7
    same(half, "out", models / "here")


def test_it_is_taken_back(half: Bucket, models: Path) -> None:
    half.put("out/notes.txt", b"of somebody else")
    assert ik.rollback("s3://models/out") == "s3://models/out: was removed."
    assert half.names("out") == ["notes.txt"]
    with pytest.raises(StoreError, match="nothing is unfinished there"):
        ik.resume("s3://models/out")
    with pytest.raises(StoreError, match="is not empty"):
        merge(models, "s3://models/out")


def test_what_somebody_else_has_put(half: Bucket, models: Path) -> None:
    merge(models, models / "here")
    half.put("out/model-00001-of-00003.safetensors", b"something else")
    merge(models, "s3://models/out")  # notices, and writes that one again
    same(half, "out", models / "here")


def test_what_somebody_else_puts_meanwhile(bucket: Bucket, models: Path) -> None:
    def fault(asked: Asked) -> int | None:
        if asked.method == "PUT" and asked.path == "out/README.md":
            bucket.put("out/model-00001-of-00003.safetensors", b"something else")
        return None

    bucket.fault = fault
    with pytest.raises(StoreError, match="is not what was put there"):
        merge(models, "s3://models/out")
    assert "ires.json" not in bucket.names("out")


def test_inputs_that_change_leave_nothing(bucket: Bucket, models: Path) -> None:
    path = models / "base" / "model-00001-of-00003.safetensors"

    def fault(asked: Asked) -> int | None:
        if asked.method == "PUT" and asked.path.endswith("README.md"):
            raw = path.read_bytes()
            path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        return None

    bucket.fault = fault
    with pytest.raises(ValueError, match="changed"):
        merge(models, "s3://models/out")
    assert not bucket.names("out")


_RUN = """
import sys
from ires_kernels.checkpoints import uploads
uploads.PART, uploads.ROOM, uploads.AT_ONCE = 1 << 8, 4, 2
from ires_kernels.cli import main
from ires_kernels.command_line import failures
sys.exit(main(sys.argv[1:]))
"""


def started(bucket: Bucket, models: Path, *more: str) -> subprocess.Popen[bytes]:
    command = ["apply", models / "target", "--instruct", models / "instruct", "--base", models / "base", *more]
    environment = {**os.environ, **bucket.environment()}
    return subprocess.Popen([sys.executable, "-c", _RUN, *map(str, command)], env=environment, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGINT])
def test_killed_and_run_again(bucket: Bucket, models: Path, number: signal.Signals) -> None:
    merge(models, models / "here")
    reached, goes_on = threading.Event(), threading.Event()

    def fault(asked: Asked) -> int | None:
        if asked.is_part and asked.path == LAST:
            reached.set()
            goes_on.wait(5)
        return None

    bucket.fault = fault
    process = started(bucket, models, "-o", "s3://models/out", "--quiet")
    assert reached.wait(60)
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.wait()
    goes_on.set()
    told = process.communicate()[1]
    bucket.fault = lambda _: None
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), told
    assert not {"config.json", "ires.json"} & {*bucket.names("out")}
    left = bucket.uploads()
    if number == signal.SIGINT:
        assert not left
        assert b"ires resume" in told
    merge(models, "s3://models/out")
    assert len(bucket.uploads()) <= len(left), "what was killed cannot be aborted, and nothing else is left"
    bucket.abort()
    same(bucket, "out", models / "here")


def test_two_at_once(bucket: Bucket, models: Path) -> None:
    merge(models, models / "here")
    found: list[object] = []

    def run(**options: object) -> None:
        try:
            found.append(merge(models, "s3://models/out", **options).tensors)
        except (OSError, ValueError) as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 7 in found
    assert all(each == 7 or "not empty" in f"{each}" for each in found), found
    same(bucket, "out", models / "here")


def test_another_operation_at_once(half: Bucket, models: Path) -> None:
    merge(models, models / "here")

    def fault(asked: Asked) -> int | None:
        if asked.is_part and not tried:
            tried.append(asked)
            with pytest.raises(StoreError, match="another operation"):
                merge(models, "s3://models/out", alpha=0.5)
        return None

    tried: list[Asked] = []
    half.fault = fault
    merge(models, "s3://models/out")
    assert tried
    same(half, "out", models / "here")


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("https://host/out", "is read, and never written"),
        ("s3://models/out.safetensors", "the output is a new folder"),
        ("s3://models/there", "is not empty"),
        ("s3://no-such-bucket/out", "there is no such bucket"),
    ],
)
def test_where_nothing_is_written(
    bucket: Bucket, models: Path, out: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.put("there/a", b"a")
    pair = ["--instruct", f"{models / 'instruct'}", "--base", f"{models / 'base'}"]
    assert main(["apply", f"{models / 'target'}", *pair, "-o", out]) in (2, 3)
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert bucket.names() == ["there/a"]


def test_the_mark_of_an_empty_folder(bucket: Bucket, models: Path) -> None:
    """Consoles put an object of no bytes with the name of the folder and a slash."""
    merge(models, models / "here")
    for folder in ("out", "target", "target/additional_chat_templates"):
        bucket.put(f"{folder}/", b"")
    for path in (models / "target").rglob("*"):
        if path.is_file():
            bucket.put(f"target/{path.relative_to(models / 'target')}", path.read_bytes())
    ik.apply("s3://models/target", (models / "instruct", models / "base"), out="s3://models/out")
    assert ik.verify("s3://models/out").ok
    assert {"out/"} <= {*bucket.names()}
    for path in (models / "here").glob("*.safetensors"):
        assert bucket.read(f"out/{path.name}") == path.read_bytes()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Error performing PUT https://h/a in 1ms - 400 Bad Request: <?xml ?>\n<Code>ExpiredToken</Code>", "expired"),
        ("Error performing HEAD https://h/a in 1ms - 400 Bad Request: \n\nDebug source:\n…", "expired"),
        ("Server returned error response: <?xml ?>\n<Error><Code>InvalidPart</Code>s3cr3t", "InvalidPart"),
        ("rust future panicked: unknown error", "Check its endpoint"),
    ],
)
def test_what_stores_answer_is_told(text: str, said: str) -> None:
    kind = type("RustPanic" if "panicked" in text else "GenericError", (Exception,), {})
    told = f"{objects.explained(kind(text), 's3://models/out', 'write')}"
    assert said in told
    assert not {"<", "s3cr3t", "https"} & {*told.split()}


def test_workers_are_refused(bucket: Bucket, models: Path) -> None:
    with pytest.raises(ArgumentError, match="workers write one folder on a disk"):
        merge(models, "s3://models/out", workers=(0, 2))
    with pytest.raises(ArgumentError, match="none is to be finished there"):
        ik.finish("s3://models/out")
    assert not bucket.names()


def test_memory_is_bounded_and_nobody_waits_for_ever(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[object]] = []

    class Counted(uploads._Part):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            alive.append(weakref.ref(self))
            gc.collect(0)
            assert sum(each() is not None for each in alive) <= 4

    monkeypatch.setattr(uploads, "_Part", Counted)
    random.seed(3)
    contents = {f"{number}": random.randbytes(random.choice([9, PART, 5 * PART, 7 * PART + 3])) for number in range(6)}
    run = uploads.Uploads(Prefix(Address.of("s3://models/out")), hashed=True)
    files = {
        name: run.add(name, content[:8], len(content), lambda each: each.sha256.encode())
        for name, content in contents.items()
    }
    tiles = iter([(name, at, min(at + 300, len(c))) for name, c in contents.items() for at in range(8, len(c), 300)])
    lock, errors = threading.Lock(), []

    def work() -> None:
        try:
            while True:
                with lock:
                    name, start, stop = next(tiles)
                files[name].write(contents[name][start:stop], start)
        except StopIteration:
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    complete = run.finish()
    found = bucket.objects("out")
    assert {name: found[name] for name in contents} == contents
    assert {name: found[uploads.note_of(name)].decode() for name in contents} == {
        name: each.sha256 for name, each in complete.items()
    }


def test_who_waits_is_told_that_it_is_over(bucket: Bucket) -> None:
    run = uploads.Uploads(Prefix(Address.of("s3://models/out")))
    file = run.add("a", b"", 20 * PART, lambda _: b"")
    threading.Timer(0.3, run.stop).start()
    with pytest.raises(Unreachable, match="the run has ended"):
        file.write(bytes(15 * PART), PART)  # far ahead of what comes first
    run.abandon()
    assert not bucket.uploads()
    assert not bucket.names()


@pytest.mark.parametrize("silent_from", [1, 9])
def test_ctrl_c_where_the_store_is_silent(
    bucket: Bucket,
    models: Path,
    silent_from: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in (failures, elsewhere, uploads):
        monkeypatch.setattr(module, "_PATIENCE", 0.3)
    monkeypatch.setattr(uploads, "_RETURNS", 0.3)
    goes_on, asked = threading.Event(), []

    def fault(each: Asked) -> int | None:
        asked.append(each)
        if len(asked) < silent_from:
            return None
        if len(asked) == silent_from:
            os.kill(os.getpid(), signal.SIGINT)
        goes_on.wait(30)
        return 0

    bucket.fault = fault
    started = time.monotonic()
    pair = ["--instruct", f"{models / 'instruct'}", "--base", f"{models / 'base'}"]
    try:
        assert main(["apply", f"{models / 'target'}", *pair, "-o", "s3://models/out", "--quiet"]) == 130
    finally:
        goes_on.set()
    assert time.monotonic() - started < 20
    assert "`ires status s3://models/out` says what is left of it" in capsys.readouterr().err.replace("\n", " ")
