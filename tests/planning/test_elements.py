"""The numbers of a few elements, without torch, are those that torch gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import assert_same
from safetensors.torch import save_file
from small_models import normal, write_model

import ires_kernels as ik
from ires_kernels.backends import definition
from ires_kernels.checkpoints.quantized import QuantizedRef
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.dtypes import FLOATS, NUMBERS
from ires_kernels.formats import Format, matrices, row_bytes
from ires_kernels.planning.elements import is_known, numbers
from ires_kernels.planning.evidence import Looks, places
from ires_kernels.planning.plan import Plan


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F16", "BF16"])
def test_all_codes_are_read_as_torch_reads_them(dtype: str) -> None:
    width = FLOATS[dtype]
    codes = torch.arange(256**width, dtype=torch.int32).to(torch.uint8 if width == 1 else torch.uint16)
    wanted = codes.view(getattr(torch, NUMBERS[dtype].torch)).double()
    got = torch.tensor(numbers(dtype, codes.numpy().tobytes()), dtype=torch.float64)
    assert torch.equal(got.nan_to_num(nan=12345.0), wanted.nan_to_num(nan=12345.0))
    assert torch.equal(got.signbit()[~got.isnan()], wanted.signbit()[~got.isnan()])


SCALES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E8M0": 1, "F8_E4M3": 1}


def form(name: str, rows: int, columns: int, scale: str, **others: int | str) -> Format:
    return Format(name, (("rows", rows), ("columns", columns), ("scale", scale), *others.items()))


KNOWN = [
    *((form("fp8-block", 128, 128, scale), (3, 130, 256)) for scale in ("F32", "F16", "BF16", "F8_E8M0")),
    (form("fp8-tensor", 150, 77, "F32"), (3, 50, 77)),
    (form("fp8-channel", 1, 77, "BF16"), (150, 77)),
    (form("mxfp8", 1, 32, "F8_E8M0"), (2, 40, 96)),
    (form("int8-channel", 1, 77, "F32"), (150, 77)),
    (form("int8-channel", 1, 77, "BF16", zero_point="I8"), (150, 77)),
    (form("int8-block", 16, 32, "F16", zero_point="I8"), (150, 77)),
    *((form("pack-quantized", 1, 32, "BF16", bits=bits), (130, 253)) for bits in (2, 4, 8)),
    (form("pack-quantized", 1, 32, "F32", bits=4, zero_point="I8"), (130, 253)),
    *((form("mxfp4", 1, 32, "F8_E8M0", lift=lift), (3, 50, 160)) for lift in (0, 2)),
    *((form("nvfp4", 1, 16, "F8_E4M3", **{"global": how}), (3, 50, 160)) for how in ("divide", "multiply")),
]


def stored(folder: Path, format: Format, full: tuple[int, ...]) -> QuantizedRef:
    """A weight of any codes and any scales."""
    many, height, width = matrices(full)
    rows, columns = format.number("rows"), format.number("columns")
    if rows >= many * height:
        many, height = 1, many * height
    blocks = many * -(-height // rows) * -(-width // columns)
    generator = torch.Generator().manual_seed(1)

    def anything(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)

    parts = {"codes": anything(many * height * row_bytes(format, full))}
    parts["scale"] = anything(blocks * SCALES[format.word("scale")])
    if format.word("zero_point"):
        parts["zero_point"] = anything(blocks)
    if format.word("global"):
        parts["global"] = torch.linspace(0.3, 3000, full[0])
    folder.mkdir()
    save_file(parts, folder / "model.safetensors")
    refs = open_checkpoint(folder).tensors
    return QuantizedRef("w", full, format, tuple((part, refs[part]) for part in parts), full)


@pytest.mark.parametrize(("format", "full"), KNOWN, ids=lambda each: f"{each}".replace(" ", ""))
def test_samples_of_quantized_weights_are_their_numbers(tmp_path: Path, format: Format, full: tuple[int, ...]) -> None:
    ref = stored(tmp_path / "m", format, full)
    assert is_known(ref)
    raw = {part: (each.path.read_bytes()[each.offset :][: each.nbytes]) for part, each in ref.parts}
    wanted = torch.empty(full).flatten()
    definition.define(
        format, full, 0, len(wanted), {part: memoryview(bytearray(each)) for part, each in raw.items()}, wanted
    )
    checkpoint = open_checkpoint(tmp_path / "m")
    odd = ((0, 3), (full[-1] - 1, 2), (len(wanted) - 5, 5), (full[-1] * 33 + 1, 3 * full[-1]))
    with Looks({"base": checkpoint}) as looks:
        for of, runs in ((ref, places(full)), (ref, odd), (ref.run(1, 1000), ((2, 5), (300, 400)))):
            sample = looks.at("base", of, runs)
            assert sample is not None
            assert sample.dtype == "F32"
            flat = wanted[of.first :]
            assert_same(
                torch.tensor(sample.values),
                torch.cat([flat[first : first + count] for first, count in runs]),
                f"{format}",
            )


@pytest.mark.parametrize(
    "format", [form("gptq", 1, 32, "F16", bits=4), form("pack-quantized", 1, 32, "F16", bits=4, zero_point="packed")]
)
def test_of_other_formats_nothing_is_known(tmp_path: Path, format: Format) -> None:
    ref = stored(tmp_path / "m", form("int8-channel", 1, 77, "BF16", zero_point="I8"), (150, 77))
    other = QuantizedRef("w", (150, 77), format, ref.parts, (150, 77))
    with Looks({"base": open_checkpoint(tmp_path / "m")}) as looks:
        assert looks.of("base", other) is None


def fp8(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A model with blocks of scales."""
    tensors = {}
    for name, t in weights.items():
        blocks = t.float().view(t.shape[0] // 128, 128, t.shape[1] // 128, 128)
        scale = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).view(t.shape).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return write_model(folder, tensors, config={"quantization_config": settings})


def test_quantized_models_have_relatives_and_strangers(tmp_path: Path) -> None:
    w = {
        f"model.layers.{i}.{name}.weight": normal((256, 384), 10 * i + j) for i in (0, 1) for j, name in enumerate("qk")
    }
    turned = {name: t.roll(128, 0) if name.endswith("q.weight") else t for name, t in w.items()}
    base = fp8(tmp_path / "base", w)
    paths = {
        "is": fp8(tmp_path / "same", w),
        "descends": write_model(tmp_path / "plain", w),
        "odd": fp8(tmp_path / "turned", turned),
        "stranger": write_model(
            tmp_path / "strange", {n: normal(t.shape, 99 + i) for i, (n, t) in enumerate(w.items())}
        ),
    }
    for relation, path in paths.items():
        plan = ik.extract(base, path, tmp_path / "none", dry_run=True, trust_names=True)
        assert isinstance(plan, Plan)
        (found,) = plan.to_dict()["ancestry"]
        assert found["relation"] == ("descends" if relation == "odd" else relation)
        assert (found["matrices"], len(found["odd"])) == (4, 2 if relation == "odd" else 0)
    ik.extract(base, paths["descends"], tmp_path / "residual", sync=False)
    for relation in ("is", "descends", "stranger"):
        plan = ik.apply(paths[relation], tmp_path / "residual", out=tmp_path / "none", dtype="bf16", dry_run=True)
        (found,) = plan.to_dict()["ancestry"]
        assert found["relation"] == relation
