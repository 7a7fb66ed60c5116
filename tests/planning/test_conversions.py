"""Layouts that transformers converts into each other are matched by values: to the very elements, or refused.

The oracle is its table of conversions (conversions.py); the models are tiny and random, instruct and target being base
with noise. What is merged must be, bit for bit, what is merged where all models have one layout.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import LARGEST, Conversion, Places, conversion, model_types, tiny_model
from small_models import Tensors, normal, read_model, same, write_model
from torch import Tensor

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.planning.evidence import FEWEST
from ires_kernels.planning.plan import Plan

_PARTS = 8
_CAUSE = r"transposed|alternate|every second"


@pytest.fixture(scope="session")
def values() -> dict[str, Tensor]:
    """The values of elements by their numbers, of all models; "merged" is what comes of them."""
    base = normal((LARGEST,), 1, torch.float32)
    near = {role: (base + normal((LARGEST,), seed, torch.float32, 4e-3)).bfloat16() for seed, role in NOISE}
    of = {"base": base.bfloat16(), **near}
    return of | {"merged": ik.add_difference_(of["target"].clone(), of["instruct"], of["base"], alpha=0.7)}


NOISE = ((2, "instruct"), (3, "target"))


def written(folder: Path, found: Conversion, layout: Tensors, of: Tensor) -> Path:
    """A model in one of the layouts."""
    return write_model(folder, filled(layout, of), files={"config.json": found.config})


def filled(layout: Tensors, of: Tensor) -> Tensors:
    """The values of its elements."""
    return {name: of[ids] for name, ids in layout.items()}


def possible(layout: Tensors, source: Places) -> bool:
    """Whether all rows of tensors of two dimensions or more are whole in the other layout."""
    matrices = [ids for ids in layout.values() if ids.ndim > 1]
    return all(count % ids.shape[-1] == 0 for ids in matrices for _, _, count in source.runs(ids))


def regions(plan: Plan, role: str) -> dict[str, list[tuple[str, int, int]]]:
    """By tensor of the output, what is read for it of a model: name, first element, count; joined where they follow."""
    wholes = sorted(plan.inputs[role].tensors.values(), key=lambda ref: (ref.path, ref.offset))
    places = [(ref.path, ref.offset) for ref in wholes]
    found: dict[str, list[tuple[str, int, int]]] = {}
    for step in plan.steps:
        known = found.setdefault(step.name, [])
        for ref in itertools.chain.from_iterable(each.refs for each in step.operands if each.role == role):
            whole = wholes[bisect.bisect(places, (ref.path, ref.offset)) - 1]
            first = (ref.offset - whole.offset) * ref.numel // ref.nbytes
            if known and known[-1][0] == whole.name and sum(known[-1][1:]) == first:
                known[-1] = (whole.name, known[-1][1], known[-1][2] + ref.numel)
            else:
                known.append((whole.name, first, ref.numel))
    return found


def right_options(text: str, target: Tensors, places: Places) -> list[str]:
    """Of the --rename options that a refusal offers, those by which tensors get what belongs to them."""
    found = []
    for option in dict.fromkeys(re.findall(r"--rename (\S+=\S+?)[.,;]?(?=\s|$)", text)):
        ours, theirs = (re.escape(side.strip(".")).replace(r"\*", r"\d+") for side in option.split("="))
        hits = [name for name in target if re.search(rf"(^|\.){ours}(\.|$)", name)]
        if hits and all(re.search(rf"(^|\.){theirs}(\.|$)", places.runs(target[name])[0][0]) for name in hits):
            assert any(target[name].numel() < FEWEST for name in hits), f"{option}: values tell"
            found.append(option)
    return found


def wrong(kind: str, folder: Path, values: dict[str, Tensor]) -> Iterator[str]:
    """What is wrong about merging across the two layouts of a model type."""
    found = conversion(kind)
    layouts = {"old": found.old, "new": found.new} if found else {}
    for ours, theirs in itertools.permutations(layouts):
        assert found
        target, source, places = layouts[ours], layouts[theirs], found.places[theirs]
        what = f"{kind}, {theirs} into {ours}"
        where = {
            role: written(folder / what / role, found, layout, values[role])
            for role, layout in (("target", target), ("instruct", source), ("base", source))
        }
        given, out = (where["target"], (where["instruct"], where["base"])), folder / what / "out"
        options: dict[str, Any] = {"out": out, "alpha": 0.7}
        try:
            try:
                plan = ik.apply(*given, **options, dry_run=True)
            except CheckpointError as error:
                if "two ways" not in str(error):
                    raise
                options["renames"] = right_options(str(error), target, places)
                plan = ik.apply(*given, **options, dry_run=True)
            ik.apply(*given, **options, sync=False)
        except CheckpointError as error:
            named = {name for problem in error.problems for name in problem["tensors"]}
            small = bool(named) and all((target | source)[name].numel() < FEWEST for name in named)
            # Of what is so small values tell nothing: without a name in common it is refused, rightly.
            if not small and (possible(target, places) or not re.search(_CAUSE, str(error))):
                yield f"{what}: {str(error)[:2000]}"
            continue
        if not possible(target, places):
            yield f"{what}: is not refused"
        assert isinstance(plan, Plan)
        got, read = read_model(out), regions(plan, "instruct")
        for name, tensor in filled(target, values["merged"]).items():
            if not same(got[name], tensor):
                yield f"{what}: {name} is wrong"
            elif read[name] != (wanted := places.runs(target[name])):
                yield f"{what}: {name} takes {read[name][:3]}, wanted {wanted[:3]}"


@pytest.mark.parametrize("part", [pytest.param(i, marks=[pytest.mark.slow] if i % 2 else []) for i in range(_PARTS)])
def test_what_transformers_converts_is_matched(part: int, scratch: Path, values: dict[str, Tensor]) -> None:
    kinds = [kind for kind in model_types()[part::_PARTS] if conversion(kind) is not None]
    assert len(kinds) >= 120 / _PARTS
    told = list(itertools.chain.from_iterable(wrong(kind, scratch / kind, values) for kind in kinds))
    assert not told, "\n".join(told)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_neox", "gemma3", "qwen2_vl", "gte"])
def test_both_formats_that_transformers_saves(kind: str, scratch: Path) -> None:
    model = tiny_model(kind, "cpu").bfloat16()
    models: dict[str, Tensors] = {"base": {}, "instruct": {}, "target": {}, "merged": {}}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        base = normal(parameter.shape, i, torch.float32)
        near = [(base + normal(base.shape, i + seed, torch.float32, 4e-3)).bfloat16() for seed in (1000, 2000)]
        made = (base.bfloat16(), *near, ik.add_difference_(near[1].clone(), near[0], base.bfloat16()))
        for role, tensor in zip(models, made, strict=True):
            models[role][name] = tensor
    for role, tensors in models.items():
        model.load_state_dict(tensors, strict=False)
        for old in (False, True):
            model.save_pretrained(scratch / f"{role} {old}", save_original_format=old)
    for old in (False, True):
        theirs = (scratch / f"instruct {not old}", scratch / f"base {not old}")
        ik.apply(scratch / f"target {old}", theirs, out=scratch / f"out {old}", sync=False)
        got, wanted = read_model(scratch / f"out {old}"), read_model(scratch / f"merged {old}")
        assert got.keys() == wanted.keys()
        assert [name for name in wanted if not same(got[name], wanted[name])] == []
