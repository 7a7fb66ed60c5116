"""Names from strangers steer no terminal: whatever is printed, raised or warned of shows control characters."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from small_models import normal, write_model

import ires_kernels as ik
from ires_kernels import cli
from ires_kernels.files.opening import CheckpointError
from ires_kernels.files.ownership import StoreError
from ires_kernels.files.plain import plain, plain_lines, table
from ires_kernels.planning.rules import ArgumentError

EVIL = "a\x1b]0;title\x07\x9b31m\u202ecod\u2066.exe\r\nires: all is well"
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def is_clean(text: str) -> bool:
    return not UNSAFE.search(text) and not any(line.startswith("ires: all is well") for line in text.split("\n"))


def test_plain() -> None:
    assert plain("Größe α → 中文 🙂 \\n") == "Größe α → 中文 🙂 \\n"
    assert plain("\x1b[0m\n\x7f\x9b\u202e\udc80") == r"\x1b[0m\n\x7f\x9b\u202e\udc80"
    assert is_clean(plain(EVIL))
    assert plain_lines("a\nb", "c") == "a\\nb\nc"
    assert table([("a", EVIL), ("long\t", "x")]).count("\n") == 1
    assert plain(plain(EVIL)) == plain(EVIL)
    for kind in (CheckpointError, StoreError, ArgumentError):
        assert f"{kind('one' + EVIL, 'two')}".count("\n") == 1


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Models with such names of tensors, files and settings, in a folder with such a name."""
    place = tmp_path / EVIL.replace("/", "")
    made = []
    for seed, role in enumerate(("base", "instruct", "target")):
        tensors = {name: normal((8, 8), 7 * seed + i) for i, name in enumerate(["x.weight", f"{EVIL}.weight"])}
        if role == "target":
            tensors[f"only{EVIL}.weight"] = normal((4,), 5)
        config = {"model_type": EVIL, "rope_theta": EVIL if role == "target" else 1, "eos_token_id": 2}
        folder = write_model(place / role, tensors, config=config)
        (folder / f"tokenizer{EVIL}.json").write_text("{}")
        (folder / f"notes{EVIL}").mkdir()
        made.append(folder)
    base, instruct, target = made
    return base, instruct, target


def test_no_command_prints_them(models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, instruct, target = map(str, models)
    out, pair = f"{models[0].parent / 'out'}", ["--instruct", instruct, "--base", base]
    residual = f"{models[0].parent / 'residual'}"
    missing = os.path.join(target, EVIL)
    commands = [
        (["inspect", target, "--tensors"], 0),
        (["inspect", missing], 2),
        (["apply", target, *pair, "-o", out, "--dry-run"], 0),
        (["apply", target, *pair, "-o", out, "--skip", "only"], 0),
        (["apply", target, *pair, "-o", out, "--skip", EVIL], 2),
        (["extract", target, instruct, "-o", residual], 2),
        (["extract", base, instruct, "-o", residual], 0),
        (["status", out], 0),
        (["status", missing], 2),
        (["verify", out], 0),
        (["apply", target, residual, "--in-place"], 0),
        (["verify", target], 0),
        (["rollback", target], 2),
        (["apply", target, residual, "-o", f"{missing}/x/y"], 2),
    ]
    for arguments, code in commands:
        assert cli.main(arguments) == code, capsys.readouterr().err
        captured = capsys.readouterr()
        assert is_clean(captured.out), (arguments, captured.out)
        assert is_clean(captured.err), (arguments, captured.err)
    assert cli.main(["inspect", target, "--tensors", "--json"]) == 0
    names = [tensor["name"] for tensor in json.loads(capsys.readouterr().out)["all_tensors"]]
    assert f"{EVIL}.weight" in names, "JSON is exact"
    table = json.loads((Path(out) / "ires.json").read_text())
    table["inputs"]["target"]["path"] = f"/{EVIL}"
    table["operation"], table["id"] = "apply", "0" * 31 + "\x1b"
    (Path(out) / "ires.json").write_text(json.dumps(table))
    for arguments in (["inspect", out], ["status", out], ["verify", out], ["verify", out, "--trust-inputs"]):
        cli.main(arguments)
        captured = capsys.readouterr()
        assert is_clean(captured.out + captured.err), arguments


def test_nothing_raised_reported_or_warned_of_holds_them(models: tuple[Path, Path, Path]) -> None:
    base, instruct, target = models
    with pytest.raises(ValueError, match="cannot extract") as caught:
        ik.extract(target, instruct, models[0].parent / "residual")
    assert is_clean(f"{caught.value}")
    assert is_clean(f"{ik.apply(target, (instruct, base), out=models[0].parent / 'out', sync=False)}")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        ik.load(target, (instruct, base))
    assert warned
    assert all(is_clean(f"{warning.message}") for warning in warned)


def test_a_file_system_that_fails_under_such_a_name(
    models: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, f"Input{EVIL}", f"{EVIL}")

    monkeypatch.setattr("ires_kernels.inspect", fail)
    assert cli.main(["inspect", f"{models[0]}"]) == 3
    assert is_clean(capsys.readouterr().err)
    monkeypatch.setattr("ires_kernels.inspect", lambda *_, **__: torch.ones(1)[EVIL])
    assert cli.main(["inspect", f"{models[0]}"]) == 4
    assert is_clean(capsys.readouterr().err)


def test_secrets_of_addresses_are_not_told() -> None:
    for secret, shown in {
        "https://me:pa55@host:80/a/b?sig=x&y=z: is gone": "https://host:80/a/b: is gone",
        "see 'http://host/a?sig=x', twice: HTTP://u@h/?q": "see 'http://host/a', twice: HTTP://h/",
        "{target: https://h/x?s=1, base: https://h/y}": "{target: https://h/x, base: https://h/y}",
        "s3://bucket/a and x@y: https://host/a@b": "s3://bucket/a and x@y: https://host/a@b",
    }.items():
        assert plain(secret) == shown
