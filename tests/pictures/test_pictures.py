"""Pictures and pages of a comparison: made whole, of what was found, and of names that are meant to do harm."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
import torch
from small_models import normal, write_model

from ires_kernels.cli import main

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
    curve = text.partition("leaves of alpha")[2].partition("</table>")[0]
    assert curve.count("<tr><td>1</td>") == 1, "no alpha twice"
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.skipif(browser.PROGRAM is None, reason="there is no chromium and no google-chrome on PATH")
def test_browser_shows_the_page(tmp_path: Path, asked: list[str]) -> None:
    """Whole at the width of a phone and of a screen, and nothing is asked of anybody, and nothing complained of."""
    out = tmp_path / "page.html"
    assert main([*asked, "--html", f"{out}"]) == 0
    with browser.browsing(tmp_path / "profile") as page:
        for width in (400, 1200):
            page.show(out.as_uri(), width)
            assert page.value("document.title") == "ires compare"
            assert page.value("document.documentElement.scrollWidth") <= width, "only tables scroll sideways"
            assert page.value("[...document.querySelectorAll('h1, h2')].every(e => e.getClientRects().length)")
            assert page.value("document.querySelectorAll('.map').length") == 4
            text = page.value("document.body.innerText")
            assert text.count("model.layers.2") == 5  # of four maps and the table of layers
            assert "<script>alert(1)</script>" in text
            hidden = "[...document.querySelectorAll('td')].filter(e => e.innerText && e.offsetHeight < 10).length"
            assert page.value(hidden) == 0
            bars = page.value("[...document.querySelectorAll('.bar')].map(e => e.offsetWidth)")
            assert 100 < max(bars) < width
            assert len(page.picture()) > 8000
            said = [event for event in page.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
            assert said == []
            asked_for = [e for e in page.events if e["method"] == "Network.requestWillBeSent"]
            assert {event["params"]["request"]["url"] for event in asked_for} == {out.as_uri()}


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
