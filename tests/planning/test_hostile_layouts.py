"""Layouts that invite a wrong guess: the right tensors are taken, or the merge is refused with its cause and a way out.

Instruct and base are laid out as the test says, and the target plainly; and the reverse where that is another case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from relayouts import Layout, Sizes, family
from small_models import Tensors, normal, read_model, same, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.planning.plan import Plan

Change = Callable[[Tensors], Tensors]

LLAMA = Sizes()
MIXTRAL = Sizes(experts=4, layers=1)
SQUARE = Sizes(experts=4, layers=1, intermediate=64)
"""Experts whose down_proj is square."""


class Models:
    """A family of which some models are changed before they are written; the merge, and what it should be."""

    def __init__(self, folder: Path, sizes: Sizes, models: dict[str, Tensors] | None = None) -> None:
        self.folder, self.sizes = folder, sizes
        self.models = models or family(sizes)
        self.changed = dict(self.models)
        self.config = sizes.config()

    def change(self, roles: Iterable[str], change: Change) -> Models:
        """The same with these models changed; target's change is that of the result as well."""
        for role in roles:
            self.changed[role] = change(dict(self.changed[role]))
        self.back = change if "target" in roles else lambda merged: merged
        return self

    def merge(self, **options: Any) -> Tensors:
        """What is merged of the files."""
        where = self.write()
        ik.apply(where["target"], (where["instruct"], where["base"]), out=self.folder / "out", sync=False, **options)
        assert ik.verify(self.folder / "out").ok
        return read_model(self.folder / "out")

    def plan(self, **options: Any) -> Plan:
        where = self.write()
        out = self.folder / "planned"
        plan = ik.apply(where["target"], (where["instruct"], where["base"]), out=out, dry_run=True, **options)
        assert isinstance(plan, Plan)
        return plan

    def write(self) -> dict[str, Path]:
        """The folders."""
        return {
            role: self.folder / role
            if (self.folder / role).exists()
            else write_model(self.folder / role, tensors, config=self.config)
            for role, tensors in self.changed.items()
        }

    def wanted(self) -> Tensors:
        """The merge where all have one layout, in that of the target."""
        base, instruct, target = (self.models[role] for role in ("base", "instruct", "target"))
        merged = {name: ik.add_difference_(t.clone(), instruct[name], base[name]) for name, t in target.items()}
        return self.back(merged)

    def check(self, **options: Any) -> None:
        """It is merged right."""
        got, wanted = self.merge(**options), self.wanted()
        assert got.keys() == wanted.keys()
        assert [name for name in wanted if not same(got[name], wanted[name])] == []

    def refused(self, pattern: str, **options: Any) -> str:
        """It is refused with a text that has this in it, in at most twenty lines, and nothing is written."""
        with pytest.raises(CheckpointError) as caught:
            self.merge(**options)
        text = str(caught.value)
        assert re.search(pattern, text, re.DOTALL), text
        assert len(text.splitlines()) < 20, text
        assert not (self.folder / "out").exists()
        return text

    def never_wrong(self, pattern: str) -> None:
        """It is merged right or refused."""
        try:
            self.check()
        except CheckpointError as error:
            found = str(error)
        else:
            return
        assert re.search(pattern, found, re.DOTALL), found


SOURCES, TARGET = ("instruct", "base"), ("target",)
SIDES = pytest.mark.parametrize("roles", [SOURCES, TARGET], ids=["instruct and base", "target"])


def renaming(**words: str) -> Change:
    """Parts of names to others."""

    def change(model: Tensors) -> Tensors:
        for ours, theirs in words.items():
            model = {name.replace(ours, theirs): tensor for name, tensor in model.items()}
        return model

    return change


def laid_out(layout: Layout, sizes: Sizes) -> Change:
    return lambda model: layout.of(model, sizes)


