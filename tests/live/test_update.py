"""`apply_`: what `apply` would write, in a module, and what was there before again."""

from __future__ import annotations

import gc
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, family
from selection import tiles
from small_models import same, write_model
from torch import Tensor, nn

import ires_kernels as ik
from ires_kernels.checking import guards
from ires_kernels.checkpoints.checkpoint import TensorRef
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.checkpoints.sources import LocalFile, Read
from ires_kernels.live import snapshot
from ires_kernels.live.target import _moved
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.planning.steps import Operand, Output, Step
from ires_kernels.streaming import stream

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

Files = tuple[nn.Module, Path, Path]


def output(model: Any) -> Tensor:
    """What a model says: of a language model some tokens and their scores."""
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        if not model.can_generate():
            return model(input_ids=ids).logits
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    return torch.stack(said.scores)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not same(found[name], tensor)] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_module_gets_what_the_files_get_and_back_what_it_had(tmp_path: Path, name: str) -> None:
    model = family(tmp_path, name)
    pair = (tmp_path / "instruct", tmp_path / "base")
    ik.apply(tmp_path / "target", pair, out=tmp_path / "out", alpha=0.7)
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    before, said = bits(model), output(model)
    parameters, pointers = [*model.parameters()], [p.data_ptr() for p in model.parameters()]
    with ik.apply_(model, pair, 0.7) as applied:
        assert_same(bits(model), bits(loaded))
        assert torch.equal(output(model), output(loaded))
        assert not torch.equal(output(model), said)
        assert applied.changed
    assert_same(bits(model), before)
    assert torch.equal(output(model), said)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == pointers


