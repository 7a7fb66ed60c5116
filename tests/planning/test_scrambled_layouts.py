"""Tensors that are scrambled at random: each is merged with what belongs to it, or the merge is refused.

Instruct and base are scrambled alike. Norms are left out, which rest on their names where these agree. What is right is
known by numbers that elements have, as in conversions.py.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relayouts import Sizes, family
from small_models import Tensors, read_model, same, write_model
from torch import Tensor

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.planning.plan import Plan

SIZES = Sizes(layers=2, heads=2, key_heads=2, head=32, intermediate=64)
"""Most matrices are square, and half of all shapes are equal: nothing is told by shapes."""
PLAIN = family(SIZES)

Draw = Callable[[int], int]
"""A number below that."""


def renamed(layout: Tensors, draw: Draw) -> None:
    """A word of one or all names."""
    word = ("q_proj", "up_proj", "self_attn", "model", "layers", "weight", "input_layernorm", "embed_tokens")[draw(8)]
    other = ("up_proj", "x", "y.z", "mlp")[draw(4)]
    for name in [name for name in layout if word in name]:
        layout[name.replace(word, other)] = layout.pop(name)


def exchanged(layout: Tensors, draw: Draw) -> None:
    """Two tensors, which have each other's name then."""
    one, other = _name(layout, draw), _name(layout, draw)
    layout[one], layout[other] = layout[other], layout[one]


def without(layout: Tensors, draw: Draw) -> None:
    """A tensor that is missing."""
    del layout[_name(layout, draw)]


def transposed(layout: Tensors, draw: Draw) -> None:
    name = _name(layout, draw)
    layout[name] = layout[name].T if layout[name].ndim == 2 else layout[name]


def permuted(layout: Tensors, draw: Draw) -> None:
    """Rows in another order: reversed, moved on, or the halves by turns."""
    name = _name(layout, draw)
    t = layout[name]
    layout[name] = (
        t.flip(0),
        t.roll(len(t) // 2, 0),
        t.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) if len(t) % 2 == 0 else t,
        t[torch.randperm(len(t), generator=torch.Generator().manual_seed(draw(1000)))],
    )[draw(4)]


def joined(layout: Tensors, draw: Draw) -> None:
    """Two tensors in one, under the name of the first."""
    one, other = _name(layout, draw), _name(layout, draw)
    by_token = re.search("embed_tokens|lm_head", one)  # whose further rows are padding
    if one != other and not by_token and layout[one].shape[1:] == layout[other].shape[1:]:
        layout[one] = torch.cat([layout[one], layout.pop(other)])


def cut(layout: Tensors, draw: Draw) -> None:
    """A tensor in two, the second under a name of its own."""
    name = _name(layout, draw)
    t = layout[name]
    layout[name], layout[name.replace("weight", "rest.weight")] = t.tensor_split([len(t) // (2 + draw(3))])


def flat(layout: Tensors, draw: Draw) -> None:
    name = _name(layout, draw)
    layout[name] = layout[name].flatten()


CHANGES = (renamed, exchanged, without, transposed, permuted, joined, cut, flat)


def _name(layout: Tensors, draw: Draw) -> str:
    """Of a tensor."""
    return list(layout)[draw(len(layout))]


def numbered() -> tuple[Tensors, dict[str, Tensor]]:
    """The plain layout in numbers, and the values of these by role."""
    ids, end = {}, 0
    for name, tensor in PLAIN["base"].items():
        ids[name] = torch.arange(end, end + tensor.numel()).view(tensor.shape)
        end += tensor.numel()
    return ids, {role: torch.cat([t.flatten() for t in model.values()]) for role, model in PLAIN.items()}


def scramble(changes: list[int], draws: list[float], folder: Path) -> None:
    """Scramble and merge; fail where a tensor is made of what does not belong to it."""
    plain, values = numbered()
    scrambled = dict(plain)
    numbers = iter(draws)
    for change in changes:
        CHANGES[change](scrambled, lambda n: math.floor(next(numbers) * n))
    paths = {
        role: write_model(folder / role, {n: of[ids].contiguous() for n, ids in layout.items()}, config=SIZES.config())
        for role, of in values.items()
        for layout in (plain if role == "target" else scrambled,)
    }
    given = (paths["target"], (paths["instruct"], paths["base"]))
    try:
        plan = ik.apply(*given, out=folder / "out", dry_run=True)
        ik.apply(*given, out=folder / "out", sync=False)
    except CheckpointError:
        return
    assert isinstance(plan, Plan)
    warned = "".join(plan.warnings)  # of a tensor whose values are half alike, as where a sampled row is in its place
    merged = ik.add_difference_(values["target"].clone(), values["instruct"], values["base"])
    there = torch.cat([ids.flatten() for ids in scrambled.values()])
    got = read_model(folder / "out")
    for name, ids in plain.items():
        if ids.ndim == 1 or re.sub(r"\d", "*", name) in warned:
            continue
        found = torch.isin(ids, there)
        copied = not found.any() and same(got[name], values["target"][ids])
        assert copied or same(got[name], merged[ids]), f"{name} is wrong after {[CHANGES[i].__name__ for i in changes]}"


cases = given(
    changes=st.lists(st.integers(0, len(CHANGES) - 1), min_size=1, max_size=4),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=40, max_size=40),
)


@settings(max_examples=25)
@cases
def test_scrambled_models_are_merged_right_or_refused(changes: list[int], draws: list[float], scratch: Path) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        scramble(changes, draws, Path(folder) / "models")


@pytest.mark.torture
@settings(max_examples=1000)
@cases
def test_many_scrambled_models(changes: list[int], draws: list[float], scratch: Path) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        scramble(changes, draws, Path(folder) / "models")