def near_ones(models: dict[str, Tensors], name: str) -> None:
    """Norms as they are after training: nearly all 1, in all models."""
    for seed, model in enumerate(models.values()):
        for i, key in enumerate(sorted(key for key in model if name in key)):
            model[key] = (1 + normal(model[key].shape, 100 * seed + i, torch.float32, 0.01)).bfloat16()


# Two ways to match


@SIDES
def test_norms_that_are_too_alike_are_refused_by_both_names(roles: Iterable[str], scratch: Path) -> None:
    models = family(LLAMA)
    near_ones(models, "layernorm")
    found = Models(scratch, LLAMA, models)
    # Both orders: the names say nothing of which is the first.
    found.change(roles, renaming(input_layernorm="norm_b", post_attention_layernorm="norm_a"))
    text = found.refused(r"norm_[ab].*--rename")
    assert "input_layernorm" in text
    assert "post_attention_layernorm" in text
    pairs = {"input_layernorm": "norm_b", "post_attention_layernorm": "norm_a"}
    found.check(renames=[f"{one}={other}" if roles == SOURCES else f"{other}={one}" for one, other in pairs.items()])


def test_norms_of_their_own_names_are_taken(scratch: Path) -> None:
    models = family(LLAMA)
    near_ones(models, "norm")
    found = Models(scratch, LLAMA, models)
    found.change(SOURCES, laid_out(Layout(prefix="model.language_model.", qkv="rows"), LLAMA))
    found.check()


@SIDES
def test_towers_that_are_too_alike(roles: Iterable[str], scratch: Path) -> None:
    models = family(Sizes(layers=1))
    for model in models.values():  # the second tower starts as the first and is trained like it
        for name in [name for name in model if ".layers." in name]:
            model[f"first.{name}"] = model.pop(name)
            model[f"second.{name}"] = model[f"first.{name}"].clone()
    found = Models(scratch, Sizes(layers=1), models)
    found.change(roles, renaming(**{"first.": "query_encoder.", "second.": "passage_encoder."}))
    # Whichever is taken, the values are the same; but which belongs to which is not known.
    found.never_wrong(r"two ways")


def test_layers_in_another_order_are_not_merged(scratch: Path) -> None:
    def swapped(model: Tensors) -> Tensors:
        return renaming(**{"layers.0.": "layers.x.", "layers.1.": "layers.0.", "layers.x.": "layers.1."})(model)

    Models(scratch, LLAMA).change(["instruct"], swapped).never_wrong(r"layers")


# Values that prove nothing


def test_experts_that_are_near_copies_are_taken_by_their_index(scratch: Path) -> None:
    models = family(MIXTRAL)
    for model in models.values():
        for name in list(model):
            if ".experts." in name:
                first = model[re.sub(r"experts\.\d", "experts.0", name)].float()
                model[name] = (first + normal(first.shape, len(name), torch.float32, 1e-4)).bfloat16()
    found = Models(scratch, MIXTRAL, models).change(SOURCES, laid_out(Layout(stacked=True), MIXTRAL))
    found.check()
    assert re.search(r"experts.*index|index.*experts", f"{found.plan()}"), f"{found.plan()}"


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_tensors_of_zeros_are_taken_by_their_names(prefix: str, scratch: Path) -> None:
    models = family(replace(LLAMA, bias=True))
    for model in models.values():
        for name in model:
            if name.endswith("bias") or "layers.1.self_attn.o_proj" in name:
                model[name] = torch.zeros_like(model[name])
    models["instruct"]["model.layers.0.self_attn.q_proj.bias"].fill_(0.5)
    found = Models(scratch, LLAMA, models).change(SOURCES, laid_out(Layout(prefix=prefix), LLAMA))
    found.check()


@pytest.mark.parametrize("layout", [Layout(), Layout(prefix="transformer.")], ids=["one layout", "two"])
def test_strangers_are_said_to_be_so_once(layout: Layout, scratch: Path) -> None:
    models = family(LLAMA)
    models["target"] = {name: normal(t.shape, 5000 + i) for i, (name, t) in enumerate(models["target"].items())}
    found = Models(scratch, LLAMA, models).change(SOURCES, laid_out(layout, LLAMA))
    try:
        text = "\n".join(found.plan().warnings)
    except CheckpointError as error:
        text = str(error)
    assert len(re.findall("unrelated", text)) == 1, text
    assert len(text) < 3000


