"""Links in a model's folder: followed within it and into the Hub's cache, and elsewhere on the user's word only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_models import read_model, triple

import ires_kernels as ik
from ires_kernels import cli
from ires_kernels.checkpoints import parents, surroundings, validation
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.files import opening

FILES = {"tokenizer.json": "{}", "generation_config.json": "{}", "additional_chat_templates/tool.jinja": "{{ x }}"}
READ = ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "tokenizer.json",
        "generation_config.json", "additional_chat_templates/tool.jinja", "additional_chat_templates")  # fmt: skip

Models = tuple[Path, Path, Path]


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """base, instruct, target."""
    return triple(tmp_path, shards=2, files=FILES)


def move_out(path: Path, to: Path) -> None:
    """Put what is at `path` elsewhere, and a link to that in its place."""
    to.parent.mkdir(parents=True, exist_ok=True)
    path.rename(to)
    path.symlink_to(to)


def run(command: str, models: Models, out: Path, **options: Any) -> None:
    """What a command does with the models; `out` is where it may write."""
    base, instruct, target = models
    if command == "extract":
        ik.extract(base, instruct, out, **options)
    elif command == "apply":
        ik.apply(target, (instruct, base), out=out, **options)
    elif command == "in place":
        ik.apply(target, (instruct, base), in_place=True, **options)
    elif command == "load":
        ik.load(target, (instruct, base), **options)
    else:
        ik.inspect(instruct, **options)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("command", ["extract", "apply", "in place", "load", "inspect"])
def test_a_link_out_of_the_folder_is_followed_on_the_users_word_only(
    models: Models, tmp_path: Path, command: str, name: str
) -> None:
    secret = tmp_path / "home" / "secret"
    move_out(models[1] / name, secret)
    out = tmp_path / "out"
    is_side_file = not name.endswith(".safetensors") and name not in ("config.json", "model.safetensors.index.json")
    if not (is_side_file and command == "inspect"):  # which does not look at these
        with pytest.raises(CheckpointError, match=rf"{name}.* leads to {secret}.*--follow-links"):
            run(command, models, out)
    assert not out.exists()
    run(command, models, out, follow_links=True)


def test_the_links_of_the_cache_of_the_hub_are_followed(models: Models, tmp_path: Path) -> None:
    cached = []
    for folder in models:
        blobs = tmp_path / "hub" / f"models--org--{folder.name}" / "blobs"
        snapshot = blobs.parent / "snapshots" / "0123abcd"
        snapshot.mkdir(parents=True)
        for number, path in enumerate(sorted(folder.rglob("*"))):
            if path.is_file():
                blobs.mkdir(exist_ok=True)
                place = snapshot / path.relative_to(folder)
                place.parent.mkdir(exist_ok=True)
                path.rename(blobs / f"{number:x}")
                up = "../" * len(place.relative_to(blobs.parent).parts[:-1])
                place.symlink_to(f"{up}blobs/{number:x}")
        cached.append(snapshot)
    base, instruct, target = cached
    ik.apply(target, (instruct, base), out=tmp_path / "out")
    assert ik.verify(tmp_path / "out", inputs={"target": target, "instruct": instruct, "base": base})
    link = tmp_path / "link"
    link.symlink_to(target)  # what the user gives may be a link itself
    assert set(ik.load(link, (instruct, base))) == set(read_model(tmp_path / "out"))
    file = tmp_path / "file.safetensors"
    file.symlink_to(target / "model-00001-of-00002.safetensors")
    assert ik.inspect(file)["tensors"] > 0
    # The blobs of another model are not its own, nor is what lies beside the blobs.
    blob = (base / "tokenizer.json").resolve()
    for other in (tmp_path / "hub" / "models--org--other" / "blobs" / "1", blob.parent.parent / "refs"):
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("{}")
        (instruct / "tokenizer.json").unlink()
        (instruct / "tokenizer.json").symlink_to(other)
        with pytest.raises(CheckpointError, match="--follow-links"):
            ik.apply(target, (instruct, base), out=tmp_path / "other")


def test_links_within_the_folder_are_followed(models: Models, tmp_path: Path) -> None:
    for name in READ:
        move_out(models[1] / name, models[1] / ".kept" / name.replace("/", "-"))
    ik.apply(models[2], (models[1], models[0]), out=tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_links_back_and_forth_and_to_nothing(models: Models, tmp_path: Path) -> None:
    base, instruct, target = models
    (instruct / "tokenizer.json").unlink()
    for to, message in [("tokenizer.json", "is a link"), ("gone", "is a link to"), ("../../gone", "is a link to")]:
        (instruct / "tokenizer.json").symlink_to(to)
        with pytest.raises(CheckpointError, match=f"tokenizer.json: {message}"):
            ik.apply(target, (instruct, base), out=tmp_path / "out")
        (instruct / "tokenizer.json").unlink()


def test_the_command_line_follows_links_and_resume_remembers(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = map(str, models)
    move_out(models[1] / "tokenizer.json", tmp_path / "elsewhere" / "tokenizer.json")
    move_out(models[1] / "config.json", tmp_path / "elsewhere" / "config.json")
    arguments = ["apply", target, "--instruct", instruct, "--base", base]
    out = tmp_path / "out"
    assert cli.main([*arguments, "-o", f"{out}", "--quiet"]) == 2
    assert "--follow-links" in capsys.readouterr().err
    assert cli.main(["inspect", instruct]) == 2
    assert cli.main(["inspect", instruct, "--follow-links"]) == 0
    for where, path in ((["-o", f"{out}"], f"{out}"), (["--in-place"], target)):
        with monkeypatch.context() as patch:
            patch.setattr("ires_kernels.records.provenance.build", interrupt)
            assert cli.main([*arguments, *where, "--follow-links", "--quiet"]) == 130
        assert cli.main(["status", path]) == 0
        assert cli.main(["resume", path, "--quiet"]) == 0
    assert json.loads((out / "ires.json").read_text())["files"]["tokenizer.json"]["from"] == "instruct"


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_side_file_that_is_another_when_it_is_copied_is_refused(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, instruct, target = models
    (tmp_path / "secret").write_text("a key")

    def swap(*_: object) -> None:
        (instruct / "tokenizer.json").unlink()
        (instruct / "tokenizer.json").symlink_to(tmp_path / "secret")

    monkeypatch.setattr("ires_kernels.checking.guards.check_residuals", swap)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: changed after it was looked at"):
        ik.apply(target, (instruct, base), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "model-00001-of-00002.safetensors"])
def test_a_link_that_comes_and_goes_is_not_followed(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Who can write to the folder shows a file while it is looked at, and a link before and after."""
    base, instruct, target = models
    path, secret, harmless = instruct / name, tmp_path / "secret", tmp_path / "harmless"
    secret.write_bytes(path.read_bytes())
    path.rename(harmless)
    path.symlink_to(secret)

    def meddle(looked_at: Path, folder: Path) -> Any:
        if looked_at != path:
            return opening.check_link(looked_at, folder)
        path.unlink()
        path.hardlink_to(harmless)
        try:
            return opening.check_link(looked_at, folder)
        finally:
            path.unlink()
            path.symlink_to(secret)

    for module in (parents, validation, surroundings):
        monkeypatch.setattr(module, "check_link", meddle)
    with pytest.raises(CheckpointError, match=rf"{name}: changed"):
        ik.apply(target, (instruct, base), out=tmp_path / "out")