def small(folder: Path, dtype: torch.dtype = torch.float32) -> Files:
    """A module, and files of instruct and base for it."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 8)).to(dtype).eval()
    base = bits(model)
    instruct = {n: t + torch.randn_like(t) * 0.01 if t.is_floating_point() else t for n, t in base.items()}
    write_model(folder / "base", base)
    write_model(folder / "instruct", instruct)
    return model, folder / "instruct", folder / "base"


def test_a_residual_in_a_folder_with_factors_and_rounding(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path, torch.bfloat16)
    write_model(tmp_path / "target", bits(model))
    ik.extract(base, instruct, tmp_path / "residual")
    rules: dict[str, Any] = {"alphas": [("0", 0.25)], "skip": "running", "rounding": "stochastic", "seed": 7}
    wanted = ik.load(tmp_path / "target", tmp_path / "residual", alpha=-1.5, **rules)
    applied = ik.apply_(model, tmp_path / "residual", -1.5, **rules)
    assert_same(bits(model), {**wanted})
    assert "1.running_mean" not in applied.changed


def test_several_pairs(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    write_model(tmp_path / "target", bits(model))
    wanted = ik.load(tmp_path / "target", [(instruct, base), (base, instruct)], alpha=[0.5, 0.25])
    ik.apply_(model, [(instruct, base), (base, instruct)], [0.5, 0.25])
    assert_same(bits(model), {**wanted})


def test_parameters_stay_what_they_are(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    weight = model[0].weight  # type: ignore[index]
    weight.requires_grad_(False)
    versions = {name: tensor._version for name, tensor in model.named_parameters()}
    loss = model(torch.randn(4, 64)).sum()
    ik.apply_(model, (instruct, base))
    assert not weight.requires_grad
    assert all(tensor._version > versions[name] for name, tensor in model.named_parameters())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strided_and_empty_parameters(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    wanted = ik.load(base, (instruct, base), alpha=0.5)
    model[0].weight.data = model[0].weight.data.t().contiguous().t()  # type: ignore[index, union-attr, operator]
    assert not model[0].weight.is_contiguous()  # type: ignore[index, union-attr, operator]
    before = bits(model)
    applied = ik.apply_(model, (instruct, base), 0.5)
    assert_same(bits(model), wanted)
    applied.undo()
    assert_same(bits(model), before)


def test_one_within_another_is_undone_first(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    before = bits(model)
    one = ik.apply_(model, (instruct, base))
    between = bits(model)
    two = ik.apply_(model, (instruct, base), 0.5)
    with pytest.raises(ArgumentError, match="Undo that first"):
        one.undo()
    two.undo()
    two.undo()
    assert_same(bits(model), between)
    one.undo()
    assert_same(bits(model), before)


def test_what_an_optimiser_did_is_not_lost_by_mistake(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    before = bits(model)
    applied = ik.apply_(model, (instruct, base))
    with torch.no_grad():
        model[0].weight.add_(1)  # type: ignore[index, union-attr, operator]
    with pytest.raises(ArgumentError, match="force=True"):
        applied.undo()
    applied.undo(force=True)
    assert_same(bits(model), before)


def test_tensors_that_others_have_taken_the_place_of_are_not_undone_in_silence(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    before, changed = bits(model), dict(model.named_parameters())
    applied = ik.apply_(model, (instruct, base))
    others = {name: tensor + 1 for name, tensor in bits(model).items()}
    model.load_state_dict(others, assign=True)
    with pytest.raises(ArgumentError, match="is not the tensor that was changed: the module has another"):
        applied.undo()
    applied.undo(force=True)
    assert_same(bits(model), others)
    assert all(same(tensor.detach(), before[name]) for name, tensor in changed.items())


def test_a_module_of_another_dtype_is_not_undone(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    applied = ik.apply_(model, (instruct, base))
    model.half()
    with pytest.raises(ArgumentError, match=r"float16 of shape \[32, 64\] now, and was F32"):
        applied.undo(force=True)


def test_a_failure_leaves_the_module_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, instruct, base = small(tmp_path)
    before = bits(model)
    fill = stream.fill

    def fail_after(*arguments: Any, **options: Any) -> Any:
        fill(*arguments, **options)
        assert not torch.equal(model[0].weight, before["0.weight"])  # type: ignore[index, union-attr, arg-type]
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(stream, "fill", fail_after)
    with pytest.raises(OSError, match="Input/output error"):
        ik.apply_(model, (instruct, base))
    assert_same(bits(model), before)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_failure_after_any_tile_leaves_the_module_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str
) -> None:
    """What was kept goes back, and what was not was not changed."""
    model, instruct, base = small(tmp_path, torch.bfloat16)
    before, read, reads, left = bits(model), LocalFile.read_into, LocalFile.reads, 0

    def fail_later(file: LocalFile, view: memoryview, offset: int) -> None:
        nonlocal left
        left -= file.path.parent == instruct
        if left < 0:
            raise OSError(5, "Input/output error")
        read(file, view, offset)

    def end_later(file: LocalFile, offset: int, size: int) -> list[Read]:
        nonlocal left
        left -= file.path.parent == instruct and size > 0
        return reads(file, offset + (1 << 40) * (left < 0), size)

    failed = 0
    with tiles(elements=256), monkeypatch.context() as patched:
        patched.setattr(LocalFile, "read_into", fail_later)
        patched.setattr(LocalFile, "reads", end_later)
        for number in range(5, 80):
            left = number
            try:
                applied = ik.apply_(model, (instruct, base), rounding=rounding, threads=2)
            except OSError:
                failed += 1
            else:
                applied.undo()
            assert_same(bits(model), before)
    assert failed > 8
    assert number > failed


def test_nothing_is_kept_where_nobody_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, instruct, base = small(tmp_path)
    with ik.apply_(model, (instruct, base)) as applied:
        wanted = bits(model)
    applied = ik.apply_(model, (instruct, base), undo=False)
    assert_same(bits(model), wanted)
    assert applied.nbytes == 0
    assert "0 bytes kept" in repr(applied)
    with pytest.raises(ArgumentError, match="undo=False"):
        applied.undo()
    monkeypatch.setattr(guards, "check_unchanged", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.warns(UserWarning, match="changed in part"), pytest.raises(KeyboardInterrupt):
        ik.apply_(model, (instruct, base), undo=False)


def test_what_is_moved_is_kept_before(tmp_path: Path) -> None:
    """Elements that are read elsewhere than where they are changed, and those that nobody reads."""

    def refs(name: str, *runs: tuple[int, int]) -> tuple[TensorRef, ...]:
        whole = TensorRef(name, "F32", (8,), tmp_path, 0, 32)
        return tuple(whole.run(first, count) for first, count in runs)

    def step(name: str, role: str, of: str, first: int, *runs: tuple[int, int]) -> Step:
        output, operand = Output(name, "F32", (8,), ""), Operand(role, refs(of, *runs))
        return Step(output, "copy", (operand,), first=first, count=operand.count)

    assert not _moved([step("a", "target", "a", 0, (0, 4)), step("a", "target", "a", 4, (4, 2), (6, 2))])
    assert _moved([step("a", "target", "a", 0, (0, 4)), step("a", "instruct", "a", 4, (4, 4))]) == {"a"}
    assert _moved([step("a", "target", "a", 0, (4, 4))]) == {"a"}
    assert _moved([step("a", "target", "b", 0, (0, 8)), step("b", "target", "b", 0, (0, 8))]) == {"a", "b"}


def test_a_copy_is_made_where_the_last_one_was(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    before = bits(model)
    for alpha in (0.5, 1.0, -1.0):
        with ik.apply_(model, (instruct, base), alpha):
            assert not torch.equal(bits(model)["0.weight"], before["0.weight"])
        assert_same(bits(model), before)
    gc.collect()
    assert len(snapshot._spare) == 1
    memory = snapshot._spare[0]
    first = snapshot.Snapshot("one", {"a": torch.ones(4)})
    second = snapshot.Snapshot("two", {"a": torch.zeros(4)})
    assert memory in (first._memory, second._memory)
    assert first._memory is not second._memory


def test_an_interrupt_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        ik.apply_(model, (instruct, base), progress=lambda *_: signal.raise_signal(signal.SIGINT))
    assert_same(bits(model), before)


def test_an_interrupt_at_the_very_end_leaves_the_module_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, instruct, base = small(tmp_path)
    before = bits(model)
    monkeypatch.setattr(guards, "check_unchanged", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        ik.apply_(model, (instruct, base))
    assert_same(bits(model), before)


def test_a_damaged_residual_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    ik.extract(base, instruct, tmp_path / "residual")
    with open(tmp_path / "residual/residual.safetensors", "r+b") as file:
        file.seek(-3, 2)
        file.write(b"abc")
    before = bits(model)
    with pytest.raises(CheckpointError, match="is damaged"):
        ik.apply_(model, tmp_path / "residual")
    assert_same(bits(model), before)


def test_a_shape_that_does_not_fit_is_refused_in_the_name_of_the_module(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    model[2] = nn.Linear(32, 9)  # type: ignore[operator]
    before = bits(model)
    with pytest.raises(CheckpointError, match=r"'2.weight' has shape .* in target \(Sequential\)"):
        ik.apply_(model, (instruct, base))
    assert_same(bits(model), before)


def cut_of_one(model: Any) -> None:
    weight = torch.randn(33, 64)
    model[0].weight.data, model[2].weight.data = weight[:32], weight.view(-1)[-8 * 32 :].view(8, 32)
    model[0].weight.data = weight[1:]


BAD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "meta": (lambda model: model.to("meta"), "on the meta device"),
    "expanded": (lambda model: setattr(model[0].weight, "data", torch.zeros(1, 1).expand(32, 64)), "expanded"),
    "sliding": (
        lambda model: setattr(model[0].weight, "data", torch.randn(95).as_strided((32, 64), (1, 1))),
        "'0.weight' is .* view whose elements share memory",
    ),
    "negative": (lambda model: setattr(model[0].weight, "data", torch.randn(32, 64)._neg_view()), "other signs"),
    "freed": (lambda model: model[0].weight.untyped_storage().resize_(0), "'0.weight' has no memory"),
    "cut off": (lambda model: model[0].weight.untyped_storage().resize_(100), "'0.weight' has no memory"),
    "overlapping": (cut_of_one, "share some of their memory"),
    "sparse": (lambda model: setattr(model[0], "weight", nn.Parameter(torch.eye(4).to_sparse())), "sparse_coo"),
    "quantized": (lambda model: setattr(model, "is_quantized", True), "Sequential is quantized"),
}


@pytest.mark.parametrize("kind", BAD)
def test_modules_that_cannot_be_changed(tmp_path: Path, kind: str) -> None:
    model, instruct, base = small(tmp_path)
    make, message = BAD[kind]
    make(model)
    with pytest.raises(ArgumentError, match=message):
        ik.apply_(model, (instruct, base))


def test_what_was_freed_is_taken_back_when_it_is_there_again(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    before = bits(model)
    applied = ik.apply_(model, (instruct, base))
    storage, size = model[0].weight.untyped_storage(), model[0].weight.nbytes  # type: ignore[index, union-attr, operator]
    kept = model[0].weight.detach().clone()  # type: ignore[index, union-attr, operator]
    storage.resize_(0)
    with pytest.raises(ArgumentError, match=r"'0.weight' has no memory now"):
        applied.undo()
    storage.resize_(size)
    with torch.no_grad():
        model[0].weight.copy_(kept)  # type: ignore[index, union-attr, operator]
    applied.undo(force=True)
    assert_same(bits(model), before)


def test_tensors_of_inference_mode(tmp_path: Path) -> None:
    _, instruct, base = small(tmp_path)
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(64, 32)).eval()
    with pytest.raises(ArgumentError, match="inference_mode"):
        ik.apply_(model, (instruct, base), allow_missing="any")


def test_what_is_no_module(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    with pytest.raises(TypeError, match=r"wanted a torch\.nn\.Module"):
        ik.apply_(model.state_dict(), (instruct, base))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no parameters"):
        ik.apply_(nn.Module(), (instruct, base))


def test_training_mode_is_warned_of(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    with pytest.warns(UserWarning, match="training mode"):
        ik.apply_(model.train(), (instruct, base))


def test_what_is_around_a_module_is_looked_through(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    wanted = ik.load(base, (instruct, base))
    ik.apply_(torch.compile(model, backend="eager"), (instruct, base))  # type: ignore[arg-type]
    assert_same(bits(model), wanted)


def test_the_old_bits_are_held_as_long_as_they_may_be_wanted(tmp_path: Path) -> None:
    model, instruct, base = small(tmp_path)
    applied = ik.apply_(model, (instruct, base))
    assert applied.nbytes == sum(model.state_dict()[name].nbytes for name in applied.changed)
    assert "bytes kept" in repr(applied)
    memory = applied._before
    assert memory is not None
    del applied
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ik.apply_(model, (instruct, base)).undo()