def test_a_tensor_that_belongs_to_another_model_is_named(scratch: Path) -> None:
    models = family(LLAMA)
    name = "model.layers.1.self_attn.o_proj.weight"
    models["instruct"][name] = normal(models["instruct"][name].shape, 77)
    found = Models(scratch, LLAMA, models).change((), dict)
    found.refused(rf"{re.escape(name)}.*--skip")
    merged = found.merge(skip=re.escape(name))
    wanted = found.wanted() | {name: models["target"][name]}
    assert [key for key in wanted if not same(merged[key], wanted[key])] == []


def test_names_can_be_trusted(scratch: Path) -> None:
    models = family(LLAMA)
    name = "model.layers.1.self_attn.o_proj.weight"
    models["instruct"][name] = normal(models["instruct"][name].shape, 77)
    Models(scratch, LLAMA, models).change((), dict).check(trust_names=True)


# The same names and shapes


@pytest.mark.parametrize("side", [SOURCES, TARGET, ["instruct"]], ids=str)
@pytest.mark.parametrize("kind", ["up gate", "rotary"])
def test_other_rows_under_the_same_names(side: Iterable[str], kind: str, scratch: Path) -> None:
    plain, other = {
        "up gate": (Layout(mlp="gate up"), Layout(mlp="up gate")),
        "rotary": (Layout(), Layout(rotary=True)),
    }[kind]
    models = {role: plain.of(model, LLAMA) for role, model in family(LLAMA).items()}

    def changed(model: Tensors) -> Tensors:
        if kind == "rotary":
            return other.of(model, LLAMA)
        return {name: t.roll(LLAMA.intermediate, 0) if "gate_up" in name else t for name, t in model.items()}

    Models(scratch, LLAMA, models).change(side, changed).check()


@SIDES
@pytest.mark.parametrize("part", ["down_proj", "gate_up_proj"])
def test_square_experts_that_are_transposed(part: str, roles: Iterable[str], scratch: Path) -> None:
    sizes = SQUARE if part == "down_proj" else replace(SQUARE, intermediate=32)
    models = {role: Layout(stacked=True).of(model, sizes) for role, model in family(sizes).items()}

    def changed(model: Tensors) -> Tensors:
        return {n: t.transpose(1, 2).contiguous() if n.endswith(part) else t for n, t in model.items()}

    Models(scratch, sizes, models).change(roles, changed).refused(rf"experts\.{part}.*transposed")


def test_experts_in_another_order(scratch: Path) -> None:
    def reversed_experts(model: Tensors) -> Tensors:
        renamed = {re.sub(r"experts\.(\d)", lambda m: f"experts.{3 - int(m[1])}", n): t for n, t in model.items()}
        return {n: t.flip(0) if n.endswith("mlp.gate.weight") else t for n, t in renamed.items()}

    Models(scratch, MIXTRAL).change(["instruct"], reversed_experts).never_wrong(r"experts")


# Transposed and interleaved: below a row


@SIDES
def test_linear_weights_that_are_transposed(roles: Iterable[str], scratch: Path) -> None:
    """As in the files of GPT-2, whose layers are Conv1D: [in, out]."""

    def changed(model: Tensors) -> Tensors:
        return {n: t.T.contiguous() if "mlp" in n or "o_proj" in n else t for n, t in model.items()}

    Models(scratch, LLAMA).change(roles, changed).refused(r"(o_proj|mlp).*transposed")


