"""Output for others: its manifest tells nothing of this machine, and serves as it did."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from small_models import read_model, snapshot, triple

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.cli import main
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.records.publication import public
from ires_kernels.records.report import Report

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three models, of which base is in the Hub's cache."""
    folder = tmp_path / "somebody's home"
    triple(folder, shards=2, files={"README.md": "The target's card."})
    snapshots = folder / "hub/models--org--base/snapshots"
    snapshots.mkdir(parents=True)
    (folder / "base").rename(snapshots / COMMIT)
    (folder / "base").symlink_to(snapshots / COMMIT)
    monkeypatch.chdir(folder)
    return folder


def merge(**options: Any) -> None:
    ik.apply("target", ("instruct", f"hub/models--org--base/snapshots/{COMMIT}"), **options)


def keys(table: object) -> set[str]:
    """All keys at any depth."""
    if isinstance(table, dict):
        return {*table} | {key for value in table.values() for key in keys(value)}
    return {key for value in table for key in keys(value)} if isinstance(table, list) else set()


CHANGED = {"ires.json", "README.ires.md", "README.ires.png"}
PRIVATE = {"mtime_ns", "ctime_ns", "dev", "ino", "unsynced"}


@pytest.mark.parametrize("sync", [True, False])
def test_nothing_of_this_machine_is_left(models: Path, sync: bool) -> None:
    merge(out="out", sync=sync)
    before = json.loads(Path("out/ires.json").read_text())
    assert str(models) in Path("out/ires.json").read_text()
    assert PRIVATE - {"unsynced"} <= keys(before)
    others = {name: kept for name, kept in snapshot(Path("out")).items() if name not in CHANGED}
    found = ik.publish("out")
    assert found.names == {"target": "target", "instruct": "instruct", "base": f"org/base@{COMMIT}"}
    text = Path("out/ires.json").read_text()
    after = json.loads(text)
    assert "somebody" not in text
    assert not PRIVATE & keys(after)
    assert (after["digest"], after["tensors"], after["id"]) == (before["digest"], before["tensors"], before["id"])
    assert {name: kept for name, kept in snapshot(Path("out")).items() if name not in CHANGED} == others
    assert sorted(found.upload) == sorted([*others, *CHANGED])
    assert found.bytes_to_upload == sum(path.stat().st_size for path in Path("out").iterdir())
    # It is ours as it was: what is asked with the models' places is answered, and without them as well where they lie.
    inputs = {"target": "target", "instruct": "instruct", "base": "base"}
    assert ik.verify("out", inputs=inputs)
    assert not ik.verify("out", inputs=inputs).hashes_only
    again = ik.apply("target", ("instruct", f"hub/models--org--base/snapshots/{COMMIT}"), out="out")
    assert "nothing was done" in f"{again}"
    assert "README.ires.md that of the merge: make one of the two" in f"{found}"
    # Once more, it stays as it is.
    assert ik.publish("out").names == found.names
    assert Path("out/ires.json").read_text() == text


def test_a_recipe_and_an_update_in_place(models: Path) -> None:
    Path("recipe.yml").write_text(
        f"target: {models}/target\npairs: [{{instruct: {models}/instruct, base: {models}/base}}]\n"
    )
    ik.merge("recipe.yml", out="out")
    ik.publish("out")
    assert "somebody" not in Path("out/ires.json").read_text()
    for tag in ("one", "two"):
        merge(in_place=True, undo="all", tag=tag)
    assert "history" in keys(json.loads(Path("target/ires.json").read_text()))
    found = ik.publish("target")
    text = Path("target/ires.json").read_text()
    assert "somebody" not in text
    assert not PRIVATE & keys(json.loads(text))
    assert found.private == (".ires-undo-1", ".ires-undo-2")
    assert not any(name.startswith(".ires") for name in found.upload)
    assert "--exclude '.ires-*'" in f"{found}"
    assert "nothing was done" in f"{ik.apply('target', ('instruct', 'base'), in_place=True, undo='all', tag='two')}"
    assert ik.rollback("target")


