"""Outputs in parts: several steps that make runs of one tensor, out of runs of others, give the bytes of one step."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from selection import tiles

from ires_kernels.checkpoints.checkpoint import Checkpoint, TensorRef
from ires_kernels.checkpoints.quantized import Ref
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.planning.rules import Rules
from ires_kernels.planning.steps import Op, Operand, Output, Step, by_output
from ires_kernels.streaming import stream
from ires_kernels.streaming.stream import Outcome

SHAPE = (31, 23)  # 713 elements
CUTS = [0, 1, 130, 131, 400, 713]
STOCHASTIC = Rules.of(rounding="stochastic", seed=5)


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with tiles(elements=64, copied=96):
        yield


@pytest.fixture
def sources(tmp_path: Path) -> Checkpoint:
    """Tensors `0` to `2`, and their elements again in reverse order of the parts, each behind some others."""
    tensors: dict[str, torch.Tensor] = {}
    for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
        whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).to(dtype)
        tensors[f"{i}"] = whole
        pieces = [whole.view(-1)[a:b] for a, b in pairwise(CUTS)]
        tensors[f"{i} in pieces"] = torch.cat([torch.cat([torch.ones(3, dtype=dtype), p]) for p in pieces[::-1]])
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return open_checkpoint(tmp_path / "model.safetensors")


def piece(sources: Checkpoint, ref: Ref, number: int) -> TensorRef:
    """Where the elements of a part are a second time."""
    behind = sum(3 + b - a for a, b in pairwise(CUTS[number + 1 :]))
    return sources.tensors[f"{ref.name} in pieces"].run(behind + 3, CUTS[number + 1] - CUTS[number])


def in_parts(step: Step, sources: Checkpoint) -> list[Step]:
    return [
        replace(
            step,
            operands=tuple(Operand(o.role, (piece(sources, o.refs[0], number),)) for o in step.operands),
            first=first,
            count=stop - first,
        )
        for number, (first, stop) in enumerate(pairwise(CUTS))
    ]


def whole_step(sources: Checkpoint, op: Op, count: int, dtype: str) -> Step:
    operands = tuple(Operand(f"role {i}", (sources.tensors[f"{i}"],)) for i in range(count))
    factors = (0.7,) * (1 if op == "add_difference" else count - 1 if op == "add" else 0)
    return Step(Output("out", dtype, SHAPE, "file", 8), op, operands, factors, 77)


def carried_out(steps: Sequence[Step], sources: Checkpoint, threads: int) -> tuple[bytes, Outcome]:
    """The output's bytes as they are written to a file, and what was learnt."""
    written = bytearray(8 + sum(step.nbytes for step in steps))

    def write(step: Step, start: int, data: memoryview, _: object) -> None:
        written[step.offset + start : step.offset + start + len(data)] = data

    outcome = stream.run(steps, sources.file_ids, STOCHASTIC, write, threads=threads)
    return bytes(written[8:]), outcome


CASES: list[tuple[Op, int, str]] = [
    ("add_difference", 3, "BF16"),
    ("add", 3, "F16"),
    ("subtract", 2, "BF16"),
    ("convert", 1, "F8_E4M3"),
    ("copy", 1, "BF16"),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("op", "count", "dtype"), CASES, ids=[op for op, *_ in CASES])
def test_parts_give_the_bytes_of_the_whole(sources: Checkpoint, op: Op, count: int, dtype: str, threads: int) -> None:
    step = whole_step(sources, op, count, dtype)
    parts = in_parts(step, sources)
    wanted, known = carried_out([step], sources, threads)
    found, learnt = carried_out(parts, sources, threads)
    assert found == wanted
    assert learnt.outputs == known.outputs == {"out": xxhash.xxh3_128_hexdigest(wanted)}
    assert learnt.bytes_read == known.bytes_read
    assert learnt.bytes_written == known.bytes_written
    assert list(learnt.tallies) == ([part.label for part in parts] if op != "copy" else [])
    assert sum(tally.lost for tally in learnt.tallies.values()) == sum(tally.lost for tally in known.tallies.values())
    assert Outcome.from_dict(learnt.of(parts).to_dict()).outputs == learnt.outputs