def as_columns(kind: str) -> Change:
    """Experts as in the files of Llama-4 and of gpt-oss: [E, H, 2 I], gate beside up or in turns; down is [E, I, H]."""

    def changed(model: Tensors) -> Tensors:
        made = Layout(stacked=True).of(model, MIXTRAL)
        for name in [name for name in made if ".experts." in name]:
            tensor = made[name]
            if kind == "gpt-oss" and "gate_up" in name:
                tensor = tensor.view(4, 2, -1, MIXTRAL.hidden).transpose(1, 2).reshape(tensor.shape)
            made[name] = tensor.transpose(1, 2).contiguous()
        return made

    return changed


@SIDES
@pytest.mark.parametrize("kind", ["Llama-4", "gpt-oss"])
def test_experts_by_columns(kind: str, roles: Iterable[str], scratch: Path) -> None:
    Models(scratch, MIXTRAL).change(roles, as_columns(kind)).refused(r"experts.*(transposed|column)")


# Words that mean another thing


@SIDES
def test_w1_and_w2_of_the_first_qwen(roles: Iterable[str], scratch: Path) -> None:
    """There w1 is up and w2 is gate, where for all others w1 is gate and w2 is down."""
    words = {"mlp.up_proj": "mlp.w1", "mlp.gate_proj": "mlp.w2", "mlp.down_proj": "mlp.c_proj"}
    Models(scratch, LLAMA).change(roles, renaming(**words)).check()


# Parts that do not add up


def flat(model: Tensors) -> Tensors:
    """Experts one below the other in two dimensions, as in the files of DBRX."""
    made = Layout(stacked=True).of(model, MIXTRAL)
    for name in [name for name in made if name.endswith("gate_up_proj")]:
        gate_up = made.pop(name)
        at = name.removesuffix("gate_up_proj")
        made[f"{at}w1"], made[f"{at}v1"] = (t.flatten(0, 1).contiguous() for t in gate_up.chunk(2, 1))
        made[f"{at}w2"] = made.pop(f"{at}down_proj").transpose(1, 2).flatten(0, 1).contiguous()
    return made


@SIDES
def test_flat_experts_whose_down_is_transposed(roles: Iterable[str], scratch: Path) -> None:
    Models(scratch, MIXTRAL).change(roles, flat).refused(r"(w2|down_proj).*transposed")


@SIDES
def test_stacks_that_are_flat(roles: Iterable[str], scratch: Path) -> None:
    models = {role: Layout(stacked=True).of(model, MIXTRAL) for role, model in family(MIXTRAL).items()}

    def changed(model: Tensors) -> Tensors:
        return {name: t.flatten(0, 1) if t.ndim == 3 else t for name, t in model.items()}

    Models(scratch, MIXTRAL, models).change(roles, changed).check()


@pytest.mark.parametrize("missing", [0, 2, 3])
@pytest.mark.parametrize("role", ["base", "instruct"])
def test_a_missing_expert(role: str, missing: int, scratch: Path) -> None:
    def less(model: Tensors) -> Tensors:
        return {name: t for name, t in model.items() if f"experts.{missing}.up_proj" not in name}

    found = Models(scratch, MIXTRAL)
    found.change(TARGET, laid_out(Layout(stacked=True), MIXTRAL)).change([role], less)
    found.refused(rf"experts?.*\b{missing}\b.*{role}|{role}.*experts?.*\b{missing}\b")


@SIDES
def test_heads_that_do_not_fit(roles: Iterable[str], scratch: Path) -> None:
    found = Models(scratch, LLAMA).change(roles, laid_out(Layout(qkv="groups"), LLAMA))
    found.config |= {"num_attention_heads": 5, "num_key_value_heads": 3, "head_dim": 7}
    found.never_wrong(r"wqkv|[qkv]_proj")


@SIDES
def test_a_tensor_of_which_half_is_used(roles: Iterable[str], scratch: Path) -> None:
    """One model has no v_proj, the others have q, k and v in one."""
    fused = laid_out(Layout(qkv="rows"), LLAMA)
    others = SOURCES if roles == TARGET else TARGET

    def without(model: Tensors) -> Tensors:
        return {name: t for name, t in model.items() if "v_proj" not in name}

    found = Models(scratch, LLAMA).change(others, fused).change(roles, without)
    found.refused(r"qkv_proj|v_proj")


