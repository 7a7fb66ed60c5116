"""Whatever lies under a name that is read: every command says so at once, and neither waits nor fills the memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_models import triple

import ires_kernels as ik
from ires_kernels import cli
from ires_kernels.checkpoints.header import MAX_DEPTH, CheckpointError, parse_json
from ires_kernels.files.opening import MAX_CONFIG, open_file, read_bytes

INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
FILES = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "generation_config.json": "{}"}


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """A command that waits, or takes 4 GiB of memory, is a failure."""

    def ring(*_: object) -> None:
        raise TimeoutError("it waits")

    before, limits = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), limits[1]))
    signal.alarm(20)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, before)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)  # as its address has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def folder(path: Path) -> None:
    path.mkdir()


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_a_terminal(path: Path) -> None:
    path.symlink_to("/dev/ptmx")


def link_without_a_size(path: Path) -> None:
    path.symlink_to("/proc/self/maps")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("gone")


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(100 << 30)


def device(path: Path) -> None:
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))


def deep(path: Path) -> None:
    path.write_text('{"a":' + "[" * 900 + "]" * 900 + "}")


KINDS = [fifo, unix_socket, folder, link_to_a_device, link_to_a_terminal, link_without_a_size, loop, dangling, huge,
         pytest.param(device, marks=pytest.mark.root)]  # fmt: skip
Make = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and what was made of them."""
    place = tmp_path_factory.mktemp("models")
    base, instruct, target = triple(place, shards=2, files=FILES)
    ik.extract(base, instruct, place / "residual", sync=False)
    ik.apply(target, place / "residual", out=place / "out", sync=False)
    return place


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    """The same, as links to files that nothing changes."""
    for path in made.rglob("*"):
        if path.is_file():
            place = tmp_path / path.relative_to(made)
            place.parent.mkdir(exist_ok=True)
            os.link(path, place)
    return tmp_path


def commands(models: Path) -> dict[str, list[str]]:
    pair = ["--instruct", f"{models / 'instruct'}", "--base", f"{models / 'base'}"]
    moved = [f"--residual={models / 'residual'}", f"--target={models / 'target'}"]
    target = f"{models / 'target'}"
    return {
        "extract": ["extract", f"{models / 'base'}", f"{models / 'instruct'}", "-o", f"{models / 'new'}", "--quiet"],
        "apply": ["apply", target, *pair, "-o", f"{models / 'new'}", "--quiet"],
        "in place": ["apply", target, *pair, "--in-place", "--quiet"],
        "residual": ["apply", target, f"{models / 'residual'}", "-o", f"{models / 'new'}", "--quiet"],
        "again": ["apply", target, f"{models / 'residual'}", "-o", f"{models / 'out'}", "--quiet"],
        "verify": ["verify", f"{models / 'out'}", *moved, "--quiet"],
        "inspect": ["inspect", f"{models / 'instruct'}"],
        "status": ["status", f"{models / 'instruct'}"],
    }


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    ("where", "name", "readers"),
    [
        ("instruct", "config.json", "extract apply inspect status"),
        ("instruct", "ires.json", "extract apply inspect status"),
        ("instruct", INDEX, "extract apply inspect status"),
        ("instruct", SHARD, "extract apply inspect status"),
        ("instruct", "tokenizer.json", "extract apply"),
        ("instruct", "tokenizer_config.json", "extract apply"),
        ("instruct", "generation_config.json", "extract apply"),
        ("target", "config.json", "apply residual verify"),
        ("residual", "residual.json", "residual verify"),
        ("residual", "residual.safetensors.index.json", "residual verify"),
        ("out", "ires.json", "verify again"),
        ("out", SHARD, "verify again"),
        ("out", "tokenizer.json", "verify"),
    ],
)
def test_no_command_waits(
    models: Path, capsys: pytest.CaptureFixture[str], where: str, name: str, readers: str, make: Make
) -> None:
    if name in FILES and (make is folder or (make is huge and where == "out")):
        pytest.skip("there may be folders of such names, and files of any size in what is verified")
    path = models / where / name
    path.unlink(missing_ok=True)
    make(path)
    for reader in readers.split():
        code = cli.main(commands(models)[reader])
        error = capsys.readouterr().err
        changed = reader == "verify" and name in FILES  # it is not what the merge has written
        assert code == (1 if changed else 2), error
        assert changed or reader == "again" or name in error
        assert not (models / "new").exists()


