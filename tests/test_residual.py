"""`Residual`: a value that stands wherever a residual does, and computes nothing before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from small_models import SHAPES, read_model, same, tensors, triple, write_model
from torch import Tensor, nn

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError
from ires_kernels.planning.rules import ArgumentError


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with base, instruct, target, other; and the residuals of instruct and of other."""
    triple(tmp_path)
    write_model(tmp_path / "other", tensors(5), config={"model_type": "llama", "tie_word_embeddings": False})
    ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / "residual")
    ik.extract(tmp_path / "base", tmp_path / "other", tmp_path / "second", trust_names=True)
    return tmp_path


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not same(found[name], tensor)] == []


def test_algebra() -> None:
    one, two = ik.Residual(((1.0, "a"),)), ik.Residual(((1.0, ("i", "b")),))
    assert (2 * one - two / 4).terms == ((2.0, "a"), (-0.25, ("i", "b")))
    assert (one + two + one).terms == ((2.0, "a"), (1.0, ("i", "b")))
    assert (-(one * 0.5)).terms == ((-0.5, "a"),)
    with pytest.raises(TypeError, match="multiplied by numbers, got str"):
        one * "2"  # type: ignore[operator]
    with pytest.raises(ArgumentError, match="wanted a finite number"):
        one * 1e300 * 1e300
    with pytest.raises(TypeError):
        one + 1  # type: ignore[operator]


def test_sums_are_added_as_residuals_with_factors(models: Path) -> None:
    one, two = ik.Residual.open(models / "residual"), ik.Residual.open(models / "second")
    options: dict[str, Any] = {"rounding": "stochastic", "seed": 3}
    wanted = ik.load(
        models / "target", [models / "residual", models / "second"], alpha=[1.0, -0.25],
        alphas=[("norm", [0.2, -0.05])], **options,
    )  # fmt: skip
    sum_ = 2 * one - 0.5 * two
    assert_same(ik.load(models / "target", sum_, alpha=0.5, alphas=[("norm", 0.1)], **options), wanted)
    assert_same(
        ik.load(models / "target", [2 * one, two], alpha=[0.5, -0.25], alphas={"norm": [0.1, -0.05]}, **options), wanted
    )
    report = ik.apply(models / "target", sum_, out=models / "out", alpha=0.5, alphas=[("norm", 0.1)], **options)
    assert_same(read_model(models / "out"), wanted)
    assert ik.verify(models / "out")
    assert sorted(strength.factors for strength in report.strengths) == [(0.2, -0.05), (1.0, -0.25)]  # type: ignore[union-attr]


def test_pairs_of_models(models: Path) -> None:
    pair = (models / "instruct", models / "base")
    wanted = ik.load(models / "target", pair, alpha=-1.4)
    assert_same(ik.load(models / "target", -2 * ik.Residual.of(*pair), alpha=0.7), wanted)
    two = ik.Residual.of(*pair) + 0.5 * ik.Residual.of(models / "base", models / "instruct")
    assert_same(ik.load(models / "target", two), ik.load(models / "target", [pair, pair[::-1]], alpha=[1, 0.5]))


def test_a_module_takes_them(models: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 40, bias=False)).eval()
    model.load_state_dict({"0.weight": read_model(models / "target")["lm_head.weight"]})
    weights = {name: {"0.weight": read_model(models / name)["lm_head.weight"].float()} for name in ("base", "instruct")}
    for name, table in weights.items():
        write_model(models / f"small {name}", table)
    before = model[0].weight.detach().clone()
    small = ik.Residual.of(models / "small instruct", models / "small base")
    with ik.apply_(model, 0.5 * small, 3):
        wanted = ik.add_difference(before, weights["instruct"]["0.weight"], weights["base"]["0.weight"], 1.5)
        assert same(model[0].weight.detach(), wanted)