def test_parts_that_are_copied_among_parts_that_are_merged(sources: Checkpoint) -> None:
    merged = in_parts(whole_step(sources, "add_difference", 3, "BF16"), sources)
    copied = in_parts(whole_step(sources, "copy", 1, "BF16"), sources)
    mixed = [merged[0], copied[1], merged[2], copied[3], merged[4]]
    found, learnt = carried_out(mixed, sources, 2)
    ways = [carried_out(steps, sources, 2)[0] for steps in (merged, copied)]
    assert found == b"".join(ways[i % 2][2 * CUTS[i] : 2 * CUTS[i + 1]] for i in range(len(mixed)))
    assert learnt.outputs == {"out": xxhash.xxh3_128_hexdigest(found)}
    assert learnt.tallies.keys() == {"out[0:1]", "out[130:131]", "out[400:713]"}
    place = {"out": torch.empty(SHAPE, dtype=torch.bfloat16)}
    stream.fill(place, mixed, sources.file_ids, STOCHASTIC, hashed=())
    assert place["out"].view(torch.uint8).numpy().tobytes() == found


def test_hashes_are_of_the_runs_that_were_read(sources: Checkpoint) -> None:
    parts = in_parts(whole_step(sources, "subtract", 2, "BF16"), sources)
    _, learnt = carried_out(parts, sources, 2)
    whole = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).half().view(-1)
    assert learnt.inputs["role 1"] == {
        part.operands[1].key: xxhash.xxh3_128_hexdigest(whole[part.first : part.first + part.count].numpy())
        for part in parts
    }
    assert "1 in pieces[3:316]" not in learnt.inputs["role 1"], "which may be the name of a tensor"


def test_steps_of_an_output_make_all_of_it_in_order(sources: Checkpoint) -> None:
    step = whole_step(sources, "subtract", 2, "BF16")
    parts = in_parts(step, sources)
    assert by_output([step]) == {step.output: [step]}
    assert by_output(parts) == {step.output: parts}
    for wrong in (parts[1:], parts[:-1], [parts[1], parts[0], *parts[2:]], [*parts, parts[0]], [step, step]):
        with pytest.raises(ValueError, match=r"'out'.* (does not begin at element|and its steps make)"):
            by_output(wrong)
    with pytest.raises(ValueError, match=r"out\[0:5\] takes 5 elements of role 0, got 713 of '0'"):
        replace(step, first=0, count=5)
    with pytest.raises(ValueError, match="out is BF16, and no copy of '1': F16"):
        replace(step, op="copy", operands=step.operands[1:])


def test_runs_of_a_tensor() -> None:
    ref = TensorRef("t", "F4", (4, 3), Path("f"), 100, 6)
    assert ref.run(0, 12) is ref
    assert ref.run(2, 6) == TensorRef("t[2:8]", "F4", (6,), Path("f"), 101, 3, "t", 2)
    assert ref.run(2, 6).run(2, 2) == TensorRef("t[4:6]", "F4", (2,), Path("f"), 102, 1, "t", 4)
    assert (ref.tensor, ref.run(2, 6).tensor) == ("t", "t")
    for first, count in ((1, 2), (0, 1), (0, 13), (-2, 2), (4, 0)):
        with pytest.raises(ValueError, match=r"'t' has 12 F4 elements, and no run"):
            ref.run(first, count)


OUT_OF_ORDER = [(400, 713), (0, 1), (131, 400), (1, 131)]
"""Runs of a tensor, of which none follows the one before it."""
Runs = list[tuple[int, int]]


def shuffled(path: Path, op: Op, orders: Sequence[Runs], *, split: bool = False) -> tuple[Step, Step, Checkpoint]:
    """A step whose operands lie in runs that are out of order, in one file or two, and the same with whole tensors."""
    model: dict[str, dict[str, torch.Tensor]] = {"1": {}, "2": {}}
    for i, (order, dtype) in enumerate(zip(orders, (torch.bfloat16, torch.float16, torch.float32), strict=False)):
        whole = torch.randn(713, generator=torch.Generator().manual_seed(i)).to(dtype)
        model["1"][f"{i}"] = whole
        for file in model:
            model[file][f"{i} in {file}"] = torch.cat([whole[a:b] for a, b in order])
    for file, tensors in model.items():
        safetensors.torch.save_file(tensors, path / f"model-0000{file}-of-00002.safetensors")
    weight_map = {name: f"model-0000{file}-of-00002.safetensors" for file in model for name in model[file]}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sources = open_checkpoint(path)
    wholes, pieces = [], []
    for i, runs in enumerate(orders):
        wholes.append(Operand(f"role {i}", (sources.tensors[f"{i}"],)))
        places = list(accumulate((b - a for a, b in runs), initial=0))
        order = sorted(range(len(runs)), key=runs.__getitem__)
        files = ("1", "2" if split else "1")
        refs = [sources.tensors[f"{i} in {files[n % 2]}"].run(places[n], places[n + 1] - places[n]) for n in order]
        pieces.append(Operand(f"role {i}", tuple(refs)))
    factors = (0.7,) * (1 if op == "add_difference" else len(orders) - 1 if op == "add" else 0)
    output = Output("out", {"copy": "BF16", "convert": "F8_E4M3"}.get(op, "F16"), SHAPE, "file", 8)
    return Step(output, op, tuple(pieces), factors, 77), Step(output, op, tuple(wholes), factors, 77), sources


