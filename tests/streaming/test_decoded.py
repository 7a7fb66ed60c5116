"""Operands that are made of codes: the numbers of any run of them, and a digest that does not depend on tiles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash
from quantized_models import DECODED, FORMATS, gpt_oss, numbers
from small_models import normal, write_model

import ires_kernels as ik
from ires_kernels.backends import decoding, native
from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.checkpoints.schemes import quantized
from ires_kernels.checkpoints.sources import LocalFile
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.planning.steps import Operand
from ires_kernels.streaming import stream
from ires_kernels.streaming.pieces import reader, take

SHAPE = (24, 96)


def model(folder: Path, format: str) -> Checkpoint:
    """Two weights of a format, fused experts of gpt-oss for mxfp4-transposed, and one of float32."""
    stored = {"plain": normal((7, 5), 3, torch.float32)}
    if format == "mxfp4-transposed":
        for i, name in enumerate(("a.experts.up_proj", "b.experts.up_proj")):
            stored |= gpt_oss(name, normal((3, 64, 32), i, torch.float32))
        settings: dict[str, object] = {"quant_method": "mxfp4"}
    else:
        make, settings = FORMATS[format]
        for i, name in enumerate(("a.weight", "b.weight")):
            stored |= make(name, normal(SHAPE, i))
    return open_checkpoint(write_model(folder, stored, config={"quantization_config": settings}))


def read(operand: Operand, tile: int, *, codes: bool = False) -> tuple[torch.Tensor, str]:
    """All numbers of an operand, read so many at a time, and the digest of what its reader says that it has read.

    With `codes` they are decoded here where they come as codes.
    """
    sources = {path: LocalFile(path) for path in operand.paths}
    try:
        each, hasher, out = reader(operand, sources, 4), xxhash.xxh3_128(), torch.empty(operand.count)
        for first in range(0, operand.count, tile):
            count = min(tile, operand.count - first)
            buffer = memoryview(bytearray(4 * tile))
            (seen,), coded = take([each], [buffer], first, count, codes=codes)
            for view in seen:
                hasher.update(view)
            if coded:
                decoding.decode(*coded[0][:3], count, coded[0].parts, out[first : first + count])
            else:
                out[first : first + count] = torch.frombuffer(buffer, dtype=torch.float32, count=count)
        assert each.reads(0, 1) is None
        return out, hasher.hexdigest()
    finally:
        for source in sources.values():
            source.close()


@pytest.mark.parametrize("format", ["fp8-block", "fp8-tensor", *DECODED, "mxfp4-transposed"])
def test_any_runs_of_weights_in_any_tiles(tmp_path: Path, format: str) -> None:
    checkpoint = model(tmp_path / "model", format)
    weights, wanted = quantized(checkpoint).weights, numbers(tmp_path / "model")
    a, b = weights.values()
    plain = checkpoint.tensors["plain"]
    flat = {name: tensor.reshape(-1) for name, tensor in wanted.items()}
    cases: list[tuple[tuple[Ref, ...], torch.Tensor]] = [
        ((a,), flat[a.name]),
        ((a.run(100, 700),), flat[a.name][100:800]),
        ((b, a), torch.cat([flat[b.name], flat[a.name]])),
        (
            (a.run(33, 64), plain, b.run(0, 1), b.run(1000, 300), a.run(0, 2)),
            torch.cat(
                [flat[a.name][33:97], flat["plain"], flat[b.name][:1], flat[b.name][1000:1300], flat[a.name][:2]]
            ),
        ),
    ]
    for refs, numbers_of in cases:
        operand = Operand("role", refs)
        sizes = (operand.count, 64, 37, 1000, 1)
        found = {(tile, codes): read(operand, tile, codes=codes) for tile in sizes for codes in (False, True)}
        for values, _ in found.values():
            assert torch.equal(values.view(torch.int32), numbers_of.view(torch.int32))
        digests = {digest for _, digest in found.values()}
        assert digests == {*stream.hashes({"it": operand}, checkpoint.file_ids).values()}
    assert len({Operand("role", refs).key for refs, _ in cases}) == len(cases)


@pytest.mark.skipif(not native.status().available, reason="the extension is not there")
@pytest.mark.parametrize("format", ["fp8-block", "pack-quantized"])
def test_merges_decode_on_the_way(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decoded into the memory of a tile, which is larger than caches are."""
    make, settings = FORMATS[format]
    names = {"a.weight": 1, "b.weight": 2}
    config = {"quantization_config": settings}
    for role, seed in (("instruct", 0), ("base", 10)):
        stored = {k: v for name, i in names.items() for k, v in make(name, normal(SHAPE, i + seed)).items()}
        write_model(tmp_path / role, stored, config=config)
    write_model(tmp_path / "target", {name: normal(SHAPE, i + 20) for name, i in names.items()})
    i, b, t = (numbers(tmp_path / role) for role in ("instruct", "base", "target"))
    monkeypatch.setattr(native, "decode", None)
    ik.apply(tmp_path / "target", (tmp_path / "instruct", tmp_path / "base"), out=tmp_path / "out")
    monkeypatch.undo()
    for name, value in numbers(tmp_path / "out").items():
        assert torch.equal(value, (t[name].float() + (i[name] - b[name])).to(value.dtype)), name


def test_the_digest_covers_all_that_is_stored_of_a_weight(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "model", "pack-quantized")
    (ref, _) = quantized(checkpoint).weights.values()
    operand = Operand("role", (ref,))
    before = stream.hashes({"it": operand}, checkpoint.file_ids)
    for part, tensor in ref.parts:
        data = bytearray(tensor.path.read_bytes())
        data[tensor.offset + tensor.nbytes - 1] ^= 1
        tensor.path.write_bytes(data)
        changed = open_checkpoint(tmp_path / "model")
        assert stream.hashes({"it": operand}, changed.file_ids) != before, part
        data[tensor.offset + tensor.nbytes - 1] ^= 1
        tensor.path.write_bytes(data)
    assert isinstance(ref.codes, TensorRef)


@pytest.mark.parametrize("format", [*FORMATS, "mxfp4-transposed"])
def test_what_runs_of_a_weight_share_is_read_once(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the columns of a matrix are a run for each row."""
    checkpoint = model(tmp_path / "model", format)
    weight = next(iter(quantized(checkpoint).weights.values()))
    width, rows = weight.full[-1], weight.numel // weight.full[-1]
    runs: tuple[Ref, ...] = tuple(weight.run(row * width + width // 3, width // 3) for row in range(rows))
    reads: list[tuple[int, int]] = []
    read_into = LocalFile.read_into

    def counted(self: LocalFile, view: memoryview, offset: int) -> None:
        reads.append((offset, len(view)))
        read_into(self, view, offset)

    monkeypatch.setattr(LocalFile, "read_into", counted)
    found, _ = read(Operand("instruct", runs), rows * (width // 3))
    wanted = numbers(tmp_path / "model")[weight.name].reshape(rows, width)[:, width // 3 :][:, : width // 3]
    assert torch.equal(found.view(rows, -1), wanted)
    for _, part in weight.parts[1:]:
        assert sum(offset == part.offset for offset, _ in reads) == 1
    if format == "mxfp4-transposed":  # the codes of a matrix as a whole
        assert len(reads) == len(weight.parts) - 1 + weight.full[0]
