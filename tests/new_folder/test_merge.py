"""Whole merges: the bits, whatever the windows and threads; what is recorded and reported; what stops them, and how."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import current_thread
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from selection import tiles
from small_models import Tensors, normal, read_model, snapshot, tensors, triple, write_model
from torch import Tensor

import ires_kernels as ik
from ires_kernels.checkpoints import sources
from ires_kernels.checkpoints.header import CheckpointError, build_header
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.files import unfinished
from ires_kernels.files.new_folder import NewFolder
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.unfinished import MARKER
from ires_kernels.planning.rules import ArgumentError
from ires_kernels.records import provenance
from ires_kernels.records.report import Report
from ires_kernels.streaming import cpu
from ires_kernels.tensors import ops

STORAGE = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def bits(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert (found[name].dtype, found[name].shape) == (t.dtype, t.shape), name
        assert bits(found[name]) == bits(t), name


def merge(*args: Any, **options: Any) -> Report:
    report = ik.apply(*args, **{"sync": False, **options})
    assert isinstance(report, Report)
    return report


@pytest.fixture
def small_tiles() -> Iterator[None]:
    """Tiles of 64 elements, so that small tensors have many."""
    with tiles(elements=64, copied=96):
        yield


# --- the bits


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_two_steps_are_one_and_both_are_the_operation_on_whole_tensors(tmp_path: Path, rounding: str) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    options: dict[str, Any] = {"alpha": 0.7, "rounding": rounding, "seed": 5}
    merge(target, (instruct, base), out=tmp_path / "one", **options)
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    merge(target, tmp_path / "residual", out=tmp_path / "two", **options)
    t, i, b = map(read_model, (target, instruct, base))
    wanted = {
        name: ik.add_difference(
            t[name], i[name], b[name], 0.7, rounding=rounding, seed=5, stream=xxhash.xxh3_64_intdigest(name.encode())
        )
        for name in t
    }
    assert_same(read_model(tmp_path / "one"), wanted)
    assert_same(read_model(tmp_path / "two"), wanted)
    assert_same(read_model(tmp_path / "residual"), {name: ik.subtract(i[name], b[name]) for name in t})


def test_base_plus_residual_is_instruct(tmp_path: Path) -> None:
    base, instruct, _ = triple(tmp_path)
    report = merge(base, (instruct, base), out=tmp_path / "out")
    assert_same(read_model(tmp_path / "out"), read_model(instruct))
    assert report.strengths[0].effective_alpha == pytest.approx(1, abs=1e-12)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_result_depends_neither_on_windows_nor_on_threads(tmp_path: Path, threads: int) -> None:
    """Sizes around the window's, several dtypes in each operand, and copies of every kind."""
    models: list[Tensors] = [{}, {}, {}]
    for number, size in enumerate([0, 1, 63, 64, 65, 128, 333]):
        for role, model in enumerate(models):
            dtype = STORAGE[(number + role) % len(STORAGE)]
            model[f"t{number}"] = normal((size,), 10 * number + role, torch.float64, 1.0).to(dtype)
    for model in models:
        model["scalar"] = normal((), 77, torch.float32)
        model["kept.f8"] = normal((2, 50), 78, torch.float32, 1.0).to(torch.float8_e5m2)
        model["kept.ids"] = torch.arange(100)
        model["kept.empty"] = torch.zeros(0, 3, dtype=torch.int32)
        model["kept.mask"] = torch.ones(97, dtype=torch.bool)
    paths = [write_model(tmp_path / name, model) for name, model in zip(("t", "i", "b"), models, strict=True)]
    rules: dict[str, Any] = {"alpha": 0.3, "rounding": "stochastic", "seed": 2**64 - 1, "skip": "f8"}
    report = merge(paths[0], (paths[1], paths[2]), out=tmp_path / "out", threads=threads, **rules)
    wanted = {
        name: ik.add_difference(
            t, models[1][name], models[2][name], 0.3, rounding="stochastic", seed=2**64 - 1,
            stream=xxhash.xxh3_64_intdigest(name.encode()),
        ) if not name.startswith("kept") else t
        for name, t in models[0].items()
    }  # fmt: skip
    assert_same(read_model(tmp_path / "out"), wanted)
    entries = json.loads((tmp_path / "out" / "ires.json").read_text())["tensors"]
    for name, t in wanted.items():
        assert entries[name]["xxh3_128"] == xxhash.xxh3_128_hexdigest(bits(t)), name
        roles = ("target",) if name.startswith("kept") else ("target", "instruct", "base")
        assert entries[name]["inputs"] == {
            role: xxhash.xxh3_128_hexdigest(bits(model[name])) for role, model in zip(roles, models, strict=False)
        }
    assert report.counts.elements == sum(t.numel() for name, t in wanted.items() if not name.startswith("kept"))


