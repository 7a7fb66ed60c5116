"""Models on the Hub in place of paths, by the real client against a server on loopback; online and offline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, Model, serving
from small_models import normal, snapshot, triple, write_model

import ires_kernels as ik
from ires_kernels.checkpoints import hub as hubs

pytest.importorskip("huggingface_hub")


class Shell:
    """Runs commands whose Hub is a server here, and whose cache is in `home`."""

    def __init__(self, server: Hub, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.home = folder / "hf"
        self.path = Path(__file__).parents[2]

    def run(self, *arguments: object, code: int = 0, **more: str) -> str:
        """One `ires` command; returns stdout, or with an error stderr."""
        settings = {"HF_ENDPOINT": self.server.url, "HF_HOME": f"{self.home}", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        command = [sys.executable, "-m", "ires_kernels", *map(str, arguments)]
        environment = {**kept, **settings, "PYTHONPATH": f"{self.path}", **more}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    def refused(self, *arguments: object, **more: str) -> str:
        """The message of a command that is refused."""
        return self.run(*arguments, code=2, **more)


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def shell(server: Hub, tmp_path: Path) -> Shell:
    folder = tmp_path / "models"
    triple(folder)
    server.models, server.requests, server.busy = {}, [], 0
    for role in ("target", "instruct", "base"):
        server.models[f"org/{role}"] = Model()
        server.models[f"org/{role}"].push(folder / role, also={"pytorch_model.bin": b"x", "logo.png": b"x"})
    work = tmp_path / "work"
    work.mkdir()
    return Shell(server, work)


def test_a_merge_of_three_repositories(shell: Shell, server: Hub, tmp_path: Path) -> None:
    """The same bits as from folders; the manifest pins the commits; nothing is downloaded that no merge needs."""
    models = tmp_path / "models"
    ik.apply(models / "target", (models / "instruct", models / "base"), out=tmp_path / "plain")
    shell.run("apply", "org/target", "--instruct", "hf://org/instruct", "--base", "org/base@main", "-o", "out")
    for name in ("model.safetensors", "config.json"):
        assert (shell.folder / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    inputs = json.loads((shell.folder / "out/ires.json").read_text())["inputs"]
    for role, entry in inputs.items():
        assert entry["hub"] == {"id": f"org/{role}", "commit": server.models[f"org/{role}"].refs["main"]}
    assert {name for name in server.downloaded() if not name.endswith((".json", ".safetensors"))} == set()
    server.requests.clear()
    assert "bit for bit" in shell.run("verify", "out")
    assert server.requests == [], "all is in the cache, at its commit"


def test_only_the_shards_of_the_index(shell: Shell, server: Hub, tmp_path: Path) -> None:
    """A second copy of the weights in another form stays where it is."""
    folder = write_model(tmp_path / "sharded", {n: normal((8, 8), i) for i, n in enumerate("abc")}, shards=3, config={})
    server.models["org/sharded"] = Model()
    server.models["org/sharded"].push(folder, also={"consolidated.safetensors": b"x" * 4096})
    assert '"tensors": 3' in shell.run("inspect", "org/sharded", "--json")
    assert "consolidated.safetensors" not in server.downloaded()
    assert len([name for name in server.downloaded() if name.endswith(".safetensors")]) == 3


def test_a_commit_that_moves_meanwhile(shell: Shell, server: Hub, tmp_path: Path) -> None:
    """All files are of the commit that the revision was when it was asked for."""
    folder = write_model(tmp_path / "moving", {"a": normal((8, 8), 1)}, config={"model_type": "old"})
    later = write_model(tmp_path / "later", {"a": normal((8, 8), 2)}, config={"model_type": "new"})
    model = server.models["org/moving"] = Model()
    first = model.push(folder)
    server.on_get.append(lambda: model.push(later))
    found = json.loads(shell.run("inspect", "org/moving", "--json"))
    assert found["hub"] == f"org/moving@{first}"
    assert found["config"]["model_type"] == "old"
    assert model.refs["main"] != first
    found = json.loads(shell.run("inspect", "org/moving", "--json"))
    assert found["config"]["model_type"] == "new"


def test_offline(shell: Shell, server: Hub) -> None:
    """What is in the cache serves without the Hub: the last one asked for, or one by its commit."""
    assert "HF_HUB_OFFLINE is set: download it" in shell.refused("inspect", "org/base", HF_HUB_OFFLINE="1")
    commit = server.models["org/base"].refs["main"]
    shell.run("inspect", "org/base")
    server.requests.clear()
    shell.run("inspect", "org/base", HF_HUB_OFFLINE="1")
    shell.run("inspect", f"org/base@{commit}")
    assert server.requests == []
    nowhere = "http://127.0.0.1:9"
    shell.run("inspect", f"hf://org/base@{commit}", HF_ENDPOINT=nowhere)
    assert "org/name@COMMIT" in shell.refused("inspect", "org/base", HF_ENDPOINT=nowhere)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("org/none", "Repository not found. If it is a path, nothing is there"),
        ("org/base@nope", "Invalid rev id: nope. The revisions are listed on"),
        ("org/gated", "Access to it is restricted. Ask for access on"),
        ("hf://org", "is no name of a model on the Hub, wanted hf://org/name"),
        ("org/pickles", r"has no .safetensors files \(pytorch_model.bin\)"),
    ],
)
def test_refusals_give_the_reason_and_the_way_out(shell: Shell, server: Hub, asked: str, said: str) -> None:
    server.models["org/gated"] = Model(refusal=(403, "GatedRepo", "Access to it is restricted"))
    server.models["org/pickles"] = Model({"c" * 40: {"pytorch_model.bin": b"x"}}, {"main": "c" * 40})
    assert re.search(said, shell.refused("inspect", asked))


def test_a_busy_hub_is_asked_again(shell: Shell, server: Hub) -> None:
    server.busy = 1
    shell.run("inspect", "org/base")
    assert server.busy == 0


def test_a_token_goes_to_the_hub(shell: Shell, server: Hub) -> None:
    shell.run("inspect", "org/base", HF_TOKEN="hf_of_a_test")
    assert "Bearer hf_of_a_test" in server.tokens


def test_the_cache_is_never_written(shell: Shell, server: Hub) -> None:
    """Neither under its name on the Hub, where nothing is asked, nor by the path of its snapshot."""
    arguments = ("--instruct", "org/instruct", "--base", "org/base", "--in-place")
    assert "whose cache is never written" in shell.refused("apply", "org/target", *arguments)
    assert server.requests == []
    folder = json.loads(shell.run("inspect", "org/target", "--json"))["path"]
    before = snapshot(Path(folder))
    assert "cache" in shell.refused("apply", folder, *arguments)
    assert snapshot(Path(folder)) == before


def test_a_snapshot_that_left_the_cache_comes_again_at_its_commit(shell: Shell, server: Hub) -> None:
    shell.run("extract", "org/base", "org/instruct", "-o", "out")
    shell.home.rename(shell.folder / "gone")
    server.models["org/base"].refs["main"] = "f" * 40
    assert "bit for bit" in shell.run("verify", "out")


def test_what_is_here_is_not_looked_for_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert not hubs.is_remote("models/mistyped"), "its folder is here, so it is a path"
    assert not hubs.is_remote("a/b/c")
    assert not hubs.is_remote("./org/name")
    assert not hubs.is_remote("/org/name")
    assert hubs.is_remote("org/name")
    assert hubs.is_remote("hf://models/name")


def test_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ValueError, match=r"no such file or folder, and on the Hub: .*pip install 'ires_kernels\[hub\]'"
    ):
        ik.inspect("org/name")
