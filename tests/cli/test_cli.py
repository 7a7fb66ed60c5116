"""The command line: what goes to stdout and what to stderr, exit codes, errors without tracebacks, and being killed."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from small_models import normal, read_model, snapshot, triple, write_model

import ires_kernels as ik
from ires_kernels import cli
from ires_kernels.cli import main
from ires_kernels.files.unfinished import MARKER
from ires_kernels.streaming import stream


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with folders base, instruct and target."""
    triple(tmp_path, files={"tokenizer.json": "{}"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def same(a: Path, b: Path) -> bool:
    first, second = read_model(a), read_model(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("root")
def test_the_whole_way(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "extract", "base", "instruct", "-o", "residual")
    assert (code, err) == (0, "")
    assert "extracted" in out
    assert "7 tensors" in out
    code, out, err = run(capsys, "apply", "target", "residual:0.7", "-o", "two")
    assert (code, err) == (0, "")
    assert "effective 0.6" in out
    assert (
        run(capsys, "apply", "target", "--instruct", "instruct", "--base", "base", "--alpha", "0.7", "-o", "one")[0]
        == 0
    )
    assert same(root / "one", root / "two")
    for folder in ("residual", "one", "two"):
        code, out, err = run(capsys, "verify", folder)
        assert (code, err) == (0, "")
        assert "bit for bit" in out
    code, out, _ = run(capsys, "inspect", "one")
    assert code == 0
    assert "parameters  " in out
    assert "2,096 in 7 tensors (2,096 BF16)" in out
    assert "model.norm.weight" in run(capsys, "inspect", "one/model.safetensors", "--tensors")[1]


def test_options_reach_the_merge(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "extract", "base", "instruct", "-o", "r1", "--dtype", "bf16", "--skip", "lm_head")
    run(capsys, "extract", "base", "target", "-o", "r2")
    options = (
        "--alpha -2 --alpha-for mlp=0.25,1 --alpha-for (?=norm)norm=3,3 --skip embed --dtype f32 --rounding stochastic "
        "--seed 7 --allow-missing --no-sync --threads 2"
    )
    assert run(capsys, "apply", "target", "r1:0.5", "r2", *options.split(), "-o", "out")[0] == 0
    ik.apply(
        root / "target", [root / "r1", root / "r2"], out=root / "wanted", alpha=[0.5, -2],
        alphas=[("mlp", (0.25, 1)), ("(?=norm)norm", (3, 3))], skip="embed", dtype="f32", rounding="stochastic", seed=7,
        allow_missing=True,
    )  # fmt: skip
    assert same(root / "out", root / "wanted")
    rules = [json.loads((root / name / "ires.json").read_text())["rules"] for name in ("out", "wanted")]
    assert rules[0] == rules[1]


def test_a_path_with_a_colon_wins(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ik.extract(root / "base", root / "instruct", root / "r:0.5", sync=False)
    ik.extract(root / "base", root / "target", root / "r", sync=False)
    for spec, alpha, name in (("r:0.5", 1.0, "a"), ("r:0.5:0.25", 0.25, "b"), ("r:0.75", 0.75, "c")):
        code, out, _ = run(capsys, "apply", "target", spec, "-o", name, "--json")
        assert code == 0
        assert json.loads(out)["strengths"][0]["factors"] == [alpha]
        path = json.loads((root / name / "ires.json").read_text())["inputs"]["residual"]["path"]
        assert path == str(root / ("r" if name == "c" else "r:0.5"))
    code, _, err = run(capsys, "apply", "target", "nowhere:x", "-o", "d")
    assert code == 2
    assert "nowhere:x: no such file or folder" in err


def test_json_is_all_there_is_on_stdout(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        ["apply", "target", "--instruct", "instruct", "--base", "base", "-o", "dry", "--dry-run"],
        ["extract", "base", "instruct", "-o", "residual"],
        ["apply", "target", "residual", "-o", "out"],
        ["inspect", "out"],
        ["inspect", "out", "--tensors"],
        ["verify", "out"],
        ["verify", "out", "--hashes-only"],
    ]
    for command in commands:
        code, out, err = run(capsys, *command, "--json")
        assert (code, err) == (0, ""), command
        table = json.loads(out)
        assert isinstance(table, dict)
        assert ("all_tensors" in table) == (command[-1] == "--tensors")
    assert not (root / "dry").exists()
    code, out, err = run(capsys, "verify", "base", "--json")
    assert (code, out) == (2, "")
    assert err


@pytest.mark.usefixtures("root")
def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "extract", "base", "instruct", "-o", "residual", "--quiet") == (0, "", "")
    assert run(capsys, "verify", "residual", "--quiet") == (0, "", "")
    assert run(capsys, "extract", "base", "instruct", "-o", "residual", "--quiet", "--dtype", "f16")[0] == 2


def test_a_dry_run_prints_the_plan_and_writes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(root)
    code, out, _ = run(capsys, "extract", "base", "instruct", "-o", "residual", "--dry-run")
    assert code == 0
    assert "instruct - base, BF16 → F32" in out
    assert snapshot(root) == before
    assert run(capsys, "extract", "base", "instruct", "-o", "base", "--dry-run")[0] == 2


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("", "required"),
        ("mix", "invalid choice"),
        ("apply target -o out", "give one or more residuals, or --instruct and --base"),
        ("apply target residual --instruct instruct --base base -o out", "give one or more residuals"),
        ("apply target residual --instruct instruct -o out", "give one or more residuals"),
        ("apply target --instruct instruct -o out", "give one or more residuals"),
        ("apply target residual", "-o/--out"),
        ("apply target residual -o out --dtype int8", "invalid choice"),
        ("apply target residual -o out --alpha x", "invalid float"),
        ("apply target residual -o out --alpha-for x", "wanted REGEX=ALPHA"),
        ("apply target residual -o out --alpha-for x=y", "wanted REGEX=ALPHA"),
        ("apply target residual -o out --alpha nan", "alpha is nan, wanted a finite number"),
        ("apply target residual:inf -o out", "alpha is inf, wanted a finite number"),
        ("apply target residual -o out --skip (", "is not a regular expression"),
        ("apply target residual -o out --skip typo", "--skip 'typo' matches no tensor"),
        ("apply target residual -o out --alpha-for typo=1", "--alpha-for 'typo' matches no tensor"),
        ("apply target residual -o out --threads 0", "threads is 0"),
        ("apply target residual -o out --seed -1", "seed is -1"),
        ("apply target instruct base -o out", "a tuple in Python, --instruct and --base on the command line"),
        ("apply target --instruct residual --base residual -o out", "is a residual, wanted a model as instruct"),
        ("apply target residual -o target", "is not empty"),
        ("apply nowhere residual -o out", "nowhere: no such file or folder"),
        ("extract base residual -o out", "is a residual, wanted a model as instruct"),
        ("inspect nowhere", "nowhere: no such file or folder"),
        ("status " + 300 * "n", "cannot read: File name too long"),
        ("verify base", "wanted the output of a merge"),
        ("verify residual --target base", "was not made of target but of base, instruct"),
    ],
)
def test_wrong_usage_and_refused_input_exit_with_2(
    root: Path, capsys: pytest.CaptureFixture[str], command: str, text: str
) -> None:
    ik.extract(root / "base", root / "instruct", root / "residual", sync=False)
    before = snapshot(root)
    code, out, err = run(capsys, *command.split())
    assert (code, out) == (2, "")
    assert text in err
    assert snapshot(root) == before
    assert not (root / "out").exists()


def test_a_difference_exits_with_1(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "extract", "base", "instruct", "-o", "residual")
    raw = bytearray((root / "residual" / "residual.safetensors").read_bytes())
    raw[-1] ^= 64
    (root / "residual" / "residual.safetensors").write_bytes(raw)
    code, out, err = run(capsys, "verify", "residual")
    assert (code, err) == (1, "")
    assert "1 element differs, the first at " in out
    assert ": 1 difference:" in out
    code, out, _ = run(capsys, "verify", "residual", "--json", "--hashes-only")
    assert code == 1
    assert json.loads(out)["ok"] is False


def test_verify_finds_inputs_that_moved(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("r1", "r2"):
        ik.extract(root / "base", root / "instruct", root / name, sync=False)
    assert run(capsys, "apply", "target", "r1", "r2:-0.5", "-o", "out")[0] == 0
    for name in ("target", "r1", "r2"):
        (root / name).rename(root / f"{name}-moved")
    assert run(capsys, "verify", "out")[0] == 2
    options = ["--target", "target-moved", "--residual", "r1-moved", "--residual", "r2-moved"]
    assert run(capsys, "verify", "out", *options)[0] == 0


@pytest.mark.usefixtures("root")
def test_a_failing_disk_exits_with_3_and_says_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        code, out, err = run(capsys, "extract", "base", "instruct", "-o", "residual")
        assert (code, out) == (3, "")
        assert err.startswith("ires: residual.partial/residual.safetensors: No space left on device: ")
        assert err.endswith("\nresidual was not written and nothing is left of it.\n")
        patch.setattr(os, "unlink", full)
        code, _, err = run(capsys, "extract", "base", "instruct", "-o", "residual")
        assert code == 3
        assert "residual: unfinished: extract, 0 of 1 file, " in err
        assert "`ires resume residual`, or the same command, goes on.\n`ires rollback residual` removes" in err
    assert run(capsys, "extract", "base", "instruct", "-o", "residual")[0] == 0


def test_an_interrupt_exits_with_130(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "run", interrupt)
    code, out, err = run(capsys, "extract", "base", "instruct", "-o", "residual")
    assert (code, out) == (130, "")
    assert err == "ires: interrupted.\nresidual was not written and nothing is left of it.\n"
    assert not (root / "residual.partial").exists()


def test_errors_list_up_to_ten_problems_and_the_way_out(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(root / "other", {f"t{i:02}": normal((2,), i) for i in range(15)})
    code, _, err = run(capsys, "apply", "other", "--instruct", "instruct", "--base", "base", "-o", "out")
    assert code == 2
    lines = err.splitlines()
    assert lines[0] == "ires: cannot apply:"
    assert len(lines) < 16
    assert any("--allow-missing" in line for line in lines)


# --- as processes


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ires_kernels", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.usefixtures("root")
def test_python_dash_m() -> None:
    done = command("inspect", "base", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["tensors"] == 7
    done = command("inspect", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ires: nowhere: no such file or folder. Check the path.\n"
    assert command("--version").stdout == f"ires_kernels {ik.__version__}\n"


def test_a_reader_that_goes_away(root: Path) -> None:
    write_model(root / "many", {f"t{i}": torch.zeros(1) for i in range(2000)})
    program = f"{sys.executable} -m ires_kernels inspect many --tensors | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "model       many\n0\n"
    assert done.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams(root: Path, closed: str) -> None:
    program = f'exec "$0" -m ires_kernels apply target --instruct instruct --base base -o out {closed}'
    assert subprocess.run(["sh", "-c", program, sys.executable], check=False).returncode == 0
    assert ik.verify(root / "out")


def test_residuals_on_either_side_of_options_and_small_factors(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "extract", "base", "instruct", "-o", "r")
    for number, arguments in enumerate((["r", "--alpha", "-1e-3"], ["--alpha", "-.1E-2", "-o", "out1", "--", "r"])):
        out = [] if "-o" in arguments else ["-o", f"out{number}"]
        assert run(capsys, "apply", "target", *arguments, *out)[0] == 0
    assert same(root / "out0", root / "out1")
    code, _, err = run(capsys, "apply", "target", "r", "-o", "out2", "--alhpa=3", "r")
    assert code == 2
    assert "unrecognized arguments: --alhpa=3" in err
    code, _, err = run(capsys, "inspect", "target", "r")
    assert (code, "unrecognized arguments: r" in err) == (2, True)


@pytest.mark.usefixtures("root")
def test_json_where_nothing_is_left_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    for where in (["-o", "out"], ["--in-place"]):
        for _ in range(2):
            code, out, _ = run(
                capsys, "apply", "target", "--instruct", "instruct", "--base", "base", "--json", "--alpha=.5", *where
            )
            assert code == 0
            json.loads(out, parse_constant=pytest.fail)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["extract", "base", "instruct", "-o", "residual"], b"16.8/16.8 kB"),
        (["sha256", "base"], b"4.8/4.8 kB"),
    ],
    ids=["extract", "sha256"],
)
def test_progress_on_a_terminal_only(arguments: list[str], wanted: bytes) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "ires_kernels", *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        check=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    assert arguments[0].encode() in shown
    assert wanted in shown
    assert b"\x1b" not in done.stdout


STALLING = """
    import os, sys, time
    from ires_kernels import cli

    pwrite, calls = os.pwrite, iter(range(10**6))

    def stall(fd, data, offset):
        if next(calls) == 5:
            print("stalled", flush=True)
            time.sleep({seconds})
        return pwrite(fd, data, offset)

    os.pwrite = stall
    sys.exit(cli.main(sys.argv[1:]))
"""


def start_and_stall(*arguments: str, seconds: float = 60) -> subprocess.Popen[str]:
    """A command that has got stuck in the middle of its writes."""
    program = textwrap.dedent(STALLING.format(seconds=seconds))
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "stalled\n"
    return process


def test_killed_half_way_and_run_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["apply", "target", "--instruct", "instruct", "--base", "base", "-o", "out", "--threads", "1"]
    before = {name: snapshot(root / name) for name in ("base", "instruct", "target")}
    process = start_and_stall(*arguments)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "out.partial: another process is writing it" in err
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (root / "out").exists()
    assert (root / "out.partial" / MARKER).exists()
    assert not (root / "out.partial" / "config.json").exists(), "so that transformers does not load it"
    code, _, err = run(capsys, "inspect", "out.partial")
    code, _, err = run(capsys, "extract", "base", "out.partial", "-o", "r")
    assert code == 2
    assert "out.partial: is the unfinished output of a merge" in err
    assert run(capsys, *arguments)[0] == 0
    assert run(capsys, "verify", "out")[0] == 0
    assert not (root / "out.partial").exists()
    assert {name: snapshot(root / name) for name in before} == before


def test_control_c_stops_within_a_moment(root: Path) -> None:
    process = start_and_stall("extract", "base", "instruct", "-o", "residual", "--threads", "1", seconds=0.5)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert sorted(path.name for path in root.iterdir()) == ["base", "instruct", "target"]


def test_the_entry_point_is_declared() -> None:
    from importlib.metadata import entry_points

    (script,) = [point for point in entry_points(group="console_scripts") if point.name == "ires"]
    assert script.load() is cli.main


def test_a_bug_ends_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ires_kernels.inspect", lambda _, **__: 1 // 0)
    monkeypatch.delenv("IRES_DEBUG", raising=False)
    assert main(["inspect", f"{tmp_path}"]) == 4
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error
    assert "Traceback" not in error
    monkeypatch.setenv("IRES_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["inspect", f"{tmp_path}"])