@pytest.mark.usefixtures("small_tiles")
def test_several_residuals_in_order_and_rounded_once(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    paths = []
    for name, dtype, pair in (
        ("r1", "f32", (base, instruct)),
        ("r2", "bf16", (instruct, target)),
        ("r3", "f64", (base, target)),
    ):
        ik.extract(*pair, tmp_path / name, dtype=dtype, sync=False)
        paths.append(tmp_path / name)
    alphas = [0.7, -0.2, 1.5]
    report = merge(target, paths, out=tmp_path / "out", alpha=alphas, alphas=[("mlp", [0.5] * 3), ("norm", (0, 0, 1))])
    t, residuals = read_model(target), [read_model(path) for path in paths]

    def factors(name: str) -> list[float]:
        return [0.5] * 3 if "mlp" in name else [0, 0, 1] if "norm" in name else alphas

    assert_same(
        read_model(tmp_path / "out"), {name: ik.add(t[name], [r[name] for r in residuals], factors(name)) for name in t}
    )
    assert {strength.factors for strength in report.strengths} == {(0.5, 0.5, 0.5), (0, 0, 1), (0.7, -0.2, 1.5)}
    assert all(strength.effective_alpha is None for strength in report.strengths)
    assert all(abs((strength.realised or 0) - 1) < 0.2 for strength in report.strengths)


@pytest.mark.parametrize(("dtype", "wanted"), [("f32", torch.float32), ("f64", torch.float64), ("f16", torch.float16)])
def test_another_dtype_for_the_output(tmp_path: Path, dtype: str, wanted: torch.dtype) -> None:
    base, instruct, target = triple(tmp_path)
    merge(target, (instruct, base), out=tmp_path / "out", alpha=0.3, dtype=dtype, skip="lm_head")
    t, i, b = map(read_model, (target, instruct, base))
    expected = {name: ik.add_difference(t[name], i[name], b[name], 0.3, dtype=wanted) for name in t}
    expected["lm_head.weight"] = t["lm_head.weight"].to(wanted)
    assert_same(read_model(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == str(wanted).removeprefix("torch.")


def test_data_at_odd_offsets(tmp_path: Path) -> None:
    """Some writers do not pad the header, and a boolean before it shifts every tensor by a byte."""
    models = []
    for role, seed in (("target", 3), ("instruct", 2), ("base", 1)):
        model = {"flag": torch.tensor([True]), **tensors(seed)}
        header = build_header([(n, "BOOL" if n == "flag" else "BF16", tuple(t.shape)) for n, t in model.items()], {})
        text = header[8:].rstrip() + b" " * (seed * 2 + 1 - len(header[8:].rstrip()) % 2)
        (tmp_path / role).mkdir()
        data = b"".join(map(bits, model.values()))
        (tmp_path / role / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        models.append(model)
    assert {ref.offset % 2 for ref in open_checkpoint(tmp_path / "target").tensors.values() if ref.dtype == "BF16"} <= {
        0,
        1,
    }
    merge(tmp_path / "target", (tmp_path / "instruct", tmp_path / "base"), out=tmp_path / "out", alpha=0.3)
    t, i, b = models
    wanted = {name: ik.add_difference(t[name], i[name], b[name], 0.3) for name in t if name != "flag"}
    assert_same(read_model(tmp_path / "out"), {"flag": t["flag"], **wanted})


def test_tied_embeddings_give_the_head_its_update(tmp_path: Path) -> None:
    t, i, b = tensors(3), tensors(2), tensors(1)
    for model in (i, b):
        del model["lm_head.weight"]
    paths = [write_model(tmp_path / name, model) for name, model in (("t", t), ("i", i), ("b", b))]
    merge(paths[0], (paths[1], paths[2]), out=tmp_path / "out")
    embedding = "model.embed_tokens.weight"
    out = read_model(tmp_path / "out")
    assert bits(out["lm_head.weight"]) == bits(ik.add_difference(t["lm_head.weight"], i[embedding], b[embedding]))
    ik.extract(paths[2], paths[1], tmp_path / "residual", sync=False)
    merge(paths[0], tmp_path / "residual", out=tmp_path / "out2")
    assert_same(read_model(tmp_path / "out2"), out)


@pytest.mark.parametrize("same", ["base", "instruct"])
def test_the_target_may_be_one_of_the_pair(tmp_path: Path, same: str) -> None:
    base, instruct, _ = triple(tmp_path)
    target = tmp_path / same
    merge(target, (instruct, base), out=tmp_path / "out", alpha=0.5)
    t, i, b = map(read_model, (target, instruct, base))
    assert_same(read_model(tmp_path / "out"), {n: ik.add_difference(t[n], i[n], b[n], 0.5) for n in t})


def test_single_files_and_names_of_their_own(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    (target / "model.safetensors").rename(target / "adapter.safetensors")
    merge(target / "adapter.safetensors", (instruct / "model.safetensors", base), out=tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter.safetensors", "ires.json"]


def test_a_folder_of_symbolic_links_on_the_users_word(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    snapshot_folder = tmp_path / "snapshot"
    snapshot_folder.mkdir()
    for path in target.iterdir():
        (snapshot_folder / path.name).symlink_to(path)
    merge(snapshot_folder, (instruct, base), out=tmp_path / "a", follow_links=True)
    merge(target, (instruct, base), out=tmp_path / "b")
    assert_same(read_model(tmp_path / "a"), read_model(tmp_path / "b"))
    assert not any(path.is_symlink() for path in (tmp_path / "a").iterdir())


# --- what is recorded and reported


def test_the_manifest(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, shards=2, files={"tokenizer.json": "{}", "README.md": "r"})
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    report = merge(target, tmp_path / "residual", out=tmp_path / "out", alpha=0.7, skip="norm")
    table = json.loads((tmp_path / "out" / "ires.json").read_text())
    out = read_model(tmp_path / "out")
    assert (table["ires"], table["operation"], table["id"]) == (ik.__version__, "apply", report.id)
    assert list(table["tensors"]) == list(open_checkpoint(tmp_path / "out").tensors)
    lines = sorted(f"{n} BF16 {list(t.shape)} {xxhash.xxh3_128_hexdigest(bits(t))}\n" for n, t in out.items())
    assert table["digest"] == xxhash.xxh3_128_hexdigest("".join(lines).encode())
    assert table["tensors"]["model.norm.weight"]["copied"] == "skipped by 'norm'"
    residual = json.loads((tmp_path / "residual" / "residual.json").read_text())
    assert table["inputs"]["target"]["path"] == str(target)
    for path in sorted(target.glob("*.safetensors")):
        status, stamp = path.stat(), table["inputs"]["target"]["files"][path.name]
        assert (stamp["size"], stamp["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
        assert (stamp["dev"], stamp["ino"], stamp["ctime_ns"]) == (status.st_dev, status.st_ino, status.st_ctime_ns)
    assert table["inputs"]["residual"]["digest"] is None, "skipped tensors were not read"
    merge(target, tmp_path / "residual", out=tmp_path / "all")
    whole = json.loads((tmp_path / "all" / "ires.json").read_text())
    assert whole["inputs"]["residual"]["digest"] == residual["digest"]
    merge(tmp_path / "out", tmp_path / "residual", out=tmp_path / "again", skip="norm")
    again = json.loads((tmp_path / "again" / "ires.json").read_text())
    assert again["inputs"]["target"]["digest"] == table["digest"], "however it is split into files"
    assert table["files"]["tokenizer.json"] == {"from": "residual", "xxh3_128": xxhash.xxh3_128_hexdigest(b"{}")}
    assert table["files"]["README.md"]["from"] == "target"
    assert "alpha" in table["rules"]
    assert residual["rules"]["alpha"] == []
    assert residual["tied"] is False


def test_the_same_merge_gives_the_same_folder(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    for name in ("a", "b"):
        merge(target, (instruct, base), out=tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second


def test_the_report_counts_what_happened(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    t = {
        "a": torch.tensor([1.0, 2.0, nan, inf, 60000.0, 1.0, 1.0, 1.0]),
        "b": torch.tensor([1e6, nan]),
        "c": torch.ones(2),
    }
    i = {"a": torch.tensor([1.0, 3.0, 0.0, 0.0, 60000.0, 1.0, 1.0, 1 + 2**-12])}
    b = {"a": torch.zeros(8)}
    paths = [write_model(tmp_path / name, model) for name, model in (("t", t), ("i", i), ("b", b))]
    report = merge(paths[0], (paths[1], paths[2]), out=tmp_path / "out", dtype="f16", alpha=1)
    assert (report.counts.nan_in, report.counts.inf_in, report.counts.nan_out) == (1, 1, 1)
    assert report.overflow == 2, "60000 + 60000, and 1e6 in a converted tensor"
    assert report.copied == {"b": "only in the target", "c": "only in the target"}
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out["b"].tolist()[0] == inf
    assert "overflow" in str(report)

    t, b = {"a": torch.ones(4).bfloat16()}, {"a": torch.zeros(4).bfloat16()}
    i = {"a": torch.tensor([2.0**-8, 2.0**-20, 0, -(2.0**-20)]).bfloat16()}
    paths = [write_model(tmp_path / f"{name}2", model) for name, model in (("t", t), ("i", i), ("b", b))]
    report = merge(paths[0], (paths[1], paths[2]), out=tmp_path / "out2")
    assert (report.counts.updates, report.counts.lost) == (3, 3), "half an ulp goes to even"
    assert report.lost_fraction == 1
    assert report.strengths[0].effective_alpha == 0
    report = merge(paths[0], (paths[2], paths[2]), out=tmp_path / "out3")
    assert (report.counts.updates, report.strengths[0].realised) == (0, None)
    assert "the residual is 0" in str(report)


def test_effective_alpha_per_factor(tmp_path: Path) -> None:
    shapes = {"a": (300, 100), "b": (300, 100)}
    base, target = tensors(1, shapes), tensors(3, shapes)
    instruct = {name: (t.float() + normal(t.shape, 9, torch.float32, 1e-4)).bfloat16() for name, t in base.items()}
    paths = [write_model(tmp_path / name, m) for name, m in (("t", target), ("i", instruct), ("b", base))]
    options: dict[str, Any] = {"alpha": 1.0, "alphas": [("a", 0.3)]}
    nearest = merge(paths[0], (paths[1], paths[2]), out=tmp_path / "n", **options)
    stochastic = merge(paths[0], (paths[1], paths[2]), out=tmp_path / "s", rounding="stochastic", **options)

    def effective(report: Report) -> dict[float, float]:
        return {s.factors[0]: s.effective_alpha or 0 for s in report.strengths}

    def measured(folder: str, name: str) -> float:
        out = read_model(tmp_path / folder)[name].double()
        asked = instruct[name].double() - base[name].double()
        return float(((out - target[name].double()) * asked).sum() / (asked * asked).sum())

    for report, folder in ((nearest, "n"), (stochastic, "s")):
        assert effective(report)[0.3] == pytest.approx(measured(folder, "a"), rel=1e-6)
        assert effective(report)[1.0] == pytest.approx(measured(folder, "b"), rel=1e-6)
    assert abs(effective(stochastic)[0.3] - 0.3) < 0.02
    table = json.loads(json.dumps(stochastic.to_dict()))
    assert {tuple(s["factors"]) for s in table["strengths"]} == {(0.3,), (1.0,)}


def test_progress_is_told_to_the_caller(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    calls: list[tuple[int, int, threading.Thread]] = []
    merge(
        target, (instruct, base), out=tmp_path / "out",
        progress=lambda done, todo: calls.append((done, todo, threading.current_thread())),
    )  # fmt: skip
    size = sum(t.numel() * t.element_size() for t in read_model(target).values())
    assert calls[-1][:2] == (4 * size, 4 * size)
    assert {thread for _, _, thread in calls} == {threading.main_thread()}


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    before = snapshot(tmp_path)
    plan = ik.apply(target, (instruct, base), out=tmp_path / "out", dry_run=True)
    assert "instruct - base" in str(plan)
    assert snapshot(tmp_path) == before
    assert plan.id == merge(target, (instruct, base), out=tmp_path / "out").id


def test_files_are_closed_and_threads_end(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, shards=3)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    merge(target, (instruct, base), out=tmp_path / "out")
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.mark.skipif(not ik.backends()["native"].available, reason="the reference backend needs memory for temporaries")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "instruct", "target")):
        write_model(tmp_path / name, {f"t{i}": normal((1 << 22,), 10 * seed + i) for i in range(8)})  # 64 MiB a model
    program = f"""
        import threading
        from pathlib import Path
        import ires_kernels as ik
        from ires_kernels.streaming import device  # and torch, and all that it loads

        def anonymous():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

        def watch():
            while not over.wait(0.002):
                seen.append(anonymous())

        over, folder = threading.Event(), Path({f"{tmp_path}"!r})
        seen = [anonymous()]
        watcher = threading.Thread(target=watch)
        watcher.start()
        ik.apply(folder / "target", (folder / "instruct", folder / "base"), out=folder / "out", sync=False, threads=2)
        over.set()
        watcher.join()
        print(len(seen), max(seen) - seen[0])
    """
    environment = {**os.environ, "IRES_BACKEND": "native"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, env=environment
    )
    samples, grown = map(int, done.stdout.split())
    assert samples > 10
    assert grown < 16 * 1024, f"{grown} KiB"


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(tmp_path: Path) -> None:
    """Files of zeros but for a few elements at the end, whose random bits depend on an index beyond 31 bits."""
    count, tail = 2**31 + 5, 9
    ends = {}
    for seed, role in enumerate(("target", "instruct", "base")):
        ends[role] = normal((tail,), seed, torch.float32, 1.0).to(torch.float8_e4m3fn)
        (tmp_path / role).mkdir()
        header = build_header([("a", "F8_E4M3", (count,))], {})
        with open(tmp_path / role / "model.safetensors", "wb") as file:
            file.write(header)
            file.truncate(len(header) + count)
            file.seek(len(header) + count - tail)
            file.write(bits(ends[role]))
    options: dict[str, Any] = {"alpha": 0.3, "rounding": "stochastic", "seed": 1}
    pair = (tmp_path / "instruct", tmp_path / "base")
    merge(tmp_path / "target", pair, out=tmp_path / "out", **options)
    wanted = ik.add_difference(
        *ends.values(), 0.3, rounding="stochastic", seed=1, stream=xxhash.xxh3_64_intdigest(b"a"), offset=count - tail
    )
    with open(tmp_path / "out" / "model.safetensors", "rb") as file:
        file.seek(-tail, os.SEEK_END)
        assert file.read() == bits(wanted)
    assert open_checkpoint(tmp_path / "out").tensors["a"].numel == count


# --- refused before the first byte


Change = Callable[[Path, dict[str, Any]], object]
"""Spoils the folders base, instruct and target below a root, or the options of `apply`."""
NORM = "model.norm.weight"


def weights(change: Callable[[Tensors], object], *folders: str) -> Change:
    """Save models again with other tensors."""

    def spoil(root: Path, _: dict[str, Any]) -> None:
        for folder in folders:
            model = read_model(root / folder)
            change(model)
            (root / folder / "model.safetensors").unlink()
            save_file(model, root / folder / "model.safetensors")

    return spoil


def everywhere(**added: Tensor) -> Change:
    """Give all three models more tensors; names with underscores for dots."""
    extra = {name.replace("__", "."): t for name, t in added.items()}
    return weights(lambda model: model.update(extra), "base", "instruct", "target")


def differing(**added: Tensor) -> Change:
    """Give all three models one more tensor, and the base model another value."""

    def spoil(root: Path, options: dict[str, Any]) -> None:
        everywhere(**added)(root, options)
        weights(lambda model: model.update({name: t + 1 for name, t in added.items()}), "base")(root, options)

    return spoil


def raw_bytes(folder: str, change: Callable[[bytes], bytes]) -> Change:
    def spoil(root: Path, _: dict[str, Any]) -> None:
        path = root / folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def name_twice(raw: bytes) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].replace(b'"model.norm.weight"', b'"model.embed_tokens.weight"')
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def option(**changes: Any) -> Change:
    """Other arguments; strings that begin with / are below the root."""

    def below(root: Path, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(below(root, each) for each in value)
        return root / value[1:] if isinstance(value, str) and value.startswith("/") else value

    return lambda root, options: options.update({key: below(root, value) for key, value in changes.items()})


def with_residual(**changes: Any) -> Change:
    """Other arguments, and a residual folder at /r."""

    def spoil(root: Path, options: dict[str, Any]) -> None:
        ik.extract(root / "base", root / "instruct", root / "r", sync=False)
        option(**changes)(root, options)

    return spoil


def tied_target(root: Path, options: dict[str, Any]) -> None:
    weights(lambda model: model.pop("lm_head.weight"), "target")(root, options)
    (root / "target" / "config.json").write_text("{}")


def foreign_folder(root: Path, _: dict[str, Any]) -> None:
    (root / "out.partial").mkdir()
    (root / "out.partial" / "thesis.txt").write_text("mine")


F8 = torch.zeros(4).to(torch.float8_e4m3fn)
COMPLEX = torch.zeros(3, dtype=torch.complex64)

REFUSED: dict[str, tuple[Change, str]] = {
    "shape": (weights(lambda m: m.update({NORM: torch.ones(8)}), "base"), "has shape [8] in base"),
    "one element": (weights(lambda m: m.update({NORM: torch.ones(1)}), "target"), "[1] in target"),
    "integers differ": (differing(ids=torch.arange(3)), "'ids' is I64 in"),
    "booleans differ": (differing(mask=torch.tensor([False])), "'mask' is BOOL in"),
    "complex differs": (differing(z=COMPLEX), "'z' is C64 in"),
    "integer and float": (weights(lambda m: m.update({NORM: torch.arange(16)}), "base"), "is BF16 in target"),
    "alpha nan": (option(alpha=float("nan")), "alpha is nan"),
    "alpha inf": (option(alpha=float("inf")), "alpha is inf"),
    "alpha bool": (option(alpha=True), "alpha is bool"),
    "alpha complex": (option(alpha=1j), "alpha is complex"),
    "missing in instruct": (weights(lambda m: m.pop(NORM), "instruct"), "is in target and base and not in instruct"),
    "missing in target": (weights(lambda m: m.pop(NORM), "target"), "is in instruct and base and not in target"),
    "tied target": (tied_target, "whose head is its embedding"),
    "truncated": (raw_bytes("base", lambda raw: raw[:-1]), "truncated: 1 bytes missing"),
    "trailing bytes": (raw_bytes("base", lambda raw: raw + b"0"), "1 bytes too many"),
    "huge header": (raw_bytes("base", lambda raw: (10**9).to_bytes(8, "little") + raw[8:]), "the header says it has"),
    "duplicate keys": (raw_bytes("base", name_twice), "duplicate key"),
    "fp8 with scales": (everywhere(a__weight=F8, a__weight_scale=torch.ones(1)), "codes whose scale is a.weight_scale"),
    "packed": (everywhere(a__qweight=torch.zeros(4).int()), "packed quantized weights"),
    "a pickle": (raw_bytes("instruct", lambda _: b"PK\x03\x04" + bytes(60)), "PyTorch pickle"),
    "a pointer": (raw_bytes("instruct", lambda _: b"version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "no such model": (option(target="/nowhere"), "no such file or folder"),
    "residual as target": (with_residual(target="/r"), "is a residual, wanted a model as target"),
    "residual and model": (with_residual(residual=("/r", "/base")), "r is a residual, "),
    "model as residual": (option(residual="/base"), "is a model, wanted a residual"),
    "three models": (option(residual=("/base", "/base", "/base")), "wanted one or more residual folders"),
    "list of two models": (option(residual=["/instruct", "/base"]), "a tuple in Python"),
    "no residual": (option(residual=()), "nothing is given"),
    "no such pattern": (option(skip="typo"), "'typo' matches no tensor"),
    "bad pattern": (option(skip="("), "is not a regular expression"),
    "out exists": (option(out="/base"), "is not empty"),
    "out in an input": (option(out="/base/out"), "lies in the input"),
    "threads": (option(threads=0), "threads is 0"),
    "foreign folder": (foreign_folder, "is in the way"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_byte(tmp_path: Path, case: str) -> None:
    base, instruct, target = triple(tmp_path)
    options: dict[str, Any] = {"target": target, "residual": (instruct, base), "out": tmp_path / "out"}
    spoil, text = REFUSED[case]
    spoil(tmp_path, options)
    before = snapshot(tmp_path)
    error = TypeError if case in ("alpha bool", "alpha complex") else (CheckpointError, ArgumentError, StoreError)
    with pytest.raises(error, match=re.escape(text)):
        ik.apply(**options)
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_residual_of_a_model_and_itself_is_said_to_be_0(tmp_path: Path) -> None:
    base, instruct, _ = triple(tmp_path)
    assert ik.extract(base, instruct, tmp_path / "residual", sync=False).warnings == ()
    shutil.copytree(base, tmp_path / "copy")
    (warning,) = ik.extract(base, tmp_path / "copy", tmp_path / "zero", sync=False).warnings
    assert warning.startswith("the residual is 0: instruct and base hold the same numbers")


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("shape", "has shape [8] in base"),
        ("integers differ", "'ids' is I64 in"),
        ("missing in instruct", "is in base and not in instruct"),
        ("truncated", "truncated"),
        ("fp8 with scales", "codes whose scale"),
        ("packed", "packed quantized weights"),
    ],
)
def test_extract_refuses_the_same(tmp_path: Path, case: str, text: str) -> None:
    base, instruct, _ = triple(tmp_path)
    REFUSED[case][0](tmp_path, {})
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(text)):
        ik.extract(base, instruct, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_an_unfinished_folder_is_no_input(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    partial = tmp_path / "x.partial"
    target.rename(partial)
    (partial / unfinished.MARKER).write_text("")
    with pytest.raises(CheckpointError, match="is the unfinished output of a merge"):
        ik.apply(partial, (instruct, base), out=tmp_path / "out")


def test_a_backend_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    monkeypatch.setenv("IRES_BACKEND", "abacus")
    with pytest.raises(ArgumentError, match="IRES_BACKEND=abacus: no such backend"):
        ik.apply(target, (instruct, base), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- failures on the way


def failing(monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], object]) -> None:
    """Do something before the window with this number is read."""
    read, calls = sources.read_into, iter(range(10**6))

    def read_into(*arguments: Any) -> None:
        if current_thread().name.startswith("ires-") and next(calls) == at:  # of the engine
            action()
        read(*arguments)

    monkeypatch.setattr(sources, "read_into", read_into)


def assert_nothing_is_left(root: Path) -> None:
    assert {path.name for path in root.iterdir()} == {"base", "instruct", "target"}


def test_a_file_that_shrinks_under_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    file = instruct / "model.safetensors"
    failing(monkeypatch, 1, lambda: os.truncate(file, 100))
    with pytest.raises(OSError, match="it shrank while it was read") as caught:
        merge(target, (instruct, base), out=tmp_path / "out", threads=1)
    assert caught.value.filename == str(file)
    assert "tensor '" in str(caught.value)
    assert_nothing_is_left(tmp_path)


def test_a_file_that_changes_before_or_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    files = sorted(base.glob("*.safetensors"))
    failing(monkeypatch, 1, lambda: os.utime(files[1], ns=(5, 5)))
    with pytest.raises(CheckpointError, match=f"{files[1]}: changed after it was validated"):
        merge(target, (instruct, base), out=tmp_path / "out", threads=1)
    assert_nothing_is_left(tmp_path)
    failing(monkeypatch, 20, lambda: os.utime(files[1], ns=(6, 6)))
    with pytest.raises(CheckpointError, match=f"{files[1]}: changed while it was read"):
        merge(target, (instruct, base), out=tmp_path / "out", threads=1)
    assert_nothing_is_left(tmp_path)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_in_one_thread_stops_all_and_names_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    base, instruct, target = triple(tmp_path)

    def broken(*_: Any, offset: int, **__: Any) -> None:
        if offset >= 128:
            raise RuntimeError("the abacus is broken")

    monkeypatch.setattr(ops, "add_difference", broken)
    with pytest.raises(RuntimeError, match=rf"tensor '.*' of {target}/model.safetensors: the abacus is broken"):
        merge(target, (instruct, base), out=tmp_path / "out", threads=threads)
    assert_nothing_is_left(tmp_path)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ires-")]


def test_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    pwrite, calls = os.pwrite, iter(range(100))

    def failing_write(fd: int, data: Any, offset: int) -> int:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing_write)
    with pytest.raises(OSError, match=r"No space left on device \(tensor '.*'\)") as caught:
        merge(target, (instruct, base), out=tmp_path / "out")
    assert caught.value.filename == f"{tmp_path}/out.partial/model.safetensors"
    assert_nothing_is_left(tmp_path)


def test_an_interrupt_from_the_progress(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)

    def interrupt(_: int, __: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(target, (instruct, base), out=tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ires-")]


@pytest.mark.usefixtures("small_tiles")
def test_an_interrupt_does_not_wait_for_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    failing(monkeypatch, 3, lambda: time.sleep(0.3))
    computed: list[int] = []
    compute = cpu.compute
    monkeypatch.setattr(cpu, "compute", lambda *args: (computed.append(1), compute(*args)))

    def interrupt(_: int, __: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(target, (instruct, base), out=tmp_path / "out", progress=interrupt, threads=1)
    assert len(computed) < 5
    assert_nothing_is_left(tmp_path)


def test_a_damaged_residual_is_found_by_its_hashes(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    file = tmp_path / "residual" / "residual.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"tensor '.*' is damaged: its xxh3_128 is .*residual\.json says"):
        ik.apply(target, tmp_path / "residual", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_two_merges_into_one_folder_at_once(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    with NewFolder(tmp_path / "out", "another", b""), pytest.raises(StoreError, match="another process is writing it"):
        ik.apply(target, (instruct, base), out=tmp_path / "out")
    merge(target, (instruct, base), out=tmp_path / "out")


def test_a_target_of_another_family_is_warned_of(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    stranger = write_model(tmp_path / "stranger", {name: t.roll(1, 0) for name, t in read_model(target).items()})
    ik.extract(base, instruct, tmp_path / "r", sync=False)
    for residual, which in (((instruct, base), "base"), (tmp_path / "r", "the base of residual")):
        for model, related in ((target, True), (instruct, True), (stranger, False)):
            report = merge(model, residual, out=tmp_path / "out")
            plan = ik.apply(model, residual, in_place=True, dry_run=True)
            for warned in (report.warnings, plan.warnings):
                assert any(f"target and {which} look unrelated: the median cosine of " in w for w in warned) != related
            shutil.rmtree(tmp_path / "out")
        with pytest.warns(UserWarning, match=f"target and {which} look unrelated"):
            ik.load(stranger, residual)
        ik.load(target, residual)
    table = json.loads((tmp_path / "r" / "residual.json").read_text())
    del table["sketch"]
    (tmp_path / "r" / "residual.json").write_text(json.dumps(table))
    assert merge(stranger, tmp_path / "r", out=tmp_path / "out").warnings == ()
    report = ik.apply(stranger, (instruct, base), in_place=True)
    assert any("look unrelated" in warning for warning in report.warnings)


def test_digests_tell_models_apart_and_not_layouts() -> None:
    rows = [("b", "BF16", (2, 3), "11"), ("a", "F32", (), "22")]
    assert provenance.digest(rows) == provenance.digest(reversed(rows))
    assert provenance.digest(rows) != provenance.digest([("b", "BF16", (3, 2), "11"), rows[1]])
    text = b"a F32 [] 22\nb BF16 [2, 3] 11\n"
    assert provenance.digest(rows) == xxhash.xxh3_128_hexdigest(text)


def test_every_byte_of_integers_is_compared(tmp_path: Path) -> None:
    """Of tensors that are read in pieces: a difference in the first, the last, or none."""
    ids = torch.arange(200_003, dtype=torch.int32)
    for name, at in (("same", None), ("first", 0), ("last", -1)):
        other = ids.clone()
        if at is not None:
            other[at] += 1 << 24
        paths = [
            write_model(tmp_path / name / role, {"a": normal((3,), 1), "ids": t})
            for role, t in (("b", ids), ("i", other))
        ]
        if at is None:
            ik.extract(*paths, tmp_path / f"{name}-out", sync=False)
            table = json.loads((tmp_path / f"{name}-out" / "residual.json").read_text())
            assert table["not_stored"]["ids"]["shape"] == [200_003]
            assert table["inputs"]["base"]["digest"] == table["inputs"]["instruct"]["digest"]
        else:
            with pytest.raises(CheckpointError, match="'ids' is I32 in"):
                ik.extract(*paths, tmp_path / f"{name}-out", sync=False)


def test_an_interrupt_while_waiting_leaves_no_thread_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)

    def slow(*_: Any, **__: Any) -> None:
        time.sleep(0.4)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "add_difference", slow)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.15)
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(target, (instruct, base), out=tmp_path / "out", threads=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ires-")]
    assert_nothing_is_left(tmp_path)


# Checkpoints that hold a tied embedding twice.


def twice(folder: Path, same: bool) -> tuple[Path, Path, Path]:
    """base, instruct with one embedding, target with two, the second one equal or not."""
    base = {"shared.weight": normal((40, 16), 1), "layer.weight": normal((8, 16), 2)}
    instruct = {name: (t.float() + normal(t.shape, 7, torch.float32, 1e-2)).bfloat16() for name, t in base.items()}
    target = {name: (t.float() + normal(t.shape, 8, torch.float32, 1e-2)).bfloat16() for name, t in base.items()}
    target["encoder.embed_tokens.weight"] = target["shared.weight"].clone() if same else normal((40, 16), 9)
    models = (("base", base), ("instruct", instruct), ("target", target))
    one, two, three = (write_model(folder / name, model) for name, model in models)
    return one, two, three


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_second_copy_of_the_embedding_moves_with_it(tmp_path: Path, rounding: str) -> None:
    base, instruct, target = twice(tmp_path, same=True)
    ik.extract(base, instruct, tmp_path / "residual", sync=False)
    merge(target, (instruct, base), out=tmp_path / "one", rounding=rounding)
    merge(target, tmp_path / "residual", out=tmp_path / "two", rounding=rounding)
    for out in (tmp_path / "one", tmp_path / "two"):
        merged = read_model(out)
        assert bits(merged["encoder.embed_tokens.weight"]) == bits(merged["shared.weight"])
        assert bits(merged["shared.weight"]) != bits(read_model(target)["shared.weight"])
        assert ik.verify(out)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_head_that_all_models_store_and_no_config_tells_of(tmp_path: Path, rounding: str) -> None:
    base, instruct, target = twice(tmp_path, same=True)
    for folder in (base, instruct, target):
        models = read_model(folder)
        models.pop("encoder.embed_tokens.weight", None)
        shutil.rmtree(folder)
        write_model(folder, {**models, "lm_head.weight": models["shared.weight"].clone()})
    merge(target, (instruct, base), out=tmp_path / "out", rounding=rounding)
    merged = read_model(tmp_path / "out")
    assert bits(merged["lm_head.weight"]) == bits(merged["shared.weight"])
    assert ik.verify(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is a second copy of 'shared.weight'"):
        merge(target, (instruct, base), out=tmp_path / "other", alphas=[("shared", 0.5)])
    own = read_model(instruct)
    own["lm_head.weight"] = own["lm_head.weight"] + normal((40, 16), 11, scale=2e-3)
    shutil.rmtree(instruct)
    write_model(instruct, own)  # a head of its own, which the target's may follow
    merge(target, (instruct, base), out=tmp_path / "another", alphas=[("shared", 0.5)])
    merged = read_model(tmp_path / "another")
    assert bits(merged["lm_head.weight"]) != bits(merged["shared.weight"])


def test_the_embedding_of_mamba_has_a_name_of_its_own(tmp_path: Path) -> None:
    base, instruct, target = twice(tmp_path, same=True)
    for folder in (base, instruct, target):
        models = {
            name.replace("shared", "backbone.embeddings").replace("encoder.embed_tokens", "lm_head"): t
            for name, t in read_model(folder).items()
        }
        shutil.rmtree(folder)
        write_model(folder, models)
    merge(target, (instruct, base), out=tmp_path / "out")
    merged = read_model(tmp_path / "out")
    assert bits(merged["lm_head.weight"]) == bits(merged["backbone.embeddings.weight"])
    assert bits(merged["lm_head.weight"]) != bits(read_model(target)["lm_head.weight"])


def test_a_second_copy_with_other_rules_is_refused(tmp_path: Path) -> None:
    base, instruct, target = twice(tmp_path, same=True)
    for rules in ({"alphas": [("shared", 0.5)]}, {"skip": "shared"}):
        with pytest.raises(CheckpointError, match=r"'encoder.embed_tokens.weight' is a second copy of 'shared.weight'"):
            merge(target, (instruct, base), out=tmp_path / "out", **rules)


def test_a_tensor_that_only_looks_like_a_second_copy_is_kept(tmp_path: Path) -> None:
    base, instruct, target = twice(tmp_path, same=False)
    report = merge(target, (instruct, base), out=tmp_path / "out")
    assert report.copied == {"encoder.embed_tokens.weight": "only in the target"}


def test_a_shard_alone_is_no_target_of_a_new_model(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path, shards=2)
    shard = sorted(target.glob("*.safetensors"))[0]
    with pytest.raises(CheckpointError, match="is one of several shards, and would be no model on its own"):
        merge(shard, (instruct, base), out=tmp_path / "out", allow_missing=True)
    assert not (tmp_path / "out").exists()


def test_a_file_that_was_deleted_from_the_output_is_missed(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    merge(target, (instruct, base), out=tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(StoreError, match=r"is the output of the same command, but not .*: config\.json is gone"):
        merge(target, (instruct, base), out=tmp_path / "out")


def test_a_config_that_only_escapes_can_hold(tmp_path: Path) -> None:
    base, instruct, target = triple(tmp_path)
    config = json.loads((target / "config.json").read_text()) | {"odd": "\ud800"}
    (target / "config.json").write_text(json.dumps(config))
    merge(target, (instruct, base), out=tmp_path / "out", dtype="f32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["odd"] == "\ud800"
    assert ik.verify(tmp_path / "out")


def test_unfinished_output_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, instruct, target = triple(tmp_path)
    partial = tmp_path / "out.partial"
    shutil.copytree(target, partial)
    (partial / MARKER).touch()
    (tmp_path / "link").symlink_to(partial)
    monkeypatch.chdir(partial)
    for path in (tmp_path / "link", Path(".")):
        with pytest.raises(CheckpointError, match="is the unfinished output of a merge"):
            merge(path, (instruct, base), out=tmp_path / "new")
