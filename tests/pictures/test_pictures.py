"""Pictures and pages of a comparison: made whole, of what was found, and of names that are meant to do harm."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from small_models import normal, write_model

from ires_kernels.cli import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HARM = "<script>alert(1)</script>\x1b[31m$x^2$"


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)] + ["lm_head.weight", HARM]
    for seed, role in enumerate(("base", "instruct", "target")):
        tensors = {n: (normal((8, 8), i) + normal((8, 8), 50 * seed + 9, scale=0.002)) for i, n in enumerate(names)}
        write_model(tmp_path / role, {name: t.to(torch.bfloat16) for name, t in tensors.items()})
    return [
        "compare",
        f"{tmp_path}/target",
        "--instruct",
        f"{tmp_path}/instruct",
        "--base",
        f"{tmp_path}/base",
        "--quiet",
    ]


class Looked(HTMLParser):
    """Tags, their attributes, and that each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_holds_all_and_loads_nothing(tmp_path: Path, asked: list[str]) -> None:
    out = tmp_path / "page.html"
    assert main([*asked, "--html", f"{out}"]) == 0
    text = out.read_text()
    page = Looked(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "href", "onload", "onclick"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|url\(|@import", text)
    assert "default-src 'none'" in text
    assert "&lt;script&gt;" in text
    assert "\x1b" not in text
    assert "model.layers.2" in text
    assert text.count('class="map"') == 4
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_browser_shows_the_page(tmp_path: Path, asked: list[str]) -> None:
    out, picture = tmp_path / "page.html", tmp_path / "page.png"
    assert main([*asked, "--html", f"{out}"]) == 0
    quiet = [f"{BROWSER}", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    subprocess.run([*quiet, f"--screenshot={picture}", out.as_uri()], check=True, capture_output=True, timeout=60)
    assert picture.stat().st_size > 5000
    shown = subprocess.run([*quiet, "--dump-dom", out.as_uri()], check=True, capture_output=True, text=True, timeout=60)
    assert "Does it fit?" in shown.stdout


def test_pictures(tmp_path: Path, asked: list[str]) -> None:
    pytest.importorskip("matplotlib")
    svg, again, png = (tmp_path / name for name in ("a.svg", "b.svg", "a.png"))
    for out in (svg, again):
        assert main([*asked, "--plot", f"{out}"]) == 0
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert svg.read_bytes() == again.read_bytes()
    assert main(["inspect", f"{tmp_path}/target", "--plot", f"{png}"]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("option", "name", "wanted"),
    [
        ("--plot", "a.jpg", ".png or .svg"),
        ("--plot", "nowhere/a.png", "its folder is not there"),
        ("--html", "nowhere/a.html", "its folder is not there"),
        ("--html", "a.txt", ".html"),
    ],
)
def test_what_cannot_be_written_is_refused_before_reading(
    option: str, name: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = ["compare", "nothing", "--instruct", "nothing", "--base", "nothing"]
    assert main([*nothing, option, f"{tmp_path}/{name}"]) == 2
    assert wanted in capsys.readouterr().err


def test_without_matplotlib_the_way_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ires_kernels.pictures.plot.find_spec", lambda _: None)
    assert main(["inspect", f"{tmp_path}", "--plot", f"{tmp_path}/a.png"]) == 2
    assert "pip install 'ires_kernels[plot]'" in capsys.readouterr().err
