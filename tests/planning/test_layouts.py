"""Models in several layouts merge as in one: to change a layout and then merge is to merge and then change it.

So the result is, bit for bit, that of a merge in the target's layout; also stochastically rounded, for the random bits
are those of the target's elements.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relayouts import Layout, Sizes, family
from small_models import Tensors, read_model, same, write_model

import ires_kernels as ik

_LLAMA = Sizes(head=32, bias=True)
_NEOX = Sizes(key_heads=4)
_MIXTRAL = Sizes(experts=4, layers=1)

# The same vocabulary in all; what is beyond it no token has.
_TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(72)}, "unk_token": "w0"},
    }
)


@st.composite
def layouts(draw: st.DrawFn, sizes: Sizes) -> Layout:
    """Any layout of the kinds that move whole rows."""
    return Layout(
        prefix=draw(st.sampled_from(["model.", "", "model.language_model.", "transformer."])),
        words=draw(st.sampled_from(["usual", "meta"])),
        qkv=draw(st.sampled_from(["apart", "rows", "heads" if sizes.key_heads == sizes.heads else "groups"])),
        mlp=draw(st.sampled_from(["apart", "gate up", "up gate"])) if not sizes.experts else "apart",
        stacked=bool(sizes.experts) and draw(st.booleans()),
        rotary=draw(st.booleans()),
        padding=draw(st.sampled_from([0, 0, 8])),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Sizes, dict[str, Layout], dict[str, Any]]:
    """Sizes of a family, a layout for each of its models, and options of the merge."""
    sizes = draw(st.sampled_from([_LLAMA, _NEOX, _MIXTRAL]))
    options = draw(st.sampled_from([{}, {"rounding": "stochastic", "seed": 3}]))
    return sizes, {role: draw(layouts(sizes)) for role in ("base", "instruct", "target")}, options


class World:
    """Folders of a family: as they are laid out, and all in the layout of the target, without rows that one lacks."""

    def __init__(self, folder: Path, sizes: Sizes, chosen: dict[str, Layout]) -> None:
        self.folder, self.sizes, self.chosen = folder, sizes, chosen
        self.models = family(sizes)
        self.least = min(layout.padding for layout in chosen.values())
        self.paths = {role: self.written(role, layout, role) for role, layout in chosen.items()}

    def tensors(self, role: str, layout: Layout, padding: int) -> Tensors:
        """A model in a layout; the padding of its own, cut to a number of rows."""
        rows = self.sizes.vocabulary + padding
        made = layout.of(self.models[role], self.sizes)
        return {
            name: t[:rows] if t.shape[0] == self.sizes.vocabulary + layout.padding else t for name, t in made.items()
        }

    def written(self, role: str, layout: Layout, name: str, padding: int | None = None) -> Path:
        """Its folder."""
        rows = layout.padding if padding is None else padding
        config = self.sizes.config(self.sizes.vocabulary + rows)
        tensors = self.tensors(role, layout, rows)
        return write_model(self.folder / name, tensors, shards=2, config=config, files={"tokenizer.json": _TOKENIZER})

    def plain(self) -> dict[str, Path]:
        """All in the target's layout."""
        return {
            role: self.written(role, _in(self.chosen["target"], self.chosen[role].padding), f"plain {role}", self.least)
            for role in self.chosen
        }

    def completed(self, merged: Tensors) -> Tensors:
        """What was merged without the rows that one of the models lacks, with those of the target."""
        own = self.tensors("target", self.chosen["target"], self.chosen["target"].padding)
        for name, tensor in own.items():
            if tensor.shape != merged[name].shape:
                tensor[: merged[name].shape[0]] = merged[name]
                merged[name] = tensor
        return merged


def _in(layout: Layout, padding: int) -> Layout:
    return Layout(**{**vars(layout), "padding": padding})


def check(world: World, options: dict[str, Any], *, all_ways: bool = True) -> None:
    """The merge of a world against that of its models in one layout: to a new folder, or by all ways."""
    plain, out = world.plain(), world.folder / "out"
    options = {"alpha": 0.7, "sync": False, **options}
    ik.apply(plain["target"], (plain["instruct"], plain["base"]), out=world.folder / "wanted", **options)
    wanted = world.completed(read_model(world.folder / "wanted"))
    where = world.paths
    sources = (where["instruct"], where["base"])
    ik.apply(where["target"], sources, out=out, **options)
    differ(read_model(out), wanted, "a new folder")
    if not all_ways:
        return
    assert ik.verify(out).ok
    differ(ik.load(where["target"], sources, **{k: v for k, v in options.items() if k != "sync"}), wanted, "load")
    shutil.copytree(where["target"], world.folder / "changed")
    ik.apply(world.folder / "changed", sources, in_place=True, **options)
    differ(read_model(world.folder / "changed"), wanted, "in place")