def test_wrong_factors(models: Path) -> None:
    one = ik.Residual.open(models / "residual")
    with pytest.raises(ArgumentError, match="got 3 factors for 2 residuals"):
        ik.load(models / "target", [one, one], alpha=[1, 2, 3])
    with pytest.raises(TypeError, match="alpha is str"):
        ik.load(models / "target", one, alpha="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="alphas is int"):
        ik.load(models / "target", one, alphas=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="not mixed with pairs"):
        ik.load(models / "target", one + ik.Residual.of(models / "instruct", models / "base"))


def test_names_shapes_and_norms(models: Path) -> None:
    one, two = ik.Residual.open(models / "residual"), ik.Residual.open(models / "second")
    pair = ik.Residual.of(models / "instruct", models / "base")
    stored, other = (load_file(models / name / "residual.safetensors") for name in ("residual", "second"))
    assert one.shapes == pair.shapes == (one - two).shapes == SHAPES
    assert sorted(one.names) == sorted(SHAPES)

    def norms(table: dict[str, Tensor]) -> dict[str, float]:
        return {name: pytest.approx(tensor.double().norm().item(), rel=1e-12) for name, tensor in table.items()}

    assert one.norms() == pair.norms() == norms(stored)
    assert (-2 * pair).norms() == norms({name: 2 * tensor for name, tensor in stored.items()})
    difference = {name: stored[name].double() - 3 * other[name].double() for name in stored}
    assert (one - 3 * two).norms() == norms(difference)
    assert (pair - 3 * ik.Residual.of(models / "other", models / "base")).norms() == norms(difference)
    with pytest.raises(ArgumentError, match="save the difference of each pair first"):
        (one + pair).norms()


def test_residuals_of_other_tensors_have_no_common_shapes(models: Path) -> None:
    ik.extract(models / "base", models / "instruct", models / "part", skip="lm_head")
    both = ik.Residual.open(models / "residual") + ik.Residual.open(models / "part")
    with pytest.raises(CheckpointError, match=r"part: 'lm_head.weight' is missing"):
        both.norms()


def test_what_is_no_residual(models: Path) -> None:
    with pytest.raises(CheckpointError, match="is a model, wanted a residual"):
        ik.Residual.open(models / "base")
    with pytest.raises(CheckpointError, match="is a residual, wanted a model as base"):
        ik.Residual.of(models / "instruct", models / "residual")
    with pytest.raises(TypeError, match="wanted a path"):
        ik.Residual.open(3)  # type: ignore[arg-type]


def test_saving(models: Path) -> None:
    pair = ik.Residual.of(models / "instruct", models / "base")
    pair.save(models / "saved", dtype="bf16")
    ik.extract(models / "base", models / "instruct", models / "wanted", dtype="bf16")
    found, wanted = (load_file(models / name / "residual.safetensors") for name in ("saved", "wanted"))
    assert_same(found, wanted)
    with pytest.raises(ArgumentError, match="is this residual; it need not be saved again"):
        ik.Residual.open(models / "saved").save(models / "no")


def test_publishing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple[str, object]] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            asked.append((repo_id, options))

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: str) -> str:
            asked.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            assert f"{models}" not in (folder_path / "residual.json").read_text()
            assert ik.inspect(folder_path, follow_links=True)["kind"] == "residual"
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    files = ["residual.json", "residual.safetensors"]
    assert ik.Residual.open(models / "residual").push_to_hub("me/r", private=True) == "https://hub/me/r/commit/1"
    (2 * ik.Residual.of(models / "instruct", models / "base")).push_to_hub("me/s")
    assert asked == [
        ("me/r", {"private": True, "exist_ok": True}), ("me/r", files),
        ("me/s", {"private": None, "exist_ok": True}), ("me/s", files),
    ]  # fmt: skip
    weights = models / "residual/residual.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="has another hash than the manifest says"):
        ik.Residual.open(models / "residual").push_to_hub("me/r")
    assert len(asked) == 4