def test_a_residual(models: Path) -> None:
    ik.extract("base", "instruct", "residual")
    shutil.copytree("residual", "damaged")
    weights = Path("damaged/residual-00002-of-00002.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="has another hash") as caught:
        ik.publish("damaged")
    assert f"{caught.value}".endswith("Put the right copy back, or extract it again.")
    found = ik.publish("residual")
    assert found.names == {"base": f"org/base@{COMMIT}", "instruct": "instruct"}
    assert f"{found}".endswith("next      `hf upload USER/NAME residual .`"), "it has no card"
    words = shlex.split(f"{ik.publish(models / 'residual')}".rpartition("`hf ")[2].rstrip("`"))
    assert words == ["upload", "USER/NAME", f"{models / 'residual'}", "."]
    assert "somebody" not in Path("residual/residual.json").read_text()
    ik.apply("target", "residual", out="one")
    merge(out="two")
    assert models.is_dir()
    assert all((a == b).all() for a, b in zip(*(read_model(Path(n)).values() for n in ("one", "two")), strict=True))


def test_models_of_one_name_are_told_apart(models: Path) -> None:
    for folder in ("a", "b"):
        (models / folder).mkdir()
    os.rename("instruct", "a/model")
    os.rename("target", "b/model")
    ik.apply("b/model", ("a/model", "base"), out="out")
    assert ik.publish("out").names == {"target": "model", "instruct": "model-instruct", "base": f"org/base@{COMMIT}"}
    assert ik.verify("out", inputs={"target": "b/model", "instruct": "a/model", "base": "base"})


@pytest.mark.usefixtures("models")
def test_what_cannot_be_published() -> None:
    with pytest.raises(CheckpointError, match=r"instruct: has no ires\.json or residual\.json"):
        ik.publish("instruct")
    with pytest.raises(CheckpointError, match="is in the Hub's cache, which is never written"):
        ik.publish(f"hub/models--org--base/snapshots/{COMMIT}")
    merge(out="out")
    table = json.loads(Path("out/ires.json").read_text())
    table["id"] = "of somebody else"
    Path("out/ires.json").write_text(json.dumps(table))
    ik.publish("out")
    assert "signature" not in json.loads(Path("out/ires.json").read_text()), "what we do not know we do not sign"


def test_weights_that_were_damaged_since_are_not_published(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the manifest stays as it is; the ways out that are printed are ways out."""
    merge(out="out", sha256=True)
    weights = models / "out/model-00001-of-00002.safetensors"
    good = weights.read_bytes()
    damaged = good[:-1] + bytes([good[-1] ^ 1])

    def said() -> str:
        return " ".join(capsys.readouterr().err.split())

    for bad, wanted in (
        (damaged, "out: is not what its merge has left: model.layers.0.norm.weight has another hash"),
        (good.replace(b'"format":"pt"', b'"format":"qt"'), f"{weights.name} has another header than the manifest says"),
        (good[:-5], "truncated: 5 bytes missing"),
    ):
        weights.write_bytes(bad)
        before = snapshot(Path("out"))
        assert main(["publish", "out"]) == 2
        assert wanted in said()
        assert snapshot(Path("out")) == before
    weights.write_bytes(damaged)
    assert main(["publish", "out"]) == 2
    assert "make it again with `ires merge out/ires.json -o NEW`" in said()
    assert main(["merge", "out/ires.json", "-o", "NEW", "--quiet"]) == 0
    assert (models / "NEW" / weights.name).read_bytes() == good
    assert main(["publish", "NEW", "--quiet"]) == 0

    weights.write_bytes(good)
    sums = Path("out/SHA256SUMS").read_text()
    Path("out/SHA256SUMS").write_text(sums.replace(sums[:8], "0" * 8))
    assert main(["publish", "out"]) == 2
    assert f"SHA256SUMS: has other sums of {weights.name} than ires.json" in said()
    Path("out/SHA256SUMS").unlink()
    assert main(["sha256", "out", "--write", "--quiet"]) == 0
    assert Path("out/SHA256SUMS").read_text() == sums
    assert main(["publish", "out", "--quiet"]) == 0


def test_damage_to_what_an_update_in_place_left_unseen(models: Path) -> None:
    """Nobody has its hash; its file is known by a sample."""
    merge(in_place=True, skip="layers.1")
    table = json.loads(Path("target/ires.json").read_text())
    assert table["tensors"]["model.layers.1.mlp.weight"]["xxh3_128"] is None
    ik.publish("target")
    weights = models / "target/model-00002-of-00002.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-2000] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        ik.publish("target")
    assert "Put the right copy back. If it was changed on purpose" in f"{caught.value}"


def test_what_was_written_through_a_mapping_has_no_hashes(models: Path) -> None:
    with ik.mapped(models / "target", write=True) as tensors:
        tensors["model.norm.weight"].zero_()
    assert ik.publish(models / "target").out == models / "target"


def test_the_command(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge(out="out")
    assert main(["publish", "out"]) == 0
    told = capsys.readouterr().out
    assert "`hf upload USER/NAME out .`" in told
    assert main(["publish", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"]["base"] == f"org/base@{COMMIT}"
    elsewhere = models / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    assert main(["merge", "../out/ires.json", "-o", "again"]) == 2
    assert "where its models lie, under these names" in capsys.readouterr().err


def test_made_again_of_what_it_was_made_of(models: Path) -> None:
    ik.apply("target", ("instruct", "base"), out="out", alpha=0.5)
    for _ in range(2):
        again = ik.merge("out/ires.json", out="again")
        assert isinstance(again, Report)
        assert "all tensors are those of out/ires.json: the digest is the same" in again.notes
        assert not again.warnings
    # With a copy of the same bytes as well, and with other bytes a warning comes before, and one after it.
    one = models / "instruct/model-00001-of-00002.safetensors"
    raw = one.read_bytes()
    one.write_bytes(raw)
    assert not [text for text in ik.merge("out/ires.json", out="copy", dry_run=True).warnings if "changed" in text]
    one.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    plan = ik.merge("out/ires.json", out="other", dry_run=True)
    assert any(f"instruct: is not the instruct that ires.json tells of: {one.name} changed" in w for w in plan.warnings)
    other = ik.merge("out/ires.json", out="other")
    assert any("the tensors are not those of out/ires.json" in text for text in other.warnings)
    made = ik.merge(models / "out/ires.json", out=models / "from here")
    assert any("tells of" in text for text in made.warnings)
    assert "somebody" not in Path("from here/README.ires.md").read_text(), "a card has the warnings, and no path"


@pytest.mark.usefixtures("models")
def test_sums(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    merge(out="out")
    names = sorted(path.name for path in Path("out").glob("*.safetensors"))
    wanted = subprocess.run(["sha256sum", *names], cwd="out", capture_output=True, text=True, check=True).stdout
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["sha256", "out"]) == 0
    assert capsys.readouterr().out == wanted
    assert not Path("out/SHA256SUMS").exists()
    assert ik.sha256("out", write=True)
    assert Path("out/SHA256SUMS").read_text() == wanted
    merge(out="two", sha256=True)
    assert Path("two/SHA256SUMS").read_text() == wanted
    other = "0" * 64 + "  config.json\n"
    Path("two/SHA256SUMS").write_text("x" + wanted[1:] + other)
    assert main(["sha256", "two"]) == 0
    assert f"no sum of {names[0]}, or none that can be read" in " ".join(capsys.readouterr().err.split())
    assert ik.sha256("two", write=True)
    assert Path("two/SHA256SUMS").read_text() == wanted + other, "what is said of others stays"
    weights = Path("out") / names[0]
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert main(["sha256", "out", "--quiet"]) == 1
    said = capsys.readouterr()
    assert (said.out, f"{names[0]} has another sum than SHA256SUMS says" in " ".join(said.err.split())) == ("", True)
    assert main(["sha256", "out", "--write"]) == 2
    assert "has other sums of" in " ".join(capsys.readouterr().err.split())
    assert main(["sha256", f"out/{names[0]}", "--json"]) == 0, "a file alone"
    assert list(json.loads(capsys.readouterr().out)["sums"]) == names[:1]
    with pytest.raises(CheckpointError, match="never written"):
        ik.sha256(f"hub/models--org--base/snapshots/{COMMIT}", write=True)


@pytest.mark.usefixtures("models")
def test_a_published_manifest_says_where_to_make_it_again() -> None:
    merge(out="out")
    ik.publish("out")
    os.rename("target", "moved")
    with pytest.raises(ArgumentError, match="was published, and has no paths; missing here: target"):
        ik.merge("out/ires.json", out="again")


def test_the_card_gets_a_picture(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside our card, by its name alone, once; of what was added; and without matplotlib it is said."""
    pytest.importorskip("matplotlib")
    merge(out="out")
    told = json.loads(Path("out/ires.json").read_text())["tensors"]
    inputs = [read_model(models / name) for name in ("target", "instruct", "base")]
    for name, t in inputs[0].items():
        update = (inputs[1][name].double() - inputs[2][name].double()).norm().item()
        assert told[name]["update"] == pytest.approx(update, rel=1e-5), (name, t.shape)
    shutil.copytree("out", "plain")
    shutil.copytree("out", "other")
    found = ik.publish("out")
    assert found.picture == "README.ires.png"
    assert Path("out/README.ires.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out/README.ires.md").read_text().count("](README.ires.png)") == 1
    assert {"README.ires.png", "README.ires.md"} <= {*found.upload}
    ik.publish("out")
    assert Path("out/README.ires.md").read_text().count("](README.ires.png)") == 1
    ik.publish("other")
    assert Path("other/README.ires.png").read_bytes() == Path("out/README.ires.png").read_bytes()
    assert ik.verify("out", inputs={"target": "target", "instruct": "instruct", "base": "base"})
    ik.apply("out", ("instruct", "base"), out="further", alpha=-1)
    assert not Path("further/README.ires.png").exists(), "what it shows is not what was added here"

    monkeypatch.setattr("ires_kernels.pictures.profile.find_spec", lambda _: None)
    found = ik.publish("plain")
    assert "pip install 'ires_kernels[plot]'" in found.picture
    assert "matplotlib" in f"{found}"
    assert not list(Path("plain").glob("*.png"))
    Path("plain/README.ires.md").unlink()
    Path("plain/README.ires.md").symlink_to(models / "target/config.json")
    assert ik.publish("plain", follow_links=True).picture == ""


def test_addresses_are_told_by_their_last_part() -> None:
    stamp = {"size": 1, "mtime_ns": 2, "sample": "ab"}
    paths = {
        "target": "s3://bucket/team/cpt",
        "instruct": f"hf+stream://org/chat@{COMMIT}",
        "base": "https://host/models/base",
    }
    recipe = (
        "target: s3://bucket/team/cpt\npairs: [{instruct: org/chat, base: 'https://u:p@host/models/base?sig=SECRET'}]\n"
    )
    table = {
        "inputs": {role: {"path": path, "files": {"model.safetensors": stamp}} for role, path in paths.items()},
        "rules": {"recipe": recipe},
    }
    told = public(table)
    assert {role: entry["path"] for role, entry in told["inputs"].items()} == {
        "target": "cpt",
        "instruct": f"org/chat@{COMMIT}",
        "base": "base",
    }
    assert told["rules"]["recipe"] == "target: cpt\npairs: [{instruct: org/chat, base: 'base'}]\n"
    assert told["inputs"]["base"]["files"] == {"model.safetensors": {"size": 1, "sample": "ab"}}
    again = public(told)
    assert again["inputs"] == told["inputs"]
    assert public({"operation": "apply", "unsynced": "a boot"}) == {"operation": "apply"}


@pytest.mark.usefixtures("models")
def test_a_disk_that_fails_leaves_the_manifest_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    merge(out="out")
    before = snapshot(Path("out"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            assert main(["publish", "out"]) == 3
        assert snapshot(Path("out")) == before
    assert main(["publish", "out", "--quiet"]) == 0