# The same words for other things


@pytest.mark.parametrize("pair", [("gate_proj", "up_proj"), ("k_proj", "v_proj"), ("layers.0.", "layers.1.")], ids=str)
def test_names_that_have_changed_places(pair: tuple[str, str], scratch: Path) -> None:
    one, other = pair
    swap = renaming(**{one: "x.", other: one, "x.": other})
    Models(scratch, LLAMA).change(["instruct"], swap).never_wrong(r"_proj|layers")


@pytest.mark.parametrize("roles", [SOURCES, TARGET, ["instruct"]], ids=str)
def test_layers_that_are_counted_from_one(roles: Iterable[str], scratch: Path) -> None:
    found = Models(scratch, LLAMA).change(roles, renaming(**{"layers.1.": "layers.2.", "layers.0.": "layers.1."}))
    found.never_wrong(r"layers")


# What comes with it


@SIDES
def test_a_tied_head_under_another_prefix(roles: Iterable[str], scratch: Path) -> None:
    models = family(LLAMA)
    for model in models.values():
        del model["lm_head.weight"]
    found = Models(scratch, LLAMA, models)
    found.config["tie_word_embeddings"] = True
    found.change(roles, renaming(**{"model.embed_tokens": "transformer.wte", "model.": "transformer."})).check()


@SIDES
def test_parts_of_several_types(roles: Iterable[str], scratch: Path) -> None:
    """Where q, k and v are apart, q is float32 and the others are not."""
    models = family(LLAMA)
    fused = {role: Layout(qkv="rows").of(model, LLAMA) for role, model in models.items()}
    for role in roles:
        models[role] = {name: t.float() if "q_proj" in name else t for name, t in models[role].items()}
    found = Models(scratch, LLAMA, models).change((), dict)
    found.changed = {role: model if role in roles else fused[role] for role, model in models.items()}
    if roles == TARGET:
        found.check()
    else:
        found.refused(r"F32.*BF16|BF16.*F32")


@SIDES
def test_values_that_are_no_numbers(roles: Iterable[str], scratch: Path) -> None:
    """A tensor whose samples are NaN rests on its name; nothing fails."""
    models = family(LLAMA)
    models["instruct"]["model.layers.0.mlp.up_proj.weight"].fill_(float("nan"))
    models["instruct"]["model.layers.1.mlp.up_proj.weight"].fill_(float("inf"))
    found = Models(scratch, LLAMA, models).change(roles, renaming(**{"model.": "model.language_model."}))
    got = found.merge()
    wanted = {name: t for name, t in found.wanted().items() if "up_proj" not in name}
    assert [name for name in wanted if not same(got[name], wanted[name])] == []


@SIDES
def test_scalars_and_small_tensors_come_with_their_module(roles: Iterable[str], scratch: Path) -> None:
    models = family(LLAMA)
    for seed, model in enumerate(models.values()):
        for layer in range(2):
            at = f"model.layers.{layer}.self_attn."
            model[f"{at}scale"] = torch.tensor(1.0 + seed)
            model[f"{at}sinks"] = normal((4,), 10 * seed + layer)
    Models(scratch, LLAMA, models).change(roles, laid_out(Layout("language_model.model.", qkv="rows"), LLAMA)).check()


PREFIX = renaming(**{"model.layers": "model.language_model.layers", "model.norm": "model.language_model.norm"})
FUSED = Layout(qkv="rows", mlp="gate up")


