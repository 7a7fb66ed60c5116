"""Models on the Hub in place of paths, by the real client against a server on loopback; online and offline."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
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

    def run(self, *arguments: object, code: int = 0, module: str = "ires_kernels", **more: str) -> str:
        """One `ires` command, or that of another module; returns stdout, or with an error stderr."""
        settings = {"HF_ENDPOINT": self.server.url, "HF_HOME": f"{self.home}", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        command = [sys.executable, "-m", module, *map(str, arguments)]
        environment = {**kept, **settings, "PYTHONPATH": f"{self.path}", **more}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    def refused(self, *arguments: object, **more: str) -> str:
        """The message of a command that is refused."""
        return self.run(*arguments, code=2, module="ires_kernels", **more)


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


def test_a_file_of_the_cache_that_is_damaged(shell: Shell, server: Hub, tmp_path: Path) -> None:
    """The library of the Hub takes it for good, whoever asks; the command that is printed mends it."""
    commit = server.models["org/base"].refs["main"]
    shell.run("inspect", "org/base")
    snapshot = shell.home / "hub/models--org--base/snapshots" / commit
    other = tmp_path / "another cache"
    shutil.copytree(snapshot.parents[1], other / snapshot.parents[1].name, symlinks=True)
    (tmp_path / "base").symlink_to(other / snapshot.relative_to(snapshot.parents[2]))
    for asked, path in (
        ("org/base", snapshot / "model.safetensors"),
        (tmp_path / "base", tmp_path / "base/config.json"),
    ):
        good = path.read_bytes()
        path.resolve().write_bytes(good[:-5])
        said = " ".join(shell.refused("inspect", asked).split())
        command = re.search(r"downloaded again: `hf (download org/base .* --force-download.*)`", said)
        assert command, said
        assert (f"--cache-dir '{other}'" in said) == (asked == tmp_path / "base")
        shell.run(*shlex.split(command[1]), module="huggingface_hub.cli.hf")
        assert path.read_bytes() == good
        shell.run("inspect", asked)


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


def test_what_another_program_left_out_is_fetched(shell: Shell, server: Hub, tmp_path: Path) -> None:
    """Asked for by its commit, with weights and config.json in the cache and no tokenizer: once, and then no more."""
    folder = tmp_path / "models" / "instruct"
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "vocab.txt").write_text("a\nb\n")
    commit = server.models["org/instruct"].push(folder)
    shell.run("inspect", f"org/instruct@{commit}")
    kept = Path(json.loads(shell.run("inspect", f"org/instruct@{commit}", "--json"))["path"])
    shutil.rmtree(shell.home / "assets")  # as another program leaves it
    for name in ("tokenizer_config.json", "vocab.txt"):
        (kept / name).unlink()
    merge = ("extract", "org/base", f"org/instruct@{commit}", "-o", "out", "--dry-run")
    shell.run("inspect", "org/base")
    said = shell.run(*merge, HF_HUB_OFFLINE="1")
    assert "has no tokenizer in the cache, and perhaps one on the Hub" in " ".join(said.split())
    nowhere = shell.run("inspect", f"org/instruct@{commit}", HF_ENDPOINT="http://127.0.0.1:9")
    assert "tensors" in nowhere, "its weights are here"
    server.requests.clear()
    said = shell.run(*merge)
    assert (kept / "vocab.txt").read_text() == "a\nb\n"
    assert "in the cache" not in said
    assert not [name for name in server.downloaded() if name.endswith(".safetensors")]
    server.requests.clear()
    shell.run("inspect", f"org/instruct@{commit}")
    assert server.requests == []
    (kept / "vocab.txt").unlink()
    said = shell.run(*merge, HF_HUB_OFFLINE="1")
    assert "has vocab.txt on the Hub, and not in the cache" in " ".join(said.split())


def test_shards_that_are_not_in_the_cache(shell: Shell, server: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "sharded", {n: normal((8, 8), i) for i, n in enumerate("abc")}, shards=3, config={})
    commit = server.models.setdefault("org/sharded", Model()).push(folder)
    kept = Path(json.loads(shell.run("inspect", "org/sharded", "--json"))["path"])
    (kept / "model-00002-of-00003.safetensors").unlink()
    said = shell.refused("inspect", f"org/sharded@{commit}", HF_HUB_OFFLINE="1")
    assert "model-00002-of-00003.safetensors is not in the cache, and HF_HUB_OFFLINE is set" in said
    assert f"hf download org/sharded --revision {commit}" in said
    shell.run("inspect", f"org/sharded@{commit}")
    assert (kept / "model-00002-of-00003.safetensors").is_file()


def test_hf_ires(tmp_path: Path) -> None:
    """The extension as the Hub's command line installs it: the file hf-ires, and what it is, in a folder of its own."""
    extensions = pytest.importorskip("huggingface_hub.cli.extensions")
    script = Path(__file__).parents[2] / "hf-ires"
    place = tmp_path / ".local/share/hf/extensions/hf-ires"
    place.mkdir(parents=True)
    shutil.copy(script, place / "hf-ires")
    manifest = extensions.ExtensionManifest(
        owner="someone", repo="hf-ires", repo_id="someone/hf-ires", short_name="ires",
        executable_path=f"{place / 'hf-ires'}", type="binary", installed_at=datetime.now(timezone.utc),
        description=None, commit_sha=None,
    )  # fmt: skip
    manifest.save(place)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ires").write_text(f'#!/bin/sh\nexec {sys.executable} -m ires_kernels "$@"\n')
    (tmp_path / "bin" / "ires").chmod(0o755)
    call = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", "ires", "--version"]
    environment = {"HOME": f"{tmp_path}", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "PYTHONPATH": f"{script.parent}"}
    for path, code, said in ((f"{tmp_path / 'bin'}:", 0, ik.__version__), ("", 127, "there is no ires on PATH")):
        more = {**environment, "PATH": f"{path}/usr/bin:/bin"}
        done = subprocess.run(call, env=more, capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stderr


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
