"""File systems in a file, mounted on a loop device; only root can."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SIZE = 320 << 20  # bytes; XFS wants 300 MB


class Disk:
    """A file system in a file."""

    def __init__(self, folder: Path, system: str) -> None:
        self.image = folder / "image"
        self.mounted = folder / "mounted"
        self.mounted.mkdir()
        self.image.touch()
        os.truncate(self.image, SIZE)
        subprocess.run([f"mkfs.{system}", "-q", f"{self.image}"], check=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", f"{self.image}", f"{self.mounted}"], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", f"{self.mounted}"], check=True)

    def sync(self) -> None:
        """Make durable what is there so far."""
        subprocess.run(["sync", "--file-system", f"{self.mounted}"], check=True)

    def cut(self, *, with_log: bool) -> None:
        """Let nothing more through. With the log, names and sizes are as the programs left them, whatever data is."""
        command = "shutdown -f" if with_log else "shutdown"
        subprocess.run(["xfs_io", "-x", "-c", command, f"{self.mounted}"], check=True)