def differ(got: Tensors, wanted: Tensors, how: str) -> None:
    """Fail where two models are not the same bits."""
    assert got.keys() == wanted.keys(), how
    assert [name for name in wanted if not same(got[name], wanted[name])] == [], how


_ONE_BY_ONE = {
    "prefix": Layout(prefix="model.language_model."),
    "no prefix": Layout(prefix=""),
    "words": Layout(words="meta"),
    "qkv": Layout(qkv="rows"),
    "groups": Layout(qkv="groups"),
    "gate up": Layout(mlp="gate up"),
    "up gate": Layout(mlp="up gate"),
    "rotary": Layout(rotary=True),
    "padding": Layout(padding=8),
    "all": Layout("language_model.", "meta", "groups", "up gate", rotary=True, padding=8),
}


_ONE = [pytest.param(role, marks=pytest.mark.slow) for role in ("instruct", "base")]


@pytest.mark.parametrize("kind", _ONE_BY_ONE)
@pytest.mark.parametrize("other", ["target", "instruct and base", *_ONE])
def test_one_change(kind: str, other: str, scratch: Path) -> None:
    chosen = {role: _ONE_BY_ONE[kind] if role in other else Layout() for role in ("base", "instruct", "target")}
    check(World(scratch / "models", _LLAMA, chosen), {"rounding": "stochastic"}, all_ways=kind == "all")


@pytest.mark.parametrize("kind", ["heads", "stacked", "stacked, other words"])
@pytest.mark.parametrize("other", ["target", "instruct and base"])
def test_one_change_of_other_families(kind: str, other: str, scratch: Path) -> None:
    sizes, layout = {
        "heads": (_NEOX, Layout("gpt_neox.", qkv="heads")),
        "stacked": (_MIXTRAL, Layout(stacked=True)),
        "stacked, other words": (_MIXTRAL, Layout(words="meta", stacked=True)),
    }[kind]
    chosen = {role: layout if role in other else Layout() for role in ("base", "instruct", "target")}
    check(World(scratch / "models", sizes, chosen), {}, all_ways=False)


def random_layouts(case: tuple[Sizes, dict[str, Layout], dict[str, Any]], scratch: Path) -> None:
    sizes, chosen, options = case
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        check(World(Path(folder) / "models", sizes, chosen), options)


@settings(max_examples=12)
@given(case=cases())
def test_any_layouts(case: tuple[Sizes, dict[str, Layout], dict[str, Any]], scratch: Path) -> None:
    random_layouts(case, scratch)


@pytest.mark.torture
@settings(max_examples=400)
@given(case=cases())
def test_any_layouts_often(case: tuple[Sizes, dict[str, Layout], dict[str, Any]], scratch: Path) -> None:
    random_layouts(case, scratch)


# A residual has no values of the target to search: only what names and structure say, and its sketch of base.
_BY_STRUCTURE = {k: v for k, v in _ONE_BY_ONE.items() if k not in ("rotary", "all")}


@pytest.mark.parametrize("kind", _BY_STRUCTURE)
def test_a_residual_finds_its_place_in_another_layout(kind: str, scratch: Path) -> None:
    plain = {role: Layout() for role in ("base", "instruct", "target")}
    for i, (target, source) in enumerate(itertools.permutations([Layout(), _BY_STRUCTURE[kind]])):
        world = World(scratch / f"{i}", _LLAMA, plain | {"target": target, "instruct": source})
        ik.extract(world.paths["base"], world.paths["instruct"], world.folder / "residual", sync=False)
        ik.apply(world.paths["target"], world.folder / "residual", out=world.folder / "out", alpha=0.7, sync=False)
        there = world.plain()
        ik.extract(there["base"], there["instruct"], world.folder / "plain residual", sync=False)
        ik.apply(there["target"], world.folder / "plain residual", out=world.folder / "w", alpha=0.7, sync=False)
        differ(read_model(world.folder / "out"), world.completed(read_model(world.folder / "w")), kind)
        assert ik.verify(world.folder / "out").ok
