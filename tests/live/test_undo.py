"""What is kept to take back an update: little, whatever the update was, and the very bits."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from selection import tiles
from small_models import same, write_model
from torch import Tensor, nn

import ires_kernels as ik
from ires_kernels.backends import native
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.live import kept
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.streaming import stream

native_only = pytest.mark.skipif(not native.isas(), reason="the extension was not built")


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert [name for name, tensor in wanted.items() if not same(found[name], tensor)] == []


class Tensors(nn.Module):
    """Parameters of any shapes and dtypes."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.eval()


def weights(
    folder: Path, dtype: torch.dtype = torch.bfloat16, update: float = 5e-4
) -> tuple[Tensors, tuple[Path, Path]]:
    """A model of weights as they are, and a pair."""
    torch.manual_seed(7)
    base = {"a": torch.randn(512, 300) * 0.02, "b": torch.randn(1000) * 0.02 + 1}
    instruct = {name: tensor + torch.randn_like(tensor) * update for name, tensor in base.items()}
    write_model(folder / "base", {name: tensor.bfloat16() for name, tensor in base.items()})
    write_model(folder / "instruct", {name: tensor.bfloat16() for name, tensor in instruct.items()})
    target = {name: (tensor + torch.randn_like(tensor) * 0.01).to(dtype) for name, tensor in base.items()}
    return Tensors(target), (folder / "instruct", folder / "base")


@native_only
@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 0.45), (torch.float16, 0.65), (torch.float32, 0.8), (torch.float64, 1.0)]
)
def test_it_takes_a_share_of_the_memory(tmp_path: Path, dtype: torch.dtype, share: float) -> None:
    model, pair = weights(tmp_path, dtype)
    before, size = bits(model), sum(tensor.nbytes for tensor in model.state_dict().values())
    with ik.apply_(model, pair, undo="packed") as applied:
        changed = bits(model)
        assert not torch.equal(changed["a"], before["a"])
        assert applied.nbytes <= share * size
    assert_same(bits(model), before)
    with ik.apply_(model, pair, undo=True) as applied:
        assert applied.nbytes == size
        assert_same(bits(model), changed)
    assert_same(bits(model), before)


def test_no_file_is_needed_to_take_it_back(tmp_path: Path) -> None:
    model, (instruct, base) = weights(tmp_path)
    before = bits(model)
    applied = ik.apply_(model, (instruct, base), undo="packed")
    for path in (*instruct.iterdir(), *base.iterdir()):
        path.write_bytes(b"")
        path.unlink()
    applied.undo()
    assert_same(bits(model), before)


@pytest.mark.filterwarnings("ignore:.*look unrelated")
def test_a_sweep_and_one_within_another(tmp_path: Path) -> None:
    model, pair = weights(tmp_path)
    before = bits(model)
    for alpha in (0, 0.5, -3.0, 1000.0):
        with ik.apply_(model, pair, alpha, undo="packed") as one:
            between = bits(model)
            with ik.apply_(model, [pair, pair[::-1]], [alpha, 0.25], rounding="stochastic", undo="packed") as two:
                assert two.nbytes > 0
                assert (one.nbytes > 0) == (alpha != 0)
            assert_same(bits(model), between)
        assert_same(bits(model), before)


def test_where_the_extension_is_missing_it_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "isas", list)
    monkeypatch.setenv("IRES_BACKEND", "reference")
    model, pair = weights(tmp_path)
    before = bits(model)
    with ik.apply_(model, pair, undo="packed") as applied:
        assert applied.nbytes == sum(tensor.nbytes for tensor in before.values())
    assert_same(bits(model), before)


