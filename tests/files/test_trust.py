"""The key and its signatures: made once however many begin at once, kept from others, refused where others know it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import tensors, write_model

from ires_kernels.cli import main
from ires_kernels.files import trust


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of our own."""
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", f"{tmp_path}/state")
    monkeypatch.setattr(trust, "_keys", {})
    return tmp_path / "state"


def test_a_signature_is_of_one_content_one_use_and_one_key(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not trust.is_mine("use", b"content", "")
    assert not state.exists(), "looking makes no key"
    signature = trust.sign("use", b"content")
    assert trust.is_mine("use", b"content", signature)
    assert not trust.is_mine("use", b"content.", signature)
    assert not trust.is_mine("other", b"content", signature)
    for wrong in (None, 1, [], signature[:-1], signature.upper(), "\udc80", "ü"):
        assert not trust.is_mine("use", b"content", wrong)
    monkeypatch.setattr(trust, "_keys", {})
    assert trust.is_mine("use", b"content", signature), "the key was kept"
    monkeypatch.setattr(trust, "_keys", {})
    (state / "ires_kernels" / "key").unlink()
    assert trust.sign("use", b"content") != signature


def test_tables_are_signed_whatever_their_order() -> None:
    table = trust.signed("use", {"b": [1, 2.5, None, {"ü": "\udc80"}], "a": ""})
    assert trust.is_signed("use", dict(reversed(table.items())))
    assert not trust.is_signed("use", {**table, "a": "x"})
    assert not trust.is_signed("use", {**table, "c": 1})
    assert not trust.is_signed("use", {key: value for key, value in table.items() if key != trust.SIGNATURE})
    assert not trust.is_signed("other", table)


def test_nobody_else_can_read_the_key(state: Path) -> None:
    old = os.umask(0)
    try:
        trust.sign("use", b"")
    finally:
        os.umask(old)
    folder = state / "ires_kernels"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    assert os.listdir(folder) == ["key"]
    assert len((folder / "key").read_bytes()) == 32


def test_first_uses_at_the_same_time_share_one_key(state: Path) -> None:
    program = (
        "import os, sys; from ires_kernels.files import trust\n"
        "pids = []\n"
        "for _ in range(16):\n"
        "    pid = os.fork()\n"
        "    if not pid: os.write(1, (trust.sign('use', b'') + '\\n').encode()); os._exit(0)\n"
        "    pids.append(pid)\n"
        "for pid in pids: os.waitpid(pid, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [trust.sign("use", b"")] * 16
    assert os.listdir(state / "ires_kernels") == ["key"]


@pytest.mark.parametrize("how", ["mode", "link", "fifo", "folder", "short", "open folder"])
def test_a_key_that_may_be_known_or_changed_is_refused(state: Path, tmp_path: Path, how: str) -> None:
    folder = state / "ires_kernels"
    folder.mkdir(parents=True, mode=0o700)
    key = folder / "key"
    if how == "mode":
        key.write_bytes(bytes(32))
        key.chmod(0o644)
    elif how == "link":
        (tmp_path / "elsewhere").write_bytes(bytes(32))
        key.symlink_to(tmp_path / "elsewhere")
    elif how == "fifo":
        os.mkfifo(key, 0o600)
    elif how == "folder":
        key.mkdir(0o700)
    elif how == "short":
        key.write_bytes(b"short")
        key.chmod(0o600)
    else:
        folder.chmod(0o777)
    with pytest.raises(OSError, match="Name a file for the key yourself: --key PATH, or IRES_KEY=PATH") as caught:
        trust.sign("use", b"")
    assert caught.value.filename == f"{key}"


def test_no_place_for_the_key_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", f"{tmp_path}/file")
    with pytest.raises(OSError, match="IRES_KEY=PATH"):
        trust.sign("use", b"")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(OSError, match="no home directory") as caught:
        trust.sign("use", b"")
    assert "IRES_KEY=PATH" in f"{caught.value.strerror}"
    assert not trust.is_mine("use", b"", "")
    monkeypatch.setenv(trust.VARIABLE, f"{tmp_path}/key")
    signature = trust.sign("use", b"")
    assert trust.is_mine("use", b"", signature)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_group_may_share_a_key_that_others_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "shared"
    key.write_bytes(os.urandom(32))
    monkeypatch.setenv(trust.VARIABLE, f"{key}")
    key.chmod(0o640)
    assert trust.is_shared()
    assert trust.is_mine("use", b"", trust.sign("use", b""))
    monkeypatch.setattr(trust, "_keys", {})
    key.chmod(0o644)
    with pytest.raises(OSError, match="its mode is 644"):
        trust.is_mine("use", b"", "")


@pytest.mark.root
def test_the_key_of_another_user_is_not_used(state: Path) -> None:
    trust.sign("use", b"")
    trust._keys.clear()
    os.chown(state / "ires_kernels" / "key", 65534, 65534)
    with pytest.raises(OSError, match=r"it belongs to .*uid 65534"):
        trust.sign("use", b"")


def test_the_command_line_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.VARIABLE, "")  # and back after the test
    model = write_model(tmp_path / "model", tensors(1), config={})
    assert main(["status", f"{model}", "--key", f"{tmp_path}/named"]) == 0
    assert trust.key_path() == tmp_path / "named"
