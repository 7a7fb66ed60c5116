"""A folder that several processes have filled, as one of them finishes it."""

from __future__ import annotations

import os
from pathlib import Path

from ires_kernels.files.locks import hold_together, lock, lock_with_others
from ires_kernels.files.new_folder import NewFolder
from ires_kernels.files.ownership import Access
from ires_kernels.files.unfinished import FINISHING, MARKER


class FinishedFolder(NewFolder):
    """A folder whose files are all complete, to be finished by one process: others may not have ended yet.

    Leaving without `commit` keeps all that is complete.
    """

    def __init__(self, out: Path, identity: str, keep: bytes, *, locked: bool = True, access: Access | None = None):
        super().__init__(out, identity, keep, locked=locked, access=access)
        self._locks |= {FINISHING}
        self._stays = True
        self._finishing = -1

    def _make(self) -> None:
        """It is there, or another process has finished it."""

    def _take(self, _: bool, /) -> int:
        if self._locked:
            place = self.partial / FINISHING
            self._finishing = lock(place, make=not os.path.lexists(place))
        marker = self.partial / MARKER
        try:
            fd, alone = lock_with_others(marker, wanted=self._locked)
            if alone:
                hold_together(fd, marker)
        except BaseException:
            self._unlock()
            raise
        return fd

    def _unlock(self) -> None:
        fd, self._finishing = self._finishing, -1
        if fd >= 0:
            os.close(fd)

    def _close(self) -> None:
        self._unlock()
        super()._close()
