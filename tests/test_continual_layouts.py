"""The trained family of examples/continual in other layouts: what is merged are the very bits of the plain merge.

So it has the figures that were measured for that, whatever layout its models come in. The weights are trained: their
norms are alike, their rows have relatives, and their vocabulary has rows that no text has.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from relayouts import Layout, Sizes
from small_models import Tensors, read_model, same, write_model
from torch import Tensor

import ires_kernels as ik

FAMILY = Path(__file__).parent.parent / "examples" / "continual" / "family"
SIZES = Sizes(vocabulary=264, hidden=192, intermediate=512, heads=4, key_heads=4, head=48, layers=3)
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

LAYOUTS = {
    "prefixed": Layout(prefix="model.language_model."),
    "fused": Layout(qkv="rows", mlp="gate up"),
    "per head": Layout(prefix="gpt_neox.", qkv="heads", mlp="up gate"),
    "permuted rows, other words": Layout(words="meta", rotary=True),
    "padded": Layout(padding=56),
    "all": Layout("", "meta", "heads", "up gate", rotary=True, padding=24),
}


def laid_out(folder: Path, role: str, layout: Layout, order: Tensor | None = None) -> Path:
    """A model of the family in a layout, with the files beside it and a config that counts its rows.

    `order`: the old id of each token that is no special one, by its new id.
    """
    config = json.loads((FAMILY / role / "config.json").read_text())
    config["vocab_size"] += layout.padding
    files = {name: path.read_text() for name in SIDE_FILES if (path := FAMILY / role / name).exists()}
    model = read_model(FAMILY / role)
    if order is not None:
        tokenizer = json.loads(files["tokenizer.json"])
        new_ids = order.argsort().tolist()
        tokenizer["model"]["vocab"] = {text: new_ids[i] for text, i in tokenizer["model"]["vocab"].items()}
        files["tokenizer.json"] = json.dumps(tokenizer)
        model |= {name: model[name][order] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    return write_model(folder / role, layout.of(model, SIZES), shards=3, config=config, files=files)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """The merge that was measured."""
    out = tmp_path_factory.mktemp("plain") / "out"
    ik.apply(FAMILY / "cpt", (FAMILY / "instruct", FAMILY / "base"), out=out, sync=False)
    return read_model(out)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("other", ["target", "instruct and base"])
def test_the_merge_is_the_plain_one(kind: str, other: str, plain: Tensors, scratch: Path) -> None:
    layout, given = LAYOUTS[kind], {"target": "cpt", "instruct": "instruct", "base": "base"}
    paths = {role: laid_out(scratch, name, layout if role in other else Layout()) for role, name in given.items()}
    ik.apply(paths["target"], (paths["instruct"], paths["base"]), out=scratch / "out", sync=False)
    got, wanted = read_model(scratch / "out"), layout.of(plain, SIZES) if other == "target" else plain
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not same(got[name], wanted[name])] == []


@pytest.mark.parametrize("kind", [kind for kind in LAYOUTS if not LAYOUTS[kind].rotary])
def test_a_residual_gives_the_plain_merge(kind: str, plain: Tensors, scratch: Path) -> None:
    paths = {name: laid_out(scratch, name, LAYOUTS[kind]) for name in ("base", "instruct")}
    ik.extract(paths["base"], paths["instruct"], scratch / "residual", sync=False)
    ik.apply(FAMILY / "cpt", scratch / "residual", out=scratch / "out", sync=False)
    got = read_model(scratch / "out")
    assert [name for name in plain if not same(got[name], plain[name])] == []


@pytest.mark.parametrize("layout", [Layout(), LAYOUTS["fused"]], ids=["one layout", "two"])
def test_another_order_of_tokens(layout: Layout, plain: Tensors, scratch: Path) -> None:
    """Rows belong to tokens, and the target keeps its tokenizer."""
    specials = 6
    rest = torch.randperm(SIZES.vocabulary - specials, generator=torch.Generator().manual_seed(1)) + specials
    order = torch.cat([torch.arange(specials), rest])
    instruct, base = (laid_out(scratch, role, layout, order) for role in ("instruct", "base"))
    ik.apply(FAMILY / "cpt", (instruct, base), out=scratch / "out", sync=False)
    got = read_model(scratch / "out")
    assert [name for name in plain if not same(got[name], plain[name])] == []
    assert (scratch / "out" / "tokenizer.json").read_text() == (FAMILY / "cpt" / "tokenizer.json").read_text()
