"""Models on the Hub whose weights are read where they are: by the real client, of servers on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
import range_server
from hub_server import Hub, Model
from range_server import Answer, Files, Request
from small_models import triple

import ires_kernels as ik

pytest.importorskip("obstore")
pytest.importorskip("huggingface_hub")

ROLES = ("target", "instruct", "base")


class Shell:
    """Commands whose Hub is a server here, which sends who wants weights to another."""

    def __init__(self, hub: Hub, bytes_: Files, folder: Path) -> None:
        self.hub = hub
        self.bytes = bytes_
        self.folder = folder
        self.home = folder / "hf"

    def run(self, *arguments: object, code: int = 0) -> str:
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HOME": f"{self.home}", "HF_TOKEN": "hf_of_a_test"}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {**kept, **settings, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment["PYTHONPATH"] = f"{Path(__file__).parents[2]}"
        command = [sys.executable, "-m", "ires_kernels", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == code, done.stderr
        assert "s1gn" not in done.stdout + done.stderr
        return done.stdout + done.stderr

    def merge(self, out: str, code: int = 0) -> str:
        pair = ("--instruct", "hf://org/instruct", "--base", "org/base@main")
        return self.run("apply", "org/target", *pair, "-o", out, "--stream", code=code)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    triple(tmp_path / "models", shards=2, files={"tokenizer_config.json": "{}"})
    ik.apply(
        tmp_path / "models/target", (tmp_path / "models/instruct", tmp_path / "models/base"), out=tmp_path / "plain"
    )
    with hub_server.serving() as hub, range_server.serving("localhost") as elsewhere:
        for role in ROLES:
            model = hub.models[f"org/{role}"] = Model()
            commit = model.push(tmp_path / "models" / role)
            elsewhere.add(tmp_path / "models" / role, f"/org/{role}/resolve/{commit}")
        hub.elsewhere = elsewhere.address
        (tmp_path / "work").mkdir()
        yield Shell(hub, elsewhere, tmp_path / "work")


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def test_nothing_is_downloaded_but_what_is_small(shell: Shell, tmp_path: Path) -> None:
    shell.merge("out")
    out = shell.folder / "out"
    assert weights(out) == weights(tmp_path / "plain")
    assert not list(shell.home.rglob("*.safetensors"))
    assert not [name for name in shell.hub.downloaded() if name.endswith(".safetensors")]
    assert shell.hub.tokens == {"Bearer hf_of_a_test"}
    assert all("authorization" not in request.headers for request in shell.bytes.requests)
    assert shell.hub.signed == 6, "each file is resolved once"
    inputs = json.loads((out / "ires.json").read_text())["inputs"]
    for role, entry in inputs.items():
        commit = shell.hub.models[f"org/{role}"].refs["main"]
        assert entry["hub"] == {"id": f"org/{role}", "commit": commit}
        assert entry["path"] == f"hf+stream://org/{role}@{commit}"
    assert "s1gn" not in "".join(path.read_bytes().decode(errors="replace") for path in out.iterdir())
    assert f"org/base@{shell.hub.models['org/base'].refs['main']}" in (out / "README.md").read_text()
    shell.hub.models["org/base"].refs["main"] = "f" * 40
    assert "bit for bit" in shell.run("verify", "out")
    assert not list(shell.home.rglob("*.safetensors"))


def test_a_recipe(shell: Shell, tmp_path: Path) -> None:
    """Of models on the Hub, and of an output that was made of them, without their weights in its cache."""
    (shell.folder / "recipe.yml").write_text(
        "target: org/target\npairs: [{instruct: 'hf://org/instruct', base: 'hf+stream://org/base'}]\n"
    )
    shell.run("merge", "recipe.yml", "-o", "out", "--stream")
    assert weights(shell.folder / "out") == weights(tmp_path / "plain")
    shell.run("merge", "out/ires.json", "-o", "again", "--stream")
    assert weights(shell.folder / "again") == weights(tmp_path / "plain")
    assert not list(shell.home.rglob("*.safetensors"))


def sums(folder: Path) -> str:
    return "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(weights(folder).items()))


def test_an_address_that_expires_is_asked_for_again(shell: Shell, tmp_path: Path) -> None:
    def expired(_: Request, answer: Answer) -> None:
        answer.status, answer.body = 403, b""
        answer.headers.clear()

    shell.bytes.fault(expired, times=2, first=True)
    assert shell.run("sha256", "hf+stream://org/base") == sums(tmp_path / "models/base")
    assert 2 < shell.hub.signed <= 4
    shell.bytes.fault(expired, first=True)
    assert "access is refused" in shell.run("sha256", "hf+stream://org/base", code=3)


def test_other_bytes_than_the_hub_says(shell: Shell) -> None:
    """Of another size, at the address that it gives."""

    def longer(_: Request, answer: Answer) -> None:
        answer.headers["Content-Range"] = re.sub("/.*", "/99999", answer.headers["Content-Range"])

    shell.bytes.fault(longer, first=True)
    said = shell.run("sha256", "hf+stream://org/base", code=3)
    assert re.search("changed after it was first read|answers with another range", said)


def test_a_file_that_the_hub_keeps_itself(shell: Shell, tmp_path: Path) -> None:
    """The token is sent for it."""
    shell.hub.elsewhere = ""
    assert shell.run("sha256", "hf+stream://org/base@main") == sums(tmp_path / "models/base")
    assert shell.hub.tokens == {"Bearer hf_of_a_test"}


def test_weights_whose_names_lead_elsewhere(shell: Shell, tmp_path: Path) -> None:
    """Who is taken for the Hub may say any name; nothing is written but where it should be."""
    name = "../../../../evil.safetensors"
    index = json.dumps({"metadata": {}, "weight_map": {"a": name}}).encode()
    raw = next((tmp_path / "models/base").glob("*.safetensors")).read_bytes()
    model = shell.hub.models["org/base"]
    model.refs["main"] = "e" * 40
    model.commits["e" * 40] = {"config.json": b"{}", "model.safetensors.index.json": index, name: raw}
    shell.hub.elsewhere = ""
    assert "wanted a file beside the others" in shell.run("sha256", "hf+stream://org/base", code=2)
