"""A folder for as long as a process lives: nobody else may look into it, and it is gone afterwards.

Who is killed removes nothing. So a process holds a lock on its folder, which ends with it and with all of its forks,
and whoever makes a folder removes those of the same user that nobody holds. It has the name by which it is found only
when it is locked.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_HELD = ".held"


def make(prefix: str) -> Path:
    """A new folder among the temporary ones of this machine, after those of dead processes were removed."""
    begun = Path(tempfile.mkdtemp(prefix=prefix))
    _sweep(begun.parent, prefix)
    folder = begun
    fd = os.open(begun, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)  # open until the process ends
    with suppress(OSError):  # without locks there, nobody finds it
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = begun.rename(begun.with_name(f"{begun.name}{_HELD}"))
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # and no fork of that
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(place: Path, prefix: str) -> None:
    """Remove the folders that nobody holds any more; of what cannot be looked at or removed nothing is said."""
    for path in place.glob(f"{prefix}*{_HELD}"):
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)
