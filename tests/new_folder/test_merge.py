"""Whole merges: the bits, whatever the windows and threads; what is recorded and reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from merges import assert_same, bits, merge
from safetensors.torch import load_file
from small_models import Tensors, normal, read_model, snapshot, tensors, triple, write_model

import ires_kernels as ik
from ires_kernels.checkpoints.header import CheckpointError, build_header
from ires_kernels.checkpoints.validation import open_checkpoint
from ires_kernels.files.ownership import StoreError
from ires_kernels.records import provenance
from ires_kernels.records.report import Report

STORAGE = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


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
