"""The card of a merged model: metadata that the Hub understands, nothing of this machine, and nobody's card lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_models import read_model, triple

import ires_kernels as ik

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def metadata(card: Path) -> dict[str, Any]:
    """The front matter."""
    _, head, _ = card.read_text().split("---\n", 2)
    return yaml.safe_load(head)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    triple(tmp_path)
    return tmp_path


def licence(folder: Path, *lines: str) -> None:
    (folder / "README.md").write_text("\n".join(["---", *lines, "tags: [x]", "---", "# Theirs"]))


def merge(models: Path, **options: Any) -> Path:
    ik.apply(models / "target", (models / "instruct", models / "base"), out=models / "out", **options)
    return models / "out"


def test_what_the_hub_shows(models: Path) -> None:
    """Ids of what lies in the Hub's cache, with commits; the command; the digests; no path of this machine."""
    snapshots = models / "hub/models--org--name/snapshots"
    snapshots.mkdir(parents=True)
    (models / "base").rename(snapshots / COMMIT)
    out = models / "out"
    ik.apply(models / "target", (models / "instruct", snapshots / COMMIT), out=out, alpha=0.5, skip="norm", dtype="f32")
    found = metadata(out / "README.md")
    assert found == {
        "base_model": ["org/name"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "instruction-residual", "ires_kernels"],
    }
    text = (out / "README.md").read_text()
    command = (
        f"ires apply target --instruct instruct --base org/name@{COMMIT} --alpha 0.5 --skip norm --dtype f32 -o OUT"
    )
    assert f"\n{command}\n" in text
    assert f"{models}" not in text
    assert "| instruct | instruct | not all of it was read |" in text
    assert "- alpha 0.5: effective 0.5" in text


def test_the_card_of_a_residual_names_its_models(models: Path) -> None:
    snapshots = models / "hub/models--org--name/snapshots"
    snapshots.mkdir(parents=True)
    (models / "base").rename(snapshots / COMMIT)
    ik.extract(snapshots / COMMIT, models / "instruct", models / "residual")
    ik.apply(models / "target", models / "residual", out=models / "out", alpha=0.25)
    assert metadata(models / "out/README.md")["base_model"] == ["org/name"]
    text = (models / "out/README.md").read_text()
    assert "ires apply target residual:0.25 -o OUT" in text
    digest = ik.inspect(models / "residual")["made_by"]["digest"]
    assert f"| residual | residual | {digest} |" in text


def test_one_licence_is_taken_over(models: Path) -> None:
    for role in ("target", "base", "instruct"):
        licence(models / role, "license: apache-2.0")
    out = merge(models)
    assert metadata(out / "README.ires.md")["license"] == "apache-2.0"
    assert "Licences differ" not in (out / "README.ires.md").read_text()


def test_two_licences_are_named(models: Path) -> None:
    licence(models / "base", "license: other", "license_name: llama3")
    licence(models / "instruct", "license: apache-2.0")
    out = merge(models)
    assert "license" not in metadata(out / "README.md")
    text = (out / "README.md").read_text()
    assert "**Licences differ**" in text
    assert "- instruct: apache-2.0\n- base: other, llama3" in text


def test_a_card_that_is_there_is_kept(models: Path) -> None:
    licence(models / "target", "license: mit")
    before = (models / "target/README.md").read_bytes()
    out = merge(models)
    assert (out / "README.md").read_bytes() == before
    assert metadata(out / "README.ires.md")["base_model_relation"] == "merge"


@pytest.mark.parametrize(
    "text", ["---\n- a\n---\n", "---\n{[\n---\n", "no metadata", "---\nlicense: [1]\n---\n", "---\n" * 3]
)
def test_cards_that_say_nothing(models: Path, text: str) -> None:
    (models / "base/README.md").write_text(text)
    assert "license" not in metadata(merge(models) / "README.md")


def test_it_may_be_edited(models: Path) -> None:
    """The card is its publisher's: neither `verify` nor the same command again minds."""
    out = merge(models)
    (out / "README.md").write_text("mine")
    assert ik.verify(out)
    merge(models)
    assert (out / "README.md").read_text() == "mine"
    assert read_model(out).keys() == read_model(models / "target").keys()