@st.composite
def any_order(draw: st.DrawFn) -> Runs:
    """All elements in runs, in any order."""
    places = sorted(draw(st.sets(st.integers(1, 712), max_size=12)))
    return draw(st.permutations(list(pairwise([0, *places, 713]))))


@settings(max_examples=30)
@given(st.lists(any_order(), min_size=3, max_size=3), st.booleans(), st.sampled_from([16, 64, 1024]))
def test_any_runs_give_the_bits_of_the_same_tensor_in_one(orders: list[Runs], split: bool, elements: int) -> None:
    """Random bits are those of the element in the output, wherever its operands lie."""
    with tempfile.TemporaryDirectory() as folder, tiles(elements=elements):
        runs, whole, sources = shuffled(Path(folder), "add_difference", orders, split=split)
        wanted, known = carried_out([whole], sources, 2)
        found, learnt = carried_out([runs], sources, 2)
    assert found == wanted
    assert learnt.outputs == known.outputs
    digests = [[*each.inputs[f"role {i}"].values()] for each in (learnt, known) for i in range(3)]
    assert digests[:3] == digests[3:]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("op", "count"), [(op, count) for op, count, _ in CASES], ids=[op for op, *_ in CASES])
def test_operands_in_runs_give_the_bytes_of_whole_ones(tmp_path: Path, op: Op, count: int, split: bool) -> None:
    """To a file and in memory, with tiles that begin anywhere in a run; and hashed as one."""
    runs, whole, sources = shuffled(tmp_path, op, [OUT_OF_ORDER] * count, split=split)
    wanted, known = carried_out([whole], sources, 2)
    found, learnt = carried_out([runs], sources, 2)
    assert found == wanted
    assert learnt.outputs == known.outputs
    assert learnt.tallies == known.tallies
    assert (learnt.bytes_read, learnt.bytes_written) == (known.bytes_read, known.bytes_written)
    for i in range(count):
        (digest,) = known.inputs[f"role {i}"].values()
        assert learnt.inputs[f"role {i}"] == {runs.operands[i].key: digest}
    assert stream.hashes({"x": runs.operands[0]}, sources.file_ids) == {"x": known.inputs["role 0"]["0"]}
    place = {"out": torch.empty(SHAPE, dtype={"copy": torch.bfloat16}.get(op, torch.float16))}
    if op != "convert":
        stream.fill(place, [runs], sources.file_ids, STOCHASTIC, hashed=())
        assert place["out"].view(torch.uint8).numpy().tobytes() == found


def test_what_an_operand_is(sources: Checkpoint) -> None:
    ref = sources.tensors["0"]
    whole, run = Operand("r", (ref,)), Operand("r", (ref.run(0, 23),))
    rows = Operand("r", tuple(ref.run(23 * row, 23) for row in reversed(range(31))))
    two = Operand("r", (ref, sources.tensors["0 in pieces"]))
    assert (whole.key, whole.text, whole.is_whole) == ("0", "0", True)
    assert (run.text, rows.text, two.text) == ("0[0:23]", "31 runs of 0", "0, 0 in pieces")
    assert [rows.count, rows.nbytes, rows.paths, rows.dtype] == [713, 1426, (ref.path,), "BF16"]
    assert len({whole.key, run.key, rows.key, two.key}) == 4
    named_so = Operand("r", (replace(ref, name="0[0:23]", shape=(23,)),))
    assert named_so.key == named_so.text == run.text != run.key
    with pytest.raises(UnicodeEncodeError):  # so it is in no header
        run.key.encode()
    with pytest.raises(ValueError, match="the operand r is made of BF16 '0', F16 '1', wanted runs of one dtype"):
        Operand("r", (ref, sources.tensors["1"]))
    with pytest.raises(ValueError, match="made of nothing"):
        Operand("r", ())


def test_a_file_that_ends_in_the_middle_of_runs(tmp_path: Path) -> None:
    runs, _, sources = shuffled(tmp_path, "subtract", [OUT_OF_ORDER] * 2)
    path = runs.operands[1].paths[0]
    last = max(ref.offset + ref.nbytes for op in runs.operands for ref in op.refs if isinstance(ref, TensorRef))
    preadv = os.preadv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", lambda fd, views, offset: min(preadv(fd, views, offset), max(0, last - 7 - offset)))
        with pytest.raises(OSError, match=rf"the file ends at byte {last - 7}: it shrank .*{path.name}"):
            carried_out([runs], sources, 1)