def test_threads_that_undo_the_same(tmp_path: Path) -> None:
    model, pair = weights(tmp_path)
    before = bits(model)
    failed: list[BaseException] = []

    def undo() -> None:
        start.wait()
        try:
            applied.undo()
        except BaseException as error:
            failed.append(error)

    for _ in range(10):
        applied, start = ik.apply_(model, pair, undo="packed"), threading.Barrier(4)
        threads = [threading.Thread(target=undo) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_same(bits(model), before)
    assert not failed


@native_only
def test_bits_that_are_others_by_now_are_noticed_whoever_changed_them(tmp_path: Path) -> None:
    """Also what torch does not count, as changes of `data` are."""
    model, pair = weights(tmp_path)
    applied = ik.apply_(model, pair, undo="packed")
    changed = bits(model)
    model.get_parameter("b").data[17] = 3
    others = bits(model)
    for force in (False, True):
        with pytest.raises(ArgumentError, match=r"'b' has other bits than this update left there.*undo=True"):
            applied.undo(force=force)
        assert_same(bits(model), others)
    model.get_parameter("b").data[17] = changed["b"][17]
    applied.undo()
    assert not torch.equal(model.get_parameter("b"), changed["b"])


@native_only
def test_force_takes_back_what_has_the_same_bits_still(tmp_path: Path) -> None:
    model, pair = weights(tmp_path)
    before = bits(model)
    applied = ik.apply_(model, pair, undo="packed")
    model.get_parameter("a").add_(0)
    with pytest.raises(ArgumentError, match=r"Undo that first; or keep a copy the next time, apply_\(…, undo=True\)"):
        applied.undo()
    applied.undo(force=True)
    assert_same(bits(model), before)


def test_a_copy_is_there_whatever_was_done_since(tmp_path: Path) -> None:
    model, pair = weights(tmp_path)
    before = bits(model)
    applied = ik.apply_(model, pair, undo=True)
    model.get_parameter("a").mul_(2)
    with pytest.raises(ArgumentError, match="or give force=True"):
        applied.undo()
    applied.undo(force=True)
    assert_same(bits(model), before)


def test_tensors_that_lie_elsewhere_by_now(tmp_path: Path) -> None:
    """As after `to` another device and back, or to other strides."""
    model, pair = weights(tmp_path)
    before = bits(model)
    applied = ik.apply_(model, pair, undo="packed")
    weight = model.get_parameter("a")
    weight.data = weight.data.t().contiguous().t()
    model.get_parameter("b").data = model.get_parameter("b").data.clone()
    applied.undo()
    assert not weight.is_contiguous()
    assert_same(bits(model), before)


def test_what_undo_may_be(tmp_path: Path) -> None:
    model, pair = weights(tmp_path)
    for wrong in ("copy", 1, None):
        with pytest.raises(TypeError, match='wanted True, False or "packed"'):
            ik.apply_(model, pair, undo=wrong)  # type: ignore[arg-type]


@native_only
@pytest.mark.parametrize("number", range(2))
def test_no_room_for_what_is_kept_leaves_the_module_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    model, pair = weights(tmp_path)
    before, put, left = bits(model), kept.Shelf.put, number

    def fail_later(shelf: kept.Shelf, record: int, size: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(12, "Cannot allocate memory")
        return put(shelf, record, size)

    monkeypatch.setattr(kept.Shelf, "put", fail_later)
    with tiles(elements=1 << 14), pytest.raises(OSError, match="Cannot allocate memory"):
        ik.apply_(model, pair, threads=2, undo="packed")
    assert_same(bits(model), before)


def test_without_threads_it_is_taken_back_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pair = weights(tmp_path)
    before = bits(model)
    applied = ik.apply_(model, pair, undo="packed")

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        applied.undo()
    assert_same(bits(model), before)


def test_what_is_kept_goes_with_the_handle(tmp_path: Path) -> None:
    def maps() -> int:
        return sum(line.startswith("Size:") for line in Path("/proc/self/smaps").read_text().splitlines())

    model, pair = weights(tmp_path)
    ik.apply_(model, pair, undo="packed").undo()
    gc.collect()
    first = maps()
    for _ in range(12):
        ik.apply_(model, pair, undo="packed").undo()
    gc.collect()
    assert maps() < first + 12


SPECIAL = [0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-40, -1e-40, 6e-8, 65504.0, 3e38, 1.0, -0.02]


def values() -> st.SearchStrategy[list[float]]:
    return st.lists(st.sampled_from(SPECIAL) | st.floats(-1, 1, width=16), max_size=40)


def tensors(draw: st.DrawFn) -> Iterator[Tensor]:
    for dtype in draw(
        st.lists(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]), min_size=1, max_size=4)
    ):
        yield torch.tensor(draw(values()), dtype=torch.float64).to(dtype)


@st.composite
def models(draw: st.DrawFn) -> list[Tensor]:
    return [*tensors(draw)]


@pytest.mark.filterwarnings("ignore:.*look unrelated")
@pytest.mark.filterwarnings("ignore:.*look like other")
@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    models(),
    st.lists(st.sampled_from([0.0, 1.0, -0.5, 1e-8, 300.0]), min_size=1, max_size=2),
    st.sampled_from(["nearest", "stochastic"]),
    st.integers(0, 1000),
    st.booleans(),
)
def test_any_numbers_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    found: list[Tensor],
    alphas: list[float],
    rounding: str,
    seed: int,
    strided: bool,
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(seed)
    base = {f"t{i}": torch.randn(tensor.shape).to(tensor.dtype) for i, tensor in enumerate(found)}
    instruct = {name: tensor + torch.randn_like(tensor) * 10.0 ** -(seed % 6) for name, tensor in base.items()}
    target = dict(zip(base, found, strict=True))
    if strided:
        target = {name: torch.stack([tensor, tensor]).t() for name, tensor in target.items()}
        for files in (base, instruct):
            files.update({name: torch.stack([tensor, tensor], 1) for name, tensor in files.items()})
    write_model(folder / "base", base)
    write_model(folder / "instruct", instruct)
    model = Tensors(target)
    before = bits(model)
    pair = (folder / "instruct", folder / "base")
    options: dict[str, Any] = {"rounding": rounding, "seed": seed}
    with tiles(elements=16), ik.apply_(model, [pair] * len(alphas), alphas, **options, undo="packed"):
        pass
    assert_same(bits(model), before)


@pytest.mark.parametrize("undo", [True, "packed"])
@pytest.mark.parametrize("cut", [0.02, 0.3, 0.6, 0.9])
def test_a_file_that_ends_within_a_tile_leaves_the_module_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: float, undo: bool | str
) -> None:
    """Of the tile some pieces are changed by then, and may be packed."""
    model, (instruct, base) = weights(tmp_path)
    before, fill = bits(model), stream.fill

    def cut_off(*arguments: Any, **options: Any) -> Any:
        (path,) = instruct.glob("*.safetensors")
        os.truncate(path, int(path.stat().st_size * cut))
        return fill(*arguments, **options)

    monkeypatch.setattr(stream, "fill", cut_off)
    with pytest.raises((OSError, CheckpointError)):
        ik.apply_(model, (instruct, base), undo=undo)
    assert_same(bits(model), before)