@pytest.mark.parametrize("name", ["config.json", "ires.json", INDEX, "tokenizer_config.json"])
def test_json_has_a_depth_that_no_stack_decides(models: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = models / "target" / name
    path.unlink(missing_ok=True)
    deep(path)
    for command in ("apply", "in place"):
        code = cli.main(commands(models)[command])
        if name == "tokenizer_config.json":  # which is copied and not read
            continue
        assert code == 2
        assert f"{name}: JSON is nested too deeply: wanted at most {MAX_DEPTH} levels" in capsys.readouterr().err
    if name != "tokenizer_config.json":
        assert not (models / "target" / ".ires-unfinished").exists()


@pytest.mark.parametrize("text", ["[", '{"a":', '[{"a":'])
def test_the_depth_is_that_of_the_brackets_outside_of_strings(text: str) -> None:
    close = {"[": "]", '{"a":': "}", '[{"a":': "}]"}[text]
    levels = sum(map(text.count, "[{"))

    def nested(depth: int) -> bytes:
        return ('{"x":' + text * (depth // levels) + "1" + close * (depth // levels) + "}").encode()

    limit = (MAX_DEPTH - 1) // levels * levels
    assert parse_json(nested(limit), "here")
    with pytest.raises(CheckpointError, match="here: JSON is nested too deeply"):
        parse_json(nested(limit + levels), "here")


def test_brackets_in_strings_have_no_depth() -> None:
    value = {"[" * 500: '\\"{' * 500, "a\\": ["{" * 500, '"', "\\\\", '\\\\"[' * 200]}
    raw = json.dumps(value).encode()
    assert parse_json(raw, "here") == value
    assert parse_json(raw.replace(b"500", b"500"), "here") == value


def test_the_depth_does_not_depend_on_the_callers_stack() -> None:
    raw = ('{"x":' + "[" * 90 + "]" * 90 + "}").encode()
    bad = ('{"x":' + "[" * 101 + "]" * 101 + "}").encode()

    def down(levels: int) -> None:
        if levels:
            down(levels - 1)
        else:
            assert parse_json(raw, "here")
            with pytest.raises(CheckpointError, match="nested too deeply"):
                parse_json(bad, "here")

    for levels in (0, sys.getrecursionlimit() - 400):
        down(levels)


def test_sizes_are_looked_at_before_the_first_byte(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    assert read_bytes(path, 8) == b"12345678"
    with pytest.raises(CheckpointError, match=r"file: has 8 bytes, wanted at most 7"):
        read_bytes(path, 7)
    with open(path, "wb") as file:
        file.truncate(MAX_CONFIG + 1)
    with pytest.raises(CheckpointError, match="wanted at most"):
        read_bytes(path, MAX_CONFIG)
    assert read_bytes("/proc/self/maps", 8) == b"", "a file without a size has no bytes to read"


def test_what_is_opened_is_not_followed_where_it_must_not_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(CheckpointError, match="link: is a symbolic link"):
        open_file(tmp_path / "link", flags=os.O_NOFOLLOW)
    place = os.open(tmp_path, os.O_RDONLY)
    try:
        assert read_bytes("file", 9, dir_fd=place) == b"x"
        fd = open_file("link", dir_fd=place)
        assert not os.get_inheritable(fd)
        os.close(fd)
    finally:
        os.close(place)


def test_verify_opens_no_input_that_a_stranger_names(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, path = models / "out", models / "out" / "ires.json"
    text = path.read_text()
    assert not ik.verify(out).notes, "it is our own, and says where the inputs were"
    path.unlink()
    os.mkfifo(models / "pipe")
    for place in (models / "pipe", Path("/dev/zero"), models / "gone"):
        table = json.loads(text)
        table["inputs"]["residual"]["path"] = f"{place}"
        path.write_text(json.dumps(table))
        report = ik.verify(out)
        assert report.hashes_only
        assert report.ok
        assert "--trust-inputs" in report.notes[0]
        assert "--trust-inputs" in f"{report}"
        assert cli.main(["verify", f"{out}", "--trust-inputs"]) == 2
        assert place.name in capsys.readouterr().err
    target, residual = models / "target", models / "residual"
    assert cli.main(["verify", f"{out}", f"--target={target}"]) == 2
    assert "not believed where residual is" in capsys.readouterr().err
    report = ik.verify(out, inputs={"target": target, "residual": residual})
    assert report.ok
    assert not report.hashes_only
    table["inputs"]["residual"]["path"] = f"{residual}"
    path.write_text(json.dumps(table))
    assert not ik.verify(out, trust_inputs=True).hashes_only
