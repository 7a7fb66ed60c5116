"""`ires compare`: one pass over three models, against sums of whole tensors in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantized_models import FORMATS, numbers
from selection import tiles
from small_models import normal, write_model

import ires_kernels as ik
from ires_kernels.cli import main
from ires_kernels.records.fit import MEASURED, Place, bar, place

RESULTS = Path(__file__).parents[2] / "examples" / "continual" / "results"
NAMES = {
    "model.embed_tokens.weight": (40, 16),
    **{f"model.layers.{i}.mlp.down_proj.weight": (16, 24) for i in range(11)},
    **{f"model.layers.{i}.input_layernorm.weight": (16,) for i in range(11)},
}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Writes target, instruct and base, and returns their tensors."""
    base = {name: normal(shape, i) for i, (name, shape) in enumerate(NAMES.items())}
    found = {"base": base}
    for seed, (role, scale) in enumerate({"instruct": 0.001, "target": 0.003}.items(), 1):
        found[role] = {
            name: (t.float() + normal(t.shape, 100 * seed + i, scale=scale).float()).bfloat16()
            for i, (name, t) in enumerate(base.items())
        }
    for role, tensors in found.items():
        write_model(tmp_path / role, tensors, config={"architectures": ["LlamaForCausalLM"]})
    return found


def test_sums_are_those_of_whole_tensors(tmp_path: Path, models: dict[str, dict[str, torch.Tensor]]) -> None:
    pair = (tmp_path / "instruct", tmp_path / "base")
    with tiles(elements=100):  # several of most tensors, by several threads
        report = ik.compare(tmp_path / "target", pair, alpha=0.3, threads=3, curve=True)
    assert report.tensors.keys() == NAMES.keys()
    merged = ik.load(tmp_path / "target", pair, alpha=0.3)
    groups = {
        "total": list(NAMES),
        "model.layers.10": [name for name in NAMES if ".10." in name],
        "mlp.down_proj": [name for name in NAMES if "down_proj" in name],
    }
    for group, names in groups.items():
        fit = report.total if group == "total" else (report.layers | report.kinds)[group]
        t, x, y, out = (
            torch.cat([tensors[name].double().flatten() for name in names])
            for tensors in (models["target"], models["instruct"], models["base"], merged)
        )
        drift, update = t - y, x - y
        assert fit.elements == len(t)
        assert fit.relative_drift == pytest.approx(float(drift.norm() / y.norm()))
        assert fit.relative_size == pytest.approx(float(update.norm() / y.norm()))
        assert fit.cosine == pytest.approx(float(drift @ update / (drift.norm() * update.norm())))
        assert fit.conflicts == int((drift * update < 0).sum())
        assert fit.both == int((drift * update != 0).sum())
        assert fit.within[0] == int((update == 0).sum())
        assert fit.effective(report.alphas)[0] == pytest.approx(float((out - t) @ update / (update @ update)))
    again = ik.compare(tmp_path / "target", pair, alpha=0.3, threads=1)
    assert again.to_dict()["kinds"].keys() == report.to_dict()["kinds"].keys()
    assert again.total.effective(again.alphas)[0] == pytest.approx(report.total.effective(report.alphas)[0])
    assert list(report.layers)[:3] == ["model.embed_tokens", "model.layers.0", "model.layers.1"]
    assert list(report.layers)[-1] == "model.layers.10"