@pytest.mark.parametrize(
    ("target", "sources", "skip", "kept"),
    [
        (PREFIX, Layout(), r"language_model\.layers\.0\.", r"layers\.0\."),
        (laid_out(FUSED, LLAMA), Layout(), "qkv_proj", "qkv_proj"),
        (lambda model: model, FUSED, "k_proj", r"\.k_proj"),
    ],
    ids=["another prefix", "fused", "split"],
)
def test_what_is_skipped_has_a_partner_of_another_name(
    target: Change, sources: Layout, skip: str, kept: str, scratch: Path
) -> None:
    models = Models(scratch, LLAMA)
    models.change(SOURCES, laid_out(sources, LLAMA)).change(TARGET, target)
    own = models.changed["target"]
    wanted = {name: own[name] if re.search(kept, name) else tensor for name, tensor in models.wanted().items()}
    got = models.merge(skip=skip)
    assert [name for name in wanted if not same(got[name], wanted[name])] == []


def test_skipping_a_part_of_what_is_fused_in_the_target(scratch: Path) -> None:
    models = Models(scratch, LLAMA).change(TARGET, laid_out(FUSED, LLAMA))
    models.refused("Leave out all of it", skip="q_proj")
    models.merge(skip="qkv_proj")


@pytest.mark.parametrize("rename", ["q_proj=k_proj", "nothing=something", "model.language_model.*=model.*"])
def test_a_rename_that_explains_nothing_is_refused(rename: str, scratch: Path) -> None:
    models = Models(scratch, LLAMA).change(TARGET, PREFIX)
    models.refused(r"--rename \S+ gives no tensor of target a partner", renames=[rename])
    models.check(renames=["model.language_model.=model."])


def test_the_pattern_for_one_missing_tensor_takes_no_other(scratch: Path) -> None:
    missing = "layers.1.mlp.up_proj.weight"
    models = Models(scratch, LLAMA)
    models.change(["instruct"], lambda model: {name: t for name, t in model.items() if missing not in name})
    models.change(TARGET, PREFIX)
    text = models.refused("is in target and base and not in instruct")
    skip = re.search(r"--skip '(.+?)'", text)
    assert skip is not None
    own = models.changed["target"]
    wanted = {name: own[name] if missing in name else tensor for name, tensor in models.wanted().items()}
    got = models.merge(skip=skip[1])
    assert [name for name in wanted if not same(got[name], wanted[name])] == []


def test_norms_follow_layers_that_have_changed_places(scratch: Path) -> None:
    def swapped(model: Tensors) -> Tensors:
        turned = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
        return {re.sub(r"layers\.[01]\.", lambda m: turned[m[0]], name): t for name, t in model.items()}

    models = family(LLAMA)
    for seed, model in enumerate(models.values()):
        for i, name in enumerate(name for name in model if "layernorm" in name):
            own = normal((LLAMA.hidden,), 100 * seed + i, torch.float32, 0.02)
            model[name] = (1 + normal((LLAMA.hidden,), i, torch.float32, 0.1) + own).bfloat16()
    Models(scratch, LLAMA, models).change(TARGET, swapped).check()


def test_rows_in_another_order_than_their_tokenizer_says(scratch: Path) -> None:
    def turned(model: Tensors) -> Tensors:
        return {name: t.flip(0) if "embed" in name or "lm_head" in name else t for name, t in model.items()}

    models = Models(scratch, LLAMA).change(TARGET, turned)
    models.refused("values do not")


def test_one_pattern_leaves_out_all_that_has_other_values(scratch: Path) -> None:
    odd = [f"model.layers.0.{name}.weight" for name in ("mlp.up_proj", "self_attn.q_proj")]
    models = family(LLAMA)
    for seed, name in enumerate(odd):
        models["target"][name] = normal(models["target"][name].shape, 900 + seed)
    found = Models(scratch, LLAMA, models).change(TARGET, lambda model: model)
    text = found.refused("values do not")
    assert text.count("--skip") == 1
    skip = re.search(r"--skip '(.+?)'", text)
    assert skip is not None
    wanted = {name: models["target"][name] if name in odd else tensor for name, tensor in found.wanted().items()}
    got = found.merge(skip=skip[1])
    assert [name for name in wanted if not same(got[name], wanted[name])] == []
