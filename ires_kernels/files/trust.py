"""Whose the state of a merge is: a key that only this user has, signatures with it, and the owners of files.

Nothing that lies in a model folder or beside it is ours until it is proved to be, for folders are downloaded, and disks
are shared. So what tells a later run what to do is signed (HMAC-SHA256) with 32 random bytes that lie in the user's
state directory, and is followed only where the signature is right. `IRES_KEY`, or --key, names another file for them:
one on a volume that outlives the container, or one that a group of users shares; with it, files of other users are
taken up as well, as long as their signature is right.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import pwd
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

VARIABLE = "IRES_KEY"
SIGNATURE = "signature"
"""Of a table, under which key its signature is."""
_LENGTH = 32
_WAY_OUT = f"Name a file for the key yourself: --key PATH, or {VARIABLE}=PATH."
_keys: dict[str, bytes] = {}  # by path: a run that began with a key ends with it


def sign(kind: str, content: bytes) -> str:
    """The signature of `content` for one use, `kind`; the key is made where there is none yet.

    Raises OSError where that cannot be, or where the key is not one that others cannot know.
    """
    return _digest(_key(make=True) or b"", kind, content)


def is_mine(kind: str, content: bytes, signature: object) -> bool:
    """Whether `sign` gave this signature, with the same key, for the same use."""
    key = _key(make=False)
    if key is None or not isinstance(signature, str):
        return False
    return hmac.compare_digest(_digest(key, kind, content).encode(), signature.encode(errors="replace"))


def signed(kind: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """A table of JSON types with its signature in it."""
    return {**table, SIGNATURE: sign(kind, _canonical(table))}


def is_signed(kind: str, table: Mapping[str, Any]) -> bool:
    """Whether `signed` made this table, however its text was laid out since."""
    return is_mine(kind, _canonical(table), table.get(SIGNATURE))


def seal(kind: str, text: bytes) -> bytes:
    """A JSON object in text, as `json.dumps` with an indent lays it out, with its signature in a line of its own."""
    rest = text.removeprefix(b"{\n")
    return f'{{"{SIGNATURE}": "{sign(kind, rest)}",\n'.encode() + rest


def unseal(kind: str, raw: bytes) -> bytes | None:
    """The text that `seal` was given; None where it is not what that made. Nothing of it is parsed before."""
    head, _, rest = raw.partition(b"\n")
    signature = head.removeprefix(f'{{"{SIGNATURE}": "'.encode()).removesuffix(b'",')
    return b"{\n" + rest if is_mine(kind, rest, signature.decode(errors="replace")) else None


def reseal(kind: str, raw: bytes) -> bytes:
    """What somebody else has sealed, or nobody, as if we had."""
    head, _, rest = raw.partition(b"\n")
    return seal(kind, b"{\n" + rest if head.startswith(f'{{"{SIGNATURE}": '.encode()) else raw)


def is_explicit() -> bool:
    """Whether the user has named the key: then files of others who have it are taken up too."""
    return bool(os.environ.get(VARIABLE))


def is_shared() -> bool:
    """Whether a group has the key: then it gets at what is unfinished, as the umask allows."""
    with suppress(OSError):
        return is_explicit() and bool(os.stat(key_path()).st_mode & stat.S_IRGRP)
    return False


def key_path() -> Path:
    """Where the key is, or will be. Raises OSError where nobody knows."""
    explicit = os.environ.get(VARIABLE)
    if explicit:
        return Path(os.path.abspath(explicit))
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        state = os.path.join(_home(), ".local", "state")
    return Path(state, "ires_kernels", "key")


def user_name(uid: int) -> str:
    """A user, for messages."""
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def stranger(status: os.stat_result, own_uid: int | None = None) -> str:
    """Who else owns a file, in words; nothing where it is ours.

    own_uid  what owns a file that we have made beside it, where that may not be our own number (NFS with root_squash)
    """
    return "" if status.st_uid in (os.geteuid(), own_uid) else f"belongs to {user_name(status.st_uid)}"


def _home() -> str:
    """The home of the user that this process runs as: sudo may leave us that of another."""
    home = os.environ.get("HOME", "")
    if os.path.isabs(home):
        with suppress(OSError):
            if os.geteuid() != 0 or os.stat(home).st_uid == 0:
                return home
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        raise OSError(
            errno.ENOENT,
            "this user has no home directory (HOME is not set), and so no place for the key that signs the state of "
            f"merges. {_WAY_OUT.removesuffix('.')}",
            f"uid {os.geteuid()}",
        ) from None


def _canonical(table: Mapping[str, Any]) -> bytes:
    rest = {key: value for key, value in table.items() if key != SIGNATURE}
    return json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()


def _digest(key: bytes, kind: str, content: bytes) -> str:
    return hmac.new(key, kind.encode() + b"\0" + content, hashlib.sha256).hexdigest()


def _key(*, make: bool) -> bytes | None:
    """The key; None where there is none and none is to be made."""
    try:
        path = key_path()
    except OSError:
        if make:
            raise
        return None
    known = _keys.get(f"{path}")
    if known is None:
        try:
            known = _read(path)
            if known is None and make:
                _make(path)
                known = _read(path)
        except OSError as error:
            text = f"the key that signs the state of merges cannot be used: {error.strerror}. {_WAY_OUT}"
            raise OSError(error.errno, text.removesuffix("."), f"{path}") from None
        if known is not None:
            _keys[f"{path}"] = known
    if known is None and make:
        raise OSError(errno.ENOENT, "the key that signs the state of merges was removed as it was made", f"{path}")
    return known


def _read(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if is_explicit() else os.O_NOFOLLOW))
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        status = os.fstat(fd)
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        if not is_explicit() and status.st_uid != os.geteuid():
            raise OSError(errno.EPERM, f"it belongs to {user_name(status.st_uid)}")
        if mode & (0o007 if is_explicit() else 0o077):
            # The key is no secret any more, so nobody is told to make its mode right and go on.
            raise OSError(errno.EPERM, f"its mode is {mode:o}, so others can read or change it. Delete it, or move it")
        key = os.read(fd, 1 << 16)
        if len(key) < _LENGTH:
            raise OSError(errno.EINVAL, f"it has {len(key)} bytes, wanted {_LENGTH} random ones or more")
        return key
    finally:
        os.close(fd)


def _make(path: Path) -> None:
    """Make the key, unless another process was faster: its key counts."""
    if not is_explicit():
        os.makedirs(path.parent.parent, 0o700, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(path.parent, 0o700)
        status = os.stat(path.parent, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode) or stranger(status) or status.st_mode & 0o022:
            raise OSError(errno.EPERM, f"{path.parent} is no folder that only you can write to")
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            os.write(fd, secrets.token_bytes(_LENGTH))
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.link(temporary, path)  # not rename, which would replace the key of a faster process
        except FileExistsError:
            return
        except OSError:  # a file system without links
            if not os.path.lexists(path):
                os.rename(temporary, path)
                return
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
