"""Merges of fp8 models against how they are done by hand: decode all of them to bfloat16 on the disk, merge, encode.

By hand is torch and safetensors, file by file, as the scripts do it that come with such models: every weight is decoded
as a whole, and written. The models are those of `synthetic`, in blocks of 128 × 128 with scales in float32.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ires_kernels as ik
from ires_kernels.bench import merges
from ires_kernels.bench.kernels import VerificationError
from ires_kernels.bench.measure import Ways, interleave
from ires_kernels.bench.result import Goal, Result
from ires_kernels.bench.synthetic import Triple

BLOCK = 128
SCALE = "_scale_inv"
ONE_PASS, BY_HAND = "one pass", "by hand"
BARE, RING = merges.BARE, merges.RING
TO_BF16, BY_HAND_TO_BF16 = "one pass, onto bf16", "by hand, onto bf16"
GOALS = (Goal(ONE_PASS, BY_HAND, 0.1), Goal(TO_BF16, BY_HAND_TO_BF16, 0.1))

_SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def expanded(scale: Tensor, weight: Tensor) -> Tensor:
    """A scale for each element."""
    rows, columns = weight.shape
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def encoded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales, by the rule of those who publish such models."""
    w = weight.float()
    down, across = (-(-side // BLOCK) for side in w.shape)
    padded = torch.zeros(down * BLOCK, across * BLOCK)
    padded[: w.shape[0], : w.shape[1]] = w
    scale = padded.view(down, BLOCK, across, BLOCK).abs().amax((1, 3)).clamp(min=1e-12) / 448
    return (w / expanded(scale, w)).to(torch.float8_e4m3fn), scale


def is_quantized(name: str) -> bool:
    """Whether such models have it in fp8: all matrices but the embedding and the head."""
    return name.endswith("proj.weight")


def encode(source: Path, out: Path) -> None:
    """Write a model of bfloat16 as one of fp8."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            if is_quantized(name):
                found[name], found[f"{name}{SCALE}"] = encoded(tensor)
            else:
                found[name] = tensor
        return found

    _rewrite(source, out, change, _SETTINGS)


def decode(source: Path, out: Path) -> None:
    """Write a model of fp8 as one of bfloat16."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: (tensor.float() * expanded(tensors[f"{name}{SCALE}"], tensor)).bfloat16()
            if f"{name}{SCALE}" in tensors
            else tensor
            for name, tensor in tensors.items()
            if not name.endswith(SCALE)
        }

    _rewrite(source, out, change, None)


def add(target: Path, instruct: Path, base: Path, out: Path) -> None:
    """Merge models of bfloat16."""

    out.mkdir()
    for file in sorted(target.glob("*.safetensors")):
        t, i, b = (load_file(model / file.name) for model in (target, instruct, base))
        found = {name: (t[name].float() + (i[name].float() - b[name].float())).to(t[name].dtype) for name in t}
        save_file(found, out / file.name, metadata={"format": "pt"})
    shutil.copy(target / "config.json", out)


def by_hand(target: Path, instruct: Path, base: Path, folder: Path, out: Path, *, to_fp8: bool) -> None:
    """The steps one after the other, each into a folder of its own below `folder`."""
    steps = [folder / f"step{number}" for number in range(4)]
    plain = []
    for source, place in zip((target, instruct, base), steps, strict=False):
        if "quantization_config" in (source / "config.json").read_text():
            decode(source, place)
            plain.append(place)
        else:
            plain.append(source)
    t, i, b = plain
    add(t, i, b, steps[3] if to_fp8 else out)
    if to_fp8:
        encode(steps[3], out)
    for place in steps:
        shutil.rmtree(place, ignore_errors=True)


def verify(target: Path, instruct: Path, base: Path, out: Path, threads: int | None = None) -> int:
    """Merge fp8 models onto one of bfloat16, and compare all with torch; returns how many elements.

    Raises VerificationError.
    """
    ik.apply(target, (instruct, base), out=out, sync=False, threads=threads)
    compared = 0
    for file in sorted(target.glob("*.safetensors")):
        t, i, b, found = (load_file(model / file.name) for model in (target, instruct, base, out))
        for name in filter(is_quantized, t):
            one, two = (x[name].float() * expanded(x[f"{name}{SCALE}"], x[name]) for x in (i, b))
            if not torch.equal(found[name], (t[name].float() + (one - two)).bfloat16()):
                raise VerificationError(f"{out / file.name}: {name!r} is not what torch gives. Nothing was timed.")
            compared += found[name].numel()
    shutil.rmtree(out)
    return compared


def measure(triple: Triple, folder: Path, rounds: int, *, threads: int | None = None) -> Result:
    """Time both ways below `folder`: three models of fp8 into one of fp8, and two onto one of bfloat16.

    And in place, where scales are found in a pass of their own: the same copy of the target again and again.
    """
    quantized = {role: folder / f"fp8-{role}" for role in ("target", "instruct", "base")}
    for role, path in quantized.items():
        encode(getattr(triple, role), path)
    target, instruct, base = quantized.values()
    out, changed = folder / "out", folder / "changed"
    shutil.copytree(target, changed)
    fp8 = triple._replace(target=target, instruct=instruct, base=base)
    compared = verify(triple.target, instruct, base, out, threads)

    def ours(target: Path) -> Callable[[], object]:
        return lambda: ik.apply(target, (instruct, base), out=out, sync=False, threads=threads)

    def theirs(target: Path, to_fp8: bool) -> Callable[[], object]:
        return lambda: by_hand(target, instruct, base, folder, out, to_fp8=to_fp8)

    ways: Ways = {
        ONE_PASS: ours(target),
        BARE: lambda: merges.in_place(changed, fp8, threads),
        RING: lambda: merges.in_place(changed, fp8, threads, undo="ring"),
        BY_HAND: theirs(target, True),
        TO_BF16: ours(triple.target),
        BY_HAND_TO_BF16: theirs(triple.target, False),
    }
    times = interleave(ways, rounds, before=lambda _: os.sync(), after=lambda _: shutil.rmtree(out, ignore_errors=True))
    small, large = (sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (base, triple.base))
    return Result(
        triple.models,
        {**triple.facts(), "fp8_bytes": small, "threads": threads, "compared": compared},
        times,
        {**dict.fromkeys((ONE_PASS, BARE, RING), 4 * small), TO_BF16: 2 * small + 2 * large},
        by="time",
        yardsticks=(ONE_PASS, BY_HAND, BY_HAND_TO_BF16),
        goals=GOALS,
    )


def _rewrite(
    source: Path,
    out: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    settings: Mapping[str, object] | None,
) -> None:
    """Write all files of a model anew, and its settings with or without a quantization block."""
    out.mkdir()
    places: dict[str, str] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors = change(load_file(file))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / file.name, {"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    config |= {"quantization_config": settings} if settings else {}
    (out / "config.json").write_text(json.dumps(config))
    if len(set(places.values())) > 1:
        index = {"metadata": {}, "weight_map": places}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
