"""Checkpoints that hold a tied embedding twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from merges import bits, merge
from small_models import normal, read_model, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError


def twice(folder: Path, same: bool) -> tuple[Path, Path, Path]:
    """base, instruct with one embedding, target with two, the second one equal or not."""
    base = {"shared.weight": normal((40, 16), 1), "layer.weight": normal((8, 16), 2)}
    instruct = {name: (t.float() + normal(t.shape, 7, torch.float32, 1e-2)).bfloat16() for name, t in base.items()}
    target = {name: (t.float() + normal(t.shape, 8, torch.float32, 1e-2)).bfloat16() for name, t in base.items()}
    target["encoder.embed_tokens.weight"] = target["shared.weight"].clone() if same else normal((40, 16), 9)
    models = (("base", base), ("instruct", instruct), ("target", target))
    one, two, three = (write_model(folder / name, model) for name, model in models)
    return one, two, three


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_second_copy_of_the_embedding_moves_with_it(tmp_path: Path, rounding: str) -> None:
    base, instruct, target = twice(tmp_path, same=True)
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    merge(target, (instruct, base), out=tmp_path / "one", rounding=rounding)
    merge(target, tmp_path / "residual", out=tmp_path / "two", rounding=rounding)
    for out in (tmp_path / "one", tmp_path / "two"):
        merged = read_model(out)
        assert bits(merged["encoder.embed_tokens.weight"]) == bits(merged["shared.weight"])
        assert bits(merged["shared.weight"]) != bits(read_model(target)["shared.weight"])
        assert ik.verify(out)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_head_that_all_models_store_and_no_config_tells_of(tmp_path: Path, rounding: str) -> None:
    base, instruct, target = twice(tmp_path, same=True)
    for folder in (base, instruct, target):
        models = read_model(folder)
        models.pop("encoder.embed_tokens.weight", None)
        shutil.rmtree(folder)
        write_model(folder, {**models, "lm_head.weight": models["shared.weight"].clone()})
    merge(target, (instruct, base), out=tmp_path / "out", rounding=rounding)
    merged = read_model(tmp_path / "out")
    assert bits(merged["lm_head.weight"]) == bits(merged["shared.weight"])
    assert ik.verify(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is a second copy of 'shared.weight'"):
        merge(target, (instruct, base), out=tmp_path / "other", alphas=[("shared", 0.5)])
    own = read_model(instruct)
    own["lm_head.weight"] = own["lm_head.weight"] + normal((40, 16), 11, scale=2e-3)
    shutil.rmtree(instruct)
    write_model(instruct, own)  # a head of its own, which the target's may follow
    merge(target, (instruct, base), out=tmp_path / "another", alphas=[("shared", 0.5)])
    merged = read_model(tmp_path / "another")
    assert bits(merged["lm_head.weight"]) != bits(merged["shared.weight"])


def test_the_embedding_of_mamba_has_a_name_of_its_own(tmp_path: Path) -> None:
    base, instruct, target = twice(tmp_path, same=True)
    for folder in (base, instruct, target):
        models = {
            name.replace("shared", "backbone.embeddings").replace("encoder.embed_tokens", "lm_head"): t
            for name, t in read_model(folder).items()
        }
        shutil.rmtree(folder)
        write_model(folder, models)
    merge(target, (instruct, base), out=tmp_path / "out")
    merged = read_model(tmp_path / "out")
    assert bits(merged["lm_head.weight"]) == bits(merged["backbone.embeddings.weight"])
    assert bits(merged["lm_head.weight"]) != bits(read_model(target)["lm_head.weight"])


def test_a_second_copy_with_other_rules_is_refused(tmp_path: Path) -> None:
    base, instruct, target = twice(tmp_path, same=True)
    for rules in ({"alphas": [("shared", 0.5)]}, {"skip": "shared"}):
        with pytest.raises(CheckpointError, match=r"'encoder.embed_tokens.weight' is a second copy of 'shared.weight'"):
            merge(target, (instruct, base), out=tmp_path / "out", **rules)


def test_a_tensor_that_only_looks_like_a_second_copy_is_kept(tmp_path: Path) -> None:
    base, instruct, target = twice(tmp_path, same=False)
    report = merge(target, (instruct, base), out=tmp_path / "out")
    assert report.copied == {"encoder.embed_tokens.weight": "only in the target"}