def test_command(
    tmp_path: Path, models: dict[str, dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))
    asked = ["compare", f"{tmp_path}/target", "--instruct", f"{tmp_path}/instruct", "--base", f"{tmp_path}/base"]
    assert main([*asked, "--skip", "embed", "--alpha", "0.3"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.split("\nread", 1)[0].split("\n"))) <= 80
    assert "model.layers.0 – 1" in text
    assert "1 tensor, " in text
    assert "alpha 0.3" in text
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"]["elements"] == sum(t.numel() for t in models["base"].values())
    assert sum(found["total"]["ulps"].values()) == found["total"]["elements"]
    assert found["not_compared"] == {}
    assert main([*asked[:-1], f"{tmp_path}/nothing"]) == 2
    assert main([*asked, "--alpha", "nan"]) == 2
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("format", "dtype"), [("fp8-block", None), ("pack-quantized", "bf16")])
def test_quantized_weights_are_their_numbers(tmp_path: Path, format: str, dtype: str | None) -> None:
    make, settings = FORMATS[format]
    for role in ("target", "instruct", "base"):
        weight = normal((64, 96), 1) + normal((64, 96), len(role), scale=0.005)
        tensors = {"norm.weight": torch.ones(96).bfloat16(), **make("mlp.up_proj.weight", weight.bfloat16())}
        write_model(tmp_path / "q" / role, tensors, config={"quantization_config": settings})
    folders = {role: tmp_path / "q" / role for role in ("target", "instruct", "base")}
    report = ik.compare(folders["target"], (folders["instruct"], folders["base"]), dtype=dtype)
    t, x, y = (numbers(path)["mlp.up_proj.weight"].double() for path in folders.values())
    found = report.tensors["mlp.up_proj.weight"]
    assert found.elements == 64 * 96
    assert found.relative_drift == pytest.approx(float((t - y).norm() / y.norm()))
    assert found.relative_size == pytest.approx(float((x - y).norm() / y.norm()))
    assert (found.effective(report.alphas)[0] is None) == (dtype is None)
    assert json.loads(json.dumps(report.to_dict()))["kinds"]["norm"]["size"] == 0.0
    assert "drift" in f"{report}"


def test_rows_that_only_the_target_has_are_not_compared(
    tmp_path: Path, models: dict[str, dict[str, torch.Tensor]]
) -> None:
    embedding = models["target"]["model.embed_tokens.weight"]
    grown = models["target"] | {"model.embed_tokens.weight": torch.cat([embedding, embedding[:3]])}
    write_model(tmp_path / "grown", grown, config={"architectures": ["LlamaForCausalLM"]})
    pair = (tmp_path / "instruct", tmp_path / "base")
    grown_report, report = (ik.compare(tmp_path / name, pair) for name in ("grown", "target"))
    assert grown_report.tensors["model.embed_tokens.weight"] == report.tensors["model.embed_tokens.weight"]


def test_drift_beyond_what_was_measured_is_warned_of(
    tmp_path: Path, models: dict[str, dict[str, torch.Tensor]]
) -> None:
    pair = (tmp_path / "instruct", tmp_path / "base")
    assert not any("examples/continual" in text for text in ik.compare(tmp_path / "target", pair).warnings)
    far = {name: (t.float() + 0.3 * t.float().roll(1)).bfloat16() for name, t in models["base"].items()}
    write_model(tmp_path / "far", far)
    (said,) = [text for text in ik.compare(tmp_path / "far", pair).warnings if "examples/continual" in text]
    assert "0.3 of base's norm" in said
    assert "0.14 to 0.20" in said
    same = ik.compare(tmp_path / "base", pair)
    assert any("was it trained further" in text for text in same.warnings)
    assert same.total.relative_drift == 0.0
    assert same.total.cosine is None


def test_range_is_that_of_the_results() -> None:
    targets = ("ancestry: cpt", "ancestry: cpt-v1.1", "ancestry: cpt-registry")
    found = [
        json.loads(file.read_text())["rows"][row]["whole distance"]
        for file in RESULTS.glob("world-*.json")
        for row in targets
    ]
    assert (round(min(found), 2), round(max(found), 2)) == MEASURED


@pytest.mark.usefixtures("models")
def test_what_is_no_pair_is_refused(tmp_path: Path) -> None:
    ik.extract(tmp_path / "base", tmp_path / "instruct", tmp_path / "residual")
    with pytest.raises(ValueError, match="wanted a target and a pair"):
        ik.compare(tmp_path / "target", tmp_path / "residual")  # type: ignore[arg-type]


def test_places() -> None:
    assert place("lm_head.weight") == Place("", "lm_head")
    assert place("model.layers.3.mlp.experts.17.down_proj.weight") == Place("model.layers.3", "mlp.experts.*.down_proj")
    assert place("transformer.h.0.attn.c_attn.bias") == Place("transformer.h.0", "attn.c_attn.bias")
    assert place("0.linear.weight") == Place("0", "linear")
    assert (bar(1, 1), bar(0.5, 1), bar(None, 1)) == ("██████", "███", "")
