"""`ires compare`: one pass over three models, against sums of whole tensors in float64."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from quantized_models import FORMATS, numbers
from selection import tiles
from small_models import normal, write_model

import ires_kernels as ik
from ires_kernels.backends import fit_loops, native
from ires_kernels.backends.fit import Fit
from ires_kernels.cli import main
from ires_kernels.records.fit import ADAPTED, MEASURED, Place, bar, place

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
    with tiles(elements=100, in_pieces=100):  # several of most tensors, by several threads
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


@pytest.mark.usefixtures("models")
def test_what_is_found_depends_on_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads change nothing; tiles, and torch in place of the loops, no more than the order of the sums."""
    models_of = tmp_path / "target", (tmp_path / "instruct", tmp_path / "base")
    found = []
    for threads, sizes, backend in ((1, 96, ""), (3, 96, ""), (2, 1 << 22, ""), (2, 96, "reference")):
        monkeypatch.setenv("IRES_BACKEND", backend)
        with tiles(elements=sizes, in_pieces=sizes):
            found.append(ik.compare(*models_of, alpha=0.3, threads=threads, curve=True).tensors)
    assert found[0] == found[1]
    for other in found[2:]:
        for name, fit in found[0].items():
            assert (fit.elements, fit.both, fit.conflicts, fit.within) == (
                other[name].elements, other[name].both, other[name].conflicts, other[name].within,
            )  # fmt: skip
            for sums in ("base", "drift", "update", "exact", "moved"):
                assert getattr(fit, sums) == pytest.approx(getattr(other[name], sums), rel=1e-6, abs=1e-6 * fit.update)


@pytest.mark.usefixtures("models")
@pytest.mark.skipif(not native.isas(), reason="no loops but torch's")
def test_the_command_loads_no_torch(tmp_path: Path) -> None:
    command = f"""
import sys
from ires_kernels.cli import main
assert main(["compare", "{tmp_path}/target", "--instruct", "{tmp_path}/instruct", "--base", "{tmp_path}/base"]) == 0
assert not {{"torch", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "effective" in done.stdout


@pytest.mark.skipif(not native.isas(), reason="no loops that read files")
@pytest.mark.usefixtures("models")
def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by any other command: the error names the tensor and the file, and where that ends."""
    count = fit_loops.of_files
    (file,) = (tmp_path / "instruct").glob("*.safetensors")
    end = file.stat().st_size - 10

    def cut_off(*arguments: Any) -> Fit:
        os.truncate(file, end)
        return count(*arguments)

    monkeypatch.setattr(fit_loops, "of_files", cut_off)
    with pytest.raises(OSError, match=rf"ends at byte {end}: .*layers.9.mlp.down_proj.*{file.name}"):
        ik.compare(tmp_path / "target", (tmp_path / "instruct", tmp_path / "base"), threads=1)
    with file.open("rb") as opened:
        whole, broken = [(opened.fileno(), 0, 8)], [(opened.fileno(), 0, 4), (1 << 20, 0, 4)]
        with pytest.raises(fit_loops.Unread) as caught:
            count(4, "BF16", ["BF16"] * 3, [whole, whole, broken], (1.0,))
    assert (caught.value.operand, caught.value.run, caught.value.error) == (2, 1, errno.EBADF)


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
    assert f"{MEASURED[2][1]:.0%} of instruct's format came back at {MEASURED[2][0]:.2f}; adapters" in said
    farther = {name: (t.float() + 0.6 * t.float().roll(1)).bfloat16() for name, t in models["base"].items()}
    write_model(tmp_path / "farther", farther)
    found = ik.compare(tmp_path / "farther", pair)
    assert any("and nothing is known of what lies farther" in text for text in found.warnings)
    assert f"{ADAPTED[1]:.0%} at {ADAPTED[0]:.2f} where adapters" in " ".join(f"{found}".split())
    same = ik.compare(tmp_path / "base", pair)
    assert any("was it trained further" in text for text in same.warnings)
    assert same.total.relative_drift == 0.0
    assert same.total.cosine is None


def test_figures_are_those_of_the_results() -> None:
    """Of drift.py: means over seeds of drift, and of the format of instruct that a residual gave back."""
    seeds = [json.loads(file.read_text())["rows"] for file in sorted(RESULTS.glob("drift-world-*.json"))]
    assert len(seeds) >= 3

    def kept(way: str) -> tuple[float, float]:
        shares = [rows[f"{way}, alpha 1"]["format B"] / rows["instruct"]["format B"] for rows in seeds]
        return round(fmean(rows[way]["drift"] for rows in seeds), 2), round(fmean(shares), 2)

    assert tuple(kept(f"full, 150 steps at {rate}") for rate in ("0.0005", "0.001", "0.002")) == MEASURED
    assert kept("rank 8, 150 steps at 0.005") == ADAPTED


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
